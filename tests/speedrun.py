"""How fast a LoRA learns: train from the bundled base until dark photographs are restored, and print the seconds.

    make speedrun        or: python tests/speedrun.py [flags of train.py, which replace those of RECIPE and STEPS]

The goal is GOAL dB on the photograph of tests/photos that train.py holds out, degraded as in `make demo`. The seconds
are those of all training steps, without validation and start. Change the recipe or the method, and if the goal is
reached sooner, add a row to the ledger in docs/speedrun.md.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

GOAL = 28.0  # dB; the base alone leaves the picture dark, 12.8 dB
TASK = ["--degrade", "underexpose=2/2000/4", "--prompt", "Brighten this dark photo and remove its noise."]
RECIPE = "--lora-targets all --sigma source --penalty psnr --ema 0.95"
STEPS = "--steps 200 --validate-every-epochs 1000000"  # validation before the first step and after the last one


def main(more: list[str]) -> int:
    """Returns 0 if the goal is reached."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        roots = ["--hr-root", str(ROOT / "tests" / "photos"), "--output-dir", str(run)]
        if code := train.main([*roots, *TASK, *RECIPE.split(), *STEPS.split(), *more]):
            return code
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    psnr = [row["psnr"] for row in rows if row.get("validation")][-1]
    seconds = sum(row["seconds"] for row in rows if not row.get("validation"))
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    print(f"{'reached' if psnr >= GOAL else 'NOT reached'}: {psnr:.2f} dB of {GOAL} in {seconds:.0f} s, {threads}")
    return 0 if psnr >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
