"""Decode tiles as parts of one picture: the decoder's group norms use the statistics of the whole picture.

A group norm takes its statistics over its whole input. If that is one tile, a tile of sky gets another tone than a tile
of trees next to it. So before the tiles are decoded, `shared_norms` estimates the mean m and the variance v that each
norm would see of the whole picture. It decodes every s-th position of the latent, and every 2s-th, each in one piece,
and extrapolates to all positions:

    m = m_s + (m_s - m_2s)          v = v_s * v_s / v_2s          s = 2, or more if the piece would be too large

A coarser latent has other textures, so m_s and v_s alone are a little off; m_2s and v_2s tell in which direction. For
s = 2 this takes 0.31 of the arithmetic of the decoder. To find the exact statistics, one norm after the other, takes 4
to 12 decodings. docs/memory.md has the differences.

Sources: pkuliyi2015, multidiffusion-upscaler-for-automatic1111 (its Tiled VAE takes m_s and v_s); Richardson 1911.

    with shared_norms(autoencoder, z, apply := Tiles(tile, autoencoder)):
        picture = decode(autoencoder, z, size, apply)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kontext_min.autoencoder import Autoencoder
from kontext_min.extras.tiles import Tiles, positions

Statistics = tuple[Tensor, Tensor]  # mean and variance, (B, groups) each


@contextmanager
def shared_norms(
    autoencoder: Autoencoder, z: Tensor, apply: Tiles, report: Callable[[str], None] = lambda part: None
) -> Iterator[None]:
    """Inside it, every group norm of the decoder applies the statistics of all of z to whatever tile it is given.

    Args:
        autoencoder: its decoder calls each of its norms once.
        z: (B, C, h, w), latents to be decoded in tiles.
        apply: the tiles; nothing is done if one is enough.
        report: called after each of the two decodings.
    """
    height, width = z.shape[-2:]
    norms = [module for module in autoencoder.decoder.modules() if isinstance(module, nn.GroupNorm)]
    try:
        if max(height, width) > apply.picture_side(height, width):
            # A piece may be a quarter larger: a little more memory is better than a much coarser latent.
            stride = max(2, math.ceil(math.sqrt(height * width / apply.sample(height * width)) - 0.25))
            found = []
            for step in (stride, 2 * stride):
                found.append(gather(autoencoder, norms, z[..., ::step, ::step]))
                report("decoding")
            for norm, (mean, variance), (coarse_mean, coarse_variance) in zip(norms, *found, strict=True):
                ratio = (variance + norm.eps) / (coarse_variance + norm.eps)  # a group may be constant
                norm.forward = fixed(norm, (2 * mean - coarse_mean, variance * ratio))
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)  # the class's own is left


def passes(autoencoder: Autoencoder, width: int, height: int, apply: Tiles, steps: int, solver: str) -> int:
    """How often a tile passes through a network until a picture is restored: here, and as Tiles.passes counts."""
    latent = positions(width, height, autoencoder.factor)
    return apply.passes(width, height, steps, solver) + 2 * (max(latent) > apply.picture_side(*latent))


@torch.no_grad()
def gather(autoencoder: Autoencoder, norms: list[nn.GroupNorm], z: Tensor) -> list[Statistics]:
    """Decode z (B, C, h, w) and return what each norm sees."""
    found: dict[nn.Module, Statistics] = {}
    hooks = [n.register_forward_pre_hook(lambda n, args: found.update({n: statistics(n, args[0])})) for n in norms]
    autoencoder.decode(z)
    for hook in hooks:
        hook.remove()
    return [found[norm] for norm in norms]


def statistics(norm: nn.GroupNorm, x: Tensor) -> Statistics:
    """Mean and variance of each group of channels over all positions: (B, C, H, W) -> (B, groups) each."""
    variance, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), correction=0)
    return mean, variance


def fixed(norm: nn.GroupNorm, of_all: Statistics) -> Callable[[Tensor], Tensor]:
    """A `forward`, (B, C, H, W) -> the same, that normalizes with these statistics instead of those of its input."""
    mean, variance = (s.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for s in of_all)  # (B, C)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    return lambda x: torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
