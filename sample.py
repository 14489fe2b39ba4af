"""Restore pictures: follow the velocity that a LoRA has learned, from the degraded latent to the clean one.

    python sample.py --input old.jpg --output restored.png --lora runs/mine/lora.safetensors
    python sample.py --input scans/ --output restored/ --lora runs/mine/lora.safetensors --report

Without --weights you run the small bundled model. Prompt, objective, guidance and the like come from the LoRA unless
you give a flag; several --lora add up. Folders are read recursively; after a stop, the same command continues. To try
it on clean photos, degrade them first:

    python sample.py --input photo.jpg --output three.png --lora ... --degrade blur=1.5,noise=0.05 --compare

Exit codes: 0 all restored; 1 some failed (each is named); 2 all failed, or bad input; 130 stopped by a signal.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    import kontext_min.extras.ready  # noqa: F401, names what is missing before its import fails

import torch
from PIL import Image

from kontext_min import degrade
from kontext_min.checkpoints import find, load_autoencoder
from kontext_min.data import to_tensor
from kontext_min.extras import checks, folders, parallel, pictures, plan, program, prompts, validation
from kontext_min.extras.base import Weights, load_base
from kontext_min.extras.flags import flag, parse_flags
from kontext_min.extras.lora_files import lora_file, strength_of
from kontext_min.extras.method import load_loras, made_with, method_of
from kontext_min.extras.parallel import compute_dtype
from kontext_min.extras.progress import Progress, Ticker
from kontext_min.extras.scores import Scores
from kontext_min.extras.shared_norms import passes, shared_norms
from kontext_min.extras.tiles import Tiles
from kontext_min.flow import SOLVERS
from kontext_min.restore import STEPS, decode, restore_latent, to_image

CACHE = Path("runs/cache")
OBJECTIVES, QUANTIZED = ("bridge", "kontext"), ("int8", "fp8", "nf4")
picture, scoring, model, method, machine = (
    partial(flag, group) for group in ("pictures", "scores", "model", "method", "machine")
)


@dataclass(frozen=True)
class Settings:
    """Every flag of sample.py."""

    input: Path = picture(
        ..., "picture to restore, or a folder of pictures, without hidden ones", there="file or folder"
    )
    output: Path = picture(..., "file to write, in the format of its extension, or a folder")
    overwrite: bool = picture(False, "replace files that exist in --output")
    resolution: int | None = picture(None, "side of a square to work at, in pixels; scaled back", least=16, most=16384)
    degrade: str | None = picture(None, "degrade the input first, such as blur=1.5,noise=0.02 or a preset")

    reference: Path | None = scoring(
        None, "clean picture, or folder with the same names, to score against", there="file or folder"
    )
    json: Path | None = scoring(None, "also write the scores to this file")
    compare: bool = scoring(False, "write input | restored | clean side by side")
    report: bool = scoring(False, "for a folder: write report.html with before/after sliders")

    weights: Path = model(program.beside_the_programs("weights/tiny"), "folder of the base model")
    transformer: Path | None = model(None, "file of the transformer, instead of the one in --weights")
    vae: Path | None = model(None, "file of the autoencoder, instead of the one in --weights")
    clip: Path | None = model(None, "file of the CLIP text encoder, instead of the one in --weights")
    t5: Path | None = model(None, "file of the T5 text encoder, instead of the one in --weights")
    lora: tuple[str, ...] = model((), "LoRA file or folder; FILE=0.8 sets its strength; may be repeated")
    quantize: str | None = model(None, "quantize the weights to 8 or 4 bits", QUANTIZED)

    prompt: str | None = method(None, "instruction; default: the LoRA's, or that of the preset guide")
    objective: str | None = method(None, "flow to follow; default: the LoRA's, or bridge", OBJECTIVES)
    guidance: float | None = method(None, "distilled guidance scale; default: the LoRA's, or 1.5", least=0, most=100)
    steps: int | None = method(
        None, f"network evaluations; default: {STEPS['bridge']}, kontext {STEPS['kontext']}", least=1, most=10_000
    )
    solver: str = method("auto", "auto: euler for kontext or one evaluation, else midpoint", ("auto", *SOLVERS))
    strength: float = method(1.0, "fraction of the path to follow; less changes less", least=1e-3, most=1)
    fidelity: float = method(0.0, "pull towards the input; 0 = off", least=0, most=1)
    color_fix: str = method("none", "match the input's colors; not for faded or dark pictures", pictures.COLOUR_FIXES)
    seed: int = method(42, "seed of the source noise and of --degrade", least=0, most=2**32 - 1)  # torch reads 32 bits
    tile: int | None = method(
        None, "side of a tile in pixels, in whole tokens; default: as trained, or 64 tokens", least=1, most=16384
    )

    device: str = machine("auto", "cpu, cuda, cuda:1 ...; auto: cuda if there is one")
    stream: bool = machine(False, "stream weights from disk; two blocks are in memory")
    compile: bool = machine(False, "compile the blocks with torch.compile; worth it for a folder")
    plan: bool = machine(False, "print the memory and the time that it takes, and exit")


def sample(settings: Settings) -> int:
    """Restore a picture, or every picture of a folder. Returns the exit code."""
    checks.check_sampling(settings)
    progress, device = Progress(), parallel.start(settings.device).device
    dtype = compute_dtype("auto", device)
    weights = Weights(settings.weights, settings.transformer, settings.vae, settings.clip, settings.t5)
    method, sizes = method_of(settings, weights), plan.Sizes.of(weights)

    # ---- which pictures: every bad input is rejected before the models are loaded
    files = [settings.reference, settings.json, *(lora_file(strength_of(text)[0]) for text in settings.lora)]
    files += [f for part in ("transformer", "vae", "clip", "t5") for f in find(weights.path(part), part)]
    across = 2 + bool(settings.degrade or settings.reference) if settings.compare else 1
    jobs, failed = pictures.find(settings.input, settings.output, [f for f in files if f], across)
    for name, reason in failed:
        print(f"not restored: {name}: {reason}", file=sys.stderr)
    at = {job.size: pictures.working_size(*job.size, settings.resolution) for job in jobs}  # size to restore at
    asked, small = plan.for_sampling(settings, sizes, method, at.values(), dtype, device)
    if settings.plan:  # loads no weights
        print(plan.show(asked, sizes, small, device))
        return 0
    how = made_with(settings, weights, method) if settings.input.is_dir() else {}
    todo = folders.to_do(jobs, settings.input, settings.output, how, settings.overwrite)
    open_jobs = set(todo)
    scores = Scores(settings, device, progress)
    if not todo and not scores.wanted:
        print(f"{settings.output}: all {len(jobs)} pictures are there already; --overwrite restores them again")
        return 1 if failed else 0
    plan.fit(asked, sizes, device)

    # ---- the networks: the text encoders are freed before the transformer is loaded
    progress.phase(f"loading the networks; {method}")
    cache = checks.cache_for(CACHE)
    encoded = prompts.encode([method.prompt], weights, cache / "prompts", dtype, device, settings.stream)
    text = prompts.batch(encoded, [method.prompt], method.guidance, dtype, device)
    autoencoder = load_autoencoder(weights.path("vae"), dtype=torch.float32, device=device)
    flux, stream = load_base(settings, weights.path("transformer"), dtype, device, cache)
    if stream:
        stream.wrap()
    load_loras(flux, settings.lora, method)

    pull = None
    if settings.fidelity:  # pull each step towards the input
        from kontext_min.extras.fidelity import pulled

        pull = pulled(settings.fidelity, settings.strength)

    # ---- picture after picture
    tick = Ticker(progress, [at[job.size] for job in todo], bool(settings.resolution))
    apply = Tiles(settings.tile, autoencoder, tick, plan.room(autoencoder.params, device), method.resolution)
    degradation, restored = settings.degrade and degrade.parse(settings.degrade), 0
    for job in jobs:
        with folders.spared(job, jobs, failed, how, settings.overwrite) as state:
            if job not in open_jobs and not scores.wanted:
                continue
            photo = pictures.load(job, degradation, settings.reference, settings.seed)
            if job in open_jobs:
                small = photo.degraded.resize(at[job.size], Image.Resampling.LANCZOS)
                tick.begin(job.name, small.size, passes(autoencoder, *small.size, apply, method.steps, method.solver))
                z = restore_latent(
                    to_tensor(small)[None], flux, autoencoder, text, method.objective, method.steps, method.solver,
                    seed=settings.seed, strength=settings.strength, pull=pull, apply=apply,
                )  # fmt: skip
                with shared_norms(autoencoder, z, apply, tick):  # decode tiles as parts of one picture
                    result = to_image(decode(autoencoder, z, small.size, apply)[0])
                result = pictures.COLOUR_FIXES[settings.color_fix](result, small)
                result = result.resize(job.size, Image.Resampling.LANCZOS)
                shown = [pictures.as_seen(picture, photo.file) for picture in (photo.degraded, result)]
                sheet = validation.grid([shown + [photo.clean] * bool(photo.clean)])
                with folders.noted(job, settings.output, how, state, settings.overwrite):
                    pictures.write(job.output, *((sheet,) if settings.compare else (result, photo.file)))
                restored += 1
                tick.end()
            if scores.wanted:  # of the file: it may be that of an earlier call, and JPEG and WebP lose a part
                scores.add(photo, pictures.load_restored(job, settings.compare))

    # ---- summary
    there = len({job.name for job in jobs} - {job.name for job in todo} - dict(failed).keys())
    done = f"{restored} restored, {there} there before, {len(failed)} not restored"
    done = done if settings.input.is_dir() else "x".join(map(str, jobs[0].size))
    lines = [f"{settings.output}: {done}, {method}, {tick.pace()}", *([stream.report()] if stream else [])]
    progress.say("\n".join([*lines, *scores.write(restored + there)]))  # saved before `| head` may end the program
    if not (restored or there):
        raise ValueError(f"--input {settings.input}: none of its {len(failed)} pictures could be restored.")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; the top of the file lists them."""
    return program.run("sample.py", sample, parse_flags(Settings, argv, __doc__))


if __name__ == "__main__":
    sys.exit(main())
