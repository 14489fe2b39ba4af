"""A picture in, the restored picture out, at its own size.

    pad to the grid  ->  encode  ->  follow the velocity from sigma = 0 to 1  ->  decode  ->  crop

The grid is two latent positions (16 pixels with the Flux autoencoder): one token. Pictures are padded by reflection, so
nothing is squashed and the border sees a continuation of the picture.

A picture larger than a tile is encoded and decoded tile by tile, and at every step its velocity is the average of the
velocities of overlapping tiles, weighted towards their middles, so that tiles agree before they can become visible:

    v(x) = sum_k w_k(x) v_k(x) / sum_k w_k(x)          w = exp(-(x - middle)^2 / (2 * 0.01 * width^2)) on each axis

(Bar-Tal et al. 2023, "MultiDiffusion"; the weights are those of Jimenez 2023, "Mixture of Diffusers".) So time grows
with the area and not with its square, and the model works at the size that it was trained at. Beside a tile, what is in
memory is the picture as bytes, the latent (a few times) and one row of tiles.

Two dials between what is there and what the model makes of it, besides the number of steps:

    strength S   x = (1 - s0) z_source + s0 z_control at s0 = 1 - S, and only the rest of the path is followed
                 (Meng et al. 2022, "SDEdit", on our path; times are S times those of the whole schedule)
    fidelity W   the clean latent that each velocity points at is drawn towards the degraded one:
                 x1 = x + (1 - sigma) v     x1 <- x1 - W (1 - sigma)^4 (x1 - z_control)     v = (x1 - x) / (1 - sigma)
                 (Yu et al. 2024, "SUPIR": restoration-guided sampling; W = 1 is theirs with tau = 4)
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kontext_min import data
from kontext_min.autoencoder import Autoencoder
from kontext_min.data import Size, to_float
from kontext_min.flow import SOLVERS, Network, Objective, Prompt, integrate, schedule, velocity

STEPS = {"bridge": 4, "kontext": 28}  # network evaluations unless the user says otherwise; more is more texture


def to_tensor(image: Image.Image) -> Tensor:
    """A picture -> (1, 3, H, W) float32 in [-1, 1]: x / 127.5 - 1."""
    return to_float(data.to_tensor(image.convert("RGB")))[None].contiguous()


def to_bytes(tensor: Tensor) -> Tensor:
    """About [-1, 1] -> bytes, clamped and rounded half to even as diffusers does (BFL truncates)."""
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


def tiled(
    f: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    tile: int,
    grid: int,
    scale: float = 1.0,
    finish: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Apply f to overlapping tiles and blend what comes out; f itself if one tile is enough.

    Args:
        f: tensors of one size -> a tensor `scale` times that size, on the last two axes.
        inputs: (B, C, H, W) each, of one size.
        tile: side of a tile in positions of the inputs; a multiple of `grid`.
        grid: tiles start at multiples of it, so that their results fall on whole positions.
        scale: sides of the result over sides of the inputs.
        finish: is given whole rows once all their tiles are blended, so that bytes may be all that is kept of them.

    Returns:
        (B, C', scale * H, scale * W).
    """
    height, width = inputs[0].shape[-2:]
    if height <= tile and width <= tile:
        return finish(f(*inputs))
    tops, lefts = _starts(height, tile, grid), _starts(width, tile, grid)
    rows, columns = ([round(start * scale) for start in starts] for starts in (tops, lefts))  # of the result
    down, across = (
        _windows(round(length * scale), starts, round(min(tile, length) * scale))
        for length, starts in ((height, rows), (width, columns))
    )
    band = result = None  # band: the rows from the top of this row of tiles, not all of them complete
    for k, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = f(*(x[..., top : top + tile, left : left + tile] for x in inputs))
            if band is None:
                band = part.new_zeros(*part.shape[:-1], round(width * scale))
            window = (down[k][:, None] * across[j]).to(part)
            band[..., columns[j] : columns[j] + part.shape[-1]] += part * window
        ready = (rows[k + 1] if k + 1 < len(rows) else round(height * scale)) - rows[k]
        done = finish(band[..., :ready, :])
        if result is None:
            result = done.new_empty(*done.shape[:-2], round(height * scale), done.shape[-1])
        result[..., rows[k] : rows[k] + ready, :] = done
        band = F.pad(band[..., ready:, :], (0, 0, 0, ready))
    return result


def _starts(length: int, tile: int, grid: int, overlap: float = 0.25) -> list[int]:
    """Where tiles start along one axis: evenly, the last one flush with the end, overlapping by a quarter or more."""
    room = length - tile
    if room <= 0:
        return [0]
    count = math.ceil(room / (tile * (1 - overlap))) + 1
    return [round(room * k / (count - 1) / grid) * grid for k in range(count - 1)] + [room]


def _windows(length: int, starts: list[int], tile: int) -> list[Tensor]:
    """w_k / sum_k w_k of each tile along one axis.

    Tiles are all pairs of a row and a column, so the sum over tiles is the product of the sums over both axes. The
    deviation of the Gaussian is a tenth of the side.
    """
    x = (torch.arange(tile) + 0.5) / tile - 0.5
    window = torch.exp(-x.square() / (2 * 0.01))
    total = torch.zeros(length)
    for start in starts:
        total[start : start + tile] += window
    return [window / total[start : start + tile] for start in starts]


def passes(width: int, height: int, autoencoder: Autoencoder, tile: int, steps: int, solver: str) -> int:
    """How often `restore` will call its `report`: each tile is encoded, goes through the network, and is decoded."""
    grid = 2 * autoencoder.factor
    tile = max(tile // grid, 1) * grid
    tiles = math.prod(len(_starts(math.ceil(side / grid) * grid, tile, grid)) for side in (width, height))
    return tiles * (math.ceil(steps / SOLVERS[solver]) * SOLVERS[solver] + 2)


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
        report: is called after every pass of a tile, `passes` times in all.

    Returns:
        (B, 3, H, W) on the device of the image: bytes for bytes; for floats float32, not clamped.
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
    x = control
    if objective.name == "kontext" or objective.source_noise:
        if noise is None:
            g = torch.Generator().manual_seed(seed)
            noise = torch.randn(control.shape[1:], generator=g).expand(control.shape)
        x = objective.source(control, noise.to(control))
    if strength < 1:
        x = strength * x + (1 - strength) * control

    def v(x: Tensor, sigma: Tensor) -> Tensor:
        return tiled(lambda x, c: evaluate(x, c, sigma), (x, control), tile // factor, 2)

    tokens = min(control.shape[-2], tile // factor) * min(control.shape[-1], tile // factor) // 4
    solver_steps = math.ceil(steps / SOLVERS.get(solver, 1))  # a solver that is none is named by integrate
    sigmas = schedule(solver_steps, tokens, shift=objective.name == "kontext")  # bridges: equal steps
    x = integrate(v, x, 1 - strength * (1 - sigmas), solver)
    finish = (lambda x: to_bytes(x).to(home)) if is_bytes else (lambda x: x.float().to(home))
    return tiled(decode, (x,), tile // factor, 2, factor, finish)[..., :height, :width]
