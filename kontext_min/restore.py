"""A picture in, the restored picture out, at its own size.

    pad to the grid  ->  encode  ->  follow the velocity from sigma = 0 to 1  ->  decode  ->  crop

The grid is two latent positions (16 pixels with the Flux autoencoder): one token. Pictures are padded by reflection, so
nothing is squashed and the border sees a continuation of the picture.

A picture larger than a tile is encoded, carried and decoded in overlapping tiles (tiles.py). At every step its velocity
is the average of those of its tiles (Bar-Tal et al. 2023, "MultiDiffusion"), so that tiles agree before they can become
visible.

Two dials between what is there and what the model makes of it, besides the number of steps:

    strength S   x = (1 - s0) z_source + s0 z_control at s0 = 1 - S, and only the rest of the path is followed
                 (Meng et al. 2022, "SDEdit", on our path; times are S times those of the whole schedule)
    fidelity W   the clean latent that each velocity points at is drawn towards the degraded one:
                 x1 = x + (1 - sigma) v     x1 <- x1 - W (1 - sigma)^4 (x1 - z_control)     v = (x1 - x) / (1 - sigma)
                 (Yu et al. 2024, "SUPIR": restoration-guided sampling; W = 1 is theirs with tau = 4)
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor

from kontext_min import data
from kontext_min.autoencoder import Autoencoder
from kontext_min.data import Size, to_float
from kontext_min.flow import SOLVERS, Network, Objective, Prompt, evaluations, integrate, schedule, velocity
from kontext_min.tiles import norm_passes, shared_norms, starts, tiled

STEPS = {"bridge": 4, "kontext": 28}  # network evaluations unless the user says otherwise; more is more texture


def to_tensor(image: Image.Image) -> Tensor:
    """A picture -> (1, 3, H, W) float32 in [-1, 1]: x / 127.5 - 1."""
    return to_float(data.to_tensor(image.convert("RGB")))[None].contiguous()


def to_bytes(tensor: Tensor) -> Tensor:
    """About [-1, 1] -> bytes in the same shape, clamped and rounded half to even as diffusers does (BFL truncates)."""
    return tensor.float().div(2).add_(0.5).clamp_(0, 1).mul_(255).round_().byte()


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W), bytes or about in [-1, 1] -> RGB picture."""
    array = tensor if tensor.dtype == torch.uint8 else to_bytes(tensor)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def pad_to_grid(image: Tensor, grid: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, H', W') with sides that are multiples of `grid`, reflected at the right and the bottom.

    Where a side is shorter than what it lacks, the reflection is reflected again.
    """
    for axis in (-2, -1):
        n = image.shape[axis]
        if n % grid:
            period = max(2 * n - 2, 1)  # 0 1 2 3 2 1 | 0 1 ...
            places = torch.arange(n + -n % grid, device=image.device) % period
            image = image.index_select(axis, torch.where(places < n, places, period - places))
    return image


def working_size(width: int, height: int, resolution: int | None, max_side: int | None) -> Size:
    """The size to restore at: the area of resolution^2, then no side longer than max_side; the shape is kept."""
    scale = resolution / math.sqrt(width * height) if resolution else 1.0
    if max_side:
        scale = min(scale, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def passes(
    width: int, height: int, autoencoder: Autoencoder, tile: int, steps: int, solver: str, share_norms: bool = True
) -> int:
    """How often `restore` will call its `report`: each tile is encoded, goes through the network, and is decoded.

    Of several tiles, the decoder's norms are asked before that (`shared_norms`).
    """
    grid = 2 * autoencoder.factor
    tile = 2 * max(tile // grid, 1)
    size = [2 * math.ceil(side / grid) for side in (width, height)]  # of the latent
    tiles = math.prod(len(starts(side, tile, 2)) for side in size)
    return tiles * (evaluations(steps, solver) + 2) + (norm_passes(autoencoder, size, tile, 2) if share_norms else 0)


def _start(control: Tensor, objective: Objective, noise: Tensor | None, seed: int, strength: float) -> Tensor:
    """x at sigma = 1 - strength, shape of the control latents (B, C, h, w)."""
    x = control
    if objective.name == "kontext" or objective.source_noise:
        if noise is None:
            g = torch.Generator().manual_seed(seed)
            noise = torch.randn(control.shape[1:], generator=g).expand(control.shape)
        x = objective.source(control, noise.to(control))
    return x if strength == 1 else strength * x + (1 - strength) * control


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
    strength: float = 1.0,
    fidelity: float = 0.0,
    share_norms: bool = True,
    report: Callable[[], None] = lambda: None,
) -> Tensor:
    """Carry degraded pictures to clean ones.

    Args:
        image: (B, 3, H, W), bytes or floats in [-1, 1], on any device; any size.
        flux: the transformer, with the LoRA on it.
        autoencoder: in float32.
        prompt: text and guidance, B rows, on the device of the networks.
        objective: what the LoRA was trained for.
        steps: network evaluations, whatever the solver: midpoint and heun take half as many steps of two evaluations
            each, an odd number rounded up.
        solver: euler, midpoint or heun.
        noise: (B, C, h, w) eps of the source; else drawn on the CPU from the seed, the same for each picture, so that
            a picture comes out the same alone and in a batch.
        seed: of the noise, used only where the source has any.
        tile: side in pixels above which the picture is worked on in tiles: best the side that was trained.
        strength: in (0, 1], how much of the path is followed.
        fidelity: in [0, 1], how much the result is drawn to the input.
        share_norms: decode tiles as parts of one picture and not each as a picture of its own (tiles.py).
        report: is called after every pass of a tile, `passes` times in all.

    Returns:
        (B, 3, H, W) on the device of the image: bytes for bytes; for floats float32, not clamped.

    Raises:
        ValueError: strength or fidelity outside its range, steps below one, or another solver.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, expected more than 0 and at most 1.")
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity: got {fidelity}, expected a number from 0 to 1.")
    height, width = image.shape[-2:]
    device, home, is_bytes = prompt.txt.device, image.device, image.dtype == torch.uint8
    factor, grid = autoencoder.factor, 2 * autoencoder.factor
    tile = max(tile // grid, 1) * grid

    def encode(x: Tensor) -> Tensor:
        z = autoencoder.encode(to_float(x.to(device)) if is_bytes else x.to(device).float())
        report()
        return z

    def decode(z: Tensor) -> Tensor:
        x = autoencoder.decode(z)
        report()
        return x

    def evaluate(x: Tensor, control: Tensor, sigma: Tensor) -> Tensor:
        v = velocity(flux, x, sigma, control, prompt, objective)
        report()
        if fidelity:
            v = v - fidelity * (1 - sigma.item()) ** 3 * (x + (1 - sigma.item()) * v - control)
        return v

    control = tiled(encode, (pad_to_grid(image, grid),), tile, grid, 1 / factor)  # (B, C, h, w)
    x = _start(control, objective, noise, seed, strength)

    def evaluate_tiles(x: Tensor, sigma: Tensor) -> Tensor:
        return tiled(lambda x, c: evaluate(x, c, sigma), (x, control), tile // factor, 2)

    tokens = min(control.shape[-2], tile // factor) * min(control.shape[-1], tile // factor) // 4
    solver_steps = math.ceil(steps / SOLVERS.get(solver, 1))  # a solver that is none is named by integrate
    sigmas = schedule(solver_steps, tokens, shift=objective.name == "kontext")  # bridges: equal steps
    x = integrate(evaluate_tiles, x, 1 - strength * (1 - sigmas), solver)
    finish = (lambda x: to_bytes(x).to(home)) if is_bytes else (lambda x: x.float().to(home))
    with shared_norms(autoencoder, x, tile // factor, 2, report) if share_norms else nullcontext():
        return tiled(decode, (x,), tile // factor, 2, factor, finish)[..., :height, :width]
