"""CPU time and peak memory of sample.py for pictures of several sizes, on one core. This is no test.

    python tests/large_bench.py [MEGAPIXELS ...] [--weights FOLDER] [--tile N] [--out FOLDER]

The default sizes are 1, 6 and 24 megapixels. Each picture is a JPEG of 3:2 made from one photograph. sample.py restores
it in one network evaluation, in a process of its own.

`+` is the growth of the peak over that of the first size, per megapixel. A picture takes 3 bytes a pixel, and 4 in
Pillow. A latent of weights/tiny takes 4 bytes a pixel, and a step holds up to five of them. A latent of the Flux
autoencoder takes 1 byte a pixel: 16 floats for 64 pixels.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "tests" / "photos" / "bowl.jpg"


def make(folder: Path, megapixels: float) -> tuple[Path, tuple[int, int]]:
    """Write a JPEG of 3:2. Returns its path and its (width, height)."""
    width = round(1000 * (1.5 * megapixels) ** 0.5)
    picture = Image.open(PHOTO).convert("RGB").resize((width, round(width / 1.5)), Image.Resampling.BICUBIC)
    picture.save(folder / f"in-{megapixels:g}.jpg", quality=90)
    return folder / f"in-{megapixels:g}.jpg", picture.size


def measure(file: Path, output: Path, *flags: object) -> tuple[float, float]:
    """Run sample.py once. Returns the CPU seconds that it takes and its peak resident memory in MB."""
    argv = [sys.executable, "sample.py", "--input", file, "--output", output, "--steps", 1, *flags]
    process = subprocess.Popen(list(map(str, argv)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "sample.py failed"
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megapixels", type=float, nargs="*", default=[1, 6, 24], help="sizes (default: 1 6 24)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "tiny", help="default: weights/tiny")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile in pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: a temporary one)")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    rows = []
    for mp in args.megapixels:
        file, size = make(folder, mp)
        output = folder / f"out-{mp:g}.jpg"
        seconds, peak = measure(file, output, "--tile", args.tile, "--weights", args.weights.resolve())
        assert Image.open(output).size == size
        rows.append((mp, peak))
        above = (peak - rows[0][1]) / (mp - rows[0][0]) if len(rows) > 1 else 0
        print(f"{mp:4g} MP {seconds:7.1f} s, {seconds / mp:.1f} s/MP {peak:7.0f} MB, +{above:.1f} MB/MP", flush=True)


if __name__ == "__main__":
    main()
