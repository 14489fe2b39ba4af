"""Official layouts land on the networks, one tensor on one parameter; wrong files are refused in one clear line."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_min import checkpoints
from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.checkpoints import Stored, load_autoencoder, load_clip, load_flux, load_t5
from kontext_min.clip import ClipParams, ClipTextEncoder
from kontext_min.flux import Flux, FluxParams
from kontext_min.t5 import T5Encoder, T5Params

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PARAMETERS = {"transformer": 11_901_408_320, "vae": 83_819_683, "clip": 123_060_480, "t5": 4_762_310_656}


def sheet(name: str) -> dict[str, Stored]:
    """A layout sheet as headers: a key with {a..b} stands for one tensor for each number."""
    headers = {}
    for key, entry in json.loads((HERE / "layouts" / f"{name}.json").read_text())["tensors"].items():
        ranges = [(m.group(0), range(int(m[1]), int(m[2]) + 1)) for m in re.finditer(r"\{(\d+)\.\.(\d+)\}", key)]
        names = [key]
        for text, numbers in ranges:
            names = [n.replace(text, str(i), 1) for n in names for i in numbers]
        for n in names:
            headers[n] = Stored(tuple(entry["shape"]), entry["dtype"], Path(name), n)
    return headers


SHEETS = [
    ("flux1-kontext-dev.bfl", "transformer"),
    ("transformer.diffusers", "transformer"),
    ("comfy.flux1-dev-kontext_fp8_scaled", "transformer"),
    ("kijai.flux1-kontext-dev-fp8-e4m3fn", "transformer"),
    ("ae.bfl", "vae"),
    ("vae.diffusers", "vae"),
    ("text_encoder.clip_l", "clip"),
    ("comfy.clip_l", "clip"),
    ("text_encoder_2.t5xxl", "t5"),
    ("comfy.t5xxl_fp16", "t5"),
    ("comfy.t5xxl_fp8_e4m3fn", "t5"),
    ("comfy.t5xxl_fp8_e4m3fn_scaled", "t5"),
]


def full_size(part: str, headers: dict[str, Stored]):
    """Network on meta with the sizes that the shapes tell, and the map onto it."""
    network, infer, _, modules = checkpoints._NETWORKS[part]
    headers = checkpoints.strip_prefix(headers, part)
    params = infer(headers, {})
    with torch.device("meta"):
        model = network(params)
    return model, params, checkpoints.sources_of(model, headers, modules(params) if modules else {}, part)


@pytest.mark.parametrize(("name", "part"), SHEETS)
def test_every_official_tensor_lands_on_exactly_one_parameter(name, part):
    headers = sheet(name)
    assert len(headers) == json.loads((HERE / "layouts" / f"{name}.json").read_text())["tensor_count"]
    model, params, sources = full_size(part, headers)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[part]
    used = [s for names in sources.values() for s in names]
    assert len(used) == len(set(used))
    left = set(checkpoints.strip_prefix(headers, part)) - set(used)
    allowed = checkpoints.SCALES + checkpoints.IGNORED + ("encoder.embed_tokens.weight",)
    assert all(name.endswith(allowed) for name in left)
    official = {"transformer": FluxParams(), "vae": AutoencoderParams()}
    assert part not in official or params == official[part]  # the defaults ARE the official sizes


@pytest.mark.parametrize(
    ("name", "part", "prefix"),
    [
        ("flux1-kontext-dev.bfl", "transformer", "model.diffusion_model."),
        ("ae.bfl", "vae", "vae."),
        ("comfy.clip_l", "clip", "text_encoders.clip_l.transformer."),
        ("comfy.t5xxl_fp16", "t5", "text_encoders.t5xxl.transformer."),
    ],
)
def test_all_in_one_prefixes(name, part, prefix):
    others = {"vae.x": Stored((1,), "F16"), "model.diffusion_model.y": Stored((1,), "F16")}
    headers = {prefix + n: s for n, s in sheet(name).items()}
    headers |= {n: s for n, s in others.items() if not n.startswith(prefix)}
    model, _, _ = full_size(part, headers)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[part]


@pytest.mark.parametrize(("name", "part"), [s for s in SHEETS if "fp8_scaled" in s[0] or s[0] == "text_encoder.clip_l"])
def test_the_other_spelling(name, part):
    """New spelling of the fp8 scales with its extra tensors; CLIP without `text_model.` and with third-party extras."""
    headers = {}
    for key, stored in sheet(name).items():
        key = key.replace("scale_weight", "weight_scale").replace("scale_input", "input_scale")
        headers[key.removeprefix("text_model.")] = stored
    headers.pop("scaled_fp8", None)
    if part == "clip":
        headers |= {"text_projection.weight": Stored((768, 768), "F16"), "logit_scale": Stored((), "F32")}
        headers |= {"embeddings.position_ids": Stored((1, 77), "I64")}
    else:
        headers |= {
            k.replace("weight_scale", "comfy_quant"): Stored((27,), "U8") for k in headers if "weight_scale" in k
        }
    model, _, _ = full_size(part, headers)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[part]


def test_t5_with_either_or_both_copies_of_the_embedding(tmp_path):
    state = load_file(GOLDEN / "t5_tiny.safetensors")
    params = T5Params(**_fields(T5Params, json.loads((GOLDEN / "t5_tiny.json").read_text())["config"]))
    copies = [dict(state), dict(state), dict(state)]
    copies[1]["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    copies[2]["encoder.embed_tokens.weight"] = copies[2].pop("shared.weight")
    for i, tensors in enumerate(copies):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        model = load_t5(tmp_path / f"{i}.safetensors", params)
        assert torch.equal(model.state_dict()["shared.weight"], state["shared.weight"])


def _fields(cls: type, config: dict) -> dict:
    return {k: v for k, v in config.items() if k in cls.__dataclass_fields__}


TINY = FluxParams(
    in_channels=16, out_channels=16, vec_in_dim=12, context_in_dim=20, hidden_size=48, num_heads=2, depth=1,
    depth_single_blocks=2, axes_dim=(4, 10, 10), mlp_ratio=2.0,
)  # fmt: skip


def random_flux(params: FluxParams = TINY, seed: int = 0) -> Flux:
    torch.manual_seed(seed)
    model = Flux(params)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def to_diffusers(model: Flux) -> dict[str, torch.Tensor]:
    """The inverse map, written here a second time and by hand: split rows, swap the halves of the last layer."""
    d, state = model.params.hidden_size, model.state_dict()
    out = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        names = checkpoints.flux_modules(model.params)[module]
        if name.startswith("final_layer.adaLN"):
            tensor = torch.cat([tensor[d:], tensor[:d]])
        sizes = [d, d, d, len(tensor) - 3 * d][: len(names)] if len(names) > 1 else [len(tensor)]
        for their, rows in zip(names, tensor.split(sizes), strict=True):
            out[f"{their}.{'weight' if leaf == 'scale' else leaf}"] = rows.clone()
    return out


def test_both_layouts_give_the_same_weights(tmp_path):
    model = random_flux()
    save_file(model.state_dict(), tmp_path / "bfl.safetensors")
    save_file(to_diffusers(model), tmp_path / "diffusers.safetensors")
    for file in ("bfl", "diffusers"):
        loaded = load_flux(tmp_path / f"{file}.safetensors")
        assert loaded.params == TINY
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), (file, name)
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


def test_shards_and_index(tmp_path):
    model = random_flux()
    state, folder = to_diffusers(model), tmp_path / "transformer"
    folder.mkdir()
    names = sorted(state)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({n: state[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in halves.items() for n in part}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for path in (folder, tmp_path):  # its own folder, and the hub folder around it
        assert torch.equal(load_flux(path).img_in.weight, model.img_in.weight)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 2 shards, not there: b\.safetensors"):
        load_flux(tmp_path)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_fp8_is_widened_with_its_scale(tmp_path, spelling):
    model = random_flux()
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[name.replace("weight", spelling)] = scale
            state[name.replace("weight", "scale_input")] = torch.tensor(1.0)
        else:
            state[name] = tensor.bfloat16()
    state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "fp8.safetensors")
    loaded = load_flux(tmp_path / "fp8.safetensors", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        expected = tensor
        if tensor.ndim == 2:
            expected = state[name].float() * state[name.replace("weight", spelling)]
            assert (expected - tensor).abs().max() < tensor.abs().max() / 16  # e4m3 keeps 3 bits behind the first
        assert torch.allclose(loaded.state_dict()[name], expected, atol=0.01 if tensor.ndim == 1 else 0)
    assert load_flux(tmp_path / "fp8.safetensors").img_in.weight.dtype == torch.bfloat16


def test_plain_fp8_cast(tmp_path):
    model = random_flux()
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in model.state_dict().items()}, tmp_path / "fp8.safetensors")
    loaded = load_flux(tmp_path / "fp8.safetensors", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.float8_e4m3fn).float())


def test_memory_is_mapped_not_copied(tmp_path):
    """Every parameter of a file in our names and dtype lies inside the mapping of that file."""
    file = tmp_path / "f.safetensors"
    save_file(random_flux().state_dict(), file)
    model = load_flux(file)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    assert ranges
    for name, p in model.named_parameters():
        assert any(low <= p.data_ptr() < high for low, high in ranges), name


def test_golden_files_load_from_metadata_and_from_shapes():
    flux = load_flux(GOLDEN / "flux_tiny.bfl.safetensors")
    assert flux.params.axes_dim == (4, 10, 10)
    headers = checkpoints.read_headers([GOLDEN / "flux_tiny.bfl.safetensors"])
    assert checkpoints.flux_params(headers, {}) == flux.params
    headers = checkpoints.read_headers([GOLDEN / "ae_tiny.bfl.safetensors"])
    assert checkpoints.autoencoder_params(headers, {}) == load_autoencoder(GOLDEN / "ae_tiny.bfl.safetensors").params


# ------------------------------------------------------------------------------------------------------ wrong files


def test_missing_extra_and_misshapen_are_all_named(tmp_path):
    state = dict(random_flux().state_dict())
    del state["txt_in.bias"]
    state["img_in.bias"] = torch.zeros(7)
    state["something.else"] = torch.zeros(1)
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(ValueError) as error:
        load_flux(tmp_path / "f.safetensors")
    line = str(error.value)
    assert "1 missing (txt_in.bias)" in line
    assert "1 unexpected (something.else)" in line
    assert "1 misshapen (img_in.bias [7] for [48])" in line
    assert str(tmp_path / "f.safetensors") in line
    assert "\n" not in line


def test_wrong_kinds_are_recognised(tmp_path):
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors"
    )
    with pytest.raises(ValueError, match="a LoRA: give it to --lora"):
        load_flux(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="looks like the autoencoder"):
        load_flux(GOLDEN / "ae_tiny.bfl.safetensors")
    with pytest.raises(ValueError, match="looks like the Flux transformer"):
        load_autoencoder(GOLDEN / "flux_tiny.bfl.safetensors")
    with pytest.raises(ValueError, match="looks like the CLIP text encoder"):
        load_t5(GOLDEN / "clip_tiny.safetensors")
    with pytest.raises(ValueError, match="looks like the T5 encoder"):
        load_clip(GOLDEN / "t5_tiny.safetensors")


def test_files_that_are_not_there_or_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected the Flux transformer"):
        load_flux(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no autoencoder here; expected vae/ or ae\.safetensors"):
        load_autoencoder(tmp_path)
    whole = (GOLDEN / "flux_tiny.bfl.safetensors").read_bytes()
    for cut in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"not a safetensors file|broken safetensors|truncated"):
            load_flux(tmp_path / "cut.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file at all" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_flux(tmp_path / "text.safetensors")


def test_fingerprint_follows_the_content(tmp_path):
    state = random_flux().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    assert checkpoints.fingerprint(tmp_path / "a.safetensors", "transformer") == checkpoints.fingerprint(
        tmp_path / "b.safetensors", "transformer"
    )
    save_file(random_flux(seed=1).state_dict(), tmp_path / "b.safetensors")
    assert checkpoints.fingerprint(tmp_path / "a.safetensors", "transformer") != checkpoints.fingerprint(
        tmp_path / "b.safetensors", "transformer"
    )


def test_clip_and_t5_sizes_from_shapes():
    for name, part, cls, params in (
        ("comfy.clip_l", "clip", ClipTextEncoder, None),
        ("comfy.t5xxl_fp16", "t5", T5Encoder, None),
    ):
        model, params, _ = full_size(part, sheet(name))
        assert isinstance(model, cls)
    assert params == T5Params(**_fields(T5Params, params.__dict__))
    assert isinstance(checkpoints.clip_params(checkpoints.strip_prefix(sheet("comfy.clip_l"), "clip"), {}), ClipParams)
    assert isinstance(Autoencoder(AutoencoderParams(ch=32, ch_mult=(1, 2))), Autoencoder)


def test_golden_fp8(tmp_path):
    """W = fp8 * scale, under either name of the scale."""
    units = load_file(GOLDEN / "units.safetensors")
    for name in ("a.scale_weight", "a.weight_scale"):
        save_file({"a.weight": units["fp8.weight"], name: units["fp8.scale_weight"]}, tmp_path / f"{name}.safetensors")
        read = checkpoints.TensorReader(checkpoints.read_headers([tmp_path / f"{name}.safetensors"]))
        assert torch.equal(read("a.weight"), units["fp8.dequant_f32"])
