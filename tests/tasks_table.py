"""One LoRA for three tasks beside three LoRAs for one task each: PSNR in dB, means over the photographs kept out.

    python tests/tasks_table.py --work runs/make-tiny [--tile 128]

WORK must hold what weights/make_tiny.py writes with `--stage photographs`. Each LoRA trains on WORK/training with the
recipe of `make demo`; the one for three tasks has three times the steps, so that each task has as many pictures. A
restoration is one step on the middle 256 pixels, with the task's prompt. BM3D is told the noise, and knows nothing of
darkness and fading. `pip install bm3d` first.
"""

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import quality_bench as bench  # noqa: E402
import speedrun  # noqa: E402
import train  # noqa: E402

TASKS = {
    "noise=0.12,jpeg=40": "Remove the noise from this photo.",
    "underexpose=2/2000/4": "Brighten this dark photo and remove its noise.",
    "fade=0.6/0.2/0.4,sepia=0.5": "Bring back the contrast and the colors of this faded photo.",
}
STEPS = 200
MORE = "--validate-every-epochs 0 --dtype float32"


def trained(work: Path, name: str, tasks: list[str]) -> Path:
    """The LoRA of some tasks; one that is there is not trained again."""
    folder = work / f"tasks-{name}"
    if not (folder / "lora.safetensors").exists():
        argv = ["--hr-root", str(work / "training"), "--output-dir", str(folder), "--steps", str(STEPS * len(tasks))]
        for task in tasks:
            argv += ["--degrade", task, "--prompt", TASKS[task]]
        if code := train.main([*argv, *speedrun.RECIPE.split(), *MORE.split()]):
            sys.exit(code)
    return folder / "lora.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/make-tiny"), help="default: %(default)s")
    parser.add_argument("--tile", type=int, default=128, help="side in pixels; default: %(default)s")
    args = parser.parse_args()
    tiny, photos = bench.ROOT / "weights" / "tiny", [x for rows in bench.middles(args.work).values() for x in rows]
    every = trained(args.work, "three", list(TASKS))
    lines = []
    for number, (task, prompt) in enumerate(TASKS.items()):
        pairs = [bench.pair(clean, task, k) for k, (_, clean) in enumerate(photos)]
        loras = (None, trained(args.work, f"one-{number}", [task]), every)
        models = [bench.Model(tiny, lora, prompt, args.tile, "euler") for lora in loras]
        ways = [lambda bad: bad, *([lambda bad: bench.bm3d_way()(bad, 0.12)] if "noise" in task else [])]
        cells = [f"{bench.mean_psnr(way, pairs):.2f}" for way in ways] + [""] * (2 - len(ways))
        cells += [f"{bench.mean_psnr(lambda bad, m=m: m(bad, 1), pairs):.2f}" for m in models]
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    heads = (
        "degraded",
        "BM3D",
        "base",
        f"its own LoRA, {STEPS} steps",
        f"one LoRA for all, {STEPS * len(TASKS)} steps",
    )
    print(f"\n| {len(photos)} photographs | {' | '.join(heads)} |\n|---|{'--:|' * len(heads)}", *lines, sep="\n")


if __name__ == "__main__":
    main()
