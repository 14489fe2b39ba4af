"""What two files of the project share: seeds, the dtype of the computation, a progress line.

    key = SeedSequence([seed, purpose, place ...])        a number for every random decision, whatever was drawn before

So a run that is resumed, spread over processes or loaded by more workers draws the same numbers. Source: numpy's
SeedSequence (O'Neill 2015, "Developing a seed_seq alternative"), which mixes the integers that it is given.
"""

import math
import sys
import time
import zlib

import numpy as np
import torch

COMPUTE_DTYPES = ("auto", "bfloat16", "float32")


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation: "auto" is bfloat16 on GPUs and on CPUs with bfloat16 units, else float32."""
    if choice != "auto":
        return getattr(torch, choice)
    units = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or units.get("amx_bf16") or units.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def _key(seed: int, purpose: str, place: tuple[int | str, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(
        [seed, *(zlib.crc32(p.encode()) if isinstance(p, str) else p for p in (purpose, *place))]
    )


def torch_generator(seed: int, purpose: str, *place: int | str) -> torch.Generator:
    """A torch generator that depends on (seed, purpose, place) alone."""
    return torch.Generator().manual_seed(int(_key(seed, purpose, place).generate_state(1, np.uint64)[0]))


def numpy_generator(seed: int, purpose: str, *place: int | str) -> np.random.Generator:
    """A numpy generator that depends on (seed, purpose, place) alone."""
    return np.random.default_rng(_key(seed, purpose, place))


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
