"""The Flux autoencoder: a photograph (3, H, W) becomes a latent (16, H/8, W/8), and back.

    mean, logvar = Encoder(image)                     image in [-1, 1]
    z            = scale * (mean - shift)             scale 0.3611, shift 0.1159: about zero mean and unit deviation
    image        = Decoder(z / scale + shift)

Kontext takes the posterior MEAN; nothing is sampled, so encoding is deterministic.
One level halves the side, except the last: four levels give the factor 8.

Source: black-forest-labs/flux, src/flux/modules/autoencoder.py at 802fb47 (after Rombach et al. 2022, "High-Resolution
Image Synthesis with Latent Diffusion Models", section 3.1). Attribute names are those of `ae.safetensors`.
Shapes: B batch, C channels, H, W sides at the level at hand, z latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderParams:
    """Sizes of an autoencoder; the defaults are those of `ae.safetensors` (83,819,683 parameters)."""

    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


STRIP = 2**23  # numbers in a strip of rows, 32 MB


class GroupNorm(nn.GroupNorm):
    """(x - mean) / sqrt(variance + 1e-6) * weight + bias, mean and variance over each of 32 groups of channels.

    Not torch's function: where the channels lie together, that takes the variance as E[x^2] - E[x]^2 in float32, which
    is off by 6 percent of a deviation in groups whose mean is far from zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups=32, num_channels=channels, eps=1e-6)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group over all positions: (B, C, H, W) -> (B, groups) each.

        In two passes, the second over rows that fit in the cache: torch.var_mean takes seven times as long on maps
        whose channels lie together in memory.
        """
        rows = max(1, 2**19 // (x.shape[1] * x.shape[3]))
        mean = x.mean(dim=(2, 3)).unflatten(1, (self.num_groups, -1)).mean(dim=2)
        centre = mean.repeat_interleave(x.shape[1] // self.num_groups, dim=1)[:, :, None, None]
        squares = sum((piece - centre).square_().sum(dim=(2, 3)) for piece in x.split(rows, dim=2))  # (B, C)
        return mean, squares.unflatten(1, (self.num_groups, -1)).mean(dim=2) / (x.shape[2] * x.shape[3])

    def of(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The norm of some rows of x, (B, C, rows, W), with the statistics of all of x, (B, C, H, W)."""
        mean, variance = self.statistics(x)
        per_group = x.shape[1] // self.num_groups
        scale = self.weight * torch.rsqrt(variance + self.eps).repeat_interleave(per_group, dim=1)  # (B, C)
        shift = self.bias - mean.repeat_interleave(per_group, dim=1) * scale
        return lambda rows: torch.addcmul(shift[:, :, None, None], rows, scale[:, :, None, None])

    def silu_of(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """silu(norm(.)) of some rows of x, (B, C, rows, W), likewise."""
        norm = self.of(x)
        return lambda rows: F.silu(norm(rows), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.of(x)(x)


def _strips(conv: nn.Conv2d, prepare: Callable[[Tensor], Tensor], x: Tensor, enlarge: int = 1) -> Tensor:
    """conv(prepare(x)) for a 3x3 convolution, in strips of rows if x is large: the same numbers, a third of the memory.

    At 1024x1024 a map of 256 channels is 1 GB; so only what comes in and what goes out is there as a whole.

    Args:
        conv: 3x3, padded by 1.
        prepare: works on any rows of x alike; makes `enlarge` times the rows.
        x: (B, C, H, W).
        enlarge: sides of the result over sides of x.
    """
    height = x.shape[2]
    rows = max(1, STRIP // (x.shape[1] * x.shape[3] * enlarge**2))
    if rows >= height:
        return conv(prepare(x))
    out = torch.empty(
        x.shape[0], conv.out_channels, height * enlarge, x.shape[3] * enlarge,
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        above, below = int(top > 0), int(bottom < height)  # a neighbouring row, where there is one, else zeros
        piece = prepare(x[:, :, top - above : bottom + below])
        piece = piece[:, :, above * (enlarge - 1) : piece.shape[2] - below * (enlarge - 1)]
        piece = F.pad(piece, (1, 1, 1 - above, 1 - below))
        out[:, :, top * enlarge : bottom * enlarge] = F.conv2d(piece, conv.weight, conv.bias)
    return out


class ResnetBlock(nn.Module):
    """x + conv2(swish(norm2(conv1(swish(norm1(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        h = _strips(self.conv1, self.norm1.silu_of(x), x)
        h = _strips(self.conv2, self.norm2.silu_of(h), h)
        return h.add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all positions of the smallest level, with ONE head as wide as the level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, 1)  # 1x1 convolutions in the BFL file, linear layers in diffusers'
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        # Contiguous, or the attention falls back to a kernel that holds all (HW)^2 weights: 17 GB for 65,000 positions.
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # scale 1/sqrt(C)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the side: 3x3 convolution of stride 2 on a picture padded at the right and the bottom ONLY."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H // 2, W // 2): an odd side is floored."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return _strips(self.conv, lambda rows: F.interpolate(rows, scale_factor=2.0, mode="nearest"), x, 2)


class Mid(nn.Module):
    """The bottom of both halves: ResNet block, attention, ResNet block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """ResNet blocks at one size, then a change of size unless it is the last level of its half."""

    def __init__(self, c_in: int, c_out: int, blocks: int, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Image to the moments of the posterior."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = [params.ch * m for m in params.ch_mult]
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c_out, params.num_res_blocks, downsample=level < len(widths) - 1)
            for level, (c_in, c_out) in enumerate(zip([params.ch, *widths[:-1]], widths, strict=True))
        )
        self.mid = Mid(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2z, h, w): mean, then log variance."""
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # all that follows keeps this order
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return _strips(self.conv_out, self.norm_out.silu_of(x), x)


class Decoder(nn.Module):
    """Latent to image. `up` is indexed like `down` (0 = full size), so it runs from its last entry to its first."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = [params.ch * m for m in params.ch_mult]
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList(  # one block more than the encoder has
            Level(c_in, c_out, params.num_res_blocks + 1, upsample=level > 0)
            for level, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], params.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for level in reversed(self.up):
            for block in level.block:  # not level(x), which would keep its input, at full size 1 GB, until its end
                x = block(x)
            x = level.upsample(x)
        return _strips(self.conv_out, self.norm_out.silu_of(x), x)


class Autoencoder(nn.Module):
    """Encoder and decoder with the shift and scale of the latent space."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    @property
    def factor(self) -> int:
        """Pixels of the picture on one side of a latent position: 8 for Flux."""
        return 2 ** (len(self.params.ch_mult) - 1)

    def moments(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2z, H // factor, W // factor): posterior mean, then log variance."""
        return self.encoder(image)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, z, H // factor, W // factor): the posterior mean, shifted and scaled."""
        mean, _ = torch.chunk(self.moments(image), 2, dim=1)
        return self.params.scale_factor * (mean - self.params.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, factor * h, factor * w), about in [-1, 1]: the caller clamps."""
        return self.decoder(z / self.params.scale_factor + self.params.shift_factor)
