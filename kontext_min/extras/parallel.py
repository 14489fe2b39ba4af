"""Run on several GPUs, one process each: torchrun starts them; they average gradients or shard the weights (FSDP2).

    torchrun --nproc-per-node 4 train.py --hr-root DIR            every process holds the whole model
    torchrun --nproc-per-node 4 train.py --hr-root DIR --shard    the weights are sharded over the processes (FSDP2)

    gradient of the batch of all processes = mean over the processes of the gradients of their own batches

A LoRA's gradients are a few MB, so one all-reduce per parameter and step is enough and the model needs no wrapper.
FSDP2 averages by itself. Only process 0 writes.

Sources: torch.distributed; torch.distributed.fsdp.fully_shard (FSDP2).
"""

import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(hours=6)  # the others wait while process 0 reads pictures and encodes captions; torch gives 30 min


COMPUTE_DTYPES = ("auto", "bfloat16", "float32")


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation: "auto" is bfloat16 on GPUs and on CPUs with bfloat16 units, else float32."""
    if choice != "auto":
        return getattr(torch, choice)
    units = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or units.get("amx_bf16") or units.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.first:
            print(text, flush=True)


def place() -> tuple[int, int]:
    """Rank and number of processes, as torchrun says in the environment; 0 and 1 without it.

    Raises:
        ValueError: they are no such numbers, or it says only a part.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    numbers = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    whole = world == "1" or ("MASTER_ADDR" in os.environ and all(text.isdecimal() for text in numbers))
    if not (whole and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} WORLD_SIZE={world} in the environment: unset them, or start with torchrun.")
    return int(rank), int(world)


def start(device: str) -> Processes:
    """Join the other processes if torchrun started this one; `auto` takes a GPU if there is one.

    Raises:
        ValueError: no such device on this machine, or an environment that torchrun did not make.
    """
    rank, world = place()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):  # such as mps: it must at least give back a number
            torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError):
        raise ValueError(f"--device: got {device!r}, but there is no such device here; use auto or cpu.") from None
    if chosen.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(os.environ["LOCAL_RANK"]) if world > 1 else chosen.index or 0
        if index >= there:
            raise ValueError(
                f"--device {device}: this machine, or this build of torch, has {there} CUDA GPUs; use --device cpu, a "
                "lower number, or at most one process per GPU."
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"  # gloo for the few numbers
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Processes(rank, world, chosen)


def shard(model: nn.Module, processes: Processes) -> None:
    """Spread the weights of every block over the processes, in place (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about in-place operations, of which there are none
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # By default the outermost module stays whole after a forward pass, and would not see weights changed since.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """The mean over all processes, in place; sharded parameters are averaged already."""
    for p in params:
        if not hasattr(p, "device_mesh"):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def add_up(values: Tensor) -> Tensor:
    """The sum of a CPU tensor of any shape over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_of(here: bool) -> bool:
    """Whether it is so in any process; all get the same answer."""
    return add_up(torch.tensor(float(here))).item() > 0


def of_all(lines: Iterable[str]) -> list[str]:
    """The lines of all processes, in the order of their ranks."""
    here = list(lines)
    if not dist.is_initialized() or not any_of(bool(here)):
        return here
    found: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return list(chain(*found))


def from_first(value: float) -> float:
    """The number that process 0 has."""
    number = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(number, src=0)
    return number.item()


def refuse_different(folder: Path, values: Mapping[str, Any]) -> None:
    """That what the processes have to have in common is the same in all of them.

    Args:
        folder: of the run, for the message.
        values: by what they are of, such as {"checkpoint": 500}.

    Raises:
        ValueError: it is not, in all processes.
    """
    for what, value in values.items():
        mark = zlib.crc32(str(value).encode())
        if any_of(from_first(mark) != mark):
            hint = "they need one disk that they share, or of pictures and weights equal copies (cp -p)"
            hint = "start all with one command" if what == "flags" else hint
            raise ValueError(f"{folder}: not all processes see the same {what}; {hint}.")


def wait() -> None:
    """Until all processes are here."""
    add_up(torch.zeros(()))


@contextmanager
def first_goes_ahead(processes: Processes) -> Iterator[None]:
    """Process 0 runs the block alone, then the others do and find the files that it wrote."""
    if not processes.first:
        wait()
    yield
    if processes.first:
        wait()


def lost_another(error: Exception) -> bool:
    """Whether an error says that another process of the group ended or does not answer."""
    signs = ("Connection closed", "Connection reset", "Broken pipe", "timed out", "NCCL")
    return dist.is_initialized() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def finish(code: int) -> int:
    """Leave the other processes in order; the exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads outlive the group. One that lets go of a tensor while the interpreter shuts down aborts the
        # process, and torchrun reports a failure. So there is no shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
