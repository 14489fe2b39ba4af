"""Estimate the memory and arithmetic of a run by running the real code on fake tensors: no weights, no computation.

    peak on the device = max over the phases of a run (what is resident + the most that is alive at once in the phase)

    phase      resident                                        alive
    text       T5                                              its forward pass; no phase if the prompts are cached
    pictures   transformer, LoRA, optimizer, autoencoder       encoding, and decoding of results
    network    the same                                        forward and backward pass, gradients

The networks have shapes and no data (FakeTensorMode). The loss of flow.py runs forward and backward, and `Tally` sees
every operation: which storages it makes, when they are freed, how many FLOPs it takes. Attention runs as the fused
kernel of CUDA and CPUs, which keeps q, k, v, the result and one number per query, and no L x L matrix.

All blocks of a kind are alike, so only two of each run, and the rest is multiplication: the first double block (whose
inputs need no gradient) and the last single block count once, the other two stand for all blocks between. The plan does
not see what kernels allocate for themselves, nor gaps between allocations.

    python -m kontext_min.extras.plan     memory and FLOPs of the full model in all 17 shapes: docs/memory.md

Sources: torch._subclasses.FakeTensorMode, torch.utils._python_dispatch.TorchDispatchMode, torch.utils.flop_counter.
"""

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from kontext_min.checkpoints import DTYPES, NOT_IN_SHAPES, NOUNS, find, outline, read_json, told
from kontext_min.extras import held_out, prompts, speed
from kontext_min.extras.base import Weights, check_files
from kontext_min.extras.checkpointing import checkpoint_blocks
from kontext_min.extras.method import Method
from kontext_min.extras.quantize import QuantizedLinear, quantize_
from kontext_min.extras.tiles import OVERLAP, Room, positions, tile_side, tiles
from kontext_min.flow import Objective, Prompt
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import add_lora
from kontext_min.restore import GRID
from kontext_min.t5 import T5Encoder, T5Params

GB = 2.0**30  # a card of 16 GB has 16 times this
CARDS = (8, 12, 16, 24, 48, 80)  # GB of common GPUs
# A tenth of a card stays free for gaps between allocations (docs/memory.md).
FULL = 0.9
# Kernels and workspaces of CUDA and cuBLAS, about.
CUDA_CONTEXT = 0.5 * GB
# A run is planned before its start if width of the model * pixels of the batch is at least this part of the free bytes.
SMALL = 0.05
# A picture on its way: bytes of a pixel in Pillow and in tensors, before and after; copies of its latent; floats of the
# row of tiles that is being blended.
PIXEL, LATENTS, ROW = 20, 6, 3 * 12
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
ATEN = torch.ops.aten
# torch's table lacks the fused attention of CPUs.
FLOPS = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}


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
        """Read from the headers of the weight files.

        Raises:
            ValueError: the networks do not fit together.
        """
        flux, sources = outline("transformer", weights.path("transformer"))
        largest = max((s for stored in sources.values() for s in stored), key=lambda stored: stored.nbytes)
        autoencoder, clip, t5 = (outline(part, weights.path(part))[0] for part in ("vae", "clip", "t5"))
        takes = flux.params.in_channels, flux.params.vec_in_dim, flux.params.context_in_dim
        gives = {"vae": 4 * autoencoder.params.z_channels, "clip": clip.embeddings.token_embedding.embedding_dim}
        gives["t5"] = t5.encoder.params.d_model
        for (part, width), taken in zip(gives.items(), takes, strict=True):
            if width != taken:
                whose = f"{weights.path(part)}: its {NOUNS[part]} gives {width} channels"
                other = f"the transformer of {weights.path('transformer')} takes {taken}"
                raise ValueError(f"{whose}, but {other}; name the parts of one model, or its folder with --weights.")
        like_flux = {
            "transformer": sum(flux.params.axes_dim) == sum(FluxParams().axes_dim),
            "vae": autoencoder.params == AutoencoderParams(),
            "clip": gives["clip"] == FluxParams().vec_in_dim,
            "t5": gives["t5"] == FluxParams().context_in_dim,
        }
        for part in (part for part, like in like_flux.items() if not like):
            known = told(file := find(weights.path(part), part)[0], part)
            if assumed := [key for key, ours in NOT_IN_SHAPES[part].items() if ours not in known]:
                what = f"not of FLUX's size, and no config.json beside it gives its {' and '.join(assumed)}"
                print(f"note: {file}: {what}; as in FLUX is assumed", file=sys.stderr)
        ours, flux_s = autoencoder.params, AutoencoderParams()
        if ours != flux_s == replace(ours, scale_factor=flux_s.scale_factor, shift_factor=flux_s.shift_factor):
            said, expected = (f"{p.scale_factor} and {p.shift_factor}" for p in (ours, flux_s))
            what = f"scaling_factor and shift_factor are {said} as its config.json says; FLUX's are {expected}"
            print(
                f"note: {weights.path('vae')}: {what}; is it the config.json of another autoencoder?", file=sys.stderr
            )
        for part in ("transformer", "vae", "clip", "t5"):
            check_files(weights.path(part), part)
        length, config = prompts.max_length(weights), weights.root / "tokenizer_2" / "tokenizer_config.json"
        lacks = "" if config.is_file() else "no such file"
        if lacks := lacks or "no model_max_length" * ("model_max_length" not in read_json(config)):
            print(f"note: {config}: {lacks}, which gives the length of prompts; FLUX's {length}", file=sys.stderr)
        return cls(flux.params, autoencoder.params, t5.encoder.params, length, DTYPES[largest.dtype])

    @property
    def factor(self) -> int:
        """Pixels of a latent position, on each axis."""
        return 2 ** (len(self.autoencoder.ch_mult) - 1)


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
    shard: bool = False
    averages: int = 0  # copies of the trained weights for an EMA
    kind: str | None = None  # int8, fp8, nf4, or None: as stored
    stream: bool = False
    checkpointing: str = "none"  # all, half or none of the blocks
    dtype: torch.dtype = torch.bfloat16  # of the computation
    cuda: bool = True
    held: int = 0  # pictures of the largest size that stay on the device, for validation
    picture: tuple[int, int] | None = None  # sampling: width and height of the largest picture
    coded: tuple[int, int] | None = None  # of the largest tile of the autoencoder; None: as `size`
    passes: int = 1  # of the network, in an optimizer step or for a picture
    text: bool = True  # the text encoders run
    pictures: bool = True  # the autoencoder runs


@dataclass(frozen=True)
class Plan:
    """Bytes by part, peaks by phase, FLOPs of one forward (and backward) pass and of the autoencoder for a step."""

    parts: dict[str, float]
    phases: dict[str, float]
    host: float
    flops: float
    coding: float

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


def keep_stored(model: nn.Module, blocks: Iterable[nn.Module], stored: torch.dtype) -> None:
    """The Linears of the blocks as stream.py makes them of what the file holds."""
    keep_narrow(blocks, stored)
    names = {module: name for name, module in model.named_modules()}
    for linear in [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]:
        model.set_submodule(names[linear], QuantizedLinear(linear, linear.weight, None))


def size_of(model: nn.Module, choose: Callable[[Tensor], bool] = lambda _: True) -> int:
    """Bytes of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()) if choose(x))


def streamed(block: nn.Module) -> int:
    """Bytes of a block that stream.py brings: the codes of its Linears."""
    layers = [m for m in block.modules() if isinstance(m, QuantizedLinear)]
    return sum(m.codes.numel() * m.codes.element_size() for m in layers)


def network(setting: Setting, sizes: Sizes) -> tuple[dict[str, float], float, float]:
    """The transformer: bytes by part, the most that is alive besides them in a pass, FLOPs."""
    if setting.checkpointing == "half":
        # Halfway between the other two; 0.1 % off for the full model, which has an odd number of blocks.
        ends = [network(replace(setting, checkpointing=which), sizes) for which in ("all", "none")]
        return ends[0][0], *(sum(numbers) / 2 for numbers in zip(*(end[1:] for end in ends), strict=True))
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
            if setting.kind:
                keep_narrow(flux.blocks, sizes.stored)
                quantize_(flux, setting.kind)
            elif setting.stream:
                keep_stored(flux, flux.blocks, sizes.stored)
            if setting.rank:
                add_lora(flux, setting.rank, targets=setting.targets)
        blocks = [flux.double_blocks[-1], flux.single_blocks[0]]

        def whole(count: Callable[[nn.Module], float]) -> float:
            """Of the model with all its blocks."""
            return count(flux) + sum(n * count(block) for n, block in zip(more, blocks, strict=True))

        trained = whole(lambda m: size_of(m, lambda x: x.requires_grad))
        parts = {"weights": whole(size_of) - (0 if setting.full else trained)}
        if setting.stream:  # two slots; page-locked memory holds all, if it is at most half of the machine's
            from kontext_min.extras.stream import most_page_locked

            codes, slot = whole(streamed), max(map(streamed, blocks))
            parts["weights"] += 2 * slot - codes
            parts["host"] = (codes if codes <= most_page_locked() else slot) if setting.cuda else 0.0
        copies = 1 + 2 * setting.train + setting.averages - setting.full  # themselves, AdamW's two moments
        parts["optimizer" if setting.full else "LoRA, optimizer"] = copies * trained

        objective = Objective(context=setting.reference)
        checkpoint_blocks(flux, setting.checkpointing)
        width, height = (side // sizes.factor for side in setting.size)
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
                flow.loss(flux, z, z, z, sigma, prompt, objective).mean().backward()
            else:
                flow.velocity(flux, z, sigma, z, prompt, objective)
    gradients = [size_of(b, lambda x: x.requires_grad) for b in blocks]
    return parts, *extrapolate(tally.segments, more, gradients, depth)


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
    segments: dict[str, Segment], more: tuple[int, int], gradients: Sequence[int], depth: int
) -> tuple[float, float]:
    """Peak on the device and FLOPs, with `more` double and single blocks than were run.

    A repeated block leaves `kept` bytes for the backward pass. They add to all that comes until its own backward pass;
    its gradients add to all that comes after it.
    """
    typical = f"double {depth - 1}", "single -2"
    trains = any(name.startswith("backward") for name in segments)
    kept = [
        n * (segments[f"after {name}"].start - segments[name].start) if n and trains else 0.0
        for n, name in zip(more, typical, strict=True)
    ]
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
    return peak, flops


@cache
def coder(params: AutoencoderParams, cuda: bool) -> tuple[int, Room, Room]:
    """The autoencoder: bytes of its weights, what n latent positions take in the encoder and in the decoder.

    Two sizes tell both coefficients of the FLOPs: those of the attention grow by n^2, all others by n, as the bytes.
    """
    with torch.device("meta"):
        autoencoder = Autoencoder(params)
    with FakeTensorMode():
        hollow(autoencoder, torch.float32)
        if not cuda:
            # On a CPU a convolution first copies its input into an order of its own.
            for conv in (module for module in autoencoder.modules() if isinstance(module, nn.Conv2d)):
                conv.forward = lambda x, forward=conv.forward: (x.clone(), forward(x))[1]
        rooms, few, many = [], 16**2, 32**2
        for f, channels, scale in (
            (autoencoder.encode, params.in_channels, autoencoder.factor),
            (autoencoder.decode, params.z_channels, 1),
        ):
            found = []
            for n in (few, many):
                tally, side = Tally(autoencoder.parameters()), math.isqrt(n) * scale
                with tally, torch.no_grad():
                    f(torch.empty(1, channels, side, side))
                found.append(tally.segment)
            quadratic = (found[1].flops / many - found[0].flops / few) / (many - few)
            rooms.append(Room(math.inf, found[1].peak / many, found[0].flops / few - few * quadratic, quadratic))
    return size_of(autoencoder), *rooms


def room(params: AutoencoderParams, device: torch.device, weights: float = 0.0) -> Room:
    """For tiles of the autoencoder: half of what is free once `weights` bytes more are loaded."""
    _, _, decoder = coder(params, device.type == "cuda")
    return replace(decoder, free=max(free_bytes(device) - weights, 0) / 2)


def text(setting: Setting, sizes: Sizes) -> tuple[float, float]:
    """T5: bytes of its weights, and the most that is alive in a pass; CLIP came before it and is much smaller."""
    layers = min(sizes.t5.num_layers, 2)
    with torch.device("meta"):
        t5 = T5Encoder(replace(sizes.t5, num_layers=layers))
    with FakeTensorMode():
        hollow(t5, setting.dtype)
        if setting.stream:
            keep_stored(t5, t5.encoder.block, sizes.stored)
        block, tally = t5.encoder.block[-1], Tally([*t5.parameters(), *t5.buffers()])
        with tally, torch.no_grad():
            t5(torch.zeros(1, sizes.text_tokens, dtype=torch.long))
        weights = size_of(t5) + (sizes.t5.num_layers - layers) * size_of(block)
        if setting.stream:
            weights += 2 * streamed(block) - sum(map(streamed, t5.encoder.block))
            weights -= (sizes.t5.num_layers - layers) * streamed(block)
        return weights, tally.segment.peak


@cache
def measure(setting: Setting, sizes: Sizes) -> Plan:
    """The plan of one setting. A table names some settings twice."""
    parts, alive, flops = network(setting, sizes)
    host = parts.pop("host", 0.0)
    context = CUDA_CONTEXT if setting.cuda else 0.0
    if setting.held:
        parts["validation pictures"] = 4.0 * 3 * setting.held * setting.size[0] * setting.size[1]
    if setting.picture:
        on_host, parts["picture"] = of_picture(setting, sizes)
        host += on_host if setting.cuda else 0.0
        parts["picture"] += 0.0 if setting.cuda else on_host
    resident = sum(parts.values()) + context
    phases, coding = {}, 0.0
    if setting.pictures:
        parts["autoencoder"], encoder, decoder = coder(sizes.autoencoder, setting.cuda)
        resident += parts["autoencoder"]
        h, w = positions(*(setting.coded or setting.size), sizes.factor)
        phases["pictures"] = resident + h * w * max(encoder.alive, decoder.alive)
        if setting.picture:
            whole, side = positions(*setting.picture, sizes.factor), max(h, w)
            coding = encoder.flops(*whole, side) + decoder.flops(*whole, side, shared=True)
        else:  # the control and the target of every batch
            coding = 2 * setting.passes * setting.batch * encoder.flops(h, w, max(h, w))
    phases["network"] = resident + alive
    parts["activations, gradients"] = alive
    if setting.text:
        parts["text encoder, before"], read = text(setting, sizes)
        phases["text"] = parts["text encoder, before"] + read + context
    return Plan(parts, phases, host, flops, coding)


def of_picture(setting: Setting, sizes: Sizes) -> tuple[float, float]:
    """Besides the networks, the largest picture takes: bytes of its pixels; bytes of its latents and a row of tiles."""
    width, height = setting.picture
    h, w = positions(*setting.picture, sizes.factor)
    row = ROW * width * min(height, (setting.coded or setting.size)[1])
    return PIXEL * width * height, LATENTS * 4 * sizes.autoencoder.z_channels * h * w + row


# ------------------------------------------------------------------------------------------------ what a run asks for


def for_training(settings: Any, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Setting, data.Size]:
    """The Setting of train.py's flags, at its largest bucket, and the largest bucket of --resolution 512."""
    size, small = (
        max(data.buckets(r, GRID * sizes.factor), key=lambda s: s[0] * s[1]) for r in (settings.resolution, 512)
    )
    return Setting(
        size=size,
        batch=settings.batch_size,
        reference=settings.context or settings.objective == "kontext",
        rank=settings.rank,
        targets=settings.lora_targets,
        full=settings.full,
        shard=settings.shard,
        averages=int(settings.ema > 0),
        kind=settings.quantize,
        stream=settings.stream,
        checkpointing=settings.gradient_checkpointing,
        dtype=dtype,
        cuda=device.type == "cuda",
        held=2 * held_out.MOST,
        passes=settings.accumulate,
    ), small


def for_sampling(
    settings: Any, sizes: Sizes, method: Method, pictures: Iterable[data.Size], dtype: torch.dtype, device: torch.device
) -> tuple[Setting, data.Size]:
    """The Setting of sample.py's flags for the largest of these pictures, and the size of a tile with --tile 512."""
    picture = max(pictures, key=math.prod, default=(1, 1))
    side, (h, w) = tile_side(settings.tile, sizes.factor, method.resolution), positions(*picture, sizes.factor)
    size = min(side, w) * sizes.factor, min(side, h) * sizes.factor
    return Setting(
        size=size,
        reference=method.objective.sees_control,
        train=False,
        rank=0,  # of a LoRA nothing but its file is known, and that is small
        kind=settings.quantize,
        stream=settings.stream,
        dtype=dtype,
        cuda=device.type == "cuda",
        picture=picture,
        passes=flow.evaluations(method.steps, method.solver) * tiles(h, w, side, OVERLAP),
    ), (min(w * sizes.factor, 512), min(h * sizes.factor, 512))


def coded_here(asked: Setting, sizes: Sizes, device: torch.device) -> Setting:
    """The same with the tile of the autoencoder that this device has room for."""
    h, w = positions(*asked.picture, sizes.factor)
    side = room(sizes.autoencoder, device, sum(network(asked, sizes)[0].values())).side(h, w)
    return replace(asked, coded=(min(side, w) * sizes.factor, min(side, h) * sizes.factor))


def free_bytes(device: torch.device) -> float:
    """The free memory of a GPU, or of the host: of its container, if that has a limit. Infinite where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    if MEMINFO.exists():
        available = next(line for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line)
        free = 1024.0 * int(available.split()[1])
    # cgroup version 2, then 1. What is used includes file pages that the kernel drops when memory is needed.
    for limit, used, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (CGROUP / limit).read_text().strip(), int((CGROUP / used).read_text())
            stat = dict(line.split() for line in (CGROUP / limit).with_name("memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            free = min(free, max(int(most) - now + int(stat.get(dropped, 0)), 0))
    return free


# --------------------------------------------------------------------------------------------------- what is printed


def choices(asked: Setting, small: tuple[int, int]) -> dict[str, Setting]:
    """Settings by the flags that make them, from the fastest to the smallest, with no larger pictures than asked.

    Pictures are decoded in tiles of the network's size: what a run needs, and not what it would take if it were free.
    """
    plain = replace(asked, kind=None, stream=False, checkpointing="none", coded=None)
    found, flag = {"everything resident": plain}, ""
    if asked.train:
        found["--gradient-checkpointing half"] = replace(plain, checkpointing="half")
        flag, plain = " --gradient-checkpointing all", replace(plain, checkpointing="all")
        found[flag.strip()] = plain
    less = math.prod(small) < math.prod(asked.size)  # weights/tiny works on 128 x 128 by default
    if asked.full or asked.shard:  # the others do not go with it
        smaller = {"--gradient-checkpointing all --resolution 512": replace(plain, size=small)}
        return found | smaller if less else found
    for kind in ("int8", "nf4"):
        found[f"--quantize {kind}{flag}"] = replace(plain, kind=kind)
    smaller = f"{'--resolution' if asked.train else '--tile'} 512"
    for kind in ("int8", "nf4") if less else ():
        found[f"--quantize {kind}{flag} {smaller}"] = replace(plain, kind=kind, size=small)
    found["--stream"] = replace(plain, stream=True)
    if less:
        found[f"--stream {smaller}"] = replace(plain, stream=True, size=small)
    return found


def card(peak: float) -> str:
    """The smallest common GPU that holds so many bytes with a tenth to spare."""
    return next((f"{gb} GB" for gb in CARDS if peak <= FULL * gb * GB), f"more than {CARDS[-1]} GB")


def show(asked: Setting, sizes: Sizes, small: tuple[int, int], device: torch.device) -> str:
    """The plan as text: the run by part, by phase and in seconds, then peak and smallest card of other flags."""
    if asked.picture:
        asked = coded_here(asked, sizes, device)
    plan, where = measure(asked, sizes), "device" if asked.cuda else "memory"
    sides = tuple(math.isqrt(w * h) // (GRID * sizes.factor) for w, h in (asked.size, asked.coded or asked.size))
    network, coder = speed.measure(
        sizes.flux, sizes.autoencoder, asked.dtype, device, sides, min(asked.batch, 8), sizes.text_tokens
    )
    total, what = asked.passes * plan.flops, "optimizer step" if asked.train else "picture"
    seconds = total / network + plan.coding / coder
    lines = [f"{asked.size[0]}x{asked.size[1]} pixels, batch {asked.batch}, in GB:"]
    if asked.picture:
        whole, tile, coded = ("{}x{}".format(*size) for size in (asked.picture, asked.size, asked.coded))
        lines = [
            f"{whole} pixels in {asked.passes} passes of {tile} pixels, encoded and decoded {coded} at a time, in GB:"
        ]
    lines += ["  one process alone; with --shard each of N has about 1/N of all weights and averages"] * asked.shard
    lines += [f"  {name:24} {value / GB:8.2f}" for name, value in plan.parts.items()]
    lines += [f"  peak, {name:18} {value / GB:8.2f}" for name, value in plan.phases.items()]
    lines += [
        f"  {where + ', peak':24} {plan.device / GB:8.2f}  fits {card(plan.device)}",
        f"  {'host, besides the device':24} {plan.host / GB:8.2f}",
        f"  {total / 1e12:.2f} TFLOP of the network and {plan.coding / 1e12:.2f} of the autoencoder for one {what}: "
        f"about {seconds:.3g} s at {network / 1e12:.3g} and {coder / 1e12:.3g} TFLOP/s, measured here",
        "",
        f"{'the least with these flags':60} {'peak, GB':>10}  smallest card, a tenth to spare",
    ]
    free, fastest = free_bytes(device), None
    for flags, setting in choices(asked, small).items():
        peak = measure(setting, sizes).device
        lines.append(f"  {flags:60} {peak / GB:8.2f}  {card(peak)}")
        fastest = fastest or (flags if peak <= free else None)
    if math.isinf(free):
        return "\n".join([*lines, "which of them fits is not told: this system does not say how much memory is free"])
    return "\n".join(
        [*lines, f"the fastest of them that fits into the {free / GB:.1f} GB free here: {fastest or 'none'}"]
    )


def fit(setting: Setting, sizes: Sizes, device: torch.device) -> None:
    """Stop a run that is too large for the free memory, before anything is loaded.

    A model that is small beside the memory is not measured.

    Raises:
        ValueError: it does not fit; with what it needs, what is free, and what to do.
    """
    if setting.picture:
        free, pixels = free_bytes(torch.device("cpu")), math.prod(setting.picture)
        need = sum(of_picture(setting, sizes))
        if need > free:
            side = math.isqrt(int(pixels * free / need))
            raise ValueError(
                f"a picture of {pixels / 1e6:.0f} megapixels needs {need / GB:.1f} GB of memory besides the networks, "
                f"and {free / GB:.1f} GB are free; give --resolution {side // 100 * 100} or less."
            )
    free = free_bytes(device)
    if sizes.flux.hidden_size * max(setting.size) * max(setting.size) * setting.batch < SMALL * free:
        return
    need = measure(setting, sizes).device
    if need > free:
        raise ValueError(
            f"this run needs {need / GB:.1f} GB of memory at its peak and {free / GB:.1f} GB are free on {device}; "
            "--plan shows the flags that make it fit."
        )


def table() -> str:
    """Markdown for docs/memory.md: the full model in all 17 shapes, and what fits at 1024x1024."""
    sizes, c = Sizes(), {"checkpointing": "all"}
    lines = ["| setting, 1024x1024, batch 1, rank 16 | bridge, GB | with context, GB |", "|---|--:|--:|"]
    rows = {
        "bf16 resident": {},
        "bf16 resident, checkpointing half": {"checkpointing": "half"},
        "bf16 resident, checkpointing": c,
        "int8 resident, checkpointing half": {"checkpointing": "half", "kind": "int8"},
        "int8 resident, checkpointing": c | {"kind": "int8"},
        "fp8 resident, checkpointing": c | {"kind": "fp8"},
        "nf4 resident, checkpointing": c | {"kind": "nf4"},
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
