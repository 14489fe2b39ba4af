"""Restore a picture at its own size.

    pad to the grid  ->  encode  ->  follow the velocity from sigma = 0 to 1  ->  decode  ->  crop

The grid is one token: two latent positions, 16 pixels with the Flux autoencoder. Here every network sees the whole
picture; extras/tiles.py applies the networks to overlapping tiles of a large one.

A strength S < 1 starts at s0 = 1 - S with x = (1 - s0) z_source + s0 z_control and follows the path from s0 to 1
(Meng et al. 2022, "SDEdit", on this path). Flux's times are then S times those of the whole path.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow
from kontext_min.autoencoder import Autoencoder
from kontext_min.data import Size, to_float
from kontext_min.flow import Network, Objective, Prompt

STEPS = {"bridge": 4, "kontext": 28}  # default network evaluations; more of them give more texture
SEED = 42
GRID = 2  # latent positions on one side of a token


class Whole:
    """Applies a network f to whole pictures. Another object may apply it tile by tile (extras/tiles.py)."""

    side = math.inf  # latent positions on a side that a network sees at once, at most

    def __call__(
        self, f: Callable[..., Tensor], inputs: Sequence[Tensor], scale: float = 1.0,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:  # fmt: skip
        """(B, C, H, W) each -> finish(f(...)), (B, C', scale * H, scale * W)."""
        return finish(f(*inputs))


WHOLE = Whole()


def to_bytes(tensor: Tensor) -> Tensor:
    """About [-1, 1] -> bytes in the same shape, clamped and rounded half to even as diffusers does (BFL truncates)."""
    return tensor.float().div(2).add_(0.5).clamp_(0, 1).mul_(255).round_().byte()


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W), bytes or about in [-1, 1] -> RGB picture."""
    array = tensor if tensor.dtype == torch.uint8 else to_bytes(tensor)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def pad_to_grid(image: Tensor, grid: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, H', W') on the CPU, padded to multiples of `grid` by reflection, right and bottom."""
    missing = [(0, -side % grid) for side in image.shape[-2:]]
    # numpy, because torch can reflect neither bytes nor a short side more than once.
    return torch.from_numpy(np.pad(image.cpu().numpy(), [(0, 0), (0, 0), *missing], mode="reflect"))


# ---- restoring -------------------------------------------------------------------------------------------------------


def _finite(x: Tensor) -> Tensor:
    """x itself, or an error: a NaN would become a black picture."""
    if x.isfinite().all():
        return x
    raise ValueError("the result is not finite (NaN or infinity): a LoRA is too strong, or it or the base is damaged.")


@torch.no_grad()
def restore_latent(
    image: Tensor,
    flux: Network,
    autoencoder: Autoencoder,
    prompt: Prompt,
    objective: Objective,
    steps: int,
    solver: str = "euler",
    noise: Tensor | None = None,
    seed: int = SEED,
    strength: float = 1.0,
    pull: Callable[..., Tensor] | None = None,
    apply: Whole = WHOLE,
) -> Tensor:
    """Carry degraded pictures (B, 3, H, W), bytes or floats in [-1, 1], to clean latents for `decode`.

    Args:
        flux, autoencoder: the transformer with the LoRA on it, and the autoencoder in float32.
        prompt, objective: those that the LoRA was trained for; the prompt has B rows, on the device of the networks.
        steps, solver: network evaluations. Midpoint and heun take two per step; an odd number is rounded up.
        noise: (B, C, h, w) eps of the source, or None to draw it from the seed, the same for each picture of the batch.
        strength: in (0, 1], how much of the path is followed.
        pull: maps (control, x, sigma, v) of each step to the velocity that is followed (extras/fidelity.py).
        apply: applies the networks, to whole pictures or to tiles.

    Returns:
        (B, C, h, w) on the device of the prompt; the same alone and in a batch, up to rounding.

    Raises:
        ValueError: strength, steps or solver is outside its range, or the result is not finite.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, expected more than 0 and at most 1.")

    def encode(x: Tensor) -> Tensor:
        x = x.to(prompt.txt.device)
        return autoencoder.encode(to_float(x) if x.dtype == torch.uint8 else x.float())

    control = apply(encode, [pad_to_grid(image, GRID * autoencoder.factor)], 1 / autoencoder.factor)  # (B, C, h, w)
    if noise is None:
        # Drawn on the CPU and without the batch, as the official code does: the same on every device.
        noise = torch.randn(control.shape[1:], generator=torch.Generator().manual_seed(seed)).expand(control.shape)
    x = strength * objective.source(control, noise.to(control)) + (1 - strength) * control

    def evaluate(x: Tensor, sigma: Tensor) -> Tensor:
        return apply(lambda x, c: flow.velocity(flux, x, sigma, c, prompt, objective), [x, control])

    # Kontext's schedule depends on the number of tokens that the network sees at once. Bridges take equal steps.
    tokens = math.prod(min(length, apply.side) // GRID for length in control.shape[-2:])
    sigmas = flow.schedule(math.ceil(steps / flow.SOLVERS.get(solver, 1)), tokens, shift=objective.name == "kontext")
    return _finite(flow.integrate(evaluate, x, 1 - strength * (1 - sigmas), solver, pull and partial(pull, control)))


@torch.no_grad()
def decode(autoencoder: Autoencoder, z: Tensor, size: Size, apply: Whole = WHOLE) -> Tensor:
    """Latents (B, C, h, w) -> pictures (B, 3, H, W), bytes on the CPU, cropped to size = (width, height) in pixels.

    Raises:
        ValueError: the result is not finite.
    """
    finish = lambda rows: to_bytes(rows).cpu()  # noqa: E731, once rows are complete, only bytes are kept
    x = apply(lambda z: _finite(autoencoder.decode(z)), [z], autoencoder.factor, finish)
    return x[..., : size[1], : size[0]]


def restore(
    image: Tensor,
    flux: Network,
    autoencoder: Autoencoder,
    prompt: Prompt,
    objective: Objective,
    steps: int,
    solver: str = "euler",
    noise: Tensor | None = None,
    seed: int = SEED,
    apply: Whole = WHOLE,
) -> Tensor:
    """restore_latent, then decode: pictures (B, 3, H, W), bytes or floats in [-1, 1] -> restored bytes on the CPU."""
    z = restore_latent(image, flux, autoencoder, prompt, objective, steps, solver, noise, seed, apply=apply)
    return decode(autoencoder, z, (image.shape[-1], image.shape[-2]), apply)
