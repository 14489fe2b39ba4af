"""torch.compile, block by block: all blocks of a kind share one graph, which takes any number of tokens.

The whole model as one graph would be recompiled for each of the 17 shapes, and could not be streamed.
Source: torch.compile; compiling `block.forward` in place leaves the names of the parameters as they are.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from kontext_min.extras.progress import Progress, clock
from kontext_min.flux import Flux


def compile_blocks(flux: Flux, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every block in place. The first pass compiles, and says how long it took."""
    for block in flux.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)
    progress = Progress(shown=not (distributed.is_initialized() and distributed.get_rank()))

    def before(*_: Any) -> None:
        progress.say("compiling the blocks; the first step takes longer")
        progress.began = time.monotonic()

    def after(*_: Any) -> None:
        more = ", and the first backward pass compiles too" * torch.is_grad_enabled()
        progress.say(f"compiled; the first pass took {clock(time.monotonic() - progress.began)}{more}")
        for hook in hooks:
            hook.remove()

    hooks = [flux.register_forward_pre_hook(before), flux.register_forward_hook(after)]
