"""LoRA files: what add_lora trained, in the names that others read.

Format `kohya`: for the module `double_blocks.0.img_attn.qkv`

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight   A  (rank, in)
    lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight     B  (out, rank)
    lora_unet_double_blocks_0_img_attn_qkv.alpha              scalar; the correction counts alpha / rank

ComfyUI and diffusers both read it, at the strength that was trained, because alpha is a tensor of its own (kept in a
header alone, one of them ignores it). What the LoRA was trained for stands in the metadata, as text.

Source of the names: kohya-ss/sd-scripts 48d368f, networks/lora_flux.py and convert_flux_lora.py.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kontext_min.lora import LoRALinear, linears, lora_layers

FORMATS = ("kohya",)
PREFIX = "lora_unet_"


def save_lora(
    model: nn.Module,
    path: str | Path,
    format: str = "kohya",
    metadata: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA of a model, aside first and then renamed, so that the file is whole or absent.

    Args:
        model: with LoRALinear layers.
        path: of the safetensors file.
        format: one of FORMATS.
        metadata: text by name, kept in the header; rank and alpha are added.
        tensors: values by parameter name instead of the model's own: gathered from several processes, or averaged.

    Raises:
        ValueError: unknown format, or no LoRA on the model.
    """
    if format not in FORMATS:
        raise ValueError(f"LoRA format: got {format!r}, expected one of {', '.join(FORMATS)}.")
    layers = lora_layers(model)
    if not layers:
        raise ValueError("save_lora: the model has no LoRA on it; call add_lora first.")
    values = tensors or dict(model.named_parameters())
    stored: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = PREFIX + name.replace(".", "_")
        stored[f"{key}.lora_down.weight"] = values[f"{name}.lora_A"].detach().cpu().contiguous()
        stored[f"{key}.lora_up.weight"] = values[f"{name}.lora_B"].detach().cpu().contiguous()
        stored[f"{key}.alpha"] = torch.tensor(layer.scale * layer.lora_A.shape[0])
    first = next(iter(layers.values()))
    rank = first.lora_A.shape[0]
    header = {
        "format": "pt",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(first.scale * rank),
        **(metadata or {}),
    }
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(stored, aside, metadata=header)
        _sort_metadata(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in a random order; sorted, equal LoRAs are equal files, byte by byte."""
    with path.open("r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        f.seek(8)
        f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file.

    Raises:
        FileNotFoundError: no such file. ValueError: not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file; train one with train.py or check the path.")
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, this is no dict
            return tensors, f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); write or download it again.") from None


def load_lora(model: nn.Module, path: str | Path, strength: float = 1.0) -> dict[str, str]:
    """Put the LoRA of a file on a model; nothing is dropped: each tensor is used or named in the error.

    Args:
        model: a Flux without a LoRA; changed in place.
        path: of the file, format kohya.
        strength: multiplies the correction; 1 is what was trained.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError, ValueError: no such file; other names; shapes that do not fit the model.
    """
    tensors, metadata = read_lora(path)
    modules = {PREFIX + n.replace(".", "_"): n for n in linears(model)}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, leaf = name.partition(".")
        groups.setdefault(key, {})[leaf] = tensor
    unknown = [
        k
        for k, leaves in groups.items()
        if k not in modules or not leaves.keys() >= {"lora_down.weight", "lora_up.weight"}
    ]
    unknown += [k for k, leaves in groups.items() if leaves.keys() - {"lora_down.weight", "lora_up.weight", "alpha"}]
    if unknown or not groups:
        raise ValueError(
            f"{path}: {len(unknown)} of {len(groups)} entries are not kohya names of this model "
            f"({', '.join(unknown[:3])}); expected e.g. {PREFIX}double_blocks_0_img_attn_qkv.lora_down.weight."
        )
    for key, leaves in groups.items():
        base = model.get_submodule(modules[key])
        down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
        rank = down.shape[0]
        if down.shape != (rank, base.in_features) or up.shape != (base.out_features, rank):
            raise ValueError(
                f"{path}: {key} has shapes {tuple(down.shape)} and {tuple(up.shape)}, expected (rank, "
                f"{base.in_features}) and ({base.out_features}, rank): it was trained on another model."
            )
    for key, leaves in groups.items():
        rank = leaves["lora_down.weight"].shape[0]
        alpha = float(leaves.get("alpha", torch.tensor(float(rank))))
        layer = LoRALinear(model.get_submodule(modules[key]), rank, alpha * strength, next(model.parameters()).device)
        with torch.no_grad():
            layer.lora_A.copy_(leaves["lora_down.weight"])
            layer.lora_B.copy_(leaves["lora_up.weight"])
        parent, _, child = modules[key].rpartition(".")
        setattr(model.get_submodule(parent), child, layer.requires_grad_(False))
    return metadata


def strength_of(text: str) -> tuple[Path, float]:
    """`file.safetensors=0.8` -> (file.safetensors, 0.8); the strength is 1 where none is given."""
    match = re.fullmatch(r"(.+)=([-+]?[0-9.]+)", text)
    return (Path(match[1]), float(match[2])) if match else (Path(text), 1.0)
