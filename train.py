"""Fine-tune FLUX.1-Kontext to restore photographs: clean photos in, a LoRA out.

    python train.py --hr-root DIR

Every step takes clean pictures, degrades them and encodes both with the Flux autoencoder. It draws a point on the line
from the degraded to the clean latent, and learns the velocity at that point (kontext_min/flow.py). Only the LoRA
trains. Without --weights you train the small bundled model, which runs on any computer.

Several GPUs: torchrun --nproc-per-node N train.py ...     (add --shard if the model does not fit on one GPU)
You can stop at any time. The same command with the same --output-dir continues, bit for bit as if never stopped.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import kontext_min.extras.ready  # noqa: F401, names what is missing before its import fails

import torch
from torch import Tensor, nn

from kontext_min import data, degrade, flow
from kontext_min.autoencoder import Autoencoder
from kontext_min.checkpoints import load_autoencoder
from kontext_min.extras import checks, held_out, inventory, parallel, plan, program, prompts, runs, validation
from kontext_min.extras.base import Weights, load_base
from kontext_min.extras.flags import defaults, flag, given, parse_flags, to_json
from kontext_min.extras.lora_files import init_lora, save_lora
from kontext_min.extras.parallel import COMPUTE_DTYPES, compute_dtype
from kontext_min.extras.progress import Progress
from kontext_min.extras.report import write_report
from kontext_min.extras.saving import save_flux
from kontext_min.extras.stand_ins import StandIns
from kontext_min.extras.start_time import find_start_time
from kontext_min.flow import Objective
from kontext_min.flux import Flux
from kontext_min.lora import TARGETS, add_lora

OBJECTIVES, QUANTIZED = ("bridge", "kontext"), ("int8", "fp8", "nf4")
INTERVALS = 5  # of sigma; the log has a loss for each
CLIP_NORM, WEIGHT_DECAY = 1.0, 1e-4  # largest norm of the gradient; AdamW's decay
GUIDE = {"resolution": 1024, "steps": 3000, "batch_size": 1, "accumulate": 4, "lr": 1e-4}  # see `settled`
MAX_SKIPS = 10  # steps in a row without a finite gradient that stop the run
EPILOG = "* or that of the base, such as weights/tiny/defaults.json\n\n--degrade takes presets and operators:\n\n"
ADVICE = "Lower --lr or --alpha, raise --warmup, or look for a broken picture."


picture, model, method, training, validating, running, machine = (
    partial(flag, group) for group in ("pictures", "model", "method", "optimization", "validation", "run", "machine")
)


@dataclass(frozen=True)
class Settings:
    """Every flag of train.py: name, type, default, help, range."""

    hr_root: Path = picture(..., "folder of clean photos, read recursively, without hidden files", there="folder")
    lr_root: Path | None = picture(None, "degraded pictures of the same names, instead of --degrade", there="folder")
    degrade: tuple[str, ...] = picture((), "preset or operators; repeat it for several tasks; default: guide")
    resolution: int | None = picture(None, "side of the square bucket, in pixels; default: 1024 *", least=24, most=4096)
    prompt: tuple[str, ...] = picture((), "of each --degrade, for pictures without a .txt file; default: the preset's")
    workers: int = picture(2, "loader workers, which read and degrade pictures", least=0, most=256)
    cache_latents: int = picture(0, "degraded variants per picture, encoded once, kept on disk", least=0, most=10_000)
    cache_dir: Path = picture(Path("runs/cache"), "cache folder: prompts, latents, quantized blocks")

    weights: Path = model(program.beside_the_programs("weights/tiny"), "folder of the base model")
    transformer: Path | None = model(None, "file of the transformer, instead of the one in --weights")
    vae: Path | None = model(None, "file of the autoencoder, instead of the one in --weights")
    clip: Path | None = model(None, "file of the CLIP text encoder, instead of the one in --weights")
    t5: Path | None = model(None, "file of the T5 text encoder, instead of the one in --weights")
    rank: int = model(16, "rank of the LoRA", least=1)
    alpha: float | None = model(None, "scales the LoRA by alpha / rank; default: the rank", least=1e-3, most=1e6)
    lora_targets: str = model("attention-mlp", f"{', '.join(TARGETS)}, or a pattern of module names")
    init_lora: Path | None = model(None, "LoRA file to start from, of at most --rank", there="file or folder")
    full: bool = model(False, "train all weights of the transformer instead of a LoRA")
    quantize: str | None = model(None, "quantize the frozen weights to 8 or 4 bits", QUANTIZED)

    objective: str = method("bridge", "flow to learn: from degraded to clean, or from noise to clean", OBJECTIVES)
    context: bool = method(False, "bridge: append the degraded picture as reference tokens")
    source_noise: float = method(0.0, "bridge: standard deviation of noise added to the source", least=0, most=1)
    start_time: str = method("1", "bridge: Flux's time at sigma = 0, 0.001 to 1, or auto (no gain on weights/tiny)")
    sigma: str | None = method(None, "density of sigma; default: uniform; kontext: shift", flow.SIGMA_DENSITIES)
    weighting: str = method("uniform", "weight of the squared error as a function of sigma", flow.WEIGHTINGS)
    penalty: str = method("mse", "minimize the squared error of each picture, or its log (psnr)", flow.PENALTIES)
    guidance: float = method(1.5, "guidance scale, an input of the network; sample with the same", least=0, most=100)

    steps: int | None = training(None, "optimizer steps; default: 3000 *", least=1, most=10**8)
    batch_size: int | None = training(None, "pictures per batch and process; default: 1 *", least=1, most=4096)
    accumulate: int | None = training(None, "batches per optimizer step; default: 4 *", least=1, most=4096)
    lr: float | None = training(None, "peak learning rate of AdamW; default: 1e-4 *", least=1e-9, most=1)
    warmup: int | None = training(None, "steps of linear warm-up; default: 100, at most a tenth of --steps", least=0)
    ema: float = training(0.0, "decay of the weights' moving average; 0 = off", least=0, most=0.999999)
    seed: int = training(42, "seed for every random number", least=0, most=2**32 - 1)  # torch reads 32 bits

    val_root: Path | None = validating(None, "pictures to validate on; default: a few of --hr-root", there="folder")
    validate_every_epochs: int | None = validating(None, "epochs between validations, 0 = none; default: 5+", least=0)
    validation_prompt: str | None = validating(None, "prompt for validation (4 Euler steps); default: --prompt")

    output_dir: Path | None = running(None, "run folder; default: runs/DATE-TIME")
    resume: bool = running(True, "continue from the last checkpoint in --output-dir")
    accept_changes: bool = running(False, "continue even if settings have changed")
    overwrite: bool = running(False, "delete the run in --output-dir and start over")
    checkpoint_every: int = running(500, "steps between checkpoints", least=1)
    tensorboard: bool = running(False, "also write tensorboard files")

    device: str = machine("auto", "cpu, cuda, cuda:1 ...; auto: cuda if there is one")
    shard: bool = machine(False, "shard the weights over the processes of torchrun (FSDP2)")
    dtype: str = machine("auto", "compute dtype; auto: bfloat16 if the hardware supports it", COMPUTE_DTYPES)
    stream: bool = machine(False, "stream weights from disk; two blocks are in memory")
    gradient_checkpointing: str | None = machine(
        None,
        "blocks that the backward pass recomputes; default: all above 1 billion parameters, else none",
        ("all", "half", "none"),
        bare="all",
    )
    compile: bool = machine(False, "compile the blocks with torch.compile")
    plan: bool = machine(False, "print the memory that the run needs and the time of a step, and exit")


# ------------------------------------------------------------------------------------------------------- small helpers


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then cosine decay to 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def to_latents(autoencoder: Autoencoder, device: torch.device, pictures: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) to latents (B, C, h, w) on the device; latents from the cache pass through."""
    x = pictures.to(device)
    if x.is_floating_point():
        return x
    # One picture at a time: the autoencoder's activations are larger than everything else in memory.
    return torch.cat([autoencoder.encode(data.to_float(picture)) for picture in x.split(1)])


def trained_for(settings: Settings, objective: Objective, written: dict[str, Any]) -> dict[str, str]:
    """The settings that a LoRA file keeps in its header; sample.py takes its defaults from there."""
    names = ["resolution", "guidance", "rank", "alpha", "lora_targets", "steps", "lr", "warmup", "accumulate", "ema"]
    about = {name: written[name] for name in (*names, "seed", "sigma", "weighting", "penalty", "pictures_a_batch")}
    about |= {"degrade": "pairs" if settings.lr_root else " + ".join(settings.degrade), "prompt": settings.prompt[0]}
    about |= {"objective": objective.name, "base": written["fingerprint"]["transformer"], "prompts": settings.prompt}
    about |= {name: getattr(objective, name) for name in ("context", "source_noise", "start_time")}
    return {"kontext_min": json.dumps(about | written["fingerprint"] | {"changes": written["changes"]})}


# ----------------------------------------------------------------------------------------------------- before the loop


def find_pairs(
    settings: Settings, me: parallel.Processes, buckets: list[data.Size]
) -> tuple[data.Pairs, data.Pairs | None, list[tuple[str, str]]]:
    """Pairs to train on, a few to validate on, and (name, reason) of unused files. Reads only the files' headers."""
    pictures, rejected = inventory.scan_whole(settings.hr_root)
    pictures, small = data.usable(pictures, buckets)
    left_out = rejected + small + inventory.unread(settings.hr_root, pictures)
    me.say(inventory.describe(settings.hr_root, pictures, left_out, buckets))
    expected = "expected photographs at least as large as their bucket"
    checks.refuse((not pictures, f"--hr-root {settings.hr_root}: no usable picture; {expected}"))
    pictures, held, lines = held_out.split(settings, pictures, buckets)
    make = partial(data.Pairs, buckets=buckets, degrade=degrade.parse(settings.degrade[0]), seed=settings.seed)
    pairs = make(pictures, prompt=settings.prompt[0])
    held = make(held, prompt=settings.validation_prompt, train=False) if held else None
    if settings.lr_root:  # degraded partners from a folder instead of --degrade
        from kontext_min.extras.paired import pair_up

        pairs, held, more = pair_up(pairs, held, settings.lr_root)
        lines += more
    elif len(settings.degrade) > 1:  # each with its prompt; the first one is validated
        from kontext_min.extras.tasks import Tasks

        pairs = Tasks(pairs, settings.degrade, settings.prompt)
    for line in lines + inventory.repeats(pairs.bucket_of, settings.batch_size * me.world):
        me.say(line)
    return pairs, held, left_out


def load_model(settings: Settings, me: parallel.Processes, weights: Weights, dtype: torch.dtype) -> tuple[Flux, Any]:
    """The frozen transformer with its LoRA, ready to train, and its stream if the weights are streamed."""
    with parallel.first_goes_ahead(me) if settings.stream else nullcontext():  # the first may write quantized blocks
        flux, stream = load_base(settings, weights.path("transformer"), dtype, me.device, settings.cache_dir)
    if settings.full:
        flux.requires_grad_(True)
    else:
        add_lora(flux, settings.rank, settings.alpha, settings.lora_targets, settings.seed)
        if settings.init_lora:
            init_lora(flux, settings.init_lora, vars(settings), prompts.fingerprints(weights))

    # Each of these wraps the one before: load a block's weights, recompute it in the backward pass.
    if stream:
        stream.wrap()
    if settings.gradient_checkpointing != "none":  # keep only the input of a block, recompute the rest
        from kontext_min.extras.checkpointing import checkpoint_blocks

        checkpoint_blocks(flux, settings.gradient_checkpointing)
    if settings.shard:  # every process holds a part of each block
        parallel.shard(flux, me)
    return flux, stream


# ------------------------------------------------------------------------------------------------------------- the run


def train(settings: Settings) -> int:
    """The whole run, from the folder of pictures to the LoRA file, top to bottom. Returns the exit code."""
    checks.check_training(settings)
    me = parallel.start(settings.device)
    progress = Progress(shown=me.first)
    # In bfloat16's 8 bits an update of 1e-4 of a weight rounds to nothing, so every weight that trains is float32.
    dtype = torch.float32 if settings.full else compute_dtype(settings.dtype, me.device)
    weights = Weights(settings.weights, settings.transformer, settings.vae, settings.clip, settings.t5)
    sizes = plan.Sizes.of(weights)
    typed, settings = settings, settled(settings, sizes)
    asked, at_512 = plan.for_training(settings, sizes, dtype, me.device)
    if settings.plan:  # loads no weights
        me.say(plan.show(asked, sizes, at_512, me.device))
        return 0
    if not settings.shard:
        plan.fit(asked, sizes, me.device)

    # ---- pictures and run folder: every bad input is rejected before the large models are loaded
    autoencoder = load_autoencoder(weights.path("vae"), dtype=torch.float32, device=me.device)
    encode = partial(to_latents, autoencoder, me.device)
    buckets = data.buckets(settings.resolution, multiple=2 * autoencoder.factor)
    checks.check_shared_memory(buckets, settings.batch_size, settings.workers)
    progress.phase("reading the headers of the pictures")
    pairs, held, left_out = find_pairs(settings, me, buckets)
    folder = settings.output_dir or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    written = to_json(settings) | {
        "versions": runs.versions(f"{me.device} {dtype}", __file__),
        "fingerprint": prompts.fingerprints(weights),
        "pictures": runs.hash_of_pictures(pairs),
        "files": runs.hash_of_files(pairs, held),
        "operators": runs.hash_of([str(degrade.parse(text)) for text in settings.degrade]),
        "pictures_a_batch": settings.batch_size * me.world,
    }
    with parallel.first_goes_ahead(me):
        last = runs.open_run(folder, written, settings.resume, settings.accept_changes, settings.overwrite, me.first)

    # ---- prompts: the text encoders are freed before the transformer is loaded
    texts = {*pairs.prompts, settings.validation_prompt}
    progress.phase(f"encoding {len(texts)} prompt{'s' * (len(texts) > 1)}")
    with parallel.first_goes_ahead(me):
        encoded = prompts.encode(texts, weights, settings.cache_dir / "prompts", dtype, me.device, settings.stream)
    validation_pairs = held_out.load(held, me.device)

    # ---- the transformer and its LoRA, restored from the last checkpoint if there is one
    progress.phase("loading the transformer")
    flux, stream = load_model(settings, me, weights, dtype)
    trained = {name: p for name, p in flux.named_parameters() if p.requires_grad}
    params = list(trained.values())
    ema = [p.detach().clone() for p in params] if settings.ema else []
    if ema:
        me.say(f"the average's decay rises to {min(settings.ema, settings.steps / (9 + settings.steps)):.3g}")
    optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=WEIGHT_DECAY)
    state: dict[str, Any] = {"step": 0, "best_psnr": None, "best_step": None}
    state |= {"skipped": 0, "skipped_in_a_row": 0, "unreadable": []}
    me.say(f"continuing from {last}" if last else f"{folder}: a new run")
    if last:
        state |= runs.restore(last, trained, ema, optimizer)
        # With --accept-changes a finished run would write its old weights again, and the new settings beside them.
        if state["step"] + settings.accept_changes > settings.steps:
            raise ValueError(f"--steps: got {settings.steps}, but {last} is at step {state['step']}; give more steps.")
        if settings.accept_changes:  # the steps before may have had easier pictures
            runs.keep_best(folder, state["best_step"] if me.first else None)
            state |= {"best_psnr": None, "best_step": None}
    alike = {"pictures": [written["pictures"], written["files"]], "weights": written["fingerprint"]}
    alike |= {"checkpoint": state["step"], "flags": runs.flags_of_all(written)}
    parallel.refuse_different(folder, alike)

    # ---- endless batches; a resumed run continues with the batch after the last one
    sampler = data.BucketSampler(pairs.bucket_of, settings.batch_size, settings.seed, me.rank, me.world)
    step_in_epochs = settings.accumulate / sampler.batches_per_epoch
    sampler.start = round(state.setdefault("epochs", state["step"] * step_in_epochs) * sampler.batches_per_epoch)
    start_time = find_start_time(settings, StandIns(pairs), encode, written)  # of pictures: a cache may be damaged
    if settings.cache_latents:  # encode each picture once
        from kontext_min.extras.latents import CachedPairs, fill, variants

        base = f"{written['operators']} {written['fingerprint']['vae']}"
        pairs = CachedPairs(pairs, settings.cache_dir / "latents", base, variants(settings, sampler.batches_per_epoch))
        for line in fill(pairs, encode, settings.workers, me.rank, me.world, progress.encoded):
            print(f"left out: {line}")
        parallel.wait()
    readable = StandIns(pairs)  # another picture stands in for one that can no longer be read
    batches = iter(data.load(readable, sampler, settings.workers, me.device.type == "cuda", runs.outlive_signals))
    objective = Objective(settings.objective, settings.context, settings.source_noise, start_time)
    between = held_out.batches_between(settings, sampler.batches_per_epoch, len(validation_pairs))

    # ---- from here on the run folder changes
    if me.first:
        if settings.overwrite:
            runs.delete_run(folder)
        written = runs.begun(folder, written)
        runs.write_json(folder / "settings.json", written | {"defaults": defaults(typed, to_json(settings))})
        runs.write_text(folder / "left-out.txt", "".join(f"{name}: {reason}\n" for name, reason in left_out))
        runs.rewind_metrics(folder, state["step"] if last else -1)
    board = runs.open_tensorboard(folder, state["step"]) if settings.tensorboard and me.first else None
    pictures_a_step = settings.accumulate * settings.batch_size * me.world
    epochs = state["epochs"] + (settings.steps - state["step"]) * step_in_epochs
    me.say(
        f"{folder}: {given(typed)}\n{settings.steps} steps of {pictures_a_step} pictures at about "
        f"{settings.resolution} x {settings.resolution} pixels, {settings.objective}, lr {settings.lr:g}\n"
        f"{len(pairs)} pictures to train on for {epochs:.2f} epochs, {len(validation_pairs)} to validate on, "
        f"{sum(p.numel() for p in params):,} parameters train, {me.device}, {str(dtype)[6:]}"
    )

    def save_result(values: dict[str, Tensor], where: Path) -> None:
        header = trained_for(settings, objective, written | {"steps": state["step"]})
        if settings.full:
            save_flux(flux, where / "transformer", header, values)
        else:
            save_lora(flux, where / "lora.safetensors", None, header, values)

    def gather(tensors: Sequence[Tensor]) -> dict[str, Tensor]:  # joins shards, so every process must call it
        return {name: runs.whole(x.detach()) for name, x in zip(trained, tensors, strict=True)}

    def save() -> None:
        files = {"trained": gather(params), "optimizer": runs.optimizer_tensors(optimizer)}
        files |= {"ema": gather(ema)} if ema else {}
        if me.first:
            runs.save_checkpoint(folder, files, state, partial(save_result, files.get("ema", files["trained"])))
            write_report(folder)

    def measure() -> None:
        text = prompts.batch(encoded, [settings.validation_prompt], settings.guidance, dtype, me.device)
        with validation.averaged(params, ema):
            row, sheet = validation.validate(flux, autoencoder, validation_pairs, text, objective, settings.seed, busy)
        psnr, progress.validation = parallel.from_first(row["psnr"]), row["seconds"]
        if state["best_psnr"] is None or psnr > state["best_psnr"]:
            state.update(best_psnr=psnr, best_step=state["step"])
        if me.first:
            how = f"{objective}, guidance {settings.guidance:g}, {settings.validation_prompt}"
            runs.append_metrics(folder, {"step": state["step"], "validation": True, "how": how, **row}, board)
            runs.save_picture(folder, state["step"], sheet, board)
            write_report(folder)
        progress.say(f"step {state['step']}: {validation.describe(row)}")

    # ---- THE LOOP: degrade, encode, draw a point on the path, learn the velocity there
    stop, stopping, busy = runs.StopSignal(), False, partial(progress.show, every=15)  # in a long step
    with runs.under_way(folder):
        progress.phase("training")
        if validation_pairs and not last:
            measure()
        while state["step"] < settings.steps and not stopping:
            step, step_began = state["step"], time.monotonic()
            lr = learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = torch.zeros(2, INTERVALS)  # loss sum and picture count, by interval of sigma
            for micro in range(settings.accumulate):  # batches whose gradients are accumulated
                batch = next(batches)
                for line in parallel.of_all(chain(*batch["unreadable"])):
                    if line not in state["unreadable"]:  # report it once, not in every epoch
                        state["unreadable"].append(line)
                        me.say(f"\nleft out: {line}")
                control, target = encode(batch["control"]), encode(batch["target"])  # (B, C, h, w)
                # Noise and sigma depend only on seed, step and place, so a resumed run draws the same ones.
                place = (micro * me.world + me.rank) * settings.batch_size
                places = range(place, place + settings.batch_size)
                eps, u = flow.draw(settings.seed, step, places, target.shape[1:], pictures_a_step)
                sigma = flow.SIGMA_DENSITIES[settings.sigma](u, target.shape[-2] * target.shape[-1] // 4)
                text = prompts.batch(encoded, batch["prompt"], settings.guidance, dtype, me.device)
                error = flow.loss(flux, control, target, eps.to(target), sigma.to(target), text, objective)  # (B,)
                weight = flow.WEIGHTINGS[settings.weighting](sigma).to(error)
                loss = (weight * flow.PENALTIES[settings.penalty](error)).mean()
                (loss / settings.accumulate).backward()
                interval = (sigma * INTERVALS).long().clamp(0, INTERVALS - 1)
                losses[0].index_add_(0, interval, error.detach().cpu())
                losses[1].index_add_(0, interval, torch.ones_like(sigma))
                busy(f"step {step + 1}: batch {micro + 1} of {settings.accumulate} done")
            if me.world > 1:  # each process has seen only a part of the batch
                parallel.average_gradients(params)
                parallel.add_up(losses)
            norm = runs.whole(nn.utils.clip_grad_norm_(params, CLIP_NORM)).item()
            # A norm that is not finite means that some loss or gradient is not: skip the step, to protect the weights.
            if math.isfinite(norm):
                optimizer.step()
                if ema:  # the decay rises from 0.1, so that a short run's average forgets its start
                    decay = min(settings.ema, (1 + step) / (10 + step))
                    torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - decay)
                state["skipped_in_a_row"] = 0
            else:
                state["skipped"] += 1
                state["skipped_in_a_row"] += 1
            optimizer.zero_grad(set_to_none=True)
            state["step"] = done = step + 1

            # ---- what the run writes
            seconds = time.monotonic() - step_began
            sums, counts = losses.tolist()
            row = {
                "step": done,
                "epoch": round(state["epochs"] * sampler.batches_per_epoch) // sampler.batches_per_epoch,
                "loss": sum(sums) / pictures_a_step,  # squared error, before weight and penalty
                "sigma_loss": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
                "lr": lr,
                "grad_norm": norm,
                "images_per_second": pictures_a_step / seconds,
                "seconds": seconds,
                "skipped": state["skipped"],
                "unreadable": len(state["unreadable"]),
            }
            state["epochs"] += step_in_epochs
            if me.first:
                runs.append_metrics(folder, row, board)
            progress.step(row, settings, held_out.still_due(settings, between, done), me.device.type)
            if state["skipped_in_a_row"] >= MAX_SKIPS:
                last = runs.latest_checkpoint(folder)
                raise runs.Stopped(
                    f"{folder}: no finite loss for {MAX_SKIPS} steps; the last checkpoint is {last}. {ADVICE}"
                )
            if validation_pairs and held_out.due(settings, between, done):
                measure()
            stopping = parallel.any_of(stop.received)
            due = done % settings.checkpoint_every == 0 and not state["skipped_in_a_row"]  # else it may be broken
            if due or stopping or done in (settings.steps, state["best_step"]):
                save()

        # ---- the end
        if state["step"] < settings.steps:
            but = "but without --overwrite" if settings.overwrite else f"with --output-dir {folder}"
            me.say(f"stopped after step {state['step']}; the same command {but} continues")
            return 130
        result = gather(ema or params)
        if not all(x.isfinite().all() for x in result.values()) or state["skipped"] == settings.steps:
            raise runs.Stopped(f"{folder}: the result is not finite, or no step was; it is not written. {ADVICE}")
        if me.first:
            save_result(result, folder)
            write_report(folder)
    if stream:
        me.say(stream.report())
    if state["skipped"]:
        me.say(f"note: {state['skipped']} of {settings.steps} steps had no finite gradient: no change. {ADVICE}")
    for line in [*runs.best_step(folder, state), *runs.changed_since(written, pairs, held)]:
        me.say(line)
    progress.phase(program.done(typed, folder))
    return 0


def settled(settings: Settings, sizes: plan.Sizes) -> Settings:
    """Fill in the defaults that depend on the base model or on other settings."""
    suited = checks.suited(settings.weights / "defaults.json", GUIDE)  # to this base; the official folder has none
    filled = {name: suited[name] for name in GUIDE if getattr(settings, name) is None}
    settings = replace(settings, **filled, degrade=tuple(map(str.strip, settings.degrade)) or ("guide",))
    prompt = checks.prompts_of(settings)
    checks.check_lengths(settings)
    alike = len({" ".join(text.split()) for text in prompt}) < len(prompt)
    checks.refuse((alike, "--degrade: two tasks have the same prompt, so nothing tells them apart; give each its own"))
    large = sizes.flux.hidden_size >= 2048  # above about 1 billion parameters
    which = "all" if settings.stream else settings.gradient_checkpointing or ("all" if large else "none")
    return replace(
        settings,
        prompt=prompt,
        sigma=settings.sigma or ("shift" if settings.objective == "kontext" else "uniform"),
        validation_prompt=settings.validation_prompt or prompt[0],
        warmup=min(100, settings.steps // 10) if settings.warmup is None else settings.warmup,
        gradient_checkpointing=which,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 130 stopped by a signal, 1 anything else."""
    return program.run("train.py", train, parse_flags(Settings, argv, __doc__, EPILOG + degrade.describe()))


if __name__ == "__main__":
    sys.exit(main())
