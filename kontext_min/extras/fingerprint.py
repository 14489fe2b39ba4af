"""A hash of a network's weights: it identifies the base of a LoRA, and is part of the cache keys."""

import hashlib
import json
import os
import zlib
from pathlib import Path

from kontext_min.checkpoints import find, read_headers, told

PAGE = 4096  # what a disk reads at least


def fingerprint(path: str | Path, part: str) -> str:
    """16 hex digits that name the weights of a network by content, without reading all 24 GB.

    Counted are the headers, three samples of every tensor, and the numbers of config.json that change the result.
    """
    files = find(path, part)
    digest = hashlib.sha256(json.dumps(told(files[0], part), sort_keys=True).encode())
    for file in files:
        tensors = read_headers([file]).values()
        with file.open("rb", buffering=0) as f:
            digest.update(f.read(min((s.offset for s in tensors), default=8)))
            for stored in tensors:
                last = max(stored.nbytes - PAGE, 0)
                for place in sorted({0, last // 2, last}):
                    f.seek(stored.offset + place)
                    digest.update(f.read(min(PAGE, stored.nbytes)))
    return digest.hexdigest()[:16]


def size_and_samples(path: Path) -> tuple[int, int]:
    """Bytes of a file, and a checksum of its start, middle and end, which tells two pictures apart."""
    with path.open("rb", buffering=0) as file:
        size, crc = os.fstat(file.fileno()).st_size, 0
        for place in (0, size // 2, max(0, size - PAGE)):
            file.seek(place)
            crc = zlib.crc32(file.read(PAGE), crc)
    return size, crc
