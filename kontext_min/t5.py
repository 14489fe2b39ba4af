"""The T5 encoder and its tokenizer: a prompt becomes 512 states that Flux reads next to the picture.

    x <- x + o(softmax(q k^T + bias) v)                 q, k, v = Linear(norm(x))                        24 blocks of
    x <- x + wo(gelu(wi_0 norm(x)) * (wi_1 norm(x)))                                                  these two lines
    norm(x) = weight * x / sqrt(mean(x^2) + eps)        bias[h, i, j] = table[bucket(j - i), h]

There are no absolute positions, no biases in linear layers and no 1 / sqrt(K): T5 was trained with a small q instead.
There is no mask either: official Flux passes none, so tokens attend to the padding; a mask would change the states.

Sources: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
section 2.1; Shazeer 2020, "GLU Variants Improve Transformer" (the gated feed-forward of T5 v1.1); Zhang and Sennrich
2019, "Root Mean Square Layer Normalization"; transformers 5.23, models/t5/modeling_t5.py and tokenization_t5.py;
black-forest-labs/flux at 802fb47, src/flux/modules/conditioner.py. Attribute names are the hub's. transformers'
T5EncoderModel does the same; here the missing mask and the missing scale are in plain sight.
Shapes: B batch, L tokens, D width, H heads, K = d_kv (H * K need not be D), F = d_ff.

Run it in bfloat16 or float32. In float16 the residual stream of T5-XXL exceeds 65504; transformers clamps it and keeps
`wo` in float32. Files stored in float16 are fine when they are loaded as bfloat16. Statistics of the norms and the
softmax (inside scaled_dot_product_attention) are float32 whatever the dtype.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Params:
    """Sizes of a T5 encoder; the defaults are those of T5 v1.1 XXL (4,762,310,656 parameters)."""

    vocab_size: int = 32128  # rounded up: the tokenizer has 32,100 ids
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def relative_position_bucket(relative: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Key minus query position, int64 of any shape -> bucket in [0, num_buckets), int64 of the same shape.

    N = num_buckets / 2 buckets are for keys before the query, N for keys after it. At a distance n the bucket is n if
    n < N / 2, else min(N - 1, N / 2 + floor(ln(n / (N / 2)) / ln(max_distance / (N / 2)) * N / 2)).
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = relative.abs()
    # float32 and this order of operations, as in training: in float64 the floor could give another bucket.
    part = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (part * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        scale = torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)  # (B, L, 1) float32
        # Official order: round first, then multiply by the weight.
        return self.weight * (x * scale).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Bidirectional attention with an additive position bias; block 0 holds the bias table for all blocks."""

    def __init__(self, params: T5Params, owns_bias: bool) -> None:
        super().__init__()
        inner = params.num_heads * params.d_kv
        self.heads = params.num_heads
        self.q = nn.Linear(params.d_model, inner, bias=False)
        self.k = nn.Linear(params.d_model, inner, bias=False)
        self.v = nn.Linear(params.d_model, inner, bias=False)
        self.o = nn.Linear(inner, params.d_model, bias=False)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(params.relative_attention_num_buckets, params.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (1, H, L, L) -> (B, L, D)."""
        q, k, v = (rearrange(p(x), "B L (H K) -> B H L K", H=self.heads) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(x, "B H L K -> B L (H K)"))


class GatedFeedForward(nn.Module):
    """wo(gelu(wi_0 x) * (wi_1 x)), GELU in its tanh approximation."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wi_1 = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wo = nn.Linear(params.d_ff, params.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), with (B, L, F) between."""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    """Attention, then feed-forward, both residual; the hub's names are layer.0 and layer.1."""

    def __init__(self, params: T5Params, owns_bias: bool) -> None:
        super().__init__()
        norms = [RMSNorm(params.d_model, params.layer_norm_epsilon) for _ in range(2)]
        attention = nn.ModuleDict({"layer_norm": norms[0], "SelfAttention": SelfAttention(params, owns_bias)})
        # The hub's name, although the activation is GELU.
        feed_forward = nn.ModuleDict({"layer_norm": norms[1], "DenseReluDense": GatedFeedForward(params)})
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (1, H, L, L) -> (B, L, D)."""
        attention, feed_forward = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))


class Stack(nn.Module):
    """All blocks and the last norm, on embedded tokens."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.params = params
        self.block = nn.ModuleList(Block(params, owns_bias=n == 0) for n in range(params.num_layers))
        self.final_layer_norm = RMSNorm(params.d_model, params.layer_norm_epsilon)

    def position_bias(self, length: int) -> Tensor:
        """The bias of the attention scores of every block, (1, H, L, L): [0, head, query, key]."""
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        # Not a buffer: that would stay empty when the network is built on the meta device.
        position = torch.arange(length, device=table.weight.device)
        limits = self.params.relative_attention_num_buckets, self.params.relative_attention_max_distance
        buckets = relative_position_bucket(position[None, :] - position[:, None], *limits)
        return rearrange(table(buckets), "query key H -> 1 H query key").contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        bias = self.position_bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1. `shared` is the embedding table, which T5's decoder shares."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.shared = nn.Embedding(params.vocab_size, params.d_model)
        self.encoder = Stack(params)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) int64 -> last_hidden_state (B, L, D), in the dtype of the weights. Any L; Flux uses 512."""
        return self.encoder(self.shared(ids))


LENGTH = 512  # tokens that Flux reads of a prompt
# <extra_id_0> to <extra_id_99>, T5's marks for masked spans, follow the pieces of the model.
SENTINELS = 100
SPECIAL = re.compile(r"(</s>|<pad>|<unk>|<extra_id_(?:[0-9]|[1-9][0-9])>)")


class T5Tokenizer:
    """Prompts to ids: sentencepiece's unigram model (Kudo 2018, "Subword Regularization") plus T5's special tokens.

    `folder` holds spiece.model. A missing file is a FileNotFoundError, an unusable one a ValueError.
    Special tokens in a prompt ("</s>", "<extra_id_0>") become their ids, as in transformers; sentencepiece encodes the
    rest (transformers 5 re-implements it, and differs for some combining marks and at U+0085).
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "spiece.model"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; a T5 tokenizer folder holds spiece.model.")
        try:
            self.pieces = SentencePieceProcessor()
            self.pieces.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model; take tokenizer_2/spiece.model of the hub.") from error
        self.pad, self.end = self.pieces.pad_id(), self.pieces.eos_id()
        # Sentinels count down: <extra_id_0> has the last id of all.
        last = self.pieces.vocab_size() + SENTINELS - 1
        self.specials = {f"<extra_id_{k}>": last - k for k in range(SENTINELS)}
        self.specials |= {"</s>": self.end, "<pad>": self.pad, "<unk>": self.pieces.unk_id()}

    def __call__(self, texts: list[str], max_length: int = LENGTH) -> Tensor:
        """B prompts -> (B, max_length) int64: at most max_length - 1 ids, </s>, and <pad> to the right."""
        rows = [[*self.encode(text)[: max_length - 1], self.end] for text in texts]
        return torch.tensor([row + [self.pad] * (max_length - len(row)) for row in rows], dtype=torch.int64)

    def count(self, text: str) -> int:
        """Number of ids of a prompt with its </s>; a prompt with more than max_length is truncated."""
        return len(self.encode(text)) + 1

    def encode(self, text: str) -> list[int]:
        """One prompt -> its ids, without </s>, padding or a length limit."""
        ids: list[int] = []
        for part in SPECIAL.split(text):
            ids += [self.specials[part]] if part in self.specials else self.pieces.encode(part)
        return ids
