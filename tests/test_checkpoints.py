"""Official layouts land on the networks, one tensor on one parameter; wrong files are refused in one clear line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_min import checkpoints
from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.checkpoints import Stored, find, load_autoencoder, load_clip, load_flux, load_t5, outline
from kontext_min.clip import ClipParams, ClipTextEncoder
from kontext_min.extras.fingerprint import fingerprint, note_zeros
from kontext_min.extras.lora_files import read_lora
from kontext_min.extras.quantize import load_quantized
from kontext_min.extras.saving import save_flux
from kontext_min.extras.stream import load_streamed
from kontext_min.flux import Flux, FluxParams
from kontext_min.t5 import T5Encoder, T5Params

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
WEIGHTS = HERE.parent / "weights" / "tiny"
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
    """Network on meta with the sizes that the shapes tell, and the stored tensors of its parameters."""
    network, params_of, sizes, _ = checkpoints.NETWORKS[part]
    sources = checkpoints.by_our_names(headers, part)
    params = params_of(**sizes(checkpoints._shapes(sources)))
    with torch.device("meta"):
        model = network(params)
    checkpoints.check(model, sources, part, Path("sheet"))
    return model, params, sources


@pytest.mark.parametrize(("name", "part"), SHEETS)
def test_every_official_tensor_lands_on_exactly_one_parameter(name, part):
    headers = sheet(name)
    assert len(headers) == json.loads((HERE / "layouts" / f"{name}.json").read_text())["tensor_count"]
    model, params, sources = full_size(part, headers)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[part]
    stored = [s for parts in sources.values() for s in parts]
    used = [s.name for s in stored] + [s.scale.name for s in stored if s.scale]
    assert len(used) == len(set(used))
    allowed = (*checkpoints.IGNORED, "encoder.embed_tokens.weight")
    assert all(name.endswith(allowed) for name in set(headers) - set(used))
    scales = [name for name in headers if name.endswith(checkpoints.SCALES)]
    assert len(scales) == sum(s.scale is not None for s in stored)
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


BUNDLE = Path(__file__).parent.parent / "weights" / "tiny"
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
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards are missing: b\.safetensors"):
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
    told = json.loads(checkpoints.metadata(GOLDEN / "flux_tiny.bfl.safetensors")["config"])
    assert flux.params == FluxParams(**told | {"axes_dim": tuple(told["axes_dim"])})
    ae = load_autoencoder(GOLDEN / "ae_tiny.bfl.safetensors").params
    told = json.loads(checkpoints.metadata(GOLDEN / "ae_tiny.bfl.safetensors")["config"])
    assert ae == AutoencoderParams(**_fields(AutoencoderParams, told) | {"ch_mult": tuple(told["ch_mult"])})
    t5 = load_t5(GOLDEN / "t5_tiny.safetensors").encoder.params
    assert t5 == T5Params(**_fields(T5Params, json.loads((GOLDEN / "t5_tiny.json").read_text())["config"]))
    clip = load_clip(GOLDEN / "clip_tiny.safetensors")  # heads of 12 components: metadata alone tells
    assert (clip.encoder["layers"][0].self_attn.heads, len(clip.encoder["layers"])) == (5, 3)


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
    assert "1 misshapen (img_in.bias F32 [7] for [48])" in line
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
        with pytest.raises(ValueError, match=r"truncated.*download it again"):
            load_flux(tmp_path / "cut.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file at all" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_flux(tmp_path / "text.safetensors")


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: object = (4,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BAD_HEADERS = {
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, "invalid offset for tensor `b`"),
    "gap": ({"a": entry(0, 16), "b": entry(20, 36)}, "invalid offset for tensor `b`"),
    "negative start": ({"a": entry(-(10**12), 16 - 10**12)}, "invalid value: integer `-1000000000000`"),
    "start behind stop": ({"a": entry(16, 0)}, "invalid offset for tensor `a`"),
    "size and shape": ({"a": entry(0, 16, [5])}, "invalid shape, data type, or offset for tensor"),
    "negative shape": ({"a": entry(0, 16, [-2, -2])}, "invalid value: integer `-2`"),
    "shape of texts": ({"a": entry(0, 16, ["4"])}, 'invalid type: string "4"'),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "missing field `shape`"),
    "no entry": ({"a": 5}, "invalid type: integer `5`"),
    "lines": ({"a": "x\ny"}, r'invalid type: string "x\ny"'),
    "offsets": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": 7}}, "invalid type: integer `7`"),
    "unknown dtype": ({"a": entry(0, 16, [4], "F4")}, "invalid shape, data type, or offset for tensor"),
    "dtype that torch lacks": ({"a": entry(0, 16, [2], "C64")}, "'a' has dtype C64"),
    "no dtype": ({"a": entry(0, 16, [4], ["F32"])}, "invalid type: sequence"),
    "one name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), "occurs twice"),
    "metadata": ({"__metadata__": {"config": 5}, "a": entry(0, 16)}, "invalid type: integer `5`, expected a string"),
    "nested": (DEEP, "recursion"),
    "a list": (b"[1, 2]", "not a safetensors file"),
    "bytes": (b'{"\xff": 1}', "header"),
    "bytes behind": ({"a": entry(0, 12, [3])}, "file not fully covered"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_is_wrong_is_one_line_on_every_path(tmp_path, case):
    """Plain, quantised and streamed loading, LoRA files, fingerprints: all read the header in one place."""
    header, expected = BAD_HEADERS[case]
    file = raw_file(tmp_path / "f.safetensors", header, bytes(16))
    paths = (
        lambda: load_flux(file),
        lambda: load_quantized(file, "int8", torch.float32, "cpu"),
        lambda: load_streamed("transformer", file, torch.float32),
        lambda: read_lora(file),
        lambda: fingerprint(file, "transformer"),
        lambda: checkpoints.metadata(file),
    )
    for path in paths:
        with pytest.raises(ValueError) as error:
            path()
        line = str(error.value)
        assert line.startswith(str(file)) and expected in line and "\n" not in line and "download" not in line


def test_one_name_in_two_shards(tmp_path):
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: 'x' is in another file"):
        checkpoints.read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "a pickled PyTorch file, which can run code; convert it"),
        (b"\x80\x02}q\x00" + bytes(100), "a pickled PyTorch file, which can run code; convert it"),
        (b"GGUF\x03\x00\x00\x00\x0c\x03" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "pointer of Git LFS"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, content, message):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_flux(tmp_path / "f.safetensors")
    assert message in str(error.value) and "\n" not in str(error.value) and "download it again" not in str(error.value)


@pytest.mark.parametrize("length", [0x4B50, 0x80, 0x280])
def test_a_header_as_long_as_the_mark_of_a_pickle_is_read(tmp_path, length):
    """The first bytes of a whole file are its header's length, and may be those of a pickle."""
    text = json.dumps({"a": entry(0, 16)}).encode().ljust(length)
    assert "a" in checkpoints.read_headers([raw_file(tmp_path / "f.safetensors", text, bytes(16))])


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_wrong_is_one_line(tmp_path, index):
    (tmp_path / "x.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"x\.safetensors\.index\.json: "):
        load_flux(tmp_path)


def test_parts_of_a_weight_that_do_not_join(tmp_path):
    state = to_diffusers(random_flux())
    name = "transformer_blocks.0.attn.to_k.weight"
    save_file(state | {name: state[name][:, 1:].contiguous()}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"1 misshapen \(double_blocks\.0\.img_attn\.qkv\.weight"):
        load_flux(tmp_path / "f.safetensors")
    del state[name]
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(double_blocks\.0\.img_attn\.qkv\.weight\); 2 unexpected"):
        load_flux(tmp_path / "f.safetensors")


@pytest.mark.parametrize("axes", ["5", "[4, 5, 6]", '["a", "b", "c"]', "null"])
def test_axes_of_the_config_are_checked(tmp_path, axes):
    save_flux(Flux(replace(TINY, mlp_ratio=4.0)), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'("axes_dims_rope": )\[[^]]*\]', rf"\g<1>{axes}", text))
    with pytest.raises(ValueError, match=r"axes"):
        load_flux(tmp_path)


def test_weights_that_are_no_numbers_with_a_point(tmp_path):
    state = {n: t.contiguous() for n, t in random_flux().state_dict().items()}
    save_file(state | {"img_in.bias": torch.zeros(48, dtype=torch.int64)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"1 misshapen \(img_in\.bias I64 \[48\]"):
        load_flux(tmp_path / "f.safetensors")


def test_scales_that_do_not_fit(tmp_path):
    state = {n: t.to(torch.float8_e4m3fn) for n, t in random_flux().state_dict().items()}
    for scale in (torch.ones(7), torch.ones(0)):
        save_file(state | {"img_in.scale_weight": scale}, tmp_path / "f.safetensors")
        with pytest.raises(ValueError, match=r"img_in\.scale_weight \[[70]\], but img_in.weight is \[48, 16\]"):
            load_flux(tmp_path / "f.safetensors")


def test_fingerprint_samples_every_tensor(tmp_path):
    """Bases that differ in one small tensor, or in the numbers of config.json that the shapes do not tell."""
    folder = tmp_path / "transformer"
    save_flux(Flux(replace(TINY, mlp_ratio=4.0)), folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    whole, seen = file.read_bytes(), {fingerprint(tmp_path, "transformer")}
    headers = checkpoints.read_headers([file])
    for stored in headers.values():
        for place in (0, stored.nbytes // 2, stored.nbytes - 1):
            changed = bytearray(whole)
            changed[stored.offset + place] ^= 1
            file.write_bytes(changed)
            seen.add(fingerprint(tmp_path, "transformer"))
    places = sum(len({0, s.nbytes // 2, s.nbytes - 1}) for s in headers.values())
    assert len(seen) == 1 + places


@pytest.mark.parametrize("rows", range(3))
def test_fingerprint_samples_q_k_and_v_of_a_fused_tensor(tmp_path, rows):
    """In BFL's layout all of them are one tensor with the MLP; a LoRA on v changes one seventh of its rows."""
    state = random_flux(replace(TINY, hidden_size=192, num_heads=8, mlp_ratio=4.0)).state_dict()
    name, hidden = "single_blocks.1.linear1.weight", 192
    save_file(state, tmp_path / "a.safetensors")
    state[name] = state[name].clone()
    state[name][rows * hidden : (rows + 1) * hidden] += 0.01
    save_file(state, tmp_path / "b.safetensors")
    assert fingerprint(tmp_path / "a.safetensors", "transformer") != fingerprint(
        tmp_path / "b.safetensors", "transformer"
    )


@pytest.mark.parametrize("part", ["transformer", "vae", "clip", "t5"])
def test_weights_of_zeros_are_named(part, tmp_path, capsys):
    """As the end of a download that was cut, in a file of full size."""
    file = Path(shutil.copy(find(BUNDLE, part)[0], tmp_path))
    note_zeros(file, part)
    assert capsys.readouterr().err == ""
    with file.open("r+b") as f:
        size = file.stat().st_size
        f.seek(size - size // 3)
        f.write(bytes(size // 3))
    note_zeros(file, part)
    assert re.fullmatch(
        r"note: .*weight and \d+ more: all zeros; was the download or the copy cut\?\n", capsys.readouterr().err
    )


def test_zeros_of_another_network_in_an_all_in_one_file_are_not_named(tmp_path, capsys):
    """The autoencoder of weights/tiny has convolutions of zeros, as it should."""
    tensors = {checkpoints.PREFIXES["vae"][0] + name: x for name, x in load_file(find(BUNDLE, "vae")[0]).items()}
    tensors |= {
        checkpoints.PREFIXES["transformer"][0] + name: x
        for name, x in load_file(find(BUNDLE, "transformer")[0]).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    for part in ("transformer", "vae"):
        note_zeros(tmp_path / "all.safetensors", part)
    assert capsys.readouterr().err == ""
    assert any(name.endswith("weight") and x.ndim > 1 and not x.any() for name, x in tensors.items())


def test_fingerprint_follows_the_config(tmp_path):
    folder = shutil.copytree(WEIGHTS / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    seen = {fingerprint(tmp_path, "vae")}
    for change in ({"scaling_factor": 0.5}, {"shift_factor": 0.5}, {"sample_size": 1}):
        (folder / "config.json").write_text(json.dumps(config | change))
        seen.add(fingerprint(tmp_path, "vae"))
    assert len(seen) == 3  # the sample size changes nothing that is computed


@pytest.mark.parametrize("value", ['"abc"', "true", "null", "[]", "{}"])
def test_numbers_of_the_config_are_checked(tmp_path, value):
    folder = shutil.copytree(WEIGHTS / "vae", tmp_path / "vae")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'("scaling_factor": )[\d.]+', rf"\g<1>{value}", text))
    with pytest.raises(ValueError, match=r"config\.json: scaling_factor .* expected a number"):
        load_autoencoder(tmp_path)


def test_sizes_come_from_the_shapes_and_the_rest_from_the_config():
    """weights/tiny in the hub's layout: what its four config.json say."""
    config = {part: json.loads((WEIGHTS / part / "config.json").read_text()) for part in checkpoints.FOLDERS.values()}
    flux = outline("transformer", WEIGHTS)[0].params
    assert (flux.num_heads, flux.depth, flux.depth_single_blocks, flux.axes_dim) == (6, 1, 6, (4, 14, 14))
    assert (flux.hidden_size, flux.mlp_ratio, flux.context_in_dim, flux.vec_in_dim) == (192, 4.0, 96, 64)
    vae = outline("vae", WEIGHTS)[0].params
    assert vae == AutoencoderParams(3, 96, 3, (1, 1, 1), 0, 24, 1.0264, 0.0024)
    assert load_clip(WEIGHTS).encoder["layers"][0].self_attn.heads == config["text_encoder"]["num_attention_heads"] == 2
    t5 = outline("t5", WEIGHTS)[0].encoder.params
    assert t5 == T5Params(**_fields(T5Params, config["text_encoder_2"]))


def test_fingerprint_follows_the_content(tmp_path):
    state = random_flux().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    assert fingerprint(tmp_path / "a.safetensors", "transformer") == fingerprint(
        tmp_path / "b.safetensors", "transformer"
    )
    save_file(random_flux(seed=1).state_dict(), tmp_path / "b.safetensors")
    assert fingerprint(tmp_path / "a.safetensors", "transformer") != fingerprint(
        tmp_path / "b.safetensors", "transformer"
    )


def test_clip_and_t5_sizes_from_shapes():
    for name, part, cls, params in (
        ("comfy.clip_l", "clip", ClipTextEncoder, None),
        ("comfy.t5xxl_fp16", "t5", T5Encoder, None),
    ):
        model, params, _ = full_size(part, sheet(name))
        assert isinstance(model, cls)
    assert params == T5Params()
    assert full_size("clip", sheet("comfy.clip_l"))[1] == ClipParams()
    assert isinstance(Autoencoder(AutoencoderParams(ch=32, ch_mult=(1, 2))), Autoencoder)


def test_golden_fp8(tmp_path):
    """W = fp8 * scale, under either name of the scale."""
    units = load_file(GOLDEN / "units.safetensors")
    for name in ("a.scale_weight", "a.weight_scale"):
        save_file({"a.weight": units["fp8.weight"], name: units["fp8.scale_weight"]}, tmp_path / f"{name}.safetensors")
        headers = checkpoints.read_headers([tmp_path / f"{name}.safetensors"])
        (stored,) = checkpoints.by_our_names(headers, "t5")["a.weight"]
        assert torch.equal(checkpoints.widened(stored), units["fp8.dequant_f32"])
