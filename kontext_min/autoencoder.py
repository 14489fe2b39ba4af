"""The Flux autoencoder: a photograph (3, H, W) becomes a latent (16, H/8, W/8), and back.

    mean, logvar = Encoder(image)                     image in [-1, 1]
    z            = scale * (mean - shift)             scale 0.3611, shift 0.1159: mean about 0, deviation about 1
    image        = Decoder(z / scale + shift)

Every level but the last halves the side: four levels give the factor 8.

Source: black-forest-labs/flux, src/flux/modules/autoencoder.py at 802fb47 (after Rombach et al. 2022, "High-Resolution
Image Synthesis with Latent Diffusion Models", section 3.1). Attribute names are those of `ae.safetensors`. diffusers'
AutoencoderKL does the same from a config of block classes; this file holds the one model that Flux needs.
Shapes: B batch, C channels, H, W sides at the current level, z latent channels.
"""

from collections import OrderedDict
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


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalize each of 32 groups of channels over the group and all positions; eps is 1e-6, not torch's 1e-5."""
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x), any shape. In place: it always follows a norm, whose output nothing else reads."""
    return F.silu(x, inplace=True)


class ResnetBlock(nn.Module):
    """x + conv2(swish(norm2(conv1(swish(norm1(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # "nin" is network in network, an old name for a 1x1 convolution.
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions of the smallest level: x + proj_out(softmax(q k^T / sqrt(C)) v)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        # 1x1 convolutions in the official file; diffusers stores the same numbers as linear layers.
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height = x.shape[2]
        h = self.norm(x)
        # One head as wide as the level (512 channels), not 8 of 64. The copies are contiguous because the attention
        # otherwise falls back to a kernel that holds all (HW)^2 weights: 17 GB for a picture of 2048 x 2048.
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        # Back to contiguous NCHW, see Autoencoder.
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=height).contiguous()
        return x + self.proj_out(h)


def downsample(c: int) -> nn.Sequential:
    """Half the side, (B, C, H, W) -> (B, C, H // 2, W // 2), an odd one floored: a 3x3 convolution of stride 2."""
    # Zeros at the right and the bottom ONLY: i sees 2i to 2i + 2. padding=1, 2i - 1 to 2i + 1, would shift the latent.
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c: int) -> nn.Sequential:
    """Twice the side, (B, C, H, W) -> (B, C, 2H, 2W): nearest neighbor, then a 3x3 convolution."""
    # Not a transposed convolution: that leaves a checkerboard (Odena et al. 2016).
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1)))


def middle(c: int) -> nn.Sequential:
    """The middle of the encoder and of the decoder, (B, C, H, W) -> (B, C, H, W)."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c)))


class Level(nn.Module):
    """ResNet blocks at one size, then a change of size, except at the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, down: bool = False, up: bool = False) -> None:
        super().__init__()
        # Only the first block changes the width.
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.downsample = downsample(c_out) if down else nn.Identity()
        self.upsample = upsample(c_out) if up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Image to the moments of the posterior."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = [params.ch * m for m in params.ch_mult]  # 128, 256, 512, 512
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c_out, params.num_res_blocks, down=level < len(widths) - 1)
            for level, (c_in, c_out) in enumerate(zip([params.ch, *widths[:-1]], widths, strict=True))
        )
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        # Twice the latent channels: a mean and a log variance of each.
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2z, h, w): mean, then log variance."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent to image."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = [params.ch * m for m in params.ch_mult]
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        # Indexed like `down`: 0 is the full size, so the levels run from last to first. (diffusers' decoder counts the
        # other way round.) Each level has one block more than in the encoder.
        self.up = nn.ModuleList(
            Level(c_in, c_out, params.num_res_blocks + 1, up=level > 0)
            for level, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], params.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder with the shift and scale of the latent space.

    Inputs are made contiguous, channel by channel (NCHW). In channels-last order torch's group norm on a CPU takes the
    variance as E[x^2] - E[x]^2, an error of 6 percent of a deviation where a group's mean is far from zero.
    """

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    @property
    def factor(self) -> int:
        """How many pixels wide and high a latent position is: 8 for Flux."""
        return 2 ** (len(self.params.ch_mult) - 1)

    def moments(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2z, H // factor, W // factor): posterior mean, then log variance."""
        return self.encoder(image.contiguous())

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, z, H // factor, W // factor): the posterior mean, shifted and scaled."""
        # The posterior's mean and not a sample of it (`sample_z=False` in the official file): always the same latent.
        mean, _ = torch.chunk(self.moments(image), 2, dim=1)
        return self.params.scale_factor * (mean - self.params.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, factor * h, factor * w), about in [-1, 1]: the caller clamps."""
        return self.decoder(z.contiguous() / self.params.scale_factor + self.params.shift_factor)
