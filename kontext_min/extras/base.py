"""Load the base model as the flags say: which files, and the transformer as stored, in 8 or 4 bits, streamed, compiled.

Both programs use it. It imports quantize.py, stream.py and compiling.py only if their flag is given.
"""

import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from kontext_min.checkpoints import (
    FOLDERS,
    NETWORKS,
    NOUNS,
    PREFIXES,
    SINGLE_FILES,
    WIDENED,
    by_our_names,
    find,
    load_flux,
    mapped,
    metadata,
    read_headers,
    read_json,
)
from kontext_min.extras.fingerprint import note_zeros
from kontext_min.extras.last_block import skip_unread
from kontext_min.extras.lora_files import note_which, trained_with
from kontext_min.flux import Flux

FIXED = {  # part: a key of its config.json, and the value that the code takes for granted
    "vae": ("norm_num_groups", 32),
    "clip": ("hidden_act", "quick_gelu"),
    "t5": ("feed_forward_proj", "gated-gelu"),
}
HUB_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
NOTE = ".comfy_quant"
CHANGED = re.compile("rot|hadamard|transform|smooth|group|block|svd")  # keys for weights that are not themselves
# Formats of ComfyUI that are a weight times its scale.
PLAIN = ("float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e5m2", "int8_tensorwise")


@dataclass(frozen=True)
class Weights:
    """Where the networks are: one folder, which holds the vocabularies too, and paths that override it by network."""

    root: Path
    transformer: Path | None = None
    vae: Path | None = None
    clip: Path | None = None
    t5: Path | None = None

    def path(self, part: str) -> Path:
        """File or folder of one network, for `find` and the load functions."""
        return getattr(self, part) or self.root


def training_of(path: Path) -> tuple[Path, dict[str, Any]]:
    """The first file of a transformer, and what its header says of its training: nothing but for one of train.py.

    Raises:
        OSError, ValueError: as for find and trained_with.
    """
    file = find(path, "transformer")[0]
    return file, trained_with(metadata(file), file)


def check_files(path: Path, part: str) -> None:
    """Look at the files of a network for what its names and shapes do not tell.

    Raises:
        ValueError: config.json names another kind of network, or ComfyUI packed the weights in a way that is not read.
    """
    files = find(path, part)
    if part in FIXED:
        (key, ours), config = FIXED[part], files[0].parent / "config.json"
        there = read_json(config) if config.is_file() else {}
        if NETWORKS[part][3] in there and there.get(key, ours) != ours:  # else it is that of another network
            raise ValueError(f"{config}: {key} is {there[key]!r:.40}, expected {ours!r}: no {NOUNS[part]} of FLUX.")
    for file in files:
        if packed := _packed(file, part):
            raise ValueError(f"{file}: packed as {packed:.80}, which is not read; take bfloat16 or scaled fp8.")
    note_zeros(path, part)
    folder = files[0].parent
    if part == "transformer":
        note_which(str(path), path, *training_of(path))
    patterns, named = ("[!.]*.safetensors",), "its index names the weights"
    if not any(folder.glob("[!.]*.safetensors.index.json")):  # a folder may hold other networks too
        hub = HUB_FILES if folder.name == FOLDERS[part] else ()
        patterns, named = (*SINGLE_FILES[part], *hub), f"read is {files[0].name}"
    others = sorted({file for pattern in patterns for file in folder.glob(pattern)} - {*files})
    if others and Path(path).is_dir():
        print(f"note: {folder}: {named}; not read: {others[0].name}{' ...' * (len(others) > 1)}", file=sys.stderr)


def _packed(file: Path, part: str) -> str:
    """The first of ComfyUI's notes on narrow weights that asks for more than a scale, such as a rotation (convrot).

    The notes are JSON: tensors of bytes beside the weights, or one text in the header. Of an all-in-one file only those
    of this network count.
    """
    headers = read_headers([file])
    prefix = next((p for p in PREFIXES[part] if any(name.startswith(p) for name in headers)), "")
    ours = [s for s in headers.values() if s.name.startswith(prefix) and s.name.endswith(NOTE)]
    notes = {s.name: bytes(mapped(s).view(-1).tolist()) for s in ours}
    notes["header"] = metadata(file).get("_quantization_metadata", "{}").encode()
    others = tuple(p for some in PREFIXES.values() for p in some if p not in PREFIXES[part])
    for name, text in notes.items():
        with suppress(ValueError, TypeError, LookupError, AttributeError):
            told = json.loads(text)
            layers = told.get("layers", {}) if name == "header" else {name: told}
            layers = [layer for of, layer in layers.items() if not of.startswith(others)]
            if all(layer["format"] in PLAIN for layer in layers) and not any(
                layer[key] and CHANGED.search(key) for layer in layers for key in layer
            ):
                continue
        return text.decode(errors="replace")
    return ""


def dtypes(path: Path) -> set[str]:
    """Of the matrices of a transformer as stored; the other networks of an all-in-one file do not count."""
    sources = by_our_names(read_headers(find(path, "transformer")), "transformer").values()
    return {s.dtype for s in chain.from_iterable(sources) if len(s.shape) == 2}


def load_base(settings: Any, path: Path, dtype: torch.dtype, device: torch.device, cache_dir: Path) -> tuple[Flux, Any]:
    """The transformer, and its stream if the weights are streamed (call `wrap` of it before it runs)."""
    flux, stream = _load(settings, path, dtype, device, cache_dir)
    if not flux.params.guidance_embed and settings.guidance != type(settings).guidance:
        print(f"note: --guidance has no effect: {path} has no guidance embedding", file=sys.stderr)
    if settings.quantize in ("int8", "fp8") and not dtypes(path).isdisjoint(WIDENED):
        print(f"note: --quantize {settings.quantize}: {path} has 8 bits already and is used as it is", file=sys.stderr)
    if settings.compile:  # one graph per kind of block, for any number of tokens
        from kontext_min.extras.compiling import compile_blocks

        compile_blocks(flux)
    else:  # inside of a graph it would be compiled anew for each number of tokens
        skip_unread(flux)
    return flux, stream


def _load(settings: Any, path: Path, dtype: torch.dtype, device: torch.device, cache_dir: Path) -> tuple[Flux, Any]:
    if settings.stream:  # two blocks in memory
        from kontext_min.extras.stream import load_streamed

        return load_streamed("transformer", path, dtype, device, settings.quantize, cache_dir / "quantized")
    if settings.quantize:  # 8 or 4 bits
        from kontext_min.extras.quantize import load_quantized

        return load_quantized(path, settings.quantize, dtype, device), None
    return load_flux(path, dtype=dtype, device=device), None
