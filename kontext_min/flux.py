"""The Flux transformer: given noisy latent tokens, a prompt and a time, it predicts the velocity of every token.

    vec      = time_in(t) + guidance_in(g) + vector_in(CLIP)            one vector per picture, which steers every block
    img, txt = img_in(latent tokens), txt_in(T5 states)
    19 x     DoubleStreamBlock: img and txt have their own weights and attend to each other
    38 x     SingleStreamBlock: one stream [txt, img], attention and MLP in parallel
    velocity = LastLayer(img)

Every block modulates its LayerNorm by vec (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", adaLN):

    x <- x + gate * f((1 + scale) * norm(x) + shift)           shift, scale, gate = Linear(silu(vec))

Positions enter only by a rotation of q and k (Su et al. 2021, "RoFormer"), along three axes (index, row, column).

Source: black-forest-labs/flux at 802fb47, src/flux/model.py, modules/layers.py, math.py. Attribute names are those of
`flux1-kontext-dev.safetensors`, so its 780 tensors load by their own names. diffusers' FluxTransformer2DModel computes
the same; here no attention processor or mixin stands between a block and its equations.
Shapes: B batch, L tokens (L_txt text, L_img picture), D hidden size, H heads, d = D / H.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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
        """Raises: ValueError if the axes do not fill a head."""
        if sum(self.axes_dim) * self.num_heads != self.hidden_size or any(n % 2 for n in self.axes_dim):
            got = f"hidden_size {self.hidden_size} over {self.num_heads} heads does not fit axes_dim {self.axes_dim}"
            raise ValueError(f"Flux: {got}: give even axes that add up to hidden_size / num_heads.")


def rope(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Positions (B, L, 3), in patches, -> rotations (B, 1, L, d/2, 2, 2) float32: a [[cos, -sin], [sin, cos]] per pair.

    The head is split over the axes (16 + 56 + 56 components for index, row and column); pair j of an axis of
    dimension n turns by the angle position * theta^(-2j/n). Source: math.py `rope`, layers.py `EmbedND`.
    """
    # float64, as in diffusers and in the official code before 2025: float32 angles move cos and sin by up to 4.5e-6.
    exponents = [torch.arange(0, n, 2, dtype=torch.float64, device=ids.device) / n for n in axes_dim]  # (n/2,) each
    positions = ids.double().unsqueeze(-1).unbind(dim=-2)  # (B, L, 1) each
    angle = torch.cat([p * theta**-e for p, e in zip(positions, exponents, strict=True)], dim=-1)  # (B, L, d/2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # All first columns lie together in memory: apply_rope reads them as complex numbers without a copy.
    columns = torch.stack([torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)])  # (2, B, L, d/2, 2)
    return rearrange(columns, "j b l p i -> b 1 l p i j").float()


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate ADJACENT components (x0, x1), (x2, x3), ... of q or k: (B, H, L, d) -> (B, H, L, d)."""
    # float32 whatever the dtype of the weights, rounded once at the end.
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, H, L, d/2, 2)
    if torch.compiler.is_compiling():
        # Inductor of torch 2.13 compiles complex numbers wrong in some graphs.
        even, odd = pairs.unbind(-1)
        cos, sin = pe[..., 0, 0], pe[..., 1, 0]
        rotated = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    else:
        # The same as (x0 + i x1) (cos + i sin): one pass over memory instead of seven.
        turn = torch.view_as_complex(pe[..., 0].contiguous())
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    return rotated.flatten(-2).to(x.dtype)


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoid of a time in [0, 1], or of a guidance: [cos, sin] of 1000 t * 10000^(-2k/dim), k = 0 ... dim/2 - 1.

    Source: layers.py `timestep_embedding`. (B,) -> (B, dim) in the dtype of t, computed in float32.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    # The model takes t in [0, 1]; the factor 1000 of the official code belongs to the network.
    angle = (1000 * t).float()[:, None] * frequencies  # (B, dim/2)
    # cos comes first here; most other sinusoidal embeddings begin with sin.
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).to(t.dtype)


def mlp_embedder(in_dim: int, dim: int) -> nn.Sequential:
    """Linear, SiLU, Linear, the official MLPEmbedder: (B, in_dim) -> (B, D)."""
    return nn.Sequential(OrderedDict(in_layer=nn.Linear(in_dim, dim), act=nn.SiLU(), out_layer=nn.Linear(dim, dim)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the components of one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, L, d) -> (B, H, L, d)."""
        # F.rms_norm takes the mean in float32 and rounds to the dtype of x. The official code rounds there too, BEFORE
        # it multiplies by scale; in bfloat16 the other order gives other numbers, so scale is not passed to rms_norm.
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.scale


class QKNorm(nn.Module):
    """Norms of q and of k; v has none."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, L, d) each -> q, k."""
        # Some files store the scales in float32: attention needs q, k and v in one dtype.
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class SelfAttention(nn.Module):
    """The projections of one stream of a double block; the block itself computes the attention of both streams."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim = params.hidden_size
        self.qkv = nn.Linear(dim, dim * 3, bias=params.qkv_bias)
        self.norm = QKNorm(dim // params.num_heads)
        self.proj = nn.Linear(dim, dim)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over all tokens, with q and k rotated: (B, H, L, d) -> (B, L, D)."""
    # No mask: the padding of the prompt takes part, because Flux was trained that way.
    x = F.scaled_dot_product_attention(apply_rope(q, pe), apply_rope(k, pe), v)
    return rearrange(x, "b h l d -> b l (h d)")


class Modulation(nn.Module):
    """Linear(silu(vec)) in `parts` chunks: (shift, scale, gate) once for a single block, twice for a double block."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dim, parts * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> `parts` times (B, 1, D)."""
        # The SiLU is part of the modulation: vec itself has none.
        return self.lin(F.silu(vec))[:, None, :].chunk(self.parts, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * norm(x) + shift with a LayerNorm over D: (B, L, D), (B, 1, D), (B, 1, D) -> (B, L, D)."""
    # The LayerNorm has no weights of its own (shift and scale take their place), and eps 1e-6 where torch has 1e-5.
    # Its mean and variance are float32 inside F.layer_norm, whatever the dtype of x.
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


class DoubleStreamBlock(nn.Module):
    """Picture and text, each with its own weights, attend to each other."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, int(params.hidden_size * params.mlp_ratio)
        self.num_heads = params.num_heads
        self.img_mod = Modulation(dim, parts=6)
        self.img_attn = SelfAttention(params)
        # GELU in its tanh approximation, here and in the single blocks.
        self.img_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))
        self.txt_mod = Modulation(dim, parts=6)
        self.txt_attn = SelfAttention(params)
        self.txt_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L_img, D), (B, L_txt, D), (B, D), (B, 1, L, d/2, 2, 2) -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        # q, k and v, first of the picture, then of the text. `attention` rotates q and k, after their norm.
        img_qkv = self.img_attn.qkv(modulated_norm(img, img_shift1, img_scale1))
        img_q, img_k, img_v = rearrange(img_qkv, "b l (k h d) -> k b h l d", k=3, h=self.num_heads)
        img_q, img_k = self.img_attn.norm(img_q, img_k, img_v)
        txt_qkv = self.txt_attn.qkv(modulated_norm(txt, txt_shift1, txt_scale1))
        txt_q, txt_k, txt_v = rearrange(txt_qkv, "b l (k h d) -> k b h l d", k=3, h=self.num_heads)
        txt_q, txt_k = self.txt_attn.norm(txt_q, txt_k, txt_v)
        # One attention over both streams, text first: the order of the positions in pe.
        q = torch.cat([txt_q, img_q], dim=2)  # (B, H, L, d)
        k = torch.cat([txt_k, img_k], dim=2)
        v = torch.cat([txt_v, img_v], dim=2)
        txt_attn, img_attn = attention(q, k, v, pe).split([txt.shape[1], img.shape[1]], dim=1)
        # Free all of these before the MLPs run, where the memory of the network peaks.
        del img_qkv, img_q, img_k, img_v, txt_qkv, txt_q, txt_k, txt_v, q, k, v
        # x + gate * f(x): first the attention, then the MLP.
        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * self.img_mlp(modulated_norm(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """One stream [txt, img]; attention and MLP run in parallel between two shared Linears (Dehghani et al. 2023)."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, int(params.hidden_size * params.mlp_ratio)
        self.num_heads = params.num_heads
        self.splits = [3 * dim, mlp_dim]
        self.modulation = Modulation(dim, parts=3)
        # Rows of linear1: q, k, v, then the MLP's first half. Columns of linear2: attention, then the MLP.
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(dim // params.num_heads)
        self.mlp_act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """(B, L, D), (B, D), (B, 1, L, d/2, 2, 2) -> (B, L, D)."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulated_norm(x, shift, scale)).split(self.splits, dim=-1)
        q, k, v = rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=self.num_heads)
        # Normed q and k have no name here, so they are freed before the MLP runs.
        attn = attention(*self.norm(q, k, v), v, pe)
        mlp = self.mlp_act(mlp)
        # Frees the largest tensors of the block before linear2 runs.
        del qkv, q, k, v
        # linear2 is the attention's projection and the MLP's second half in one: it adds the two branches.
        return x + gate * self.linear2(torch.cat([attn, mlp], dim=-1))


class LastLayer(nn.Module):
    """Modulated norm, then a Linear to the channels of a token."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, L, D), (B, D) -> (B, L, out)."""
        # The order is shift, scale. diffusers' files store the two halves swapped; checkpoints.py swaps them back.
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


class Flux(nn.Module):
    """The transformer of FLUX.1-dev and FLUX.1-Kontext-dev: they differ only in their weights."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.time_in = mlp_embedder(256, hidden)
        self.vector_in = mlp_embedder(params.vec_in_dim, hidden)
        if params.guidance_embed:
            self.guidance_in = mlp_embedder(256, hidden)
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(params) for _ in range(params.depth_single_blocks))
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
    ) -> Tensor:
        """Predict the official velocity dx/dt = noise - data, (B, L_img, out_channels); flow.py turns it into ours.

        Args:
            img: (B, L_img, in_channels) packed latents: the generated tokens, then reference tokens if any,
                whose velocities the caller drops. Its dtype is the compute dtype.
            img_ids: (B, L_img, 3): (0, row, column) for generated tokens, (1, row, column) for reference tokens.
            txt, txt_ids: (B, L_txt, context_in_dim) states of T5, padding included; (B, L_txt, 3), all zero.
            timesteps: (B,) official time t in [0, 1], 1 = noise; float32.
            y: (B, vec_in_dim) pooled CLIP vector.
            guidance: (B,) distilled guidance scale, such as 2.5; float32; needed if the model has guidance_embed.

        Raises:
            ValueError: guidance is missing although the model was distilled with it.
        """
        dtype = img.dtype
        # t stays float32 up to here: bfloat16 rounds 1000 t to steps of 4.
        vec = self.time_in(timestep_embedding(timesteps).to(dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("Flux: this model was distilled with guidance, got none: pass guidance, e.g. 2.5.")
            # The guidance goes through the same embedding as the time, as a raw number: 2.5 becomes an angle of 2500.
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        vec = vec + self.vector_in(y.to(dtype))  # (B, D)

        img = self.img_in(img)  # (B, L_img, D)
        txt = self.txt_in(txt.to(dtype))  # (B, L_txt, D)
        # Text first. Its ids are all zero, so its rotation is by 0: only T5 knows the order of the words.
        pe = rope(torch.cat([txt_ids, img_ids], dim=1), self.params.axes_dim, self.params.theta)

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)  # (B, L_txt + L_img, D)
        for block in self.single_blocks:
            x = block(x, vec, pe)
        # Drop the text: only picture tokens have a velocity.
        return self.final_layer(x[:, txt.shape[1] :], vec)
