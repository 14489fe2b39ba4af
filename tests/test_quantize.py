"""Narrow storage: codes against their definition, sums against F.linear, errors against torchao, quanto, bitsandbytes.

python tests/test_quantize.py        prints the table of errors that stands in docs/memory.md (about a minute)
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from kontext_min.checkpoints import load_flux
from kontext_min.extras.parallel import compute_dtype
from kontext_min.extras.quantize import (
    NF4,
    QUANTIZED,
    QuantizedLinear,
    dequantize,
    load_quantized,
    quantize,
    quantize_,
)  # fmt: skip
from kontext_min.flux import DoubleStreamBlock, Flux, FluxParams, SingleStreamBlock, rope
from kontext_min.lora import add_lora
from test_checkpoints import random_flux, to_diffusers
from test_lora import ARGS

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights" / "tiny"


def normal(*shape, seed=0, scale=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def back(weight, kind):
    return dequantize(*quantize(weight, kind), weight.shape, torch.float32)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------------------------------------- the codes


@pytest.mark.parametrize("shape", [(300, 64), (7, 5), (1, 130)])  # more rows than are done at a time; nothing even
def test_every_code_is_the_nearest(shape):
    w = normal(*shape)
    codes, scales = quantize(w, "int8")
    assert codes.dtype == torch.int8
    assert codes.shape == shape
    assert scales.shape == (shape[0], 1)
    assert ((back(w, "int8") - w).abs() <= scales * 0.50001).all()

    codes, scales = quantize(w, "fp8")
    assert codes.dtype == torch.float8_e4m3fn
    step = torch.maximum(w.abs() / scales * 2.0**-4, torch.tensor(2.0**-10)) * scales  # half of 2^-3, or of 2^-9
    assert ((back(w, "fp8") - w).abs() <= step * 1.0001).all()

    codes, scales = quantize(w, "nf4")
    assert codes.dtype == torch.uint8
    blocks = F.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    assert codes.numel() == blocks.numel() // 2
    levels = torch.tensor(NF4) * scales.float()  # (blocks, 16)
    distance = (blocks[:, :, None] - levels[:, None, :]).abs().amin(dim=-1).flatten()[: w.numel()].view(shape)
    torch.testing.assert_close((back(w, "nf4") - w).abs(), distance, rtol=0, atol=1e-7)


def test_the_code_book_is_that_of_qlora():
    """Appendix E: the mean of neighbouring quantiles of a normal, 7 below zero, 8 above, scaled to +-1, and 0."""
    offset = 0.9677083  # (1 - 1/32 + 1 - 1/30) / 2, the tail that is cut off
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    above = quantile(torch.linspace(offset, 0.5, 9)[:-1])
    below = -quantile(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([above, below, torch.zeros(1)]).sort().values
    torch.testing.assert_close(torch.tensor(NF4), levels / levels.max(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_zero_stays_zero_and_scale_does_not_matter(kind):
    w = normal(64, 128)
    w[3] = 0
    assert torch.equal(back(w, kind)[3], torch.zeros(128))
    assert torch.equal(back(w * 2**10, kind), back(w, kind) * 2**10)
    assert relative(back(w.bfloat16(), kind), w) < 0.1


# ----------------------------------------------------------------------------------------------------------- the layer


def narrow_layer(linear, kind):
    """As --quantize makes it, or with the weight as the file has it, as --stream does."""
    return QuantizedLinear(linear, linear.weight.detach(), None) if kind == "stored" else (
        QuantizedLinear.from_linear(linear, kind)
    )  # fmt: skip


@pytest.mark.parametrize("kind", [*QUANTIZED, "stored"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_with_the_widened_weight(kind, bias):
    linear = nn.Linear(96, 160, bias=bias).bfloat16()
    layer = narrow_layer(linear, kind)
    assert (layer.in_features, layer.out_features) == (96, 160)
    assert not list(layer.parameters())
    if kind == "stored":
        assert layer.codes.data_ptr() == linear.weight.data_ptr()
    weight = layer.dequantize()
    assert weight.dtype == torch.float32
    assert weight.shape == (160, 96)

    x = normal(2, 5, 96, scale=1).requires_grad_(True)
    y = layer(x)
    y.square().sum().backward()
    dense = x.detach().clone().requires_grad_(True)
    expected = F.linear(dense, weight, linear.bias.detach().float() if bias else None)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, dense.grad)


@pytest.mark.parametrize("kind", [*QUANTIZED, "stored"])
def test_graph_keeps_the_codes_alone(kind):
    layer = narrow_layer(nn.Linear(256, 512).bfloat16(), kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, 256, requires_grad=True))
    assert sum(t.nbytes for t in saved) == layer.codes.nbytes + (0 if layer.scales is None else layer.scales.nbytes)
    assert layer.codes.nbytes <= 256 * 512 * (2 if kind == "stored" else 1)


def test_compiles_without_a_break():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 64), "nf4")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (3, 5):
        x, same = (torch.ones(2, length, 64, requires_grad=True) for _ in range(2))
        y, z = compiled(x), layer(same)
        torch.autograd.backward([y, z], [torch.ones_like(y)] * 2)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(x.grad, same.grad)


# ----------------------------------------------------------------------------------------------------------- the model


def test_which_layers_are_narrowed():
    flux = quantize_(random_flux(), "nf4")
    narrow = {n: m.codes.dtype for n, m in flux.named_modules() if isinstance(m, QuantizedLinear)}
    streams = [f"double_blocks.0.{s}_{m}" for s in ("img", "txt") for m in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    nf4 = {*streams, *(f"single_blocks.{i}.linear{j}" for i in (0, 1) for j in (1, 2))}
    int8 = {f"double_blocks.0.{s}_mod.lin" for s in ("img", "txt")} | {
        f"single_blocks.{i}.modulation.lin" for i in (0, 1)
    }
    assert narrow == dict.fromkeys(nf4, torch.uint8) | dict.fromkeys(int8, torch.int8)
    assert all(p.dtype == torch.float32 for p in flux.parameters())  # norms, embedders, last layer
    with pytest.raises(ValueError, match="--quantize: got 'int4', expected int8, fp8, nf4"):
        quantize_(flux, "int4")
    with pytest.raises(ValueError, match="no Linear in attention or MLP"):
        quantize_(nn.Linear(3, 3), "int8")


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_narrowed_on_load_as_after_it(tmp_path, layout, kind):
    flux = random_flux().bfloat16()
    state = flux.state_dict() if layout == "bfl" else to_diffusers(flux)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "f.safetensors")
    loaded = load_quantized(tmp_path / "f.safetensors", kind, torch.float32).state_dict()
    expected = quantize_(load_flux(tmp_path / "f.safetensors", dtype=torch.float32), kind).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_loading_never_holds_the_wide_model(tmp_path):
    """The peak of a process that loads int8 from a bfloat16 file of 170 MB is the codes and a few weights."""
    params = FluxParams(
        in_channels=16, out_channels=16, vec_in_dim=12, context_in_dim=20, hidden_size=768, num_heads=8, depth=1,
        depth_single_blocks=10, axes_dim=(12, 42, 42),
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Flux(params).state_dict().items()}
    state = {n: torch.full(s, 1e-3, dtype=torch.bfloat16) for n, s in shapes.items()}
    save_file(state, tmp_path / "f.safetensors")
    wide = sum(x.nbytes for x in state.values()) / 1e6
    code = (
        "import re, sys, torch\nfrom kontext_min.extras.quantize import load_quantized\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3\n"
        "load_quantized(sys.argv[2], 'int8', torch.bfloat16)\nbefore = peak()\n"  # torch itself, threads and the like
        "model = load_quantized(sys.argv[1], 'int8', torch.bfloat16)\nprint(peak() - before)"
    )
    command = [sys.executable, "-c", code, tmp_path / "f.safetensors", WEIGHTS]
    # One thread, and freed buffers go back to the system: what glibc keeps is not what this is about.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    more, largest = float(done.stdout), max(x.nbytes for x in state.values()) / 1e6
    assert more < wide / 2 + 2 * largest < wide


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale", None])
def test_fp8_files_keep_their_fp8(tmp_path, spelling):
    """With --quantize fp8 or int8 the codes of the file are used: no second rounding; nf4 narrows them further."""
    state = {}
    for name, tensor in random_flux().state_dict().items():
        if spelling is None or tensor.ndim == 1:
            state[name] = tensor.to(torch.bfloat16 if spelling else torch.float8_e4m3fn)
            continue
        scale = tensor.abs().max() / 448
        state[name] = (tensor / scale).to(torch.float8_e4m3fn)
        state[f"{name.removesuffix('.weight')}.{spelling}"] = scale
    file = tmp_path / "fp8.safetensors"
    save_file(state, file)
    widened = load_flux(file, dtype=torch.float32)(*ARGS)
    for kind in ("fp8", "int8"):
        flux = load_quantized(file, kind, torch.float32)
        for name in ("double_blocks.0.img_mlp.0", "single_blocks.1.linear1", "single_blocks.1.modulation.lin"):
            codes = flux.get_submodule(name).codes
            assert torch.equal(codes.view(torch.uint8), state[f"{name}.weight"].view(torch.uint8))
        assert torch.equal(flux(*ARGS), widened)
    nf4 = load_quantized(file, "nf4", torch.float32).double_blocks[0]
    assert (nf4.img_mlp[0].codes.dtype, nf4.img_mod.lin.codes.dtype) == (torch.uint8, torch.float8_e4m3fn)


def test_lora_on_quantized_layers_learns(tmp_path):
    flux = quantize_(random_flux(), "nf4")
    params = add_lora(flux, 2, targets="all")
    assert len(params) == 2 * sum(hasattr(m, "in_features") for m in random_flux().modules())
    flux(*ARGS).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in params)


def test_dtype():
    cpu = torch.device("cpu")
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("float32", torch.device("cuda")) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    units = any(torch.cpu.get_capabilities().get(flag) for flag in ("amx_bf16", "avx512_bf16"))
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if units else torch.float32)


# ---------------------------------------------------------------------------------------------------------- the errors


def tiny_inputs(flux):
    """A golden input's sizes do not fit weights/tiny: 8x8 tokens and 16 of text, from a seed."""
    p, ids = flux.params, torch.zeros(2, 64, 3)
    ids[..., 1], ids[..., 2] = torch.arange(64) // 8, torch.arange(64) % 8
    img, txt, y = (
        normal(2, *s, seed=7, scale=1) for s in ((64, p.in_channels), (16, p.context_in_dim), (p.vec_in_dim,))
    )
    return img, ids, txt, torch.zeros(2, 16, 3), torch.tensor([0.3, 0.9]), y, torch.tensor([1.5, 1.5])


@torch.no_grad()
def tiny_error(kind):
    """Relative error of the velocity of weights/tiny."""
    flux = load_flux(WEIGHTS, dtype=torch.float32)
    expected = flux(*tiny_inputs(flux))
    return relative(quantize_(flux, kind)(*tiny_inputs(flux)), expected)


@torch.no_grad()
def block_error(kind, cls, hidden):
    """Relative error of what a random block adds to its input; 16 picture and 16 text tokens."""
    torch.manual_seed(1)
    double = cls is DoubleStreamBlock
    block = cls(FluxParams(hidden_size=hidden, num_heads=hidden // 128))
    for p in block.parameters():
        if p.ndim == 2:
            p.normal_(std=p.shape[1] ** -0.5)
    ids = torch.zeros(1, 32, 3)
    ids[:, 16:, 1] = torch.arange(16)
    img, txt, vec = (normal(1, *s, seed=3, scale=1) for s in ((16, hidden), (16, hidden), (hidden,)))
    x = (img, txt) if double else (torch.cat([txt, img], dim=1),)
    model = nn.Module()
    setattr(model, "double_blocks" if double else "single_blocks", nn.ModuleList([block]))

    def added():
        y = block(*x, vec, rope(ids, (16, 56, 56), 10_000))
        return torch.cat([a - b for a, b in zip(y if double else (y,), x, strict=True)], dim=1)

    expected = added()
    quantize_(model, kind)
    return relative(added(), expected)


# Measured 0.0071, 0.0203 and 0.0691 on weights/tiny, and 0.015, 0.042 and 0.148 on blocks: the more of the velocity
# comes from the blocks, the more of their error. The first three change when weights/tiny is trained anew.
BOUNDS = {"int8": (0.009, 0.02), "fp8": (0.025, 0.06), "nf4": (0.085, 0.2)}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_error_of_the_velocity(kind):
    assert tiny_error(kind) < BOUNDS[kind][0]


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("cls", [DoubleStreamBlock, SingleStreamBlock])
@pytest.mark.parametrize("hidden", [256, pytest.param(3072, marks=pytest.mark.slow)])
def test_error_of_random_blocks(kind, cls, hidden):
    assert block_error(kind, cls, hidden) < BOUNDS[kind][1]


def test_int8_and_fp8_against_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    for kind, config in (("int8", "Int8WeightOnlyConfig"), ("fp8", "Float8WeightOnlyConfig")):
        linear, w = nn.Linear(768, 512, bias=False), normal(512, 768)
        linear.weight.data = w.clone()
        theirs = nn.Sequential(linear)
        quantization.quantize_(theirs, getattr(quantization, config)())
        assert relative(back(w, kind), w) <= relative(theirs[0].weight.dequantize(), w) * (1 + 1e-6)


def test_int8_against_quanto():
    quanto = pytest.importorskip("optimum.quanto")
    theirs, w = nn.Sequential(nn.Linear(768, 512, bias=False)), normal(512, 768)
    theirs[0].weight.data = w.clone()
    quanto.quantize(theirs, weights=quanto.qint8)
    quanto.freeze(theirs)
    assert relative(back(w, "int8"), w) <= relative(theirs[0].weight.dequantize(), w) * (1 + 1e-6)


def test_nf4_against_bitsandbytes():
    """Ours is below theirs with 8-bit scales, and 2e-4 at most above theirs with float32 scales, twice as large."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = normal(512, 768)
    ours = relative(back(w, "nf4"), w)
    for double, factor in ((True, 1.0), (False, 1.0002)):
        codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)
        assert ours <= relative(functional.dequantize_4bit(codes, state), w) * factor
    assert (back(w, "nf4") - functional.dequantize_4bit(codes, state)).abs().max() <= w.abs().max() * 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTIZED)
def test_on_a_gpu_as_on_the_cpu(kind):
    """Codes are the same; in bfloat16 the velocity is as far from float32 as that of the plain model."""
    flux = load_flux(WEIGHTS, dtype=torch.float32)
    here = quantize_(copy.deepcopy(flux), kind)
    there = load_quantized(WEIGHTS, kind, torch.bfloat16, "cuda")
    for name, tensor in here.state_dict().items():
        if name.endswith("codes"):
            same = (tensor.view(torch.uint8) == there.state_dict()[name].cpu().view(torch.uint8)).float().mean()
            assert same > 0.999, name  # a division may round another way
    inputs = tiny_inputs(flux)
    with torch.no_grad():
        expected = here(*inputs)
        img, ids, txt, txt_ids, t, y, guidance = (x.cuda() for x in inputs)
        got = there(img.bfloat16(), ids, txt.bfloat16(), txt_ids, t, y.bfloat16(), guidance).float().cpu()
    assert relative(got, expected) < 0.02


def main():
    print(f"{'':30}" + "".join(f"{kind:>9}" for kind in QUANTIZED))
    rows = {"weight, normal": lambda kind: relative(back(normal(3072, 3072), kind), normal(3072, 3072))}
    rows["velocity, weights/tiny"] = tiny_error
    rows["double block, width 3072"] = lambda kind: block_error(kind, DoubleStreamBlock, 3072)
    rows["single block, width 3072"] = lambda kind: block_error(kind, SingleStreamBlock, 3072)
    for name, error in rows.items():
        print(f"{name:30}" + "".join(f"{error(kind):9.4f}" for kind in QUANTIZED), flush=True)


if __name__ == "__main__":
    main()
