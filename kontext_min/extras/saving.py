"""Write files that are complete or absent: safetensors, pictures, and a transformer in the hub's layout.

Sources: the format, https://github.com/huggingface/safetensors#format; diffusers 0.42.1 for names and config.json.
"""

import io
import json
import os
import platform
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kontext_min.checkpoints import DTYPES, SWAPPED, flux_modules
from kontext_min.flux import Flux


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block names the file: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


def append_line(path: Path, line: str) -> None:
    """Write a line at the end of a file, and not behind one that a kill or a full disk has cut."""
    with naming(path), path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        file.write(b"\n" * (file.read() not in (b"", b"\n")) + line.encode() + b"\n")


def write_picture(picture: Image.Image, path: Path, kind: str, **options: Any) -> None:
    """Write a picture by way of memory: Pillow itself does not notice if a full disk takes only a part of it."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    with naming(path):
        path.write_bytes(content.getbuffer())


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under another name and rename it, so that it is whole or absent.

    The library's own function lets only the owner read the file, and orders metadata at random. Here equal tensors of
    any shape (*shape) and equal texts give equal files, byte by byte.
    """
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that all are aligned
    header, end = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}, 0
    for name in order:
        x, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": spelling[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")  # machines may share the folder
    try:
        with naming(path), aside.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                f.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            f.flush()
            os.fsync(f.fileno())  # else a power loss may leave a file of zeros under the name
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """8 hex digits, CRC-32, that tell whether the values of a file (*shape) are those that were written."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def split_rows(tensor: Tensor, parts: int, hidden: int) -> tuple[Tensor, ...]:
    """Rows of a fused weight or bias as diffusers' 1, 3 (q, k, v) or 4 (q, k, v, mlp) modules have them."""
    return tensor.split([hidden, hidden, hidden, len(tensor) - 3 * hidden][:parts] if parts > 1 else len(tensor))


def save_flux(
    model: Flux,
    folder: str | Path,
    metadata: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a transformer as the hub folder has it: diffusers' names and config.json, so that diffusers loads it too.

    Args:
        model: a Flux with mlp_ratio 4, which diffusers takes for granted.
        folder: where to write; it is created.
        metadata: text for the header.
        tensors: values by parameter name, instead of the model's own.

    Raises:
        ValueError: another mlp_ratio.
    """
    params, values = model.params, tensors or model.state_dict()
    if params.mlp_ratio != 4:
        raise ValueError(f"save_flux: mlp_ratio {params.mlp_ratio}, but diffusers' layout has only 4.")
    modules, state = flux_modules(params), {}
    for name, tensor in values.items():
        module, _, leaf = name.rpartition(".")
        if module == SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        leaf = "weight" if leaf == "scale" else leaf
        rows = split_rows(tensor, len(modules[module]), params.hidden_size)
        for their, part in zip(modules[module], rows, strict=True):
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
