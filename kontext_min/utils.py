"""Seeds: every random decision has its own generator, which does not depend on what was drawn before.

    key = SeedSequence([seed, purpose, place ...])

A run therefore draws the same numbers after a resume, on several processes and with more loader workers. Source:
numpy's SeedSequence (O'Neill 2015, "Developing a seed_seq alternative"), which hashes these integers.
"""

import zlib

import numpy as np
import torch


def _key(seed: int, purpose: str, place: tuple[int | str, ...]) -> np.random.SeedSequence:
    numbers = (zlib.crc32(p.encode()) if isinstance(p, str) else p for p in (purpose, *place))
    return np.random.SeedSequence([seed, *numbers])


def torch_generator(seed: int, purpose: str, *place: int | str) -> torch.Generator:
    """A torch generator that depends only on (seed, purpose, place)."""
    return torch.Generator().manual_seed(int(_key(seed, purpose, place).generate_state(1, np.uint64)[0]))


def numpy_generator(seed: int, purpose: str, *place: int | str) -> np.random.Generator:
    """A numpy generator that depends only on (seed, purpose, place)."""
    return np.random.default_rng(_key(seed, purpose, place))
