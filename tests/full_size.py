"""Write a random Kontext of full size to disk (24 GB transformer, 9.5 GB T5), then run sample.py and train.py on it.

    python tests/full_size.py FOLDER                      writes FOLDER/weights (34 GB) if it is missing, runs all
    python tests/full_size.py FOLDER --only sample        one of: write, sample, train, sample-int8, train-int8

The runs use a 256x256 picture and --stream; int8 writes 12 GB more to FOLDER/runs/cache. Each run prints its peak
resident memory (ru_maxrss of its process, the same as VmHWM), the time per block and the bytes read. One pass through
the transformer is 13 TFLOP: minutes on a CPU. Shapes are those of the sheets in tests/layouts. Values are normal with
deviation 1 / sqrt(inputs), so nothing overflows. The tokenizers are the small ones of weights/tiny.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TINY = ROOT / "weights" / "tiny"
PERIOD = 8_388_593  # values repeat after so many; a prime, so no two rows are equal
SHARDS = {"transformer": 3, "text_encoder_2": 2, "text_encoder": 1, "vae": 1}
SHEETS = {
    "transformer": "transformer.diffusers",
    "text_encoder_2": "text_encoder_2.t5xxl",
    "text_encoder": "text_encoder.clip_l",
    "vae": "vae.diffusers",
}
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
CONFIGS = {  # entries that differ from weights/tiny
    "transformer": {
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "joint_attention_dim": 4096,
        "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "pooled_projection_dim": 768,
    },
    "text_encoder_2": {
        "d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    },
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "projection_dim": 768, "vocab_size": 49408,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
}  # fmt: skip


def shapes(sheet: str) -> dict[str, list[int]]:
    """Name and shape of every tensor of a layout sheet. A key with {a..b} is one tensor for each number."""
    found = {}
    for key, entry in json.loads((TESTS / "layouts" / f"{sheet}.json").read_text())["tensors"].items():
        names = [key]
        for text, a, b in re.findall(r"(\{(\d+)\.\.(\d+)\})", key):
            names = [n.replace(text, str(i), 1) for n in names for i in range(int(a), int(b) + 1)]
        found |= dict.fromkeys(names, entry["shape"])
    return found


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_file(path: Path, tensors: dict[str, list[int]], normal: np.ndarray | None) -> None:
    """A bfloat16 safetensors file: matrices normal, biases 0, norms 1. Without `normal`, a hole of the same size."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    scaled: dict[int, np.ndarray] = {}
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        if normal is None:
            f.truncate(8 + len(text) + offset)
            return
        for name, shape in tensors.items():
            count = math.prod(shape)
            if len(shape) == 1:
                f.write(bfloat16(np.full(count, 0.0 if name.endswith("bias") else 1.0)).tobytes())
                continue
            inputs = 1 if "shared" in name or "embedding" in name else math.prod(shape[1:])
            if inputs not in scaled:
                scaled[inputs] = bfloat16(normal / math.sqrt(inputs))
            while count > 0:
                f.write(scaled[inputs][:count].data)
                count -= PERIOD


def write_weights(folder: Path, text_tokens: int, hollow: bool = False) -> None:
    """Write the hub folder part by part. A part that exists is kept. Hollow files take no disk space."""
    normal = None if hollow else np.random.default_rng(0).standard_normal(PERIOD, dtype=np.float32)
    for part, sheet in SHEETS.items():
        if (folder / part / "config.json").exists():
            continue
        began = time.monotonic()
        (folder / part).mkdir(parents=True, exist_ok=True)
        tensors, count, stem = shapes(sheet), SHARDS[part], STEMS.get(part, "model")
        total = sum(2 * math.prod(s) for s in tensors.values())
        files: list[dict[str, list[int]]] = [{} for _ in range(count)]
        size = 0
        for name, shape in tensors.items():
            files[min(size * count // total, count - 1)][name] = shape
            size += 2 * math.prod(shape)
        names = [f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
        names = names if count > 1 else [f"{stem}.safetensors"]
        for name, chosen in zip(names, files, strict=True):
            write_file(folder / part / name, chosen, normal)
        if count > 1:
            index = {tensor: name for name, chosen in zip(names, files, strict=True) for tensor in chosen}
            (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        config = json.loads((TINY / part / "config.json").read_text()) | CONFIGS[part]
        (folder / part / "config.json").write_text(json.dumps(config, indent=1))
        print(f"{part}: {total / 1e9:.1f} GB in {time.monotonic() - began:.0f} s", flush=True)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TINY / part, folder / part, dirs_exist_ok=True)
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": text_tokens}))


def run(name: str, command: list[str], folder: Path) -> None:
    """Run a command in a folder; print its peak resident memory and its time."""
    print(f"\n{name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=folder)  # its cache is runs/cache below it
    _, status, usage = os.wait4(process.pid, 0)
    print(
        f"{name}: exit code {os.waitstatus_to_exitcode(status)}, peak {usage.ru_maxrss / 1e6:.2f} GB resident,"
        f" {time.monotonic() - began:.0f} s, {usage.ru_utime:.0f} s of them on the CPU",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for weights, cache and results; 46 GB")
    parser.add_argument(
        "--only", choices=("write", "sample", "train", "sample-int8", "train-int8"), help="default: all of them"
    )
    parser.add_argument("--text-tokens", type=int, default=512, help="tokens of the prompt (default: 512)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    write_weights(folder / "weights", arguments.text_tokens)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    photo = Image.open(sorted((TESTS / "photos").glob("*.jpg"))[0]).convert("RGB")
    photo.resize((256, 256 * photo.height // photo.width)).crop((0, 0, 256, 256)).save(pictures / "0.png")
    shared = ["--weights", str(folder / "weights"), "--stream"]
    sample = [str(ROOT / "sample.py"), "--input", str(pictures / "0.png"), "--steps", "1", *shared]
    train = [str(ROOT / "train.py"), "--hr-root", str(pictures), "--resolution", "256", "--steps", "2",
             "--accumulate", "1", "--workers", "1", "--validate-every-epochs", "0", "--overwrite", *shared]  # fmt: skip
    commands = {
        "sample": [*sample, "--output", str(folder / "restored.png")],
        "train": [*train, "--output-dir", str(folder / "run")],
        "sample-int8": [*sample, "--output", str(folder / "restored-int8.png"), "--quantize", "int8"],
        "train-int8": [*train, "--output-dir", str(folder / "run-int8"), "--quantize", "int8"],
    }
    for name, command in commands.items():
        if arguments.only in (None, name):
            run(name, command, folder)


if __name__ == "__main__":
    main()
