"""Change one thing of the method at a time: train each variant equally long on weights/tiny, measure on photographs.

    python tests/method_table.py --work runs/make-tiny [--only bridge kontext]        one table

WORK must hold what weights/make_tiny.py writes with `--stage photographs` and `--stage pairs --degrade SPEC --pairs
4000`. Each row is one run of train.py: a LoRA of rank 64 on all Linears, 250 steps of 8 crops of 96 pixels, and the
flags of the row. The cells are PSNR in dB and texture, means over all photographs that are kept out, after 1, 2, 4, 8
and 25 network evaluations. All rows start from a base that is a plain bridge, so the other rows have a longer way to
go, kontext the longest.
"""

import argparse
import json
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import quality_bench  # noqa: E402
import train  # noqa: E402

SPEC = "blur=1.5,downsample=2,noise=0.05,jpeg=50"
FLAGS = (
    "--resolution 96 --batch-size 8 --accumulate 1 --rank 64 --lora-targets all --lr 1e-3 --warmup 20 --steps 250 "
    "--cache-latents 1 --workers 0 --validate-every-epochs 0 --dtype float32"
)
ROWS = {
    "bridge": "",
    "noise": "--source-noise 0.1",
    "auto": "--start-time auto",
    "context": "--context",
    "kontext": "--objective kontext",
}
STEPS = (1, 2, 4, 8, 25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/make-tiny"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to train (default: all)")
    given = parser.parse_args()
    pairs = given.work / f"pairs-{SPEC}"
    roots = ["--hr-root", str(pairs / "clean"), "--lr-root", str(pairs / "degraded")]
    table = []
    for name in given.only:
        folder, scores = given.work / f"method-{name}", given.work / f"method-{name}.json"
        argv = [*roots, "--output-dir", str(folder), "--cache-dir", str(given.work / "cache-method")]
        if not (folder / "lora.safetensors").exists() and train.main([*argv, *FLAGS.split(), *ROWS[name].split()]):
            return 1
        bench = ["--work", str(given.work), "--degrade", SPEC, "--lora", str(folder / "lora.safetensors")]
        bench += ["--no-classical", "--no-base", "--tile", "96", "--json", str(scores)]
        quality_bench.main([*bench, "--steps", *map(str, STEPS)])
        means = json.loads(scores.read_text())
        cells = [means[f"LoRA, {n} steps"]["all"] for n in STEPS]
        table.append(f"| {name} | {' | '.join(f'{psnr:.2f} / {texture:.2f}' for psnr, _, texture in cells)} |")
    print(f"\n| PSNR / texture | {' | '.join(map(str, STEPS))} |\n|---|{'---|' * len(STEPS)}", *table, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
