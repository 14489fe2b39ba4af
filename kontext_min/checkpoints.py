"""Load official weight files, in every layout that people download.

    1. header    each file lists name, shape and dtype of its tensors; the safetensors library checks them
    2. map       stored tensors get the names of our parameters; their shapes tell how wide and deep the network is
    3. meta      the network is built on the meta device, where parameters take no memory; each is matched to tensors
    4. assign    tensors mapped into memory from the file become the parameters; joined or widened ones are copied

A path is one safetensors file, a folder of shards with their index, or the whole hub folder (transformer/, vae/,
text_encoder/, text_encoder_2/). Names are BFL's or diffusers', with the prefixes of ComfyUI's all-in-one files. fp8
weights, with or without scales, are widened while loading. Values that no shape reveals (NOT_IN_SHAPES) come from
config.json next to the file or from `config` in its metadata; otherwise they are the official ones.

Sources: for the names black-forest-labs/flux 802fb47, src/flux/modules/layers.py and autoencoder.py; diffusers 0.42.1,
transformer_flux.py, normalization.py (AdaLayerNormContinuous) and autoencoder_kl.py; ComfyUI (October 2025) for
prefixes and fp8 scales; transformers for CLIP and T5, whose names are used as they are. diffusers' from_single_file
reads many of these layouts; here one table shows each name, and a missing, extra or misshapen tensor is an error.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.clip import ClipParams, ClipTextEncoder
from kontext_min.flux import Flux, FluxParams
from kontext_min.t5 import T5Encoder, T5Params

Device = str | torch.device

# ------------------------------------------------------------------------------------------------------ finding files

NOUNS = {"transformer": "Flux transformer", "vae": "autoencoder", "clip": "CLIP text encoder", "t5": "T5 encoder"}
FOLDERS = {"transformer": "transformer", "vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
SINGLE_FILES = {
    "transformer": ("flux1*kontext*.safetensors", "flux1*.safetensors"),
    "vae": ("ae.safetensors",),
    "clip": ("clip_l*.safetensors",),
    "t5": ("t5xxl*.safetensors",),
}


def find(path: str | Path, part: str) -> list[Path]:
    """The safetensors files of a network (transformer, vae, clip or t5); `path` is a file, or a folder that holds it.

    Raises:
        FileNotFoundError: no such path, or no file of that network in it.
        ValueError: several files to choose from, or a broken index of shards.
    """
    path, noun = Path(path), NOUNS[part]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected the {noun}. See weights/README.md.")
    if path.is_file():
        return [path]
    if (path / FOLDERS[part]).is_dir():
        return find(path / FOLDERS[part], part)
    for index in sorted(path.glob("[!.]*.safetensors.index.json")):
        names = read_json(index).get("weight_map")
        if not names or not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index}: expected a weight_map from tensor names to files.")
        shards = sorted({path / name for name in names.values()})
        if absent := [shard.name for shard in shards if not shard.exists()]:
            raise FileNotFoundError(f"{index}: {len(absent)} of {len(shards)} shards are missing: {', '.join(absent)}.")
        return shards
    for pattern in (*SINGLE_FILES[part], "diffusion_pytorch_model.safetensors", "model.safetensors"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{path}: several may be the {noun} ({', '.join(f.name for f in found)}); name one.")
        if found:
            return found
    raise FileNotFoundError(
        f"{path}: no {noun} here; expected {FOLDERS[part]}/ or {SINGLE_FILES[part][0]}. See weights/README.md."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; Raises: ValueError if it holds something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}).") from None


# ------------------------------------------------------------------------------------------------------------- headers

DTYPES = {  # safetensors' spelling
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
LONGEST = 100_000_000  # bytes of a header, the format's limit
WIDENED = ("F8_E4M3", "F8_E5M2", "I8")  # read as float32, times their scale; I8 is what this project writes
OTHER_FILES = {  # by their first bytes
    **dict.fromkeys((b"PK", b"\x80"), "a pickled PyTorch file, which can run code; convert it to safetensors"),
    b"GGUF": "a GGUF file of llama.cpp; use the safetensors file; a base becomes small with --quantize",
    b"version ": "a pointer of Git LFS; run git lfs pull to get the file itself",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as its header describes it."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES
    file: Path | None = None
    name: str = ""  # in the file, prefix included
    offset: int = 0  # of its first byte in the file
    nbytes: int = 0
    scale: "Stored | None" = None  # of an 8-bit weight


Headers = dict[str, Stored]


def read_headers(files: Iterable[Path]) -> Headers:
    """The tensors of some safetensors files by name; all weights are read through here.

    Raises:
        ValueError: not a safetensors file, a truncated or broken one, or one name in two files.
    """
    headers: Headers = {}
    for file in files:
        for name, stored in _read_header(file)[0].items():
            if name in headers:
                raise ValueError(f"{file}: {name!r} is in another file too, {headers[name].file}.")
            headers[name] = stored
    return headers


def metadata(file: Path) -> dict[str, str]:
    """The text that a safetensors file carries in its header; ValueError as for `read_headers`."""
    return _read_header(file)[1]


def _read_header(file: Path) -> tuple[Headers, dict[str, str]]:
    """A file is 8 bytes with the length of the header, the header in JSON, and the tensors without gaps."""
    with file.open("rb") as f:
        start = f.read(8)
        start += f.read(min(int.from_bytes(start, "little"), LONGEST))
    try:
        # The library checks types, sizes and offsets, but not that each name occurs once. With "pt" it would reserve
        # memory for the whole file, which fails if the file is larger than the memory.
        with safe_open(file, "np"):
            pairs = json.loads(start[8:], object_pairs_hook=list)
        entries = {name: dict(entry or ()) for name, entry in pairs}  # __metadata__ may be null
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {_fault(file, start, str(error))}.") from None
    about, headers = entries.pop("__metadata__", {}), {}
    for name, entry in entries.items():
        first, stop = entry["data_offsets"]
        headers[name] = Stored(tuple(entry["shape"]), entry["dtype"], file, name, len(start) + first, stop - first)
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name!r} has dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}.")
    return headers, about


def _fault(file: Path, start: bytes, error: str) -> str:
    """What is wrong with a file that the library rejects; `start` is its beginning, up to the end of the header."""
    length, size = int.from_bytes(start[:8], "little"), file.stat().st_size
    if length > LONGEST or (size > 8 and start[8:9] != b"{"):
        kind = next(
            (kind for mark, kind in OTHER_FILES.items() if start.startswith(mark)),
            "of another kind; expected .safetensors",
        )
        return f"not a safetensors file but {kind}"
    end = 8 + max(length, 1)
    if "not fully covered" in error:  # the header is complete; the data may be cut off, or be followed by other bytes
        end += max(entry["data_offsets"][1] for name, entry in json.loads(start[8:]).items() if name[:2] != "__")
    cut = f"truncated, {size} of at least {end} bytes; download it again"
    return cut if size < end else f"broken safetensors file: {error}"


# --------------------------------------------------------------------------------------- names: diffusers' and ours

# Our attribute names are those of BFL's files, and need no map. diffusers keeps q, k, v (and the first MLP matrix of
# single blocks) apart instead of in one matrix: several names on the right are joined along the rows. `.weight` and
# `.bias` follow the module; the q/k norms are `.scale` here and `.weight` there.
EMBEDDER = (("in_layer", "linear_1"), ("out_layer", "linear_2"))
# fmt: off
FLUX_MODULES = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    **{f"time_in.{ours}": [f"time_text_embed.timestep_embedder.{theirs}"] for ours, theirs in EMBEDDER},
    **{f"guidance_in.{ours}": [f"time_text_embed.guidance_embedder.{theirs}"] for ours, theirs in EMBEDDER},
    **{f"vector_in.{ours}": [f"time_text_embed.text_embedder.{theirs}"] for ours, theirs in EMBEDDER},
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
DOUBLE_BLOCK_MODULES = {
    "img_mod.lin": ["norm1.linear"], "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"], "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"], "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"], "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"], "txt_mlp.0": ["ff_context.net.0.proj"],
    "img_mlp.2": ["ff.net.2"], "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE_BLOCK_MODULES = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"], "norm.key_norm": ["attn.norm_k"],
}
# fmt: on
# The one place where the numbers differ too: rows [shift, scale] in BFL's file, [scale, shift] in diffusers'.
SWAPPED = "final_layer.adaLN_modulation.1"


def flux_modules(params: FluxParams) -> dict[str, list[str]]:
    """Module names of a whole Flux: ours -> diffusers'."""
    table = dict(FLUX_MODULES)
    double = [(f"double_blocks.{i}", f"transformer_blocks.{i}") for i in range(params.depth)]
    single = [(f"single_blocks.{i}", f"single_transformer_blocks.{i}") for i in range(params.depth_single_blocks)]
    for blocks, modules in ((double, DOUBLE_BLOCK_MODULES), (single, SINGLE_BLOCK_MODULES)):
        for ours, theirs in blocks:
            table |= {f"{ours}.{k}": [f"{theirs}.{name}" for name in v] for k, v in modules.items()}
    return table


AUTOENCODER_NAMES = {  # diffusers' -> BFL's, replaced in this order
    ".mid_block.resnets.0.": ".mid.block_1.", ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    ".mid_block.attentions.0.to_": ".mid.attn_1.",  # q, k and v
    ".down_blocks.": ".down.", ".up_blocks.": ".up.", ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.", ".upsamplers.0.": ".upsample.",
    ".conv_norm_out.": ".norm_out.", ".conv_shortcut.": ".nin_shortcut.",
}  # fmt: skip


def autoencoder_name(theirs: str, levels: int) -> str:
    """A parameter's name in diffusers -> in BFL's file and here. diffusers counts the decoder's levels downwards."""
    for old, new in AUTOENCODER_NAMES.items():
        theirs = theirs.replace(old, new)
    return re.sub(r"(?<=^decoder\.up\.)\d+", lambda level: str(levels - 1 - int(level[0])), theirs)


PREFIXES = {  # all-in-one checkpoints hold several networks; the first prefix that occurs selects ours
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.",),
    "clip": ("text_encoders.clip_l.transformer.text_model.", "text_encoders.clip_l.transformer.", "text_model."),
    "t5": ("text_encoders.t5xxl.transformer.",),
}
SCALES = ("scale_weight", "weight_scale")  # ComfyUI's old and new spelling: W = fp8 * scale
IGNORED = (  # scales for fp8 x fp8 products, markers, and heads that third-party exports add
    *("scale_input", "input_scale", "comfy_quant", "scaled_fp8"),
    *("position_ids", "logit_scale", "text_projection.weight"),
)
Sources = dict[str, list[Stored]]  # parameter -> the tensors that it consists of, joined along the rows


def by_our_names(headers: Headers, part: str) -> Sources:
    """The tensors of one network under the names of our parameters, 8-bit weights with their scales.

    Raises:
        ValueError: a scale that fits neither the whole weight nor its rows.
    """
    prefix = next((p for p in PREFIXES[part] if any(name.startswith(p) for name in headers)), "")
    headers = {name.removeprefix(prefix): stored for name, stored in headers.items() if name.startswith(prefix)}
    found = {}
    for name, stored in headers.items():
        if name.endswith((*SCALES, *IGNORED)):
            continue
        scales = [f"{name.removesuffix('.weight')}.{spelling}" for spelling in SCALES]
        scale = next((headers[s] for s in scales if s in headers), None) if stored.dtype in WIDENED else None
        if scale and math.prod(scale.shape) not in (1, *stored.shape[:1]):
            raise ValueError(f"{scale.file}: {scale.name} {list(scale.shape)}, but {name} is {list(stored.shape)}.")
        found[name] = replace(stored, scale=scale)

    if part == "vae" and (levels := _count(found, "decoder.up_blocks.")):
        found = {autoencoder_name(name, levels): stored for name, stored in found.items()}
    if part == "t5" and (copy := found.pop("encoder.embed_tokens.weight", None)):  # files hold either name or both
        found.setdefault("shared.weight", copy)
    sources: Sources = {}
    if part == "transformer" and "x_embedder.weight" in found:
        doubles, singles = (_count(found, f"{kind}_blocks.") for kind in ("transformer", "single_transformer"))
        for ours, theirs in flux_modules(FluxParams(depth=doubles, depth_single_blocks=singles)).items():
            for leaf in ("weight", "bias"):
                names = [f"{module}.{leaf}" for module in theirs]
                if all(name in found for name in names):  # otherwise `check` finds them unexpected
                    ours_leaf = "scale" if ours.endswith("_norm") else leaf
                    sources[f"{ours}.{ours_leaf}"] = [found.pop(name) for name in names]
    return sources | {name: [stored] for name, stored in found.items()}


# ------------------------------------------------------------------------------------------------- sizes of networks

Shapes = dict[str, tuple[int, ...]]  # by the names of our parameters


def flux_sizes(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a Flux. The norm gives the size of a head; an eighth of it, rounded up to even, is for the index."""
    hidden, in_channels = shapes["img_in.weight"]
    (head,) = shapes["single_blocks.0.norm.query_norm.scale"]
    index = 2 * math.ceil(head / 16)
    return {
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["single_blocks.0.linear2.weight"][1] / hidden - 1,  # reads [attention, MLP]
        "num_heads": hidden // head,
        "depth": _count(shapes, "double_blocks."),
        "depth_single_blocks": _count(shapes, "single_blocks."),
        "axes_dim": (index, (head - index) // 2, (head - index) // 2),  # 128 = 16 + 56 + 56
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
    }


def autoencoder_sizes(shapes: Shapes) -> dict[str, Any]:
    """Sizes of an autoencoder; they are read from the decoder, which has one more residual block per level."""
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = range(_count(shapes, "decoder.up."))
    return {
        "in_channels": in_channels,
        "ch": ch,
        "out_ch": shapes["decoder.conv_out.weight"][0],
        "ch_mult": tuple(shapes[f"decoder.up.{i}.block.0.conv2.weight"][0] // ch for i in levels),
        "num_res_blocks": _count(shapes, "decoder.up.0.block.") - 1,
        "z_channels": shapes["decoder.conv_in.weight"][1],
    }


def clip_sizes(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a CLIP text encoder; every CLIP by OpenAI has heads of size 64."""
    vocab_size, hidden_size = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers."),
        "num_attention_heads": hidden_size // 64,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
    }


def t5_sizes(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a T5 encoder; the table of the position bias has a column per head."""
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    vocab_size, d_model = shapes["shared.weight"]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": _count(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


NETWORKS = {  # part: network, its params, their sizes, a key that marks the network's own config.json
    "transformer": (Flux, FluxParams, flux_sizes, "num_single_layers"),
    "vae": (Autoencoder, AutoencoderParams, autoencoder_sizes, "block_out_channels"),
    "clip": (ClipTextEncoder, ClipParams, clip_sizes, "num_hidden_layers"),
    "t5": (T5Encoder, T5Params, t5_sizes, "d_kv"),
}
NOT_IN_SHAPES = {  # part: key of its config.json -> our name
    "transformer": {"axes_dims_rope": "axes_dim"},  # where it is not 1/8, 7/16, 7/16 of a head
    "vae": {"scaling_factor": "scale_factor", "shift_factor": "shift_factor"},
    "clip": {name: name for name in ("num_attention_heads", "layer_norm_eps")},
    "t5": {name: name for name in ("relative_attention_max_distance", "layer_norm_epsilon")},
}


def told(file: Path, part: str) -> dict[str, Any]:
    """The values that no shape reveals, as far as config.json or the file's metadata gives them.

    Raises:
        ValueError: one of them is not a number, or `axes_dim` is not a list.
    """
    where = file.parent / "config.json"
    config = read_json(where) if where.exists() else {}
    if NETWORKS[part][3] not in config:  # it belongs to another network in the same folder
        where, text = file, metadata(file).get("config", "{}")
        try:
            config = dict(json.loads(text).items())
        except (ValueError, RecursionError, AttributeError):  # other programs write other text there
            config = {}
    found = {}
    for key, ours in NOT_IN_SHAPES[part].items():
        if key in config:
            value, kind = config[key], "list" if ours == "axes_dim" else "number"
            if type(value) not in ((list,) if kind == "list" else (int, float)):
                raise ValueError(f"{where}: {key} is {value!r:.40}, expected a {kind}.")
            found[ours] = tuple(value) if kind == "list" else value
    return found


# ------------------------------------------------------------------------------------------------ building and filling


def outline(part: str, path: str | Path, params: Any = None) -> tuple[Any, Sources]:
    """A network on the meta device, and the stored tensors of each parameter; `params` None reads sizes from them.

    Raises:
        FileNotFoundError: no such file. ValueError: the files hold another network, or not all of this one.
    """
    files, (network, params_of, sizes, _) = find(path, part), NETWORKS[part]
    sources = by_our_names(read_headers(files), part)
    known = told(files[0], part)
    try:
        params = params or params_of(**sizes(_shapes(sources)) | known)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{files[0]}: no {NOUNS[part]} ({error}). {likely(sources, part)}") from None
    with torch.device("meta"):
        model = network(params)
    check(model, sources, part, files[0])
    return model, sources


def _shapes(sources: Sources) -> Shapes:
    return {n: (sum(s.shape[0] for s in x if s.shape), *x[0].shape[1:]) for n, x in sources.items()}


def check(model: nn.Module, sources: Sources, part: str, file: Path) -> None:
    """Every parameter has its tensors, and every tensor its parameter.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, all in one line, with the likely reason.
    """
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    misshapen = []
    for name, shape in _shapes(sources).items():
        parts, want = sources[name], wanted.get(name, shape)
        alike = all(s.shape[1:] == shape[1:] for s in parts)
        numbers = all(DTYPES[s.dtype].is_floating_point or s.dtype in WIDENED for s in parts)
        # diffusers stores the 1x1 convolutions of the autoencoder's attention as matrices.
        if name in wanted and not (alike and numbers and want in (shape, (*shape, 1, 1))):
            misshapen.append(f"{name} {parts[0].dtype} {list(shape)} for {list(want)}")
    missing, unexpected = sorted(wanted.keys() - sources.keys()), sorted(sources.keys() - wanted.keys())
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    found = [f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in kinds.items() if v]
    if found:
        raise ValueError(f"{file}: not this {NOUNS[part]}: {'; '.join(found)}. {likely(sources, part)}")


def likely(names: Iterable[str], part: str) -> str:
    """For a file that is not the expected network: a guess at what it is."""
    signs = {"SelfAttention": "t5", "self_attn.q_proj": "clip", "single_": "transformer", "decoder.conv_in": "vae"}
    text = " ".join(names)
    if "lora" in text:
        return "It looks like a LoRA: give it to --lora (train.py: --init-lora), not as a base model."
    kind = next((kind for sign, kind in signs.items() if sign in text), None)
    if kind in (None, part):
        return "It is incomplete or of another kind; see weights/README.md."
    return f"It looks like the {NOUNS[kind]}."


def mapped(stored: Stored) -> Tensor:
    """The tensor (*shape) as stored, memory-mapped: the file is read on access, and unmapped with the tensor."""
    data = torch.from_numpy(np.memmap(stored.file, np.uint8, "c", stored.offset, (stored.nbytes,)))  # copy on write
    dtype = DTYPES[stored.dtype]
    if stored.offset % dtype.itemsize:  # old files do not align their tensors
        data = data.clone()
    return data.view(dtype).view(stored.shape)


def widened(stored: Stored) -> Tensor:
    """The tensor (*shape); fp8 and int8 come out as float32, times their scale."""
    tensor = mapped(stored)
    if stored.dtype not in WIDENED:
        return tensor
    scale = mapped(stored.scale).float() if stored.scale else torch.ones(1)
    return tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))


def fill(model: Any, sources: Sources, dtype: torch.dtype | None, device: Device) -> Any:
    """Fill a network on meta with the parameters in `sources`; others stay on meta. Returns it frozen, in eval mode."""
    if dtype is None and any(s.dtype in WIDENED for stored in sources.values() for s in stored):
        dtype = torch.bfloat16  # an fp8 file stores the rest in several dtypes: use one
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    state = {}
    for name, stored in sources.items():
        parts = [widened(s) for s in stored]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if name.startswith(SWAPPED) and not stored[0].name.endswith(name):  # the file has diffusers' names
            tensor = torch.cat(tensor.chunk(2)[::-1])
        state[name] = tensor.reshape(shapes[name]).to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=False, assign=True)  # `check` was strict
    return model.eval().requires_grad_(False)


def load_flux(
    path: str | Path, params: FluxParams | None = None, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> Flux:
    """The transformer, frozen, from a file or folder as `find` takes it; on the CPU tensors stay memory-mapped.

    `params` None reads the sizes from the files; `dtype` None keeps the stored dtype, and widens fp8 to bfloat16.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole Flux; the message says what is missing, unexpected or misshapen.
    """
    return fill(*outline("transformer", path, params), dtype, device)


def load_autoencoder(
    path: str | Path, params: AutoencoderParams | None = None, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> Autoencoder:
    """The autoencoder; arguments and errors as for load_flux."""
    return fill(*outline("vae", path, params), dtype, device)


def load_clip(
    path: str | Path, params: ClipParams | None = None, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> ClipTextEncoder:
    """The CLIP text encoder; arguments and errors as for load_flux."""
    return fill(*outline("clip", path, params), dtype, device)


def load_t5(
    path: str | Path, params: T5Params | None = None, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> T5Encoder:
    """The T5 encoder, like load_flux; Raises: ValueError also for float16, in which T5-XXL overflows."""
    if dtype == torch.float16:
        raise ValueError("T5: got dtype float16, in which it overflows; take bfloat16 or float32.")
    return fill(*outline("t5", path, params), dtype, device)
