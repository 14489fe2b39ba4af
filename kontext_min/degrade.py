"""Degradations of a clean photograph, and the little language that composes them.

    parse("blur=1.5,noise=0.02,jpeg=85")(image, rng)      the degraded picture, RGB, of the same size

    blur=1.5               an operator and its value; further values follow after a slash: downsample=4/area
    jpeg=30:95             drawn for each picture: a number from 30 to 95, or one of several words, area:bicubic
    sepia=0.8@0.5          applied with probability 0.5
    blur=1,jpeg=85         one after the other, from left to right
    (blur=2|defocus=3)     one of several; @p is the chance of one, and those without @ share what is left; if every one
                           has an @ and they sum to less than 1, the rest of the time none happens
    (blur=1,jpeg=85)@0.5   parentheses make one step of several; quote them in the shell
    old-photo,jpeg=40      a preset's name stands for its text in PRESETS

An operator is a function of float32 RGB x (H, W, 3) in [0, 1], sRGB as in the file; its result is clipped to [0, 1].
Bytes are made only where a file is written (jpeg, webp) and at the end, rounded to the nearest. All randomness comes
from the generator passed in. Lengths are in pixels, noise in parts of full white, angles in degrees counter-clockwise.

Sources: [1] Real-ESRGAN, Wang et al. 2021, arXiv 2107.10833, section 3, and the published settings of its x4 training;
[2] Bringing Old Photos Back to Life, Wan et al. 2020, arXiv 2004.09484; [3] Foi et al. 2008, Practical
Poissonian-Gaussian noise modeling; [4] W3C, Filter Effects Module Level 1, which defines the filters of CSS and SVG.
`python -m kontext_min.degrade PHOTO... SHEET.jpg` shows every preset.
"""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log10, radians
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

Array = np.ndarray
Rng = np.random.Generator

# N(0, 1) by its 65,536 quantiles, up to 4.3 deviations: a table look-up takes 5 ms a megapixel, exact draws 33.
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=np.float32)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as in JPEG
# Pillow averages over the pixels that it merges, so none of these aliases; [1]'s own bilinear and bicubic do.
FILTERS = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR, "area": Image.BOX}


# ---- lens: y = k * x with a kernel k that sums to 1 ------------------------------------------------------------------


def _convolve(x: Array, kernel: Array) -> Array:
    """y[i] = sum_j k[j] x[i - j] for a (2r+1, 2r+1) kernel of any sum; the picture is mirrored at its edges, as in [1].

    By FFT: one core takes 76 ms at 1024 x 1024 whatever the kernel.
    """
    r, (h, w) = len(kernel) // 2, x.shape[:2]
    size = [ceil((n + 2 * r) / 32) * 32 for n in (h, w)]  # a length of small prime factors is quick
    spectrum = np.fft.rfft2(kernel / kernel.sum(), size).astype(np.complex64)
    x = np.pad(x, ((r, r), (r, r), (0, 0)), mode="reflect")
    channels = [np.fft.irfft2(np.fft.rfft2(x[..., c], size) * spectrum, size) for c in range(3)]
    # What wraps around lands in the first 2r rows and columns, which go together with the mirrored margin.
    return np.stack([c[2 * r : 2 * r + h, 2 * r : 2 * r + w] for c in channels], axis=2).astype(np.float32)


def _separable(x: Array, k: Array) -> Array:
    """_convolve for the kernel k k^T of a symmetric (2r+1,) k of sum 1, which a round Gaussian is: columns, then rows.

    Each pass multiplies 16 rows or columns of the result by a band matrix that holds k once for each of them: most of
    its products are with zeros, and still it takes half the time of adding shifted copies (10 ms against 20
    at 1024 x 1024 and sigma 1.5). Pillow's GaussianBlur takes 41 and is three box blurs of bytes, off by 27 of 255.
    """
    n, r, (h, w) = 16, len(k) // 2, x.shape[:2]
    band = torch.zeros(n, n + 2 * r)
    for i in range(n):
        band[i, i : i + 2 * r + 1] = torch.from_numpy(k)
    across = torch.kron(band, torch.eye(3)).T.contiguous()  # the three channels lie side by side
    x = torch.from_numpy(np.pad(x, ((r, r), (r, r), (0, 0)), mode="reflect")).flatten(1)  # (h + 2r, 3 (w + 2r))
    y, out = x.new_empty(h, x.shape[1]), x.new_empty(h, 3 * w)
    for top in range(0, h, n):
        m = min(n, h - top)
        torch.mm(band[:m, : m + 2 * r], x[top : top + m + 2 * r], out=y[top : top + m])
    for left in range(0, w, n):
        m = min(n, w - left)
        part = y[:, 3 * left : 3 * (left + m + 2 * r)]
        torch.mm(part, across[: part.shape[1], : 3 * m], out=out[:, 3 * left : 3 * (left + m)])
    return out.view(h, w, 3).numpy()


def _grid(radius: float, angle: float = 0.0) -> tuple[Array, Array]:
    """Coordinates (u, v) of the cells of a kernel, u along `angle`; the radius is rounded up."""
    r = ceil(radius)
    y, x = np.mgrid[r : -r - 1 : -1, -r : r + 1].astype(np.float64)  # rows run downwards, y upwards
    c, s = np.cos(radians(angle)), np.sin(radians(angle))
    return c * x + s * y, c * y - s * x


def blur(x: Array, rng: Rng, sigma: float, radius: int, beta: float, shape: str) -> Array:
    """Even blur, k = exp(-(r^2 / sigma^2)^beta / 2) or 1 / (1 + (r^2 / sigma^2)^beta): aniso_blur of equal widths. [1].

    In two passes if the kernel is a small Gaussian.
    """
    r = ceil(radius or 4 * sigma)
    if shape == "gauss" and beta == 1 and 0 < r <= 20 and sigma > 0:
        k = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
        return _separable(x, (k / k.sum()).astype(np.float32))
    return aniso_blur(x, rng, sigma, sigma, 0.0, radius, beta, shape)


def aniso_blur(
    x: Array, rng: Rng, sigma: float, across: float, angle: float, radius: int, beta: float, shape: str
) -> Array:
    """Gauss: k = exp(-q^beta / 2). Plateau: k = 1 / (1 + q^beta). q = (u / sigma)^2 + (v / across)^2. [1].

    u runs along `angle`. Beta 1 is the Gaussian itself. The kernel ends at `radius`; 0 means 4 sigma.
    """
    u, v = _grid(radius or 4 * max(sigma, across), angle)
    q = (u / max(sigma, 1e-3)) ** 2 + (v / max(across, 1e-3)) ** 2  # a width of 0 leaves the picture as it is
    return _convolve(x, np.exp(-0.5 * q**beta) if shape == "gauss" else 1 / (1 + q**beta))


def sinc(x: Array, rng: Rng, cutoff: float, radius: int) -> Array:
    """Circular low-pass, which rings: k = w J1(w r) / (2 pi r), w the cutoff in radians a pixel. [1]."""
    r = np.maximum(np.hypot(*_grid(radius)), 1e-6)  # the limit at the centre is w^2 / (4 pi)
    # J1(z) = 1/pi int_0^pi cos(t - z sin t) dt, over half a period of a smooth function: 128 midpoints are enough.
    t = (np.arange(128) + 0.5) * np.pi / 128
    j1 = np.cos(t - cutoff * r[..., None] * np.sin(t)).mean(axis=-1)
    return _convolve(x, cutoff * j1 / (2 * np.pi * r))


def motion_blur(x: Array, rng: Rng, length: float, angle: float) -> Array:
    """Shake along a line `length` pixels long: k = max(0, 1 - distance to the line), which is anti-aliased.

    The path of a point while the shutter is open: Potmesil and Chakravarty 1983, Modeling motion blur in
    computer-generated images.
    """
    half = max(length - 1, 0) / 2  # each end adds half a pixel
    u, v = _grid(half + 1, angle)
    return _convolve(x, np.maximum(1 - np.hypot(np.maximum(np.abs(u) - half, 0), v), 0))


def defocus(x: Array, rng: Rng, radius: float) -> Array:
    """Circle of confusion: a disc with an anti-aliased rim, k = clip(radius + 1/2 - r, 0, 1).

    A point out of focus through a round aperture: Potmesil and Chakravarty 1981, A lens and aperture camera model for
    synthetic image generation.
    """
    return _convolve(x, np.clip(radius + 0.5 - np.hypot(*_grid(radius + 1)), 0, 1))


# ---- sampling --------------------------------------------------------------------------------------------------------


def _resample(x: Array, size: tuple[float, float], method: str) -> Array:
    """Pillow's resize to the (width, height) rounded, a channel at a time in float32, for bytes would be rounded.

    On each axis y[i] = sum_j k(c - j) x[j] / sum_j k(c - j), c = (i + 1/2) / s - 1/2, s the new side over the old one,
    k the filter, 1 / s times as wide if s < 1.
    """
    pixels = [max(1, round(n)) for n in size]
    channels = [Image.fromarray(np.ascontiguousarray(x[..., c])).resize(pixels, FILTERS[method]) for c in range(3)]
    return np.clip(np.stack(channels, axis=2), 0, 1)


def downsample(x: Array, rng: Rng, factor: float, method: str) -> Array:
    """y = up(down(x)): both sides divided by `factor` with the method, then bicubic back to the same size (_resample).

    Dong et al. 2015, Image super-resolution using deep convolutional networks, arXiv 1501.00092, section 3.
    """
    h, w = x.shape[:2]
    return _resample(_resample(x, (w / factor, h / factor), method), (w, h), "bicubic")


def resize(x: Array, rng: Rng, scale: float, method: str, size: tuple[int, int]) -> Array:
    """y = _resample(x, scale * size), `size` the first (width, height); later operators work there. [1].

    The end brings it back.
    """
    return _resample(x, (size[0] * scale, size[1] * scale), method)


# ---- sensor ----------------------------------------------------------------------------------------------------------


def noise(x: Array, rng: Rng, std: float, kind: str) -> Array:
    """y = x + std n, n ~ N(0, 1), drawn for each channel (colour) or once for the three (grey). [1]."""
    y, channels = np.empty_like(x), 1 if kind == "grey" else 3
    for top in range(0, len(x), 32):  # strips stay in the cache
        strip, rows = x[top : top + 32], y[top : top + 32]
        count = strip[..., :channels].size
        index = rng.bit_generator.random_raw(ceil(count / 4)).view(np.uint16)[:count]  # 64 random bits are 4 places
        n = NORMAL.take(index, mode="clip").reshape(*strip.shape[:2], channels)  # no place is outside: no check
        np.add(strip, np.multiply(n, np.float32(std), out=n), out=rows)
    return y


def poisson(x: Array, rng: Rng, std: float, kind: str) -> Array:
    """Counted photons: y = s^2 Poisson(x / s^2), variance s^2 x: `std` s is the deviation at white, of 1 / s^2 photons.

    [1] counts 256 photons and multiplies the deviation by a scale: mean and variance are those of s = scale / 16.
    """
    signal = (x @ LUMA)[..., None] if kind == "grey" else x
    step = max(std, 1e-4) ** 2
    return x + (step * rng.poisson(signal / step) - signal).astype(np.float32)


def underexpose(x: Array, rng: Rng, stops: float, photons: float, read: float) -> Array:
    """Low light: y = srgb((Poisson(e) + read n) / photons), e = photons 2^-stops linear(x), n ~ N(0, 1). [3].

    `photons` would fill white at the right exposure, `read` is in electrons, linear and srgb are IEC 61966-2-1's: noise
    enters where light adds up, and the curve then lifts it in the shadows.
    """
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    electrons = rng.poisson(photons * 2.0**-stops * linear) + read * rng.standard_normal(x.shape, dtype=np.float32)
    linear = np.maximum(electrons / photons, 0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)


# ---- tone ------------------------------------------------------------------------------------------------------------


def gamma(x: Array, rng: Rng, exponent: float) -> Array:
    """y = x^exponent: above 1 darkens, below 1 brightens; black and white stay. [4], feFuncR of type gamma."""
    return x ** np.float32(exponent)


def contrast(x: Array, rng: Rng, gain: float) -> Array:
    """y = 1/2 + gain (x - 1/2). [4], `contrast`."""
    return 0.5 + np.float32(gain) * (x - 0.5)


def fade(x: Array, rng: Rng, gain: float, lift: float, saturation: float) -> Array:
    """A bleached print: y = lift + gain (L + saturation (x - L)), L the luma.

    [4], `saturate` with the luma of BT.601, then feFuncR of type linear.
    """
    grey = (x @ LUMA)[..., None]
    return np.float32(lift) + np.float32(gain) * (grey + np.float32(saturation) * (x - grey))


def sepia(x: Array, rng: Rng, weight: float) -> Array:
    """y = (1 - weight) x + weight min(S x, 1), S the matrix of `sepia` in [4]: grey turns brown."""
    matrix = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], dtype=np.float32)
    return (1 - np.float32(weight)) * x + np.float32(weight) * np.minimum(x @ matrix.T, 1)


# ---- print -----------------------------------------------------------------------------------------------------------


def _paint(x: Array, rng: Rng, strokes: list[tuple[list[tuple[float, float]], float]], opacity: float) -> Array:
    """y = (1 - a) x + a c, a the opacity where a stroke (points, width) runs; a stroke of one point is a disc.

    7 in 10 strokes are light (c in 0.85..1, bare paper), the others dark (c in 0..0.15).
    """
    layers = [Image.new("L", x.shape[1::-1]) for _ in range(2)]  # a, and a c: softening their edges mixes in no black
    for points, width in strokes:
        tone = rng.uniform(0.85, 1) if rng.random() < 0.7 else rng.uniform(0, 0.15)
        for layer, ink in zip(layers, (255 * opacity, 255 * opacity * tone), strict=True):
            if len(points) > 1:
                ImageDraw.Draw(layer).line(points, fill=round(ink), width=round(width))
            else:
                ImageDraw.Draw(layer).circle(points[0], width / 2, fill=round(ink))
    a, ac = (np.asarray(layer.filter(ImageFilter.GaussianBlur(0.5)), np.float32)[..., None] / 255 for layer in layers)
    return (1 - a) * x + ac


def scratches(x: Array, rng: Rng, count: int, width: float, opacity: float) -> Array:
    """`count` upright lines broken at 1 to 4 points, as grit draws them on moving film; [2] has real masks.

    Painted (_paint) through n ~ U{3..6} points (x0 + d t + e_t, y_t) in parts of the sides, t from 0 to 1 evenly, with
    x0 ~ U(0, 1), d ~ U(-0.1, 0.1), e_t ~ U(-0.01, 0.01), and y_t evenly from U(-0.2, 0.6) to U(0.6, 1.2).
    """
    (h, w), strokes = x.shape[:2], []
    for _ in range(count):
        n = int(rng.integers(3, 7))
        across = rng.uniform() + rng.uniform(-0.1, 0.1) * np.linspace(0, 1, n) + rng.uniform(-0.01, 0.01, n)
        down = np.linspace(rng.uniform(-0.2, 0.6), rng.uniform(0.6, 1.2), n)
        strokes.append((list(zip((w * across).tolist(), (h * down).tolist(), strict=True)), width))
    return _paint(x, rng, strokes, opacity)


def dust(x: Array, rng: Rng, density: float, diameter: float, opacity: float) -> Array:
    """Poisson(density w h / 10^6) specks at U(0, w) x U(0, h), of diameters U(1, diameter): the spots of [2].

    Painted (_paint) as discs.
    """
    h, w = x.shape[:2]
    specks = rng.uniform((0, 0, 1), (w, h, diameter), (rng.poisson(density * h * w / 1e6), 3))
    return _paint(x, rng, [([(left, top)], d) for left, top, d in specks.tolist()], opacity)


# ---- file ------------------------------------------------------------------------------------------------------------


def compress(x: Array, rng: Rng, quality: int, kind: str) -> Array:
    """Written and read again by Pillow: JPEG by libjpeg, colour at half resolution, or lossy WebP by libwebp.

    Of JPEG's 8 x 8 blocks each coefficient c of the cosine transform becomes q round(c / q), q = (s q50 + 50) / 100 cut
    to a whole number from 1 to 255, s = 5000 / quality below 50 and 200 - 2 quality above: ITU-T T.81, section A.3.4,
    its tables q50 (annex K.1), and libjpeg's jcparam.c. WebP predicts each block and rounds what is left: RFC 6386.
    """
    file = io.BytesIO()
    to_image(x).save(file, kind, quality=quality)
    return from_image(Image.open(file))


# ---- the language ----------------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """One value of an operator: the least and the largest allowed (ints: whole ones only) and its default, if any."""

    name: str
    low: float
    high: float
    default: float | None = None


class Word(NamedTuple):
    """One value of an operator that is a word; the first is the default."""

    name: str
    words: tuple[str, ...]


SIGMA, ACROSS, ANGLE = Number("sigma", 0.0, 100.0), Number("across", 0.0, 100.0), Number("angle", -360.0, 360.0)
TAIL = (Number("radius", 0, 200, 0), Number("beta", 0.1, 10.0, 1.0), Word("shape", ("gauss", "plateau")))
METHOD, KIND = Word("method", tuple(FILTERS)), Word("kind", ("colour", "grey"))
STD, OPACITY, QUALITY = Number("std", 0.0, 1.0), Number("opacity", 0.0, 1.0, 0.8), Number("quality", 1, 100)
ELECTRONS = (Number("photons", 1.0, 1e6, 4000.0), Number("read", 0.0, 1e4, 4.0))

# To add an operator, write a function (x, rng, values...) above and put it here with its values in their order; the
# language, its error lines and --help follow. Whoever CHANGES what one gives raises VERSION in latents.py, or latents
# that are cached already stay those of before.
OPERATORS: dict[str, tuple[Callable[..., Array], tuple[Number | Word, ...]]] = {
    "blur": (blur, (SIGMA, *TAIL)),
    "aniso-blur": (aniso_blur, (SIGMA, ACROSS, ANGLE, *TAIL)),
    "sinc": (sinc, (Number("cutoff", 0.1, 4.5), Number("radius", 1, 200, 10))),
    "motion-blur": (motion_blur, (Number("length", 0.0, 400.0), ANGLE)),
    "defocus": (defocus, (Number("radius", 0.0, 200.0),)),
    "downsample": (downsample, (Number("factor", 1.0, 64.0), METHOD)),
    "resize": (resize, (Number("scale", 0.02, 4.0), METHOD)),
    "noise": (noise, (STD, KIND)),
    "poisson": (poisson, (STD, KIND)),
    "underexpose": (underexpose, (Number("stops", 0.0, 12.0), *ELECTRONS)),
    "gamma": (gamma, (Number("exponent", 0.1, 10.0),)),
    "contrast": (contrast, (Number("gain", 0.0, 10.0),)),
    "fade": (fade, (Number("gain", 0.0, 1.0), Number("lift", 0.0, 1.0), Number("saturation", 0.0, 1.0, 1.0))),
    "sepia": (sepia, (Number("weight", 0.0, 1.0),)),
    "scratches": (scratches, (Number("count", 0, 1000), Number("width", 1.0, 50.0, 2.0), OPACITY)),
    "dust": (dust, (Number("density", 0.0, 1e5), Number("diameter", 1.0, 100.0, 5.0), OPACITY)),
    "jpeg": (partial(compress, kind="JPEG"), (QUALITY,)),
    "webp": (partial(compress, kind="WEBP"), (QUALITY,)),
}

# Real-ESRGAN: twice blur, resize, noise, JPEG. {s}, {n}, {p} are ranges; radius 3 to 10 is a kernel of 7 to 21 pixels.
_BLUR = (
    "(blur={s}/3:10@0.405|aniso-blur={s}/{s}/-180:180/3:10@0.225|blur={s}/3:10/0.5:4@0.108"
    "|aniso-blur={s}/{s}/-180:180/3:10/0.5:4@0.027|blur={s}/3:10/1:2/plateau@0.108"
    "|aniso-blur={s}/{s}/-180:180/3:10/1:2/plateau@0.027|sinc=1.0472:3.1416/3:5@0.0375|sinc=0.6283:3.1416/6:10)"
)
_NOISE = "(noise={n}@0.3|noise={n}/grey@0.2|poisson={p}@0.3|poisson={p}/grey)"  # poisson = the published scale / 16
_ANY = "area:bilinear:bicubic"
_LAST = f"resize=0.25/{_ANY},sinc=1.0472:3.1416/3:10@0.8"

PRESETS: dict[str, str] = {
    # A lens blurs before a sensor adds noise. Blurred afterwards, noise of 5.1 of 255 would shrink to 1.1.
    "guide": "blur=1.5,noise=0.02,jpeg=85",
    "denoise": "(noise=0.02:0.2@0.7|poisson=0.05:0.25)",
    "deblur": "(blur=1:4|motion-blur=7:25/0:180|defocus=2:6),noise=0.002:0.02,jpeg=80:95@0.5",
    "super-resolution": f"downsample=2:6/{_ANY},noise=0:0.01,jpeg=75:95@0.5",
    "real-esrgan": ",".join(
        (
            _BLUR.format(s="0.2:3"),
            f"(resize=1:1.5/{_ANY}@0.2|resize=0.15:1/{_ANY}@0.7)",
            _NOISE.format(n="0.0039:0.1176", p="0.0031:0.1875"),
            "jpeg=30:95",
            _BLUR.format(s="0.2:1.5") + "@0.8",
            f"(resize=0.25:0.3/{_ANY}@0.3|resize=0.075:0.25/{_ANY}@0.4|resize=0.25/{_ANY})",
            _NOISE.format(n="0.0039:0.098", p="0.0031:0.1563"),
            f"(({_LAST},jpeg=30:95)|(jpeg=30:95,{_LAST}))",
        )
    ),
    "old-photo": "blur=0.8:2,noise=0.02:0.08/grey,fade=0.5:0.75/0.15:0.3/0:0.6,sepia=0.3:1@0.8,"
    "scratches=3:12/1:3/0.5:1,dust=20:200/2:6/0.5:1,jpeg=60:95",
    "low-light": "underexpose=2:4/200:2000/2:8,jpeg=70:95",
}
PROMPTS: dict[str, str] = {  # what a LoRA for a preset is trained with unless the user has other words
    "guide": "Restore this photo: remove blur, noise and compression artifacts.",
    "denoise": "Remove the noise from this photo.",
    "deblur": "Remove the blur from this photo.",
    "super-resolution": "Increase the resolution of this photo: restore its fine detail.",
    "real-esrgan": "Restore this low-quality photo: remove blur, noise and compression artifacts, restore fine detail.",
    "old-photo": "Restore this old photo: remove scratches, dust and grain, bring back contrast and colours.",
    "low-light": "Brighten this dark photo and remove its noise.",
}


@dataclass(frozen=True)
class Step:
    """An operator's name with its values, or `all` or `one` of further steps; `chance` is what follows @."""

    kind: str
    parts: tuple
    chance: float | None = None


def from_image(image: Image.Image) -> Array:
    """A picture as float32 RGB (H, W, 3) in [0, 1]."""
    x = np.asarray(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.float32)
    return np.multiply(x, np.float32(1 / 255), out=x)


def to_image(x: Array) -> Image.Image:
    """Float32 RGB in [0, 1] to bytes, rounded to the nearest; cutting off would darken by half a level."""
    out = np.empty(x.shape, dtype=np.uint8)
    for top in range(0, len(x), 32):  # strips stay in the cache
        strip = x[top : top + 32] * np.float32(255)
        out[top : top + 32] = np.add(strip, np.float32(0.5), out=strip)
    return Image.fromarray(out)


def parse(spec: str) -> Callable[[Image.Image, Rng], Image.Image]:
    """The degradation that `spec` describes, (picture, generator) -> RGB picture of the same size; it can be pickled.

    Raises ValueError: one line saying what was read, what is possible and what to do.
    """
    tokens = _tokens(spec)
    step = _read_steps(tokens, spec)
    if tokens:
        raise _error(spec, f"unexpected {tokens[0]!r}; join steps by ',' or '|' and open every parenthesis")
    return partial(_degrade, step)


def describe() -> str:
    """The operators with the names of their values, and each preset with what it stands for, for --help."""
    operators = [f"  {_usage(name)}" for name in OPERATORS]
    return "\n".join(["operators:", *operators, "presets:", *(f"  {name}: {PRESETS[name]}" for name in PRESETS)])


def _degrade(step: Step, image: Image.Image, rng: Rng) -> Image.Image:
    x = _run(step, from_image(image), rng, image.size)
    return to_image(x if x.shape[1::-1] == image.size else _resample(x, image.size, "bicubic"))


def _run(step: Step, x: Array, rng: Rng, size: tuple[int, int]) -> Array:
    if step.kind == "all":
        for part in step.parts:
            if part.chance is None or rng.random() < part.chance:
                x = _run(part, x, rng, size)
        return x
    if step.kind == "one":
        ends = np.cumsum([part.chance for part in step.parts])
        index = int(np.searchsorted(ends, rng.random(), side="right"))
        return _run(step.parts[index], x, rng, size) if index < len(ends) else x
    values = [_draw(choices, rng) for choices in step.parts]
    if step.kind == "resize":  # the one operator that must know the size at the start
        values.append(size)
    y = OPERATORS[step.kind][0](x, rng, *values)
    return np.clip(y, 0, 1, out=y)


def _draw(choices: tuple, rng: Rng) -> float | int | str:
    """One of the words, or a number between (low, high): whole, both ends included, if these are ints.

    What is fixed takes nothing from the generator, so blur=1.5 and blur=1.5/0 leave it in the same state.
    """
    if isinstance(choices[0], str):
        return choices[rng.integers(len(choices))]
    low, high = choices
    if low == high:
        return low
    return int(rng.integers(low, high + 1)) if isinstance(low, int) else float(rng.uniform(low, high))


def _tokens(spec: str) -> list[str]:
    return re.findall(r"[(),|@]|[^(),|@]+", "".join(spec.split()))


def _error(spec: str, problem: str) -> ValueError:
    return ValueError(f"degradation {spec!r}: {problem}")


def _usage(name: str) -> str:
    return f"{name}={'/'.join(parameter.name for parameter in OPERATORS[name][1])}"


def _read_steps(tokens: list[str], spec: str) -> Step:
    """Steps joined by ',' (all of them) or '|' (one of them), taken from the front of the tokens."""
    parts, joints = [_read_step(tokens, spec)], set()
    while tokens and tokens[0] in (",", "|"):
        joints.add(tokens.pop(0))
        parts.append(_read_step(tokens, spec))
    if len(joints) == 2:
        raise _error(spec, "',' and '|' side by side; add parentheses, as in (blur=1,jpeg=85)|jpeg=30")
    if "|" not in joints:
        return Step("all", tuple(parts))
    rest = 1 - sum(part.chance or 0 for part in parts)
    if rest < -1e-9:
        raise _error(spec, f"chances in (a@p|b@q) sum to {1 - rest:g}; make it 1 at most")
    share = max(rest, 0) / max(1, sum(part.chance is None for part in parts))
    return Step("one", tuple(replace(part, chance=share) if part.chance is None else part for part in parts))


def _read_step(tokens: list[str], spec: str) -> Step:
    """An operator, a preset or a parenthesis, with its chance, taken from the front of the tokens."""
    token = tokens.pop(0) if tokens else ""
    if token == "(":
        step = _read_steps(tokens, spec)
        if not tokens or tokens.pop(0) != ")":
            raise _error(spec, "a parenthesis is not closed; add ')'")
    elif token in PRESETS:
        step = _read_steps(_tokens(PRESETS[token]), spec)
    else:
        step = _read_operator(token, spec)
    if tokens[:1] != ["@"]:
        return step
    low, high = _read_value(Number("the chance after @", 0.0, 1.0), tokens[1] if len(tokens) > 1 else "", spec)
    if low != high:
        raise _error(spec, f"a chance is one number, got {tokens[1]!r}; write for instance @0.5")
    del tokens[:2]
    return replace(step, chance=low)


def _read_operator(token: str, spec: str) -> Step:
    name, _, text = token.partition("=")
    if name not in OPERATORS:
        raise _error(spec, f"no operator {name!r}; use {', '.join(OPERATORS)} or a preset, {', '.join(PRESETS)}")
    parameters, texts = OPERATORS[name][1], text.split("/")
    if len(texts) > len(parameters):
        raise _error(spec, f"{len(texts)} values in {token!r}; write {_usage(name)}")
    texts += [""] * (len(parameters) - len(texts))
    return Step(name, tuple(_read_value(p, t, spec, f" of {name}") for p, t in zip(parameters, texts, strict=True)))


def _read_value(parameter: Number | Word, text: str, spec: str, owner: str = "") -> tuple:
    """The words, or (low, high), that one value is drawn from; without text the default."""
    if isinstance(parameter, Word):
        words = tuple(text.split(":")) if text else parameter.words[:1]
        if not set(words) <= set(parameter.words):
            raise _error(spec, f"{parameter.name}{owner} must be one of {', '.join(parameter.words)}, got {text!r}")
        return words
    if not text and parameter.default is not None:
        return parameter.default, parameter.default
    whole = isinstance(parameter.low, int)
    wanted = f"{parameter.name}{owner} must be a {'whole ' * whole}number from {parameter.low:g} to {parameter.high:g}"
    try:
        low, high = map(type(parameter.low), (text.split(":") * 2)[:2] if ":" not in text else text.split(":"))
    except ValueError:
        raise _error(spec, f"{wanted}, or a range as 1:2, got {text!r}") from None
    if not (parameter.low <= low <= parameter.high and parameter.low <= high <= parameter.high):
        raise _error(spec, f"{wanted}, got {text!r}")
    if low > high:
        raise _error(spec, f"{parameter.name}{owner} has the empty range {text!r}; write the smaller number first")
    return low, high


# ---- the contact sheet -----------------------------------------------------------------------------------------------


def contact_sheet(pictures: dict[str, Image.Image]) -> Image.Image:
    """Named pictures of one size: each as a whole, and under it the pixels of its middle at their own size."""
    first, w, h, font = next(iter(pictures.values())), 320, 160, ImageFont.load_default(15)
    whole, x, y = round(w * first.height / first.width), (first.width - w) // 2, (first.height - h) // 2
    tile = 24 + whole + h
    sheet = Image.new("RGB", (4 * w, tile * ceil(len(pictures) / 4)), "white")
    for i, (name, picture) in enumerate(pictures.items()):
        left, top = i % 4 * w, i // 4 * tile
        ImageDraw.Draw(sheet).text((left + 4, top + 3), name, fill="black", font=font)
        sheet.paste(picture.resize((w, whole), Image.LANCZOS), (left, top + 24))
        sheet.paste(picture.crop((x, y, x + w, y + h)), (left, top + 24 + whole))
    return sheet


def main(photos: list[str], sheet: str) -> None:
    """Print the PSNR (dB) of every preset on every photograph, and write the contact sheet of the first one."""
    table = []
    for seed, path in enumerate(photos):
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        pictures = {name: parse(name)(photo, np.random.default_rng(seed)) for name in PRESETS}
        table.append([-10 * log10(np.mean((from_image(p) - from_image(photo)) ** 2)) for p in pictures.values()])
        if seed == 0:
            contact_sheet({"clean": photo, **pictures}).save(sheet, quality=85)
    print(f"{'PSNR, dB':20}" + "".join(f"{name:>18}" for name in PRESETS))
    for path, row in zip([*photos, "mean"], [*table, np.mean(table, axis=0)], strict=True):
        print(f"{Path(path).name:20}" + "".join(f"{value:18.2f}" for value in row))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m kontext_min.degrade PHOTO... SHEET.jpg")
    try:
        main(sys.argv[1:-1], sys.argv[-1])
    except (OSError, ValueError) as error:
        print(f"degrade: {error}", file=sys.stderr)
        sys.exit(2)
