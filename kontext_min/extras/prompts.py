"""Encode prompts for the transformer: T5 states for `txt`, the pooled CLIP vector for `y`.

Encoded prompts are kept on disk, keyed by their content (text, both encoders, both vocabularies, length). If all
prompts are cached, T5, the largest network after the transformer, is not loaded at all. The encoders are loaded one
after the other and are freed before this returns.

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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kontext_min.checkpoints import NOUNS, Device, load_clip, load_t5, metadata, outline, read_headers, read_json
from kontext_min.clip import LENGTH, ClipTokenizer
from kontext_min.extras.base import Weights
from kontext_min.extras.fingerprint import fingerprint, hash_of_code
from kontext_min.extras.saving import checksum, save_file
from kontext_min.flow import Prompt
from kontext_min.t5 import SENTINELS, T5Tokenizer

Encoded = dict[str, tuple[Tensor, Tensor] | Path]  # text -> ((L_txt, context_in_dim), (vec_in_dim,)) or their file
MANY = 100  # prompts that are read at the start
CODE = hash_of_code("clip.py", "t5.py")  # what another has encoded is encoded again
VOCABULARIES = (("tokenizer", ("vocab.json", "merges.txt")), ("tokenizer_2", ("spiece.model",)))


def max_length(weights: Weights) -> int:
    """Tokens that a prompt is padded to: what the T5 tokenizer's config says, at most the official 512."""
    file = weights.root / "tokenizer_2" / "tokenizer_config.json"
    length = read_json(file).get("model_max_length") if file.exists() else None
    return length if type(length) is int and 2 <= length <= 512 else 512  # 1e30 stands for "not set"


def vocabularies(weights: Weights) -> str:
    """16 hex digits that name both vocabularies, and how many tokens are read.

    Raises:
        FileNotFoundError: a vocabulary is missing.
    """
    common = hashlib.sha256(str(max_length(weights)).encode())
    for folder, names in VOCABULARIES:
        for name in names:
            file = weights.root / folder / name
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such vocabulary; weight files hold none, so --weights has to name a folder "
                    "with tokenizer/ and tokenizer_2/. See weights/README.md."
                )
            common.update(file.read_bytes())
    return common.hexdigest()[:16]


def fingerprints(
    weights: Weights, parts: Iterable[str] = ("transformer", "vae", "clip", "t5", "words")
) -> dict[str, str]:
    """What names the networks of a base, and as `words` its vocabularies; settings and LoRA files hold it."""
    return {p: vocabularies(weights) if p == "words" else fingerprint(weights.path(p), p) for p in parts}


def keys(texts: Iterable[str], weights: Weights, dtype: torch.dtype) -> dict[str, str]:
    """Each text once, and the name of its file: a hash of all that its encoding depends on."""
    rest = [str(dtype), fingerprints(weights, ("clip", "t5", "words"))]
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
        cache: folder of encoded prompts, or None for no cache. Its files are read when a batch asks for them, so ten
            thousand captions of 4 MB each cost no memory. A file that is cut is written again.
        dtype: to compute and to keep the results in.
        device: to compute on; the results are on the CPU.
        stream: leave the blocks of T5 in their files and fetch them one by one (stream.py).
    """
    names = keys(texts, weights, dtype)
    files = {text: cache / f"{name}.safetensors" for text, name in names.items()} if cache else {}
    done: Encoded = {text: file for text, file in files.items() if _is_of(file, len(files) <= MANY)}

    # Tokenizers first: they fail fast. Then one encoder at a time, one prompt at a time.
    clip_tokenizer = ClipTokenizer(weights.root / "tokenizer")
    t5_tokenizer = T5Tokenizer(weights.root / "tokenizer_2")
    _check_vocabularies(weights, len(clip_tokenizer.ids), t5_tokenizer.pieces.vocab_size())
    length = max_length(weights)
    for name, limit, tokenizer in (("CLIP", LENGTH - 2, clip_tokenizer), ("T5", length - 1, t5_tokenizer)):
        long = [n for n in (len(tokenizer.encode(text)) for text in names) if n > limit]
        if long:
            count = f"{len(long)} of {len(names)} prompts are longer, up to {max(long)} tokens"
            print(f"note: {name} reads {limit} tokens of a prompt: {count}; the rest has no effect there")
    read = map(t5_tokenizer.encode, names)
    if lacking := sum(not ids or t5_tokenizer.specials["<unk>"] in ids for ids in read):
        count = f"some characters of {lacking} of {len(names)} prompts"
        print(f"note: T5 has no tokens for {count}: all of these mean the same to it; write English")
    new = [text for text in names if text not in done]
    if not new:
        return done
    clip = load_clip(weights.path("clip"), dtype=dtype, device=device)
    y = [clip(ids[None].to(device))[1][0].cpu() for ids in clip_tokenizer(new)]  # ids (N, 77)
    del clip
    if stream:  # T5 larger than the memory
        from kontext_min.extras.stream import load_streamed

        t5, blocks = load_streamed("t5", weights.path("t5"), dtype, device)
        blocks.wrap()
    else:
        t5, blocks = load_t5(weights.path("t5"), dtype=dtype, device=device), None
    for text, ids, pooled in zip(new, t5_tokenizer(new, length), y, strict=True):  # ids (N, L_txt)
        txt = t5(ids[None].to(device))[0].cpu()
        done[text] = txt, pooled
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            done[text] = files[text]
            tensors = {"txt": txt, "y": pooled}
            save_file(tensors, files[text], {"key": names[text] + CODE, "checksum": checksum(tensors)})
            _read.cache_clear()  # another file may have been there
    if blocks:
        print(f"T5 {blocks.report()}")
        del t5, blocks
        gc.collect()  # blocks and their stream refer to each other, so only this frees the slots now
    return done


def _check_vocabularies(weights: Weights, clip: int, t5: int) -> None:
    """Whether the encoders know the tokens of the vocabularies, and no more. T5 has sentinels, and rounds up to 128.

    Raises:
        ValueError: one knows fewer, so it must be that of another model.
    """
    rows = {"clip": outline("clip", weights.path("clip"))[0].embeddings.token_embedding.num_embeddings}
    rows["t5"] = outline("t5", weights.path("t5"))[0].shared.num_embeddings
    for part, size, spare in (("clip", clip, 0), ("t5", t5, SENTINELS + 127)):
        text = f"{weights.path(part)}: its {NOUNS[part]} knows {rows[part]} tokens"
        text += f", the vocabulary in {weights.root} {size}"
        if rows[part] < size:
            raise ValueError(f"{text}; name the folder of its own vocabulary with --weights.")
        if rows[part] > size + spare:
            print(f"note: {text}; if they are of different models, prompts mean nothing")


def _is_of(file: Path, read: bool) -> bool:
    """Whether a file of the cache is whole, and that of its key; if it is `read`, whether its values are those written.

    Not all of ten thousand captions are read at the start.
    """
    try:
        whole = read_headers([file]).keys() == {"txt", "y"} and metadata(file).get("key") == file.stem + CODE
        if whole and read:
            _read(file)
        return whole
    except (OSError, ValueError, SafetensorError):
        return False


@lru_cache(maxsize=64)  # files that stay open, mapped into memory: mostly one
def _read(file: Path) -> tuple[Tensor, Tensor]:
    tensors, about = load_file(file), metadata(file)
    if about.get("key") != file.stem + CODE:
        raise OSError(f"{file}: a program with other code has written it since the start; start again to go on.")
    if checksum(tensors) != about.get("checksum"):
        file.unlink(missing_ok=True)
        raise OSError(f"{file}: its values are not those that were written; deleted, and made again at the next start.")
    return tensors["txt"], tensors["y"]


def batch(encoded: Encoded, texts: Sequence[str], guidance: float, dtype: torch.dtype, device: Device) -> Prompt:
    """The conditioning of some pictures: txt (B, L_txt, D) and y (B, V) in `dtype`, guidance (B,) float32."""
    rows = [_read(x) if isinstance(x := encoded[t], Path) else x for t in texts]
    return Prompt(
        torch.stack([txt for txt, _ in rows]).to(device, dtype),
        torch.stack([y for _, y in rows]).to(device, dtype),
        torch.full((len(texts),), guidance, device=device),
    )
