"""Time and memory of the data pipeline, on one core but for `wait`. This is no test.

python tests/data_bench.py speed [FOLDER] [--resolution N] [--degrade SPEC]
    milliseconds per picture, beside a plain loader: open, convert, full decode, Lanczos, the same degradation, floats
python tests/data_bench.py wait [FOLDER] [--resolution N] [--degrade SPEC]
    seconds a step that a GPU waits for the loader's pictures, beside steps of 1.12 s; with all cores
python tests/data_bench.py files [COUNT]        scan of many small files, start and memory of the sampler
python tests/data_bench.py draft [FOLDER]       how a JPEG changes that is decoded at reduced size
"""

import argparse
import io
import math
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from kontext_min import data, degrade
from kontext_min.extras import inventory
from test_data import cover_crop

PHOTOS = Path(__file__).parent / "photos"


def guide(image, rng):
    """blur=1.5,noise=0.02,jpeg=85, written in the plainest way."""
    image = image.filter(ImageFilter.GaussianBlur(1.5))
    x = np.asarray(image) / 255.0
    x = x + rng.normal(0, 0.02, x.shape)
    image = Image.fromarray((x.clip(0, 1) * 255).round().astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Image.open(file).convert("RGB")


def plain(picture, size, degradation, clock):
    """A plain loader, step by step. Returns the degraded and the clean picture as floats in [-1, 1]."""
    image = ImageOps.exif_transpose(Image.open(picture.path)).convert("RGB")
    clock("read")
    scale = max(size[0] / image.width, size[1] / image.height)
    image = image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)), Image.LANCZOS)
    rng = np.random.default_rng(0)
    x, y = rng.integers(image.width - size[0] + 1), rng.integers(image.height - size[1] + 1)
    target = image.crop((x, y, x + size[0], y + size[1]))
    clock("resize, crop")
    control = degradation(target, rng)
    clock("degrade")
    pair = [torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 * 2 - 1 for i in (control, target)]
    batch = [torch.stack([x]) for x in pair]
    clock("to floats")
    return batch


def ours(pairs, i, clock):
    """The steps of Pairs[(0, i)], with a clock between them."""
    picture, bucket = pairs.pictures[i], pairs.buckets[pairs.bucket_of[i]]
    image = data.open_picture(picture.path, bucket, to_srgb=True)
    clock("read")
    target = cover_crop(image, bucket, data.numpy_generator(0, "crop", 0, picture.name))
    clock("resize, crop")
    control = pairs.degrade(target, data.numpy_generator(0, "degrade", 0, picture.name))
    clock("degrade")
    # The loop turns bytes into floats on the GPU, where this costs nothing. Here it counts.
    batch = [data.to_float(torch.stack([data.to_tensor(image)])) for image in (control, target)]
    clock("to floats")
    return batch


def speed(folder, resolution, spec):
    """Run the loaders in turn on every picture. Each step counts the better of two rounds, in CPU time."""
    buckets = data.buckets(resolution)
    pictures, small = data.usable(data.scan(folder)[0], buckets)
    pairs = data.Pairs(pictures, buckets, degrade.parse(spec), 0, "")
    print(f"{folder}: {len(pictures)} pictures ({len(small)} too small), {resolution} px, {spec}")
    ways = {"plain": lambda i, c: plain(pictures[i], buckets[pairs.bucket_of[i]], guide, c),
            "plain, degrade.py": lambda i, c: plain(pictures[i], buckets[pairs.bucket_of[i]], pairs.degrade, c),
            "ours": lambda i, c: ours(pairs, i, c),
            "ours, plain degradation": lambda i, c: ours(rough, i, c)}  # fmt: skip
    rough = data.Pairs(pictures, buckets, guide, 0, "")
    steps = ("read", "resize, crop", "degrade", "to floats")
    spent = {name: dict.fromkeys(steps, 0.0) for name in ways}
    for i in range(len(pictures)):
        best = {name: dict.fromkeys(steps, math.inf) for name in ways}
        for _ in range(2):
            for name, way in ways.items():
                last = [time.process_time()]

                def clock(step, times=best[name], last=last):
                    now = time.process_time()
                    times[step], last[0] = min(times[step], now - last[0]), now

                way(i, clock)
        for name in ways:
            for step in steps:
                spent[name][step] += best[name][step]
    print(f"{'ms a picture':25s}" + "".join(f"{step:>14s}" for step in (*steps, "all")) + "   pictures/s   times plain")
    for name in ways:
        row = [1000 * spent[name][step] / len(pictures) for step in steps]
        rate = 1000 / sum(row)
        ratio = sum(spent["plain"].values()) / sum(spent[name].values())
        print(f"{name:25s}" + "".join(f"{x:14.1f}" for x in (*row, sum(row))) + f"{rate:13.2f}{ratio:14.2f}")


def wait(folder, resolution, spec, step=1.12, steps=20):
    """What next() takes where everything else takes `step` seconds, a LoRA step of FLUX.1-Kontext on an H200."""
    buckets = data.buckets(resolution)
    pairs = data.Pairs(data.usable(data.scan(folder)[0], buckets)[0], buckets, degrade.parse(spec), 0, "")
    print(f"{folder}: {len(pairs)} pictures, {resolution} px, {spec}, {os.cpu_count()} cores, steps of {step} s")
    for workers in (0, 1, 2, 4):
        batches = iter(data.load(pairs, data.BucketSampler(pairs.bucket_of, 1, 0), workers, False))
        waited = []
        for _ in range(steps + 2):
            began = time.perf_counter()
            next(batches)
            waited.append(time.perf_counter() - began)
            time.sleep(step)
        mean, most = sum(waited[2:]) / steps, max(waited[2:])  # the first ones start the workers
        print(f"{workers} workers: waits {mean:.3f} s a step, {most:.3f} at most, {100 * mean / step:.1f} % of a step")


def files(count):
    """Scan many small pictures, then start the sampler far into a run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        contents = []
        rng = np.random.default_rng(0)
        for k in range(100):
            file = io.BytesIO()
            size = (int(rng.integers(32, 96)), int(rng.integers(32, 96)))
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "JPEG" if k % 4 else "PNG")
            contents.append((file.getvalue(), "jpg" if k % 4 else "png"))
        for k in range(count):
            (root / f"{k // 1000:03d}").mkdir(parents=True, exist_ok=True)
            content, ending = contents[k % 100]
            (root / f"{k // 1000:03d}" / f"{k:06d}.{ending}").write_bytes(content)
        buckets = data.buckets(32)
        start = time.perf_counter()
        pictures, rejected = data.scan(root)
        scanned = time.perf_counter() - start
        pictures, small = data.usable(pictures, buckets)
        text = inventory.describe(pictures, rejected + small, buckets)
        pairs = data.Pairs(pictures, buckets, None, 0, "")
        print(f"{scanned:.2f} s to scan, {time.perf_counter() - start:.2f} s until pairs are ready")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{text.splitlines()[0]}; peak {memory:.0f} MB of this process")
    tracemalloc.start()
    start = time.perf_counter()
    batches = iter(data.BucketSampler(pairs.bucket_of, 4, 0, start=10**7))
    next(batches)
    first = time.perf_counter() - start
    held, peak = (n / count for n in tracemalloc.get_traced_memory())
    print(f"sampler: {first:.3f} s to start at batch 10,000,000, {held:.0f} bytes a picture, peak {peak:.0f}")


def draft(folder):
    """Reduced against full decoding of the JPEGs of 3 megapixels and more, for buckets of four areas."""
    found = {}
    for p in data.scan(folder)[0]:
        if Image.open(p.path).format != "JPEG" or p.width * p.height < 3e6:
            continue
        full = data.open_picture(p.path)
        for resolution in (1024, 512, 256, 128):
            size = data.nearest_bucket(p.width, p.height, data.buckets(resolution))
            a = np.asarray(cover_crop(full, size, None), np.float32)
            for factor in (2, 4, 8):
                margin = min(p.width / size[0], p.height / size[1]) / factor
                if margin < 1:
                    continue
                image = Image.open(p.path)
                image.draft(None, (p.width // factor, p.height // factor))
                b = np.asarray(cover_crop(image.convert("RGB"), size, None), np.float32)
                edges = [np.abs(np.diff(x, axis=1)).mean() for x in (a, b)]
                psnr = 10 * math.log10(255**2 / max(float(((a - b) ** 2).mean()), 1e-9))
                row = next(m for m in (4, 3, 2, data.DRAFT_MARGIN, 1.5, 1.25, 1) if margin >= m)
                found.setdefault(row, []).append((psnr, edges[1] / edges[0]))
    for row, values in sorted(found.items()):
        psnr, sharp = np.array(values).T
        print(f"margin {row:4.2f}: {len(values):3d} cases, PSNR min {psnr.min():.1f} median {np.median(psnr):.1f} dB, "
              f"sharpness min {sharp.min():.3f} median {np.median(sharp):.3f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "wait", "files", "draft"), help="what to measure")
    parser.add_argument("argument", nargs="?", help="FOLDER (default: tests/photos) or COUNT (default: 10,000)")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the square bucket (default: %(default)s)")
    parser.add_argument("--degrade", default="blur=1.5,noise=0.02,jpeg=85", help="default: %(default)s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "speed":
        speed(Path(given.argument or PHOTOS), given.resolution, given.degrade)
    elif given.what == "wait":
        wait(Path(given.argument or PHOTOS), given.resolution, given.degrade)
    elif given.what == "files":
        files(int(given.argument or 10_000))
    else:
        draft(Path(given.argument or PHOTOS))
