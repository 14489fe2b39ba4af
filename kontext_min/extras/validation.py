"""Validate the model, every time with the same pictures, degradations, noise and points on the path.

loss at sigma 0.1 ... 0.9      error of the velocity, comparable between runs of one --seed
loss of no change              the same for a network that predicts the velocity 0: what a flat curve is compared with
PSNR, SSIM                     of the restored picture, beside those of the degraded one
shift                          of the restored picture against the clean one, in pixels: 0 unless the model reframes
grid                           degraded | restored | clean, one picture per row
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow
from kontext_min.autoencoder import Autoencoder
from kontext_min.extras.metrics import psnr, shift, ssim
from kontext_min.flow import Network, Objective, Prompt
from kontext_min.restore import restore, to_image

GAP = 4  # pixels between the pictures of a sheet

SIGMAS = tuple(i / 10 for i in range(1, 10))


@torch.no_grad()
def validate(
    flux: Network,
    autoencoder: Autoencoder,
    pairs: Sequence[tuple[Tensor, Tensor]],
    prompt: Prompt,
    objective: Objective,
    seed: int,
    report: Callable[[str], None] = lambda text: None,
    steps: int = 4,
) -> tuple[dict[str, Any], Image.Image]:
    """Measure a model on some pairs of pictures.

    Args:
        flux: the transformer.
        autoencoder: in float32.
        pairs: (control, target), (1, 3, H, W) in [-1, 1] on the device each.
        prompt: one row.
        objective: what is trained.
        seed: of the noise; the same every time.
        report: called with the picture that is next, in words.
        steps: network evaluations of the restoration, by Euler's rule.

    Returns:
        The row for metrics.jsonl and the grid. The row holds means over the pairs; `loss_at` one loss for each of
        SIGMAS; `shift` the largest of all pictures and both axes; `seconds` what all of it took.

    Raises:
        ValueError: a restored picture is not finite.
    """
    losses, unchanged, scores, shifts, rows, began = [], [], [], [], [], time.monotonic()
    for i, (control, target) in enumerate(pairs):
        report(f"validating, picture {i + 1} of {len(pairs)}")
        z_control, z_target = autoencoder.encode(control), autoencoder.encode(target)
        eps, _ = flow.draw(seed, 0, [i], z_target.shape[1:], len(pairs))
        eps = eps.to(z_target)
        sigmas = [torch.tensor([s]) for s in SIGMAS]
        losses.append([flow.loss(flux, z_control, z_target, eps, s, prompt, objective).item() for s in sigmas])
        # The same at every sigma.
        unchanged.append(flow.loss(_zero, z_control, z_target, eps, sigmas[0], prompt, objective).item())
        restored = restore(control, flux, autoencoder, prompt, objective, steps, noise=eps)
        row = [to_image(x[0]) for x in (control, restored, target)]
        shifts += map(abs, shift(row[1], row[2]))
        scores.append([f(image, row[2]) for image in row[:2] for f in (psnr, ssim)])
        rows.append(row)
    names = ("psnr_degraded", "ssim_degraded", "psnr", "ssim")
    result: dict[str, Any] = {n: statistics.fmean(s[k] for s in scores) for k, n in enumerate(names)}
    result["shift"] = max(shifts)
    result["loss_at"] = [statistics.fmean(loss[k] for loss in losses) for k in range(len(SIGMAS))]
    result["loss"], result["loss_unchanged"] = statistics.fmean(result["loss_at"]), statistics.fmean(unchanged)
    result["pictures"] = [  # the report cuts the grid by these sizes
        {"width": row[0].width, "height": row[0].height, "psnr_degraded": score[0], "psnr": score[2]}
        for row, score in zip(rows, scores, strict=True)
    ]
    result["seconds"] = time.monotonic() - began
    return result, grid(rows)


def _zero(img: Tensor, *_: Tensor) -> Tensor:
    """The network that predicts no change."""
    return torch.zeros_like(img)


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures side by side and rows below each other, on white."""
    width = max(sum(p.width + GAP for p in row) - GAP for row in rows)
    sheet = Image.new("RGB", (width, sum(row[0].height + GAP for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width + GAP
        top += row[0].height + GAP
    return sheet


@contextmanager
def averaged(params: Sequence[Tensor], ema: Sequence[Tensor]) -> Iterator[None]:
    """The average of the weights in place of the weights, any shape; nothing happens without an average."""
    params = params[: len(ema)]
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, average in zip(params, ema, strict=True):
            p.copy_(average)
        yield
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)


def describe(row: dict[str, Any]) -> str:
    """A row of `validate` in one line, with what you should not overlook."""
    line = f"PSNR {row['psnr_degraded']:.2f} -> {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}, loss {row['loss']:.3f}"
    line += f" (no change: {row['loss_unchanged']:.3f})"
    if round(row["psnr"], 2) < round(row["psnr_degraded"], 2):  # as printed
        line += ", worse than its input"
    return line + (f", shifted by {row['shift']} pixels" if row.get("shift") else "")
