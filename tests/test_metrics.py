"""PSNR, PSNR-Y and SSIM against scikit-image, the oracle; luma and texture against their definitions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kontext_min.extras import metrics
from kontext_min.extras.metrics import counted, luma, mean_row, psnr, psnr_y, row, scores, shift, ssim, table, texture

PHOTOS = sorted(Path(__file__).parent.glob("photos/*.jpg"))


def pair(path: Path = PHOTOS[0]) -> tuple[Image.Image, Image.Image]:
    clean = Image.open(path).convert("RGB").crop((300, 300, 501, 487))  # odd and unequal sides
    return clean.filter(ImageFilter.GaussianBlur(1.5)), clean


def as_arrays(kind: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The pair as bytes or floats, in colour or grey, and the range R of its values."""
    a, b = (np.asarray(p.convert("L") if "grey" in kind else p) for p in pair())
    return (a, b, 255) if "bytes" in kind else (a.astype(np.float32) / 255, b / 255, 1)


@pytest.mark.parametrize("kind", ["bytes", "floats", "grey bytes", "grey floats"])
def test_agrees_with_scikit_image(kind):
    a, b, data_range = as_arrays(kind)
    expected = structural_similarity(
        a.astype(np.float64), b.astype(np.float64), data_range=data_range, channel_axis=None if a.ndim == 2 else 2,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert 0.3 < expected < 0.95  # neither end of the scale, where anything agrees
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)  # both in float64: what remains is the order of summation
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b.astype(float), a.astype(float), data_range=data_range))


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_every_photograph(path):
    a, b = (np.asarray(p) for p in pair(path))
    expected = structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_pictures_bytes_and_floats_agree():
    a, b = pair()
    x, y = np.asarray(a), np.asarray(b)
    assert psnr(a, b) == psnr(x, y) == pytest.approx(psnr(x / 255, y / 255))
    assert ssim(a, b) == ssim(x, y) == pytest.approx(ssim(x / 255, y / 255))


def test_psnr_y_agrees_with_scikit_image():
    a, b = (rgb2ycbcr(np.asarray(p))[..., 0] for p in pair())
    assert psnr_y(*pair()) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)  # its 7 digits
    assert psnr_y(*pair()) > psnr(*pair()) + 1  # 219 of 255 levels, and colour errors count less


def test_the_same_however_many_rows_at_once(monkeypatch):
    """Every window in one band and in one only, so the sums differ in their order alone."""
    whole = scores(*pair())
    for rows in (7, 177):
        monkeypatch.setattr(metrics, "ROWS", rows)
        assert scores(*pair()) == pytest.approx(whole, rel=1e-12)


def test_table_and_mean():
    a, b = pair()
    rows = [row("a.png", a, a, b), row("a long name.png", a, b, b)]
    assert rows[0]["input"] == rows[0]["restored"] == scores(a, b)
    assert rows[1]["restored"] == {"psnr": np.inf, "psnr_y": np.inf, "ssim": pytest.approx(1), "texture": 1}
    mean = mean_row(rows)
    assert mean["restored"]["ssim"] == pytest.approx((ssim(a, b) + 1) / 2)
    lines = table([*rows, mean]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    digits = [n for _, n in metrics.SCORES.values()]
    cells = [f"{value:.{n}f}" for value, n in zip(scores(a, b).values(), digits, strict=True) for _ in range(2)]
    assert lines[1].split() == ["a.png", *cells]


def test_known_values():
    black, grey = np.zeros((16, 16)), np.full((16, 16), 0.1)
    assert psnr(black, grey) == pytest.approx(20)  # -10 log10 0.01
    assert psnr(grey, grey) == np.inf
    assert ssim(grey, grey) == pytest.approx(1, abs=1e-12)
    # Without any variance only the luminance term is left: C1 / (m^2 + C1).
    assert ssim(black, grey) == pytest.approx(1e-4 / (0.01 + 1e-4))
    bytes_apart = np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)
    assert psnr(*bytes_apart) == pytest.approx(0)  # and no wrap-around of the bytes


def test_luma():
    colours = np.array([[[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]], dtype=np.float64)
    assert luma(colours) * 255 == pytest.approx(np.array([[16, 235, 81.481, 144.553, 40.966]]))
    image = pair()[0]
    # Pillow's YCbCr is full range, Y' = (Y - 16) 255 / 219, to bytes: within one level.
    full = (luma(image) * 255 - 16) * 255 / 219
    assert np.abs(full - np.asarray(image.convert("YCbCr"))[..., 0]).max() < 1.01


def test_texture():
    blurred, clean = pair()
    assert texture(clean, clean) == 1
    flat = Image.new("RGB", clean.size)
    assert texture(clean, flat) == np.inf and texture(flat, flat) == 1
    assert texture(blurred, clean) < 0.1  # a blur of sigma 1.5 takes most of the Laplacian's energy
    assert texture(np.asarray(clean) / 255 * 0.5, clean) == pytest.approx(0.25)  # an energy, hence the square
    rough = np.asarray(clean) / 255 + np.random.default_rng(0).normal(0, 0.1, (*clean.size[::-1], 3))
    assert texture(rough, clean) > 1


@pytest.mark.parametrize("side", [96, 1500])
def test_shift_finds_a_picture_that_was_moved(side):
    """Whole pixels, to the right and down, through a degradation; and none where nothing moved."""
    photo = Image.open(PHOTOS[0]).convert("RGB")
    clean = photo.crop((301, 30, 301 + side, 30 + side * 2 // 3))
    blurred = photo.filter(ImageFilter.GaussianBlur(1.5))
    near = ((1, 0), (0, -1), (1, 1), (-2, 0), (0, 2), (2, -1)) if side > 256 else ()
    for dx, dy in ((0, 0), (7, 0), (-3, 5), (0, -9), (side // 5, 0), *near):
        moved = blurred.crop((301 - dx, 30 - dy, 301 - dx + side, 30 - dy + side * 2 // 3))
        assert shift(moved, clean) == (dx, dy)
        assert row("a", clean, moved, clean)["shift"] == max(abs(dx), abs(dy))


def test_shift_without_a_clear_answer_is_zero():
    flat, other = Image.new("RGB", (96, 96)), Image.open(PHOTOS[1]).convert("RGB").crop((300, 300, 396, 396))
    clean = Image.open(PHOTOS[0]).convert("RGB").crop((300, 300, 396, 396))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    for picture in (flat, other, noise):
        assert shift(picture, clean) == (0, 0)
    assert shift(flat, flat) == (0, 0)
    assert shift(np.zeros((1, 40)), np.zeros((1, 40))) == (0, 0)


def test_a_shift_is_said_below_the_table():
    photo = Image.open(PHOTOS[0]).convert("RGB")
    clean, moved = (photo.crop((x, 300, x + 120, 400)) for x in (300, 295))
    rows = [row("a.png", clean, clean, clean), row("b.png", clean, moved, clean)]
    lines = table([*rows, mean_row(rows)]).splitlines()
    assert lines[4:] == ["b.png: shifted by 5 pixels"]
    assert mean_row(rows)["shift"] == 5


def test_inputs_that_are_clean_are_no_part_of_the_mean():
    """As --degrade noise=0.1@0.5 leaves them: the mean would be infinite."""
    a, b = pair()
    rows = [row("a.png", a, a, b), row("b.png", b, a, b)]
    assert mean_row(rows)["input"] == rows[0]["input"] and mean_row(rows)["restored"] == rows[0]["restored"]
    assert table([*rows, mean_row(rows)]).endswith("\nthe mean leaves out 1: its input equals the clean picture")
    assert "leaves out" not in table([rows[1], mean_row(rows[1:])])
    assert counted(rows) == rows[:1] and counted(rows[1:]) == rows[1:]


def test_shapes_that_do_not_match():
    a = np.zeros((16, 16, 3))
    for metric in (psnr, ssim, texture, shift):
        with pytest.raises(ValueError, match=r"^pictures of shapes \(16, 16, 3\) and \(16, 15, 3\); [^\n]+$"):
            metric(a, a[:, 1:])
        with pytest.raises(ValueError, match="shapes"):
            metric(a, a[..., 0])  # would broadcast if it were let through
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 16 x 10"):
        ssim(a[:10], a[:10])


@pytest.mark.parametrize("kind", ["int64", "int32", "uint16", "int8"])
def test_integers_that_are_no_bytes_are_refused(kind):
    """Taken for floats they would be 255 times too large: -48 dB."""
    a, b = (np.asarray(p) for p in pair())
    for f in (psnr, psnr_y, ssim, texture):
        with pytest.raises(ValueError, match=f"^a picture of {kind}; a metric needs bytes"):
            f(a, b.astype(kind))
    with pytest.raises(ValueError, match=f"^a picture of {kind}"):
        luma(a.astype(kind))
