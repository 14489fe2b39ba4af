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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kontext_min import __version__, data, degrade, flow
from kontext_min.autoencoder import Autoencoder
from kontext_min.checkpoints import Weights, fingerprint, load_autoencoder, save_flux
from kontext_min.data import Picture
from kontext_min.extras import parallel, plan, prompts, runs
from kontext_min.extras.flags import check_numbers, flag, parse, to_json
from kontext_min.extras.latents import CachedPairs, LatentCache, fill
from kontext_min.extras.lora_files import FORMATS, init_lora, outside_of_blocks, save_lora
from kontext_min.extras.quantize import QUANTIZED
from kontext_min.extras.report import write_report
from kontext_min.extras.stream import Stream, checkpoint_blocks, load_network
from kontext_min.extras.validation import validate
from kontext_min.flow import Objective
from kontext_min.flux import Flux
from kontext_min.lora import TARGETS, add_lora
from kontext_min.utils import COMPUTE_DTYPES, Progress, compute_dtype

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
    workers: int = flag(2, "processes that load and degrade pictures", "pictures", least=0)
    cache_latents: int = flag(0, "degraded variants of each picture kept encoded on disk", "pictures", least=0)
    drop_last: bool = flag(False, "leave out the incomplete last batch of a bucket", "pictures")
    cache_dir: Path = flag(Path("runs/cache"), "where prompts, latents and picture headers are kept", "pictures")

    weights: Path = flag(Path("weights/tiny"), "folder of the base model", "model")
    transformer: Path | None = flag(None, "file of the transformer, instead of the one in --weights", "model")
    vae: Path | None = flag(None, "file of the autoencoder, likewise", "model")
    clip: Path | None = flag(None, "file of the CLIP text encoder, likewise", "model")
    t5: Path | None = flag(None, "file of the T5 encoder, likewise", "model")
    rank: int = flag(16, "rank of the LoRA", "model")
    alpha: float | None = flag(None, "the correction counts alpha / rank; else alpha = rank", "model")
    lora_targets: str = flag("attention-mlp", f"{', '.join(TARGETS)}, or a pattern of module names", "model")
    lora_format: str = flag("kohya", "names in the LoRA file: see kontext_min/extras/lora_formats.py", "model", FORMATS)
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
    penalty: str = flag("mse", "of a picture's error; psnr: its logarithm", "method", flow.PENALTIES)
    guidance: float = flag(1.5, "distilled guidance that the network is told", "method")

    steps: int = flag(3000, "optimizer steps", "optimization", least=1)
    batch_size: int = flag(1, "pictures at a time, in each process", "optimization", least=1)
    accumulate: int = flag(4, "batches that make one step", "optimization", least=1)
    lr: float = flag(1e-4, "learning rate at its peak", "optimization", least=0)
    lr_schedule: str = flag("cosine", "shape after the warm-up", "optimization", ("cosine", "linear", "constant"))
    warmup: int = flag(100, "steps over which the learning rate rises", "optimization", least=0)
    weight_decay: float = flag(1e-4, "of AdamW", "optimization", least=0)
    clip_norm: float = flag(1.0, "gradients are scaled down to this norm; 0 = off", "optimization", least=0)
    ema: float = flag(0.0, "decay of an average of the weights, e.g. 0.999; 0 = off", "optimization")
    max_skips: int = flag(10, "stop after so many steps in a row whose loss is not finite", "optimization", least=1)
    seed: int = flag(42, "of everything that is random", "optimization", least=0)

    val_root: Path | None = flag(None, "pictures to validate on; else some are held out of --hr-root", "validation")
    val_lr_root: Path | None = flag(None, "degraded partners of --val-root, as --lr-root", "validation")
    val_count: int = flag(8, "at most so many (and of --hr-root at most one in eight); 0 = none", "validation", least=0)
    validate_every_epochs: int = flag(5, "epochs between validations; 0 = off", "validation", least=0)
    validate_every_steps: int = flag(0, "steps between validations, instead of epochs; 0 = off", "validation", least=0)
    validation_prompt: str | None = flag(None, "else the training prompt", "validation")
    validation_steps: int = flag(4, "steps of the validation pictures, by Euler's rule", "validation", least=1)

    output_dir: Path | None = flag(None, "the run folder; else runs/ and the date", "run")
    resume: bool = flag(True, "go on from the last checkpoint of --output-dir, if it has one", "run")
    accept_changes: bool = flag(False, "resume although settings changed", "run")
    overwrite: bool = flag(False, "delete a run that --output-dir holds already", "run")
    checkpoint_every: int = flag(500, "steps between checkpoints", "run", least=1)
    keep: int = flag(3, "checkpoints to keep besides the best; 0 = all", "run", least=0)
    tensorboard: bool = flag(False, "write tensorboard files too, if it is installed", "run")

    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes cuda if there is one", "machine")
    shard: bool = flag(False, "spread the weights over the processes (FSDP2)", "machine")
    dtype: str = flag(
        "auto", "of the computation; auto: bfloat16 if the hardware multiplies it", "machine", COMPUTE_DTYPES
    )
    stream: bool = flag(False, "leave the weights in their files, two blocks at a time in memory", "machine")
    gradient_checkpointing: bool = flag(False, "recompute blocks in the backward pass; on if it must be", "machine")
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


def compile_blocks(flux: Flux, backend: str | Callable[..., Any] = "inductor") -> None:
    """Each kind of block becomes one graph for any number of tokens; all blocks of the kind share it."""
    for block in flux.blocks:
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
    check_numbers(settings)
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
        merging = "merge it into the base first: python -m kontext_min.extras.lora_files merge"
        raise ValueError(f"--init-lora {settings.init_lora}: with --full no LoRA trains; {merging}.")


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Run:
    """What is settled before the first step."""

    settings: Settings
    me: parallel.Processes
    dtype: torch.dtype  # of the computation
    folder: Path
    board: Any  # of tensorboard, or None
    autoencoder: Autoencoder
    encoded: prompts.Encoded  # every prompt of the run
    objective: Objective
    header: dict[str, str]  # of the result: what it was trained for
    batches_per_epoch: int
    validation_pairs: list[tuple[Tensor, Tensor]]  # (control, target), (1, 3, H, W) in [-1, 1] on the device


@dataclass(frozen=True)
class Learner:
    """What changes from step to step."""

    flux: Flux
    model: nn.Module  # flux as the loop calls it: itself, in DDP or sharded
    stream: Stream | None
    trained: dict[str, nn.Parameter]  # by name: A and B of the LoRA, or with --full all weights
    ema: list[Tensor]  # their averages, in the same order; empty without --ema
    optimizer: torch.optim.AdamW
    state: dict[str, Any]  # counts that checkpoints keep


def train(settings: Settings) -> int:
    """The whole run, from the folder of pictures to the LoRA file: `prepare`, `learn`, save. Returns the exit code."""
    check(settings)
    me = parallel.start(settings.device)
    # Steps of 1e-4 of a weight vanish in bfloat16's 8 bits: weights that train are float32, LoRA or all.
    dtype = torch.float32 if settings.full else compute_dtype(settings.dtype, me.device)
    weights = Weights(settings.weights, settings.transformer, settings.vae, settings.clip, settings.t5)
    sizes = plan.Sizes.of(weights)
    asked, at_512 = plan.for_training(settings, sizes, dtype, me.device)
    if settings.plan:
        me.say(plan.show(asked, sizes, plan.budget_bytes(settings.budget), at_512))
        return 0
    if not settings.shard and plan.fit(asked, sizes, me.device).checkpointing and not asked.checkpointing:
        me.say("--gradient-checkpointing is on: without it this run takes more memory than is free")
        settings = replace(settings, gradient_checkpointing=True)
    run, learner, batches = prepare(settings, me, weights, dtype)
    state = learner.state
    with runs.under_way(run.folder):
        learn(run, learner, batches)
        if state["step"] < settings.steps:
            again = f"the same command with --output-dir {run.folder} goes on from there"
            me.say(f"stopped after step {state['step']}; {again}")
            return 0
        if state["skipped"] == settings.steps:
            raise runs.Stopped(f"{run.folder}: no step had a finite loss, so nothing was learnt. {ADVICE}")
        result = gather(learner, learner.ema or learner.trained.values())
        if me.first:
            save_result(run, learner, result, run.folder)
            write_report(run.folder)
    if learner.stream:
        me.say(learner.stream.report())
    me.say(f"done: {run.folder / ('transformer' if settings.full else 'lora.safetensors')}")
    return 0


def learn(run: Run, learner: Learner, batches: Iterator[dict[str, Any]]) -> None:
    """THE LOOP: step after step, until all are taken or a signal asks to stop."""
    settings, me, state, optimizer = run.settings, run.me, learner.state, learner.optimizer
    params = list(learner.trained.values())
    progress, stop, stopping = Progress(state["step"]), runs.StopSignal(), False
    while state["step"] < settings.steps and not stopping:
        step, began = state["step"], time.monotonic()
        micro = [next(batches) for _ in range(settings.accumulate)]  # their gradients add up to one step
        for line in (line for batch in micro for line in batch["unreadable"]):
            if line not in state["unreadable"]:  # once, not every epoch
                state["unreadable"].append(line)
                print(f"\nleft out: {line}", flush=True)
        count = sum(batch["total"] for batch in micro)  # pictures of this step, in all processes
        tally = add_gradients(run, learner, micro, count)
        norm = runs.whole(nn.utils.clip_grad_norm_(params, settings.clip_norm or math.inf)).item()
        losses, pictures_there = parallel.add_up(tally).tolist()
        loss, lr = sum(losses) / count, learning_rate(settings, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            if learner.ema:
                torch._foreach_lerp_(learner.ema, [p.detach() for p in params], 1 - settings.ema)
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
            "epoch": step * settings.accumulate // run.batches_per_epoch,
            "loss": loss,
            "sigma_loss": [s / n if n else None for s, n in zip(losses, pictures_there, strict=True)],
            "lr": lr,
            "grad_norm": norm,
            "images_per_second": speed,
            "seconds": seconds,
            "skipped": state["skipped"],
            "unreadable": len(state["unreadable"]),
        }
        if me.first:
            runs.append_metrics(run.folder, row, run.board)
            progress.show(done, settings.steps, f"loss {loss:.4f}  lr {lr:.1e}  {speed:.2f} images/s")
        if state["skipped_in_a_row"] >= settings.max_skips:
            raise runs.Stopped(
                f"{run.folder}: no finite loss for {settings.max_skips} steps in a row; the last checkpoint is "
                f"{runs.latest_checkpoint(run.folder)}. {ADVICE}"
            )
        if run.validation_pairs and validation_due(settings, run.batches_per_epoch, done):
            measure(run, learner)
        stopping = parallel.any_of(stop.received)
        due = done % settings.checkpoint_every == 0 and not state["skipped_in_a_row"]  # else it may be a broken one
        if due or stopping or done in (settings.steps, state["best_step"]):
            save_checkpoint(run, learner)


def add_gradients(run: Run, learner: Learner, micro: Sequence[dict[str, Any]], count: int) -> Tensor:
    """The gradient of a step: of the mean loss over its `count` pictures in the batches of all processes.

    Returns (2, INTERVALS): sum of the losses, and number of pictures, of this process by interval of sigma.
    """
    settings, world = run.settings, run.me.world
    tally = torch.zeros(2, INTERVALS)
    whole_batch = settings.batch_size * world
    strata = settings.accumulate * whole_batch if settings.stratified else 0
    for i, batch in enumerate(micro):
        control, target = to_latents(
            run.autoencoder, run.me.device, torch.cat([batch["control"], batch["target"]])
        ).chunk(2)
        positions = [i * whole_batch + p for p in batch["position"].tolist()]
        eps, u = flow.draw(settings.seed, learner.state["step"], positions, target.shape[1:], strata)
        sigma = flow.density(u, settings.sigma, image_tokens=target.shape[-2] * target.shape[-1] // 4)
        text = prompts.batch(run.encoded, batch["prompt"], settings.guidance, run.dtype, run.me.device)
        with parallel.sync_gradients(learner.model, now=i == settings.accumulate - 1):
            loss = flow.losses(learner.model, control, target, eps.to(target), sigma.to(target), text, run.objective)
            weight = flow.weight(sigma, settings.weighting) * batch["weight"]  # 0 for what only fills up
            # Gradients are averaged over the processes: our sum, times their number, by the pictures of all.
            ((weight.to(loss) * flow.penalty(loss, settings.penalty)).sum() * world / count).backward()
        interval = (sigma * INTERVALS).long().clamp(0, INTERVALS - 1)
        tally[0].index_add_(0, interval, loss.detach().cpu() * batch["weight"])
        tally[1].index_add_(0, interval, batch["weight"])
    return tally


def measure(run: Run, learner: Learner) -> None:
    """Validate, note whether it is the best so far, and write row, pictures and report."""
    settings, state, began = run.settings, learner.state, time.monotonic()
    text = prompts.batch(run.encoded, [prompts_of(settings)[1]], settings.guidance, run.dtype, run.me.device)
    with averaged(list(learner.trained.values()), learner.ema):
        row, sheet = validate(
            learner.flux, run.autoencoder, run.validation_pairs, text, run.objective, settings.validation_steps,
            settings.seed,
        )  # fmt: skip
    step, score = state["step"], parallel.from_first(row["psnr"])
    if state["best_psnr"] is None or score > state["best_psnr"]:
        state |= {"best_psnr": score, "best_step": step}
    if run.me.first:
        row |= {"step": step, "validation": True, "seconds": time.monotonic() - began}
        runs.append_metrics(run.folder, row, run.board)
        runs.save_picture(run.folder, step, sheet, run.board)
        write_report(run.folder)
    run.me.say(f"step {step}: PSNR {row['psnr_degraded']:.2f} -> {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}")


def gather(learner: Learner, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Weights or averages by name; whole, so if they are sharded every process must ask."""
    return {name: runs.whole(x.detach()) for name, x in zip(learner.trained, tensors, strict=True)}


def save_checkpoint(run: Run, learner: Learner) -> None:
    """Keep this step; older checkpoints go. The first process writes, but all must call."""
    files = {
        "trained": gather(learner, learner.trained.values()),
        "optimizer": runs.optimizer_tensors(learner.optimizer),
    }
    if learner.ema:
        files["ema"] = gather(learner, learner.ema)
    if run.me.first:
        save = partial(save_result, run, learner, files.get("ema", files["trained"]))
        runs.save_checkpoint(run.folder, learner.state["step"], files, learner.state, save)
        runs.prune_checkpoints(run.folder, run.settings.keep, learner.state["best_step"])


def save_result(run: Run, learner: Learner, values: dict[str, Tensor], where: Path) -> None:
    """lora.safetensors, or with --full a transformer/ folder."""
    if run.settings.full:
        save_flux(learner.flux, where / "transformer", run.header, values)
    else:
        save_lora(learner.flux, where / "lora.safetensors", run.settings.lora_format, run.header, values)


# ----------------------------------------------------------------------------------------------------- before the loop


def prepare(
    settings: Settings, me: parallel.Processes, weights: Weights, dtype: torch.dtype
) -> tuple[Run, Learner, Iterator[dict[str, Any]]]:
    """Pictures, run folder, prompts, network and endless batches (data.collate), in this order.

    A resumed run enters the stream of batches where it was left.
    """
    autoencoder = load_autoencoder(weights.path("vae"), dtype=torch.float32, device=me.device)
    pairs, validation_pairs, left_out = load_pairs(settings, me, autoencoder)
    bucket_of = pairs.bucket_of
    folder = settings.output_dir or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    written = to_json(settings) | {
        "versions": {"kontext_min": __version__, "torch": torch.__version__},
        "fingerprint": {part: fingerprint(weights.path(part), part) for part in ("transformer", "vae", "clip", "t5")},
        "pictures": data.list_hash(pairs.pictures),
        "pictures_a_batch": settings.batch_size * me.world,
    }
    with parallel.first_goes_ahead(me):
        last = runs.open_run(folder, written, settings.resume, settings.accept_changes, me.first, settings.overwrite)
    with parallel.first_goes_ahead(me):  # the text encoders are gone before the transformer comes
        texts = {*pairs.prompts, prompts_of(settings)[1]}
        encoded = prompts.encode(texts, weights, settings.cache_dir / "prompts", dtype, me.device, settings.stream)
    learner = load_learner(settings, me, weights.path("transformer"), dtype, last)
    state = learner.state
    if settings.cache_latents:
        cache = LatentCache(settings.cache_dir / "latents", f"{settings.degrade} {written['fingerprint']['vae']}")
        report = partial(Progress().show, text="latents") if me.first else lambda *_: None
        encode = partial(to_latents, autoencoder, me.device)
        for line in fill(pairs, cache, encode, settings.workers, me.rank, me.world, report):
            print(f"left out: {line}")
        parallel.wait()
        pairs = CachedPairs(pairs, cache)
    sampler = data.BucketSampler(
        bucket_of, settings.batch_size, settings.seed, me.rank, me.world, settings.drop_last,
        start=state["step"] * settings.accumulate,
    )  # fmt: skip
    batches = iter(data.load(pairs, sampler, settings.workers, me.device.type == "cuda", runs.outlive_signals))
    objective = objective_of(settings, me, pairs, autoencoder)
    header = {"kontext_min": json.dumps(trained_for(settings, objective, written))}

    if parallel.any_of(parallel.from_first(state["step"]) != state["step"]):
        raise ValueError(f"{folder}: not all processes see the same checkpoint; it must be on a disk that they share.")
    if me.first:
        if settings.overwrite:
            runs.delete_run(folder)
        runs.write_json(folder / "settings.json", written)
        runs.write_text(folder / "left-out.txt", "".join(f"{name}: {reason}\n" for name, reason in left_out))
        runs.rewind_metrics(folder, state["step"])
    board = runs.open_tensorboard(folder, state["step"]) if me.first and settings.tensorboard else None
    counts = f"{len(pairs)} pictures, {sampler.batches_per_epoch} batches an epoch"
    me.say(f"{folder}: {counts}, {len(validation_pairs)} to validate on")
    if settings.cache_latents and not validation_pairs:
        autoencoder.to("meta")  # nothing is encoded or decoded any more: its weights go
    run = Run(
        settings, me, dtype, folder, board, autoencoder, encoded, objective, header, sampler.batches_per_epoch,
        validation_pairs,
    )  # fmt: skip
    return run, learner, batches


def load_pairs(
    settings: Settings, me: parallel.Processes, autoencoder: Autoencoder
) -> tuple[data.Pairs, list[tuple[Tensor, Tensor]], list[tuple[str, str]]]:
    """Pairs to train on, a few to validate on, which stay in memory, and (name, reason) of files that are left out.

    Only headers are read here but for the few. What can't be used is said once, by name.
    """
    prompt, validation_prompt = prompts_of(settings)
    degradation = degrade.parse(settings.degrade)
    buckets = data.buckets(settings.resolution, multiple=2 * autoencoder.factor)
    index = settings.cache_dir / "index.json"  # of headers, those of all roots
    with parallel.first_goes_ahead(me):
        pictures, rejected = data.scan(settings.hr_root, index)
    pictures, small = data.usable(pictures, buckets, settings.upscale)
    me.say(data.describe(pictures, rejected + small, buckets))
    pictures, held_out = split_validation(settings, pictures, buckets)
    pairs = data.Pairs(
        pictures, buckets, degradation, settings.seed, prompt, settings.lr_root, settings.flip, settings.cache_latents,
        lr_index=index,
    )  # fmt: skip
    validation_pairs = []
    if held_out:
        partners = settings.val_lr_root if settings.val_root else settings.lr_root
        held = data.Pairs(
            held_out, buckets, degradation, settings.seed, validation_prompt, partners, train=False, lr_index=index
        )
        for i, bucket in enumerate(held.bucket_of):
            try:
                control, target = (data.to_float(x.to(me.device))[None] for x in held.read(0, i, buckets[bucket]))
                validation_pairs.append((control, target))
            except data.UnreadableError as error:
                me.say(f"left out of validation: {error}")
    return pairs, validation_pairs, rejected + small


def load_learner(
    settings: Settings, me: parallel.Processes, base: Path, dtype: torch.dtype, last: Path | None
) -> Learner:
    """The transformer, frozen but for its LoRA, and its optimizer, as at the start or in the `last` checkpoint."""
    kind = None if settings.full or settings.shard else settings.quantize or "stored"  # these take the weights as such
    with parallel.first_goes_ahead(me) if settings.stream else nullcontext():
        flux, stream = load_network(
            "transformer", base, dtype, me.device, kind, settings.stream, settings.cache_dir / "quantized"
        )
    if settings.full:
        flux.requires_grad_(True)
    else:
        add_lora(flux, settings.rank, settings.alpha, settings.lora_targets, seed=settings.seed)
        if settings.init_lora and not last:
            init_lora(flux, settings.init_lora)
        if settings.lora_format == "kohya" and (outside := outside_of_blocks(flux)):
            me.say(f"note: diffusers drops {', '.join(outside)} from kohya files; --lora-format peft keeps them")
    # Each wraps what stands above: a compiled block, the bringing of its weights, and both again in the backward pass.
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
    me.say(f"{sum(p.numel() for p in params):,} parameters train")

    state: dict[str, Any] = {"step": 0, "best_psnr": None, "best_step": None}
    state |= {"skipped": 0, "skipped_in_a_row": 0, "unreadable": []}
    if last:
        files, kept = runs.load_checkpoint(last)
        state |= kept
        runs.put_back(trained, files["trained"])
        if ema:
            runs.put_back(dict(zip(trained, ema, strict=True)), files.get("ema", files["trained"]))
        runs.load_optimizer(optimizer, files["optimizer"])
        me.say(f"going on from {last}")
    return Learner(flux, model, stream, trained, ema, optimizer, state)


@torch.no_grad()
def to_latents(autoencoder: Autoencoder, device: torch.device, pictures: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) to latents (B, C, h, w) on the device; latents from the cache pass through."""
    x = pictures.to(device)
    if x.is_floating_point():
        return x
    return torch.cat([autoencoder.encode(data.to_float(picture)) for picture in x.split(1)])  # memory of one


def objective_of(
    settings: Settings, me: parallel.Processes, pairs: data.Pairs | CachedPairs, autoencoder: Autoencoder
) -> Objective:
    """What the flags ask for; `--start-time auto` is the mean over a few pictures, the same ones after a resume."""
    start_time = settings.start_time
    if start_time == "auto":
        few = [data.collate([pairs[0, i]]) for i in range(min(8, len(pairs)))]
        latents = [[to_latents(autoencoder, me.device, x[key]) for key in ("control", "target")] for x in few]
        start_time = sum(flow.start_time(*pair, settings.source_noise) for pair in latents) / len(few)
        me.say(f"start time {start_time:.3f}")
    return Objective(settings.objective, settings.context, settings.source_noise, float(start_time))


def prompts_of(settings: Settings) -> tuple[str, str]:
    """The prompt of pictures without a caption, and that of validation."""
    prompt = settings.prompt or degrade.PROMPTS.get(settings.degrade, degrade.PROMPTS["guide"])
    return prompt, settings.validation_prompt or prompt


def trained_for(settings: Settings, objective: Objective, written: dict[str, Any]) -> dict[str, Any]:
    """What a LoRA was trained for, kept in its header; sample.py takes its defaults from here."""
    names = ["degrade", "resolution", "guidance", "rank", "alpha", "lora_targets"]
    names += ["steps", "lr", "lr_schedule", "warmup", "accumulate", "ema", "seed", "sigma", "weighting", "penalty"]
    return {
        **{name: getattr(settings, name) for name in names},
        **({"degrade": "pairs"} if settings.lr_root else {}),
        "objective": objective.name,
        "context": objective.context,
        "source_noise": objective.source_noise,
        "start_time": objective.start_time,
        "prompt": prompts_of(settings)[0],
        "base": written["fingerprint"]["transformer"],
        "pictures_a_batch": written["pictures_a_batch"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done or stopped in order, 2 bad input, 1 anything else."""
    settings = parse(Settings, argv, __doc__, f"--degrade takes presets and operators.\n{degrade.describe()}")
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
