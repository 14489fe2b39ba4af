"""Cache the latents of training pairs on disk: each pair is encoded once, not in every epoch.

    variants 0..K-1 of each pair --fill--> folder/ab/cd/<key>.safetensors --CachedPairs--> items of Pairs, as latents

The key is a hash of all that a latent depends on: the picture (its name and a hash of its content), its partner if it
has one, the bucket, the variant, the seed, and `base`, which the caller gives: degradation, autoencoder, dtype.
Nothing depends on a picture's position, so shuffling, resuming, adding pictures or another K cannot pair a latent with
another picture's caption. Captions are not in the files.

Shapes: latents (C, h, w), two to a file. Source: none, it is a cache.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext_min.data import THREADS, Pairs, Size, UnreadableError, load
from kontext_min.extras import parallel
from kontext_min.extras.fingerprint import hash_of_code
from kontext_min.extras.paired import PairedFolders
from kontext_min.extras.saving import checksum, save_file
from kontext_min.extras.stand_ins import StandIns

CODE = hash_of_code("data.py", "degrade.py", "autoencoder.py", "extras/paired.py")  # latents of another are made again
PIECE, PIECES = 4096, 16  # bytes


class CachedPairs(Pairs):
    """Pairs whose control and target are latents (C, h, w) from a folder; epochs repeat after `variants`.

    A pair that is missing after `fill` is treated as an unreadable picture: see `StandIns`.

    Args:
        pairs: the pictures that the latents are of.
        folder: is created when needed, two levels deep so that no folder gets more than some hundred files.
        base: all that latents depend on besides the pairs.
        variants: K, how many crops and degradations of each picture are kept.
    """

    def __init__(self, pairs: Pairs, folder: Path, base: str, variants: int) -> None:
        vars(self).update(vars(pairs))  # the same pictures, buckets, prompts, seed
        self.pairs, self.folder, self.base, self.variants = pairs, Path(folder), base, variants
        with ThreadPoolExecutor(THREADS) as pool:
            self.marks = list(pool.map(self.mark, range(len(pairs))))

    def read(self, epoch: int, i: int, bucket: Size) -> tuple[Tensor, Tensor]:
        """(control, target), each (C, h, w). Raises UnreadableError if the cache does not have them."""
        variant = epoch % self.variants
        own = self.buckets[self.bucket_of[i]] == bucket  # else i stands in for a picture of another shape
        latents = self.stored(self.key(variant, i)) if own else None
        if latents is None:
            file = self.file(self.key(variant, i))
            with suppress(OSError):  # a file that can't be read, as where too many are open, is not known to be damaged
                if own and file.read_bytes():  # what `fill` took for whole may have a bit that flipped
                    file.unlink()
            what = f"its latents of variant {variant} are not cached; the next start makes them, if it can"
            raise UnreadableError(f"{self.pictures[i].name}: {what}.")
        return latents

    def mark(self, i: int) -> list[str]:
        """Changes with the content of a picture, or with that of its partner."""
        files = [self.pictures[i], *(self.partners[i : i + 1] if isinstance(self.pairs, PairedFolders) else ())]
        return [content_mark(file.path) for file in files]

    def key(self, variant: int, i: int) -> str:
        """64 hex digits that name the content of a variant of a picture."""
        own, *partner = self.marks[i]
        content = [CODE, self.base, self.pictures[i].name, own, self.buckets[self.bucket_of[i]]]
        content += [partner[0] if partner else None, variant, self.seed, self.train]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def file(self, key: str) -> Path:
        """Where the latents of a key are."""
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def stored(self, key: str, header_only: bool = False) -> tuple[Tensor, Tensor] | None:
        """(control, target), each (C, h, w), or None if the file is absent, cut off, or of another key.

        With `header_only` two empty tensors say that the file is whole.
        """
        try:
            with safe_open(self.file(key), "pt") as file:  # checks that the file is as long as its header says
                about = file.metadata() or {}
                if about.get("key") != key or "checksum" not in about:
                    return None
                if header_only:
                    return torch.empty(0), torch.empty(0)
                found = {name: file.get_tensor(name) for name in ("control", "target")}
                return tuple(found.values()) if about["checksum"] == checksum(found) else None
        except (OSError, SafetensorError):
            return None


def variants(settings: Any, batches_per_epoch: int) -> int:
    """How many variants of each picture a run of train.py uses: --cache-latents, or its epochs if they are fewer."""
    wanted, epochs = settings.cache_latents, math.ceil(settings.steps * settings.accumulate / batches_per_epoch)
    if epochs < wanted and parallel.place()[0] == 0:
        print(f"note: --cache-latents {wanted}: the epochs of the run use {epochs}, so no more are made")
    return min(wanted, epochs)


def content_mark(path: Path) -> str:
    """A hash that changes with a file's content: of its size, time of change, and 16 pieces spread over all of it.

    An empty string stands for a file that is gone; `fill` then reports it.
    """
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            digest = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns} ".encode())
            for k in range(PIECES):
                file.seek(k * max(0, state.st_size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    except OSError:
        return ""
    return digest.hexdigest()


def fill(
    cached: CachedPairs,
    encode: Callable[[Tensor], Tensor],
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Encode what is missing. You may kill it at any time and start again.

    Args:
        cached: the pairs and their folder.
        encode: bytes (1, 3, H, W) on the CPU -> latents (1, C, h, w).
        workers: processes that load and degrade.
        rank: number of this process; it takes every world-th picture.
        world: number of processes.
        report: is called with (done, total) after every variant of a picture.

    Returns:
        A line for each variant of a picture that cannot be read.

    Raises:
        ValueError: a picture that cannot be read is the only one of its shape, so that no other has latents to replace
            its own.
    """
    # Shared out by picture, because what is missing changes while the other processes write.
    places = [(variant, i) for i in range(rank, len(cached), world) for variant in range(cached.variants)]
    missing = [place for place in places if cached.stored(cached.key(*place), header_only=True) is None]
    loader = load(StandIns(cached.pairs), [[place] for place in missing], workers)  # one by one: they have many shapes
    unreadable, failed = [], {}
    for done, (place, batch) in enumerate(zip(missing, loader, strict=True), 1):
        i, lines = place[1], batch["unreadable"][0]
        if cached.mark(i) != cached.marks[i]:  # what was read may not be what the key says
            lines = [f"{cached.pictures[i].name}: was changed since the start", *lines]
        if lines:  # another picture stands in, which must not be kept under this one's name
            unreadable.append(lines[0])
            failed[i] = lines[0]
        else:
            control, target = encode(batch["control"])[0], encode(batch["target"])[0]
            key = cached.key(*place)
            cached.file(key).parent.mkdir(parents=True, exist_ok=True)
            latents = {"control": control.cpu().contiguous(), "target": target.cpu().contiguous()}
            save_file(latents, cached.file(key), {"key": key, "checksum": checksum(latents)})
        report(done, len(missing))
    usable = {bucket for i, bucket in enumerate(cached.bucket_of) if i not in failed}
    for i, line in failed.items():
        if cached.bucket_of[i] not in usable:
            raise ValueError(
                f"--cache-latents: {line}: no other picture has its shape; remove it, or leave the flag out."
            )
    return unreadable
