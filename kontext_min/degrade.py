"""Degradations of a clean photograph, and the small language that composes them.

    parse("blur=1.5,noise=0.02,jpeg=85")(image, rng)      the degraded picture: RGB, same size

    blur=1.5               an operator and its value; more values follow after a slash: downsample=4/area
    jpeg=30:95             drawn for each picture: a number from 30 to 95, or one of several words, area:bicubic
    sepia=0.8@0.5          applied with probability 0.5
    blur=1,jpeg=85         one after the other, from left to right
    (blur=2|defocus=3)     one of them; @p is a probability, those without share the rest; what is left does nothing
    (blur=1,jpeg=85)@0.5   parentheses make one step of several; quote them in the shell
    old-photo,jpeg=40      a preset's name stands for its text in presets.toml

Operators work on float32 RGB (H, W, 3) in [0, 1], sRGB as in the file. Results are clipped to [0, 1] and not rounded:
they become bytes only in jpeg and webp, and at the end. All randomness comes from the generator `rng`.
Lengths are in pixels, noise is relative to full white, angles are in degrees counterclockwise.

Sources: [1] Real-ESRGAN, Wang et al. 2021, arXiv 2107.10833, section 3, and the published settings of its x4 training;
[2] Bringing Old Photos Back to Life, Wan et al. 2020, arXiv 2004.09484; [3] Foi et al. 2008, Practical
Poissonian-Gaussian noise modeling; [4] W3C, Filter Effects Module Level 1, which defines the filters of CSS and SVG;
[5] Potmesil and Chakravarty 1981, A lens and aperture camera model for synthetic image generation; [6] the same, 1983,
Modeling motion blur in computer-generated images; [7] SRCNN, Dong et al. 2015, arXiv 1501.00092, section 3.
albumentations has most of these operators; here each is its formula, seeded by picture, and a text composes them.
"""

import inspect
import io
import re
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import ceil, radians
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Array = np.ndarray
Rng = np.random.Generator
Size = tuple[int, int]  # width, height

# The values that an operator takes: a number, Annotated[int or float, lowest, highest], or a word, Literal[words].
Width = Annotated[float, 0, 100]
Angle = Annotated[float, -360, 360]
Reach = Annotated[int, 0, 200]
Beta = Annotated[float, 0.1, 10]
Part = Annotated[float, 0, 1]
Quality = Annotated[int, 1, 100]
Scale = Annotated[float, 0.02, 4]
Count = Annotated[int, 0, 1000]
Density = Annotated[float, 0, 1e5]  # per million pixels
Form = Literal["gauss", "plateau"]
Kind = Literal["colour", "grey"]
Method = Literal["bicubic", "bilinear", "area"]

# ---- lens: y = k * x with a kernel k that sums to 1 ------------------------------------------------------------------


def _convolve(x: Array, kernel: Array) -> Array:
    """y[i] = sum_j k[j] x[i - j] by FFT, k the (2r+1, 2r+1) kernel over its sum; x is mirrored at its edges [1]."""
    r, (h, w) = len(kernel) // 2, x.shape[:2]
    size = [ceil((n + 2 * r) / 32) * 32 for n in (h, w)]  # an FFT is fast if its length has small prime factors
    spectrum = np.fft.rfft2(kernel / kernel.sum(), size).astype(np.complex64)
    x = np.pad(x, ((r, r), (r, r), (0, 0)), mode="reflect")
    channels = [np.fft.irfft2(np.fft.rfft2(x[..., c], size) * spectrum, size) for c in range(3)]
    # An FFT convolves circularly: what wraps around lands in the first 2r rows and columns, which are cut off.
    return np.stack([c[2 * r : 2 * r + h, 2 * r : 2 * r + w] for c in channels], axis=2).astype(np.float32)


def _grid(radius: float, angle: float = 0.0) -> tuple[Array, Array]:
    """Coordinates (u, v) of the cells of a kernel, u along `angle`; the radius is rounded up."""
    r = ceil(radius)
    y, x = np.mgrid[r : -r - 1 : -1, -r : r + 1].astype(np.float64)  # rows run downwards, y upwards
    c, s = np.cos(radians(angle)), np.sin(radians(angle))
    return c * x + s * y, c * y - s * x


def blur(x: Array, rng: Rng, sigma: Width, radius: Reach = 0, beta: Beta = 1.0, shape: Form = "gauss") -> Array:
    """aniso_blur with across = sigma [1]."""
    return aniso_blur(x, rng, sigma, sigma, 0.0, radius, beta, shape)


def aniso_blur(
    x: Array, rng: Rng, sigma: Width, across: Width, angle: Angle,
    radius: Reach = 0, beta: Beta = 1.0, shape: Form = "gauss",
) -> Array:  # fmt: skip
    """gauss: k = exp(-q^beta / 2); plateau: k = 1 / (1 + q^beta); q = (u / sigma)^2 + (v / across)^2 [1]."""
    # u runs along `angle`, v across it. The kernel ends at `radius`; 0 means 4 sigma. A width of 0 blurs nothing.
    u, v = _grid(radius or 4 * max(sigma, across), angle)
    q = (u / max(sigma, least := 1e-3 ** max(1, 1 / beta))) ** 2 + (v / max(across, least)) ** 2  # q^beta >= 1e6 at 0
    return _convolve(x, np.exp(-0.5 * q**beta) if shape == "gauss" else 1 / (1 + q**beta))


def sinc(x: Array, rng: Rng, cutoff: Annotated[float, 0.1, 4.5], radius: Annotated[int, 1, 200] = 10) -> Array:
    """Circular low-pass, which rings: k = w J1(w r) / (2 pi r), w the cutoff in radians per pixel [1]."""
    z, at = np.unique(np.maximum(cutoff * np.hypot(*_grid(radius)), 1e-6), return_inverse=True)  # w r, each once
    # J1(z) = 1/pi int_0^pi cos(t - z sin t) dt over half a period of a smooth function: z + 64 midpoints are enough.
    t = (np.arange(n := max(128, int(z[-1]) + 64)) + 0.5) * np.pi / n
    j1 = np.cos(t - z[:, None] * np.sin(t)).mean(axis=-1)
    return _convolve(x, (cutoff**2 * j1 / (2 * np.pi * z))[at].reshape(2 * radius + 1, -1))


def motion_blur(x: Array, rng: Rng, length: Annotated[float, 0, 400], angle: Angle) -> Array:
    """Camera shake along a line `length` pixels long, anti-aliased: k = max(0, 1 - distance to the line) [6]."""
    half = max(length - 1, 0) / 2  # the soft ends add half a pixel each
    u, v = _grid(half + 1, angle)
    return _convolve(x, np.maximum(1 - np.hypot(np.maximum(np.abs(u) - half, 0), v), 0))


def defocus(x: Array, rng: Rng, radius: Annotated[float, 0, 200]) -> Array:
    """A point seen through a round aperture, an anti-aliased disc: k = clip(radius + 1/2 - r, 0, 1) [5]."""
    return _convolve(x, np.clip(radius + 0.5 - np.hypot(*_grid(radius + 1)), 0, 1))


# ---- sampling: Pillow widens its filters when it shrinks, so none of these aliases; [1]'s bilinear and bicubic do ----

FILTERS = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR, "area": Image.BOX}


def _resample(x: Array, size: tuple[float, float], method: Method) -> Array:
    """Pillow's resize to the rounded (width, height), one float32 channel at a time: it resizes RGB only as bytes."""
    # On each axis y[i] = sum_j k(c - j) x[j] / sum_j k(c - j) with c = (i + 1/2) / s - 1/2, s = new side / old side,
    # and k the filter, stretched by 1 / s if s < 1.
    pixels = [max(1, round(n)) for n in size]
    channels = [Image.fromarray(np.ascontiguousarray(x[..., c])).resize(pixels, FILTERS[method]) for c in range(3)]
    return np.clip(np.stack(channels, axis=2), 0, 1)


def downsample(x: Array, rng: Rng, factor: Annotated[float, 1, 64], method: Method = "bicubic") -> Array:
    """y = up(down(x)): both sides divided by `factor` with `method`, then bicubic back to the same size [7]."""
    h, w = x.shape[:2]
    return _resample(_resample(x, (w / factor, h / factor), method), (w, h), "bicubic")


def resize(x: Array, rng: Rng, scale: Scale, method: Method = "bicubic", *, size: Size) -> Array:
    """To `scale` times `size`, the clean picture's (width, height), for all later operators; Step resizes back [1]."""
    return _resample(x, (size[0] * scale, size[1] * scale), method)


# ---- sensor ----------------------------------------------------------------------------------------------------------

# N(0, 1) as 65,536 quantiles, up to 4.3 deviations: a lookup takes 5 ms per megapixel, exact draws take 33.
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=np.float32)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as in JPEG


def noise(x: Array, rng: Rng, std: Part, kind: Kind = "colour") -> Array:
    """y = x + std n, n ~ N(0, 1), drawn for each channel (colour) or once for the three (grey) [1]."""
    table, y = np.float32(std) * NORMAL, np.empty_like(x)
    for top in range(0, len(x), 32):  # strips fit in the CPU's cache
        strip = x[top : top + 32]
        drawn = strip[..., :1] if kind == "grey" else strip
        index = rng.bit_generator.random_raw(ceil(drawn.size / 4)).view(np.uint16)[: drawn.size]  # 64 bits: 4 indices
        np.add(strip, table.take(index, mode="clip").reshape(drawn.shape), out=y[top : top + 32])  # clip: unchecked
    return y


def poisson(x: Array, rng: Rng, std: Part, kind: Kind = "colour") -> Array:
    """Shot noise: y = s^2 Poisson(x / s^2), variance s^2 x. White is 1 / s^2 photons, and `std` s is its deviation."""
    # [1] counts 256 photons and multiplies the deviation by a scale: mean and variance are those of s = scale / 16.
    signal = (x @ LUMA)[..., None] if kind == "grey" else x
    step = max(std, 1e-4) ** 2
    return x + (step * rng.poisson(signal / step) - signal).astype(np.float32)


def underexpose(
    x: Array, rng: Rng, stops: Annotated[float, 0, 12],
    photons: Annotated[float, 1, 1e6] = 4000.0, read: Annotated[float, 0, 1e4] = 4.0,
) -> Array:  # fmt: skip
    """Low light: y = srgb((Poisson(e) + read n) / photons), e = photons 2^-stops linear(x), n ~ N(0, 1) [3]."""
    # `photons` is the count at white without underexposure; `read` is in electrons. The noise is added to linear
    # light; the curve of IEC 61966-2-1 (linear, and its inverse srgb) then amplifies it in the shadows.
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    electrons = rng.poisson(photons * 2.0**-stops * linear) + read * rng.standard_normal(x.shape, dtype=np.float32)
    linear = np.maximum(electrons / photons, 0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)


# ---- tone, print, file -----------------------------------------------------------------------------------------------


def gamma(x: Array, rng: Rng, exponent: Annotated[float, 0.1, 10]) -> Array:
    """y = x^exponent: above 1 darkens, below 1 brightens; black and white stay. [4], feFuncR of type gamma."""
    return x ** np.float32(exponent)


def contrast(x: Array, rng: Rng, gain: Annotated[float, 0, 10]) -> Array:
    """y = 1/2 + gain (x - 1/2). [4], `contrast`."""
    return 0.5 + np.float32(gain) * (x - 0.5)


def fade(x: Array, rng: Rng, gain: Part, lift: Part, saturation: Part = 1.0) -> Array:
    """A bleached print: y = lift + gain (L + saturation (x - L)), L the luma. [4], `saturate` and feFuncR linear."""
    grey = (x @ LUMA)[..., None]
    return np.float32(lift) + np.float32(gain) * (grey + np.float32(saturation) * (x - grey))


def sepia(x: Array, rng: Rng, weight: Part) -> Array:
    """y = (1 - weight) x + weight min(S x, 1), S the matrix of `sepia` in [4]: gray turns brown."""
    matrix = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], dtype=np.float32)
    return (1 - np.float32(weight)) * x + np.float32(weight) * np.minimum(x @ matrix.T, 1)


def _paint(x: Array, rng: Rng, strokes: list[tuple[list[tuple[float, float]], float]], opacity: float) -> Array:
    """y = (1 - a) x + a c, a the opacity under a stroke (points, width); a stroke of one point is a disc."""
    layer = Image.new("LA", x.shape[1::-1])  # a c, and a: blurring c alone would mix in black
    draw = ImageDraw.Draw(layer)
    for points, width in strokes:
        # 7 in 10 strokes are light, like bare paper; the others are dark.
        tone = rng.uniform(0.85, 1) if rng.random() < 0.7 else rng.uniform(0, 0.15)
        ink = (round(255 * opacity * tone), round(255 * opacity))
        if len(points) > 1:
            draw.line(points, ink, round(width))
        else:
            draw.circle(points[0], width / 2, ink)
    ac, a = np.split(np.asarray(layer.filter(ImageFilter.GaussianBlur(0.5)), np.float32) / 255, 2, axis=2)
    return (1 - a) * x + ac


def scratches(x: Array, rng: Rng, count: Count, width: Annotated[float, 1, 50] = 2.0, opacity: Part = 0.8) -> Array:
    """`count` nearly vertical lines, each bent at 1 to 4 points, as grit scratches moving film; [2] uses real masks."""
    # Painted through n ~ U{3..6} points (x0 + d t + e_t, y_t) as fractions of the sides, t from 0 to 1 evenly, with
    # x0 ~ U(0, 1), d ~ U(-0.1, 0.1), e_t ~ U(-0.01, 0.01), and y_t evenly from U(-0.2, 0.6) to U(0.6, 1.2).
    (h, w), strokes = x.shape[:2], []
    for _ in range(count):
        n = int(rng.integers(3, 7))
        across = rng.uniform() + rng.uniform(-0.1, 0.1) * np.linspace(0, 1, n) + rng.uniform(-0.01, 0.01, n)
        down = np.linspace(rng.uniform(-0.2, 0.6), rng.uniform(0.6, 1.2), n)
        strokes.append((list(zip((w * across).tolist(), (h * down).tolist(), strict=True)), width))
    return _paint(x, rng, strokes, opacity)


def dust(x: Array, rng: Rng, density: Density, diameter: Annotated[float, 1, 100] = 5.0, opacity: Part = 0.8) -> Array:
    """Poisson(density w h / 10^6) discs at U(0, w) x U(0, h), with diameters U(1, diameter): the spots of [2]."""
    h, w = x.shape[:2]
    specks = rng.uniform((0, 0, 1), (w, h, diameter), (rng.poisson(density * h * w / 1e6), 3))
    return _paint(x, rng, [([(left, top)], d) for left, top, d in specks.tolist()], opacity)


def to_array(image: Image.Image) -> Array:
    """A picture to float32 RGB (H, W, 3) in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) * np.float32(1 / 255)


def to_picture(x: Array) -> Image.Image:
    """Float32 RGB in [0, 1] to bytes, rounded to nearest: truncation would darken by half a level."""
    return Image.fromarray((x * np.float32(255) + np.float32(0.5)).astype(np.uint8))


def _through_file(x: Array, kind: str, quality: int) -> Array:
    to_picture(x).save(file := io.BytesIO(), kind, quality=quality)
    return to_array(Image.open(file))


def jpeg(x: Array, rng: Rng, quality: Quality) -> Array:
    """A JPEG file by Pillow and libjpeg, with chroma at half resolution."""
    # A coefficient c of an 8 x 8 block's cosine transform becomes q round(c / q), q = (s q50 + 50) // 100 in 1..255,
    # s = 5000 / quality below 50, else 200 - 2 quality: ITU-T T.81, A.3.4, tables q50 of annex K.1; libjpeg, jcparam.c.
    return _through_file(x, "JPEG", quality)


def webp(x: Array, rng: Rng, quality: Quality) -> Array:
    """A lossy WebP file by Pillow and libwebp, which predicts each block and rounds the rest: RFC 6386."""
    return _through_file(x, "WEBP", quality)


# Every public function above that takes (x, rng, values...) is an operator: the language, its errors and --help read
# the signature. If you change this file, latents that are cached are made again (extras/latents.py).
OPERATORS: dict[str, Callable[..., Array]] = {
    name.replace("_", "-"): function
    for name, function in list(globals().items())
    if name[0] != "_" and inspect.isfunction(function) and "rng" in inspect.signature(function).parameters
}

# ---- the language: text -> a tree of steps, which is called on each picture -----------------------------------------

_FILE = tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8-sig"))
PRESETS: dict[str, str] = {name: "".join(preset["spec"].split()) for name, preset in _FILE.items()}
PROMPTS: dict[str, str] = {name: preset["prompt"] for name, preset in _FILE.items()}


@dataclass(frozen=True)
class Step:
    """An operator's name with what each of its values is drawn from, or "all" or "one" of nested steps."""

    kind: str
    parts: tuple
    chance: float | None = None  # the probability after @

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        """The degraded picture, RGB of the same size."""
        x = self.run(to_array(image), rng, image.size)
        return to_picture(x if x.shape[1::-1] == image.size else _resample(x, image.size, "bicubic"))

    def run(self, x: Array, rng: Rng, size: Size) -> Array:
        """The same on arrays (H, W, 3), without undoing resize; `size` is the clean picture's (width, height)."""
        if self.kind == "all":
            for part in self.parts:
                if part.chance is None or rng.random() < part.chance:
                    x = part.run(x, rng, size)
            return x
        if self.kind == "one":
            ends = np.cumsum([part.chance for part in self.parts])
            index = int(np.searchsorted(ends, rng.random(), side="right"))
            return self.parts[index].run(x, rng, size) if index < len(ends) else x
        values = [_draw(choices, rng) for choices in self.parts]
        y = OPERATORS[self.kind](x, rng, *values, **({"size": size} if self.kind == "resize" else {}))
        return np.clip(y, 0, 1, out=y)


def _draw(choices: Sequence, rng: Rng) -> float | int | str:
    """A number between two floats, else one of the choices. A single choice does not advance the generator."""
    between = len(choices) == 2 and isinstance(choices[0], float)
    return rng.uniform(*choices) if between else choices[rng.integers(len(choices))]


def parse(spec: str) -> Step:
    """The degradation that `spec` describes: call it with (picture, generator). Picklable, for loader workers.

    Raises:
        ValueError: one line that says what was given, what is possible and what to do.
    """
    tokens = re.findall(r"[(),|]|@[^(),|@]*|[^(),|@]+", re.sub(r"\s*([(),|@=/:])\s*", r"\1", spec.strip()))
    try:
        if not tokens:
            raise ValueError(f"it is empty; write a preset, {', '.join(PRESETS)}, or operators, {PRESETS['guide']}")
        step = _read_steps(tokens)
        if tokens:
            raise ValueError(f"unexpected {tokens[0]!r}; join steps by ',' or '|' and open every parenthesis")
        return step
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--degrade {spec[:1000]!r}: {error}") from error


def describe() -> str:
    """The language, as above, the operators with the names of their values, and the presets with their texts."""
    language = (__doc__ or "\n\n\n\n").split("\n\n")[2]  # python -OO leaves none
    lines = [language, "operators:", *(f"  {n}={'/'.join(_values(n))}" for n in OPERATORS)]
    return "\n".join([*lines, "presets:", *(f"  {n}: {t}" for n, t in PRESETS.items())])


def _values(operator: str) -> dict[str, inspect.Parameter]:
    """The parameters of an operator that the language sets."""
    return {n: p for n, p in inspect.signature(OPERATORS[operator]).parameters.items() if n not in ("x", "rng", "size")}


def _read_steps(tokens: list[str]) -> Step:
    """Steps joined by ',' (all of them) or '|' (one of them), taken from the front of the tokens."""
    parts, joints = [_read_step(tokens)], set()
    while tokens and tokens[0] in (",", "|"):
        joints.add(tokens.pop(0))
        parts.append(_read_step(tokens))
    if len(joints) == 2:
        raise ValueError("',' and '|' side by side; add parentheses, as in (blur=1,jpeg=85)|jpeg=30")
    if "|" not in joints:
        return Step("all", tuple(parts))
    rest = 1 - sum(part.chance or 0 for part in parts)
    if rest < -1e-9:
        raise ValueError(f"chances in (a@p|b@q) sum to {1 - rest:g}; make it 1 at most")
    share = max(rest, 0) / max(1, sum(part.chance is None for part in parts))
    return Step("one", tuple(replace(part, chance=share) if part.chance is None else part for part in parts))


def _read_step(tokens: list[str]) -> Step:
    """An operator, a preset or a parenthesis, with its chance, taken from the front of the tokens."""
    token = tokens.pop(0) if tokens else ""
    if token == "(":
        step = _read_steps(tokens)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("a parenthesis is not closed; add ')'")
    else:
        step = parse(PRESETS[token]) if token in PRESETS else _read_operator(token)
    if not tokens or tokens[0][0] != "@":
        return step
    text = tokens.pop(0)[1:]
    with suppress(ValueError):  # not a number: same error as out of range
        if 0 <= float(text) <= 1:
            return replace(step, chance=float(text))
    raise ValueError(f"the chance after @ must be a number from 0 to 1, got {text!r}; write for instance @0.5")


def _read_operator(token: str) -> Step:
    name, _, text = token.partition("=")
    if name not in OPERATORS:
        raise ValueError(f"no operator {name!r}; use {', '.join(OPERATORS)} or a preset, {', '.join(PRESETS)}")
    values, texts = _values(name), text.split("/")
    if len(texts) > len(values):
        raise ValueError(f"{len(texts)} values in {token!r}; write {name}={'/'.join(values)}")
    return Step(name, tuple(_read_value(v, t, name) for v, t in zip_longest(values.values(), texts, fillvalue="")))


def _read_value(value: inspect.Parameter, text: str, operator: str) -> Sequence:
    """The choices for _draw: words, whole numbers, one float or two; the default if there is no text."""
    if not text and value.default is not value.empty:
        return (value.default,)
    what, allowed, parts = f"{value.name} of {operator}", get_args(value.annotation), text.split(":")
    if get_origin(value.annotation) is Literal:
        if not set(parts) <= set(allowed):
            raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {text!r}")
        return parts
    number, low, high = allowed
    with suppress(ValueError):
        ends = [number(part) for part in parts]
        if len(ends) <= 2 and low <= ends[0] <= ends[-1] <= high:
            return range(ends[0], ends[-1] + 1) if number is int else sorted(set(ends))
    wanted = f"a {'whole ' * (number is int)}number from {low:g} to {high:g}"
    raise ValueError(f"{what} must be {wanted}, or a range as {low:g}:{high:g}, smaller first, got {text!r}")
