"""Several processes, one to a GPU: torchrun starts them, torch's own DDP or FSDP2 keeps them together.

    torchrun --nproc-per-node 4 train.py --hr-root DIR            every process holds the whole model (DDP)
    torchrun --nproc-per-node 4 train.py --hr-root DIR --shard    the weights are spread over the processes (FSDP2)

Each process computes the gradient of its pictures; DDP and FSDP2 both AVERAGE gradients over the processes, so the loop
multiplies its sum by their number and divides by the number of pictures of all of them. Only process 0 writes.

Sources: torch.nn.parallel.DistributedDataParallel; torch.distributed.fsdp.fully_shard (FSDP2).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(hours=6)  # the others wait while process 0 scans pictures and encodes captions; torch gives 30 min


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.first:
            print(text, flush=True)


def start(device: str) -> Processes:
    """Join the other processes if torchrun started us; `auto` takes a GPU if there is one.

    Raises:
        ValueError: a device that this machine has not.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device: got {device!r}, expected auto, cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine, or this build of torch, has no CUDA; use --device cpu.")
        index = int(os.environ["LOCAL_RANK"]) if world > 1 else chosen.index or 0
        there = torch.cuda.device_count()
        if index >= there:
            raise ValueError(
                f"--device {device}: there is no cuda:{index} among the {there} GPUs of this machine; choose another, "
                "or start one process for each GPU at most."
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"  # gloo for the few numbers
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Processes(rank, world, chosen)


def spread(model: nn.Module, processes: Processes, shard: bool) -> nn.Module:
    """The model as the loop calls it: itself for one process, in DDP, or with its blocks sharded in place by FSDP2.

    Raises:
        ValueError: sharding without several processes.
    """
    if shard:
        if processes.world == 1:
            raise ValueError("--shard spreads the weights over processes; start them with torchrun --nproc-per-node N.")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about in-place operations that there are none of
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # By default the outermost module stays whole after a forward pass, and would not see weights changed since.
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if processes.world > 1:
        devices = [processes.device] if processes.device.type == "cuda" else None
        # The weights come from the same file and A from the same seed, so nothing need be sent around at the start,
        # nor at every step: buffers are frozen weights (quantize.py).
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices, init_sync=False)
        model.broadcast_buffers = False  # the argument of this name is deprecated, the new one is not in torch 2.6
    return model


@contextmanager
def sync_gradients(model: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass, or (`now` false) only add them up here: for accumulation."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(now)
    yield


def add_up(values: Tensor) -> Tensor:
    """The sum of a CPU tensor of any shape over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_of(here: bool) -> bool:
    """Whether it is so in any process; all get the same answer."""
    return add_up(torch.tensor(float(here))).item() > 0


def from_first(value: float) -> float:
    """The number that process 0 has."""
    number = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(number, src=0)
    return number.item()


def wait() -> None:
    """Until all processes are here."""
    add_up(torch.zeros(()))


@contextmanager
def first_goes_ahead(processes: Processes) -> Iterator[None]:
    """Process 0 does what stands below alone, then the others do: they find the files that it wrote."""
    if not processes.first:
        wait()
    yield
    if processes.first:
        wait()


def finish() -> None:
    """Leave the other processes in order."""
    if dist.is_initialized():
        dist.destroy_process_group()
