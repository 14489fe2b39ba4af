"""Apply each network to a large picture in overlapping tiles, and blend the results.

    f(x) = sum_k w_k f(x_k) / sum_k w_k        w = exp(-(x - middle)^2 / (2 * 0.01 * width^2)) on each axis

The velocities are blended at every step, so tiles agree before a difference becomes visible (Bar-Tal et al. 2023,
"MultiDiffusion"; the weights are those of Jimenez 2023, "Mixture of Diffusers"). Time grows with the area instead of
its square, and the network works at the size it was trained at. Memory holds the picture as bytes, a few copies of its
latent and one row of tiles.

    apply = Tiles(tile, autoencoder)
    z = restore_latent(..., apply=apply)
    picture = decode(autoencoder, z, size, apply)
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kontext_min.autoencoder import Autoencoder
from kontext_min.flow import evaluations
from kontext_min.restore import GRID

SMALLEST_TILE = 4  # tokens a side: below it, most of a tile is overlap and none of it context


class Tiles:
    """Applies a network to tiles, in the way of restore.Whole.

    Args:
        tile: side in pixels; best is the side that was trained.
        autoencoder: its factor tells latent positions from pixels.
        report: called after each pass of a tile through a network.

    Raises:
        ValueError: the tile is too small.
    """

    def __init__(self, tile: int, autoencoder: Autoencoder, report: Callable[[], None] = lambda: None) -> None:
        self.side, self.factor, self.report = tile_side(tile, autoencoder), autoencoder.factor, report

    def __call__(
        self, f: Callable[..., Tensor], inputs: Sequence[Tensor], scale: float = 1.0,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:  # fmt: skip
        """(B, C, H, W) each -> finish(f(...)), (B, C', scale * H, scale * W)."""
        unit = self.factor if scale < 1 else 1  # the encoder reads pixels, the others latent positions
        return tiled(f, inputs, self.side * unit, GRID * unit, scale, finish, self.report)

    def passes(self, width: int, height: int, steps: int, solver: str) -> int:
        """How often `report` is called for a picture: each tile is encoded, evaluated and decoded."""
        sides = (math.ceil(length / (GRID * self.factor)) * GRID for length in (width, height))  # of the latent
        return math.prod(len(starts(side, self.side, GRID)) for side in sides) * (evaluations(steps, solver) + 2)


def tile_side(tile: int, autoencoder: Autoencoder) -> int:
    """The side of a tile, pixels -> latent positions, rounded down to whole tokens.

    Raises:
        ValueError: less than SMALLEST_TILE tokens.
    """
    token = GRID * autoencoder.factor  # in pixels
    if tile < SMALLEST_TILE * token:
        raise ValueError(f"tile: got {tile}, expected at least {SMALLEST_TILE * token} pixels, {SMALLEST_TILE} tokens.")
    return tile // token * GRID


def starts(length: int, tile: int, grid: int, overlap: float = 0.25) -> list[int]:
    """Where tiles start along one axis: evenly, the last one flush with the end, overlapping by a quarter or more."""
    room = length - tile
    if room <= 0:
        return [0]
    count = math.ceil(room / (tile * (1 - overlap))) + 1
    return [round(room * k / (count - 1) / grid) * grid for k in range(count - 1)] + [room]


def tiled(
    f: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tile: int,
    grid: int,
    scale: float = 1.0,
    finish: Callable[[Tensor], Tensor] = lambda x: x,
    report: Callable[[], None] = lambda: None,
    axis: int = -2,
) -> Tensor:
    """Apply f to overlapping tiles and blend the results: (B, C, H, W) each -> (B, C', scale * H, scale * W).

    f maps tensors of one size to a tensor whose sides are `scale` times theirs; `report` follows each call. A tile has
    `tile` positions of the inputs on a side, a multiple of `grid`, and starts at multiples of `grid`. Rows that are
    complete go through `finish`, which may turn them into bytes to save memory. Axis -2 cuts rows, then -1 cuts each.
    """

    def along_row(*row: Tensor) -> Tensor:
        if axis == -2:
            return tiled(f, row, tile, grid, scale, report=report, axis=-1)
        result = f(*row)
        report()
        return result

    length = inputs[0].shape[axis]
    if length <= tile:
        return finish(along_row(*inputs))
    begins, side = starts(length, tile, grid), round(tile * scale)
    places = [round(begin * scale) for begin in [*begins, length]]  # in the result
    # A Gaussian, whose deviation is a tenth of the side; divided by the sum of those that overlap.
    window = torch.exp(-((torch.arange(side) + 0.5) / side - 0.5).square() / (2 * 0.01))
    total = torch.zeros(places[-1])
    for place in places[:-1]:
        total[place : place + side] += window
    # Overlap and add: what a tile shares with the next one waits in `rest`, all before that is complete.
    done, rest = [], None
    for begin, (place, following) in zip(begins, pairwise(places), strict=True):
        part = along_row(*(x.narrow(axis, begin, tile) for x in inputs))
        weight = window / total[place : place + side]
        part = part * (weight if axis == -1 else weight[:, None]).to(part)
        if rest is not None:
            part.narrow(axis, 0, rest.shape[axis]).add_(rest)
        complete, rest = part.tensor_split([following - place], dim=axis)
        done.append(finish(complete))
    return torch.cat(done, dim=axis)
