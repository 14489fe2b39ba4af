"""Both colour fixes against their definitions, written out in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

from kontext_min.extras import pictures
from kontext_min.extras.pictures import COLOUR_FIXES, adain, wavelet

PHOTO = Path(__file__).parent / "photos" / "bowl.jpg"


@pytest.fixture(scope="module")
def pair():
    """A restored picture that is sharp and of a wrong colour, and the degraded one."""
    photo = Image.open(PHOTO).convert("RGB").crop((300, 300, 431, 397))  # odd and unequal sides
    wrong = ImageEnhance.Color(photo).enhance(1.6).point([min(v + 20, 255) for v in range(256)] * 3)
    return wrong, photo.filter(ImageFilter.GaussianBlur(2))


def decompose(x):
    """StableSR's wavelet_decomposition of (1, 3, H, W): high and low, level by level."""
    binomial = torch.tensor([[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125], [0.0625, 0.125, 0.0625]])
    high = torch.zeros_like(x)
    for i in range(5):
        padded = F.pad(x, (2**i,) * 4, mode="replicate")
        low = F.conv2d(padded, binomial[None, None].repeat(3, 1, 1, 1), groups=3, dilation=2**i)
        high, x = high + x - low, low
    return high, x


def floats(picture):
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]


def as_bytes(x):
    return x[0].permute(1, 2, 0).clamp(0, 255).round().numpy().astype(int)


@pytest.mark.parametrize("band", [256, 16, 40])
def test_wavelet_is_high_of_the_one_and_low_of_the_other(pair, monkeypatch, band):
    """To one level where rounding is a near tie; the same however the picture is cut into bands."""
    monkeypatch.setattr(pictures, "BAND", band)
    restored, degraded = pair
    expected = as_bytes(decompose(floats(restored))[0] + decompose(floats(degraded))[1])
    got = np.asarray(wavelet(restored, degraded)).astype(int)
    assert np.abs(got - expected).max() <= 1
    assert (got != expected).mean() < 1e-3
    assert np.abs(got - np.asarray(restored).astype(int)).mean() > 5  # it did something


def test_adain_takes_mean_and_deviation(pair):
    restored, degraded = pair
    x, y = (floats(p)[0].double() for p in pair)
    moments = [(z.mean(dim=(1, 2), keepdim=True), z.std(dim=(1, 2), keepdim=True, correction=0)) for z in (x, y)]
    expected = as_bytes(((x - moments[0][0]) / moments[0][1] * moments[1][1] + moments[1][0])[None])
    assert np.abs(np.asarray(adain(restored, degraded)).astype(int) - expected).max() <= 1
    assert np.abs(np.asarray(adain(restored, degraded)).astype(int) - expected).mean() < 0.01


@pytest.mark.parametrize("name", ["wavelet", "adain"])
def test_colours_come_nearer_and_detail_stays(pair, name):
    restored, degraded = pair
    fixed = COLOUR_FIXES[name](restored, degraded)
    means = [floats(p).mean(dim=(0, 2, 3)) for p in (restored, fixed, degraded)]
    assert (means[1] - means[2]).abs().max() < 0.5 < (means[0] - means[2]).abs().max()
    edges = [floats(p).diff(dim=-1).square().mean() for p in (fixed, degraded)]
    assert edges[0] > 2 * edges[1]
    assert COLOUR_FIXES["none"](restored, degraded) is restored


def test_flat_and_tiny_pictures():
    grey, red = Image.new("RGB", (1, 1), "grey"), Image.new("RGB", (1, 1), "red")
    for fix in (wavelet, adain):
        assert fix(grey, red).getpixel((0, 0)) == (255, 0, 0)
