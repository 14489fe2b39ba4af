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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext_min.checkpoints import save_file
from kontext_min.data import Draw, Pairs, Size, UnreadableError, load

VERSION = 2  # to be raised when crop, mirroring or any degradation comes out differently than before


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
        """Keep two latents (C, h, w)."""
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"control": control.cpu().contiguous(), "target": target.cpu().contiguous()}, file, {"key": key})

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
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Encode what the cache lacks of all variants of all pictures. May be killed at any time and started again.

    Args:
        pairs: with `variants`.
        cache: where latents go.
        encode: bytes (1, 3, H, W) on the CPU -> latents (1, C, h, w).
        workers: processes that load and degrade.
        rank: this process; each of `world` takes every world-th picture.
        world: number of processes.
        report: is told (done, total) after every variant of a picture.

    Returns:
        A line for each variant of a picture that cannot be read.

    Raises:
        ValueError: pairs without variants, as every epoch would then be new.
    """
    if not pairs.variants:
        raise ValueError("cached latents: got pairs that differ in every epoch; expected Pairs(variants=K), K > 0.")
    mine = range(rank, len(pairs), world)  # shared out by picture: what is missing changes while the others write
    draws = [Draw(epoch=k, index=i) for i in mine for k in range(pairs.variants)]
    missing = [d for d in draws if cache.read(cache.key(pairs, d.epoch, d.index), header_only=True) is None]
    loader = load(pairs, [[draw] for draw in missing], workers)  # one by one: they have many shapes
    unreadable = []
    for done, (draw, batch) in enumerate(zip(missing, loader, strict=True), 1):
        if batch["unreadable"]:  # another picture stands in, which must not be kept under this one's name
            unreadable.append(batch["unreadable"][0])
        else:
            control, target = encode(batch["control"]), encode(batch["target"])
            cache.write(cache.key(pairs, draw.epoch, draw.index), control[0], target[0])
        report(done, len(missing))
    return unreadable
