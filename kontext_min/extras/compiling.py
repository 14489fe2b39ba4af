"""torch.compile, block by block: all blocks of a kind share one graph, which takes any number of tokens.

The whole model as one graph would be recompiled for each of the 17 shapes, and could not be streamed.
Source: torch.compile; compiling `block.forward` in place leaves the names of the parameters as they are.
"""

from collections.abc import Callable
from typing import Any

import torch

from kontext_min.flux import Flux


def compile_blocks(flux: Flux, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every block in place."""
    for block in flux.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)
