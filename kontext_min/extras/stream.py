"""Run a network larger than the memory: each block's weights reach the device just before the block runs.

    slot 0   | block 0 runs       | block 2 is fetched | block 2 runs       |   ...
    slot 1   | block 1 is fetched | block 1 runs       | block 3 is fetched |   ...   downwards in backward

The weights of the blocks' Linears take two slots, each as large as the largest block. What travels are their codes
(quantize.py): the bytes of the file as they are, bfloat16 or fp8, or those of int8, fp8 and nf4. They are read with
read(2) into the slot, since mapped pages would count as resident memory of the process. On CUDA they go through
page-locked memory and a stream of their own, and blocks that fit half of the machine's memory stay there after the
first pass. A thread does this while the block before computes. Biases, norms, scales and LoRA are resident.

Training needs checkpointing.py too: the forward pass of each block runs again in the backward pass, and fetches the
block again. Without it, autograd finds that a saved weight was overwritten, and raises an error.

int8, fp8 and nf4 of a wider file are made once, block by block, and kept in a cache folder: quantizing in every pass
would read the wide file each time, which is the slower half of the work.

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
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kontext_min.checkpoints import (
    DTYPES,
    Device,
    Headers,
    Stored,
    fill,
    mapped,
    metadata,
    outline,
    read_headers,
)  # fmt: skip
from kontext_min.extras.fingerprint import fingerprint, hash_of_code
from kontext_min.extras.quantize import QUANTIZED, QuantizedLinear, narrow, scales_of, storage
from kontext_min.extras.saving import checksum, save_file

CODE = hash_of_code("extras/quantize.py")  # blocks of another are made again
ALIGN = 64  # codes start at multiples of so many bytes in a slot


@dataclass(frozen=True)
class Codes:
    """The codes of one Linear: the stored tensors that they are, one after the other, and their place in a slot."""

    layer: QuantizedLinear  # whose codes are None while the block does not run
    dtype: torch.dtype
    shape: torch.Size
    parts: tuple[Stored, ...]
    start: int
    stop: int


class Stream:
    """The blocks of one network and the two slots that they pass through."""

    def __init__(self, blocks: Sequence[nn.Module], codes: Sequence[Sequence[Codes]], device: torch.device) -> None:
        self.blocks, self.codes, self.device = blocks, codes, device
        self.sizes = [max((c.stop for c in block), default=0) for block in codes]
        self.slots = [torch.empty(max(self.sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # the block in each slot, or on its way there
        self.arrival: list[Future[Any]] = [Future(), Future()]
        self.used = self.last = 0  # slot and block that ran last
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="stream")  # one, so that reads come in order
        # Open from now on: a program with other code may replace them in the cache.
        files = {part.file for block in codes for c in block for part in c.parts}
        self.files: dict[Path, BinaryIO] = {file: file.open("rb", buffering=0) for file in files}
        self.fetched = self.bytes_read = 0
        self.seconds_waited, self.began = 0.0, 0.0
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            self.kept = [None] * len(blocks) if sum(self.sizes) <= most_page_locked() else None
            self.staging = _page_locked(max(self.sizes)) if self.kept is None else None
            self.copied: torch.cuda.Event | None = None
        else:
            _return_freed_memory()

    def wrap(self) -> None:
        """Let each block fetch its weights; goes outside of torch.compile and inside of checkpointing."""
        for i, block in enumerate(self.blocks):
            block.forward = self._fetching(i, block.forward)

    def _fetching(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            with self.at_hand(i):
                return forward(*args)

        return run

    @contextmanager
    def at_hand(self, i: int) -> Iterator[None]:
        """Inside, the weights of block i are in its layers, and those of the block that follows are on their way."""
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
        """Start to fetch block i into the slot whose block ran before the last one."""
        slot = 1 - self.used
        self.holds[slot] = i
        done = None
        if self.device.type == "cuda":  # what was launched up to now may still read the slot
            done = torch.cuda.current_stream(self.device).record_event()
        self.arrival[slot] = self.worker.submit(self._fetch, i, slot, done)

    def _fetch(self, i: int, slot: int, done: Any) -> Any:
        """In the worker's thread: block i into a slot. Returns the event to wait for, on CUDA."""
        self.fetched += 1
        data = self.slots[slot][: self.sizes[i]]
        torch.autograd.graph.increment_version(data)  # autograd may not use what it saved of it
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
                _read_at(self.files[part.file], part.offset, data[start : start + part.nbytes])
                start += part.nbytes
            self.bytes_read += c.stop - c.start

    def report(self) -> str:
        """One line: blocks fetched, bytes, time for each block."""
        seconds = time.perf_counter() - self.began if self.began else 0.0
        each = seconds / max(self.fetched, 1)
        waited, slot = self.seconds_waited / max(self.fetched, 1), max(self.sizes) / 1e6
        return (
            f"streamed: two slots of {slot:.0f} MB, {self.fetched} blocks, {self.bytes_read / 1e9:.1f} GB"
            f" read, {each:.2f} s a block of which {waited:.2f} s waiting"
        )


def _read_at(file: BinaryIO, offset: int, data: Tensor) -> None:
    """Fill a flat uint8 CPU tensor from a place in a file, which is opened without a buffer."""
    file.seek(offset)
    view = memoryview(data.numpy())
    while view:  # one read gives 2 GB at most
        got = file.readinto(view)
        if not got:
            raise ValueError(f"{file.name}: ends too early; did another program write it?")
        view = view[got:]


def most_page_locked() -> int:
    """Bytes of page-locked memory that blocks may take: half of the machine's; 0 on Windows, which has no sysconf."""
    known = hasattr(os, "sysconf")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if known else 0


def _page_locked(nbytes: int) -> Tensor:
    """Host memory of this size that a GPU reads by itself: pin_memory=True would round it up to a power of two.

    It has pages of its own, since no page can be locked twice.
    """
    data = torch.frombuffer(mmap(-1, nbytes), dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    if code := int(runtime.cudaHostRegister(data.data_ptr(), nbytes, 0)):
        raise ValueError(
            f"--stream: {nbytes / 1e6:.0f} MB of memory can't be locked for the GPU (cudaHostRegister: {code}); "
            "check `ulimit -l` and the free memory."
        )
    weakref.finalize(data, runtime.cudaHostUnregister, data.data_ptr())
    return data


def _return_freed_memory() -> None:
    """Give memory of 1 MB and more back to the system as soon as it is freed.

    glibc keeps freed activations for the next ones, and block inputs that lie between them spoil the gaps: with
    checkpointing that is half of the memory of a step.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


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
        kind: int8, fp8 or nf4 of a Flux, or None for what the files hold.
        cache: folder for the quantised blocks; needed with `kind`.
        params: sizes; None reads them from the files.

    Returns:
        The network, frozen, complete but for the weights of its blocks, and its stream.

    Raises:
        ValueError: an unknown kind, files of another network, or parts of a weight that are stored in several dtypes.
    """
    if kind not in (None, *QUANTIZED):
        raise ValueError(f"--quantize: got {kind!r}, expected {', '.join(QUANTIZED)}.")
    device = torch.device(device)
    model, sources = outline(part, path, params)
    blocks = model.blocks if part == "transformer" else tuple(model.encoder.block)
    names = {module: name for name, module in model.named_modules()}
    weights = [  # of each block: Linear -> the stored tensors of its weight
        {names[m]: sources.pop(f"{names[m]}.weight") for m in block.modules() if isinstance(m, nn.Linear)}
        for block in blocks
    ]
    fill(model, sources, dtype, device)
    if kind:
        cache = cache / f"{fingerprint(path, part)}-{kind}"
        cache.mkdir(parents=True, exist_ok=True)

    placed = []
    for block, linears in zip(blocks, weights, strict=True):
        made = _quantized(cache / f"{names[block]}.safetensors", linears, kind, device) if kind else {}
        start, codes = 0, []
        for name, stored in linears.items():
            linear = model.get_submodule(name)
            if kind:
                stored, scales = [made[f"{name}.codes"]], made.get(f"{name}.scales")
                shape, scales = stored[0].shape, None if scales is None else mapped(scales)
            else:
                shape, scales = linear.weight.shape, scales_of(stored)
            if len({s.dtype for s in stored}) > 1:
                raise ValueError(f"{stored[0].file}: {name} is stored in several dtypes, which --stream can't join.")
            layer = QuantizedLinear(linear, None, None if scales is None else scales.to(device, copy=True))
            model.set_submodule(name, layer)
            stop = start + sum(s.nbytes for s in stored)
            codes.append(Codes(layer, DTYPES[stored[0].dtype], torch.Size(shape), tuple(stored), start, stop))
            start = -(-stop // ALIGN) * ALIGN
        placed.append(codes)
    return model, Stream(blocks, placed, device)


def _quantized(file: Path, linears: dict[str, list[Stored]], kind: str, device: torch.device) -> Headers:
    """Codes and scales of a block's Linears, from the cache, or made on the device if the file there is not whole."""
    key = f"{file.parent.name}/{file.stem}/{CODE}"
    try:
        about = metadata(file)
        if about.get("key") == key and about.get("checksum") == checksum(load_file(file)):
            return read_headers([file])
    except (FileNotFoundError, ValueError):
        pass
    tensors = {}
    for name, stored in linears.items():
        codes, scales = narrow(stored, storage(name, kind), device)
        tensors[f"{name}.codes"] = codes.cpu()
        if scales is not None:
            tensors[f"{name}.scales"] = scales.cpu()
    save_file(tensors, file, {"key": key, "checksum": checksum(tensors)})
    return read_headers([file])
