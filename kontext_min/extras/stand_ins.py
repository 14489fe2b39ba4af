"""A picture that becomes unreadable, or shows nothing, does not end a run: another picture replaces it.

The choice depends only on (seed, epoch, name), so a resumed run makes the same one. Source: none, it is file handling.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kontext_min.data import Pairs, UnreadableError
from kontext_min.extras.inventory import ONE_COLOR
from kontext_min.utils import numpy_generator

MOST = 14  # stand-ins that are tried


class StandIns(torch.utils.data.Dataset):
    """The items of pairs, and in each a list `unreadable`: a line for every picture that could not be read."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The item of (epoch, index), or of a stand-in.

        Raises:
            OSError: neither the picture nor any stand-in can be read.
        """
        epoch, index = place
        bucket, lines, plain = self.pairs.buckets[self.pairs.bucket_of[index]], [], None
        broken: list[str] = []
        for i in self._candidates(epoch, index):
            try:
                item = self.pairs.item(epoch, i, bucket)
            except UnreadableError as error:
                broken.append(str(error))
                lines.append(str(error))
                continue
            if not (line := shows_nothing(self.pairs, i, item["control"], item["target"])):
                return item | {"unreadable": lines}
            lines.append(line)
            plain = plain or item
        if plain:  # as all of the others are
            return plain | {"unreadable": broken}
        # With cached latents, only a picture of the same shape could.
        raise OSError(f"none of {len(lines) - 1} others tried can replace a picture; is the disk there? {lines[0]}")

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The picture, then others: those of its bucket first, as the rest may have to be enlarged."""
        yield index
        pictures, bucket_of = self.pairs.pictures, self.pairs.bucket_of
        others = np.delete(np.arange(len(pictures)), index)
        numpy_generator(self.pairs.seed, "stand-in", epoch, pictures[index].name).shuffle(others)
        same_first = np.argsort(bucket_of[others] != bucket_of[index], kind="stable")
        yield from others[same_first][:MOST].tolist()


def shows_nothing(pairs: Pairs, i: int, control: Tensor, target: Tensor) -> str:
    """A line if a picture (3, H, W), or its degraded partner from a file, is one color; else an empty one."""
    partners = getattr(pairs, "partners", None)
    if is_plain(target):
        return f"{pairs.pictures[i].name}: nearly one color; look at the file"
    if partners and is_plain(control, most=0):  # a dark one has little more than one color, and is no mistake
        return f"{partners[i].path}: nearly one color; look at the file"
    return ""


def is_plain(picture: Tensor, most: int = ONE_COLOR) -> bool:
    """Whether a picture (3, H, W) is one color, give or take. Latents, which are floats, were looked at as pictures."""
    spans = picture.amax((1, 2)) - picture.amin((1, 2))
    return not picture.is_floating_point() and bool((spans <= most).all())
