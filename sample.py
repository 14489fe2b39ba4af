"""Restore pictures: follow the velocity that a LoRA has learnt, from the degraded latent to the clean one.

    python sample.py --input old.jpg --output restored.png --lora runs/mine/lora.safetensors
    python sample.py --input scans/ --output restored/ --lora runs/mine/lora.safetensors --report

Without --weights the small embedded model runs. Prompt, objective, guidance and source noise are those that the LoRA
was trained with, unless a flag says otherwise; several --lora add up. A LoRA trained for a bridge is followed by this
program alone, one trained for kontext by the stock pipelines too. A folder is taken with all below it; what is restored
already is passed over, so that a run that was stopped goes on. To try it on clean photos, degrade them first:

    python sample.py --input photo.jpg --output three.png --lora ... --degrade blur=1.5,noise=0.05 --compare

Exit codes: 0 all restored; 1 some of a folder are not (each is named); 2 nothing is, or bad input.
"""

import errno
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from kontext_min import data, degrade
from kontext_min.autoencoder import Autoencoder
from kontext_min.checkpoints import Weights, find, fingerprint, load_autoencoder, metadata
from kontext_min.extras import metrics, parallel, pictures, plan, prompts, report
from kontext_min.extras.colour import COLOUR_FIXES
from kontext_min.extras.flags import check_numbers, flag, parse
from kontext_min.extras.lora_files import BRIDGE_ONLY, load_lora, purpose, strength_of, trained_with
from kontext_min.extras.quantize import QUANTIZED
from kontext_min.extras.runs import finite
from kontext_min.extras.stream import load_network
from kontext_min.extras.validation import grid
from kontext_min.flow import SOLVERS, Network, Objective, Prompt, evaluations
from kontext_min.restore import STEPS, passes, restore, to_image, working_size
from kontext_min.utils import COMPUTE_DTYPES, Progress, compute_dtype


@dataclass(frozen=True)
class Settings:
    """Every flag of sample.py, once."""

    input: Path = flag(..., "the picture to restore, or a folder of pictures", "pictures")
    output: Path = flag(..., "where it goes: a file, whose ending chooses the format, or a folder", "pictures")
    overwrite: bool = flag(False, "of a folder, restore again what is in --output already", "pictures")
    samples: int = flag(1, "restore each picture so many times, with seeds from --seed up", "pictures", least=1)
    quality: int = flag(95, "of JPEG and WebP, 1 to 100", "pictures")
    max_side: int | None = flag(
        None, "longest side, in pixels, that larger pictures are restored at", "pictures", least=1
    )
    resolution: int | None = flag(None, "side, in pixels, of a square whose area to restore at", "pictures", least=1)
    degrade: str | None = flag(None, "degrade the input first (a preset or e.g. blur=1.5,noise=0.02)", "pictures")
    reference: Path | None = flag(None, "clean picture or folder of the same names; with --degrade the input", "scores")
    json: Path | None = flag(None, "write the scores against the clean pictures into this file too", "scores")
    compare: bool = flag(False, "write input | restored | the clean picture if there is one", "scores")
    report: bool = flag(False, "of a folder, write report.html with before/after sliders into --output", "scores")
    weights: Path = flag(Path("weights/tiny"), "folder of the base model", "model")
    transformer: Path | None = flag(None, "file of the transformer, instead of the one in --weights", "model")
    vae: Path | None = flag(None, "file of the autoencoder, likewise", "model")
    clip: Path | None = flag(None, "file of the CLIP text encoder, likewise", "model")
    t5: Path | None = flag(None, "file of the T5 encoder, likewise", "model")
    lora: tuple[str, ...] = flag((), "LoRA file, =0.8 behind it sets its strength; may be repeated", "model")
    quantize: str | None = flag(None, "keep the weights in 8 or 4 bits", "model", QUANTIZED)
    prompt: str | None = flag(None, "what to do; else the LoRA's, else the guide preset's", "method")
    objective: str | None = flag(None, "else the LoRA's, else bridge", "method", ("bridge", "kontext"))
    guidance: float | None = flag(None, "distilled guidance; else the LoRA's, else 1.5", "method")
    steps: int | None = flag(
        None,
        f"network evaluations; else {STEPS['bridge']}, kontext {STEPS['kontext']}; more is more texture",
        "method",
        least=1,
    )
    solver: str = flag(
        "auto",
        "auto: midpoint, but euler for kontext and for one evaluation; midpoint and heun take two a step",
        "method",
        ("auto", *SOLVERS),
    )
    strength: float = flag(1.0, "part of the path that is followed, above 0 to 1: less changes less", "method")
    fidelity: float = flag(0.0, "pull towards the input, 0 to 1", "method")
    color_fix: str = flag("none", "colours of the input; not for faded or dark pictures", "method", COLOUR_FIXES)
    seed: int = flag(42, "seed of the source noise and of --degrade", "method", least=0)
    tile: int | None = flag(None, "side in pixels; else the LoRA's resolution, else 64 tokens", "method", least=1)
    share_norms: bool = flag(
        True, "decode tiles as parts of one picture; without, faster, each in its own tone", "method"
    )
    batch_size: int = flag(1, "pictures of one shape restored together", "machine", least=1)
    cache_dir: Path = flag(Path("runs/cache"), "where encoded prompts are kept", "machine")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes cuda if there is one", "machine")
    dtype: str = flag(
        "auto", "of the computation; auto: bfloat16 if the hardware multiplies it", "machine", COMPUTE_DTYPES
    )
    stream: bool = flag(False, "leave the weights in their files, two blocks at a time in memory", "machine")
    plan: bool = flag(False, "print how much memory the restoration will take, and stop", "machine")
    budget: str = flag("16G", "memory of the device that --plan looks for flags for", "machine")


def check(settings: Settings) -> None:
    """Settings that contradict each other or lie outside their range, in one line, before anything is loaded."""
    check_numbers(settings)
    if not 1 <= settings.quality <= 100:
        raise ValueError(f"--quality: got {settings.quality}, expected 1 to 100.")
    if not 0 < settings.strength <= 1:
        raise ValueError(f"--strength: got {settings.strength}, expected more than 0 and at most 1.")
    if not 0 <= settings.fidelity <= 1:
        raise ValueError(f"--fidelity: got {settings.fidelity}, expected 0 to 1.")
    if settings.degrade and settings.reference:
        raise ValueError("--reference: with --degrade the input is the clean picture; leave one of the two out.")
    if settings.degrade:
        degrade.parse(settings.degrade)
    if settings.reference and not settings.reference.exists():
        raise FileNotFoundError(f"--reference {settings.reference}: no such file or folder.")
    if settings.reference and settings.input.is_dir() and not settings.reference.is_dir():
        raise ValueError(f"--reference {settings.reference}: is a file, but --input is a folder; name a folder.")
    if settings.json and not (settings.degrade or settings.reference):
        raise ValueError("--json: scores need a clean picture; add --reference, or --degrade on a clean input.")
    if settings.json and not settings.json.parent.is_dir():
        raise FileNotFoundError(f"--json {settings.json}: no such folder; make it first.")
    if settings.report and settings.input.exists() and not settings.input.is_dir():
        raise ValueError("--report: is for folders; of one picture, --compare shows before and after.")


@dataclass(frozen=True)
class Method:
    """How pictures are restored: as the LoRA was trained for, unless a flag says otherwise."""

    prompt: str
    guidance: float
    objective: Objective
    steps: int  # network evaluations
    solver: str  # of flow.SOLVERS
    resolution: int | None  # that the LoRA was trained at, in pixels


def sample(settings: Settings) -> int:
    """Restore a picture, or all of a folder, as the settings say; returns the exit code."""
    check(settings)
    device = parallel.start(settings.device).device
    dtype = compute_dtype(settings.dtype, device)
    weights = Weights(settings.weights, settings.transformer, settings.vae, settings.clip, settings.t5)
    found, failed = pictures.find(settings.input, settings.output, settings.samples)
    for name, reason in failed:
        print(f"not restored: {name}: {reason}", file=sys.stderr)
    again = settings.overwrite or not settings.input.is_dir()
    jobs = [job for job in found if again or not all(file.exists() for file in job.outputs)]
    there = len(found) - len(jobs)
    if not jobs and there:
        print(f"{settings.output}: all {there} pictures are there already; --overwrite restores them again")
        return 1 if failed else 0
    if not jobs:
        raise ValueError(f"--input {settings.input}: none of its {len(failed)} pictures can be read.")

    method = method_of(settings, weights)
    sizes = plan.Sizes.of(weights)
    asked, at_512 = plan.for_sampling(settings, sizes, method.resolution, method.objective.sees_control, dtype, device)
    if settings.plan:
        print(plan.show(asked, sizes, plan.budget_bytes(settings.budget), at_512))
        return 0
    plan.fit(asked, sizes, device)
    cache = settings.cache_dir
    # The text encoders are gone before the transformer comes.
    encoded = prompts.encode([method.prompt], weights, cache / "prompts", dtype, device, settings.stream)
    prompt = partial(prompts.batch, encoded, guidance=method.guidance, dtype=dtype, device=device)
    autoencoder = load_autoencoder(weights.path("vae"), dtype=torch.float32, device=device)
    base, kind = weights.path("transformer"), settings.quantize or "stored"
    flux, stream = load_network("transformer", base, dtype, device, kind, settings.stream, cache / "quantized")
    if stream:
        stream.wrap()
    for lora in settings.lora:
        load_lora(flux, *strength_of(lora))
    began = time.monotonic()
    restored, rows, figures = restore_all(settings, jobs, failed, method, flux, autoencoder, prompt)
    seconds = time.monotonic() - began
    passed = evaluations(method.steps, method.solver)
    how = f"{method.objective.name}, {passed} network evaluations, {method.solver}, {seconds:.1f} s"
    if settings.input.is_dir():
        print(f"{settings.output}: {restored} restored, {there} there before, {len(failed)} not restored; {how}")
    else:
        print(f"{jobs[0].outputs[0]}: {'x'.join(map(str, jobs[0].size))}, {how}")
    if stream:
        print(stream.report())
    if rows:
        rows.sort(key=lambda row: row["name"])
        rows.append(metrics.mean_row(rows))
        print(metrics.table(rows))
    if settings.json:
        settings.json.write_text(json.dumps(finite(rows), indent=1) + "\n", encoding="utf-8")
    if settings.report and figures:
        print(report.write_restored_report(settings.output, figures, restored, rows[-1] if rows else None))
    if not (restored or there):
        raise ValueError(f"--input {settings.input}: none of its {len(failed)} pictures could be restored.")
    return 1 if failed else 0


def method_of(settings: Settings, weights: Weights) -> Method:
    """What the flags ask for, and where they do not, what the LoRAs or the base were trained for.

    Raises:
        ValueError: a flag that does not fit what was trained.
    """
    about = trained_with(metadata(find(weights.path("transformer"), "transformer")[0]))  # by train.py --full
    about |= {"base": None, **purpose(settings.lora)}
    model = " + ".join(settings.lora) or str(settings.weights)
    name = settings.objective or about.get("objective", "bridge")
    if name != about.get("objective", name):
        raise ValueError(f"--objective {name}: {model} was trained for {about['objective']}; leave the flag out.")
    objective = Objective(name, **{k: about[k] for k in ("context", "source_noise", "start_time") if k in about})
    if settings.samples > 1 and not (name == "kontext" or objective.source_noise):
        raise ValueError(f"--samples {settings.samples}: a bridge without source noise has one result; leave it out.")
    if about["base"] not in (None, fingerprint(weights.path("transformer"), "transformer")):
        print(f"note: {model} was trained on another base model than --weights", file=sys.stderr)
    if settings.lora and about.get("objective") == "bridge":
        print(f"{model}: {BRIDGE_ONLY}")
    prompt = settings.prompt or about.get("prompt") or degrade.PROMPTS["guide"]
    guidance = settings.guidance if settings.guidance is not None else about.get("guidance", 1.5)
    steps, solver = settings.steps or STEPS[name], settings.solver
    if solver == "auto":  # by Euler's rule as many evaluations leave a bridge less texture (docs/flow.md)
        solver = "midpoint" if name == "bridge" and steps > 1 else "euler"
    return Method(prompt, guidance, objective, steps, solver, about.get("resolution"))


def restore_all(
    settings: Settings,
    jobs: Sequence[pictures.Job],
    failed: list[tuple[str, str]],
    method: Method,
    flux: Network,
    autoencoder: Autoencoder,
    prompt: Callable[[Sequence[str]], Prompt],
) -> tuple[int, list[metrics.Row], dict[str, str]]:
    """Restore and write the pictures of all jobs, those of one shape together.

    Returns:
        How many were written; their scores, where there are clean pictures; their figures for the report, by title.
        A bad file of a folder is added to `failed` and does not stop the rest.
    """
    degradation = degrade.parse(settings.degrade) if settings.degrade else None
    tile = settings.tile or method.resolution or 128 * autoencoder.factor  # 64 x 64 tokens
    groups = pictures.batches(jobs, settings.batch_size)
    worked_at = {j.size: working_size(*j.size, settings.resolution, settings.max_side) for j in jobs}
    how = (autoencoder, tile, method.steps, method.solver, settings.share_norms)
    cost = {size: passes(*worked_at[size], *how) for size in worked_at}
    progress, passed, total = Progress(), 0, settings.samples * sum(cost[group[0].size] for group in groups)
    restored, rows, figures = 0, [], {}

    @contextmanager
    def spared(job: pictures.Job) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            if not settings.input.is_dir() or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            print(f"not restored: {job.name}: {error}", file=sys.stderr)
            failed.append((job.name, str(error)))

    def tick() -> None:
        nonlocal passed
        passed += 1
        progress.show(passed, total, f"tiles, {group[0].name}")

    def resized(image: Image.Image, size: data.Size) -> Image.Image:
        return image if image.size == size else image.resize(size, Image.LANCZOS)

    for group in groups:
        photos, size = [], group[0].size
        for job in group:
            with spared(job):
                photos.append(pictures.load(job, degradation, settings.reference, settings.seed))
        if not photos:
            passed += settings.samples * cost[size]
            continue
        small = [resized(photo.degraded, worked_at[size]) for photo in photos]
        image = torch.stack([data.to_tensor(picture) for picture in small])  # (B, 3, H, W) bytes
        text = prompt([method.prompt] * len(photos))
        for k in range(settings.samples):
            results = restore(
                image, flux, autoencoder, text, method.objective, method.steps, method.solver,
                seed=settings.seed + k, tile=tile, strength=settings.strength, fidelity=settings.fidelity,
                share_norms=settings.share_norms, report=tick,
            )  # fmt: skip
            for photo, degraded, tensor in zip(photos, small, results, strict=True):
                result = resized(COLOUR_FIXES[settings.color_fix](to_image(tensor), degraded), size)
                before_after = [photo.degraded, result, *([photo.clean] if photo.clean else [])]
                with spared(photo.job):
                    shown = grid([before_after]) if settings.compare else result
                    pictures.write(photo.job.outputs[k], shown, photo.file, settings.quality)
                    restored += 1
                    title, score = photo.job.name + (f" #{k + 1}" if settings.samples > 1 else ""), ""
                    if photo.clean:
                        rows.append(metrics.row(title, *before_after))
                        score = report.from_to(rows[-1]["input"]["psnr"], rows[-1]["restored"]["psnr"])
                    if settings.report and len(figures) < report.RESTORED:
                        figures[title] = report.slider(title, *before_after, score=score, side=report.RESTORED_SIDE)
    return restored, rows, figures


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: see the top."""
    settings = parse(Settings, argv, __doc__)
    try:
        return sample(settings)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
