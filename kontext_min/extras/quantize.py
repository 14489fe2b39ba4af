"""Frozen weights kept narrow and widened one Linear at a time: int8, fp8, nf4, or as the file has them.

    y = W x + b          W = codes * scales, made when it is used and gone right after, in forward and in backward

| kind | bits a weight | codes | scales |
|---|---|---|---|
| int8 | 8.01 | round(w / s), -128..127 | float32, one a row: max|w| / 127.5, so that half a step is the largest error |
| fp8 | 8.01 | float8 e4m3 of w / s | float32, one a row: max|w| / 448, the largest e4m3 number |
| nf4 | 4.25 | nearest of 16 quantiles of a normal, two to a byte | bfloat16, one for every 64 weights: max|w| |
| stored | as in the file | the weight itself: bfloat16, float16, fp8 | none, or those of the fp8 file |

fp8 has a scale for a row and not for every 64 inputs: a floating-point code is about as precise for small numbers as
for large ones, so finer scales take 5 percent off an error that is three times that of int8 (docs/memory.md), for six
percent more memory. The bfloat16 scales of nf4 take a quarter of a bit and add 0.02 percent to its error; QLoRA's
double quantisation takes an eighth, 0.13 GB less over the whole model, for a second level of blocks.

Attention and MLP, 8.6 of Flux's 11.9 billion weights, are narrowed to the kind that is asked for. The modulations are
3.2 billion more, 6.5 GB in bfloat16: an int8 model would not fit 16 GB, nor an nf4 model 11 GB. They scale all
channels, so they are int8 whatever the kind, which leaves the error of fp8 and nf4. Norms, embedders and the last layer
stay as they are. No gradient goes to a frozen weight; the backward pass widens W again, so the graph keeps codes alone.

Sources: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3, and appendix E for the code
book; Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; scales per row: Dettmers et al. 2022, "LLM.int8()".
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTIZED = ("int8", "fp8", "nf4")
BLOCK = 64  # weights that share a scale in nf4
ROWS = 256  # quantised at a time: what lies between stays in the processor's cache, 7 times as fast for int8
MODULATION = re.compile(r"double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin")
MASS = re.compile(  # of Flux: what lora.TARGETS calls attention-mlp
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]"  # Flux
    r"|encoder\.block\.\d+\.layer\.\d\.\w+\.(q|k|v|o|wi_0|wi_1|wo)"  # T5
)
# fmt: off
NF4 = (  # QLoRA, appendix E; exactly 0 is one of them
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def storage(module: str, kind: str) -> str | None:
    """How the Linear of this name is stored when `kind` is asked for; None if it is kept."""
    if MODULATION.fullmatch(module) and kind in QUANTIZED:
        return "int8"
    return kind if MASS.fullmatch(module) or MODULATION.fullmatch(module) else None


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
    """Codes and scales from `quantize` -> the weight (out, in) = `shape`, made in float32, rounded once to dtype.

    The dtype of the codes tells their kind.
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
    """A frozen Linear whose weight is stored narrow: `codes`, `scales` and `bias` are buffers, nothing can train."""

    def __init__(self, linear: nn.Linear, codes: Tensor | None, scales: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str) -> "QuantizedLinear":
        """int8, fp8 or nf4 of a Linear; with "stored" its own weight, whatever dtype the input will have."""
        weight = linear.weight.detach()
        return cls(linear, *((weight, None) if kind == "stored" else quantize(weight, kind)))

    def dequantize(self) -> Tensor:
        """The weight, (out, in) float32."""
        return dequantize(self.codes, self.scales, (self.out_features, self.in_features), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, which is the dtype of the computation."""
        return _WidenedLinear.apply(x, self.codes, self.scales, self.bias, (self.out_features, self.in_features))


def quantize_(model: nn.Module, kind: str) -> nn.Module:
    """Replace the Linears in the blocks of a Flux or T5 in place, one at a time; everything else is kept.

    Raises:
        ValueError: an unknown kind, or a model without such Linears.
    """
    if kind not in (*QUANTIZED, "stored"):
        raise ValueError(f"--quantize: got {kind!r}, expected {', '.join(QUANTIZED)}.")
    chosen = {name: storage(name, kind) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not any(chosen.values()):
        raise ValueError(f"quantize_: {type(model).__name__} has no Linear in attention or MLP of a block.")
    for name in filter(chosen.get, chosen):
        model.set_submodule(name, QuantizedLinear.from_linear(model.get_submodule(name), chosen[name]))
    return model
