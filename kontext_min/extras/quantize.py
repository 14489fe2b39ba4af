"""Keep the frozen weights in 8 or 4 bits, and widen them one Linear at a time.

    y = W x + b          W = codes * scales, made when it is used and freed right after, in forward and in backward

| kind | bits a weight | codes | scales |
|---|---|---|---|
| int8 | 8.01 | round(w / s), -128..127 | float32, one a row: max|w| / 127.5, so that half a step is the largest error |
| fp8 | 8.01 | float8 e4m3 of w / s | float32, one a row: max|w| / 448, the largest e4m3 number |
| nf4 | 4.25 | nearest of 16 quantiles of a normal, two to a byte | bfloat16, one for every 64 weights: max|w| |

fp8 has one scale a row, not one for every 64 inputs: a floating-point code is about as precise for small numbers as for
large ones, so finer scales take 5 percent off an error that is three times that of int8 (docs/memory.md), for six
percent more memory. The bfloat16 scales of nf4 take a quarter of a bit and add 0.02 percent to its error; QLoRA's
double quantization takes an eighth, 0.13 GB less over the whole model, for a second level of blocks.

Attention and MLP, 8.6 of Flux's 11.9 billion weights, get the kind that you choose. The modulations are 3.2 billion
more, 6.5 GB in bfloat16: with them an int8 model would not fit 16 GB, nor an nf4 model 11 GB. They scale all channels,
so they are int8 whatever the kind, which leaves the error of fp8 and nf4 as it is. Norms, embedders and the last layer
keep their dtype. No gradient goes to a frozen weight; the backward pass widens W again, so the graph keeps codes alone.

Sources: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3, and appendix E for the code
book; Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; scales per row: Dettmers et al. 2022, "LLM.int8()".
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext_min.checkpoints import WIDENED, Device, Stored, fill, mapped, outline, widened
from kontext_min.flux import Flux

QUANTIZED = ("int8", "fp8", "nf4")
BLOCK = 64  # weights that share a scale in nf4
ROWS = 256  # quantised at a time: what lies between stays in the processor's cache, 7 times as fast for int8
MODULATION = re.compile(r"double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin")
MASS = re.compile(  # what lora.TARGETS calls attention-mlp
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]"
)
# fmt: off
NF4 = (  # QLoRA, appendix E; exactly 0 is one of them
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def storage(module: str, kind: str) -> str | None:
    """The kind that a Linear of this name gets when `kind` is asked for; None if it keeps its dtype."""
    if MODULATION.fullmatch(module):
        return "int8"
    return kind if MASS.fullmatch(module) else None


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight to codes and scales; `dequantize` is the way back.

    Args:
        weight: (out, in), any floating dtype.
        kind: int8, fp8 or nf4.

    Returns:
        codes: (out, in) int8 or float8; for nf4 (ceil(out * in / 64) * 32,) uint8, the first of two weights in the
            high bits. scales: (out, 1) float32; for nf4 (ceil(out * in / 64), 1) bfloat16.
    """
    parts = [_quantize(rows.float(), kind) for rows in weight.split(ROWS)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "nf4":
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1, keepdim=True).bfloat16()
        levels = torch.tensor(NF4, device=weight.device)
        borders = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / scales.float().clamp(min=1e-30), borders, out_int32=True).byte()
        return (codes.flatten()[::2] << 4) | codes.flatten()[1::2], scales
    largest = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    if kind == "int8":
        scales = largest / 127.5
        return (weight / scales).round().clamp(-128, 127).to(torch.int8), scales
    scales = largest / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scales).to(torch.float8_e4m3fn), scales


def dequantize(codes: Tensor, scales: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes and scales from `quantize` -> the weight (out, in) = `shape`, computed in float32, rounded once to dtype.

    The dtype of the codes tells their kind; without scales the codes are the weight itself.
    """
    if codes.dtype == torch.uint8:  # nf4: one look-up gives both weights of a byte
        levels = torch.tensor(NF4, device=codes.device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # (256, 2)
        blocks = F.embedding(codes.int(), pairs).view(-1, BLOCK).mul_(scales.float())
        return blocks.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)
    return codes.to(dtype) if scales is None else codes.float().mul_(scales).to(dtype)


class _WidenedLinear(torch.autograd.Function):
    """F.linear whose graph keeps codes, not the widened weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return F.linear(x, dequantize(codes, scales, shape, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        grad_x = grad @ dequantize(codes, scales, ctx.shape, grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


class QuantizedLinear(nn.Module):
    """A frozen Linear with a narrow weight: `codes`, `scales` and `bias` are buffers, so nothing in it can train."""

    def __init__(self, linear: nn.Linear, codes: Tensor | None, scales: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str) -> "QuantizedLinear":
        """int8, fp8 or nf4 of a Linear."""
        return cls(linear, *quantize(linear.weight.detach(), kind))

    def dequantize(self) -> Tensor:
        """The weight, (out, in) float32."""
        return dequantize(self.codes, self.scales, (self.out_features, self.in_features), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, which is the dtype of the computation."""
        return _WidenedLinear.apply(x, self.codes, self.scales, self.bias, (self.out_features, self.in_features))


def _chosen(model: nn.Module, kind: str) -> dict[str, str]:
    """The Linears that become narrow -> the kind of each."""
    if kind not in QUANTIZED:
        raise ValueError(f"--quantize: got {kind!r}, expected {', '.join(QUANTIZED)}.")
    kinds = {name: storage(name, kind) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: own for name, own in kinds.items() if own}


def quantize_(model: nn.Module, kind: str) -> nn.Module:
    """Replace the Linears in the blocks of a Flux in place, one at a time; everything else stays.

    Args:
        model: a Flux, or a module with its blocks.
        kind: int8, fp8 or nf4.

    Raises:
        ValueError: an unknown kind, or a model without such Linears.
    """
    chosen = _chosen(model, kind)
    if not chosen:
        raise ValueError(f"quantize_: {type(model).__name__} has no Linear in attention or MLP of a block.")
    for name, own in chosen.items():
        model.set_submodule(name, QuantizedLinear.from_linear(model.get_submodule(name), own))
    return model


def load_quantized(path: str | Path, kind: str, dtype: torch.dtype, device: Device = "cpu") -> Flux:
    """A Flux with narrow blocks, frozen, straight from its files: one weight at a time is wide.

    Args:
        path: file or folder in any official layout, see checkpoints.find.
        kind: int8, fp8 or nf4.
        dtype: of everything that is not quantised.
        device: where to quantise and to keep the model.

    Raises:
        ValueError: an unknown kind, or as checkpoints.load_flux.
    """
    model, sources = outline("transformer", path)
    chosen = _chosen(model, kind)
    weights = {name: sources.pop(f"{name}.weight") for name in chosen}
    fill(model, sources, dtype, device)
    for name, own in chosen.items():
        model.set_submodule(name, QuantizedLinear(model.get_submodule(name), *narrow(weights[name], own, device)))
    return model


def narrow(weight: Sequence[Stored], kind: str, device: Device) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of the weight (out, in) that some stored tensors make, joined along the rows.

    What a file holds in 8 bits stays so unless you ask for 4: a second rounding adds its error and saves nothing.
    """
    if kind != "nf4" and all(s.dtype in WIDENED for s in weight) and len({s.dtype for s in weight}) == 1:
        codes, scales = torch.cat([mapped(s) for s in weight]), scales_of(weight)
        return codes.to(device), None if scales is None else scales.to(device)
    return quantize(torch.cat([widened(s).to(device) for s in weight]), kind)


def scales_of(weight: Sequence[Stored]) -> Tensor | None:
    """Scales of the rows of a stored weight, (out, 1) float32, or None if it has none."""
    if not any(s.scale for s in weight):
        return None
    scales = [mapped(s.scale).float() if s.scale else torch.ones(1) for s in weight]
    return torch.cat([x.reshape(-1, 1).expand(s.shape[0], 1) for x, s in zip(scales, weight, strict=True)])
