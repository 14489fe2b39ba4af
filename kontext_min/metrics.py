"""How near a restored picture is to the clean one: PSNR and SSIM, and how much fine texture it has.

    PSNR = 10 log10(R^2 / mean (a - b)^2)
    SSIM = mean of (2 ma mb + C1)(2 cab + C2) / ((ma^2 + mb^2 + C1)(va + vb + C2)),  C1 = (0.01 R)^2,  C2 = (0.03 R)^2

R is 255 for bytes and 1 for floats. m, v and c are means, variances and covariance (of the population) under an 11 x 11
Gaussian window of sigma 1.5, wherever it fits into the picture; each channel by itself, then the mean. Wang et al.
2004, Image quality assessment, eq. 13 and section III.C. scikit-image agrees if given gaussian_weights=True, sigma=1.5,
use_sample_covariance=False. What papers call PSNR-Y is psnr(luma(a), luma(b)).

Pictures are PIL images or arrays (H, W, 3) or (H, W).
"""

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures. ValueError if the shapes differ."""
    x, y = _pair(a, b)
    error = np.mean((x - y) ** 2)
    return float(-10 * np.log10(error)) if error > 0 else float("inf")


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity, at most 1. ValueError if the shapes differ or a side is under 11 pixels."""
    x, y = _pair(a, b)
    if min(x.shape[:2]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, got {x.shape[1]} x {x.shape[0]}; use a larger picture")
    mx, my = _window(x), _window(y)
    vx, vy, cov = _window(x * x) - mx * mx, _window(y * y) - my * my, _window(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


def luma(a: Picture) -> np.ndarray:
    """(H, W, 3) to Y / 255 (H, W), Y = 16 + 65.481 R + 128.553 G + 24.966 B (ITU-R BT.601) of R, G, B in [0, 1]."""
    return (16 + _unit(a) @ np.array([65.481, 128.553, 24.966])) / 255


def texture(a: Picture, clean: Picture) -> float:
    """Energy of the Laplacian of `a` relative to the clean picture's: below 1 is too smooth, above 1 too rough."""
    x, y = _pair(a, clean)
    return float(np.sum(_laplacian(x) ** 2) / np.sum(_laplacian(y) ** 2))


def _unit(a: Picture) -> np.ndarray:
    """Float64 in units of full white: R = 1 from here on."""
    a = np.asarray(a)
    return a / 255.0 if a.dtype == np.uint8 else a.astype(np.float64)


def _pair(a: Picture, b: Picture) -> tuple[np.ndarray, np.ndarray]:
    x, y = _unit(a), _unit(b)
    if x.shape != y.shape:
        raise ValueError(f"pictures of shapes {x.shape} and {y.shape}; a metric needs two of one size and one mode")
    return x, y


def _window(x: np.ndarray) -> np.ndarray:
    """Gaussian means over every 11 x 11 window that fits: (H, W, ...) -> (H - 10, W - 10, ...)."""
    k = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    k /= k.sum()
    h, w = x.shape[0] - 10, x.shape[1] - 10
    x = sum(k[i] * x[i : i + h] for i in range(11))
    return sum(k[i] * x[:, i : i + w] for i in range(11))


def _laplacian(x: np.ndarray) -> np.ndarray:
    return x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
