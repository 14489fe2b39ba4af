"""Whether a degradation has an effect: tried on noise, once with each of its choices, and operator by operator.

A chance such as @0.01 does not count: what is tried takes every step that can run.
"""

import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from kontext_min import degrade
from kontext_min.extras import parallel

LEFT = 4  # of 255: how far two pictures of noise at least differ afterwards, on average; they start with 85
ALIKE = 0.05  # correlation with the picture, in 64 x 64 averages; that of mere noise deviates from 0 by 0.016
LARGEST = 512  # pixels a side of what is tried; real-esrgan takes 7 s for 1024


def check_degradation(spec: str, side: int | None = None) -> None:
    """That a text describes a degradation: of any picture, or of those of `side` pixels a side.

    Raises:
        ValueError: it is none, or one that leaves every picture as it is, or nothing of a picture.
    """
    whole, rng, side = degrade.parse(spec), np.random.default_rng(0), side and min(side, LARGEST)
    noise = [Image.fromarray(rng.integers(256, size=(n, n, 3), dtype=np.uint8)) for n in (64, 1400)]
    shown, large = noise[0].resize((side or 256,) * 2), noise[1]  # dust is so rare that it may miss a small picture
    variants, at = _variants(whole), f" of {side} x {side} pixels" * bool(side)
    works = [v for v in variants if _changes(v, shown)] or [v for v in variants if not side and _changes(v, large)]
    if not works:
        raise ValueError(f"--degrade {spec}: changes nothing{at}; give stronger values.")
    other = shown.transpose(Image.Transpose.ROTATE_90)
    if not any(_leaves_something(step, shown, other) for step in variants):
        raise ValueError(f"--degrade {spec}: leaves next to nothing of a picture; give weaker values.")
    operators = [
        (kind, bool(step and _changes(step, large if kind == "dust" else shown))) for kind, step in _operators(whole)
    ]
    back = ("resize", True) in operators  # resize=1 after another size
    idle = [kind for kind, changes in operators if not (changes or (kind == "resize" and back))]
    if idle and parallel.place()[0] == 0:
        print(f"note: --degrade {spec:.1000}: never changes a picture{at}: {', '.join(idle)}", file=sys.stderr)


def _can_run(step: degrade.Step) -> bool:
    """Whether the chance of a step is not nil."""
    return step.chance is None or step.chance >= 1e-6


def _variants(step: degrade.Step) -> list[degrade.Step]:
    """Steps without chance that together have every part that can run: each of "one", all of "all"."""
    if step.kind not in ("all", "one"):
        return [replace(step, chance=None)] * _can_run(step)
    parts = [found for part in step.parts if _can_run(step) and (found := _variants(part))]
    if step.kind == "one":
        return [variant for part in parts for variant in part]
    return [
        replace(step, parts=tuple(part[k % len(part)] for part in parts), chance=None)
        for k in range(max(map(len, parts), default=0))
    ]


def _operators(step: degrade.Step, runs: bool = True) -> list[tuple[str, degrade.Step | None]]:
    """Every operator of a degradation, None where its chance is nil."""
    runs &= _can_run(step)
    if step.kind in ("all", "one"):
        return [found for part in step.parts for found in _operators(part, runs)]
    return [(step.kind, step if runs else None)]


def _changes(step: degrade.Step, picture: Image.Image) -> bool:
    """Whether a step changes a picture, by more than rounding, in one of 16 draws."""
    rng = np.random.default_rng(0)
    return any(most > 1 or mean > 0.01 for most, mean in (_difference(step(picture, rng), picture) for _ in range(16)))


def _leaves_something(step: degrade.Step, a: Image.Image, b: Image.Image) -> bool:
    """Whether two pictures still differ after a step, and not by noise alone: large forms stay."""
    rng = np.random.default_rng(0)
    forms = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize(a.size, Image.Resampling.BICUBIC)
    first, second, left = (step(p, np.random.default_rng(0)) for p in (a, b, forms))
    if _difference(first, second)[1] < LEFT:
        return False
    x, y = (np.asarray(p.convert("L").resize((64, 64), Image.Resampling.BOX), dtype=float) for p in (forms, left))
    return x.std() * y.std() > 0 and float(np.corrcoef(x.ravel(), y.ravel())[0, 1]) > ALIKE


def _difference(a: Image.Image, b: Image.Image) -> tuple[float, float]:
    """The largest and the mean difference of two pictures, of 255."""
    difference = np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b))
    return difference.max(), difference.mean()
