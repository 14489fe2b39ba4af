"""What validation measures, with networks that change nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kontext_min.data import to_float, to_tensor
from kontext_min.extras import metrics
from kontext_min.extras.validation import SIGMAS, describe, validate
from kontext_min.flow import Objective, Prompt

PHOTO = Path(__file__).parent / "photos" / "bowl.jpg"
PIXELS = SimpleNamespace(factor=1, encode=lambda x: x, decode=lambda z: z)
PROMPT = Prompt(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1))


def pair(dx):
    """The same scene, seen dx pixels further to the right, and where it is: pictures and tensors."""
    photo = Image.open(PHOTO).convert("RGB")
    pictures = [photo.crop((300 - x, 300, 396 - x, 380)) for x in (dx, 0)]
    return pictures, tuple(to_float(to_tensor(picture))[None] for picture in pictures)


def test_scores_and_the_largest_shift_of_restored_pictures():
    pairs = [pair(dx) for dx in (0, -6, 3)]
    nothing = lambda img, *_: img * 0  # noqa: E731
    row, sheet = validate(nothing, PIXELS, [tensors for _, tensors in pairs], PROMPT, Objective(), seed=0, steps=1)
    assert row["shift"] == 6
    expected = [metrics.ssim(*pictures) for pictures, _ in pairs]
    assert row["ssim"] == row["ssim_degraded"] == pytest.approx(sum(expected) / 3)
    assert len(row["loss_at"]) == len(SIGMAS) and len(row["pictures"]) == 3
    assert sheet.size == (3 * 96 + 8, 3 * 80 + 8)
    row, _ = validate(nothing, PIXELS, [pairs[0][1]], PROMPT, Objective(), seed=0, steps=1)
    assert row["shift"] == 0 and row["psnr"] == float("inf")


def test_a_restored_picture_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="the result is not finite"):
        validate(lambda img, *_: img * torch.nan, PIXELS, [pair(0)[1]], PROMPT, Objective(), seed=0, steps=1)


def test_a_picture_worse_than_its_input_is_said():
    row = {"psnr_degraded": 20.0, "psnr": 19.99, "ssim": 0.5, "loss": 0.02, "loss_unchanged": 0.03}
    scores = "PSNR 20.00 -> 19.99 dB, SSIM 0.500, loss 0.020 (no change: 0.030)"
    assert describe(row) == f"{scores}, worse than its input"
    assert "worse" not in describe(row | {"psnr": 20.0})
    assert "worse" not in describe(row | {"psnr": 19.999})  # both are printed as 20.00
