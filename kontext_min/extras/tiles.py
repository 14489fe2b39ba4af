"""Apply each network to a large picture in overlapping tiles, and blend the results.

    f(x) = sum_k w_k f(x_k) / sum_k w_k        w = exp(-(x - middle)^2 / (2 * 0.01 * width^2)) on each axis

The velocities are blended at every step, so tiles agree before a difference becomes visible (Bar-Tal et al. 2023,
"MultiDiffusion"; the weights are those of Jimenez 2023, "Mixture of Diffusers"). Time grows with the area instead of
its square, and the network works at the size it was trained at. Memory holds the picture as bytes, a few copies of its
latent and one row of tiles.

The transformer's tile is the size it was trained at. The autoencoder has a tile of its own: of all sides whose
activations fit into the free memory, the one that takes the least arithmetic. That is the whole picture, unless the
attention of the smallest level, n^2 for n latent positions, takes more than the overlap of tiles.

    apply = Tiles(tile, autoencoder, room=plan.room(autoencoder.params, device))
    z = restore_latent(..., apply=apply)
    picture = decode(autoencoder, z, size, apply)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kontext_min.autoencoder import Autoencoder
from kontext_min.flow import evaluations
from kontext_min.restore import GRID

DEFAULT_TILE = 64  # tokens a side
SMALLEST_TILE = 4  # tokens a side: below it, most of a tile is overlap and none of it context
CONTEXT = 32  # tokens a side that a tile of the autoencoder has at least, where memory allows it
OVERLAP, OVERLAP_OF_PICTURES = 1 / 4, 1 / 8  # parts of a tile, of the transformer and of the autoencoder, at least
SAMPLE = 1 / 2  # of the arithmetic of the decoder: the most that shared norms spend on one piece
LARGEST_SAMPLE = (2 * CONTEXT * GRID) ** 2  # positions, so that memory does not grow with the picture


@dataclass(frozen=True)
class Room:
    """What a tile of the autoencoder may take, and what it takes: for n latent positions, in one piece,

    n * alive bytes          n * linear + n^2 * quadratic FLOPs
    """

    free: float
    alive: float
    linear: float
    quadratic: float

    def side(self, height: int, width: int) -> int:
        """The side of a tile, in latent positions, for a latent of this size: least arithmetic of those that fit."""
        smallest = SMALLEST_TILE * GRID
        sides = range(smallest, max(height, width, smallest) + GRID, GRID)
        fit = [s for s in sides if min(s, height) * min(s, width) * self.alive <= self.free] or [smallest]
        return min(
            [s for s in fit if s >= CONTEXT * GRID] or fit[-1:], key=lambda s: self.flops(height, width, s, shared=True)
        )

    def flops(self, height: int, width: int, side: int, shared: bool = False) -> float:
        """Of a latent of this size in tiles, and of what shared norms add to it."""
        count, n = tiles(height, width, side, OVERLAP_OF_PICTURES), min(side, height) * min(side, width)
        more = SAMPLE * height * width * self.linear if shared and count > 1 else 0.0
        return count * n * (self.linear + n * self.quadratic) + more

    def sample(self, positions: int) -> float:
        """How many of a latent's positions fit in one piece, and take SAMPLE of the arithmetic of all, or less."""
        work = SAMPLE * self.linear * positions  # = n * linear + n^2 * quadratic, solved for n
        n = 2 * work / (self.linear + math.sqrt(self.linear**2 + 4 * self.quadratic * work))
        return min(n, self.free / self.alive, LARGEST_SAMPLE)


class Tiles:
    """Applies a network to tiles, in the way of restore.Whole.

    Args:
        tile: side in pixels; best is None: the side that was `trained`, or 64 tokens.
        autoencoder: its factor tells latent positions from pixels.
        report: called after each pass of a tile through a network, with what that does.
        room: chooses the tile of the autoencoder; without it, that is the transformer's.

    Raises:
        ValueError: the tile is too small.
    """

    def __init__(
        self,
        tile: int | None,
        autoencoder: Autoencoder,
        report: Callable[[str], None] = lambda part: None,
        room: Room | None = None,
        trained: int | None = None,
    ) -> None:
        self.side, self.factor = tile_side(tile, autoencoder.factor, trained), autoencoder.factor
        self.report, self.room = report, room

    def __call__(
        self, f: Callable[..., Tensor], inputs: Sequence[Tensor], scale: float = 1.0,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:  # fmt: skip
        """(B, C, H, W) each -> finish(f(...)), (B, C', scale * H, scale * W)."""
        unit = self.factor if scale < 1 else 1  # the encoder reads pixels, the others latent positions
        side, overlap = self.side, OVERLAP
        if scale != 1:
            side, overlap = self.picture_side(*(length // unit for length in inputs[0].shape[-2:])), OVERLAP_OF_PICTURES
        report = partial(self.report, "encoding" if scale < 1 else "decoding" if scale > 1 else "restoring")
        return tiled(f, inputs, side * unit, GRID * unit, scale, finish, report, overlap)

    def picture_side(self, height: int, width: int) -> int:
        """The side of a tile of the autoencoder, in latent positions, for a latent of this size."""
        return self.room.side(height, width) if self.room else self.side

    def sample(self, positions: int) -> float:
        """The most positions of a latent that shared norms decode in one piece."""
        return self.room.sample(positions) if self.room else self.side**2

    def passes(self, width: int, height: int, steps: int, solver: str) -> int:
        """How often `report` is called for a picture: each tile is encoded, evaluated and decoded."""
        sides = positions(width, height, self.factor)
        coded = tiles(*sides, self.picture_side(*sides), OVERLAP_OF_PICTURES)
        return tiles(*sides, self.side, OVERLAP) * evaluations(steps, solver) + 2 * coded


def tile_side(tile: int | None, factor: int, trained: int | None = None) -> int:
    """The side of a tile, pixels -> latent positions, rounded down to whole tokens.

    Without a tile it is that of the square bucket that was `trained`, SMALLEST_TILE tokens at least; without both 64.

    Raises:
        ValueError: a tile of less than SMALLEST_TILE tokens.
    """
    token = GRID * factor  # in pixels
    least = SMALLEST_TILE * token
    tile = tile or max(round(trained / token) if trained else DEFAULT_TILE, SMALLEST_TILE) * token
    if tile < least:
        raise ValueError(f"--tile: got {tile}, expected at least {least} pixels, {SMALLEST_TILE} tokens.")
    return tile // token * GRID


def positions(width: int, height: int, factor: int) -> tuple[int, int]:
    """Height and width of the latent of a picture of this size in pixels, padded to whole tokens."""
    return math.ceil(height / (GRID * factor)) * GRID, math.ceil(width / (GRID * factor)) * GRID


def tiles(height: int, width: int, side: int, overlap: float) -> int:
    """How many tiles a latent of this size has."""
    return math.prod(len(starts(length, side, GRID, overlap)) for length in (height, width))


def starts(length: int, tile: int, grid: int, overlap: float = OVERLAP) -> list[int]:
    """Where tiles start along one axis: evenly, the last one flush with the end; neighbors share `overlap` or more."""
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
    overlap: float = OVERLAP,
    axis: int = -2,
) -> Tensor:
    """Apply f to overlapping tiles and blend the results: (B, C, H, W) each -> (B, C', scale * H, scale * W).

    f maps tensors of one size to a tensor whose sides are `scale` times theirs; `report` follows each call. A tile has
    `tile` positions of the inputs on a side, a multiple of `grid`, and starts at multiples of `grid`. Rows that are
    complete go through `finish`, which may turn them into bytes to save memory. Axis -2 cuts rows, then -1 cuts each.
    """

    def along_row(*row: Tensor) -> Tensor:
        if axis == -2:
            return tiled(f, row, tile, grid, scale, report=report, overlap=overlap, axis=-1)
        result = f(*row)
        report()
        return result

    length = inputs[0].shape[axis]
    if length <= tile:
        return finish(along_row(*inputs))
    begins, side = starts(length, tile, grid, overlap), round(tile * scale)
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
