"""Decode tiles as parts of one picture: the decoder's group norms use the statistics of the whole picture.

A group norm takes its statistics over its whole input. If that is one tile, a tile of sky gets another tone than a tile
of trees next to it: 0.2 to 2 percent of all values differ by more than 1 of 255. So before the tiles are
decoded, `shared_norms` finds what each norm would see of the whole picture:

    mean = sum_k p_k mean_k          variance = sum_k p_k (variance_k + (mean_k - mean)^2)          p: parts of the area

It does so for one norm after the other, because what a norm sees depends on all norms before it: tiles are decoded as
far as that norm. For the 30 norms of the Flux decoder that is 12 times its work, 124 TFLOP at 1024x1024; a step of
the transformer takes 75. What remains is the attention of the smallest level, which sees its tile alone.

    with shared_norms(autoencoder, z, apply := Tiles(tile, autoencoder)):
        picture = decode(autoencoder, z, size, apply)
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from kontext_min.autoencoder import Autoencoder
from kontext_min.extras.tiles import Tiles, starts
from kontext_min.restore import GRID

Statistics = tuple[Tensor, Tensor]  # mean and variance, (B, groups) each


class _Reached(Exception):
    """Ends a pass at the norm that it was made for."""


@contextmanager
def shared_norms(
    autoencoder: Autoencoder, z: Tensor, apply: Tiles, report: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside it, every group norm of the decoder applies the statistics of all of z to whatever tile it is given.

    Args:
        autoencoder: its decoder calls each of its norms once.
        z: (B, C, h, w), latents to be decoded in tiles.
        apply: the tiles; nothing is done if one is enough.
        report: called after each pass of a tile.
    """
    side = apply.side
    cores = list(itertools.product(*(_cores(length, side) for length in z.shape[-2:])))
    norms = _norms(autoencoder) if len(cores) > 1 else []
    waiting = set(norms)
    try:
        while waiting:
            seen: list[tuple[nn.GroupNorm, int, Statistics]] = []
            for (top, rows), (left, columns) in cores:
                part = z[..., top : top + side, left : left + side]
                for norm in waiting:
                    norm.forward = _noting(norm, seen, part.shape[-2], rows, columns)
                with suppress(_Reached), torch.no_grad():
                    autoencoder.decode(part)
                report()
            norm = seen[0][0]  # the first norm that waits is the same in every tile
            norm.forward = _fixed(norm, _pool([(area, of_part) for _, area, of_part in seen]))
            waiting.remove(norm)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)  # the class's own is left


def passes(autoencoder: Autoencoder, width: int, height: int, apply: Tiles, steps: int, solver: str) -> int:
    """How often a tile passes through a network until a picture is restored: here, and as Tiles.passes counts."""
    token = GRID * autoencoder.factor
    tiles = math.prod(len(_cores(math.ceil(length / token) * GRID, apply.side)) for length in (width, height))
    here = tiles * len(_norms(autoencoder)) if tiles > 1 else 0
    return here + apply.passes(width, height, steps, solver)


def statistics(norm: nn.GroupNorm, x: Tensor) -> Statistics:
    """Mean and variance of each group of channels over all positions: (B, C, H, W) -> (B, groups) each."""
    variance, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), correction=0)
    return mean, variance


def _norms(autoencoder: Autoencoder) -> list[nn.GroupNorm]:
    return [module for module in autoencoder.decoder.modules() if isinstance(module, nn.GroupNorm)]


def _cores(length: int, tile: int) -> list[tuple[int, slice]]:
    """Of each tile along one axis its start, and the part of it up to the middle of what it shares with the next.

    So each position counts once, and none near an edge that is not the picture's: a tile sees zeros beyond it. Nothing
    is blended here, so tiles overlap by less than for decoding, and there are fewer.
    """
    tops = starts(length, tile, GRID, overlap=1 / 8)
    cuts = [0, *((above + tile + top) // 2 for above, top in itertools.pairwise(tops)), length]
    return [(top, slice(a - top, b - top)) for top, a, b in zip(tops, cuts[:-1], cuts[1:], strict=True)]


def _noting(norm: nn.GroupNorm, seen: list, height: int, rows: slice, columns: slice) -> Callable[[Tensor], Tensor]:
    """A `forward` that notes the statistics of the core of a tile, with its area, and ends the pass."""

    def forward(x: Tensor) -> Tensor:
        scale = x.shape[-2] // height  # the decoder's levels grow
        core = x[..., rows.start * scale : rows.stop * scale, columns.start * scale : columns.stop * scale]
        seen.append((norm, core.shape[-2] * core.shape[-1], statistics(norm, core)))
        raise _Reached

    return forward


def _fixed(norm: nn.GroupNorm, of_all: Statistics) -> Callable[[Tensor], Tensor]:
    """A `forward` that normalises with these statistics instead of those of its input."""
    mean, variance = (s.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for s in of_all)  # (B, C)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    return lambda x: torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


def _pool(seen: list[tuple[int, Statistics]]) -> Statistics:
    """Mean and variance (B, groups) of parts with their areas -> those of the whole."""
    whole = sum(area for area, _ in seen)
    parts = [(area / whole, *of_part) for area, of_part in seen]
    mean = sum(p * m for p, m, _ in parts)
    return mean, sum(p * (v + (m - mean).square()) for p, m, v in parts)
