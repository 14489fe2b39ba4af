"""Train one LoRA on several tasks: each degradation has its prompt, and the prompt tells the tasks apart.

    train.py --degrade denoise --degrade deblur --degrade low-light

Picture i of epoch e gets task (i + e) mod n, so every picture has every task in turn, and a resumed run the same ones.
Edit2Restore trains Kontext so, with 128 pictures a task.
"""

import copy
from collections.abc import Sequence
from typing import Any

from kontext_min import degrade
from kontext_min.data import Pairs, Size


class Tasks(Pairs):
    """Pairs whose degradation and prompt change from epoch to epoch.

    Args:
        pairs: the clean pictures; a note says so if they have captions, which are the same for all tasks.
        degradations: texts for degrade.parse, one a task.
        prompts: of the tasks.
    """

    def __init__(self, pairs: Pairs, degradations: Sequence[str], prompts: Sequence[str]) -> None:
        vars(self).update(vars(pairs))  # the same pictures, buckets, seed
        self.tasks = [(degrade.parse(text), prompt) for text, prompt in zip(degradations, prompts, strict=True)]
        if captions := sum(p.caption is not None for p in pairs.pictures):
            print(f"note: {captions} captions are not read: with several --degrade, the prompt names the task")
        self.prompts = list(prompts)

    def item(self, epoch: int, i: int, bucket: Size) -> dict[str, Any]:
        """Picture i in a bucket, with the task of this epoch; as Pairs.item."""
        one = copy.copy(self)
        one.degrade, prompt = self.tasks[(i + epoch) % len(self.tasks)]
        control, target = one.read(epoch, i, bucket)
        return {"control": control, "target": target, "prompt": prompt, "name": self.pictures[i].name}
