"""LoRA: a frozen Linear W learns a low-rank correction, and nothing else trains.

    y = W x + b + (alpha / rank) * B A x            A (rank, in), B (out, rank)

A starts random and B at zero, so training starts from the unchanged model. Rank 16 on FLUX.1-Kontext trains 56
million of 11.9 billion parameters.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; A is uniform
in +-1/sqrt(in) as in the authors' code (kaiming_uniform with a = sqrt(5)) and in peft. peft does the same for any model
and many adapters; LoRALinear is the one line above, and needs no wrapper around the model.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Presets of --lora-targets: patterns of module names (flux.py), matched whole. linear1 and linear2 hold the MLP too.
TARGETS = {
    "attention": r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]",
    "attention-mlp": r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]",
    "all": r".*",
}


class LoRALinear(nn.Module):
    """A frozen Linear with its correction; `base` is any module with in_features and out_features."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        # float32 whatever the dtype of W: bfloat16 loses every update below 1/512 of a number (docs/questions.md, 10).
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        # Multiply in the dtype of x: float32 copies of x and of the result would take twice the memory of these. Apply
        # the scale where the tensor is smallest.
        low = self.scale * F.linear(x, self.lora_A.to(x.dtype))  # (..., rank)
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Module name -> layer, for every layer that can carry a LoRA."""
    # Selected by in_features, not by class: a layer that replaces a Linear can carry a LoRA too.
    return {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Official module name -> LoRALinear, for every LoRA of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, targets: str = "attention-mlp", seed: int = 0
) -> list[nn.Parameter]:
    """Freeze the model and put a LoRA on its Linears.

    Args:
        model: changed in place: each chosen Linear becomes a LoRALinear around it.
        rank: the number of rows of A, at least 1.
        alpha: the correction is scaled by alpha / rank; default: alpha = rank, so a scale of 1.
        targets: a key of TARGETS or a regular expression for whole module names (`double_blocks.0.img_attn.qkv`).
        seed: A depends only on it and on the order of the modules.

    Returns:
        The parameters that train: A and B of every chosen Linear, in the order of the modules.

    Raises:
        ValueError: rank or alpha is out of range, or targets is not a valid pattern or matches no Linear.
    """
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"--lora-targets: {targets!r} is no regular expression ({error}).") from None
    chosen = {name: layer for name, layer in linears(model).items() if pattern.fullmatch(name)}
    if not chosen:
        raise ValueError(
            f"--lora-targets: {targets!r} matches no Linear; use {', '.join(TARGETS)} or a pattern of names."
        )
    alpha = rank if alpha is None else alpha
    widest = max(max(layer.in_features, layer.out_features) for layer in chosen.values())
    if not 1 <= rank <= widest:
        raise ValueError(f"--rank: got {rank}, expected 1 to {widest}, the widest side of the chosen Linears.")
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"LoRA alpha: got {alpha}, expected a finite number that is not 0: nothing would be learned.")

    model.requires_grad_(False)
    # The device of the model's first parameter: a chosen Linear may have no weight in memory yet.
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    params = []
    for name, base in chosen.items():
        layer = LoRALinear(base, rank, alpha, device)
        bound = 1 / math.sqrt(base.in_features)
        # Drawn on the CPU, so that every device starts from the same A.
        layer.lora_A.data.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
        model.set_submodule(name, layer)
        params += [layer.lora_A, layer.lora_B]
    return params
