"""Say how far a run is: a line with the time left that a terminal updates in place, and the phases before it.

    left = steps left * mean seconds of the last hundred steps + validations left * seconds of the last one

A log file gets the line every ten seconds. The first step of a run does not count: it starts processes and caches.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from kontext_min.extras.inventory import printable

DAY = 24 * 3600.0
KEPT = 100  # steps whose time is averaged


class Progress:
    """What a program says while it works; one of several processes is `shown`."""

    def __init__(self, shown: bool = True, every: float = 10.0) -> None:
        self.began, self.last, self.shown = time.monotonic(), -math.inf, shown
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else every
        self.steps: deque[float] = deque(maxlen=KEPT + 1)
        self.validation = 0.0  # seconds of the last one

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            print(("\r\033[K" if self.terminal else "") + text, flush=True)

    def phase(self, text: str) -> None:
        """What begins, and how long after the start."""
        self.say(f"{clock(time.monotonic() - self.began)}: {text}")

    def show(self, text: str, last: bool = False, every: float | None = None) -> None:
        """A line that the next one replaces, if it is time to, or if it is the last one."""
        now = time.monotonic()
        if not self.shown or (now - self.last < (every or self.every) and not last):
            return
        self.last, text = now, printable(text)
        if last or not self.terminal:
            self.say(text)
        else:
            print(f"\r\033[K{text}", end="", flush=True)

    def encoded(self, done: int, total: int) -> None:
        """How many pictures are encoded for the cache."""
        self.show(f"caching latents, {done} of {total}")

    def step(self, row: dict[str, Any], settings: Any, validations: int, device: str) -> None:
        """The line of a step that is done; after the third one also what would make a run of days shorter.

        Args:
            row: of metrics.jsonl.
            settings: of train.py.
            validations: how many follow.
            device: "cpu" or "cuda".
        """
        done, total = row["step"], settings.steps
        self.steps.append(row["seconds"])
        known = list(self.steps)[1:] or [row["seconds"]]
        left = sum(known) / len(known) * (total - done) + self.validation * validations
        line = f"{done:>{len(str(total))}}/{total}  loss {row['loss']:.4f}  lr {row['lr']:.1e}"
        self.show(f"{line}  {row['images_per_second']:.2f} images/s  left {clock(left)}", last=done == total)
        if len(self.steps) == 3 and left > DAY:
            self.say(shorter(settings, left, device))


def clock(seconds: float) -> str:
    """3725 -> 1h02m05s, 100000 -> 1d03h46m."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    if h >= 24:
        return f"{h // 24}d{h % 24:02d}h{m:02d}m"
    return f"{h}h{m:02d}m{s:02d}s" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def shorter(settings: Any, left: float, device: str) -> str:
    """What would make a long training run shorter, of what its settings do not have already."""
    half = settings.resolution // 2
    advice = [f"--resolution {half} (a quarter of the pixels)"] * (half >= 24) + ["fewer --steps"]
    pictures = settings.batch_size * settings.accumulate
    advice += [f"fewer than {pictures} pictures a step (--accumulate)"] * (settings.accumulate > 1)
    advice += ["--quantize instead of --stream"] * settings.stream
    advice += ["--cache-latents 4"] * (not settings.cache_latents and len(settings.degrade) == 1)
    advice += ["a GPU"] * (device == "cpu")
    return f"note: about {clock(left)} left. Shorter: {', '.join(advice)}."


class Ticker:
    """Shows how far sample.py is: which picture, and the part of its passes of a tile through a network that is done.

    Time follows the area, so the time left is known from the second picture on.

        left = seconds per pixel of the pictures done * pixels left - seconds of this picture
    """

    def __init__(self, progress: Progress, sizes: Sequence[tuple[int, int]], resized: bool = False) -> None:
        self.of = "of the work size" if resized else ""
        self.progress, self.pictures, self.left = progress, len(sizes), sum(map(math.prod, sizes))
        self.number = self.pixels = self.done_pixels = self.done = 0
        self.name, self.passes, self.seconds, self.began = "", 1, 0.0, 0.0

    def begin(self, name: str, size: tuple[int, int], passes: int) -> None:
        """The next picture; the one before is done, or has failed."""
        self.left -= self.pixels
        self.name, self.pixels, self.passes, self.done = name, math.prod(size), passes, 0
        self.number, self.began = self.number + 1, time.monotonic()

    def __call__(self, part: str) -> None:
        """One more pass is done, of encoding, restoring or decoding; the last takes the longest of a small model."""
        self.done += 1
        line = f"picture {self.number} of {self.pictures}, {self.name}: {part}, {100 * self.done // self.passes} %"
        if self.done_pixels:
            left = self.seconds / self.done_pixels * self.left - (time.monotonic() - self.began)
            line += f"  left {clock(max(left, 0))}"
        self.progress.show(line)

    def end(self) -> None:
        """The picture is written."""
        self.seconds, self.done_pixels = self.seconds + time.monotonic() - self.began, self.done_pixels + self.pixels

    def pace(self) -> str:
        """What all of it took, and a megapixel."""
        pace = (
            f", {1e6 * self.seconds / self.done_pixels:.3g} s a megapixel {self.of}".rstrip()
            if self.done_pixels
            else ""
        )
        return clock(time.monotonic() - self.progress.began) + pace
