"""The last block computes only what is read: queries of the generated tokens, keys and values of all tokens.

After the last block no token sees another one, and only the generated tokens have a velocity that is used. So text and
reference tokens need no attention, MLP or projection there. The result is exact. With as many reference as generated
tokens this saves 6 % of a forward pass of a network with 4 single blocks, and 0.6 % of one with Flux's 38.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kontext_min.flux import Flux, apply_rope, modulated_norm


def skip_unread(flux: Flux) -> None:
    """Replace the forward of the last block, in place; the unread tokens of its result are those of its input."""
    last = flux.single_blocks[-1]
    read = slice(None)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal read
        _, img_ids, txt = args[:3]
        # The first axis of a position is 0 for generated tokens and 1 for the reference behind them.
        read = slice(txt.shape[1], txt.shape[1] + int((img_ids[0, :, 0] == 0).sum()))

    def forward(x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """(B, L, D), (B, D), (B, 1, L, d/2, 2, 2) -> (B, L, D), as SingleStreamBlock."""
        shift, scale, gate = last.modulation(vec)
        qkv, mlp = last.linear1(modulated_norm(x, shift, scale)).split(last.splits, dim=-1)
        q, k, v = rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=last.num_heads)
        q, k = last.norm(q[:, :, read], k, v)
        attn = F.scaled_dot_product_attention(apply_rope(q, pe[:, :, read]), apply_rope(k, pe), v)
        attn, mlp = rearrange(attn, "b h l d -> b l (h d)"), last.mlp_act(mlp[:, read])
        out = x[:, read] + gate * last.linear2(torch.cat([attn, mlp], dim=-1))
        return torch.cat([x[:, : read.start], out, x[:, read.stop :]], dim=1)

    flux.register_forward_pre_hook(note)
    last.forward = forward
