"""Compare a restored picture with the clean one: PSNR, SSIM, how much fine texture it has, and whether it is shifted.

    PSNR = 10 log10(R^2 / mean (a - b)^2)
    SSIM = mean of (2 ma mb + C1)(2 cab + C2) / ((ma^2 + mb^2 + C1)(va + vb + C2)),  C1 = (0.01 R)^2,  C2 = (0.03 R)^2

R is 255 for bytes and 1 for floats. m, v and c are means, variances and covariance (of the population) under an 11 x 11
Gaussian window of sigma 1.5, wherever it fits into the picture; each channel by itself, then the mean. Wang et al.
2004, Image quality assessment, eq. 13 and section III.C. scikit-image agrees if given gaussian_weights=True, sigma=1.5,
use_sample_covariance=False. PSNR-Y is the PSNR of the luma.

    shift = argmax of the inverse Fourier transform of  F(a) conj(F(b)) / |F(a) conj(F(b))| * low pass

Kuglin & Hines 1975, phase correlation: a model that starts from noise may re-frame a picture, and a shift of a few
pixels costs as much PSNR as a bad restoration.

Pictures are PIL images or arrays (H, W, 3) or (H, W). They become float64 a few rows at a time: a whole picture of
24 megapixels would take 576 MB, several times over.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray
ROWS = 256
MIDDLE = 1024  # pixels a side that `shift` looks at
NEAR = 256  # pixels a side from which on it tells a shift of one or two pixels


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures. ValueError if the shapes differ."""
    return _decibels((x - y) ** 2 for x, y in _bands(a, b))


def psnr_y(a: Picture, b: Picture) -> float:
    """PSNR of the luma of two RGB pictures, in dB; grey and small colour errors count less than in `psnr`."""
    return _decibels((luma(x) - luma(y)) ** 2 for x, y in _bands(a, b))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity, at most 1. ValueError if the shapes differ or a side is under 11 pixels."""
    return _mean(_similarity(x, y) for x, y in _bands(a, b, window=11))


def luma(a: Picture) -> np.ndarray:
    """(H, W, 3) to Y / 255 (H, W), Y = 16 + 65.481 R + 128.553 G + 24.966 B (ITU-R BT.601) of R, G, B in [0, 1]."""
    return (16 + _unit(a) @ np.array([65.481, 128.553, 24.966])) / 255


def texture(a: Picture, clean: Picture) -> float:
    """Energy of the Laplacian of `a` relative to the clean picture's: below 1 is too smooth, above 1 too rough.

    Infinite, or 1 for two of them, if the clean picture has none.
    """
    energy = np.zeros(2)
    for pair in _bands(a, clean, window=3):
        energy += [np.sum(_laplacian(x) ** 2) for x in pair]
    return float(energy[0] / energy[1]) if energy[1] else float("inf") if energy[0] else 1.0


def shift(a: Picture, b: Picture) -> tuple[int, int]:
    """How many pixels `a` lies to the right of `b` and below it: (dx, dy), reliable from 64 pixels a side on.

    One or two pixels are told from 256 pixels a side on.

    The middle 1024 pixels are compared; shifts of up to about a quarter of them are found. (0, 0) if there is no clear
    answer, as of flat pictures.

    Raises:
        ValueError: the shapes differ.
    """
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        raise ValueError(f"pictures of shapes {x.shape} and {y.shape}; a shift needs two of one size and one mode")
    sides = [min(side, MIDDLE) for side in x.shape[:2]]
    top, left = ((side - shown) // 2 for side, shown in zip(x.shape[:2], sides, strict=True))
    spectra = []
    for z in (x, y):
        z = _unit(z[top : top + sides[0], left : left + sides[1]])
        z = z.mean(axis=2) if z.ndim == 3 else z
        # Fading out at the borders, where a Fourier transform would see the jump to the other side.
        spectra.append(np.fft.rfft2((z - z.mean()) * np.hanning(sides[0])[:, None] * np.hanning(sides[1])))
    cross = spectra[0] * spectra[1].conj()
    # Restoring changes the high frequencies; what they say about a place is noise.
    frequency = np.hypot(np.fft.fftfreq(sides[0])[:, None], np.fft.rfftfreq(sides[1]))
    low = np.exp(-((frequency / 0.1) ** 2))
    peaks = np.fft.irfft2(cross * low / np.maximum(np.abs(cross), 1e-12), sides)
    dy, dx = np.unravel_index(peaks.argmax(), peaks.shape)
    # No clear answer: a peak of less than a third of that of equal pictures, or one that is not much higher than the
    # place of no shift. That of equal pictures is wide: one pixel away it is still 0.9 of its height, two away 0.67.
    # So the peak of a shift of one or two pixels is higher by little; a small picture has as much by chance.
    equal = np.fft.irfft2(low, sides)
    higher = min(1.5, math.sqrt(equal[0, 0] / max(equal[dy, dx], 1e-12))) if min(sides) >= NEAR else 1.5
    if peaks[dy, dx] < max(higher * peaks[0, 0], 0.35 * equal[0, 0]):
        return 0, 0
    return tuple(int(d - side if d > side // 2 else d) for d, side in ((dx, sides[1]), (dy, sides[0])))


Row = dict[str, Any]  # {"name": of the picture, "input": scores, "restored": scores, "shift": pixels}
SCORES = {"psnr": ("PSNR", 2), "psnr_y": ("PSNR-Y", 2), "ssim": ("SSIM", 3), "texture": ("texture", 2)}  # title, digits


def scores(a: Picture, clean: Picture) -> dict[str, float]:
    """All of the above by name. ValueError as in `ssim`."""
    return {"psnr": psnr(a, clean), "psnr_y": psnr_y(a, clean), "ssim": ssim(a, clean), "texture": texture(a, clean)}


def row(name: str, degraded: Picture, restored: Picture, clean: Picture) -> Row:
    """The scores of a picture before and after. ValueError as in `ssim`."""
    row: Row = {"name": name, "input": scores(degraded, clean), "restored": scores(restored, clean)}
    return row | {"shift": max(map(abs, shift(restored, clean)))}


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of the scores of some pictures, of how many, and the largest of their shifts.

    Inputs that equal their clean picture do not count, unless all do: their PSNR is infinite.
    """
    row: Row = {"name": "mean", "shift": max(r["shift"] for r in rows)}
    rows = counted(rows)
    row["pictures"] = len(rows)
    for part in ("input", "restored"):
        row[part] = {key: sum(r[part][key] for r in rows) / len(rows) for key in SCORES}
    return row


def counted(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that a mean is of."""
    return [r for r in rows if not _is_clean(r)] or rows


def _is_clean(row: Row) -> bool:
    return bool(np.isinf(row["input"]["psnr"]))


def table(rows: Sequence[Row]) -> str:
    """The rows in aligned lines: of each metric first the input's value, then the restored picture's."""
    width = max(len(row["name"]) for row in [*rows, {"name": "input, restored"}])
    lines = ["input, restored".ljust(width) + "".join(f"{title:>18}" for title, _ in SCORES.values())]
    for row in rows:
        values = ((row["input"][key], row["restored"][key], digits) for key, (_, digits) in SCORES.items())
        lines.append(row["name"].ljust(width) + "".join(f"{a:10.{n}f} {b:7.{n}f}" for a, b, n in values))
    lines += [
        f"{row['name']}: shifted by {row['shift']} pixels" for row in rows if row["shift"] and row["name"] != "mean"
    ]
    if rows[-1]["name"] == "mean" and not _is_clean(rows[-1]) and (clean := sum(map(_is_clean, rows))):
        lines.append(f"the mean leaves out {clean}: its input equals the clean picture")
    return "\n".join(lines)


def _unit(a: Picture) -> np.ndarray:
    """Float64 in units of full white: R = 1 from here on. ValueError if what full white is can't be told."""
    a = np.asarray(a)
    if a.dtype.kind in "iu" and a.dtype != np.uint8:
        raise ValueError(f"a picture of {a.dtype}; a metric needs bytes (uint8), or floats from 0 to 1")
    return a / 255.0 if a.dtype == np.uint8 else a.astype(np.float64)


def _bands(a: Picture, b: Picture, window: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of both in `_unit`, such that each window of so many rows is in one band and in one only."""
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        raise ValueError(f"pictures of shapes {x.shape} and {y.shape}; a metric needs two of one size and one mode")
    if min(x.shape[:2]) < window:
        size = f"{window} x {window} pixels, got {x.shape[1]} x {x.shape[0]}"
        raise ValueError(f"this metric needs at least {size}; use a larger picture")
    for top in range(0, len(x) - window + 1, ROWS):
        yield tuple(_unit(z[top : top + ROWS + window - 1]) for z in (x, y))


def _mean(parts: Iterable[np.ndarray]) -> float:
    total = count = 0
    for part in parts:
        total, count = total + part.sum(), count + part.size
    return float(total / count)


def _decibels(errors: Iterable[np.ndarray]) -> float:
    error = _mean(errors)
    return float(-10 * np.log10(error)) if error > 0 else float("inf")


def _similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mx, my = _window(x), _window(y)
    vx, vy, cov = _window(x * x) - mx * mx, _window(y * y) - my * my, _window(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def _window(x: np.ndarray) -> np.ndarray:
    """Gaussian means over every 11 x 11 window that fits: (H, W, ...) -> (H - 10, W - 10, ...)."""
    k = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    k /= k.sum()
    h, w = x.shape[0] - 10, x.shape[1] - 10
    x = sum(k[i] * x[i : i + h] for i in range(11))
    return sum(k[i] * x[:, i : i + w] for i in range(11))


def _laplacian(x: np.ndarray) -> np.ndarray:
    return x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
