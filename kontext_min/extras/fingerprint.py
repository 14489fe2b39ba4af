"""A hash of a network's weights identifies the base of a LoRA. That and a hash of the code are in the cache keys."""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from kontext_min.checkpoints import Stored, by_our_names, find, read_headers, told

PAGE = 4096  # what a disk reads at least


def fingerprint(path: str | Path, part: str) -> str:
    """16 hex digits that name the weights of a network by content, without reading all 24 GB.

    Counted are the headers, samples of every tensor, and the numbers of config.json that change the result.
    """
    files = find(path, part)
    digest = hashlib.sha256(json.dumps(told(files[0], part), sort_keys=True).encode())
    for file in files:
        tensors = read_headers([file]).values()
        with file.open("rb", buffering=0) as f:
            digest.update(f.read(min((s.offset for s in tensors), default=8)))
            for stored in tensors:
                for page in _samples(f, stored):
                    digest.update(page)
    return digest.hexdigest()[:16]


def _samples(file: BinaryIO, stored: Stored) -> Iterator[bytes]:
    """The start, the middle and the end of a tensor in an open file.

    Rows of q, k, v and mlp stand one behind the other in BFL's linear1. Each of the first three is a seventh of it, so
    that nine samples meet them all: a LoRA on v alone changes nothing else.
    """
    last, parts = max(stored.nbytes - PAGE, 0), 8 if stored.name.endswith("linear1.weight") else 2
    for place in sorted({last * k // parts for k in range(parts + 1)}):
        file.seek(stored.offset + place)
        yield file.read(min(PAGE, stored.nbytes))


def hash_of_code(*names: str) -> str:
    """16 hex digits of some files of this package, such as "t5.py": what they made is stale once you edit one."""
    folder = Path(__file__).parents[1]
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()[:16]


def core_files() -> list[str]:
    """What reads pictures, and the networks, the flow and the LoRA: kontext_min without extras."""
    return sorted(file.name for file in Path(__file__).parents[1].glob("[!._]*.py"))


def note_zeros(path: str | Path, part: str) -> None:
    """A line if whole weights are zero, as a download that was cut leaves them in a file of full size.

    An autoencoder can have convolutions of zeros, as that of weights/tiny has; its norms can't.
    """
    found = []
    for s in chain.from_iterable(by_our_names(read_headers(find(path, part)), part).values()):
        if s.name.endswith("weight") and ("norm" in s.name if part == "vae" else len(s.shape) > 1):
            with s.file.open("rb", buffering=0) as f:
                found += [f"{s.file}: {s.name}"] * (not any(map(any, _samples(f, s))))
    if found:
        more = f" and {len(found) - 1} more" * (len(found) > 1)
        print(f"note: {found[0]}{more}: all zeros; was the download or the copy cut?", file=sys.stderr)


def size_and_samples(path: Path, page: int = PAGE) -> tuple[int, int]:
    """Bytes of a file, and a checksum of its start, middle and end (`page` bytes), which tells two pictures apart."""
    with path.open("rb", buffering=0) as file:
        size, crc = os.fstat(file.fileno()).st_size, 0
        for place in (0, size // 2, max(0, size - page)):
            file.seek(place)
            crc = zlib.crc32(file.read(page), crc)
    return size, crc
