"""Fine-tune FLUX.1-Kontext to restore photographs: clean photos in, a LoRA out.

    python train.py --hr-root DIR

Every step: take clean pictures of one bucket, degrade them, encode both with the Flux autoencoder, stand somewhere on
the line from the degraded to the clean latent, and learn the velocity that leads along it (kontext_min/flow.py). Only
the LoRA trains. Without --weights the small embedded model is trained, so that this runs anywhere.

Many GPUs: torchrun --nproc-per-node N train.py ...     (add --shard if the model does not fit one card)
Stop at any time; the same command with the same --output-dir goes on, bit for bit as if nothing had happened.
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from kontext_min import __version__, data, degrade, flow, parallel, plan, prompts, runs
from kontext_min.checkpoints import Weights, fingerprint, load_autoencoder, load_flux, save_flux
from kontext_min.data import Picture
from kontext_min.flags import flag, parse, to_json
from kontext_min.flow import Objective
from kontext_min.latents import CachedPairs, LatentCache, fill
from kontext_min.lora import add_lora
from kontext_min.lora_files import FORMATS, init_lora, outside_of_blocks, save_lora
from kontext_min.quantize import DTYPES, QUANTIZED, compute_dtype
from kontext_min.report import write_report
from kontext_min.stream import load_streamed
from kontext_min.validation import validate

INTERVALS = 5  # of sigma, for which losses are logged apart
ADVICE = "Lower --lr, raise --warmup, or look for a broken picture."


@dataclass(frozen=True)
class Settings:
    """Every flag of train.py, once: name, type, default, help."""

    hr_root: Path = flag(..., "folder of clean photographs, read recursively", "pictures")
    lr_root: Path | None = flag(None, "degraded partners under the same names, instead of --degrade", "pictures")
    degrade: str = flag("guide", "preset or operators, e.g. blur=0.5:2,noise=0.02,jpeg=40:95", "pictures")
    resolution: int = flag(1024, "side of the square bucket in pixels; the 17 shapes keep this area", "pictures")
    upscale: bool = flag(False, "use pictures smaller than their bucket too, blown up", "pictures")
    flip: bool = flag(False, "mirror half of the pictures", "pictures")
    prompt: str | None = flag(None, "for pictures without a .txt beside them; else the preset's own", "pictures")
    workers: int = flag(2, "processes that load and degrade pictures", "pictures")
    cache_latents: int = flag(0, "keep K degraded variants of every picture encoded on disk; 0 = off", "pictures")
    drop_last: bool = flag(False, "leave out the incomplete last batch of a bucket", "pictures")
    cache_dir: Path = flag(Path("runs/cache"), "where prompts, latents and picture headers are kept", "pictures")

    weights: Path = flag(Path("weights/tiny"), "folder of the base model", "model")
    transformer: Path | None = flag(None, "file of the transformer, instead of the one in --weights", "model")
    vae: Path | None = flag(None, "file of the autoencoder, likewise", "model")
    clip: Path | None = flag(None, "file of the CLIP text encoder, likewise", "model")
    t5: Path | None = flag(None, "file of the T5 encoder, likewise", "model")
    rank: int = flag(16, "rank of the LoRA", "model")
    alpha: float | None = flag(None, "the correction counts alpha / rank; else alpha = rank", "model")
    lora_targets: str = flag("attention-mlp", "attention, attention-mlp, all, or a pattern of module names", "model")
    lora_format: str = flag("kohya", "names in the LoRA file: see kontext_min/lora_files.py", "model", FORMATS)
    init_lora: Path | None = flag(None, "start from this LoRA; its rank may be lower than --rank", "model")
    full: bool = flag(False, "train all weights of the transformer instead of a LoRA", "model")
    quantize: str | None = flag(None, "keep the frozen weights in 8 or 4 bits", "model", QUANTIZED)

    objective: str = flag("bridge", "what the velocity leads from", "method", ("bridge", "kontext"))
    context: bool = flag(False, "bridge: show the degraded picture as reference tokens too", "method")
    source_noise: float = flag(0.0, "bridge: deviation of the noise that is part of the source", "method")
    start_time: str = flag("1", "bridge: Flux's time at the source, 0 to 1, or auto", "method")
    sigma: str = flag("uniform", "density of the place on the path", "method", flow.SIGMA_DENSITIES)
    stratified: bool = flag(False, "spread the places of a step evenly", "method")
    weighting: str = flag("uniform", "weight of the error along the path", "method", flow.WEIGHTINGS)
    guidance: float = flag(1.5, "distilled guidance that the network is told", "method")

    steps: int = flag(3000, "optimizer steps", "optimization")
    batch_size: int = flag(1, "pictures at a time, in each process", "optimization")
    accumulate: int = flag(4, "batches that make one step", "optimization")
    lr: float = flag(1e-4, "learning rate at its peak", "optimization")
    lr_schedule: str = flag("cosine", "shape after the warm-up", "optimization", ("cosine", "linear", "constant"))
    warmup: int = flag(100, "steps over which the learning rate rises", "optimization")
    weight_decay: float = flag(1e-4, "of AdamW", "optimization")
    clip_norm: float = flag(1.0, "gradients are scaled down to this norm; 0 = off", "optimization")
    ema: float = flag(0.0, "decay of an average of the weights, e.g. 0.999; 0 = off", "optimization")
    max_skips: int = flag(10, "stop after so many steps in a row whose loss is not finite", "optimization")
    seed: int = flag(42, "of everything that is random", "optimization")

    val_root: Path | None = flag(None, "pictures to validate on; else some are held out of --hr-root", "validation")
    val_lr_root: Path | None = flag(None, "degraded partners of --val-root, as --lr-root", "validation")
    val_count: int = flag(8, "at most so many (and of --hr-root at most one in eight); 0 = none", "validation")
    validate_every_epochs: int = flag(5, "epochs between validations; 0 = off", "validation")
    validate_every_steps: int = flag(0, "steps between validations, instead of epochs; 0 = off", "validation")
    validation_prompt: str | None = flag(None, "else the training prompt", "validation")
    validation_steps: int = flag(4, "solver steps of the validation pictures", "validation")

    output_dir: Path | None = flag(None, "the run folder; else runs/ and the date", "run")
    resume: bool = flag(True, "go on from the last checkpoint of --output-dir, if it has one", "run")
    accept_changes: bool = flag(False, "resume although settings changed", "run")
    overwrite: bool = flag(False, "delete a run that --output-dir holds already", "run")
    checkpoint_every: int = flag(500, "steps between checkpoints", "run")
    keep: int = flag(3, "checkpoints to keep besides the best; 0 = all", "run")
    tensorboard: bool = flag(False, "write tensorboard files too, if it is installed", "run")

    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes cuda if there is one", "machine")
    shard: bool = flag(False, "spread the weights over the processes (FSDP2)", "machine")
    dtype: str = flag("auto", "of the computation; auto: bfloat16 where the hardware multiplies it", "machine", DTYPES)
    stream: bool = flag(False, "leave the weights in their files, two blocks at a time in memory", "machine")
    gradient_checkpointing: bool = flag(False, "recompute each block in the backward pass: less memory", "machine")
    offload_activations: bool = flag(False, "with it or --stream: block inputs wait in the host's memory", "machine")
    compile: bool = flag(False, "torch.compile, block by block", "machine")
    plan: bool = flag(False, "print how much memory the run will take, and stop", "machine")
    budget: str = flag("16G", "memory of the device that --plan looks for flags for", "machine")


# --------------------------------------------------------------------------------------------------- small ingredients


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then cosine, a line to 0, or constant."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.lr * shapes[settings.lr_schedule]


def checkpoint_blocks(flux: nn.Module, offload: bool = False) -> None:
    """Keep only each block's input, with `offload` in the host's memory; its inside is computed again in the backward
    pass (Chen et al. 2016).
    """

    def run(*args: Tensor, forward: Callable[..., Any]) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(forward, *args, use_reentrant=False)

    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = partial(run, forward=block.forward)


def compile_blocks(flux: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Each kind of block becomes one graph for any number of tokens; all blocks of the kind share it."""
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)


@contextmanager
def averaged(params: Sequence[Tensor], ema: Sequence[Tensor]) -> Iterator[None]:
    """The EMA in place of the weights, for validation and saving; nothing happens without one."""
    if not ema:
        yield
        return
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, average in zip(params, ema, strict=True):
            p.copy_(average)
        yield
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)


def split_validation(
    settings: Settings, pictures: list[Picture], buckets: list[data.Size]
) -> tuple[list[Picture], list[Picture]]:
    """Training and validation pictures: those of --val-root, or a few of --hr-root chosen by a hash of their names."""
    if settings.val_root:
        found, rejected = data.scan(settings.val_root, settings.cache_dir / "index.json")
        found, small = data.usable(found, buckets, settings.upscale)
        if not found:
            name, reason = (rejected + small or [("nothing", "no pictures")])[0]
            raise ValueError(f"--val-root {settings.val_root}: no usable picture, e.g. {name}: {reason}.")
        return pictures, sorted(found, key=data.name_hash)[: settings.val_count]
    count = min(settings.val_count, len(pictures) // 8)
    held = {p.name for p in sorted(pictures, key=data.name_hash)[:count]}
    return [p for p in pictures if p.name not in held], [p for p in pictures if p.name in held]


def validation_due(settings: Settings, batches_per_epoch: int, done: int) -> bool:
    """Whether to validate after `done` steps: by steps, else whenever some epochs more are full; and at the end."""
    if settings.validate_every_steps:
        return done % settings.validate_every_steps == 0 or done == settings.steps
    if not settings.validate_every_epochs:
        return False
    batches = batches_per_epoch * settings.validate_every_epochs
    filled, before = (n * settings.accumulate // batches for n in (done, done - 1))
    return filled > before or done == settings.steps


def check(settings: Settings) -> None:
    """Refuse numbers that make no sense, before anything is loaded."""
    least = dict.fromkeys(("steps", "batch_size", "accumulate", "checkpoint_every", "max_skips", "validation_steps"), 1)
    least |= dict.fromkeys(("workers", "cache_latents", "warmup", "keep", "clip_norm", "lr", "weight_decay", "seed"), 0)
    least |= dict.fromkeys(("val_count", "validate_every_epochs", "validate_every_steps"), 0)
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected a finite number.")
    for name, minimum in least.items():
        if not getattr(settings, name) >= minimum:
            flag_name = "--" + name.replace("_", "-")
            raise ValueError(f"{flag_name}: got {getattr(settings, name)}, expected at least {minimum}.")
    if not 0 <= settings.ema < 1:
        raise ValueError(f"--ema: got {settings.ema}, expected a decay from 0 to below 1, e.g. 0.999.")
    try:
        start_time = 0.5 if settings.start_time == "auto" else float(settings.start_time)
    except ValueError:
        raise ValueError(f"--start-time: got {settings.start_time!r}, expected auto or a number up to 1.") from None
    Objective(settings.objective, settings.context, settings.source_noise, start_time)
    for whole in ("full", "shard"):  # these need the weights themselves, in memory
        for part in ("quantize", "stream"):
            if getattr(settings, whole) and getattr(settings, part):
                raise ValueError(f"--{part} can't be used with --{whole}; leave one of them out.")
    if settings.offload_activations and not (settings.gradient_checkpointing or settings.stream):
        raise ValueError("--offload-activations: add --gradient-checkpointing, whose block inputs it moves.")
    if settings.tensorboard and not find_spec("tensorboard"):
        raise ValueError("--tensorboard: the package is not installed; pip install tensorboard, or leave it out.")
    if settings.val_root and settings.lr_root and not settings.val_lr_root:
        raise ValueError("--val-root: with --lr-root it needs --val-lr-root, the degraded partners of its pictures.")
    if settings.val_lr_root and not settings.val_root:
        raise ValueError("--val-lr-root: its partners are the pictures of --val-root; add that.")
    folder = settings.output_dir or Path("runs")
    if settings.hr_root.exists() and folder.resolve().is_relative_to(settings.hr_root.resolve()):
        raise ValueError(f"--output-dir {folder}: lies in --hr-root, so its pictures would be trained on; move it.")
    if settings.full and settings.dtype not in ("auto", "float32"):
        raise ValueError(f"--dtype {settings.dtype}: with --full all weights train, in float32; leave --dtype out.")
    if settings.full and settings.init_lora:
        merging = "merge it into the base first: python -m kontext_min.lora_files merge"
        raise ValueError(f"--init-lora {settings.init_lora}: with --full no LoRA trains; {merging}.")


# ------------------------------------------------------------------------------------------------------------- the run


def train(settings: Settings) -> int:
    """The whole run, from the folder of pictures to the LoRA file, top to bottom. Returns the exit code."""
    check(settings)
    me = parallel.start(settings.device)
    first = me.rank == 0  # the one that writes and speaks
    say = partial(print, flush=True) if first else lambda *_: None
    # Steps of 1e-4 of a weight vanish in bfloat16's 8 bits: weights that train are float32, LoRA or all.
    dtype = torch.float32 if settings.full else compute_dtype(settings.dtype, me.device)
    weights = Weights(settings.weights, settings.transformer, settings.vae, settings.clip, settings.t5)
    sizes = plan.Sizes.of(weights)
    asked, small = plan.for_training(settings, sizes, dtype, me.device)
    if settings.plan:
        say(plan.show(asked, sizes, plan.budget_bytes(settings.budget), small))
        return 0
    if not settings.shard:
        plan.refuse(asked, sizes, me.device)
    prompt = settings.prompt or degrade.PROMPTS.get(settings.degrade, degrade.PROMPTS["guide"])
    validation_prompt = settings.validation_prompt or prompt
    degradation = degrade.parse(settings.degrade)

    # Pictures: only their headers are read here. What can't be used is said once, by name.
    autoencoder = load_autoencoder(weights.path("vae"), dtype=torch.float32, device=me.device)
    buckets = data.buckets(settings.resolution, multiple=2 * autoencoder.factor)
    index = settings.cache_dir / "index.json"  # of headers, those of all roots
    with parallel.first_goes_ahead(me):
        pictures, rejected = data.scan(settings.hr_root, index)
    pictures, small = data.usable(pictures, buckets, settings.upscale)
    say(data.describe(pictures, rejected + small, buckets))
    pictures, held_out = split_validation(settings, pictures, buckets)
    pairs = data.Pairs(
        pictures, buckets, degradation, settings.seed, prompt, settings.lr_root, settings.flip, settings.cache_latents,
        lr_index=index,
    )  # fmt: skip
    bucket_of = pairs.bucket_of
    validation_pairs = []  # few, kept in memory
    if held_out:
        partners = settings.val_lr_root if settings.val_root else settings.lr_root
        held = data.Pairs(
            held_out, buckets, degradation, settings.seed, validation_prompt, partners, train=False, lr_index=index
        )
        for i, bucket in enumerate(held.bucket_of):
            try:
                pair = held.read(0, i, buckets[bucket])
                validation_pairs.append([data.to_float(x.to(me.device))[None] for x in pair])
            except data.UnreadableError as error:
                say(f"left out of validation: {error}")

    # The run folder, and the checkpoint in it to go on from.
    folder = settings.output_dir or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    written = to_json(settings) | {
        "versions": {"kontext_min": __version__, "torch": torch.__version__},
        "fingerprint": fingerprints(weights),
        "pictures": data.list_hash(pictures),
        "pictures_a_batch": settings.batch_size * me.world,
    }
    with parallel.first_goes_ahead(me):
        checkpoint_path = runs.open_run(
            folder, written, settings.resume, settings.accept_changes, first, settings.overwrite
        )

    # Prompts, then the text encoders are gone; then the transformer, frozen but for its LoRA.
    with parallel.first_goes_ahead(me):
        texts = {*pairs.prompts, validation_prompt}
        encoded = prompts.encode(texts, weights, settings.cache_dir / "prompts", dtype, me.device, settings.stream)
    base, stream = weights.path("transformer"), None
    if settings.stream:
        with parallel.first_goes_ahead(me):
            made = settings.cache_dir / "quantized"
            flux, stream = load_streamed("transformer", base, dtype, me.device, settings.quantize, made)
    elif settings.full or settings.shard:
        flux = load_flux(base, dtype=dtype, device=me.device)
    else:
        flux = load_flux(base, dtype=dtype, device=me.device, kind=settings.quantize or "stored")
    if settings.full:
        flux.requires_grad_(True)
    else:
        add_lora(flux, settings.rank, settings.alpha, settings.lora_targets, seed=settings.seed)
        if settings.init_lora and not checkpoint_path:
            init_lora(flux, settings.init_lora)
        if settings.lora_format == "kohya" and (outside := outside_of_blocks(flux)):
            say(f"note: diffusers drops {', '.join(outside)} from kohya files; --lora-format peft keeps them")
    if settings.compile:
        compile_blocks(flux)
    if stream:
        stream.wrap()
    if settings.gradient_checkpointing or stream:
        checkpoint_blocks(flux, settings.offload_activations)
    model = parallel.spread(flux, me, settings.shard)
    trained = {name: p for name, p in flux.named_parameters() if p.requires_grad}
    params = list(trained.values())
    ema = [p.detach().clone() for p in params] if settings.ema else []
    optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=settings.weight_decay)
    say(f"{sum(p.numel() for p in params):,} parameters train")

    state: dict[str, Any] = {"step": 0, "best_psnr": None, "best_step": None}
    state |= {"skipped": 0, "skipped_in_a_row": 0, "unreadable": []}
    if checkpoint_path:
        files, kept = runs.load_checkpoint(checkpoint_path)
        state |= kept
        runs.put_back(trained, files["trained"])
        if ema:
            runs.put_back(dict(zip(trained, ema, strict=True)), files.get("ema", files["trained"]))
        runs.load_optimizer(optimizer, files["optimizer"])
        say(f"going on from {checkpoint_path}")

    # Batches of one shape, endless; a resumed run enters the stream where it was left.
    def encode(pictures: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) to latents (B, C, h, w); latents from the cache pass through."""
        with torch.no_grad():
            x = pictures.to(me.device)
            if x.is_floating_point():
                return x
            return torch.cat([autoencoder.encode(data.to_float(picture)) for picture in x.split(1)])  # memory of one

    if settings.cache_latents:
        latents = LatentCache(settings.cache_dir / "latents", f"{settings.degrade} {written['fingerprint']['vae']}")
        report = partial(runs.Progress().show, text="latents") if first else lambda *_: None
        for line in fill(pairs, latents, encode, 1, settings.workers, me.rank, me.world, report):
            print(f"left out: {line}")
        parallel.wait()
        pairs = CachedPairs(pairs, latents)
    sampler = data.BucketSampler(
        bucket_of, settings.batch_size, settings.seed, me.rank, me.world, settings.drop_last,
        start=state["step"] * settings.accumulate,
    )  # fmt: skip
    batches = iter(
        torch.utils.data.DataLoader(
            pairs,
            batch_sampler=sampler,
            num_workers=settings.workers,
            collate_fn=data.collate,
            pin_memory=me.device.type == "cuda",
            multiprocessing_context=data.worker_context(settings.workers),
            worker_init_fn=runs.outlive_signals,
        )
    )

    start_time = settings.start_time
    if start_time == "auto":  # from a few pictures, the same ones after a resume
        few = [data.collate([pairs[0, i]]) for i in range(min(8, len(pairs)))]
        times = [flow.start_time(encode(x["control"]), encode(x["target"]), settings.source_noise) for x in few]
        start_time = sum(times) / len(times)
        say(f"start time {start_time:.3f}")
    objective = Objective(settings.objective, settings.context, settings.source_noise, float(start_time))

    base = written["fingerprint"]["transformer"]
    about = trained_for(settings, objective, prompt, base) | {"pictures_a_batch": written["pictures_a_batch"]}
    header = {"kontext_min": json.dumps(about)}

    def gather(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Weights or averages by name; whole, so if they are sharded every process must ask."""
        return {name: runs.whole(x.detach()) for name, x in zip(trained, tensors, strict=True)}

    def save_result(where: Path, values: dict[str, Tensor]) -> None:
        """lora.safetensors, or with --full a transformer/ folder."""
        if settings.full:
            save_flux(flux, where / "transformer", header, values)
        else:
            save_lora(flux, where / "lora.safetensors", settings.lora_format, header, values)

    if parallel.any_of(parallel.from_first(state["step"]) != state["step"]):
        raise ValueError(f"{folder}: not all processes see the same checkpoint; it must be on a disk that they share.")
    if first:
        if settings.overwrite:
            runs.delete_run(folder)
        runs.write_json(folder / "settings.json", written)
        runs.write_text(folder / "left-out.txt", "".join(f"{name}: {reason}\n" for name, reason in rejected + small))
        runs.rewind_metrics(folder, state["step"])
    board = runs.open_tensorboard(folder, state["step"]) if first and settings.tensorboard else None
    counts = f"{len(pairs)} pictures, {sampler.batches_per_epoch} batches an epoch"
    say(f"{folder}: {counts}, {len(validation_pairs)} to validate on")
    progress, stop, stopping = runs.Progress(state["step"]), runs.StopSignal(), False

    with runs.under_way(folder):
        while state["step"] < settings.steps and not stopping:
            step, began = state["step"], time.monotonic()
            micro = [next(batches) for _ in range(settings.accumulate)]
            count = sum(batch["total"] for batch in micro)  # pictures of this step, in all processes
            tally = torch.zeros(2, INTERVALS)  # sum of the losses, and number of pictures, by interval of sigma

            for i, batch in enumerate(micro):
                for line in batch["unreadable"]:
                    if line not in state["unreadable"]:  # once, not every epoch
                        state["unreadable"].append(line)
                        print(f"\nleft out: {line}", flush=True)
                control, target = encode(torch.cat([batch["control"], batch["target"]])).chunk(2)
                whole_batch = settings.batch_size * me.world
                positions = [i * whole_batch + p for p in batch["position"].tolist()]
                strata = settings.accumulate * whole_batch if settings.stratified else 0
                eps, u = flow.draw(settings.seed, step, positions, target.shape[1:], strata)
                sigma = flow.density(u, settings.sigma, image_tokens=target.shape[-2] * target.shape[-1] // 4)
                text = prompts.batch(encoded, batch["prompt"], settings.guidance, dtype, me.device)
                with parallel.sync_gradients(model, now=i == settings.accumulate - 1):
                    loss = flow.losses(model, control, target, eps.to(target), sigma.to(target), text, objective)
                    weight = flow.weight(sigma, settings.weighting) * batch["weight"]  # 0 for what only fills up
                    # Gradients are averaged over the processes: our sum, times their number, by the pictures of all.
                    ((weight.to(loss) * loss).sum() * me.world / count).backward()
                interval = (sigma * INTERVALS).long().clamp(0, INTERVALS - 1)
                tally[0].index_add_(0, interval, loss.detach().cpu() * batch["weight"])
                tally[1].index_add_(0, interval, batch["weight"])

            norm = runs.whole(nn.utils.clip_grad_norm_(params, settings.clip_norm or math.inf)).item()
            losses, pictures_there = parallel.add_up(tally).tolist()
            loss_mean, lr = sum(losses) / count, learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if math.isfinite(loss_mean) and math.isfinite(norm):
                optimizer.step()
                if ema:
                    torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - settings.ema)
                state["skipped_in_a_row"] = 0
            else:  # one bad picture must not spoil the weights
                state["skipped"] += 1
                state["skipped_in_a_row"] += 1
            optimizer.zero_grad(set_to_none=True)
            state["step"] = done = step + 1

            seconds = time.monotonic() - began
            speed = count / seconds
            row = {
                "step": done,
                "epoch": step * settings.accumulate // sampler.batches_per_epoch,
                "loss": loss_mean,
                "sigma_loss": [s / n if n else None for s, n in zip(losses, pictures_there, strict=True)],
                "lr": lr,
                "grad_norm": norm,
                "images_per_second": speed,
                "seconds": seconds,
                "skipped": state["skipped"],
                "unreadable": len(state["unreadable"]),
            }
            if first:
                runs.append_metrics(folder, row, board)
                progress.show(done, settings.steps, f"loss {loss_mean:.4f}  lr {lr:.1e}  {speed:.2f} images/s")
            if state["skipped_in_a_row"] >= settings.max_skips:
                raise runs.Stopped(
                    f"{folder}: no finite loss for {settings.max_skips} steps in a row; the last checkpoint is "
                    f"{runs.latest_checkpoint(folder)}. {ADVICE}"
                )

            if validation_pairs and validation_due(settings, sampler.batches_per_epoch, done):
                began = time.monotonic()
                text = prompts.batch(encoded, [validation_prompt], settings.guidance, dtype, me.device)
                with averaged(params, ema):
                    row, sheet = validate(
                        flux, autoencoder, validation_pairs, text, objective, settings.validation_steps, settings.seed
                    )
                score = parallel.from_first(row["psnr"])
                if state["best_psnr"] is None or score > state["best_psnr"]:
                    state |= {"best_psnr": score, "best_step": done}
                if first:
                    row |= {"step": done, "validation": True, "seconds": time.monotonic() - began}
                    runs.append_metrics(folder, row, board)
                    runs.save_picture(folder, done, sheet, board)
                    write_report(folder)
                say(f"step {done}: PSNR {row['psnr_degraded']:.2f} -> {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}")

            stopping = parallel.any_of(stop.received)
            due = done % settings.checkpoint_every == 0 and not state["skipped_in_a_row"]  # else it may be a broken one
            if due or stopping or done in (settings.steps, state["best_step"]):
                files = {"trained": gather(params), "optimizer": runs.optimizer_tensors(optimizer)}
                if ema:
                    files["ema"] = gather(ema)
                if first:
                    save = partial(save_result, values=files.get("ema", files["trained"]))
                    runs.save_checkpoint(folder, done, files, state, save)
                    runs.prune_checkpoints(folder, settings.keep, state["best_step"])

        if state["step"] < settings.steps:
            say(f"stopped after step {state['step']}; the same command with --output-dir {folder} goes on from there")
            return 0
        if state["skipped"] == settings.steps:
            raise runs.Stopped(f"{folder}: no step had a finite loss, so nothing was learnt. {ADVICE}")
        result = gather(ema or params)
        if first:
            save_result(folder, result)
            write_report(folder)
        if stream:
            say(stream.report())
        say(f"done: {folder / ('transformer' if settings.full else 'lora.safetensors')}")
        return 0


def trained_for(settings: Settings, objective: Objective, prompt: str, base: str) -> dict[str, Any]:
    """What a LoRA was trained for, kept in its header; sample.py takes its defaults from here."""
    names = ["degrade", "resolution", "guidance", "rank", "alpha", "lora_targets"]
    names += ["steps", "lr", "lr_schedule", "warmup", "accumulate", "ema", "seed", "sigma", "weighting"]
    about = {name: getattr(settings, name) for name in names}
    return (
        about
        | ({"degrade": "pairs"} if settings.lr_root else {})
        | {
            "objective": objective.name,
            "context": objective.context,
            "source_noise": objective.source_noise,
            "start_time": objective.start_time,
            "prompt": prompt,
            "base": base,
        }
    )


def fingerprints(weights: Weights) -> dict[str, str]:
    """Name of the base weights by their content."""
    return {part: fingerprint(weights.path(part), part) for part in ("transformer", "vae", "clip", "t5")}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done or stopped in order, 2 bad input, 1 anything else."""
    presets = "\n".join(f"  {name:17} {text}" for name, text in degrade.PRESETS.items())
    settings = parse(Settings, argv, __doc__, f"degradation presets:\n{presets}")
    try:
        return train(settings)
    except runs.Stopped as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # shown here and not by the interpreter, which would keep the loader's processes alive for it
        traceback.print_exc()
        return 1
    finally:
        parallel.finish()


if __name__ == "__main__":
    sys.exit(main())
