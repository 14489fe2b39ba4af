"""Colour fix: give a restored picture the colours of the degraded one, and leave it its detail.

Generated tiles drift in colour, from each other and from the input. Two cures, of which neither is for faded or dark
pictures, whose colours are what is to be restored:

    wavelet    out = high(restored) + low(degraded)                       low: five passes of the 3 x 3 binomial kernel
                   = restored + low(degraded - restored)                  at dilations 1, 2, 4, 8, 16; high = x - low(x)
    adain      out = (restored - mean(restored)) std(degraded) / std(restored) + mean(degraded)       channel by channel

Sources: IceClear/StableSR, scripts/wavelet_color_fix.py (also SUPIR and OSEDiff); Huang & Belongie 2017, "Arbitrary
Style Transfer in Real-time with Adaptive Instance Normalization", equation 8. The second form of `wavelet` holds since
low is linear; it needs one filter instead of two. Pictures are RGB of one size; borders are repeated.
"""

import numpy as np
from PIL import Image

DILATIONS = (1, 2, 4, 8, 16)
HALO = sum(DILATIONS)  # pixels that the five kernels together reach
BAND = 256  # rows that are filtered at once, so that memory does not grow with the picture


def wavelet(restored: Image.Image, degraded: Image.Image) -> Image.Image:
    """The low frequencies of `degraded` under the high ones of `restored`."""
    width, height = restored.size
    out = Image.new("RGB", restored.size)
    for top in range(0, height, BAND):
        first, last = max(top - HALO, 0), min(top + BAND + HALO, height)
        x, y = (np.asarray(p.crop((0, first, width, last)), dtype=np.float32) for p in (restored, degraded))
        x = (x + _low(y - x))[top - first : top - first + BAND]
        out.paste(Image.fromarray(np.rint(x.clip(0, 255)).astype(np.uint8)), (0, top))
    return out


def _low(x: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> the same size: (1 2 1) / 4 down and across, five times, ever wider."""
    for d in DILATIONS:
        for axis in (0, 1):
            n = x.shape[axis]
            p = np.pad(x, [(d, d) if a == axis else (0, 0) for a in range(3)], mode="edge")
            before, after = (p.take(range(k, k + n), axis=axis) for k in (0, 2 * d))
            x = (before + 2 * x + after) / 4
    return x


def adain(restored: Image.Image, degraded: Image.Image) -> Image.Image:
    """Mean and deviation of each channel of `degraded`. A byte goes to a byte, so a table of 256 does it."""
    values, tables = np.arange(256), []
    histograms = (np.reshape(p.histogram(), (3, 256)) for p in (restored, degraded))
    for of_restored, of_degraded in zip(*histograms, strict=True):
        (mean, std), (wanted_mean, wanted_std) = (_moments(values, h) for h in (of_restored, of_degraded))
        table = (values - mean) * (wanted_std / max(std, 1e-3)) + wanted_mean
        tables += np.rint(table.clip(0, 255)).astype(int).tolist()
    return restored.point(tables)


def _moments(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    mean = np.average(values, weights=counts)
    return float(mean), float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))


COLOUR_FIXES = {"none": lambda restored, degraded: restored, "wavelet": wavelet, "adain": adain}
