"""Seeds: a random number for every decision, whatever was drawn before.

    key = SeedSequence([seed, purpose, place ...])

So a run that is resumed, spread over processes or loaded by more workers draws the same numbers. Source: numpy's
SeedSequence (O'Neill 2015, "Developing a seed_seq alternative"), which mixes the integers that it is given.
"""

import zlib

import numpy as np
import torch


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
