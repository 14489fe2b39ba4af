"""How long the recipes of README.md take on a CPU: python tests/recipe_times.py

Runs their commands as printed, with one thread, and prints CPU seconds, loader processes included. Training takes the
eight photographs of tests/photos, restoring one of them (1.05 megapixels). Training runs 10 and 40 steps, and the line
holds what follows for all steps:

    seconds = t_10 + (steps - 10) * (t_40 - t_10) / 30

Recipes for other hardware (torchrun, --weights) are left out.
"""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageFilter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def spent(argv: list[str], folder: Path) -> float:
    """CPU seconds of a program, with its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{shlex.join(argv)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def training(argv: list[str], folder: Path) -> float:
    """CPU seconds of train.py with all its steps."""
    short = [spent([*argv, "--steps", str(n)], folder) for n in (10, 40)]
    if "--steps" in argv:
        steps = int(argv[argv.index("--steps") + 1])
    else:
        steps = json.loads((ROOT / "weights" / "tiny" / "defaults.json").read_text())["steps"]
    return short[0] + (steps - 10) * (short[1] - short[0]) / 30


def main() -> None:
    """The commands in the order of the page: later ones need what earlier ones wrote."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ").splitlines()
    with tempfile.TemporaryDirectory() as name:
        photos, eight, one = ROOT / "tests" / "photos", Path(name) / "eight", Path(name) / "one"
        for home, names in ((eight, [p.name for p in photos.glob("*.jpg")]), (one, ["bowl.jpg"])):
            for folder in ("photos", "scans", "pairs/clean", "pairs/degraded", "tests/photos"):
                (home / folder).mkdir(parents=True)
                for photo in names:
                    (home / folder / photo).symlink_to(photos / photo)
            for photo in (home / "pairs/degraded").iterdir():
                blurred = Image.open(photo).filter(ImageFilter.GaussianBlur(2))
                photo.unlink()
                blurred.save(photo)
        for file in ("old.jpg", "photo.jpg", "tests/photos/picosdeeuropa.jpg"):
            (one / file).symlink_to(photos / "bowl.jpg")
        (eight / "runs").mkdir()
        (one / "runs").symlink_to(eight / "runs")
        for line in dict.fromkeys(lines):
            words = shlex.split(line, comments=True)
            if len(words) < 2 or words[1] not in ("train.py", "sample.py") or re.search(r"FLUX|--plan", line):
                continue
            home, time = (eight, training) if words[1] == "train.py" else (one, spent)
            words = [str(home) + w[1:] if w.startswith("~/") else w for w in words[2:] if w != "--overwrite"]
            seconds = time([sys.executable, str(ROOT / line.split()[1]), *words, "--overwrite"], home)
            print(f"{seconds:7.0f}  {line}", flush=True)


if __name__ == "__main__":
    main()
