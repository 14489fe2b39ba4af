"""A picture in, the restored picture out, at its own size.

    pad to the grid  ->  encode  ->  integrate the velocity from sigma = 0 to 1  ->  decode  ->  crop

The grid is two latent positions (16 pixels with the Flux autoencoder): one token. Pictures are padded by reflection, so
nothing is squashed and the border sees a continuation of the picture.

A picture larger than a tile is encoded and decoded tile by tile, and at every step its velocity is the average of the
velocities of overlapping tiles, weighted towards their middles, so that tiles agree before they can become visible:

    v(x) = sum_k w_k(x) v_k(x) / sum_k w_k(x)          w = exp(-(x - middle)^2 / (2 * 0.01 * width^2)) on each axis

(Bar-Tal et al. 2023, "MultiDiffusion"; the weights are those of Jimenez 2023, "Mixture of Diffusers".) So time grows
with the area and not with its square, memory hardly grows, and the model works at the size that it was trained at.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kontext_min.autoencoder import Autoencoder
from kontext_min.flow import Network, Objective, Prompt, integrate, schedule, velocity


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W) float32 in [-1, 1]: x / 127.5 - 1."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None].contiguous()


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) about in [-1, 1] -> RGB picture, clamped and rounded half to even as diffusers does (BFL truncates)."""
    array = ((tensor.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def pad_to_grid(image: Tensor, grid: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, H', W') with sides that are multiples of `grid`, reflected at the right and the bottom."""
    right, bottom = -image.shape[-1] % grid, -image.shape[-2] % grid
    narrow = right >= image.shape[-1] or bottom >= image.shape[-2]  # reflection needs more pixels than it adds
    return F.pad(image, (0, right, 0, bottom), mode="replicate" if narrow else "reflect")


def tiled(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], tile: int, grid: int, scale: float = 1.0) -> Tensor:
    """Apply f to overlapping tiles and blend what comes out; f itself if one tile is enough.

    Args:
        f: tensors of one size -> a tensor `scale` times that size, on the last two axes.
        inputs: (B, C, H, W) each, of one size.
        tile: side of a tile in positions of the inputs; a multiple of `grid`.
        grid: tiles start at multiples of it, so that their results fall on whole positions.
        scale: sides of the result over sides of the inputs.

    Returns:
        (B, C', scale * H, scale * W).
    """
    height, width = inputs[0].shape[-2:]
    if height <= tile and width <= tile:
        return f(*inputs)
    total = weights = None
    for top in _starts(height, tile, grid):
        for left in _starts(width, tile, grid):
            part = f(*(x[..., top : top + tile, left : left + tile] for x in inputs))
            window = _window(part.shape[-2], part.device)[:, None] * _window(part.shape[-1], part.device)
            if total is None:
                size = round(height * scale), round(width * scale)
                total, weights = part.new_zeros(*part.shape[:-2], *size), part.new_zeros(size)
            y, x = round(top * scale), round(left * scale)
            total[..., y : y + part.shape[-2], x : x + part.shape[-1]] += part * window
            weights[y : y + part.shape[-2], x : x + part.shape[-1]] += window
    return total / weights


def _starts(length: int, tile: int, grid: int, overlap: float = 0.25) -> list[int]:
    """Where tiles start along one axis: evenly, the last one flush with the end, overlapping by a quarter or more."""
    room = length - tile
    if room <= 0:
        return [0]
    count = math.ceil(room / (tile * (1 - overlap))) + 1
    return [round(room * k / (count - 1) / grid) * grid for k in range(count - 1)] + [room]


def _window(length: int, device: torch.device) -> Tensor:
    """Weights along one side of a tile: a Gaussian whose deviation is a tenth of the side."""
    x = (torch.arange(length, device=device) + 0.5) / length - 0.5
    return torch.exp(-x.square() / (2 * 0.01))


@torch.no_grad()
def restore(
    image: Tensor,
    flux: Network,
    autoencoder: Autoencoder,
    prompt: Prompt,
    objective: Objective,
    steps: int,
    solver: str = "euler",
    noise: Tensor | None = None,
    seed: int = 42,
    tile: int = 1024,
) -> Tensor:
    """Carry degraded pictures to clean ones.

    Args:
        image: (B, 3, H, W) in [-1, 1], on the device of the networks; any size.
        flux: the transformer, with the LoRA on it.
        autoencoder: in float32.
        prompt: text and guidance, B rows.
        objective: what the LoRA was trained for.
        steps: of the solver; network evaluations are as many, twice as many for midpoint and heun.
        solver: euler, midpoint or heun.
        noise: (B, C, h, w) eps of the source; else drawn on the CPU from the seed.
        seed: of the noise, used only where the source has any.
        tile: side in pixels above which the picture is worked on in tiles: best the side that was trained.

    Returns:
        (B, 3, H, W) float32, not clamped.
    """
    height, width = image.shape[-2:]
    factor, grid = autoencoder.factor, 2 * autoencoder.factor
    tile = max(tile // grid, 1) * grid
    image = pad_to_grid(image.float(), grid)
    control = tiled(autoencoder.encode, (image,), tile, grid, 1 / factor)  # (B, C, h, w)
    if noise is None:
        noise = torch.randn(control.shape, generator=torch.Generator().manual_seed(seed))
    source = objective.source(control, noise.to(control))

    def v(x: Tensor, sigma: Tensor) -> Tensor:
        return tiled(lambda x, c: velocity(flux, x, sigma, c, prompt, objective), (x, control), tile // factor, 2)

    tokens = min(control.shape[-2], tile // factor) * min(control.shape[-1], tile // factor) // 4
    sigmas = schedule(steps, tokens, shift=objective.name == "kontext")  # bridges: equal steps
    z = integrate(v, source, sigmas, solver)
    return tiled(autoencoder.decode, (z,), tile // factor, 2, factor)[..., :height, :width]
