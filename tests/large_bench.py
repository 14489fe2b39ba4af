"""Time and peak memory of sample.py by the size of the picture, on one core; no test.

    python tests/large_bench.py [MEGAPIXELS ...] [--weights FOLDER] [--tile N] [--no-share-norms] [--out FOLDER]

The sizes are 1 6 24 by default.

Each size is a JPEG of 3:2 made from one photograph, restored in one network evaluation, by weights/tiny if no other
folder is named, in a process of its own. `+` is the peak above that of the first size, for each megapixel more: the
picture is 3 bytes a pixel, and 4 in Pillow; the latent of weights/tiny is 4, and there are up to five of it while a
step is taken. With the Flux autoencoder it is 1: 16 floats for 64 pixels.
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


def make(folder: Path, megapixels: float) -> tuple[Path, tuple[int, int]]:
    """A JPEG of 3:2, and its size."""
    width = round(1000 * (1.5 * megapixels) ** 0.5)
    picture = Image.open(PHOTO).convert("RGB").resize((width, round(width / 1.5)), Image.Resampling.BICUBIC)
    picture.save(folder / f"in-{megapixels:g}.jpg", quality=90)
    return folder / f"in-{megapixels:g}.jpg", picture.size


def measure(file: Path, output: Path, *flags: object) -> tuple[float, float]:
    """(seconds, peak resident MB) of one run of sample.py."""
    argv = [sys.executable, "sample.py", "--input", file, "--output", output, "--steps", 1, *flags]
    began = time.monotonic()
    process = subprocess.Popen(list(map(str, argv)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "sample.py failed"
    return time.monotonic() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megapixels", type=float, nargs="*", default=[1, 6, 24])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--share-norms", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    rows = []
    for mp in args.megapixels:
        file, size = make(folder, mp)
        output = folder / f"out-{mp:g}.jpg"
        norms = "--share-norms" if args.share_norms else "--no-share-norms"
        seconds, peak = measure(file, output, "--tile", args.tile, norms, "--weights", args.weights.resolve())
        assert Image.open(output).size == size
        rows.append((mp, peak))
        above = (peak - rows[0][1]) / (mp - rows[0][0]) if len(rows) > 1 else 0
        print(f"{mp:4g} MP {seconds:7.1f} s, {seconds / mp:.1f} s/MP {peak:7.0f} MB, +{above:.1f} MB/MP", flush=True)


if __name__ == "__main__":
    main()
