"""Choose which pictures a run validates on, and when.

They are those of --val-root, or a few of --hr-root that never train. The choice depends only on a hash of the names:
a resumed run holds out the same pictures, and if you add a few pictures, nearly the same ones.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kontext_min import data
from kontext_min.extras.inventory import unread

MOST = 8  # pictures; of --hr-root at most one in eight


def split(
    settings: Any, pictures: Sequence[data.Picture], buckets: Sequence[data.Size]
) -> tuple[list[data.Picture], list[data.Picture]]:
    """Pictures to train on, and pictures to validate on.

    Raises:
        ValueError: --val-root has no usable picture.
    """
    if not settings.validate_every_epochs:
        return list(pictures), []
    if settings.val_root:
        found, rejected = data.scan(settings.val_root)
        found, small = data.usable(found, buckets)
        if not found:
            unused = rejected + small + unread(settings.val_root, found)
            reason = ": ".join(unused[0]) if unused else "the folder holds none"
            raise ValueError(f"--val-root {settings.val_root}: no usable picture; {reason}.")
        return list(pictures), sorted(found, key=_by_name)[:MOST]
    held = {p.name for p in sorted(pictures, key=_by_name)[: min(MOST, len(pictures) // 8)]}
    return [p for p in pictures if p.name not in held], [p for p in pictures if p.name in held]


def _by_name(picture: data.Picture) -> bytes:
    """An order that has nothing to do with the order of the names."""
    return hashlib.sha256(picture.name.encode()).digest()


def load(held: data.Pairs | None, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(control, target) of the pictures, (1, 3, H, W) in [-1, 1] each; they stay in memory for the whole run."""
    loaded = []
    for i, bucket in enumerate(held.bucket_of if held else ()):
        try:
            control, target = (data.to_float(x.to(device))[None] for x in held.read(0, i, held.buckets[bucket]))
            loaded.append((control, target))
        except data.UnreadableError as error:
            print(f"not used for validation: {error}")
    return loaded


def due(settings: Any, batches_per_epoch: int, done: int) -> bool:
    """Whether to validate after `done` steps: whenever some epochs more are full, and at the end."""
    batches = batches_per_epoch * settings.validate_every_epochs
    filled, before = (n * settings.accumulate // batches for n in (done, done - 1))
    return filled > before or done == settings.steps
