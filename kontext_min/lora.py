"""LoRA: a frozen Linear W learns a low-rank correction, and nothing else trains.

    y = W x + b + (alpha / rank) * B A x            A (rank, in), B (out, rank)

A starts at random and B at zero, so the first step runs the unchanged model. Rank 16 on FLUX.1-Kontext trains 56
million of 11.9 billion parameters. A and B are float32 whatever the dtype of W: an update of 1e-4 is lost in bfloat16.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; A is uniform
in +-1/sqrt(in) as in the authors' code (kaiming_uniform with a = sqrt(5)) and in peft.
"""

import itertools
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECES = 4  # of the tokens, widened to float32 one after the other
TARGETS = {  # presets of --lora-targets: patterns of module names (flux.py), matched whole
    "attention": r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]",
    "attention-mlp": r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]",
    "all": r".*",
}


class _Correct(torch.autograd.Function):
    """y + scale * B A x in float32, rounded once to the dtype of y.

    Plain operations would keep a float32 copy of x for the gradient of A and make one of y: of a bfloat16 model that is
    twice the block. Here x stays as it is, and is widened in pieces, in forward and in backward.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = torch.cat([scale * F.linear(piece.float(), a) for piece in _pieces(x)])  # (rows, rank)
        ctx.save_for_backward(x, a, b, low)
        ctx.scale = scale
        ctx.mark_dirty(y)  # a second buffer as large as the output costs more than the products
        for y_piece, low_piece in zip(_pieces(y), _pieces(low), strict=True):
            if y.dtype == torch.float32:
                y_piece.addmm_(low_piece, b.t())
            else:
                y_piece.copy_(F.linear(low_piece, b).add_(y_piece))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        grad_xs = [None] * PIECES if grad_x is None else _pieces(grad_x)
        for g, x_piece, low_piece, grad_x_piece in zip(_pieces(grad), _pieces(x), _pieces(low), grad_xs, strict=True):
            g = g.float()
            grad_b.addmm_(g.t(), low_piece)
            grad_low = ctx.scale * (g @ b)
            grad_a.addmm_(grad_low.t(), x_piece.float())
            if grad_x_piece is not None and x.dtype == torch.float32:
                grad_x_piece.addmm_(grad_low, a, beta=0)
            elif grad_x_piece is not None:
                grad_x_piece.copy_(grad_low @ a)
        return grad, grad_x, grad_a, grad_b, None


def _pieces(x: Tensor) -> list[Tensor]:
    """(..., D) -> PIECES views of its rows, the last one with the rest: torch.compile need not know if there is one."""
    x = x.flatten(0, -2)
    rows = x.shape[0] // PIECES
    return [*(x[i * rows : (i + 1) * rows] for i in range(PIECES - 1)), x[(PIECES - 1) * rows :]]


class LoRALinear(nn.Module):
    """A Linear with its correction; `base` is any module with in_features and out_features, and stays frozen."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        device = device or next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of the base's output."""
        rows = x.flatten(0, -2)  # of a matrix the Linear's output is no view, which could not be changed in place
        y = _Correct.apply(self.base(rows), rows, self.lora_A, self.lora_B, self.scale)
        return y.unflatten(0, x.shape[:-1])


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can carry a LoRA by its module name: the Linears, quantised ones included (quantize.py)."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, targets: str = "attention-mlp", seed: int = 0
) -> list[nn.Parameter]:
    """Freeze the model and put a LoRA on its Linears.

    Args:
        model: changed in place: each chosen Linear becomes a LoRALinear around it.
        rank: of the correction, at least 1.
        alpha: the correction counts alpha / rank; alpha = rank (so 1) by default.
        targets: a key of TARGETS or a regular expression for whole module names (`double_blocks.0.img_attn.qkv`).
        seed: A depends on it and on the module's order alone.

    Returns:
        The parameters that train: A and B of every chosen Linear, in the order of the modules.

    Raises:
        ValueError: a rank below 1, or targets that are no pattern or match no Linear.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank: got {rank}, expected at least 1.")
    model.requires_grad_(False)
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"LoRA targets: {targets!r} is no regular expression ({error}).") from None
    chosen = [n for n in linears(model) if pattern.fullmatch(n)]
    if not chosen:
        raise ValueError(
            f"LoRA targets: {targets!r} matches no Linear; use {', '.join(TARGETS)} or a pattern of names."
        )
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device  # of the model's first layer: streamed blocks are on meta
    params = []
    for name in chosen:
        layer = LoRALinear(model.get_submodule(name), rank, rank if alpha is None else alpha, device)
        bound = 1 / math.sqrt(layer.base.in_features)
        with torch.no_grad():  # drawn on the CPU, so that every device starts alike
            layer.lora_A.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        params += [layer.lora_A, layer.lora_B]
    return params


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of a model by its official module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W <- W + (alpha / rank) B A, in float32, rounded once to the dtype of W; the plain Linears return in place."""
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        weight.copy_((weight.float() + layer.scale * layer.lora_B @ layer.lora_A).to(weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
