"""A function of pictures of one size, applied to pictures of any size: in overlapping tiles, blended.

    f(x) = sum_k w_k(x) f_k(x) / sum_k w_k(x)          w = exp(-(x - middle)^2 / (2 * 0.01 * width^2)) on each axis

(The weights are those of Jimenez 2023, "Mixture of Diffusers".) So time grows with the area and not with its square,
and a network works at the size that it was trained at. Beside a tile, what is in memory is the picture as bytes, its
latent (a few times) and one row of tiles.

The group norms of the decoder see a whole picture where it is decoded at once. In tiles they would each see their own,
and a tile of sky come out in another tone than one of trees beside it: 0.2 to 2 percent of all values would differ
by more than 1 of 255. So before tiles are decoded, `shared_norms` finds what each norm would see of the whole,

    mean = sum_k p_k mean_k          variance = sum_k p_k (variance_k + (mean_k - mean)^2)          p: parts of the area

one norm after the other, as what one sees depends on all before it: the tiles are decoded as far as that norm. For
the 30 norms of the Flux decoder that is 12 times its work, 124 TFLOP at 1024x1024; a step of the transformer takes 75.
What is left is the attention of its smallest level, which sees its tile alone.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext_min.autoencoder import Autoencoder, GroupNorm

Statistics = tuple[Tensor, Tensor]  # mean and variance, (B, groups) each


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
    tops, lefts = starts(height, tile, grid), starts(width, tile, grid)
    rows, columns = ([round(start * scale) for start in along] for along in (tops, lefts))  # of the result
    down, across = (
        _windows(round(length * scale), along, round(min(tile, length) * scale))
        for length, along in ((height, rows), (width, columns))
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


def starts(length: int, tile: int, grid: int, overlap: float = 0.25) -> list[int]:
    """Where tiles start along one axis: evenly, the last one flush with the end, overlapping by a quarter or more."""
    room = length - tile
    if room <= 0:
        return [0]
    count = math.ceil(room / (tile * (1 - overlap))) + 1
    return [round(room * k / (count - 1) / grid) * grid for k in range(count - 1)] + [room]


def _windows(length: int, tops: list[int], tile: int) -> list[Tensor]:
    """w_k / sum_k w_k of each tile along one axis.

    Tiles are all pairs of a row and a column, so the sum over tiles is the product of the sums over both axes. The
    deviation of the Gaussian is a tenth of the side.
    """
    x = (torch.arange(tile) + 0.5) / tile - 0.5
    window = torch.exp(-x.square() / (2 * 0.01))
    total = torch.zeros(length)
    for top in tops:
        total[top : top + tile] += window
    return [window / total[top : top + tile] for top in tops]


# ------------------------------------------------------------------------------------------------- norms of all tiles


class _Reached(Exception):
    """Ends a pass at the norm that it was made for."""


@contextmanager
def shared_norms(
    autoencoder: Autoencoder, z: Tensor, tile: int, grid: int, report: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside it, every group norm of the decoder takes the statistics of all of z, whatever tile it is given.

    Args:
        autoencoder: its decoder calls each of its norms once.
        z: (B, z, h, w), what is going to be decoded in tiles.
        tile: side in positions of z; nothing is done if one tile is enough.
        grid: as for `tiled`.
        report: is called after each pass of a tile, `norm_passes` times in all.
    """
    down, across = (_cores(side, tile, grid) for side in z.shape[-2:])
    cores = list(itertools.product(down, across))
    norms = _norms(autoencoder) if len(cores) > 1 else []
    waiting = set(norms)
    try:
        while waiting:
            seen: list[tuple[GroupNorm, int, Statistics]] = []
            for (top, rows), (left, columns) in cores:
                part = z[..., top : top + tile, left : left + tile]
                for norm in waiting:
                    norm.statistics = _noting(norm, seen, part.shape[-2], rows, columns)
                with suppress(_Reached):
                    autoencoder.decode(part)
                report()
            norm = seen[0][0]  # the first one that waits is the same in every tile
            of_all = _pool([(area, of_part) for _, area, of_part in seen])
            norm.statistics = lambda x, of_all=of_all: of_all
            waiting.remove(norm)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("statistics", None)  # the class's own is left


def norm_passes(autoencoder: Autoencoder, size: Sequence[int], tile: int, grid: int) -> int:
    """How often `shared_norms` runs the decoder, or the beginning of it, on a tile."""
    cores = math.prod(len(_cores(side, tile, grid)) for side in size)
    return len(_norms(autoencoder)) * cores if cores > 1 else 0


def _norms(autoencoder: Autoencoder) -> list[GroupNorm]:
    return [module for module in autoencoder.decoder.modules() if isinstance(module, GroupNorm)]


def _cores(length: int, tile: int, grid: int) -> list[tuple[int, slice]]:
    """Of each tile along one axis its start, and the part of it up to the middle of what it shares with the next.

    So each position counts once, and none near an edge that is not the picture's: a tile sees zeros beyond it. Nothing
    is blended here, so tiles overlap by less than in `tiled`, and there are fewer.
    """
    tops = starts(length, tile, grid, overlap=1 / 8)
    cuts = [0, *((above + tile + top) // 2 for above, top in itertools.pairwise(tops)), length]
    return [(top, slice(a - top, b - top)) for top, a, b in zip(tops, cuts[:-1], cuts[1:], strict=True)]


def _noting(norm: GroupNorm, seen: list, height: int, rows: slice, columns: slice) -> Callable[[Tensor], Statistics]:
    """In place of `norm.statistics`: puts down what the core of a tile has, with its area, and ends the pass."""

    def statistics(x: Tensor) -> Statistics:
        scale = x.shape[-2] // height  # the decoder's levels grow
        core = x[..., rows.start * scale : rows.stop * scale, columns.start * scale : columns.stop * scale]
        seen.append((norm, core.shape[-2] * core.shape[-1], GroupNorm.statistics(norm, core)))
        raise _Reached

    return statistics


def _pool(seen: list[tuple[int, Statistics]]) -> Statistics:
    """Mean and variance (B, groups) of parts with their areas -> those of the whole."""
    whole = sum(area for area, _ in seen)
    parts = [(area / whole, *of_part) for area, of_part in seen]
    mean = sum(p * m for p, m, _ in parts)
    return mean, sum(p * (v + (m - mean).square()) for p, m, v in parts)
