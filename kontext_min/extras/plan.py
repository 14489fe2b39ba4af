"""How much memory and arithmetic a run will take, from the real code on fake tensors: nothing is loaded or computed.

    peak on the device = max over the phases of a run (what is resident + the most that is alive at once in the phase)

    phase      resident                                        alive
    text       T5                                              its forward pass; no phase if the prompts are cached
    pictures   transformer, LoRA, optimizer, autoencoder       encoding, and decoding of results
    network    the same                                        forward and backward pass, gradients

The networks are built with shapes and no data (FakeTensorMode), then the loss of flow.py runs forward and backward
while `Tally` sees every operation: which storages it makes, when they are gone, how many FLOPs it counts. Attention
runs as the fused kernel that CUDA and CPUs have: q, k, v, the result and one number a query are kept, no L x L matrix.

All blocks of a kind are alike, so two of each are run, and the rest is multiplication: the first double block (whose
inputs need no gradient) and the last single block (which computes only what is read) stand for themselves, the other
two for all blocks between. What kernels allocate for themselves is not seen, nor are gaps between allocations.

    python -m kontext_min.extras.plan     memory and FLOPs of the full model in all 17 shapes: docs/memory.md

Sources: torch._subclasses.FakeTensorMode, torch.utils._python_dispatch.TorchDispatchMode, torch.utils.flop_counter.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kontext_min import data, flow
from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.checkpoints import DTYPES, Weights, outline
from kontext_min.extras import prompts
from kontext_min.extras.quantize import QuantizedLinear, quantize_
from kontext_min.extras.stream import checkpoint_blocks
from kontext_min.flow import Objective, Prompt
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import add_lora
from kontext_min.t5 import T5Encoder, T5Params

GB = 2.0**30  # a card of 16 GB has 16 times this
SMALL = 0.05  # width of the model times pixels of the batch, over bytes: what is below is not planned before a run
ATEN = torch.ops.aten
FLOPS = flop_registry | {  # which lacks the fused attention of CPUs
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
CUDA_CONTEXT = 0.5 * GB  # kernels and workspaces of CUDA and cuBLAS, about
FULL = 0.9  # of a budget: the rest is for gaps between allocations (docs/memory.md)


@dataclass(frozen=True)
class Sizes:
    """The networks of a run; the defaults are those of FLUX.1-Kontext-dev."""

    flux: FluxParams = FluxParams()
    autoencoder: AutoencoderParams = AutoencoderParams()
    t5: T5Params = T5Params()
    text_tokens: int = 512
    stored: torch.dtype = torch.bfloat16  # of the transformer's file

    @classmethod
    def of(cls, weights: Weights) -> "Sizes":
        """Read from the headers of the weight files."""
        flux, headers, _ = outline("transformer", weights.path("transformer"))
        largest = max(headers.values(), key=lambda stored: stored.nbytes)
        autoencoder, t5 = (outline(part, weights.path(part))[0] for part in ("vae", "t5"))
        length = prompts.max_length(weights)
        return cls(flux.params, autoencoder.params, t5.encoder.params, length, DTYPES[largest.dtype])


@dataclass(frozen=True)
class Setting:
    """What decides on the memory of a run."""

    size: tuple[int, int] = (1024, 1024)  # width and height in pixels of the largest bucket or tile
    batch: int = 1
    reference: bool = False  # tokens of the degraded picture are appended
    train: bool = True
    rank: int = 16  # of the LoRA, 0 for none
    targets: str = "attention-mlp"
    full: bool = False
    averages: int = 0  # copies of the trained weights for an EMA
    kind: str | None = None  # int8, fp8, nf4, or None: as stored
    stream: bool = False
    checkpointing: bool = False
    offload: bool = False  # block inputs wait in the host's memory
    dtype: torch.dtype = torch.bfloat16  # of the computation
    cuda: bool = True
    held: int = 0  # pictures of the largest size that stay on the device, for validation
    text: bool = True  # the text encoders run
    pictures: bool = True  # the autoencoder runs


@dataclass(frozen=True)
class Plan:
    """Bytes by part, peaks by phase, FLOPs of one forward (and backward) pass."""

    parts: dict[str, float]
    phases: dict[str, float]
    host: float
    flops: float

    @property
    def device(self) -> float:
        """The peak on the device."""
        return max(self.phases.values())


# ------------------------------------------------------------------------------------------------- what is measured


@dataclass
class Segment:
    """A stretch of a run: bytes alive when it began, the most that were alive in it, FLOPs."""

    start: float
    peak: float
    flops: float = 0.0


class Tally(TorchDispatchMode):
    """Sees every operation, fake or real, and keeps count of the bytes that its results hold.

    Args:
        resident: tensors that are there already and not counted.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata: 0 for x in resident}
        self.now = 0
        self.segments: dict[str, Segment] = {}
        self.mark("start")

    def mark(self, name: str) -> None:
        """From here on it is another segment."""
        self.segment = self.segments.setdefault(name, Segment(self.now, self.now))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.known:
                self.known[key] = x.untyped_storage().nbytes()
                self.now += self.known[key]
                self.segment.peak = max(self.segment.peak, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, key).atexit = False
        if (packet := getattr(func, "_overloadpacket", None)) in FLOPS:
            self.segment.flops += FLOPS[packet](*args, **(kwargs or {}), out_val=out)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key)


def hollow(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network from the meta device with fake tensors as weights; inside FakeTensorMode."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=False)
    return model


def keep_narrow(blocks: Iterable[nn.Module], stored: torch.dtype) -> None:
    """The Linears of the blocks as the file has them, whatever the dtype of the computation."""
    for block in blocks:
        for m in block.modules():
            if isinstance(m, nn.Linear):
                m.weight = nn.Parameter(torch.empty(m.weight.shape, dtype=stored), requires_grad=False)


def size_of(model: nn.Module, choose: Callable[[Tensor], bool] = lambda _: True) -> int:
    """Bytes of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()) if choose(x))


def streamed(block: nn.Module) -> int:
    """Bytes of a block that stream.py brings: the codes of its Linears."""
    layers = [m for m in block.modules() if isinstance(m, QuantizedLinear)]
    return sum(m.codes.numel() * m.codes.element_size() for m in layers)


def network(setting: Setting, sizes: Sizes) -> tuple[dict[str, float], float, float]:
    """The transformer: bytes by part, the most that is alive besides them in a pass, FLOPs."""
    params = sizes.flux
    depth, singles = min(params.depth, 2), min(params.depth_single_blocks, 2)
    more = params.depth - depth, params.depth_single_blocks - singles  # blocks that multiplication stands for
    with torch.device("meta"):
        flux = Flux(replace(params, depth=depth, depth_single_blocks=singles))
    with FakeTensorMode():
        hollow(flux, setting.dtype)
        if setting.full:
            flux.requires_grad_(True)
        else:
            keep_narrow(flux.blocks, sizes.stored)
            quantize_(flux, setting.kind or "stored")
            if setting.rank:
                add_lora(flux, setting.rank, targets=setting.targets)
        blocks = [flux.double_blocks[-1], flux.single_blocks[0]]

        def whole(count: Callable[[nn.Module], float]) -> float:
            """Of the model with all its blocks."""
            return count(flux) + sum(n * count(block) for n, block in zip(more, blocks, strict=True))

        trained = whole(lambda m: size_of(m, lambda x: x.requires_grad))
        parts = {"weights": whole(size_of) - (0 if setting.full else trained)}
        if setting.stream:  # two slots; page-locked memory holds all, if it is at most half of the machine's
            codes, slot = whole(streamed), max(map(streamed, blocks))
            parts["weights"] += 2 * slot - codes
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            parts["host"] = (codes if codes <= memory / 2 else slot) if setting.cuda else 0.0
        copies = 1 + 2 * setting.train + setting.averages - setting.full  # themselves, AdamW's two moments
        parts["optimizer" if setting.full else "LoRA, optimizer"] = copies * trained

        objective = Objective(context=setting.reference)
        if setting.checkpointing:
            checkpoint_blocks(flux)
        factor = 2 ** (len(sizes.autoencoder.ch_mult) - 1)
        width, height = (side // factor for side in setting.size)
        z = torch.empty(setting.batch, sizes.autoencoder.z_channels, height, width)
        prompt = Prompt(
            torch.empty(setting.batch, sizes.text_tokens, params.context_in_dim, dtype=setting.dtype),
            torch.empty(setting.batch, params.vec_in_dim, dtype=setting.dtype),
            torch.empty(setting.batch),
        )
        sigma = torch.empty(setting.batch)
        tally = Tally([*flux.parameters(), *flux.buffers()])
        names = [f"double {i}" for i in range(depth)] + [f"single {i - singles}" for i in range(singles)]
        for name, block in zip(names, flux.blocks, strict=True):
            follow(tally, name, block)
        with tally, torch.set_grad_enabled(setting.train):
            if setting.train:
                flow.losses(flux, z, z, z, sigma, prompt, objective).mean().backward()
            else:
                flow.velocity(flux, z, sigma, z, prompt, objective)
    gradients = [size_of(b, lambda x: x.requires_grad) for b in blocks]
    peak, kept, flops = extrapolate(tally.segments, more, gradients, depth, setting.offload)
    parts["host"] = parts.get("host", 0.0) + kept
    return parts, peak, flops


def follow(tally: Tally, name: str, block: nn.Module) -> None:
    """Forward and backward pass of a block become segments of the tally."""

    def after(module: nn.Module, args: Any, out: Any) -> None:
        tally.mark(f"after {name}")
        for x in tree_leaves(out):
            if x.requires_grad:
                x.register_hook(lambda _: tally.mark(f"backward {name}"))

    block.register_forward_pre_hook(lambda *_: tally.mark(name))
    block.register_forward_hook(after)


def extrapolate(
    segments: dict[str, Segment], more: tuple[int, int], gradients: Sequence[int], depth: int, offload: bool
) -> tuple[float, float, float]:
    """Peak on the device, bytes kept on the host, and FLOPs, with `more` double and single blocks than were run.

    A block that is repeated leaves `kept` bytes for the backward pass, which stand under all that comes until its own
    backward pass; its gradients stand under all that comes after it. With `offload` what is kept is on the host, but
    for that of the few blocks that were run, which are counted here.
    """
    typical = f"double {depth - 1}", "single -2"
    trains = any(name.startswith("backward") for name in segments)
    kept = [
        n * (segments[f"after {name}"].start - segments[name].start) if n and trains else 0.0
        for n, name in zip(more, typical, strict=True)
    ]
    on_host = sum(kept) if offload else 0.0
    kept = [0.0, 0.0] if offload else kept
    grads = [n * g for n, g in zip(more, gradients, strict=True)]
    peak = flops = 0.0
    for name, s in segments.items():
        backward = name.startswith("backward")
        if name == "start" or (name.startswith("double") and name != typical[0]):
            below = 0.0
        elif "double" in name and not backward:
            below = kept[0]
        elif name == "backward double 0" and depth > 1:
            below = sum(grads)
        elif "double" in name:  # the first of the repeated ones to go back
            below = kept[0] + grads[1]
        else:
            below = sum(kept)
        peak = max(peak, s.peak + below)
        times = 1 + sum(n for n, kind in zip(more, typical, strict=True) if name in (kind, f"backward {kind}"))
        flops += times * s.flops
    return peak, on_host, flops


def pictures(setting: Setting, sizes: Sizes) -> tuple[float, float]:
    """The autoencoder: bytes of its weights, and the most that is alive in encoding a batch or decoding a result."""
    with torch.device("meta"):
        autoencoder = Autoencoder(sizes.autoencoder)
    with FakeTensorMode():
        hollow(autoencoder, torch.float32)
        width, height = setting.size
        latent = [1, sizes.autoencoder.z_channels, height // autoencoder.factor, width // autoencoder.factor]
        peaks = []
        for f, shape in ((autoencoder.encode, [1, 3, height, width]), (autoencoder.decode, latent)):  # one at a time
            tally = Tally(autoencoder.parameters())
            with tally, torch.no_grad():
                f(torch.empty(shape))
            peaks.append(tally.segment.peak)
        return size_of(autoencoder), max(peaks)


def text(setting: Setting, sizes: Sizes) -> tuple[float, float]:
    """T5: bytes of its weights, and the most that is alive in a pass; CLIP came before it and is much smaller."""
    layers = min(sizes.t5.num_layers, 2)
    with torch.device("meta"):
        t5 = T5Encoder(replace(sizes.t5, num_layers=layers))
    with FakeTensorMode():
        hollow(t5, setting.dtype)
        if setting.stream:
            keep_narrow(t5.encoder.block, sizes.stored)
            quantize_(t5, "stored")
        block, tally = t5.encoder.block[-1], Tally([*t5.parameters(), *t5.buffers()])
        with tally, torch.no_grad():
            t5(torch.zeros(1, sizes.text_tokens, dtype=torch.long))
        weights = size_of(t5) + (sizes.t5.num_layers - layers) * size_of(block)
        if setting.stream:
            weights += 2 * streamed(block) - sum(map(streamed, t5.encoder.block))
            weights -= (sizes.t5.num_layers - layers) * streamed(block)
        return weights, tally.segment.peak


def measure(setting: Setting, sizes: Sizes) -> Plan:
    """The plan of one setting."""
    parts, alive, flops = network(setting, sizes)
    on_host = parts.pop("host", 0.0)
    context = CUDA_CONTEXT if setting.cuda else 0.0
    if setting.held:
        parts["validation pictures"] = 4.0 * 3 * setting.held * setting.size[0] * setting.size[1]
    resident = sum(parts.values()) + context
    phases = {}
    if setting.pictures:
        parts["autoencoder"], drawn = pictures(setting, sizes)
        resident += parts["autoencoder"]
        phases["pictures"] = resident + drawn
    phases["network"] = resident + alive
    parts["activations, gradients"] = alive
    if setting.text:
        parts["text encoder, before"], read = text(setting, sizes)
        phases["text"] = parts["text encoder, before"] + read + context
    return Plan(parts, phases, on_host, flops)


# ------------------------------------------------------------------------------------------------ what a run asks for


def for_training(settings: Any, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Setting, data.Size]:
    """The Setting of train.py's flags, at its largest bucket, and the largest bucket of --resolution 512."""
    multiple = 2 ** len(sizes.autoencoder.ch_mult)
    size, small = (max(data.buckets(r, multiple), key=lambda s: s[0] * s[1]) for r in (settings.resolution, 512))
    return Setting(
        size=size,
        batch=settings.batch_size,
        reference=settings.context or settings.objective == "kontext",
        rank=settings.rank,
        targets=settings.lora_targets,
        full=settings.full,
        averages=int(settings.ema > 0),
        kind=settings.quantize,
        stream=settings.stream,
        checkpointing=settings.gradient_checkpointing or settings.stream,
        offload=settings.offload_activations,
        dtype=dtype,
        cuda=device.type == "cuda",
        held=2 * settings.val_count,
    ), small


def for_sampling(
    settings: Any, sizes: Sizes, trained: int | None, reference: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Setting, data.Size]:
    """The Setting of sample.py's flags for a whole tile, which bounds the memory, and the size with --tile 512."""
    factor = 2 ** (len(sizes.autoencoder.ch_mult) - 1)
    tile = max((settings.tile or trained or 128 * factor) // (2 * factor), 1) * 2 * factor
    return Setting(
        size=(tile, tile),
        batch=settings.batch_size,
        reference=reference,
        train=False,
        rank=0,  # of a LoRA nothing but its file is known, and that is small
        kind=settings.quantize,
        stream=settings.stream,
        dtype=dtype,
        cuda=device.type == "cuda",
    ), (min(tile, 512), min(tile, 512))


def free_bytes(device: torch.device) -> float:
    """What a run may take: the free memory of the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    return 1024.0 * int(available.split()[1])


# --------------------------------------------------------------------------------------------------- what is printed


def budget_bytes(text: str) -> float:
    """A size such as 16G, in bytes.

    Raises:
        ValueError: not a number with an optional M, G or T behind it.
    """
    number, factor = text.strip().upper().removesuffix("B"), 1.0
    if number[-1:] in ("M", "G", "T"):
        number, factor = number[:-1], {"M": 2.0**20, "G": GB, "T": 2.0**40}[number[-1]]
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f"--budget: got {text!r}, expected a size such as 16G.")
    return value


def choices(asked: Setting, small: tuple[int, int]) -> dict[str, Setting]:
    """Settings by the flags that make them, from the fastest to the smallest."""
    c = {"checkpointing": True} if asked.train else {}
    flag = " --gradient-checkpointing" if asked.train else ""
    plain = replace(asked, kind=None, stream=False, checkpointing=False, offload=False)
    found = {"": plain, flag: replace(plain, **c)}
    for kind in ("int8", "nf4"):
        found[f"--quantize {kind}{flag}"] = replace(plain, kind=kind, **c)
    if asked.train:
        offload = {"checkpointing": True, "offload": True}
        found[f"--quantize nf4{flag} --offload-activations"] = replace(plain, kind="nf4", **offload)
    smaller = f"{'--resolution' if asked.train else '--tile'} 512"
    for kind in ("int8", "nf4"):
        found[f"--quantize {kind}{flag} {smaller}"] = replace(plain, kind=kind, size=small, **c)
    found["--stream"] = replace(plain, stream=True, **c)
    found[f"--stream {smaller}"] = replace(plain, stream=True, size=small, **c)
    return {name.strip(): setting for name, setting in found.items()}


def show(asked: Setting, sizes: Sizes, budget: float, small: tuple[int, int]) -> str:
    """The plan as text: the setting that was asked for by part, then what fits, then the flags that do."""
    plan, device = measure(asked, sizes), "device" if asked.cuda else "memory"
    lines = [f"{asked.size[0]}x{asked.size[1]} pixels, batch {asked.batch}, in GB:"]
    lines += [f"  {name:24} {value / GB:8.2f}" for name, value in plan.parts.items()]
    lines += [f"  peak, {name:18} {value / GB:8.2f}" for name, value in plan.phases.items()]
    lines += [
        f"  {device + ', peak':24} {plan.device / GB:8.2f}",
        f"  {'host, streamed from':24} {plan.host / GB:8.2f}",
    ]
    lines += [f"  {plan.flops / 1e12:.2f} TFLOP for a {'batch, forward and backward' if asked.train else 'step'}", ""]
    best = None
    for flags, setting in choices(asked, small).items():
        peak = measure(setting, sizes).device
        fits = peak <= FULL * budget
        best = flags if fits and best is None else best
        lines.append(f"  {flags or 'everything resident':60} {peak / GB:8.2f}  {'fits' if fits else 'too large'}")
    if best is None:
        lines.append(f"\nnothing fits {budget / GB:g} GB: lower --resolution or --batch-size")
    else:
        lines.append(f"\nfits {budget / GB:g} GB, a tenth of it to spare: {best or 'no flag is needed'}")
    return "\n".join(lines)


def fit(setting: Setting, sizes: Sizes, device: torch.device) -> Setting:
    """The setting, with checkpointing if it trains and is too large without; nothing has been loaded yet.

    A model that is small beside the memory is not looked at.

    Raises:
        ValueError: it does not fit; with what it needs, what there is, and what to do.
    """
    if device.type != "cuda" and not Path("/proc/meminfo").exists():
        return setting
    free = free_bytes(device)
    if sizes.flux.hidden_size * max(setting.size) * max(setting.size) * setting.batch < SMALL * free:
        return setting
    need = measure(setting, sizes).device
    if need > FULL * free and setting.train and not setting.checkpointing:
        setting = replace(setting, checkpointing=True)
        need = measure(setting, sizes).device
    if need > free:
        raise ValueError(
            f"this run needs {need / GB:.1f} GB of memory at its peak and {free / GB:.1f} GB are free on {device}; "
            "--plan shows the flags that make it fit."
        )
    return setting


def table() -> str:
    """Markdown for docs/memory.md: the full model in all 17 shapes, and what fits at 1024x1024."""
    sizes, c = Sizes(), {"checkpointing": True}
    lines = ["| setting, 1024x1024, batch 1, rank 16 | bridge, GB | with context, GB |", "|---|--:|--:|"]
    rows = {
        "bf16 resident": {},
        "bf16 resident, checkpointing": c,
        "int8 resident, checkpointing": c | {"kind": "int8"},
        "int8 resident, checkpointing, inputs on the host": c | {"kind": "int8", "offload": True},
        "fp8 resident, checkpointing, inputs on the host": c | {"kind": "fp8", "offload": True},
        "nf4 resident, checkpointing": c | {"kind": "nf4"},
        "nf4 resident, checkpointing, inputs on the host": c | {"kind": "nf4", "offload": True},
        "bf16 streamed, checkpointing": c | {"stream": True},
        "int8 streamed, checkpointing": c | {"stream": True, "kind": "int8"},
        "bf16 streamed, checkpointing, --resolution 512": c | {"stream": True, "size": (512, 512)},
    }
    for name, changes in rows.items():
        peaks = [measure(Setting(**changes, reference=r), sizes).device / GB for r in (False, True)]
        lines.append(f"| {name} | {peaks[0]:.1f} | {peaks[1]:.1f} |")
    lines += [
        "",
        "| width x height | tokens | int8, GB | with context | TFLOP a batch | with context | TFLOP a restoring step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    known: dict[data.Size, list[float]] = {}  # a shape and its transpose take the same
    for size in data.buckets(1024):
        key = min(size), max(size)
        if key not in known:
            base = Setting(size=key, kind="int8", text=False, pictures=False, **c)
            plain, context = (measure(replace(base, reference=r), sizes) for r in (False, True))
            step = network(replace(base, train=False), sizes)[2]
            known[key] = [
                plain.device / GB,
                context.device / GB,
                *(x / 1e12 for x in (plain.flops, context.flops, step)),
            ]
        a, b, *tera = known[key]
        arithmetic = " | ".join(f"{x:.0f}" for x in tera)
        lines.append(f"| {size[0]} x {size[1]} | {size[0] * size[1] // 256} | {a:.1f} | {b:.1f} | {arithmetic} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
