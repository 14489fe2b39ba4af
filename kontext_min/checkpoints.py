"""Official weight files to networks: find the files, map the names, build on meta, assign the mapped memory.

    load_flux("flux1-kontext-dev.safetensors")     load_autoencoder("FLUX.1-Kontext-dev/")     load_t5("t5xxl_fp16...")

What is read, for each network: one safetensors file, or a folder with shards and their index, or the whole hub folder
(transformer/, vae/, text_encoder/, text_encoder_2/). Names may be BFL's or diffusers', with the prefixes of ComfyUI's
all-in-one checkpoints; fp8 files, with or without scales, are widened, or kept as they are (quantize.py). A file is
understood from its HEADER (names, shapes, dtypes) before a byte of data is touched, so a wrong file is refused in
milliseconds.

Loading is strict: each parameter gets exactly one source, and what is missing, unexpected or misshapen is an error.
Networks are built on the meta device and the memory-mapped tensors are assigned, not copied: a file whose names and
dtype are ours costs no memory of its own until its pages are used.

Sources of the names: black-forest-labs/flux 802fb47, modules/*.py; diffusers 0.42.1, transformer_flux.py and
autoencoder_kl.py; ComfyUI (October 2025) for prefixes and fp8 scales; transformers for CLIP and T5, whose names are
used as they are.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_private
from torch import Tensor, nn

from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.clip import ClipParams, ClipTextEncoder
from kontext_min.extras.quantize import QUANTIZED, QuantizedLinear, quantize, storage
from kontext_min.flux import Flux, FluxParams
from kontext_min.names import SWAPPED, autoencoder_modules, flux_modules, split_rows
from kontext_min.t5 import T5Encoder, T5Params

# ------------------------------------------------------------------------------------------------- files and headers


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as its header describes it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: F32, BF16, F16, F8_E4M3, ...
    file: Path | None = None
    name: str = ""  # in the file, before any prefix was taken off
    offset: int = 0  # of its first byte in the file
    nbytes: int = 0


Headers = dict[str, Stored]
Device = str | torch.device

FOLDERS = {"transformer": "transformer", "vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
SINGLE_FILES = {
    "transformer": ("flux1*kontext*.safetensors", "flux1*.safetensors"),
    "vae": ("ae.safetensors",),
    "clip": ("clip_l*.safetensors",),
    "t5": ("t5xxl*.safetensors",),
}
NOUNS = {"transformer": "Flux transformer", "vae": "autoencoder", "clip": "CLIP text encoder", "t5": "T5 encoder"}


def find(path: str | Path, part: str) -> list[Path]:
    """The safetensors files of one network.

    Args:
        path: a file; the network's own folder; a hub folder; or a folder of single files (BFL's, ComfyUI's).
        part: transformer, vae, clip or t5.

    Raises:
        FileNotFoundError: nothing there, or nothing of that network.
    """
    path = Path(path)
    noun = NOUNS[part]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected the {noun}. See weights/README.md.")
    if path.is_file():
        return [path]
    if (path / FOLDERS[part]).is_dir():
        return find(path / FOLDERS[part], part)
    for index in sorted(path.glob("*.safetensors.index.json")):
        shards = sorted({path / shard for shard in _read_json(index).get("weight_map", {}).values()})
        absent = [shard.name for shard in shards if not shard.exists()]
        if absent:
            raise FileNotFoundError(
                f"{index}: names {len(shards)} shards, not there: {', '.join(absent)}; get them too."
            )
        return shards
    for pattern in (*SINGLE_FILES[part], "diffusion_pytorch_model.safetensors", "model.safetensors"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(f.name for f in found)
            raise ValueError(f"{path}: several files may be the {noun} ({names}); name one of them.")
        if found:
            return found
    raise FileNotFoundError(
        f"{path}: no {noun} here; expected {FOLDERS[part]}/ or {SINGLE_FILES[part][0]}. See weights/README.md."
    )


@dataclass(frozen=True)
class Weights:
    """Where the networks are: one folder, and single files that override it part by part."""

    root: Path
    transformer: Path | None = None
    vae: Path | None = None
    clip: Path | None = None
    t5: Path | None = None

    def path(self, part: str) -> Path:
        """File or folder of one network, for `find` and the load functions."""
        return getattr(self, part) or self.root

    def tokenizer(self, folder: str) -> Path:
        """The folder `tokenizer` or `tokenizer_2`; single files carry no vocabularies, so they are always in root."""
        return self.root / folder


def read_headers(files: Iterable[Path]) -> Headers:
    """Names, shapes and dtypes of all tensors in some safetensors files.

    Raises:
        ValueError: a file is no safetensors file, or not whole.
    """
    headers: Headers = {}
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError(f"{file}: not a safetensors file ({size} bytes); expected one, download it again.")
            try:
                entries = json.loads(f.read(length))
                entries.pop("__metadata__", None)
                end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
                new = {}
                for name, e in entries.items():
                    start, stop = e["data_offsets"]
                    new[name] = Stored(tuple(e["shape"]), e["dtype"], file, name, 8 + length + start, stop - start)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{file}: broken safetensors header; download it again.") from None
        if end > size:
            raise ValueError(f"{file}: truncated, {size} bytes of {end}; download it again.")
        headers |= new
    return headers


UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it, so that it is whole or absent.

    The library's own can be read by their owner alone, and have their metadata in a random order; here permissions are
    the usual ones, and equal tensors and texts are equal files, byte by byte.
    """
    aside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")  # machines may share the folder
    try:
        save_private(dict(tensors), aside, metadata=dict(metadata) if metadata else None)
        aside.chmod(0o666 & ~UMASK)
        with aside.open("r+b") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
            if metadata:
                header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
                f.seek(8)
                f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def metadata(file: Path) -> dict[str, str]:
    """The text in the header of a safetensors file; ValueError as for `read_headers`."""
    read_headers([file])
    with file.open("rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little"))).get("__metadata__", {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again.") from None


def fingerprint(path: str | Path, part: str) -> str:
    """16 hex digits that name the weights by content: headers, sizes and 64 samples of each file, not all 24 GB."""
    digest = hashlib.sha256()
    for file in find(path, part):
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            digest.update(f.read(length) + str(size).encode())
            for k in range(64):
                f.seek(8 + length + (size - 8 - length) * k // 64)
                digest.update(f.read(1024))
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------- from headers to a complete map

PREFIXES = {  # all-in-one checkpoints hold several networks; the longest prefix that occurs selects ours
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.",),
    "clip": ("text_encoders.clip_l.transformer.text_model.", "text_encoders.clip_l.transformer.", "text_model."),
    "t5": ("text_encoders.t5xxl.transformer.",),
}
SCALES = ("scale_weight", "weight_scale")  # ComfyUI's old and new spelling: W = fp8 * scale
IGNORED = (  # of no use here: scales for fp8 x fp8 products, markers, and heads that third-party exports carry along
    *("scale_input", "input_scale", "comfy_quant", "scaled_fp8"),
    *("position_ids", "logit_scale", "text_projection.weight"),
)


def strip_prefix(headers: Headers, part: str) -> Headers:
    """Only the tensors of one network, named as the network names them."""
    for prefix in PREFIXES[part]:
        found = {name.removeprefix(prefix): stored for name, stored in headers.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(headers)


def sources_of(model: nn.Module, headers: Headers, modules: Mapping[str, list[str]], part: str) -> dict[str, list[str]]:
    """Which stored tensors make each parameter: every parameter once, every stored tensor used or an error.

    Args:
        model: the network, may be on meta.
        headers: its file's, prefix stripped.
        modules: our module name -> theirs, for files in diffusers' names; empty where there is one layout.
        part: transformer, vae, clip or t5.

    Returns:
        parameter name -> names of the stored tensors whose rows, joined, it consists of.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, all of them in one line, with the likely reason.
    """
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    by_theirs = {}
    for name in wanted:
        module, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf
        by_theirs[name] = [f"{their}.{leaf}" for their in modules.get(module, [])] or [name]
    ours = sum(name in headers for name in wanted)
    theirs = sum(source in headers for sources in by_theirs.values() for source in sources)
    sources = by_theirs if theirs > ours else {name: [name] for name in wanted}
    if part == "t5" and "shared.weight" not in headers:  # one matrix under two names; files carry either or both
        sources["shared.weight"] = ["encoder.embed_tokens.weight"]

    used = {s for names in sources.values() for s in names}
    missing = sorted(used - headers.keys())
    spare = {"encoder.embed_tokens.weight", "shared.weight"} if part == "t5" else set()
    unexpected = sorted(
        name for name in headers.keys() - used - spare if not name.endswith(IGNORED) and not name.endswith(SCALES)
    )
    misshapen = []
    for name, shape in wanted.items():
        stored = [headers[s].shape for s in sources[name] if s in headers]
        if len(stored) < len(sources[name]):
            continue
        rows = (sum(s[0] for s in stored if s), *stored[0][1:])
        if rows != shape and (*rows, 1, 1) != shape:  # diffusers stores 1x1 convolutions as matrices
            misshapen.append(f"{name} {list(rows)} for {list(shape)}")
    if missing or unexpected or misshapen:
        file = next((s.file for s in headers.values()), None)
        kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        found = "; ".join(f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in kinds if v)
        raise ValueError(f"{file}: not this {NOUNS[part]}: {found}. {likely(headers, part)}")
    return sources


def likely(headers: Headers, part: str) -> str:
    """A guess at what a file is that is not what it should be."""
    names = " ".join(headers)
    signs = (
        ("lora", "a LoRA: give it to --lora, not as a base model"),
        ("lokr", "a LoKr adapter, which is not read here"),
        ("diffusion_model.input_blocks", "a Stable Diffusion checkpoint; a Flux is needed"),
        ("SelfAttention", NOUNS["t5"]),
        ("self_attn.q_proj", NOUNS["clip"]),
        ("single_blocks.", NOUNS["transformer"]),
        ("single_transformer_blocks.", NOUNS["transformer"]),
        ("decoder.conv_in", NOUNS["vae"]),
    )
    for sign, kind in signs:
        if sign in names and kind == NOUNS[part]:
            return f"It is a {kind} of another size or an incomplete one; check config.json and download it again."
        if sign in names:
            return f"It looks like {'' if kind.startswith('a ') else 'the '}{kind}."
    return f"It does not look like a {NOUNS[part]} at all; see weights/README.md for the right file."


# -------------------------------------------------------------------------------------------------- reading the tensors

DTYPES = {  # safetensors' spelling of what weights are stored in
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8},
}
WIDENED = ("F8_E4M3", "F8_E5M2", "I8")  # I8: what lora_files.py merge --quantize int8 writes


class TensorReader:
    """Opens each file once and hands out its tensors, memory-mapped; codes come out as float32, times their scale."""

    def __init__(self, headers: Headers, mapped: bool = True) -> None:
        self.headers, self.mapped = headers, mapped
        self.files: dict[Path, Any] = {}

    def raw(self, name: str) -> Tensor:
        """The tensor as stored, in its shape; with `mapped` false in memory of its own, since mapped pages that were
        read stay.

        Raises:
            ValueError: a broken file.
        """
        stored = self.headers[name]
        if not self.mapped:
            data = torch.empty(stored.nbytes, dtype=torch.uint8)
            with stored.file.open("rb", buffering=0) as f:
                read_at(f, stored.offset, data)
            return data.view(DTYPES[stored.dtype]).view(stored.shape)
        if stored.file not in self.files:
            try:
                self.files[stored.file] = safe_open(stored.file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{stored.file}: broken safetensors file ({error}); download it again.") from None
        return self.files[stored.file].get_tensor(stored.name)

    def scale(self, name: str) -> Tensor | None:
        """What an fp8 weight is multiplied by: (1, 1), or (out, 1), or None."""
        names = [f"{name.removesuffix('.weight')}.{spelling}" for spelling in SCALES]
        return next((self.raw(n).float().reshape(-1, 1) for n in names if n in self.headers), None)

    def __call__(self, name: str) -> Tensor:
        """The tensor, dequantised."""
        tensor = self.raw(name)
        if self.headers[name].dtype not in WIDENED:
            return tensor
        tensor, scale = tensor.float(), self.scale(name)
        return tensor if scale is None else tensor * scale.reshape(-1, *[1] * (tensor.ndim - 1))


def read_at(file: BinaryIO, offset: int, data: Tensor) -> None:
    """Fill a flat uint8 CPU tensor from a place in a file, which is opened without a buffer.

    Raises:
        ValueError: the file ends before that.
    """
    file.seek(offset)
    view = memoryview(data.numpy())
    while view:  # one read gives 2 GB at most
        got = file.readinto(view)
        if not got:
            raise ValueError(f"{file.name}: ends too early; download it again.")
        view = view[got:]


def scales_of(read: TensorReader, names: Sequence[str]) -> Tensor | None:
    """Scales of the rows of a weight that some stored tensors make: (out, 1) float32, or None if it has none."""
    found = [read.scale(n) for n in names]
    if all(s is None for s in found):
        return None
    rows = [read.headers[n].shape[0] for n in names]
    return torch.cat([(torch.ones(1, 1) if s is None else s).expand(r, 1) for s, r in zip(found, rows, strict=True)])


def narrow(read: TensorReader, names: Sequence[str], kind: str, device: Device) -> tuple[Tensor, Tensor | None]:
    """The weight that some stored tensors make, joined along the rows, as codes and scales of quantize.py.

    What a file holds in fp8 stays so unless 4 bits are asked for: a second rounding would add its error, save nothing.
    """
    if kind == "stored" or (kind != "nf4" and all(read.headers[n].dtype in WIDENED for n in names)):
        codes = torch.cat([read.raw(n) for n in names]) if len(names) > 1 else read.raw(names[0])
        scales = scales_of(read, names)
        return codes.to(device), None if scales is None else scales.to(device)
    return quantize(torch.cat([read(n).to(device) for n in names]), kind)


Model = TypeVar("Model", bound=nn.Module)


def assemble(
    model: Model,
    headers: Headers,
    sources: Mapping[str, list[str]],
    dtype: torch.dtype | None,
    device: Device,
    kind: str | None = None,
    leave: Container[str] = (),
) -> Model:
    """Fill a network on meta from its files, parameter by parameter; returned frozen and in eval mode.

    Args:
        model: on meta.
        headers: of its files.
        sources: parameter name -> names of the stored tensors whose rows it consists of.
        dtype: to convert to; else as stored.
        device: where to put it.
        kind: how the Linears of the blocks are kept, see quantize.py; "stored" where the file is narrower than dtype.
        leave: parameters that stay on meta.
    """
    if dtype is None and any(s.dtype in WIDENED for s in headers.values()):
        dtype = torch.bfloat16  # an fp8 file holds the rest in several dtypes: one for all
    read = TensorReader(headers, mapped=kind not in QUANTIZED)
    state = {}
    for name, parameter in model.state_dict().items():
        if name in leave:
            continue
        module, _, leaf = name.rpartition(".")
        store = storage(module, kind) if kind and leaf == "weight" else None
        if store == "stored" and (not dtype or DTYPES[headers[sources[name][0]].dtype].itemsize >= dtype.itemsize):
            store = None
        if store:
            codes, scales = narrow(read, sources[name], store, device)
            state |= {f"{module}.codes": codes} | ({} if scales is None else {f"{module}.scales": scales})
            model.set_submodule(module, QuantizedLinear(model.get_submodule(module), codes, scales))
            continue
        parts = [read(source) for source in sources[name]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if name.startswith(SWAPPED) and sources[name] != [name]:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        state[name] = tensor.reshape(parameter.shape).to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=not leave, assign=True)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- the networks


def _config(files: list[Path], key: str) -> dict[str, Any]:
    """config.json beside the files if it speaks of this network (has `key`), else the `config` of the metadata."""
    beside = files[0].parent / "config.json"
    if beside.exists():
        config = _read_json(beside)
        if key in config:
            return config
    try:
        return json.loads(metadata(files[0]).get("config", "{}"))
    except ValueError:
        return {}


def _known(params_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that are fields of a params class, lists as tuples."""
    names = {f.name for f in fields(params_class)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}


def axes_of(head_dim: int) -> tuple[int, int, int]:
    """How Flux splits a head over (index, row, column): 128 -> (16, 56, 56), an eighth for the index, made even."""
    first = 2 * math.ceil(head_dim / 16)
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def flux_params(headers: Headers, config: Mapping[str, Any]) -> FluxParams:
    """Sizes of a Flux from diffusers' config, from BFL's own names, or from the shapes."""
    if "num_single_layers" in config:
        heads, dim = config["num_attention_heads"], config["attention_head_dim"]
        return FluxParams(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            vec_in_dim=config["pooled_projection_dim"],
            context_in_dim=config["joint_attention_dim"],
            hidden_size=heads * dim,
            num_heads=heads,
            depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"],
            axes_dim=tuple(config.get("axes_dims_rope", axes_of(dim))),
            guidance_embed=config["guidance_embeds"],
        )
    if "depth_single_blocks" in config:
        return FluxParams(**_known(FluxParams, config))
    bfl = "img_in.weight" in headers
    name = (lambda module, leaf="weight": f"{module}.{leaf}") if bfl else _diffusers_name
    hidden, in_channels = headers[name("img_in")].shape
    head_dim = headers[name("single_blocks.0.norm.query_norm", "scale" if bfl else "weight")].shape[0]
    return FluxParams(
        in_channels=in_channels,
        out_channels=headers[name("final_layer.linear")].shape[0],
        vec_in_dim=headers[name("vector_in.in_layer")].shape[1],
        context_in_dim=headers[name("txt_in")].shape[1],
        hidden_size=hidden,
        mlp_ratio=headers[name("double_blocks.0.img_mlp.0")].shape[0] / hidden,
        num_heads=hidden // head_dim,
        depth=_count(headers, "double_blocks." if bfl else "transformer_blocks."),
        depth_single_blocks=_count(headers, "single_blocks." if bfl else "single_transformer_blocks."),
        axes_dim=axes_of(head_dim),
        guidance_embed=name("guidance_in.in_layer") in headers,
    )


def _diffusers_name(module: str, leaf: str = "weight") -> str:
    return f"{flux_modules(FluxParams(depth=1, depth_single_blocks=1))[module][0]}.{leaf}"


def _count(headers: Headers, prefix: str) -> int:
    """Number of blocks: one more than the highest index behind the prefix."""
    return 1 + max((int(n[len(prefix) :].split(".")[0]) for n in headers if n.startswith(prefix)), default=-1)


def autoencoder_params(headers: Headers, config: Mapping[str, Any]) -> AutoencoderParams:
    """Sizes of an autoencoder; from the shapes alone, shift and scale are the official ones."""
    if "block_out_channels" in config:
        widths = config["block_out_channels"]
        return AutoencoderParams(
            in_channels=config["in_channels"],
            ch=widths[0],
            out_ch=config["out_channels"],
            ch_mult=tuple(w // widths[0] for w in widths),
            num_res_blocks=config["layers_per_block"],
            z_channels=config["latent_channels"],
            scale_factor=config["scaling_factor"],
            shift_factor=config["shift_factor"],
        )
    if "ch_mult" in config:
        return AutoencoderParams(**_known(AutoencoderParams, config))
    bfl = "encoder.norm_out.weight" in headers
    level, block = ("encoder.down.", "block") if bfl else ("encoder.down_blocks.", "resnets")
    ch, in_channels = headers["encoder.conv_in.weight"].shape[:2]
    widths = [headers[f"{level}{i}.{block}.0.conv2.weight"].shape[0] for i in range(_count(headers, level))]
    return AutoencoderParams(
        in_channels=in_channels,
        ch=ch,
        out_ch=headers["decoder.conv_out.weight"].shape[0],
        ch_mult=tuple(w // ch for w in widths),
        num_res_blocks=_count(headers, f"{level}0.{block}."),
        z_channels=headers["decoder.conv_in.weight"].shape[1],
    )


def clip_params(headers: Headers, config: Mapping[str, Any]) -> ClipParams:
    """Sizes of a CLIP text encoder; from the shapes alone, a head has 64 components, as every CLIP of OpenAI's."""
    if "num_hidden_layers" in config:
        return ClipParams(**_known(ClipParams, config))
    vocab, hidden = headers["embeddings.token_embedding.weight"].shape
    return ClipParams(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=headers["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(headers, "encoder.layers."),
        num_attention_heads=hidden // 64,
        max_position_embeddings=headers["embeddings.position_embedding.weight"].shape[0],
    )


def t5_params(headers: Headers, config: Mapping[str, Any]) -> T5Params:
    """Sizes of a T5 encoder."""
    if "d_kv" in config:
        return T5Params(**_known(T5Params, config))
    embedding = "shared.weight" if "shared.weight" in headers else "encoder.embed_tokens.weight"
    vocab, d_model = headers[embedding].shape
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = headers[f"{attention}relative_attention_bias.weight"].shape
    return T5Params(
        vocab_size=vocab,
        d_model=d_model,
        d_kv=headers[f"{attention}q.weight"].shape[0] // heads,
        d_ff=headers["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        num_layers=_count(headers, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


_NETWORKS = {  # part: (class, params from headers and config, a key of its config.json, names in diffusers)
    "transformer": (Flux, flux_params, "num_single_layers", flux_modules),
    "vae": (Autoencoder, autoencoder_params, "block_out_channels", autoencoder_modules),
    "clip": (ClipTextEncoder, clip_params, "num_hidden_layers", None),
    "t5": (T5Encoder, t5_params, "d_kv", None),
}


def outline(part: str, path: str | Path, params: Any = None) -> tuple[Any, Headers, dict[str, list[str]]]:
    """A network on meta, what its files hold, and which stored tensors make each of its parameters.

    Raises:
        ValueError: the files hold another network, or not all of this one.
    """
    network, infer, key, modules = _NETWORKS[part]
    files = find(path, part)
    headers = strip_prefix(read_headers(files), part)
    if params is None:
        try:
            params = infer(headers, _config(files, key))
        except (KeyError, IndexError, TypeError, ZeroDivisionError):
            raise ValueError(f"{files[0]}: no {NOUNS[part]}. {likely(headers, part)}") from None
    with torch.device("meta"):
        model = network(params)
    return model, headers, sources_of(model, headers, modules(params) if modules else {}, part)


def load_flux(
    path: str | Path,
    params: FluxParams | None = None,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    kind: str | None = None,
) -> Flux:
    """The transformer, frozen, from any official layout.

    Args:
        path: file or folder, see `find`.
        params: sizes; else from config.json, else from the metadata key `config`, else from the shapes.
        dtype: to convert to; else as stored (fp8 becomes bfloat16).
        device: where to put it; on the CPU the memory stays mapped to the file.
        kind: int8, fp8 or nf4 narrows the Linears of the blocks as they are read; "stored" leaves them as the file has
            them and widens them to `dtype` one at a time when they are used (quantize.py).

    Raises:
        FileNotFoundError: no such file. ValueError: not a whole Flux, with what is missing, unexpected, misshapen.
    """
    return assemble(*outline("transformer", path, params), dtype, device, kind)


def load_autoencoder(
    path: str | Path, params: AutoencoderParams | None = None, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> Autoencoder:
    """The autoencoder; arguments and errors as for load_flux."""
    return assemble(*outline("vae", path, params), dtype, device)


def load_clip(
    path: str | Path, params: ClipParams | None = None, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> ClipTextEncoder:
    """The CLIP text encoder, with or without `text_model.` in its names; arguments and errors as for load_flux."""
    return assemble(*outline("clip", path, params), dtype, device)


def load_t5(
    path: str | Path,
    params: T5Params | None = None,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    kind: str | None = None,
) -> T5Encoder:
    """The T5 encoder; arguments as for load_flux.

    Raises:
        ValueError: as load_flux, and for float16, in which T5-XXL overflows.
    """
    if dtype == torch.float16:
        raise ValueError("T5: got dtype float16, in which it overflows; take bfloat16 or float32.")
    return assemble(*outline("t5", path, params), dtype, device, kind)


def save_flux(
    model: Flux,
    folder: str | Path,
    metadata: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a transformer as the hub folder has it: diffusers' names and config.json, so that diffusers loads it too.

    Args:
        model: a Flux with mlp_ratio 4, which diffusers takes for granted.
        folder: is made; the files are written aside and renamed.
        metadata: text kept in the header.
        tensors: values by parameter name instead of the model's own.

    Raises:
        ValueError: another mlp_ratio.
    """
    params, values = model.params, tensors or model.state_dict()
    if params.mlp_ratio != 4:
        raise ValueError(f"save_flux: mlp_ratio {params.mlp_ratio}, but diffusers' layout knows 4 only.")
    modules, state = flux_modules(params), {}
    for name, tensor in values.items():
        module, _, leaf = name.rpartition(".")
        names = modules[module]
        if module == SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        leaf = "weight" if leaf == "scale" else leaf
        for their, part in zip(names, split_rows(tensor, len(names), params.hidden_size), strict=True):
            state[f"{their}.{leaf}"] = part.detach().cpu().contiguous()
    config = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": params.hidden_size // params.num_heads,
        "axes_dims_rope": list(params.axes_dim),
        "guidance_embeds": params.guidance_embed,
        "in_channels": params.in_channels,
        "joint_attention_dim": params.context_in_dim,
        "num_attention_heads": params.num_heads,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "out_channels": params.out_channels,
        "patch_size": 1,
        "pooled_projection_dim": params.vec_in_dim,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt", **(metadata or {})})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
