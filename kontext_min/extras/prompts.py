"""Prompt -> what the transformer reads of it: T5 states for `txt`, the pooled CLIP vector for `y`.

Encoded prompts are kept on disk, keyed by their content (text, both encoders, both vocabularies, length), so T5, twice
the size of anything else on the way, is not even loaded when all prompts are known. The encoders are loaded one after
the other and are gone when this returns.

Source: black-forest-labs/flux at 802fb47, src/flux/modules/conditioner.py: the prompt is padded to the full length and
NO attention mask is used, neither here nor in the transformer; the pooled vector alone is taken from CLIP.
"""

import gc
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kontext_min.checkpoints import Device, Weights, fingerprint, load_clip, save_file
from kontext_min.clip import ClipTokenizer
from kontext_min.extras.stream import load_network
from kontext_min.flow import Prompt
from kontext_min.t5 import T5Tokenizer

Encoded = dict[str, tuple[Tensor, Tensor] | Path]  # text -> ((L_txt, context_in_dim), (vec_in_dim,)) or their file
VOCABULARIES = (("tokenizer", ("vocab.json", "merges.txt")), ("tokenizer_2", ("spiece.model",)))


def max_length(weights: Weights) -> int:
    """Tokens that a prompt is padded to: what the T5 tokenizer's config says, officially 512."""
    config = weights.tokenizer("tokenizer_2") / "tokenizer_config.json"
    return int(json.loads(config.read_text(encoding="utf-8")).get("model_max_length", 512)) if config.exists() else 512


def _keys(texts: Iterable[str], weights: Weights, dtype: torch.dtype) -> dict[str, str]:
    """Each text once, and the name that it is kept under: a hash of all that its encoding depends on."""
    common = hashlib.sha256()
    for part in ("clip", "t5"):
        common.update(fingerprint(weights.path(part), part).encode())
    for folder, names in VOCABULARIES:
        for name in names:
            file = weights.tokenizer(folder) / name
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such vocabulary; single weight files carry none, so --weights has to name a folder "
                    "with tokenizer/ and tokenizer_2/. See weights/README.md."
                )
            common.update(file.read_bytes())
    rest = [max_length(weights), str(dtype), common.hexdigest()]
    return {text: hashlib.sha256(json.dumps([text, *rest]).encode()).hexdigest()[:32] for text in sorted(set(texts))}


@torch.no_grad()
def encode(
    texts: Iterable[str],
    weights: Weights,
    cache: Path | None,
    dtype: torch.dtype,
    device: Device,
    stream: bool = False,
) -> Encoded:
    """Encode some prompts, loading the encoders only if one of them is not in the cache.

    Args:
        texts: prompts; repeated ones are encoded once.
        weights: where the encoders and tokenizers are.
        cache: folder of encoded prompts, or None for no cache. What is in it is read when a batch asks for it, so ten
            thousand captions of 4 MB each cost no memory.
        dtype: to compute and to keep the results in.
        device: to compute on; the results are on the CPU.
        stream: leave the blocks of T5 in their files and bring them one by one (stream.py).
    """
    keys = _keys(texts, weights, dtype)
    done: Encoded = {}
    for text, key in keys.items():
        if cache and (file := cache / f"{key}.safetensors").exists():
            done[text] = file
    new = [text for text in keys if text not in done]
    if not new:
        return done

    # Tokenizers first: they fail fast. Then one encoder at a time, one prompt at a time.
    clip_ids = ClipTokenizer(weights.tokenizer("tokenizer"))(new)  # (N, 77)
    t5_ids = T5Tokenizer(weights.tokenizer("tokenizer_2"))(new, max_length(weights))  # (N, L_txt)
    clip = load_clip(weights.path("clip"), dtype=dtype, device=device)
    y = [clip(ids[None].to(device))[1][0].cpu() for ids in clip_ids]
    del clip
    t5, blocks = load_network("t5", weights.path("t5"), dtype, device, "stored", stream)
    if blocks:
        blocks.wrap()
    for text, ids, pooled in zip(new, t5_ids, y, strict=True):
        txt = t5(ids[None].to(device))[0].cpu()
        done[text] = txt, pooled
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            done[text] = cache / f"{keys[text]}.safetensors"
            save_file({"txt": txt, "y": pooled}, done[text])
    if blocks:
        print(f"T5 {blocks.report()}")
        del t5, blocks
        gc.collect()  # blocks and their stream know each other, so nothing less frees the slots now
    return done


@lru_cache(maxsize=64)  # files that stay open, memory-mapped: one, most of the time
def _read(file: Path) -> tuple[Tensor, Tensor]:
    tensors = load_file(file)
    return tensors["txt"], tensors["y"]


def batch(encoded: Encoded, texts: Sequence[str], guidance: float, dtype: torch.dtype, device: Device) -> Prompt:
    """The rows of some pictures: txt (B, L_txt, D) and y (B, V) in `dtype`, guidance (B,) float32."""
    rows = [_read(x) if isinstance(x := encoded[t], Path) else x for t in texts]
    return Prompt(
        torch.stack([txt for txt, _ in rows]).to(device, dtype),
        torch.stack([y for _, y in rows]).to(device, dtype),
        torch.full((len(texts),), guidance, device=device),
    )
