"""Choose which pictures a run validates on, and when.

They are those of --val-root, or a few of --hr-root that never train. The choice depends only on a hash of the names:
a resumed run holds out the same pictures, and if you add a few pictures, nearly the same ones.
"""

import filecmp
import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kontext_min import data
from kontext_min.extras.base import training_of
from kontext_min.extras.inventory import describe, scan_whole, unread
from kontext_min.extras.stand_ins import shows_nothing

MOST = 8  # pictures; of --hr-root at most one in eight
EPOCHS = 5  # between validations, unless they would cost too much
COST = 5  # training pictures that take as long as one to validate on: 4.6 with weights/tiny on a CPU


def split(
    settings: Any, pictures: Sequence[data.Picture], buckets: Sequence[data.Size]
) -> tuple[list[data.Picture], list[data.Picture], list[str]]:
    """Pictures to train on, pictures to validate on, and lines to print.

    Raises:
        ValueError: --val-root has no usable picture.
    """
    if settings.validate_every_epochs == 0:
        held, kept, lines = [], list(pictures), []
    elif settings.val_root:
        found, rejected = scan_whole(settings.val_root)
        found, small = data.usable(found, buckets)
        unused = rejected + small + unread(settings.val_root, found)
        if not found:
            reason = ": ".join(unused[0]) if unused else "the folder holds none"
            raise ValueError(f"--val-root {settings.val_root}: no usable picture; {reason}.")
        text = describe(settings.val_root, found, unused, buckets, captions=False)  # --validation-prompt is theirs
        lines = [f"--val-root {settings.val_root}: {text}"]
        lines += [f"note: {MOST} of its {len(found)} pictures are used"] * (len(found) > MOST)
        held, kept = sorted(found, key=_by_name)[:MOST], list(pictures)
    else:
        names = {p.name for p in sorted(pictures, key=_by_name)[: min(MOST, len(pictures) // 8)]}
        held, kept = [p for p in pictures if p.name in names], [p for p in pictures if p.name not in names]
        lines = [] if held else ["note: no validation; it takes --val-root, or 8 pictures in --hr-root to hold out one"]
    if kept and all(p.caption for p in kept) and len(settings.degrade) < 2:
        lines.append("note: every picture to train on has a caption; none trains with --prompt, sample.py's default")
    sizes: dict[int, list[Path]] = {}  # each file is asked once, and read only where another has its size
    for p in kept if held else ():
        sizes.setdefault(p.path.stat().st_size, []).append(p.path)
    alike = ((p, sizes.get(p.path.stat().st_size, ())) for p in held)
    known = [p.name for p, paths in alike if any(filecmp.cmp(p.path, path, shallow=False) for path in paths)]
    if known:
        lines.append(f"note: {len(known)} of {len(held)} to validate on are to train on too, such as {known[0]}")
    starts = ["--init-lora"] * bool(settings.init_lora)
    with suppress(OSError, ValueError):  # what is wrong with it is said where it is loaded
        base, about = training_of(settings.transformer or settings.weights)
        starts += [str(base)] * ("prompts" in about)  # that of a run, or merged from one, but for weights/tiny
    for start in starts if held else ():
        lines.append(f"note: {start} may have trained on pictures to validate on, which score too high then")
    captions = sum(bool(p.caption and p.caption.stat().st_size) for p in held)
    if captions and not settings.val_root and not settings.validation_prompt:  # of --val-root they are left out
        what = "have captions, which are not used; --validation-prompt is for all, by default --prompt"
        lines.append(f"note: {captions} of {len(held)} to validate on {what}")
    if held and len(settings.degrade) > 1:
        lines.append(f"note: only the first --degrade is validated, {settings.degrade[0]}")
    return kept, held, lines


def _by_name(picture: data.Picture) -> bytes:
    """An order that has nothing to do with the order of the names."""
    return hashlib.sha256(picture.name.encode()).digest()


def load(held: data.Pairs | None, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(control, target) of the pictures, (1, 3, H, W) in [-1, 1] each; they stay in memory for the whole run."""
    loaded, alike = [], []
    for i, bucket in enumerate(held.bucket_of if held else ()):
        try:
            control, target = held.read(0, i, held.buckets[bucket])
        except data.UnreadableError as error:
            print(f"not used for validation: {error}")
            continue
        if line := shows_nothing(held, i, control, target):
            print(f"note: {line}")
        pair = data.to_float(control.to(device))[None], data.to_float(target.to(device))[None]
        (alike if torch.equal(control, target) else loaded).append(pair)
    if loaded and alike:  # the PSNR of such a one is infinite, and so would be the mean
        print(f"not used for validation: {len(alike)}, whose degraded picture is the clean one")
    elif alike:
        print("note: every picture to validate on is degraded by nothing: its degraded picture is the clean one")
    return loaded or alike


def batches_between(settings: Any, batches_per_epoch: int, held: int) -> int:
    """Batches from one validation to the next; 0 for none.

    By default these are the batches of five epochs, or as many more as it takes for all validations, with those before
    the first step and after the last one, to cost no more than a tenth of the run.

    Args:
        settings: of train.py.
        batches_per_epoch: of this process.
        held: pictures to validate on.
    """
    if settings.validate_every_epochs is not None:
        return batches_per_epoch * settings.validate_every_epochs
    batches = settings.steps * settings.accumulate
    affordable = batches * settings.batch_size // (10 * COST * max(held, 1))
    return max(batches_per_epoch * EPOCHS, math.ceil(batches / max(affordable - 1, 1)))


def due(settings: Any, between: int, done: int) -> bool:
    """Whether to validate after `done` steps: whenever `between` batches more are full, and at the end."""
    filled, before = (n * settings.accumulate // between for n in (done, done - 1))
    return filled > before or done == settings.steps


def still_due(settings: Any, between: int, done: int) -> int:
    """How many validations follow after `done` steps."""
    if not between or done >= settings.steps:
        return 0
    before, last, end = (n * settings.accumulate // between for n in (done, settings.steps - 1, settings.steps))
    # The end counts once, and so does a step in which `between` batches are full several times.
    return min(end - before + (end == last), settings.steps - done)
