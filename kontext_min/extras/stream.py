"""A network larger than the memory: the weights of a block are brought to the device just before the block runs.

    slot 0   | block 0 runs          | block 2 is brought in | block 2 runs          |   ...
    slot 1   | block 1 is brought in | block 1 runs          | block 3 is brought in |   ...   downwards in backward

Two slots, each as large as the largest block, are all the memory that the blocks' Linears take. What travels are their
codes (quantize.py): the bytes of the file as they are, bfloat16 or fp8, or those of int8, fp8 and nf4. They are read
with read(2) into the slot, not through mapped pages, which would count as resident memory of the process. On CUDA they
go through page-locked memory and a stream of their own, and blocks that fit half of the machine's memory stay there
after the first pass. A thread does this while the block before computes. Biases, norms, scales and LoRA are resident.

In training `checkpoint_blocks` is needed too: the forward pass of each block is run again in the backward pass, and
brings the block again. Without it, autograd finds that a saved weight was overwritten, and says so.

int8, fp8 and nf4 of a wider file are made once, block by block, and kept in a cache folder: quantising anew at every
pass would read the wide file each time, which is the slower half of the work.

Sources: the ring of two buffers with a permanent master copy is musubi-tuner's LoRAStreamOffloader; Pudipeddi et al.
2020, "Training Large Neural Networks with Constant Memory using a New Execution Algorithm" (L2L).
"""

import ctypes
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from kontext_min import checkpoints
from kontext_min.checkpoints import Device, Stored, TensorReader, load_flux, load_t5, save_file
from kontext_min.extras.quantize import QuantizedLinear, storage
from kontext_min.flux import Flux

ALIGN = 64  # codes start at multiples of so many bytes in a slot


@dataclass(frozen=True)
class Codes:
    """The codes of one Linear: the stored tensors whose bytes they are, one after the other, and their place."""

    layer: QuantizedLinear  # whose codes are None while the block does not run
    dtype: torch.dtype
    shape: torch.Size
    parts: tuple[Stored, ...]
    start: int  # in the slot
    stop: int


class Stream:
    """The blocks of one network, and the two slots that they pass through."""

    def __init__(self, blocks: Sequence[nn.Module], codes: Sequence[Sequence[Codes]], device: torch.device) -> None:
        self.blocks, self.codes, self.device = blocks, codes, device
        self.sizes = [max((c.stop for c in block), default=0) for block in codes]
        self.slots = [torch.empty(max(self.sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # the block in each slot, or on its way there
        self.arrival: list[Future[Any]] = [Future(), Future()]
        self.used = self.last = 0  # slot and block that ran last
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="stream")  # one, so that reads come in order
        self.files: dict[Path, BinaryIO] = {}
        self.brought = self.bytes_read = 0
        self.seconds_waited, self.began = 0.0, 0.0
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            known = hasattr(os, "sysconf")  # not on Windows: there blocks come from the file at every pass
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
            self.kept = [None] * len(blocks) if sum(self.sizes) <= memory // 2 else None  # in page-locked memory
            self.staging = _page_locked(max(self.sizes)) if self.kept is None else None
            self.copied: torch.cuda.Event | None = None
        else:
            _return_freed_memory()

    def wrap(self) -> None:
        """Let each block bring its weights; goes outside of torch.compile and inside of checkpointing."""
        for i, block in enumerate(self.blocks):
            block.forward = self._bringing(i, block.forward)

    def _bringing(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            with self.at_hand(i):
                return forward(*args)

        return run

    @contextmanager
    def at_hand(self, i: int) -> Iterator[None]:
        """The weights of block i are in its layers, and those of the block that will follow are on their way."""
        began = time.perf_counter()
        self.began = self.began or began
        if i not in self.holds:
            self._ask(i)
        slot = self.holds.index(i)
        arrived = self.arrival[slot].result()
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        self.seconds_waited += time.perf_counter() - began

        # Blocks run upwards, and in a backward pass downwards from the last; a pass with gradients turns there.
        step = 1 if i > self.last or i == 0 else -1
        self.used, self.last = slot, i
        following = (i + step) % len(self.blocks)
        turns = i + step == len(self.blocks) and torch.is_grad_enabled()
        if following not in self.holds and not turns:
            self._ask(following)

        for c in self.codes[i]:
            c.layer.codes = self.slots[slot][c.start : c.stop].view(c.dtype).view(c.shape)
        try:
            yield
        finally:
            for c in self.codes[i]:
                c.layer.codes = None

    def _ask(self, i: int) -> None:
        """Start to bring block i into the slot whose block ran before the last one."""
        slot = 1 - self.used
        self.holds[slot] = i
        done = None
        if self.device.type == "cuda":  # what was launched up to now may still read the slot
            done = torch.cuda.current_stream(self.device).record_event()
        self.arrival[slot] = self.worker.submit(self._bring, i, slot, done)

    def _bring(self, i: int, slot: int, done: Any) -> Any:
        """In the worker's thread: block i into a slot. Returns the event to wait for, on CUDA."""
        self.brought += 1
        data = self.slots[slot][: self.sizes[i]]
        torch.autograd.graph.increment_version(data)  # what autograd saved of it is void
        if self.device.type != "cuda":
            self._read(i, data)
            return None
        if self.kept is None:
            if self.copied is not None:  # one buffer serves all: the copy before this one must be through
                self.copied.synchronize()
            source = self.staging
            self._read(i, source)
        else:
            if self.kept[i] is None:
                self.kept[i] = _page_locked(self.sizes[i])
                self._read(i, self.kept[i])
            source = self.kept[i]
        with torch.cuda.stream(self.side):
            self.side.wait_event(done)
            data.copy_(source[: self.sizes[i]], non_blocking=True)
            self.copied = self.side.record_event()
        return self.copied

    def _read(self, i: int, data: Tensor) -> None:
        for c in self.codes[i]:
            start = c.start
            for part in c.parts:
                if part.file not in self.files:
                    self.files[part.file] = part.file.open("rb", buffering=0)
                checkpoints.read_at(self.files[part.file], part.offset, data[start : start + part.nbytes])
                start += part.nbytes
            self.bytes_read += c.stop - c.start

    def report(self) -> str:
        """One line: blocks brought, time for each, bytes."""
        seconds = time.perf_counter() - self.began if self.began else 0.0
        each = seconds / max(self.brought, 1)
        waited, slot = self.seconds_waited / max(self.brought, 1), max(self.sizes) / 1e6
        return (
            f"streamed: two slots of {slot:.0f} MB, {self.brought} blocks, {self.bytes_read / 1e9:.1f} GB"
            f" read, {each:.2f} s a block of which {waited:.2f} s waiting"
        )


def checkpoint_blocks(flux: Flux, offload: bool = False) -> None:
    """Keep only each block's input, with `offload` in the host's memory; its inside is computed again in the backward
    pass (Chen et al. 2016).
    """

    def run(*args: Tensor, forward: Callable[..., Any]) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(forward, *args, use_reentrant=False)

    for block in flux.blocks:
        block.forward = partial(run, forward=block.forward)


def _page_locked(nbytes: int) -> Tensor:
    """Host memory that a GPU reads by itself, of this size: pin_memory=True rounds up to a power of two.

    In pages of its own, since none can be locked twice.
    """
    data = torch.frombuffer(mmap(-1, nbytes), dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    if code := int(runtime.cudaHostRegister(data.data_ptr(), nbytes, 0)):
        raise ValueError(
            f"--stream: {nbytes / 1e6:.0f} MB of memory can't be locked for the GPU (cudaHostRegister: {code}); "
            "look at `ulimit -l` and at the memory that is free."
        )
    weakref.finalize(data, runtime.cudaHostUnregister, data.data_ptr())
    return data


def _return_freed_memory() -> None:
    """Memory of the CPU goes back to the system as soon as it is freed, from 1 MB on.

    glibc keeps freed activations for the next ones, and the block inputs that lie between them spoil the gaps: with
    checkpointing that is half of the memory of a step.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def load_network(
    part: str,
    path: str | Path,
    dtype: torch.dtype,
    device: Device,
    kind: str | None,
    streamed: bool,
    cache: Path | None = None,
) -> tuple[Any, Stream | None]:
    """A Flux or T5, whole, or (`streamed`) with its blocks left in their files; arguments as for load_streamed.

    `kind` may also be "stored": as the files hold the weights, which None widens to dtype unless they are streamed.
    """
    if streamed:
        return load_streamed(part, path, dtype, device, None if kind == "stored" else kind, cache)
    load = load_flux if part == "transformer" else load_t5
    return load(path, dtype=dtype, device=device, kind=kind), None


def load_streamed(
    part: str,
    path: str | Path,
    dtype: torch.dtype,
    device: Device = "cpu",
    kind: str | None = None,
    cache: Path | None = None,
    params: Any = None,
) -> tuple[Any, Stream]:
    """A Flux or T5 whose blocks stay in their files; call `wrap` of the stream before it runs.

    Args:
        part: transformer or t5.
        path: file or folder, in any official layout.
        dtype: of the computation.
        device: where it runs.
        kind: int8, fp8, nf4, or None for what the files hold.
        cache: folder for what `kind` makes; needed with it.
        params: sizes; else found as load_flux finds them.

    Returns:
        The network, frozen, all but the weights of its blocks in place, and its stream.

    Raises:
        ValueError: files of another network, or parts of a weight that are stored in several dtypes.
    """
    device = torch.device(device)
    model, headers, sources = checkpoints.outline(part, path, params)
    blocks = model.blocks if part == "transformer" else tuple(model.encoder.block)
    names = {module: name for name, module in model.named_modules()}
    linears = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]
    checkpoints.assemble(
        model, headers, sources, dtype, device, leave={f"{names[m]}.weight" for block in linears for m in block}
    )
    if kind:
        cache = cache / f"{checkpoints.fingerprint(path, part)}-{kind}"
        cache.mkdir(parents=True, exist_ok=True)

    placed = []
    read = TensorReader(headers, mapped=False)
    for block, chosen in zip(blocks, linears, strict=True):
        if kind:
            file = cache / f"{names[block]}.safetensors"
            if not file.exists():
                _write_quantized(file, read, {names[m]: sources[f"{names[m]}.weight"] for m in chosen}, kind, device)
            made = checkpoints.read_headers([file])
        start, codes = 0, []
        for linear in chosen:
            name = names[linear]
            if kind:
                parts = (made[f"{name}.codes"],)
                scales = TensorReader(made, mapped=False).raw(f"{name}.scales") if f"{name}.scales" in made else None
                shape = parts[0].shape
            else:
                parts = tuple(headers[s] for s in sources[f"{name}.weight"])
                scales, shape = checkpoints.scales_of(read, sources[f"{name}.weight"]), linear.weight.shape
            if len({p.dtype for p in parts}) > 1:
                raise ValueError(f"{parts[0].file}: {name} is stored in several dtypes, which --stream can't join.")
            layer = QuantizedLinear(linear, None, None if scales is None else scales.to(device))
            model.set_submodule(name, layer)
            stop = start + sum(p.nbytes for p in parts)
            codes.append(Codes(layer, checkpoints.DTYPES[parts[0].dtype], torch.Size(shape), parts, start, stop))
            start = -(-stop // ALIGN) * ALIGN
        placed.append(codes)
    return model, Stream(blocks, placed, device)


def _write_quantized(
    file: Path, read: TensorReader, sources: dict[str, list[str]], kind: str, device: torch.device
) -> None:
    """Codes and scales of a block's Linears, made on the device."""
    tensors = {}
    for name, stored in sources.items():
        codes, scales = checkpoints.narrow(read, stored, storage(name, kind), device)
        tensors[f"{name}.codes"] = codes.cpu()
        if scales is not None:
            tensors[f"{name}.scales"] = scales.cpu()
    save_file(tensors, file)
