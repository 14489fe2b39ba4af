"""Every operator against its definition, measured; the language: draws, chances, order, presets, error lines."""

import io
import pickle
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, special

from kontext_min import degrade
from kontext_min.degrade import PRESETS, PROMPTS, parse, to_array, to_picture
from kontext_min.extras import contact_sheet, inventory
from test_pictures import swapped_profile

PHOTO = Image.open(Path(__file__).parent / "photos" / "life.jpg").convert("RGB").crop((400, 200, 657, 391))  # 257 x 191


def rng(seed=0):
    return np.random.default_rng(seed)


def apply(spec, x, seed=0):
    """One operator on a float array: what it does before anything is rounded to bytes."""
    return parse(spec).run(np.asarray(x, np.float32), rng(seed), x.shape[1::-1])


def flat(value, size=256):
    return np.full((size, size, 3), value, np.float32)


def impulse(spec, size=101):
    """The response to one bright pixel, which is the kernel, and its second moments xx, yy and xy."""
    x = np.zeros((size, size, 3), np.float32)
    x[size // 2, size // 2] = 1
    k = apply(spec, x)[..., 0].astype(np.float64)
    v, u = np.mgrid[size // 2 : -size // 2 : -1, -(size // 2) : size // 2 + 1]
    assert k.sum() == pytest.approx(1, abs=1e-4)  # brightness is kept (float32, negative rounding errors clipped)
    return k, (k * u**2).sum(), (k * v**2).sum(), (k * u * v).sum()


# ---- lens


def test_convolution_against_scipy():
    x, kernel = to_array(PHOTO), rng().random((7, 7))  # not symmetric, so that a flipped kernel would show
    expected = [ndimage.convolve(x[..., c].astype(np.float64), kernel / kernel.sum(), mode="mirror") for c in range(3)]
    # float32 FFT: 1e-6 of the largest value
    np.testing.assert_allclose(degrade._convolve(x, kernel), np.stack(expected, axis=2), atol=2e-6)


@pytest.mark.parametrize("sigma", [0.8, 1.5, 4])
@pytest.mark.parametrize("period", [8, 16, 50])
def test_blur_has_the_response_of_a_gaussian(sigma, period):
    """A grating of period P keeps exp(-2 pi^2 sigma^2 / P^2) of its amplitude."""
    grating = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(400) / period)
    blurred = apply(f"blur={sigma}", np.broadcast_to(grating[None, :, None], (64, 400, 3)))[32, 100:300, 0]
    amplitude = 2 * np.mean((blurred - 0.5) * np.sin(2 * np.pi * np.arange(100, 300) / period))
    # 2e-4: the tails beyond 4 sigma
    assert amplitude / 0.4 == pytest.approx(np.exp(-2 * np.pi**2 * sigma**2 / period**2), abs=2e-4)


def test_widths_of_the_kernels():
    _, xx, yy, xy = impulse("blur=2.5")
    assert (xx, yy, xy) == pytest.approx((6.25, 6.25, 0), abs=0.02)  # the tails beyond 4 sigma, squared
    _, xx, yy, xy = impulse("aniso-blur=4/1.5/30")
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)  # covariance R diag(16, 2.25) R^T; up is positive
    assert (xx, yy) == pytest.approx((16 * c * c + 2.25 * s * s, 16 * s * s + 2.25 * c * c), abs=0.05)
    assert xy == pytest.approx(13.75 * c * s, abs=0.05)
    _, xx, yy, xy = impulse("motion-blur=15/0")
    assert (xx, yy, xy) == pytest.approx(((15**2 - 1) / 12, 0, 0), abs=1e-3)  # a row of 15 equal pixels
    _, xx, yy, xy = impulse("motion-blur=20/45")
    assert (xx, yy) == pytest.approx((400 / 24, 400 / 24), rel=0.05)  # a line of length L at 45 degrees: L^2 / 24
    assert xy == pytest.approx(400 / 24, rel=0.05)  # rising to the right
    _, xx, yy, xy = impulse("defocus=8")
    assert (xx, yy, xy) == pytest.approx((16, 16, 0), rel=0.02, abs=1e-3)  # a disc: r^2 / 4
    generalised, gaussian, plateau = (impulse(f"blur=2/20/{rest}")[0] for rest in ("0.5", "1", "2/plateau"))
    assert generalised[50, 60] > 10 * gaussian[50, 60]  # a smaller beta has longer tails
    assert plateau[50, 51] / plateau[50, 50] == pytest.approx(1 / (1 + 0.25**2), rel=1e-3)
    assert gaussian[50, 51] / gaussian[50, 50] == pytest.approx(np.exp(-1 / 8), rel=1e-3)


@pytest.mark.parametrize("spec", ["blur=3/3", "aniso-blur=3/2/20/3", "blur=3/3/1/plateau"])
def test_radius_ends_the_kernel(spec):
    kernel = impulse(spec)[0]
    assert kernel[47:54, 47:54].min() > 1e-3
    kernel[47:54, 47:54] = 0
    assert kernel.max() < 1e-6  # the FFT's rounding


@pytest.mark.parametrize(("w", "radius"), [(1.3, 10), (0.1, 1), (4.5, 60), (1.3, 200)])
def test_sinc_is_the_circular_low_pass(w, radius):
    seen = []
    u, v = degrade._grid(radius)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degrade, "_convolve", lambda x, kernel: seen.append(kernel) or x)
        apply(f"sinc={w}/{radius}", flat(0.5, 32))
    r = np.where(np.hypot(u, v) == 0, 1, np.hypot(u, v))
    expected = np.where(np.hypot(u, v) == 0, w**2 / (4 * np.pi), w * special.j1(w * r) / (2 * np.pi * r))
    np.testing.assert_allclose(seen[0], expected, atol=1e-8)


# ---- sampling


def test_downsample_by_area_is_the_block_mean():
    x = to_array(PHOTO.crop((0, 0, 256, 188)))
    means = x.reshape(47, 4, 64, 4, 3).mean(axis=(1, 3))
    back = [np.asarray(Image.fromarray(means[..., c].copy()).resize((256, 188), Image.BICUBIC)) for c in range(3)]
    np.testing.assert_allclose(apply("downsample=4/area", x), np.clip(np.stack(back, 2), 0, 1), atol=1e-5)


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "area"])
def test_downsample_keeps_what_it_can_and_removes_the_rest(method):
    slow = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(256) / 64)
    fast = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(256) / 2.2)  # far beyond what one pixel in 4 can hold
    rows = (np.broadcast_to(g[None, :, None], (64, 256, 3)) for g in (slow, fast))
    kept, lost = (apply(f"downsample=4/{method}", row) for row in rows)
    assert np.abs(kept[32, 16:-16, 0] - slow[16:-16]).max() < 0.03
    assert lost[32, 16:-16].std() < 0.05  # and nothing aliased: the grating's own deviation is 0.28


def test_resize_is_relative_to_the_first_size_and_undone_at_the_end():
    assert apply("resize=0.5", to_array(PHOTO.resize((80, 60)))).shape == (30, 40, 3)
    once = np.asarray(parse("resize=0.5/area")(PHOTO, rng()))
    assert once.shape == (191, 257, 3)
    np.testing.assert_array_equal(np.asarray(parse("resize=0.5/area,resize=0.5/area")(PHOTO, rng())), once)
    grey = to_picture(flat(0.5))
    fine, coarse = (to_array(parse(s)(grey, rng())) - 0.5 for s in ("noise=0.1", "resize=0.25,noise=0.1"))
    neighbours = [np.mean(n[:, 1:] * n[:, :-1]) / np.mean(n**2) for n in (fine, coarse)]
    assert neighbours[0] == pytest.approx(0, abs=0.02)
    assert neighbours[1] > 0.8  # noise put in at a quarter of the size has grains of four pixels


# ---- sensor


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_noise_level(std):
    n = apply(f"noise={std}", flat(0.5)) - 0.5  # 196,608 numbers: the deviation is known to 0.16 percent
    assert n.std() == pytest.approx(std, rel=0.01)
    assert n.mean() == pytest.approx(0, abs=5 * std / np.sqrt(n.size))
    assert np.abs(np.corrcoef(n.reshape(-1, 3).T) - np.eye(3)).max() < 0.02
    grey = apply(f"noise={std}/grey", flat(0.5)) - 0.5
    assert grey.std() == pytest.approx(std, rel=0.02)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("level", [0.1, 0.5])
@pytest.mark.parametrize("std", [0.03, 0.1])
def test_poisson_variance_grows_with_the_light(level, std):
    n = apply(f"poisson={std}", flat(level)) - level
    assert n.mean() == pytest.approx(0, abs=5 * std * np.sqrt(level / n.size))
    assert n.var() == pytest.approx(std**2 * level, rel=0.03)
    grey = apply(f"poisson={std}/grey", flat(level)) - level
    assert grey.var() == pytest.approx(std**2 * level, rel=0.05)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 1])


def linear(y):
    """The display curve undone, IEC 61966-2-1."""
    return np.where(y <= 0.04045, y / 12.92, ((y + 0.055) / 1.055) ** 2.4)


def test_underexpose():
    x = to_array(PHOTO)
    # A million photons and no read noise leave the exposure alone.
    np.testing.assert_allclose(linear(apply("underexpose=2/1e6/0", x)), linear(x) / 4, atol=4e-3)
    np.testing.assert_allclose(apply("underexpose=0/1e6/0", x), x, atol=0.01)
    level, photons, read = 0.8, 2000, 6
    electrons = linear(apply(f"underexpose=1/{photons}/{read}", flat(level))) * photons
    mean = photons / 2 * float(linear(np.float64(level)))
    assert electrons.mean() == pytest.approx(mean, rel=1e-3)
    assert electrons.var() == pytest.approx(mean + read**2, rel=0.02)


# ---- tone


def test_tone_operators_are_their_equations():
    x = rng().random((20, 30, 3), dtype=np.float32)
    grey = (0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2])[..., None]
    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(apply("gamma=2.2", x), x**2.2, **close)
    np.testing.assert_allclose(apply("contrast=1.7", x), np.clip(0.5 + 1.7 * (x - 0.5), 0, 1), **close)
    np.testing.assert_allclose(apply("fade=0.6/0.2/0.3", x), 0.2 + 0.6 * (grey + 0.3 * (x - grey)), **close)
    np.testing.assert_allclose(apply("fade=0.6/0.2", x), 0.2 + 0.6 * x, **close)
    np.testing.assert_allclose(apply("fade=1/0/0", x), np.broadcast_to(grey, x.shape), **close)
    np.testing.assert_allclose(apply("sepia=0", x), x, **close)
    brown = apply("sepia=1", flat(0.5, 4))[0, 0]
    assert brown == pytest.approx([0.6755, 0.6015, 0.4685], abs=1e-6)  # half the sums of the matrix's rows


# ---- print


def test_scratches_are_upright_and_leave_the_rest_alone():
    marks = np.abs(apply("scratches=1/2/1", flat(0.5), seed=3) - 0.5).max(axis=2) > 0.1
    rows, columns = np.nonzero(marks)
    assert np.ptp(rows) > 2 * np.ptp(columns) > 0
    assert 1.5 < marks.sum() / np.ptp(rows) < 4.5  # two pixels wide, and a soft rim
    np.testing.assert_array_equal(apply("scratches=0", flat(0.3)), flat(0.3))
    full, half = (np.abs(apply(f"scratches=5/3/{a}", flat(0.5)) - 0.5) for a in (1, 0.5))
    assert half.max() == pytest.approx(full.max() / 2, abs=0.01)  # bytes in the layers
    many = [apply("scratches=20/2", flat(0.5), seed) for seed in range(3)]
    assert 1 < np.mean([(y > 0.6).sum() / (y < 0.4).sum() for y in many]) < 5  # 7 to 3 in expectation


def test_dust_density_and_size():
    found = []
    for seed in range(5):
        marks = np.abs(apply("dust=200/6/1", flat(0.5, 1000), seed) - 0.5)[..., 0] > 0.1
        labels, count = ndimage.label(marks)
        found.append(count)
        boxes = ndimage.find_objects(labels)
        # Diameter 6, a drawn pixel more, and a soft rim of one pixel at each side; two specks may touch.
        assert np.median([max(b[0].stop - b[0].start, b[1].stop - b[1].start) for b in boxes]) <= 9
    assert np.mean(found) == pytest.approx(200, abs=4 * np.sqrt(200 / 5))


# ---- file


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_files_are_pillows(kind):
    sizes, errors = [], []
    for quality in (10, 40, 70, 95):
        file = io.BytesIO()
        PHOTO.save(file, kind, quality=quality)
        sizes.append(len(file.getvalue()))
        ours = np.asarray(parse(f"{kind.lower()}={quality}")(PHOTO, rng()))
        np.testing.assert_array_equal(ours, np.asarray(Image.open(file).convert("RGB")))
        errors.append(np.mean((ours.astype(float) - np.asarray(PHOTO)) ** 2))
    assert sizes == sorted(sizes) and sizes[-1] > 4 * sizes[0]
    assert errors == sorted(errors, reverse=True) and errors[0] > 4 * errors[-1]


# ---- bytes and composition


def test_identity_and_rounding():
    for spec in (
        "blur=0",
        "blur=0/10/0.1",
        "blur=0/10/0.1/plateau",
        "blur=0/3/10",
        "noise=0",
        "downsample=1",
        "fade=1/0",
        "gamma=1",
        "sepia=0",
        "defocus=0",
    ):
        np.testing.assert_array_equal(np.asarray(parse(spec)(PHOTO, rng())), np.asarray(PHOTO))
    left = to_array(parse("poisson=0")(PHOTO, rng())) - to_array(PHOTO)
    assert np.abs(left).max() < 1.01 / 255  # 1e8 photons at white: a deviation of 0.03 levels
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    halved = np.asarray(parse("fade=0.49/0")(ramp, rng()))[..., 0].astype(float)
    assert np.abs(halved - 0.49 * np.asarray(ramp)).max() <= 0.5 + 1e-4  # to the nearest
    assert np.mean(halved - 0.49 * np.asarray(ramp)) == pytest.approx(0, abs=0.02)  # cutting off would give -0.5
    there_and_back = np.asarray(parse("gamma=4,gamma=0.25")(ramp, rng()))[..., 0]
    np.testing.assert_array_equal(there_and_back, np.asarray(ramp))  # bytes between would merge the shadows


def test_order_is_left_to_right():
    generator, x = rng(5), to_array(PHOTO)
    x = np.clip(degrade.blur(x, generator, 1.5), 0, 1)
    x = np.clip(degrade.noise(x, generator, 0.02), 0, 1)
    x = degrade.jpeg(x, generator, 85)
    ours = parse("blur=1.5,noise=0.02,jpeg=85")(PHOTO, rng(5))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(to_picture(x)))
    grey = to_picture(flat(0.5))
    first, last = (to_array(parse(s)(grey, rng())).std() for s in ("noise=0.05,blur=1.5", "blur=1.5,noise=0.05"))
    assert last == pytest.approx(0.05, rel=0.01)
    assert first == pytest.approx(0.05 / (2 * np.sqrt(np.pi) * 1.5), rel=0.03)  # what blur leaves of white noise


@pytest.mark.parametrize("name", degrade.OPERATORS)
def test_every_operator_at_the_ends_of_its_values(name):
    """Float32 in [0, 1], three channels, and a function of the generator's state; defaults where there are any."""
    wanted = [get_args(v.annotation) for v in degrade._values(name).values() if v.default is v.empty]
    for end in (1, 2):
        spec = f"{name}={'/'.join(str(min(limits[end], 50)) for limits in wanted)}"
        first, again = (apply(spec, to_array(PHOTO.resize((40, 30))), seed=3) for _ in range(2))
        assert first.dtype == np.float32 and first.shape[2] == 3 and 0 <= first.min() <= first.max() <= 1, spec
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", degrade.OPERATORS)
def test_signatures_say_all_that_the_language_needs(name):
    """Every value is annotated with words or limits, and a default is one of them."""
    assert degrade.OPERATORS[name] is getattr(degrade, name.replace("-", "_"))
    for value in degrade._values(name).values():
        allowed = get_args(value.annotation)
        if get_origin(value.annotation) is Literal:
            assert value.default in allowed
        else:
            number, low, high = allowed
            assert low < high and (value.default is value.empty or low <= value.default <= high)
            assert value.default is value.empty or type(value.default) is number
    assert len(degrade.OPERATORS) == 18


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    degraded = parse(name)(PHOTO, rng(1))
    assert degraded.mode == "RGB" and degraded.size == PHOTO.size
    difference = np.abs(to_array(degraded) - to_array(PHOTO)).mean()
    assert 0.005 < difference < 0.6
    text = parse(PRESETS[name])
    for seed in range(3):  # reproducible from the generator alone, and different for another one
        np.random.seed(seed)
        again = np.asarray(parse(name)(PHOTO, rng(1)))
        np.testing.assert_array_equal(again, np.asarray(degraded))
        np.testing.assert_array_equal(np.asarray(text(PHOTO, rng(1))), again)  # the name stands for the text
    assert np.any(np.asarray(parse(name)(PHOTO, rng(2))) != np.asarray(degraded))
    assert PROMPTS.keys() == PRESETS.keys() and PRESETS[name] in degrade.describe()
    worker = pickle.loads(pickle.dumps(parse(name)))  # a loader's process gets it so
    np.testing.assert_array_equal(np.asarray(worker(PHOTO, rng(1))), np.asarray(degraded))


def test_presets_mix_with_operators():
    a, b = (np.asarray(parse(s)(PHOTO, rng())) for s in ("guide,jpeg=10", "blur=1.5,noise=0.02,jpeg=85,jpeg=10"))
    np.testing.assert_array_equal(a, b)
    assert PRESETS["guide"] == "blur=1.5,noise=0.02,jpeg=85"


def test_real_esrgan_has_its_published_chances():
    blur, resize, noise, _, blur2, resize2, noise2, last = parse("real-esrgan").parts[0].parts
    for step in (noise, noise2):
        assert [part.chance for part in step.parts] == pytest.approx([0.3, 0.2, 0.3, 0.2])
    for step, chances in ((resize, [0.2, 0.7]), (resize2, [0.3, 0.4, 0.3]), (last, [0.5, 0.5])):
        assert [part.chance for part in step.parts] == pytest.approx(chances)
    assert blur2.chance == 0.8 and blur.chance is None
    chances = [part.chance for part in blur.parts]
    assert sum(chances) == pytest.approx(1)
    # Gaussian, generalised and plateau are 0.7, 0.15, 0.15 of the nine tenths that are not sinc.
    assert (sum(chances[:2]), sum(chances[2:4]), sum(chances[4:6])) == pytest.approx((0.63, 0.135, 0.135))
    assert sum(chances[6:]) == pytest.approx(0.1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (5, 33), (64, 47)])
def test_any_mode_and_size(mode, size):
    picture = PHOTO.resize(size).convert(mode)
    for spec in [*PRESETS, "blur=8", "downsample=64", "defocus=20", "webp=50"]:
        degraded = parse(spec)(picture, rng())
        assert (degraded.mode, degraded.size) == ("RGB", size)


# ---- draws: a black pixel that `fade=0/v` sets to v shows what was drawn


def draws(spec, count=600):
    pixel = Image.new("RGB", (1, 1))
    step, generator = parse(spec), rng()
    return np.array([to_array(step(pixel, generator))[0, 0, 0] for _ in range(count)])


def test_ranges_are_uniform():
    values = draws("fade=0/0.2:0.6")
    assert values.min() >= 0.2 - 0.002 and values.max() <= 0.6 + 0.002  # half a level
    for quantile in (0.25, 0.5, 0.75):  # of 600: known to 0.02 x 0.4, four times that
        assert np.quantile(values, quantile) == pytest.approx(0.2 + 0.4 * quantile, abs=0.033)


def test_whole_numbers_and_words_are_drawn_evenly():
    (step,) = parse("jpeg=30:32").parts
    numbers = [degrade._draw(step.parts[0], g) for g in [rng()] for _ in range(3000)]
    assert all(isinstance(n, int) for n in numbers)
    assert np.bincount(numbers)[30:] == pytest.approx([1000] * 3, abs=4 * np.sqrt(3000 * 2 / 9))
    (step,) = parse("downsample=2/area:bicubic").parts
    words = [degrade._draw(step.parts[1], g) for g in [rng()] for _ in range(1000)]
    assert words.count("area") == pytest.approx(500, abs=4 * np.sqrt(250))
    assert words.count("area") + words.count("bicubic") == 1000


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("fade=0/0.2@0.3", {0: 0.7, 51: 0.3}),
        ("(fade=0/0.2|fade=0/0.4)", {51: 0.5, 102: 0.5}),
        ("fade=0/0.2|fade=0/0.4@0.7", {51: 0.3, 102: 0.7}),
        ("(fade=0/0.2@0.1|fade=0/0.4@0.2)", {0: 0.7, 51: 0.1, 102: 0.2}),
        ("(fade=0/0.2,fade=1/0.2)@0.4", {0: 0.6, 102: 0.4}),
        ("((fade=0/0.2,fade=1/0.2)@0.4|fade=0/1)", {102: 0.4, 255: 0.6}),
        ("(fade=0/0.2|fade=0/0.4)@0.5 , fade=0/1@0", {0: 0.5, 51: 0.25, 102: 0.25}),
        ("fade=0/1@1", {255: 1}),
    ],
)
def test_chances(spec, shares):
    levels = np.round(draws(spec) * 255).astype(int)
    assert set(levels) == set(shares)
    for level, share in shares.items():  # four standard deviations of 600 draws
        assert np.mean(levels == level) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 600))


# ---- errors


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("blurr=1.5", "no operator 'blurr'; use blur, aniso-blur,"),
        ("", "it is empty; write a preset, guide, denoise"),
        (" ", "it is empty; write a preset, guide, denoise"),
        ("blur=1,", "no operator ''"),
        ("guide=2", "or a preset, guide, denoise"),
        (
            "jpeg=high",
            "quality of jpeg must be a whole number from 1 to 100, or a range as 1:100, smaller first, got 'high'",
        ),
        ("jpeg=85.5", "quality of jpeg must be a whole number"),
        ("jpeg", "quality of jpeg must be a whole number"),
        (
            "jpeg=300",
            "quality of jpeg must be a whole number from 1 to 100, or a range as 1:100, smaller first, got '300'",
        ),
        ("jpeg=30:300", "got '30:300'"),
        ("jpeg=95:30", "or a range as 1:100, smaller first, got '95:30'"),
        ("noise=1:2:3", "std of noise must be a number"),
        ("noise=nan", "std of noise must be a number from 0 to 1, or a range as 0:1, smaller first, got 'nan'"),
        ("noise=-0.1", "std of noise must be a number from 0 to 1, or a range as 0:1, smaller first, got '-0.1'"),
        ("noise=0.1/gray", "kind of noise must be one of colour, grey, got 'gray'"),
        ("gamma=1/2", "2 values in 'gamma=1/2'; write gamma=exponent"),
        ("blur=1@2", "the chance after @ must be a number from 0 to 1, got '2'"),
        ("blur=1@", "the chance after @ must be a number from 0 to 1, got ''"),
        ("blur=1@0.1:0.5", "the chance after @ must be a number from 0 to 1, got '0.1:0.5'; write for instance @0.5"),
        ("(blur=1,jpeg=85", "a parenthesis is not closed; add ')'"),
        ("blur=1)", "unexpected ')'"),
        ("blur=1(jpeg=85)", "unexpected '('"),
        ("blur=1|jpeg=85,noise=0", "',' and '|' side by side; add parentheses"),
        ("(blur=1@0.8|jpeg=85@0.3)", "sum to 1.1; make it 1 at most"),
    ],
)
def test_error_lines(spec, says):
    with pytest.raises(ValueError) as caught:
        parse(spec)
    message = str(caught.value)
    assert says in message and "\n" not in message and message.startswith(f"--degrade {spec!r}: ")


def test_too_many_parentheses_are_one_short_line():
    with pytest.raises(ValueError, match=r"^--degrade '\(\(.*recursion") as caught:
        parse("(" * 5000)
    assert len(str(caught.value)) < 2000


def test_contact_sheet_command(tmp_path, capsys, monkeypatch):
    photo = tmp_path / "photo.png"
    PHOTO.resize((400, 300)).save(photo)
    contact_sheet.main([str(photo), str(tmp_path / "sheet.jpg")])
    with pytest.raises(ValueError, match="exists; name a new file for the sheet"):  # contact_sheet *.jpg
        contact_sheet.main([str(photo), str(photo)])
    sheet = Image.open(tmp_path / "sheet.jpg")
    assert sheet.size == (4 * 320, 2 * (24 + 240 + 160))
    heads, row, mean, last = capsys.readouterr().out.splitlines()
    assert last == f"{tmp_path / 'sheet.jpg'}: what they do to {photo}"
    assert heads.split()[2:] == list(PRESETS) and row.split()[1:] == mean.split()[1:]
    assert all(5 < float(value) < 45 for value in row.split()[1:])
    assert inventory.is_result(tmp_path / "sheet.jpg")  # among photographs it does not train
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"new\.jpg: exists; name a new file"):
        patch.setattr(contact_sheet, "psnr", lambda *_: (tmp_path / "new.jpg").write_text("yours") and 20.0)
        contact_sheet.main([str(photo), str(tmp_path / "new.jpg")])
    assert (tmp_path / "new.jpg").read_text() == "yours"  # it has come while the sheet was made
    Image.new("L", (1300, 1300)).save(tmp_path / "black.png")
    contact_sheet.main([str(tmp_path / "black.png"), str(tmp_path / "black.jpg")])
    said = capsys.readouterr()
    assert "inf" in said.out and "black.png: nearly one color; look at the file" in said.err
    clear = Image.open(photo).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    contact_sheet.main([str(tmp_path / "clear.png"), str(tmp_path / "clear.jpg")])
    assert "it has an alpha channel: laid on white" in capsys.readouterr().err
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut\.png: "):
        contact_sheet.main([str(photo), str(tmp_path / "cut.png"), str(tmp_path / "none.jpg")])
    assert not (tmp_path / "none.jpg").exists()
    with pytest.raises(ValueError, match=r"no/s\.jpg: no such folder; make it first"):
        contact_sheet.main([str(photo), str(tmp_path / "no" / "s.jpg")])
    for size in ((40, 1000), (1000, 40)):
        Image.new("L", size).save(tmp_path / "strip.png")
        with pytest.raises(ValueError, match=rf"strip\.png: {size[0]} x {size[1]} pixels, too long for a sheet"):
            contact_sheet.main([str(tmp_path / "strip.png"), str(tmp_path / "none.jpg")])
    means = []  # of the clean picture: with a profile that exchanges red and green, it is shown as training sees it
    for k, profile in enumerate((b"", swapped_profile())):
        Image.new("RGB", (400, 300), (200, 90, 30)).save(photo, icc_profile=profile)
        contact_sheet.main([str(photo), str(tmp_path / f"sheet{k}.png")])
        means.append(np.asarray(Image.open(tmp_path / f"sheet{k}.png").crop((0, 40, 320, 200))).mean((0, 1)))
    np.testing.assert_allclose(means[1], means[0][[1, 0, 2]], atol=3)
