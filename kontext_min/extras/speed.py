"""How fast this machine runs the networks: FLOP/s of a block and of the autoencoder, measured in half a second.

    seconds = FLOPs of the network / FLOP/s of one of its blocks + FLOPs of the autoencoder / FLOP/s of its encoder

A matmul alone would be a third too fast: norms, rotation and attention reach less of the peak. So a double block and
its share of single blocks run forward, at the model's own width with random weights, on the tokens of a batch, or on as
many of them as half a second allows. The backward pass reaches the same FLOP/s (docs/bench.md). Narrow weights,
streaming and the loader are not measured.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.flow import token_ids
from kontext_min.flux import Flux, FluxParams

SECONDS = 0.25  # for each of the two


def flops_a_second(f: Callable[[int], object], flops: Callable[[int], float], device: torch.device, most: int) -> float:
    """FLOP/s of f(n), for the largest n of 4, 8, 16, ... `most` that takes about SECONDS; the best of some calls."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    n, taken = min(4, most), []
    f(n)  # what is made at the first call
    began = clock()
    while True:
        before = clock()
        f(n)
        taken.append(clock() - before)
        left = SECONDS - (clock() - began)
        if left < 0 and len(taken) > 1:
            return flops(n) / min(taken)
        if n < most and 5 * min(taken) < left:
            n, taken = min(2 * n, most), []


@torch.no_grad()
def measure(
    flux: FluxParams,
    autoencoder: AutoencoderParams,
    dtype: torch.dtype,
    device: torch.device,
    sides: tuple[int, int],
    batch: int = 1,
    text_tokens: int = 64,
) -> tuple[float, float]:
    """FLOP/s of the transformer and of the autoencoder, on a batch and a picture of up to so many tokens a side."""
    from kontext_min.extras.plan import Tally  # plan.py imports this file

    def count(f: Callable[[int], object]) -> Callable[[int], float]:
        def flops(n: int) -> float:
            with Tally() as tally:
                f(n)
            return tally.segment.flops

        return flops

    numbers = torch.randn(2**20, device=device) * 0.02  # to draw all weights of a wide block would take seconds
    with torch.device("meta"):
        single = round(flux.depth_single_blocks / max(flux.depth, 1))
        networks = Flux(replace(flux, depth=1, depth_single_blocks=single)).to(dtype), Autoencoder(autoencoder)
    model, coder = (network.to_empty(device=device) for network in networks)
    for p in (*model.parameters(), *coder.parameters()):
        p.copy_(numbers.repeat(p.numel() // len(numbers) + 1)[: p.numel()].view(p.shape))
    with torch.device(device):
        txt = torch.randn(batch, text_tokens, flux.context_in_dim, dtype=dtype), torch.zeros(1, text_tokens, 3)
        y, one = torch.randn(batch, flux.vec_in_dim, dtype=dtype), torch.ones(batch)

        def step(n: int) -> None:
            img = torch.randn(batch, n * n, flux.in_channels, dtype=dtype)
            model(img, token_ids(2 * n, 2 * n, device=device), *txt, one, y, one)

        def encode(n: int) -> None:
            coder.encode(torch.randn(1, 3, 2 * n * coder.factor, 2 * n * coder.factor))

        return tuple(flops_a_second(f, count(f), device, n) for f, n in zip((step, encode), sides, strict=True))
