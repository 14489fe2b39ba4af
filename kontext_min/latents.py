"""Latents of training pairs, kept on disk: encoding is then paid once and not every epoch.

    pairs of variants 0..K-1 --fill--> folder/ab/cd/<key>.safetensors --CachedPairs--> items as of Pairs, but latents

The key is a hash of all that a latent depends on: the picture (name and content mark), its partner if it has one, the
bucket, the variant, the seed, mirroring, and `base` for what only the caller knows: degradation and autoencoder.
Nothing is keyed by position, so that shuffling, resuming, adding pictures or changing K cannot bring a latent to
another picture's caption. Captions are not in the files.

Shapes: latents (C, h, w), two to a file; an extra: neither the data pipeline nor the loop knows of it.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext_min.checkpoints import save_file
from kontext_min.data import Draw, Pairs, Size, UnreadableError, collate, worker_context

VERSION = 1  # to be raised when crop, mirroring or any degradation comes out differently than before


class LatentCache:
    """A folder of latents, two levels deep so that no folder gets more than some hundred files.

    Args:
        folder: is created when needed.
        base: all that latents depend on besides the pairs: degradation text, autoencoder fingerprint, dtype.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder, self.base = Path(folder), base

    def key(self, pairs: Pairs, variant: int, i: int) -> str:
        """64 hex digits that name the content of a variant of a picture."""
        picture = pairs.pictures[i]
        control = pairs.controls[i].mark if pairs.controls else None
        content = [VERSION, self.base, picture.name, picture.mark, control, pairs.buckets[pairs.bucket_of[i]]]
        content += [variant, pairs.seed, pairs.flip, pairs.train]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, key: str, header_only: bool = False) -> tuple[Tensor, Tensor] | None:
        """(control, target), each (C, h, w); or None if they are absent, or the file is cut off or another's.

        With `header_only` two empty tensors say that the file is whole.
        """
        try:
            with safe_open(self._file(key), "pt") as file:  # checks that the file is as long as its header says
                if (file.metadata() or {}).get("key") != key:
                    return None
                if header_only:
                    return torch.empty(0), torch.empty(0)
                return file.get_tensor("control"), file.get_tensor("target")
        except (OSError, SafetensorError):
            return None

    def write(self, key: str, control: Tensor, target: Tensor) -> None:
        """Keep two latents (C, h, w); the file is written aside and renamed, so that it is whole or absent."""
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.tmp")
        tensors = {"control": control.cpu().contiguous(), "target": target.cpu().contiguous()}
        save_file(tensors, aside, metadata={"key": key})
        aside.replace(file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"


class CachedPairs(torch.utils.data.Dataset):
    """Pairs whose control and target are latents from the cache, (C, h, w).

    One that is missing after `fill` is treated as an unreadable picture: see `Pairs`.
    """

    def __init__(self, pairs: Pairs, cache: LatentCache) -> None:
        self.pairs, self.cache = pairs, cache

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.pairs)

    def __getitem__(self, draw: Draw | tuple[int, int]) -> dict[str, Any]:
        """What a Draw, or (epoch, index), asks for."""
        return self.pairs.item(draw, self.read)

    def read(self, variant: int, i: int, bucket: Size) -> tuple[Tensor, Tensor]:
        """(control, target), each (C, h, w). Raises UnreadableError if the cache has not got them."""
        own = self.pairs.buckets[self.pairs.bucket_of[i]] == bucket  # else asked to stand in for another shape
        latents = self.cache.read(self.cache.key(self.pairs, variant, i)) if own else None
        if latents is None:
            raise UnreadableError(f"{self.pairs.pictures[i].name}: its latents of variant {variant} are not cached.")
        return latents


def fill(
    pairs: Pairs,
    cache: LatentCache,
    encode: Callable[[Tensor], Tensor],
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Encode what the cache lacks of all variants of all pictures. May be killed at any time and started again.

    Args:
        pairs: with `variants`.
        cache: where latents go.
        encode: bytes (B, 3, H, W) on the CPU -> latents (B, C, h, w).
        batch_size: pictures of one bucket encoded together.
        workers: processes that load and degrade.
        rank: this process; each of `world` takes every world-th picture.
        world: number of processes.
        report: is told (done, total) after every batch.

    Returns:
        A line for each variant of a picture that cannot be read.

    Raises:
        ValueError: pairs without variants, as every epoch would then be new.
    """
    if not pairs.variants:
        raise ValueError("cached latents: got pairs that differ in every epoch; expected Pairs(variants=K), K > 0.")
    missing: dict[int, list[Draw]] = {}
    for i, bucket in enumerate(pairs.bucket_of.tolist()):
        if i % world != rank:  # shared out by picture: what is missing changes while the others write
            continue
        for k in range(pairs.variants):
            if cache.read(cache.key(pairs, k, i), header_only=True) is None:
                missing.setdefault(bucket, []).append(Draw(epoch=k, index=i))
    batches = [draws[a : a + batch_size] for draws in missing.values() for a in range(0, len(draws), batch_size)]
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_with_items,
        multiprocessing_context=worker_context(workers),
    )
    unreadable = []
    for done, (draws, (batch, items)) in enumerate(zip(batches, loader, strict=True)):
        control, target = encode(batch["control"]), encode(batch["target"])
        for draw, item, c, t in zip(draws, items, control, target, strict=True):
            if item:  # another picture stands in, which must not be kept under this one's name
                unreadable.append(item[0])
            else:
                cache.write(cache.key(pairs, draw.epoch, draw.index), c, t)
        report(done + 1, len(batches))
    return unreadable


def _with_items(items: list[dict[str, Any]]) -> tuple[dict[str, Any], list[list[str]]]:
    """A batch, and for each of its items the lines of what was unreadable."""
    return collate(items), [item["unreadable"] for item in items]
