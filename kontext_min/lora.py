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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = {  # patterns of module names, matched whole
    "attention": r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]",
    "attention-mlp": r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]",
    "all": r".*",
}


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
        low = self.scale * F.linear(x.float(), self.lora_A)  # (..., rank), scaled where it is small
        y = self.base(x)
        return F.linear(low, self.lora_B).add_(y).to(y.dtype)  # added in float32, rounded once; in float32 no copies


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
        ValueError: a rank below 1, or targets that match no Linear.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank: got {rank}, expected at least 1.")
    model.requires_grad_(False)
    pattern = re.compile(TARGETS.get(targets, targets))
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
