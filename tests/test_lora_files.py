"""A LoRA gives the same picture everywhere: diffusers and peft run live, ComfyUI's map of names is data below."""

import copy
import dataclasses
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from kontext_min import flow
from kontext_min.checkpoints import flux_modules, load_autoencoder, load_flux, metadata
from kontext_min.extras import export, lora_files, prompts
from kontext_min.extras.base import Weights
from kontext_min.extras.export import FP8, merge, narrow
from kontext_min.extras.lora_files import (
    FORMATS,
    Factors,
    emit,
    init_lora,
    load_lora,
    parse,
    purpose,
    read_lora,
    save_lora,
    strength_of,
    trained_with,
)
from kontext_min.extras.quantize import QuantizedLinear, quantize_
from kontext_min.flux import FluxParams
from kontext_min.lora import TARGETS, add_lora, lora_layers
from test_flux import random_pair
from test_lora import ARGS

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"
HIDDEN = 48
SIZE = (HIDDEN, 2, (4, 10, 10), 1, 2, 20, 12, True)
BLOCKS = r"double_blocks\.\d+\..*|single_blocks\.\d+\..*"
LORAS = {  # rank, alpha, targets
    "default": (4, 4, "attention-mlp"),
    "half": (4, 2, "attention"),
    "rank 1": (1, 3, r"single_blocks\.\d+\.linear[12]"),
    "odd": (7, 5, BLOCKS),
    "everything": (16, 1, "all"),
    "few": (3, 24, r"double_blocks\.0\.img_attn\.qkv|single_blocks\.1\.linear1|double_blocks\.0\.txt_mlp\.2"),
}


@pytest.fixture(scope="module")
def pair():
    return random_pair(*SIZE)


def pipeline(transformer):
    """FluxKontextPipeline around a transformer alone, for load_lora_weights."""
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxKontextPipeline(transformer=transformer, **dict.fromkeys(parts))


@torch.no_grad()
def ours_of(flux):
    img, ids, txt, txt_ids, t, y, g = ARGS
    return flux(img, ids[:1].expand(2, -1, -1), txt, txt_ids, t, y, g)


@torch.no_grad()
def theirs_of(transformer):
    img, ids, txt, txt_ids, t, y, g = ARGS
    return transformer(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, img_ids=ids[0],
        txt_ids=txt_ids[0], guidance=g, return_dict=False,
    )[0]  # fmt: skip


def with_lora(flux, rank, alpha, targets, seed=1, size=0.1):
    """A copy of the model with a random LoRA on it."""
    flux = copy.deepcopy(flux)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in add_lora(flux, rank, alpha, targets):
            p.copy_(size * torch.randn(p.shape, generator=generator))
    return flux


def scaled(flux, strength):
    flux = copy.deepcopy(flux)
    for layer in lora_layers(flux).values():
        layer.scale *= strength
    return flux


def close(a, b, tolerance=1e-5):
    """To 1e-5 of the largest value, which is about 1 here."""
    difference = (a - b).abs().max() / max(1, b.abs().max())
    assert difference <= tolerance, f"{difference:.1e}"


# ----------------------------------------------------------------------------------- what is written, in other programs


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", LORAS)
def test_diffusers_gives_our_output(pair, tmp_path, name, format):
    rank, alpha, targets = LORAS[name]
    if format == "kohya":  # what diffusers reads of it at this width: see the next test and outside_of_blocks
        known = [n for n in lora_layers(with_lora(pair[0], rank, alpha, targets)) if re.fullmatch(BLOCKS, n)]
        targets = "|".join(re.escape(n) for n in known if not n.endswith("linear1"))
    flux = with_lora(pair[0], rank, alpha, targets)
    base, expected = ours_of(pair[0]), ours_of(flux)
    assert (expected - base).abs().max() > 0.01  # the LoRA does something
    save_lora(flux, tmp_path / "a.safetensors", format)
    theirs = copy.deepcopy(pair[1])
    pipe = pipeline(theirs)
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    close(theirs_of(theirs), expected)
    pipe.set_adapters("a", 0.5)
    close(theirs_of(theirs), ours_of(scaled(flux, 0.5)))


@pytest.mark.parametrize("rank", [4, 7])  # of 4 diffusers looks whether it is a block diagonal
def test_diffusers_reads_linear1_of_kohya_at_the_official_width(tmp_path, rank):
    """Its rows, 3 x 3072 and 12288, are written into diffusers' kohya reader; what it makes of the file is applied."""
    torch.manual_seed(0)
    down, up, x = torch.randn(rank, 3072), torch.randn(7 * 3072, rank), torch.randn(3072)
    lora = {"single_blocks.3.linear1": Factors(down, up, 3.0)}
    lora_files.write_lora(tmp_path / "a.safetensors", lora, "kohya", {})
    state = FluxKontextPipeline.lora_state_dict(tmp_path / "a.safetensors")
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    names = [f"transformer.single_transformer_blocks.3.{part}" for part in parts]
    assert len(state) == 8
    got = torch.cat([state[f"{n}.lora_B.weight"] @ (state[f"{n}.lora_A.weight"] @ x) for n in names])
    expected = 3 / rank * up @ (down @ x)
    close(got / expected.abs().max(), expected / expected.abs().max())


def test_what_diffusers_drops_from_kohya_files_is_known(pair, tmp_path):
    """A LoRA outside of the blocks does nothing there; outside_of_blocks names it and train.py says so."""
    flux = with_lora(pair[0], 4, 4, "img_in|final_layer.linear")
    assert lora_files.outside_of_blocks(flux) == ["img_in", "final_layer.linear"]
    assert not lora_files.outside_of_blocks(with_lora(pair[0], 4, 4, BLOCKS))
    save_lora(flux, tmp_path / "a.safetensors", "kohya")
    theirs = copy.deepcopy(pair[1])
    pipeline(theirs).load_lora_weights(tmp_path / "a.safetensors")
    assert torch.equal(theirs_of(theirs), theirs_of(pair[1]))
    assert (ours_of(flux) - ours_of(pair[0])).abs().max() > 0.01


# ComfyUI's map for Flux, as of October 2025: comfy/lora.py lines 175-266, `model_lora_keys_unet` (any BFL name with
# `lora_unet_` and underscores; diffusers' names with `transformer.`), and comfy/utils.py line 568, `flux_to_diffusers`.
# Theirs -> (BFL, first row, rows), in units of the hidden size; no rows: all of them. The rows of norm_out are swapped.
COMFYUI_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0, 1), "attn.to_k": ("img_attn.qkv", 1, 1), "attn.to_v": ("img_attn.qkv", 2, 1),
    "attn.add_q_proj": ("txt_attn.qkv", 0, 1), "attn.add_k_proj": ("txt_attn.qkv", 1, 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2, 1),
    "attn.to_out.0": ("img_attn.proj",), "attn.to_add_out": ("txt_attn.proj",), "norm1.linear": ("img_mod.lin",),
    "norm1_context.linear": ("txt_mod.lin",), "ff.net.0.proj": ("img_mlp.0",),
    "ff.net.2": ("img_mlp.2",), "ff_context.net.0.proj": ("txt_mlp.0",), "ff_context.net.2": ("txt_mlp.2",),
}  # fmt: skip
COMFYUI_SINGLE = {
    "attn.to_q": ("linear1", 0, 1), "attn.to_k": ("linear1", 1, 1), "attn.to_v": ("linear1", 2, 1),
    "proj_mlp": ("linear1", 3, 4), "proj_out": ("linear2",), "norm.linear": ("modulation.lin",),
}  # fmt: skip
COMFYUI_REST = {
    "proj_out": ("final_layer.linear",), "norm_out.linear": ("final_layer.adaLN_modulation.1",),
    "x_embedder": ("img_in",), "context_embedder": ("txt_in",),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer",),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer",),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer",),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer",),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer",),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer",),
}  # fmt: skip


def comfyui_map(doubles, singles):
    """Name in a file, without its leaf -> (BFL module, first row, rows)."""
    table = {f"transformer.{theirs}": place for theirs, place in COMFYUI_REST.items()}
    for i in range(doubles):
        prefix = f"transformer.transformer_blocks.{i}."
        table |= {prefix + t: (f"double_blocks.{i}.{p[0]}", *p[1:]) for t, p in COMFYUI_DOUBLE.items()}
    for i in range(singles):
        prefix = f"transformer.single_transformer_blocks.{i}."
        table |= {prefix + t: (f"single_blocks.{i}.{p[0]}", *p[1:]) for t, p in COMFYUI_SINGLE.items()}
    bfl = {place[0] for place in table.values()}
    return table | {f"lora_unet_{name.replace('.', '_')}": (name,) for name in bfl}


def comfyui_reads(path, doubles, singles, shapes):
    """The corrections that ComfyUI would add to the weights: alpha / rank * up @ down at the rows of its map."""
    tensors, table, deltas = load_file(path), comfyui_map(doubles, singles), {}
    for key in sorted({re.sub(r"\.(lora_(A|B|up|down)\.weight|alpha)$", "", k) for k in tensors}):
        module, *rows = table[key]
        kohya = f"{key}.lora_down.weight" in tensors
        down = tensors.pop(f"{key}.lora_down.weight" if kohya else f"{key}.lora_A.weight")
        up = tensors.pop(f"{key}.lora_up.weight" if kohya else f"{key}.lora_B.weight")
        delta = tensors.pop(f"{key}.alpha", torch.tensor(len(down))).item() / len(down) * up @ down
        if key.endswith(".norm_out.linear"):
            delta = torch.cat(delta.chunk(2)[::-1])
        whole = deltas.setdefault(module, torch.zeros(shapes[module]))
        first, count = ((rows[0] * HIDDEN, rows[1] * HIDDEN)) if rows else (0, len(whole))
        assert len(delta) == count
        whole[first : first + count] += delta
    assert not tensors  # every key was known
    return deltas


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", LORAS)
def test_comfyuis_map_gives_our_corrections(pair, tmp_path, name, format):
    flux = with_lora(pair[0], *LORAS[name])
    save_lora(flux, tmp_path / "a.safetensors", format)
    layers = lora_layers(flux)
    shapes = {n: (m.base.out_features, m.base.in_features) for n, m in layers.items()}
    deltas = comfyui_reads(tmp_path / "a.safetensors", 1, 2, shapes)
    assert deltas.keys() == layers.keys()
    for n, layer in layers.items():
        close(deltas[n], (layer.scale * layer.lora_B @ layer.lora_A).detach(), 1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_names_and_shapes_of_the_official_depth_are_in_comfyuis_map(format):
    """Shapes in units of the hidden size H and the rank r, from the same source."""
    h, r = 8, 3
    modules, table = flux_modules(FluxParams()), comfyui_map(19, 38)
    shape = {"qkv": (3, 1), "linear1": (7, 1), "linear2": (1, 5), "0": (4, 1), "2": (1, 4), "proj": (1, 1)}
    lora = {}
    for name in modules:
        if re.fullmatch(TARGETS["attention-mlp"], name):
            out, columns = shape[name.split(".")[-1]]
            lora[name] = Factors(torch.ones(r, columns * h), torch.ones(out * h, r), 2)
    assert len(lora) == 19 * 8 + 38 * 2
    tensors = emit(lora, modules, format)
    kohya = format == "kohya"
    leaves = ("lora_down.weight", "lora_up.weight", "alpha") if kohya else ("lora_A.weight", "lora_B.weight")
    stems = {name.removesuffix("." + leaf) for name in tensors for leaf in leaves if name.endswith("." + leaf)}
    assert len(tensors) == len(leaves) * len(stems)
    assert stems == {k for k, place in table.items() if place[0] in lora and k.startswith("lora_unet_") == kohya}
    for stem in stems:
        module, *rows = table[stem]
        out, columns = shape[module.split(".")[-1]]
        assert tensors[f"{stem}.{leaves[0]}"].shape == (r, columns * h)
        assert tensors[f"{stem}.{leaves[1]}"].shape == ((rows[1] if rows else out) * h, r)


# --------------------------------------------------------------------------------------------- what others have written


def merged_by_hand(flux, deltas):
    """A copy of the model with corrections added to its weights, by our module names."""
    flux = copy.deepcopy(flux)
    with torch.no_grad():
        for name, delta in deltas.items():
            flux.get_submodule(name).weight += delta
    return flux


def put_peft_lora_on(theirs, pattern, rank, alpha, **more):
    """peft's own adapter, random, on a copy of diffusers' model; its output is the oracle."""
    from peft import LoraConfig

    theirs = copy.deepcopy(theirs)
    theirs.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, **more))
    randomise(theirs)
    return theirs


def randomise(module, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


PEFT_TARGETS = (
    r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_v_proj|to_add_out)|ff\.net\.0\.proj|proj_mlp|norm_out\.linear)"
)
PEFT = {  # different ranks of q, k and v; of k in one stream alone; alpha by pattern; rsLoRA
    "alpha is rank": {"rank": 4, "alpha": 4},
    "alpha": {"rank": 4, "alpha": 2},
    "patterns": {
        "rank": 4, "alpha": 3, "rank_pattern": {"to_q": 2, "to_v": 5, "proj_mlp": 6}, "alpha_pattern": {"to_q": 7},
    },
    "rslora": {"rank": 4, "alpha": 2, "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_lora_that_changed_its_base_is_refused_until_it_is_converted(pair, tmp_path, init):
    """peft takes the start of B A from the base when it makes such a LoRA, and the file does not say by how much."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=4, target_modules=PEFT_TARGETS, init_lora_weights=init)
    model = get_peft_model(copy.deepcopy(pair[1]), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "as it is")
    with pytest.raises(ValueError, match=f"was trained with init_lora_weights {init}, which changes the base too"):
        load_lora(copy.deepcopy(pair[0]), tmp_path / "as it is" / "adapter_model.safetensors")
    expected = theirs_of(model.base_model.model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    flux = copy.deepcopy(pair[0])
    load_lora(flux, tmp_path / "plain" / "adapter_model.safetensors")
    close(ours_of(flux), expected)


@pytest.mark.parametrize("case", PEFT)
@pytest.mark.parametrize("writer", ["pipeline", "model", "peft", "alpha tensors"])
def test_files_of_diffusers_and_peft(pair, tmp_path, case, writer):
    """pipeline: `transformer.` and metadata; model: no prefix; peft: adapter_config.json; alpha tensors, as kohya."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    if writer == "peft":
        more = dict(PEFT[case])
        config = LoraConfig(r=more.pop("rank"), lora_alpha=more.pop("alpha"), target_modules=PEFT_TARGETS, **more)
        model = get_peft_model(copy.deepcopy(pair[1]), config)
        randomise(model)
        model.save_pretrained(tmp_path)
        theirs, file = model.base_model.model, tmp_path / "adapter_model.safetensors"
    else:
        theirs = put_peft_lora_on(pair[1], PEFT_TARGETS, **PEFT[case])
        file = tmp_path / "pytorch_lora_weights.safetensors"
        state = get_peft_model_state_dict(theirs)
        if writer == "pipeline":
            metadata = {"transformer_lora_adapter_metadata": theirs.peft_config["default"].to_dict()}
            FluxKontextPipeline.save_lora_weights(tmp_path, transformer_lora_layers=state, **metadata)
        elif writer == "model":
            theirs.save_lora_adapter(tmp_path, weight_name=file.name)
        else:
            scaling = {n: m.scaling["default"] for n, m in theirs.named_modules() if hasattr(m, "scaling")}
            state |= {f"{n}.alpha": torch.tensor(s * len(state[f"{n}.lora_A.weight"])) for n, s in scaling.items()}
            save_file({f"transformer.{k}": v.contiguous() for k, v in state.items()}, file)
    expected = theirs_of(theirs)
    assert (expected - theirs_of(pair[1])).abs().max() > 0.01
    flux = copy.deepcopy(pair[0])
    load_lora(flux, file)
    close(ours_of(flux), expected)
    if case == "patterns":
        ranks = {name: len(layer.lora_A) for name, layer in lora_layers(flux).items()}
        assert ranks["double_blocks.0.img_attn.qkv"] == 2 + 4 + 5  # of q, k and v, joined
        assert ranks["single_blocks.0.linear1"] == 2 + 4 + 5 + 6
        assert ranks["double_blocks.0.txt_attn.qkv"] == 2 * 4
        merge(flux)
        close(ours_of(flux), expected)


def factors(shapes, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [0.1 * torch.randn(s, generator=generator) for s in ((rank, columns), (out, rank))]
        for name, (out, columns) in shapes.items()
    }


H = HIDDEN
BFL_SHAPES = {  # some of each kind
    "double_blocks.0.img_attn.qkv": (3 * H, H), "double_blocks.0.txt_attn.qkv": (3 * H, H), "img_in": (H, 16),
    "double_blocks.0.img_attn.proj": (H, H), "double_blocks.0.txt_attn.proj": (H, H), "final_layer.linear": (16, H),
    "double_blocks.0.img_mlp.0": (4 * H, H), "double_blocks.0.txt_mod.lin": (6 * H, H), "txt_in": (H, 20),
    "single_blocks.1.linear1": (7 * H, H), "single_blocks.0.linear2": (H, 5 * H), "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.1.modulation.lin": (3 * H, H), "final_layer.adaLN_modulation.1": (2 * H, H),
}  # fmt: skip
BFL_FORMATS = {  # prefix, dots, names of down and up, alpha
    "kohya": ("lora_unet_", "_", "lora_down.weight", "lora_up.weight", True),
    "diffusion_model, down/up": ("diffusion_model.", ".", "lora_down.weight", "lora_up.weight", True),
    "diffusion_model, A/B": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight", False),
    "bare": ("", ".", "lora_A.weight", "lora_B.weight", False),
    "bare, alpha": ("", ".", "lora_A.weight", "lora_B.weight", True),
    "fal": ("base_model.model.", ".", "lora_A.weight", "lora_B.weight", False),
}


@pytest.mark.parametrize("format", BFL_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_files_in_bfls_names(pair, tmp_path, format, dtype):
    prefix, dot, a, b, has_alpha = BFL_FORMATS[format]
    tensors, deltas = {}, {}
    for name, (down, up) in factors(BFL_SHAPES, 4, 5).items():
        key, down, up = prefix + name.replace(".", dot), down.to(dtype), up.to(dtype)
        tensors |= {f"{key}.{a}": down, f"{key}.{b}": up}
        if has_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(6.0).to(dtype)
        deltas[name] = (1.5 if has_alpha else 1) * up.float() @ down.float()
    save_file(tensors, tmp_path / "a.safetensors")
    flux = copy.deepcopy(pair[0])
    load_lora(flux, tmp_path / "a.safetensors")
    close(ours_of(flux), ours_of(merged_by_hand(pair[0], deltas)))


SPELLINGS = {  # of diffusers' names: prefix, dots, behind the name, down and up
    "OneTrainer": ("lora_transformer_", "_", "", "lora_down.weight", "lora_up.weight"),
    "kohya": ("lora_unet_", "_", "", "lora_down.weight", "lora_up.weight"),
    "kohya, underscore": ("lora_unet_", "_", "_", "lora_down.weight", "lora_up.weight"),
    "diffusion_model": ("diffusion_model.", ".", "", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_in_diffusers_names_spelled_otherwise(pair, tmp_path, spelling):
    """OneTrainer's are as documented; of these diffusers reads attention alone, and agrees."""
    prefix, dot, behind, down, up = SPELLINGS[spelling]
    theirs = put_peft_lora_on(pair[1], r".*attn\.(to_q|to_k|to_v|add_k_proj)", 4, 2)
    tensors = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "scaling"):
            key = prefix + name.replace(".", dot) + behind
            tensors[f"{key}.{down}"] = module.lora_A["default"].weight.detach()
            tensors[f"{key}.{up}"] = module.lora_B["default"].weight.detach()
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    assert any("single_transformer_blocks" in key for key in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    flux, again = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    load_lora(flux, tmp_path / "a.safetensors")
    close(ours_of(flux), theirs_of(theirs))
    if spelling == "OneTrainer":
        pipeline(again).load_lora_weights(tmp_path / "a.safetensors")
        close(ours_of(flux), theirs_of(again))


def scale_read(flux, path):
    flux = copy.deepcopy(flux)
    load_lora(flux, path)
    return lora_layers(flux)["double_blocks.0.img_mlp.2"].scale


@pytest.mark.parametrize("key", ["lora_alpha", "transformer.lora_alpha", "network_alpha", "alpha"])
def test_alpha_in_a_plain_key_of_the_header(pair, tmp_path, key):
    """Rank 16 and alpha 64 count 4, as elsewhere, and do so in what the file is converted to."""
    file, ff = tmp_path / "a.safetensors", "transformer.transformer_blocks.0.ff.net.2"
    tensors = {f"{ff}.lora_A.weight": torch.ones(16, 4 * H), f"{ff}.lora_B.weight": torch.ones(H, 16)}
    save_file(tensors, file, metadata={key: "64"})
    assert scale_read(pair[0], file) == 4
    for format in FORMATS:
        convert(file, tmp_path / format, "--format", format)
        flux = copy.deepcopy(pair[0])
        load_lora(flux, tmp_path / format)
        layer = lora_layers(flux)["double_blocks.0.img_mlp.2"]
        assert layer.scale * layer.lora_B[0, 0] == 4
    for bad in ("much", "nan", "inf"):
        save_file(tensors, file, metadata={key: bad})
        with pytest.raises(ValueError, match=f"has {key} = '{bad}', expected one finite number"):
            scale_read(pair[0], file)
    save_file(tensors, file, metadata={"lora_alpha": "64", key: "64.0"})
    assert scale_read(pair[0], file) == 4
    save_file(tensors, file, metadata={"lora_alpha": "32", "alpha": "64"})
    with pytest.raises(ValueError, match="has lora_alpha = '32', alpha = '64', expected one finite number"):
        scale_read(pair[0], file)
    save_file(tensors | {f"{ff}.alpha": torch.tensor(8.0)}, file, metadata={key: "64"})
    assert scale_read(pair[0], file) == 0.5  # the tensor is what every program reads


def test_alpha_that_should_be_beside_the_file(pair, tmp_path, capsys):
    """peft keeps it in adapter_config.json; a file that is copied alone, or renamed, has lost it."""
    ff, line = "base_model.model.transformer_blocks.0.ff.net.2", "no adapter_config.json beside it"
    tensors = {f"{ff}.lora_A.weight": torch.ones(16, 4 * H), f"{ff}.lora_B.weight": torch.ones(H, 16)}
    for name, config in (("adapter_model", False), ("mine", True), ("adapter_model", True)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        if config:
            (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 64}))
        read = name == "adapter_model" and config
        assert scale_read(pair[0], tmp_path / f"{name}.safetensors") == (4 if read else 1)
        assert (line in capsys.readouterr().err) != read


def test_a_rank_that_is_not_that_of_the_tensors_is_said(pair, tmp_path, capsys):
    """diffusers refuses such a file; a LoRA that was resized may have kept its header."""
    ff, file = "transformer.transformer_blocks.0.ff.net.2", tmp_path / "a.safetensors"
    tensors = {f"{ff}.lora_A.weight": torch.ones(32, 4 * H), f"{ff}.lora_B.weight": torch.ones(H, 32)}
    for rank, patterns in ((16, {}), (32, {}), (16, {"ff.net.2": 32})):
        config = {"transformer.r": rank, "transformer.lora_alpha": 32, "transformer.rank_pattern": patterns}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
        scale_read(pair[0], file)
        said = capsys.readouterr().err
        assert ("says rank 16, its tensors have 32; alpha is divided by" in said) == (rank == 16 and not patterns)


def test_the_folder_of_a_run_that_went_on_and_stopped_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    for where, steps in (("", 6), ("checkpoints/step-000006", 6), ("checkpoints/step-000042", 42)):
        (folder / where).mkdir(parents=True, exist_ok=True)
        tensors = {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 2)}
        save_file(tensors, folder / where / "lora.safetensors", {"kontext_min": json.dumps({"steps": steps})})
        for named in (folder, folder / "lora.safetensors", folder / where / "lora.safetensors"):
            lora_files.purpose([str(named)])
            went_on = steps == 42 and named != folder / where / "lora.safetensors"
            assert ("is of step 6; its run went on to" in capsys.readouterr().err) == went_on


def test_a_file_is_not_written_beside_the_config_of_another(tmp_path, capsys):
    tensors = {"transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.ones(16, 4 * H)}
    tensors |= {"transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.ones(H, 16)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 64}))
    out = tmp_path / "pytorch_lora_weights.safetensors"
    assert export.main(["convert", str(tmp_path / "adapter_model.safetensors"), str(out), "--format", "peft"]) == 2
    assert "would count its alpha again; choose another folder" in capsys.readouterr().err and not out.exists()


def test_alpha_beside_the_file(pair, tmp_path):
    ff = "transformer.transformer_blocks.0.ff.net.2"
    tensors = {f"{ff}.lora_A.weight": torch.ones(16, 4 * H), f"{ff}.lora_B.weight": torch.ones(H, 16)}
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        save_file(tensors, tmp_path / name)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 64}))
        assert scale_read(pair[0], tmp_path / name) == 4
        (tmp_path / "adapter_config.json").write_bytes(b"\xff{")
        with pytest.raises(ValueError, match=r"lora_adapter_metadata is not that of peft.*adapter_config\.json beside"):
            scale_read(pair[0], tmp_path / name)


def test_alpha_that_kohyas_converter_leaves_in_the_header(pair, tmp_path, capsys):
    """It multiplied alpha into the weights (as here `emit` does), so a second time would be wrong; a line says so."""
    ff, file = "transformer.transformer_blocks.0.ff.net.2", tmp_path / "a.safetensors"
    tensors = {f"{ff}.lora_A.weight": torch.ones(16, 4 * H), f"{ff}.lora_B.weight": torch.ones(H, 16)}
    for dim in ({}, {"ss_network_dim": "16"}):
        save_file(tensors, file, metadata={"ss_network_alpha": "64", **dim})
        assert scale_read(pair[0], file) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{file}: ss_network_alpha 64 in its header is ignored" in error
        assert "with 4 times the strength" in error
    # No line where it changes nothing, or where the tensors say it: the files of this project, and of kohya's trainer.
    for alpha, dim, more in (("48.0", "48", {}), ("Dynamic", "Dynamic", {}), ("None", "16", {}), ("16", "", {}),
                             ("8", "16", {f"{ff}.alpha": torch.tensor(8.0)})):  # fmt: skip
        save_file(tensors | more, file, metadata={"ss_network_alpha": alpha, "ss_network_dim": dim})
        assert scale_read(pair[0], file) == (0.5 if more else 1)
    assert not capsys.readouterr().err


def test_files_of_xlabs(pair, tmp_path):
    kinds = [(f"{kind}{i}", rows) for kind, rows in (("qkv_lora", 3), ("proj_lora", 1)) for i in (1, 2)]
    shapes = {f"double_blocks.0.processor.{kind}": (rows * H, H) for kind, rows in kinds}
    shapes |= {"single_blocks.1.processor.qkv_lora": (3 * H, H), "single_blocks.1.processor.proj_lora": (H, 5 * H)}
    tensors = {}
    for name, (down, up) in factors(shapes, 4, 6).items():
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    flux, theirs = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    load_lora(flux, tmp_path / "a.safetensors")
    pipeline(theirs).load_lora_weights(tmp_path / "a.safetensors")
    assert (ours_of(flux) - ours_of(pair[0])).abs().max() > 0.01
    close(ours_of(flux), theirs_of(theirs))


# ---------------------------------------------------------------------------------------------------------- round trips


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def convert(*argv):
    assert export.main(["convert", *map(str, argv)]) == 0


@pytest.mark.parametrize("name", LORAS)
def test_round_trip_over_peft(pair, tmp_path, name):
    """The correction comes back bit for bit if alpha / rank is a power of two, else within one rounding of float32."""
    rank, alpha, targets = LORAS[name]
    flux = with_lora(pair[0], rank, alpha, targets)
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    save_lora(flux, files[0], "kohya", {"kontext_min": json.dumps({"objective": "kontext"})})
    convert(files[0], files[1], "--format", "peft")
    convert(files[1], files[2])
    convert(files[2], files[3], "--format", "peft")
    same(load_file(files[1]), load_file(files[3]))
    first, last = (parse(load_file(f), {}, flux_modules(pair[0].params), f) for f in (files[0], files[2]))
    assert first.keys() == last.keys()
    exact = np.log2(alpha / rank) % 1 == 0
    for module, before in first.items():
        after = last[module]
        assert after.rank == rank == after.alpha
        assert torch.equal(after.down, before.down)
        close(after.up, before.scale * before.up, 0 if exact else 1e-7)
    for file, header_alpha in zip(files, (alpha, rank, rank, rank), strict=True):
        _, metadata = read_lora(file)
        assert trained_with(metadata, file) == {
            "objective": "kontext"
        }  # what it was trained for is not lost on the way
        assert metadata["ss_network_alpha"] == str(float(header_alpha))


def test_round_trip_of_different_ranks(pair, tmp_path):
    """peft -> one fused kohya entry, a block diagonal -> the same peft file again, with its parts and their ranks."""
    theirs = put_peft_lora_on(
        pair[1], r".*(to_q|to_v|proj_mlp|add_k_proj|norm_out\.linear)", 4, 4, rank_pattern={"to_q": 2, "proj_mlp": 3}
    )
    from peft.utils import get_peft_model_state_dict

    state = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(theirs).items()}
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    save_file(state, files[0])
    convert(files[0], files[1], "--format", "kohya")
    convert(files[1], files[2], "--format", "peft")
    assert load_file(files[1])["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (2 + 4 + 3, H)
    same(load_file(files[2]), state)
    assert read_lora(files[1])[1]["ss_network_dim"] == "Dynamic"
    assert read_lora(files[2])[1]["ss_network_dim"] == "Dynamic"


def test_the_format_follows_the_modules(pair, tmp_path):
    """kohya, unless diffusers would drop modules from it; and what is asked for."""
    for targets, format, expected in (
        ("attention", None, "lora_unet_"), ("all", None, "transformer."), ("img_in", "kohya", "lora_unet_"),
        ("attention", "peft", "transformer."),
    ):  # fmt: skip
        save_lora(with_lora(pair[0], 2, 2, targets), tmp_path / "a.safetensors", format)
        assert all(name.startswith(expected) for name in load_file(tmp_path / "a.safetensors"))


def test_converting_an_older_file_renews_its_hint(pair, tmp_path):
    about = {
        "kontext_min": json.dumps({"objective": "bridge"}),
        "modelspec.usage_hint": "old",
        "modelspec.title": "Mine",
    }
    save_lora(with_lora(pair[0], 2, 2, "attention"), tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "old.safetensors", metadata=about)
    convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    metadata = read_lora(tmp_path / "new.safetensors")[1]
    assert metadata["modelspec.usage_hint"].startswith(lora_files.BRIDGE) and metadata["modelspec.title"] == "Mine"


def test_tensors_may_be_left_out_by_name(pair, tmp_path, capsys):
    save_lora(with_lora(pair[0], 4, 4, "attention"), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    extra = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{x}": torch.ones(1, 1) for x in ("lora_up.weight", "alpha")}
    save_file(tensors | extra, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"text encoder.*--drop"):
        load_lora(copy.deepcopy(pair[0]), tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--drop", "lora_te1_")
    assert "2 tensors left out" in capsys.readouterr().out
    same(load_file(tmp_path / "c.safetensors"), tensors)


# ------------------------------------------------------------------------------------------------ several, and starting


def test_several_loras_add_up(pair, tmp_path):
    """Overlapping modules, different ranks, a negative strength; in either order, and on a quantised base."""
    loras = [with_lora(pair[0], 4, 2, "attention", 1), with_lora(pair[0], 3, 9, BLOCKS, 2)]
    strengths, deltas = (0.8, -0.4), {}
    for i, (lora, strength) in enumerate(zip(loras, strengths, strict=True)):
        save_lora(lora, tmp_path / f"{i}.safetensors")
        for name, layer in lora_layers(lora).items():
            deltas[name] = deltas.get(name, 0) + (strength * layer.scale * layer.lora_B @ layer.lora_A).detach()
    expected = ours_of(merged_by_hand(pair[0], deltas))
    for order in ((0, 1), (1, 0)):
        flux = copy.deepcopy(pair[0])
        for i in order:
            load_lora(flux, tmp_path / f"{i}.safetensors", strengths[i])
        assert not any(p.requires_grad for p in flux.parameters())
        close(ours_of(flux), expected)
    quantised = quantize_(copy.deepcopy(pair[0]), "int8")
    widened = copy.deepcopy(pair[0])
    for name, m in quantised.named_modules():
        if isinstance(m, QuantizedLinear):
            widened.get_submodule(name).weight.data = m.dequantize()
    for i in (0, 1):
        load_lora(quantised, tmp_path / f"{i}.safetensors", strengths[i])
    close(ours_of(quantised), ours_of(merged_by_hand(widened, deltas)))


def test_purpose_of_several(tmp_path, pair, capsys):
    about = [
        {"objective": "bridge", "source_noise": 0.1, "prompt": "first", "guidance": 2},
        {"objective": "bridge", "source_noise": 0.1, "prompt": "second", "degrade": "guide"},
        {"objective": "kontext"},
        {},
    ]
    names = []
    for i, a in enumerate(about):
        names.append(f"{tmp_path / f'{i}.safetensors'}={0.5 + i / 4}")
        lora = with_lora(pair[0], 1, 1 + i, "attention")
        save_lora(lora, tmp_path / f"{i}.safetensors", metadata={"kontext_min": json.dumps(a)} if a else None)
    assert purpose([names[3], names[0], names[1]]) == about[1] | about[0]
    assert (
        f"note: --lora {names[1]}: its prompt gives way to the first LoRA's, or to a flag\n" in capsys.readouterr().err
    )
    copy_of_one = shutil.copy(tmp_path / "1.safetensors", tmp_path / "copy.safetensors")
    purpose([names[1], str(copy_of_one)])
    assert f"note: --lora {copy_of_one}: is a copy of another; their strengths add up\n" in capsys.readouterr().err
    assert purpose([]) == {}
    with pytest.raises(ValueError, match="objective kontext, the one before it with bridge"):
        purpose([names[0], names[2]])


def test_a_training_starts_from_a_lora(pair, tmp_path):
    trained = with_lora(pair[0], 4, 6, "attention")
    save_lora(trained, tmp_path / "a.safetensors", "peft")
    for rank, alpha, targets in ((4, 6, "attention"), (4, 4, "attention-mlp"), (9, 3, "all")):
        flux = copy.deepcopy(pair[0])
        params = add_lora(flux, rank, alpha, targets)
        start = {n: layer.lora_A.detach().clone() for n, layer in lora_layers(flux).items()}
        init_lora(flux, tmp_path / "a.safetensors")
        close(ours_of(flux), ours_of(trained))
        assert all(p.requires_grad for p in params)
        for n, layer in lora_layers(flux).items():  # what the file does not set starts as ever
            new = 4 if n in lora_layers(trained) else 0
            assert torch.equal(layer.lora_A[new:], start[n][new:])
            assert not layer.lora_B[:, new:].any()
    flux = copy.deepcopy(pair[0])
    add_lora(flux, 3, 3, "attention")
    with pytest.raises(ValueError, match="rank is 4, the one to train 3"):
        init_lora(flux, tmp_path / "a.safetensors")
    flux = copy.deepcopy(pair[0])
    add_lora(flux, 4, 4, r"img_in")
    with pytest.raises(ValueError, match="do not train here; choose other --lora-targets"):
        init_lora(flux, tmp_path / "a.safetensors")


def test_a_training_says_which_of_several_loras_it_starts_from(pair, tmp_path, capsys):
    save_lora(
        with_lora(pair[0], 4, 6, "attention"), tmp_path / "lora.safetensors", None, {"kontext_min": '{"steps": 6}'}
    )
    later = tmp_path / "checkpoints" / "step-000042" / "lora.safetensors"
    later.parent.mkdir(parents=True)
    for copied in (tmp_path / "adapter_model.safetensors", later):
        shutil.copy(tmp_path / "lora.safetensors", copied)
    flux = copy.deepcopy(pair[0])
    add_lora(flux, 4, 6, "attention")
    init_lora(flux, tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"note: --init-lora {tmp_path}: is lora.safetensors there; not read is adapter_model.safetensors",
        f"note: --init-lora {tmp_path}: is of step 6; its run went on to {later}, and is not at its end",
    ]


# ------------------------------------------------------------------------------------------------------------ bad files


def more(**tensors):
    """The good file with tensors more, by name and shape, all ones."""
    return lambda good: good | {name: torch.ones(shape) for name, shape in tensors.items()}


def only(*names, shape=(4, 4)):
    return lambda good: {name: torch.ones(shape) for name in names}


def spoilt(change):
    """The good file with another up of one module."""
    return lambda good: good | {f"{KOHYA}.lora_up.weight": change(good[f"{KOHYA}.lora_up.weight"]).contiguous()}


KOHYA = "lora_unet_double_blocks_0_img_attn_qkv"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
WAN = "diffusion_model.blocks.0.self_attn.q"
PEFT_Q = "transformer.transformer_blocks.0.attn.to_q"
CLIP = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
BAD = {
    "LoKr": (only("lycoris_transformer_blocks_0_attn_to_q.lokr_w1"), "a LoKr (Kronecker products), which is not read"),
    "LoHa": (more(**{f"{KOHYA}.hada_w1_a": (4, 4)}), "a LoHa (Hadamard products), which is not read here"),
    "DoRA": (more(**{f"{KOHYA}.dora_scale": (4, 1)}), "a DoRA (directions and magnitudes)"),
    "DoRA of peft": (only(f"{PEFT_Q}.lora_magnitude_vector"), "a DoRA (directions and magnitudes)"),
    "OFT": (only(f"{KOHYA}.oft_blocks"), "an OFT (rotations)"),
    "Tucker": (more(**{f"{KOHYA}.lora_mid.weight": (4, 4)}), "a core tensor (Tucker)"),
    "diff": (more(**{f"{KOHYA}.diff_b": (4,)}), f"whole weights or biases, which is not read here ({KOHYA}.diff_b)"),
    "bias": (more(**{f"{PEFT_Q}.lora_B.bias": (4,)}), "differences of whole weights or biases"),
    "control": (more(**{"transformer.transformer_blocks.0.attn.norm_q.weight": (4,)}), "it looks like a control LoRA"),
    "text encoder": (more(**{f"{CLIP}.lora_A.weight": (4, 4)}), "a LoRA on a text encoder"),
    "SDXL": (only(f"{SDXL}.lora_down.weight", f"{SDXL}.lora_up.weight"), "it looks like a LoRA of Stable Diffusion"),
    "Wan": (only(f"{WAN}.lora_A.weight", f"{WAN}.lora_B.weight"), "it looks like a LoRA of Wan"),
    "deeper": (more(lora_unet_double_blocks_7_img_attn_proj=(4,)), "1 of 37 tensors belong to no Linear of this model"),
    "weights": (only("single_blocks.0.linear1.weight"), "it is no LoRA"),
    "empty": (lambda good: {}, "no tensors in it"),
    "wrong rank": (spoilt(lambda up: up[:, :3]), "[4, 48] and [144, 3], expected [rank, in] and [out, rank] of one"),
    "other width": (spoilt(lambda up: up.repeat(2, 1)), "[288, 4], expected [rank, 48] and [144, rank]"),
    "half of qkv": (spoilt(lambda up: up[:72]), "(double_blocks.0.img_attn.qkv) has shapes [4, 48] and [72, 4]"),
    "half of q": (only(f"{PEFT_Q}.lora_A.weight", shape=(4, 48)), "to_q.lora_A.weight has no up matrix beside it"),
    "alpha alone": (only(f"{KOHYA}.alpha", shape=()), f"{KOHYA}.alpha has no down and no up matrix beside it"),
    "whole and part": (more(**{f"{PEFT_Q}.lora_A.weight": (4, 48), f"{PEFT_Q}.lora_B.weight": (48, 4)}),
                       "img_attn.qkv is there as a whole and in parts"),
    "twice": (more(**{"double_blocks.0.img_attn.qkv.lora_A.weight": (4, 48)}), "are the same; expected one of them"),
    "rank 0": (lambda good: {k: v[:0] if "down" in k else v[:, :0] for k, v in good.items() if "_proj.lora" in k},
               "[0, 48] and [48, 0], expected"),
    "many alphas": (more(**{f"{KOHYA}.alpha": (4,)}), f"{KOHYA}.alpha has 4 values, expected one"),
    "NaN": (spoilt(lambda up: up * torch.nan), f"not finite in {KOHYA}.lora_up.weight"),
    "endless alpha": (lambda good: good | {f"{KOHYA}.alpha": torch.tensor(torch.inf)}, f"not finite in {KOHYA}.alpha"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_line_and_change_nothing(pair, tmp_path, capsys, case):
    spoil, message = BAD[case]
    save_lora(with_lora(pair[0], 4, 2, "attention-mlp"), tmp_path / "good.safetensors")
    save_file(spoil(load_file(tmp_path / "good.safetensors")), tmp_path / "bad.safetensors")
    flux = copy.deepcopy(pair[0])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_lora(flux, tmp_path / "bad.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'bad.safetensors'}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not lora_layers(flux)


def test_files_that_are_none(pair, tmp_path, capsys):
    save_lora(with_lora(pair[0], 4, 2, "attention-mlp"), tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    files = {"cut": whole[:-9], "header": whole[:100], "text": b"hello, I am no tensor"}
    for name, data in files.items():
        message = "truncated" if name in ("cut", "header") else "not a safetensors file"
        (tmp_path / name).write_bytes(data)
        assert export.main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out").exists()
    for text in ("[]", "{", '{"alpha_pattern": {"(": 1}}', '{"lora_alpha": "much"}'):
        save_file(
            {f"{PEFT_Q}.lora_A.weight": torch.ones(4, 48)}, tmp_path / "h", metadata={"lora_adapter_metadata": text}
        )
        with pytest.raises(ValueError, match="lora_adapter_metadata is not that of peft"):
            load_lora(copy.deepcopy(pair[0]), tmp_path / "h")
    contradiction = {f"{PEFT_Q}.lora_A.weight": torch.ones(4, 48), f"{PEFT_Q}.lora_B.weight": torch.ones(48, 4)}
    contradiction[f"{PEFT_Q}.alpha"] = torch.tensor(4.0)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    save_file(contradiction, tmp_path / "two.safetensors", metadata=header)
    with pytest.raises(ValueError, match="alpha is 4, but the header says 2"):
        load_lora(copy.deepcopy(pair[0]), tmp_path / "two.safetensors")


DEEP = "[" * 200_000
BAD_SETTINGS = {  # of kontext_min in the header -> what the message says behind the file's name
    DEEP: "kontext_min in its header is no JSON object",
    "[]": "kontext_min in its header is no JSON object",
    "{": "kontext_min in its header is no JSON object",
    '{"objective": "bridges"}': 'objective in its header: got "bridges", expected bridge or kontext.',
    '{"objective": ["bridge"]}': "objective in its header: got a list, expected bridge or kontext.",
    '{"context": "no"}': 'context in its header: got "no", expected true or false.',
    '{"context": 1}': "context in its header: got 1, expected true or false.",
    '{"source_noise": "0.1"}': 'source_noise in its header: got "0.1", expected a number from 0 to 1.',
    '{"source_noise": -0.1}': "source_noise in its header: got -0.1, expected a number from 0 to 1.",
    '{"start_time": 0}': "start_time in its header: got 0, expected a number above 0, at most 1.",
    '{"start_time": true}': "start_time in its header: got true, expected a number above 0, at most 1.",
    '{"guidance": NaN}': "guidance in its header: got NaN, expected a number from 0 to 100.",
    '{"guidance": 1e999}': "guidance in its header: got Infinity, expected a number from 0 to 100.",
    '{"guidance": null}': "guidance in its header: got null, expected a number from 0 to 100.",
    '{"guidance": -5}': "guidance in its header: got -5, expected a number from 0 to 100.",
    '{"guidance": 1e9}': "guidance in its header: got 1000000000.0, expected a number from 0 to 100.",
    '{"resolution": 0}': "resolution in its header: got 0, expected a whole number from 16 to 16384.",
    '{"resolution": 64.5}': "resolution in its header: got 64.5, expected a whole number from 16 to 16384.",
    '{"prompt": 7}': "prompt in its header: got 7, expected text.",
    '{"base": {"a": 1}}': "base in its header: got a dict, expected text.",
    '{"prompt": "\\ud800"}': 'prompt in its header: got "\\ud800", expected text.',
    '{"resolution": ' + "[" * 900 + "]" * 900 + "}": "resolution in its header: got a list",
}


@pytest.mark.parametrize("text", BAD_SETTINGS, ids=lambda text: text[:24])
def test_bad_settings_in_the_header_are_one_clear_line(pair, tmp_path, text):
    file = tmp_path / "a.safetensors"
    save_lora(with_lora(pair[0], 1, 1, "attention"), tmp_path / "good")
    save_file(load_file(tmp_path / "good"), file, metadata={"kontext_min": text})
    for read in (lambda: purpose([str(file)]), lambda: load_lora(copy.deepcopy(pair[0]), file)):
        with pytest.raises(ValueError, match=re.escape(f"{file}: {BAD_SETTINGS[text]}")) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    save_file(load_file(tmp_path / "good"), file, metadata={"lora_adapter_metadata": DEEP})
    with pytest.raises(ValueError, match="lora_adapter_metadata is not that of peft"):
        load_lora(copy.deepcopy(pair[0]), file)


def test_mistakes_on_the_command_line_are_one_clear_line(pair, tmp_path):
    run, empty = tmp_path / "run", tmp_path / "empty"
    for folder in (run, empty):
        folder.mkdir()
    save_lora(with_lora(pair[0], 1, 1, "attention"), run / "lora.safetensors")
    (tmp_path / "old.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "old.bin").write_bytes(b"\x80\x02\x8a\n" + bytes(100))
    (tmp_path / "q4.gguf").write_bytes(b"GGUF" + bytes(100))
    about = {"kontext_min": json.dumps({"objective": "bridge", "base": "0" * 16})}
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(3, 3)}, tmp_path / "base.safetensors", metadata=about)
    file = f"{run / 'lora.safetensors'}"
    for lora, message in (
        ("", "--lora '': no file name; expected FILE or FILE=STRENGTH."),
        ("=0.5", "--lora '=0.5': no file name"),
        (f"{file}=abc", "got strength 'abc', expected a number from -100 to 100"),
        (f"{file}=1e-6", "got strength '1e-6', expected a number from -100 to 100, or 0"),
        (f"{file}=", "got strength '', expected"),
        (f"{file}=nan", "got strength 'nan', expected"),
        (f"{file}=1e20", "got strength '1e20', expected"),
        (f"{file}=-101", "got strength '-101', expected"),
        (f"{empty}", "a folder without lora.safetensors"),
        (f"{tmp_path / 'nowhere'}=1", f"{tmp_path / 'nowhere'}: no such LoRA file"),
        (f"{tmp_path / 'lr=1' / 'lora.safetensors'}", "no such LoRA file"),
        (f"{tmp_path / 'old.pt'}", "a pickled PyTorch file, which can run code; convert it"),
        (f"{tmp_path / 'old.bin'}", "a pickled PyTorch file, which can run code; convert it"),
        (f"{tmp_path / 'q4.gguf'}", "a GGUF file of llama.cpp; use the safetensors file"),
        (f"{tmp_path / 'base.safetensors'}", "it is no LoRA (double_blocks.0.img_attn.qkv.weight)"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
            purpose([lora])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is given twice"):  # by two names
        purpose([f"{file}=0.5", f"{run}=0.5"])
    assert purpose([str(run)]) == {}
    assert strength_of(f"{run}=-1e-1") == (run, -0.1)
    load_lora(copy.deepcopy(pair[0]), run)
    equals = tmp_path / "a=0.5"
    equals.write_bytes((run / "lora.safetensors").read_bytes())
    assert strength_of(str(equals)) == (equals, 1.0)  # a file of that very name


# -------------------------------------------------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """weights/tiny's transformer, in bfloat16 as the official one, and a LoRA of the size that training gives."""
    folder = tmp_path_factory.mktemp("merge")
    flux = load_flux(TINY, dtype=torch.bfloat16)
    export.save_bfl(flux, folder / "base.safetensors")
    save_lora(with_lora(load_flux(TINY, dtype=torch.float32), 8, 8, BLOCKS, size=0.02), folder / "a.safetensors")
    return folder


def test_a_bfl_file_keeps_the_axes_of_its_positions(tmp_path):
    """No shape tells them, so that they would be taken for FLUX's part of a head."""
    tiny = load_flux(TINY, dtype=torch.float32)
    for axes in (tiny.params.axes_dim, (8, 12, 12)):
        flux = type(tiny)(dataclasses.replace(tiny.params, axes_dim=axes))
        export.save_bfl(flux, tmp_path / "flux.safetensors", {"kontext_min": "{}"})
        assert load_flux(tmp_path / "flux.safetensors").params.axes_dim == axes
        assert metadata(tmp_path / "flux.safetensors")["kontext_min"] == "{}"


def exact_weights(base, strength=1.0):
    """Ours names -> W + correction in float64, and the correction."""
    flux = load_flux(base / "base.safetensors", dtype=torch.float32)
    load_lora(flux, base / "a.safetensors", strength)
    deltas = {n: layer.scale * layer.lora_B.double() @ layer.lora_A.double() for n, layer in lora_layers(flux).items()}
    return {n: flux.get_submodule(n).base.weight.double() + delta for n, delta in deltas.items()}, deltas


@pytest.mark.parametrize("layout", ["hub", "bfl"])
def test_merged_file_is_the_model_with_its_lora(base, tmp_path, layout, capsys):
    out = tmp_path / ("hub" if layout == "hub" else "merged.safetensors")
    flags = ["--weights", base / "base.safetensors", "--lora", f"{base / 'a.safetensors'}=0.5", "--layout", layout]
    assert export.main(["merge", str(out), *map(str, flags), "--dtype", "float32"]) == 0
    assert "0.00 % of" in capsys.readouterr().out
    flux = load_flux(base / "base.safetensors", dtype=torch.float32)
    load_lora(flux, base / "a.safetensors", 0.5)
    merged = load_flux(out)
    args = tiny_args()
    assert (merged(*args) - load_flux(base / "base.safetensors", dtype=torch.float32)(*args)).abs().max() > 3e-4
    close(merged(*args), flux(*args))
    if layout == "hub":
        theirs = FluxTransformer2DModel.from_pretrained(out)
        img, ids, txt, txt_ids, t, y, g = args
        with torch.no_grad():
            expected = theirs(img, txt, y, t, ids[0], txt_ids[0], g, return_dict=False)[0]
        close(flux(*args), expected)


def tiny_args():
    torch.manual_seed(0)
    return (
        torch.randn(1, 6, 96), torch.rand(1, 6, 3).round(), torch.randn(1, 5, 96), torch.zeros(1, 5, 3),
        torch.tensor([0.4]), torch.randn(1, 64), torch.tensor([2.0]),
    )  # fmt: skip


def test_what_bfloat16_loses_is_counted(base, tmp_path, capsys):
    """The count against its definition: weights with a correction whose bfloat16 value is the same as without."""
    flags = ["--weights", base / "base.safetensors", "--lora", base / "a.safetensors"]
    assert export.main(["merge", str(tmp_path / "out"), *map(str, flags)]) == 0
    line = capsys.readouterr().out
    stored = load_flux(base / "base.safetensors")
    merged, (exact, deltas) = load_flux(tmp_path / "out"), exact_weights(base)
    lost = total = error = size = 0
    for name, weight in exact.items():
        after, before = merged.get_submodule(name).weight, stored.get_submodule(name).weight
        assert after.dtype == torch.bfloat16
        single = 2**-23 * weight.abs().max()  # a step of float32 at the largest weight: the sum itself is not exact
        assert ((after - weight).abs() <= 2**-8 * weight.abs() + single).all()  # rounded once: half a step at most
        lost += (after == before).sum().item()
        total += weight.numel()
        error += (after.double() - weight).square().sum().item()
        size += deltas[name].square().sum().item()
    assert 0.01 < lost / total < 0.5  # the case is one where something is lost
    assert f"{100 * lost / total:.2f} % of {total:,} corrected weights" in line
    assert f"errors are {100 * (error / size) ** 0.5:.3g} %" in line


def merge_to(out, base, *flags):
    flags = ["--weights", base / "base.safetensors", "--lora", base / "a.safetensors", *flags]
    assert export.main(["merge", *map(str, [out, *flags])]) == 0
    return out


def test_straight_to_fp8_is_more_exact_than_over_bfloat16(base, tmp_path):
    """Merged weights as codes: from the float32 sum, and from the sum rounded to bfloat16 first."""
    exact, _ = exact_weights(base)
    over = load_flux(merge_to(tmp_path / "over", base), dtype=torch.float32)
    straight = load_flux(merge_to(tmp_path / "out", base, "--layout", "bfl", "--quantize", "fp8"), dtype=torch.float32)
    errors = [0.0, 0.0]
    for name, w in exact.items():
        codes, scale = narrow(over.get_submodule(name).weight, FP8)
        errors[0] += (straight.get_submodule(name).weight - w).square().sum().item()
        errors[1] += (codes.float() * scale - w).square().sum().item()
    print(f"squared error straight / over bfloat16 = {errors[0] / errors[1]:.4f}")
    assert errors[0] < errors[1]


def test_fp8_has_the_layout_of_comfyuis_scaled_files(base, tmp_path):
    """Names, shapes and dtypes of Comfy-Org's file, and its arithmetic: W = codes * scale_weight."""
    out = merge_to(tmp_path / "out.safetensors", base, "--layout", "bfl", "--quantize", "fp8")
    sheet = json.loads((ROOT / "tests" / "layouts" / "comfy.flux1-dev-kontext_fp8_scaled.json").read_text())["tensors"]
    with safe_open(out, "pt") as f:
        found = {name: (f.get_slice(name).get_dtype(), f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    templates = {re.sub(r"\{[\d.]+\}", "N", name): stored for name, stored in sheet.items()}
    seen = set()
    for name, (dtype, shape) in found.items():
        template = re.sub(r"(?<=blocks\.)\d+", "N", name)
        assert dtype == templates[template]["dtype"], name
        assert len(shape) == len(templates[template]["shape"]), name
        seen.add(template)
    # Scales of the inputs are measured by running the model. Without them the marker must have two elements, by which
    # ComfyUI multiplies in the dtype of the inputs.
    assert {name for name in templates.keys() - seen if not name.endswith(".scale_input")} == set()
    tensors = load_file(out)
    assert tensors.pop("scaled_fp8").shape == (2,)
    state = load_flux(out, dtype=torch.float32).state_dict()
    exact, _ = exact_weights(base)
    for name, x in state.items():
        module, _, leaf = name.rpartition(".")
        scale = tensors[f"{module}.scale_weight"] if leaf == "weight" else torch.ones(())
        assert torch.equal(x, tensors[name].float() * scale), name
        if leaf == "weight":
            assert tensors[name].float().abs().max() == 448  # the whole range is used
        if leaf == "weight" and module in exact:  # half a step of e4m3's 3 bits, or of its smallest numbers
            assert ((x - exact[module]).abs() <= exact[module].abs() / 16 + 2**-10 * scale).all()


@pytest.mark.parametrize("stored", ["fp8 scaled", "fp8 without scales", "float32", "float32 beside a T5 in fp8"])
def test_any_base_is_rounded_once(base, tmp_path, stored):
    """To bfloat16, float32 or fp8 from the float32 sum; matrices without a LoRA keep their fp8 codes."""
    narrowed = tmp_path / "base.safetensors"
    flux = load_flux(base / "base.safetensors")
    if stored == "fp8 scaled":
        merge(flux, FP8)
        export.save_bfl(flux, narrowed)
    elif stored == "float32":
        export.save_bfl(load_flux(base / "base.safetensors", dtype=torch.float32), narrowed)
    elif stored.startswith("float32"):
        tensors = load_flux(base / "base.safetensors", dtype=torch.float32).state_dict()
        tensors = {f"model.diffusion_model.{name}": x for name, x in tensors.items()}
        save_file(tensors | {"text_encoders.t5xxl.transformer.shared.weight": torch.zeros(8, 8).to(FP8)}, narrowed)
    else:
        tensors = load_file(base / "base.safetensors")
        save_file({k: v.to(FP8) if v.ndim == 2 else v for k, v in tensors.items()}, narrowed)
    save_lora(with_lora(load_flux(TINY, dtype=torch.float32), 8, 8, r"single.*linear2", size=0.02), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "a.safetensors")
    exact = load_flux(narrowed, dtype=torch.float32)
    load_lora(exact, tmp_path / "a.safetensors")
    merge(exact)
    by_default = torch.float32 if stored.startswith("float32") else torch.bfloat16
    for flag, dtype in ((None, by_default), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        flags = ("--dtype", flag) if flag else ()
        merged = load_flux(merge_to(tmp_path / str(flag), tmp_path, *flags)).state_dict()
        for name, x in exact.state_dict().items():
            assert merged[name].dtype == dtype
            assert torch.equal(merged[name], x.to(dtype)), name
    again = load_file(merge_to(tmp_path / "fp8", tmp_path, "--quantize", "fp8", "--layout", "bfl"))
    for name, x in exact.state_dict().items():
        if name.endswith(".weight"):
            codes, scale = narrow(x, FP8)
            assert torch.equal(again[name].view(torch.uint8), codes.view(torch.uint8)), name
            assert again[f"{name.removesuffix('.weight')}.scale_weight"] == scale
            if stored == "fp8 scaled" and "linear2" not in name:
                assert torch.equal(again[name].view(torch.uint8), load_file(narrowed)[name].view(torch.uint8)), name


def test_merging_a_bridge_says_what_runs_it(base, tmp_path, capsys):
    flux = with_lora(load_flux(TINY, dtype=torch.float32), 1, 1, "single_blocks.0.linear2")
    about, out = {"objective": "bridge", "prompt": "Restore."}, tmp_path / "out"
    save_lora(flux, tmp_path / "a.safetensors", metadata={"kontext_min": json.dumps(about)})
    args = ["merge", str(out), "--weights", str(base / "base.safetensors")]
    assert export.main([*args, "--lora", str(tmp_path / "a.safetensors")]) == 0
    assert "diffusers does with docs/diffusers_bridge.py" in capsys.readouterr().out
    with safe_open(out / "diffusion_pytorch_model.safetensors", "pt") as f:
        assert trained_with(f.metadata(), out) == about | {"merged": ["a.safetensors"]}


def test_merging_says_what_is_wrong(base, tmp_path, capsys):
    args = ["merge", str(tmp_path / "out"), "--weights", str(base / "base.safetensors")]
    for flags, message in (
        (["--lora", str(base / "a.safetensors"), "--quantize", "fp8"], "no 8-bit weights; add --layout bfl"),
        (["--lora", str(tmp_path / "nowhere")], "no such LoRA file"),
        (["--lora", str(base / "base.safetensors")], "it is no LoRA"),
        (["--lora", f"{base / 'a.safetensors'}=1e20"], "got strength '1e20', expected a number from -100 to 100"),
        (["--lora", str(base / "a.safetensors")] * 2, "is given twice"),
    ):
        assert export.main([*args, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):  # int8 is in no layout that another program reads
        export.main([*args, "--lora", str(base / "a.safetensors"), "--layout", "bfl", "--quantize", "int8"])


def test_what_exists_is_not_replaced(base, tmp_path, capsys):
    """An output may be an input by mistake, and a merge takes long: both are found before the work."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    kept = (base / "a.safetensors").read_bytes()
    merging = ["--weights", str(base / "base.safetensors"), "--lora", str(base / "a.safetensors"), "--layout", "bfl"]
    for out, message in (
        (base / "a.safetensors", "exists already"),
        (tmp_path / "full", "exists already"),
        (tmp_path / "full" / "mine.txt" / "out", "can't write into"),
    ):
        for argv in (["convert", str(base / "a.safetensors"), str(out)], ["merge", str(out), *merging]):
            assert export.main(argv) == 2
            assert message in capsys.readouterr().err
    assert (base / "a.safetensors").read_bytes() == kept
    convert(base / "a.safetensors", tmp_path / "new" / "b.safetensors")  # the folder is made


def test_an_export_that_helps_nobody_says_so(base, tmp_path, capsys):
    source, out = str(base / "a.safetensors"), str(tmp_path / "out.safetensors")
    for argv, message in (
        (["convert", source, out, "--drop", "nosuch"], "--drop nosuch: no tensor of"),
        (["convert", source, out, "--drop", "lora", "--drop", "transformer", "--drop", "diffusion"], "--drop"),
        (["merge", out, "--weights", str(base / "base.safetensors"), "--lora", source], "the hub layout is a folder"),
    ):
        assert export.main(argv) == 2
        assert message in capsys.readouterr().err and not Path(out).exists()
    tensors, about = load_file(source), {"kontext_min": json.dumps({"objective": "bridge", "base": "another"})}
    save_file(tensors, tmp_path / "mine.safetensors", about)
    assert export.main(["convert", str(tmp_path / "mine.safetensors"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "other programs look for names that end with .safetensors" in said and "a bridge LoRA starts from" in said
    lora = str(tmp_path / "mine.safetensors")
    assert (
        export.main(["merge", str(tmp_path / "hub"), "--weights", str(base / "base.safetensors"), "--lora", lora]) == 0
    )
    assert "was trained on another base model" in capsys.readouterr().err
    path = {"objective": "bridge", "context": True, "start_time": 0.6, "merged": ["z"]}  # as --full writes it
    save_file(load_file(base / "base.safetensors"), tmp_path / "full.safetensors", {"kontext_min": json.dumps(path)})
    assert (
        export.main(
            ["merge", str(tmp_path / "both"), "--weights", str(tmp_path / "full.safetensors"), "--lora", source]
        )
        == 0
    )
    about = trained_with(metadata(tmp_path / "both" / "diffusion_pytorch_model.safetensors"), "")
    assert about == path | {"merged": ["z", "a.safetensors"]}, "sample.py follows the path of the base"


def test_each_network_that_is_another_one_is_named(capsys):
    here = {"base": "a", "vae": "b", "clip": "c", "t5": "d"}
    lora_files.note_other_base("x", here, here)
    lora_files.note_other_base("x", {"base": "a"}, here)  # of an older file
    assert capsys.readouterr().err == ""
    lora_files.note_other_base("x", {"base": "a", "vae": "?", "clip": "c", "t5": "?"}, here)
    assert capsys.readouterr().err.splitlines() == [
        f"note: x: was trained on another {n}, or another file of it" for n in ("autoencoder", "T5")
    ]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "convert", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("kontext_min.extras.export", run_name="__main__")
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith(f"export: {tmp_path / 'nowhere'}: no such LoRA file; train one")


# -------------------------------------------------------------------------------------------- from training to pictures


def run_training(folder, output, *more):
    """train.py on weights/tiny, small and short; returns its exit code."""
    flags = ["--hr-root", ROOT / "tests" / "photos", "--output-dir", output, "--cache-dir", folder / "cache"]
    flags += ["--objective", "kontext", "--resolution", 64, "--accumulate", 1, "--warmup", 0, "--workers", 0]
    return train.main([str(f) for f in [*flags, "--validate-every-epochs", 0, *more]])


@pytest.fixture(scope="module")
def kontext_run(tmp_path_factory):
    """A few steps of a kontext LoRA on weights/tiny, in the format that diffusers reads at this width."""
    folder = tmp_path_factory.mktemp("kontext")
    flags = ["--steps", 3, "--lr", 0.1, "--guidance", 2.5, "--rank", 4, "--alpha", 8]
    assert run_training(folder, folder / "run", *flags) == 0
    export.convert(folder / "run" / "lora.safetensors", folder / "peft.safetensors", "peft")
    return folder


def test_a_folder_with_two_loras_is_said(kontext_run, tmp_path, capsys):
    for name in ("lora.safetensors", "adapter_model.safetensors"):
        shutil.copy(kontext_run / "run" / "lora.safetensors", tmp_path / name)
    purpose([str(tmp_path)])
    said = f"note: --lora {tmp_path}: is lora.safetensors there; not read is adapter_model.safetensors\n"
    assert capsys.readouterr().err == said
    purpose([str(tmp_path / "adapter_model.safetensors")])
    assert capsys.readouterr().err == ""


def test_a_damaged_lora_is_named_when_it_is_converted(kontext_run, tmp_path, capsys):
    """The new file has a checksum of its own, which is right."""
    file = shutil.copy(kontext_run / "run" / "lora.safetensors", tmp_path)
    export.convert(file, tmp_path / "whole.safetensors", "peft")
    assert capsys.readouterr().err == ""
    with open(file, "r+b") as f:
        f.seek(-3000, os.SEEK_END)
        f.write(bytes(3000))
    export.convert(file, tmp_path / "new.safetensors", "peft")
    assert capsys.readouterr().err == f"note: {file}: its values are not those that train.py wrote\n"
    tensors, theirs = load_file(tmp_path / "whole.safetensors"), tmp_path / "theirs.safetensors"  # without a checksum
    save_file(tensors, theirs)
    whole = theirs.read_bytes()
    cut = whole[: len(whole) // 2].ljust(len(whole), b"\0")
    middle = sorted(name for name in tensors if "lora_A" in name)[0]  # of a block that somebody left out
    save_file({k: x * (k != middle) for k, x in tensors.items()}, theirs)
    for content, said in ((theirs.read_bytes(), False), (whole, False), (cut, True)):
        theirs.write_bytes(content)
        lora_files.note_doubts(theirs, *read_lora(theirs))
        pattern = rf"note: {theirs}: .*lora_A.weight and \d+ more: all zeros; was the download or the copy cut\?\n"
        assert bool(re.fullmatch(pattern, err := capsys.readouterr().err)) == said and bool(err) == said


def test_a_merge_says_once_what_it_reads(kontext_run, tmp_path, capsys):
    shutil.copy(kontext_run / "run" / "lora.safetensors", tmp_path / "lora.safetensors")
    shutil.copy(kontext_run / "peft.safetensors", tmp_path / "adapter_model.safetensors")
    flags = ["--weights", str(TINY), "--lora", str(tmp_path)]
    assert export.main(["merge", str(tmp_path / "merged"), *flags]) == 0
    assert capsys.readouterr().err.count("not read is adapter_model.safetensors") == 1
    assert export.main(["convert", str(tmp_path), str(tmp_path / "new.safetensors")]) == 0
    assert capsys.readouterr().err.count("not read is adapter_model.safetensors") == 1


def test_a_file_that_comes_while_another_is_exported_is_kept(kontext_run, tmp_path, monkeypatch):
    target, parse = tmp_path / "new.safetensors", export.parse
    monkeypatch.setattr(export, "parse", lambda *a: target.write_text("yours") and parse(*a))
    with pytest.raises(ValueError, match="exists already; name another place"):
        export.convert(kontext_run / "run" / "lora.safetensors", target, "peft")
    assert target.read_text() == "yours"
    target, merge = tmp_path / "merged.safetensors", export.merge
    monkeypatch.setattr(export, "merge", lambda *a: (merge(*a), target.write_text("yours"))[0])
    with pytest.raises(ValueError, match="exists already; name another place"):
        export.merge_files(TINY, [str(kontext_run / "run" / "lora.safetensors")], target, "bfl")
    assert target.read_text() == "yours"


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_flux_kontext_pipeline_draws_the_picture_of_sample_py(kontext_run, tmp_path, strength, capsys, monkeypatch):
    lora, seed, steps, size = kontext_run / "peft.safetensors", 7, 3, (96, 64)
    image = Image.open(ROOT / "tests" / "photos" / "bowl.jpg").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    image.save(tmp_path / "in.png")
    monkeypatch.setattr(sample, "compute_dtype", lambda *_: torch.float32)
    flags = ["--input", tmp_path / "in.png", "--seed", seed, "--steps", steps, "--tile", 96]
    assert sample.main([str(f) for f in [*flags, "--output", tmp_path / "a.png", "--lora", f"{lora}={strength}"]]) == 0
    assert f"kontext, {steps} network evaluations" in capsys.readouterr().out
    about = trained_with(read_lora(lora)[1], lora)
    ours = np.asarray(Image.open(tmp_path / "a.png"), dtype=int)

    pipe = FluxKontextPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    factor = load_autoencoder(TINY).factor
    shape = (1, pipe.vae.config.latent_channels, size[1] // factor, size[0] // factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def edit():
        return np.asarray(
            pipe(
                image=image, prompt=about["prompt"], height=size[1], width=size[0], max_area=size[0] * size[1],
                _auto_resize=False, num_inference_steps=steps, guidance_scale=about["guidance"],
                latents=flow.pack(noise), output_type="pil", max_sequence_length=prompts.max_length(Weights(TINY)),
            ).images[0],
            dtype=int,
        )  # fmt: skip

    without = edit()
    pipe.load_lora_weights(lora, adapter_name="a")
    pipe.set_adapters("a", strength)
    assert np.abs(edit() - ours).max() <= 1
    assert np.abs(without - ours).max() > 3  # the LoRA is seen in the picture


def test_header_says_what_it_was_trained_for(kontext_run):
    _, metadata = read_lora(kontext_run / "run" / "lora.safetensors")
    about = json.loads(metadata["kontext_min"])
    assert about["objective"] == "kontext"
    expected = {"guidance": 2.5, "source_noise": 0.0, "degrade": "guide", "rank": 4, "alpha": 8.0, "lr": 0.1}
    assert {k: about[k] for k in expected} == expected
    assert re.fullmatch(r"[0-9a-f]{16}", about["base"])
    for key, value in {
        "ss_network_dim": "4", "ss_network_alpha": "8.0", "ss_base_model_version": "flux1", "ss_learning_rate": "0.1",
        "modelspec.architecture": "flux-1-dev/lora", "modelspec.resolution": "64x64",
        "modelspec.trigger_phrase": about["prompt"],
    }.items():  # fmt: skip
        assert metadata[key] == value
    assert "lora_adapter_metadata" not in metadata  # ComfyUI would not heed it


def test_training_goes_on_from_a_lora(kontext_run, tmp_path):
    """With a learning rate that moves nothing the new run ends where the old one did, though its rank is higher."""
    lora, outputs = kontext_run / "run" / "lora.safetensors", []
    assert (
        run_training(kontext_run, tmp_path / "run", "--steps", 1, "--lr", 1e-7, "--rank", 6, "--init-lora", lora) == 0
    )
    for file in (lora, tmp_path / "run" / "lora.safetensors"):
        flux = load_flux(TINY, dtype=torch.float32)
        load_lora(flux, file)
        outputs.append(flux(*tiny_args()))
    close(outputs[1], outputs[0])
    assert read_lora(tmp_path / "run" / "lora.safetensors")[1]["ss_network_dim"] == "6"


def test_bad_starts_are_one_clear_line(kontext_run, tmp_path, capsys):
    lora = kontext_run / "run" / "lora.safetensors"
    for more, message in (
        (["--init-lora", lora, "--rank", 2], "its rank is 4, the one to train 2; expected --rank 4 or more"),
        (["--init-lora", tmp_path / "nowhere"], f"--init-lora {tmp_path / 'nowhere'}: no such file or folder"),
        (["--init-lora", lora, "--full"], "trains no LoRA (merge it: python -m"),
    ):
        assert run_training(kontext_run, tmp_path / "run", *more) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_two_loras_are_one_picture(tmp_path, capsys, monkeypatch):
    flux = with_lora(load_flux(TINY, dtype=torch.float32), 2, 2, "attention", size=0.3)
    for name, objective in (("a", "bridge"), ("b", "bridge"), ("c", "kontext")):
        about = {"kontext_min": json.dumps({"objective": objective})}
        save_lora(flux, tmp_path / f"{name}.safetensors", metadata=about)
    hints = [read_lora(tmp_path / f"{name}.safetensors")[1]["modelspec.usage_hint"] for name in "ac"]
    assert "starts from the latent of the degraded picture" in hints[0] and "use_dynamic_shifting=False" in hints[0]
    assert "reference" in hints[1] and "bridge" not in hints[1]
    Image.open(ROOT / "tests" / "photos" / "bowl.jpg").convert("RGB").crop((0, 0, 64, 48)).save(tmp_path / "in.png")
    # float32: in bfloat16 A and B are rounded, and the sum of two roundings is another number.
    flags = ["--input", tmp_path / "in.png", "--steps", 1]
    monkeypatch.setattr(sample, "compute_dtype", lambda *_: torch.float32)

    def run(output, *loras):
        more = [x for lora in loras for x in ("--lora", lora)]
        code = sample.main([str(f) for f in [*flags, "--output", tmp_path / output, *more]])
        return code, capsys.readouterr()

    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    assert run("1.png", f"{a}=0.75", f"{b}=0.25")[0] == 0
    assert run("2.png", a)[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{i}.png"), dtype=int) for i in (1, 2)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # 0.75 + 0.25 of the same LoRA
    assert run("3.png")[0] == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "3.png"), dtype=int) - pictures[0]).max() > 3
    code, said = run("4.png", a, c)
    assert code == 2
    assert "must follow one path" in said.err
