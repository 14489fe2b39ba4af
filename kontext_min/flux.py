"""The Flux transformer: given noisy latent tokens, a prompt and a time, it predicts the velocity of every token.

    vec      = time_in(t) + guidance_in(g) + vector_in(CLIP)            one vector a picture, steers every block
    img, txt = img_in(latent tokens), txt_in(T5 states)
    19 x     DoubleStreamBlock: img and txt have weights of their own and attend to each other
    38 x     SingleStreamBlock: one stream [txt, img], attention and MLP in parallel
    velocity = LastLayer(img)

Every block modulates its LayerNorm by vec (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", adaLN):

    x <- x + gate * f(norm(x) * (1 + scale) + shift)           shift, scale, gate = Linear(silu(vec))

Positions enter by rotation of q and k only (Su et al. 2021, "RoFormer"), along three axes (index, row, column).

Source: black-forest-labs/flux at 802fb47, src/flux/model.py, modules/layers.py, math.py. Attribute names are those of
`flux1-kontext-dev.safetensors`, so its 780 tensors load without a map.
Shapes: B batch, L tokens (L_txt text, L_img picture), D hidden size, H heads, d = D / H.
float32 islands whatever the dtype of the weights: rotation (its angles in float64), timestep sinusoid, statistics of
both norms (F.layer_norm and F.rms_norm accumulate in float32 inside).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ALL = slice(None)


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a Flux; the defaults are those of FLUX.1-Kontext-dev (11,901,408,320 parameters)."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        head_dim, rest = divmod(self.hidden_size, self.num_heads)
        if rest or sum(self.axes_dim) != head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"Flux: hidden_size {self.hidden_size} over {self.num_heads} heads does not fit axes_dim "
                f"{tuple(self.axes_dim)}: give even axes that add up to hidden_size / num_heads."
            )


# ---------------------------------------------------------------------------------------------- positions and time


def rope(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Rotation of every component pair of a head at every position.

    The head is split over the axes (16 + 56 + 56 components); pair j of an axis of dimension d turns by the angle
    position * theta^(-2j/d). Source: math.py `rope`, layers.py `EmbedND`. Angles are float64, as diffusers and early
    BFL code have them: float32 angles are off by up to 4.5e-6 in cos and sin.

    Args:
        ids: (B, L, 3) positions: index of the picture, row, column, in patches of 2x2 latent positions.
        axes_dim: components of the head given to each axis.
        theta: base of the frequencies.

    Returns:
        (B, 1, L, d/2, 2, 2) float32, each 2x2 the matrix [[cos, -sin], [sin, cos]]. All first columns lie together in
        memory, and so do all second ones.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)  # (dim/2,)
        angles.append(ids[..., axis, None].double() * omega)  # (B, L, dim/2)
    angle = torch.cat(angles, dim=-1)  # (B, L, d/2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    columns = torch.stack([torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)])  # (2, B, L, d/2, 2)
    return rearrange(columns, "j b l p i -> b 1 l p i j").float()


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate ADJACENT components (x0, x1), (x2, x3), ... of q or k: (B, H, L, d) -> (B, H, L, d), done in float32."""
    if torch.compiler.is_compiling():  # complex numbers come out wrong of torch 2.13's inductor in some graphs
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = pe[..., 0, 0], pe[..., 1, 0]
        return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2).to(x.dtype)
    turn = torch.view_as_complex(pe[..., 0].contiguous())  # cos + i sin; a copy only if strides were lost
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, H, L, d/2), x0 + i x1
    return torch.view_as_real(z * turn).flatten(-2).to(x.dtype)  # one pass over memory instead of seven


def timestep_embedding(t: Tensor, dim: int = 256, time_factor: float = 1000.0) -> Tensor:
    """Sinusoid of a number in [0, 1] (the guidance, too, goes through it, as a raw number such as 2.5).

    [cos, sin] (in this order) of 1000 t * 10000^(-k/128), k = 0..127. Source: layers.py `timestep_embedding`.

    Args:
        t: (B,).
        dim: size of the result.
        time_factor: the official 1000.

    Returns:
        (B, dim) in the dtype of t; computed in float32.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = (time_factor * t).float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).to(t.dtype)


# -------------------------------------------------------------------------------------------------------- the parts


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, D)."""
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the components of one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, L, d) -> (B, H, L, d). BFL rounds to the input's dtype BEFORE it multiplies by scale."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.scale


class QKNorm(nn.Module):
    """Norms of q and of k; v has none."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, L, d) each -> q, k in the dtype of v."""
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class SelfAttention(nn.Module):
    """The projections of one stream of a double block; the attention itself is joint, so it stands in the block."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> normed q and k, and v: (B, H, L, d) each."""
        q, k, v = rearrange(self.qkv(x), "b l (k h d) -> k b h l d", k=3, h=self.num_heads)
        q, k = self.norm(q, k, v)
        return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, read: slice = ALL) -> Tensor:
    """Rotate q and k, then softmax(q k^T / sqrt(d)) v over ALL tokens, for those that are read: -> (B, L_read, D).

    No mask: the padding of the prompt takes part, as in the official code and in the training of Flux.
    """
    x = F.scaled_dot_product_attention(apply_rope(q[:, :, read], pe[:, :, read]), apply_rope(k, pe), v)
    return rearrange(x, "b h l d -> b l (h d)")


class Modulation(nn.Module):
    """Linear(silu(vec)) in `parts` chunks: (shift, scale, gate) once for a single block, twice for a double one."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dim, parts * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> `parts` times (B, 1, D)."""
        return self.lin(F.silu(vec))[:, None, :].chunk(self.parts, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights (eps 1e-6), then * (1 + scale) + shift: (B, L, D) -> (B, L, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)  # one pass, one rounding


# ------------------------------------------------------------------------------------------------------- the blocks


class DoubleStreamBlock(nn.Module):
    """Picture and text, each with weights of its own, meet in one attention. Written out twice, to be followed."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.img_mod = Modulation(hidden_size, parts=6)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden_size)
        )
        self.txt_mod = Modulation(hidden_size, parts=6)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden_size)
        )

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L_img, D), (B, L_txt, D), (B, D), (B, 1, L, d/2, 2, 2) -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_attn, txt_attn = self.attend(
            modulated_norm(img, img_shift1, img_scale1), modulated_norm(txt, txt_shift1, txt_scale1), pe
        )

        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attn))  # img + gate * ...
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulated_norm(img, img_shift2, img_scale2)))

        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attn))  # txt + gate * ...
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2)))
        return img, txt

    def attend(self, img: Tensor, txt: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L_img, D), (B, L_txt, D), both normed -> the same, attended; q, k and v are gone before the MLPs run."""
        img_q, img_k, img_v = self.img_attn.heads(img)
        txt_q, txt_k, txt_v = self.txt_attn.heads(txt)
        q = torch.cat([txt_q, img_q], dim=2)  # text first: (B, H, L_txt + L_img, d)
        k = torch.cat([txt_k, img_k], dim=2)
        v = torch.cat([txt_v, img_v], dim=2)
        txt_attn, img_attn = attention(q, k, v, pe).split([txt.shape[1], img.shape[1]], dim=1)
        return img_attn, txt_attn


class SingleStreamBlock(nn.Module):
    """One stream [txt, img]; attention and MLP run in parallel from one norm and leave through one Linear."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.splits = [3 * hidden_size, int(hidden_size * mlp_ratio)]
        self.modulation = Modulation(hidden_size, parts=3)
        self.linear1 = nn.Linear(hidden_size, sum(self.splits))  # q, k, v and the MLP's first half
        self.linear2 = nn.Linear(hidden_size + self.splits[1], hidden_size)  # reads [attention, mlp]
        self.norm = QKNorm(hidden_size // num_heads)
        self.mlp_act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, read: slice = ALL) -> Tensor:
        """(B, L, D), (B, D), (B, 1, L, d/2, 2, 2) -> (B, L_read, D); keys and values are of all tokens."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulated_norm(x, shift, scale)).split(self.splits, dim=-1)
        attn, mlp = self.attend(qkv, pe, read), self.mlp_act(mlp[:, read])
        del qkv  # with it the output of linear1, the largest tensor of the block
        both = torch.cat([attn, mlp], dim=-1)
        del attn, mlp  # their copies in `both` are all that is needed
        return torch.addcmul(x[:, read], gate, self.linear2(both))

    def attend(self, qkv: Tensor, pe: Tensor, read: slice) -> Tensor:
        """(B, L, 3 D) -> (B, L_read, D)."""
        q, k, v = rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=self.num_heads)
        q, k = self.norm(q, k, v)
        return attention(q, k, v, pe, read)


class LastLayer(nn.Module):
    """Modulated norm, then a Linear to the channels of a token."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, L, D), (B, D) -> (B, L, out). The order here is shift, scale; diffusers stores scale, shift."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


# -------------------------------------------------------------------------------------------------------- the model


class Flux(nn.Module):
    """The transformer of FLUX.1-dev and FLUX.1-Kontext-dev: names and shapes are the same, only weights differ."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(params.vec_in_dim, hidden)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(256, hidden)
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden, params.num_heads, params.mlp_ratio, params.qkv_bias) for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden, params.num_heads, params.mlp_ratio) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden, params.out_channels)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All blocks in the order in which they run."""
        return (*self.double_blocks, *self.single_blocks)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        read: int | None = None,
    ) -> Tensor:
        """Predict the official velocity dx/dt = noise - data (flow.py turns it into ours).

        Args:
            img: (B, L_img, in_channels) packed latents; for Kontext the reference tokens follow the generated ones.
                Its dtype is the dtype of the computation.
            img_ids: (B, L_img, 3): (0, row, column) for generated tokens, (1, row, column) for reference tokens.
            txt: (B, L_txt, context_in_dim) states of T5, padding included.
            txt_ids: (B, L_txt, 3), all zero: text is not rotated.
            timesteps: (B,) official time t in [0, 1], 1 = noise; float32, since bf16 rounds 1000 t to steps of 4.
            y: (B, vec_in_dim) pooled CLIP vector.
            guidance: (B,) distilled guidance scale, a raw number such as 2.5; needed when guidance_embed.
            read: how many tokens of img the caller reads, counted from the first; the last block computes no other.

        Returns:
            (B, L_img or `read`, out_channels). The caller drops the tokens of the reference.

        Raises:
            ValueError: guidance is missing although the model was distilled with it.
        """
        dtype = img.dtype
        vec = self.time_in(timestep_embedding(timesteps).to(dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("Flux: this model was distilled with guidance, got none: pass guidance, e.g. 2.5.")
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        vec = vec + self.vector_in(y.to(dtype))  # (B, D)

        img = self.img_in(img)  # (B, L_img, D)
        txt = self.txt_in(txt.to(dtype))  # (B, L_txt, D)
        pe = rope(torch.cat([txt_ids, img_ids], dim=1), self.params.axes_dim, self.params.theta)

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)  # (B, L_txt + L_img, D)
        for block in self.single_blocks[:-1]:
            x = block(x, vec, pe)
        if read is None:
            return self.final_layer(self.single_blocks[-1](x, vec, pe)[:, txt.shape[1] :], vec)
        tokens = slice(txt.shape[1], txt.shape[1] + read)  # keys and values of all tokens, queries of these alone
        return self.final_layer(self.single_blocks[-1](x, vec, pe, tokens), vec)
