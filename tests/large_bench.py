"""Time and peak memory of sample.py by the size of the picture, on one core; no test.

    python tests/large_bench.py [MEGAPIXELS ...] [--tile N] [--out FOLDER]        1 6 24 unless others are given

Each size is a JPEG of 3:2 made from one photograph, restored in one network evaluation by weights/tiny, in a process of
its own. `+` is the peak above that of the first size, for each megapixel more: the picture is 3 bytes a pixel as
bytes and 4 in Pillow, the latent of weights/tiny is 4 and is there up to five times while a step is taken.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "tests" / "photos" / "bowl.jpg"


def measure(file: Path, output: Path, tile: int) -> tuple[float, float]:
    """(seconds, peak resident MB) of one run of sample.py."""
    argv = [sys.executable, "sample.py", "--input", file, "--output", output, "--steps", 1, "--tile", tile]
    began = time.monotonic()
    process = subprocess.Popen(list(map(str, argv)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "sample.py failed"
    return time.monotonic() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megapixels", type=float, nargs="*", default=[1, 6, 24])
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    rows = []
    for mp in args.megapixels:
        width = round(1000 * (1.5 * mp) ** 0.5)
        picture = Image.open(PHOTO).convert("RGB").resize((width, round(width / 1.5)), Image.Resampling.BICUBIC)
        picture.save(folder / f"in-{mp:g}.jpg", quality=90)
        del picture
        seconds, peak = measure(folder / f"in-{mp:g}.jpg", folder / f"out-{mp:g}.jpg", args.tile)
        assert Image.open(folder / f"out-{mp:g}.jpg").size == (width, round(width / 1.5))
        rows.append((mp, peak))
        above = (peak - rows[0][1]) / (mp - rows[0][0]) if len(rows) > 1 else 0
        print(f"{mp:4g} MP {seconds:7.1f} s, {seconds / mp:.1f} s/MP {peak:7.0f} MB, +{above:.1f} MB/MP", flush=True)


if __name__ == "__main__":
    main()
