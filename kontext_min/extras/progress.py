"""A progress line with the time left: a terminal updates it in place, a log file gets one every ten seconds."""

import math
import sys
import time


class Progress:
    """One line that is renewed in place on a terminal, and printed every ten seconds into a log file."""

    def __init__(self, start: int = 0, every: float = 10.0) -> None:
        self.start, self.began = start, time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else every
        self.last = -math.inf

    def show(self, done: int, total: int, text: str) -> None:
        """Print `done/total text  time left`, if it is time to, or if this is the last one."""
        now = time.monotonic()
        if now - self.last < self.every and done < total:
            return
        self.last = now
        left = (now - self.began) / max(done - self.start, 1) * (total - done)
        line = f"{done:>{len(str(total))}}/{total}  {text}  left {clock(left)}"
        end = "" if self.terminal and done < total else "\n"
        print(("\r\033[K" if self.terminal else "") + line, end=end, flush=True)


def clock(seconds: float) -> str:
    """3725 -> 1h02m05s."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}h{m:02d}m{s:02d}s" if h else f"{m}m{s:02d}s" if m else f"{s}s"


class Ticker:
    """Counts small pieces of work and shows them in percent; `pause` shows that work goes on and counts nothing."""

    def __init__(self) -> None:
        self.progress, self.done, self.total, self.text = Progress(), 0, 1, ""

    def __call__(self) -> None:
        """One more piece is done."""
        self.done += 1
        self.pause()

    def pause(self) -> None:
        """Show the line again, if it is time to."""
        self.progress.show(100 * self.done // max(self.total, 1), 100, f"percent, {self.text}")
