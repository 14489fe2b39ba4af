"""Choose how pictures are restored: as the LoRA was trained, unless a flag says otherwise.

The header of our LoRA files says how the LoRA was trained (lora_files.trained_with): objective, guidance,
prompt, start time, source noise, resolution. train.py --full writes the same into the transformer's file.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from kontext_min import degrade
from kontext_min.checkpoints import metadata
from kontext_min.extras import prompts
from kontext_min.extras.base import Weights, training_of
from kontext_min.extras.fingerprint import fingerprint
from kontext_min.extras.lora_files import (
    load_lora,
    lora_bytes,
    lora_file,
    note_other_base,
    purpose,
    strength_of,
    trained_with,
)
from kontext_min.flow import SOLVERS, Objective, evaluations
from kontext_min.flux import Flux
from kontext_min.restore import STEPS

HOW = ("degrade", "seed", "strength", "fidelity", "color_fix", "tile", "resolution", "quantize")


@dataclass(frozen=True)
class Method:
    """What stays the same from picture to picture."""

    prompt: str
    guidance: float
    objective: Objective
    steps: int  # network evaluations
    solver: str  # of flow.SOLVERS
    resolution: int | None  # that the LoRA was trained at, in pixels
    lora: tuple[str, ...]  # of each LoRA: its name, a hash of what it holds, its strength
    assumed: str  # why this objective, where neither a flag nor the LoRA says which

    def __str__(self) -> str:
        how = f"{evaluations(self.steps, self.solver)} network evaluations, {self.solver}"
        return f"{self.objective.name}, {how}{self.assumed}"


def method_of(settings: Any, weights: Weights) -> Method:
    """What the flags of sample.py ask for; without a flag, what the LoRAs or the base were trained for.

    Raises:
        ValueError: a flag does not fit what was trained.
    """
    (base, of_base), loras = training_of(weights.path("transformer")), purpose(settings.lora)
    about = of_base | loras
    name = settings.objective or about.get("objective", "bridge")
    model = " + ".join(settings.lora) if "objective" in loras else str(base)
    if name != about.get("objective", name):
        raise ValueError(f"--objective {name}: {model} was trained for {about['objective']}; leave the flag out.")
    trained = {k: v for k, v in about.items() if k != "base"} | {"base": loras.get("base")}  # --full was trained too
    here = prompts.fingerprints(weights, [part for part in ("vae", "clip", "t5", "words") if part in trained])
    if loras.get("base"):
        here["base"] = fingerprint(weights.path("transformer"), "transformer")
    note_other_base(model, trained, here)
    # --prompt and --guidance may be those of any LoRA.
    files = [lora_file(strength_of(lora)[0]) for lora in settings.lora]
    headers = [header for file in files if (header := trained_with(metadata(file), file))] or [of_base]
    known = [p for header in headers for p in (header.get("prompt"), *header.get("prompts", ()))]
    tasks, asked, guidance = about.get("prompts", []), settings.prompt, settings.guidance
    if len(tasks) > 1 and (asked is None or asked not in known):
        used = "the prompt is that of the first" if asked is None else "the prompt is of none"
        print(f"note: {model} has several tasks; {used}; --prompt chooses: {tasks}", file=sys.stderr)
    elif asked is not None and "prompt" in about and asked not in known:
        print(f"note: {model} was trained with {about['prompt']!r}; another prompt may spoil pictures", file=sys.stderr)
    trained_at = about.get("guidance", 1.5)
    if guidance is not None and "guidance" in about and guidance not in [h.get("guidance") for h in headers]:
        print(f"note: {model} was trained with guidance {trained_at:g}, not with {guidance:g}", file=sys.stderr)
    steps, solver = settings.steps or STEPS[name], settings.solver
    if solver == "auto":  # by Euler's rule as many evaluations leave a bridge less texture (docs/flow.md)
        solver = "midpoint" if name == "bridge" and steps > 1 else "euler"
    if settings.fidelity == 1 and steps <= SOLVERS[solver]:
        raise ValueError("--fidelity 1 in one step gives the input back; give more --steps, or less of it.")
    objective = Objective(name, **{k: about[k] for k in ("context", "source_noise", "start_time") if k in about})
    drawn = objective.source_noise or name == "kontext" or (settings.degrade and _draws(settings.degrade))
    if settings.seed != type(settings).seed and not drawn:
        print("note: --seed has no effect: this bridge has no source noise, and --degrade draws none", file=sys.stderr)
    assumed = " (a bridge is assumed; FLUX.1-Kontext and LoRAs of others need --objective kontext)"
    if "objective" in of_base:
        assumed = f" (as {base} was trained; the LoRA does not say what for)"
    return Method(
        prompt=settings.prompt or about.get("prompt") or degrade.PROMPTS["guide"],
        guidance=trained_at if guidance is None else guidance,
        objective=objective,
        steps=steps,
        solver=solver,
        resolution=about.get("resolution"),
        lora=_contents(settings.lora),
        assumed="" if settings.objective or "objective" in (loras if settings.lora else about) else assumed,
    )


def _draws(spec: str) -> bool:
    """Whether a degradation draws random numbers."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    degrade.parse(spec)(Image.new("RGB", (64, 64), "gray"), rng)
    return rng.bit_generator.state != before


def _contents(loras: Sequence[str]) -> tuple[str, ...]:
    files = [(lora_file(path), strength) for path, strength in map(strength_of, loras)]
    return tuple(f"{file.name} {hashlib.sha256(lora_bytes(file)).hexdigest()[:16]}={x:g}" for file, x in files)


def load_loras(flux: Flux, loras: Sequence[str], method: Method) -> None:
    """Put the LoRAs of --lora on a model.

    Raises:
        ValueError: one does not fit, or was replaced since `method_of` read it, as by a run that has ended.
    """
    for lora in loras:
        load_lora(flux, *strength_of(lora))
    if _contents(loras) != method.lora:
        raise ValueError("--lora: a file was replaced while the networks were loaded; start again.")


def made_with(settings: Any, weights: Weights, method: Method) -> dict[str, Any]:
    """All that decides what a restored picture looks like besides its input, as plain JSON values."""
    base = [fingerprint(weights.path(part), part) for part in ("transformer", "vae")]
    base += prompts.keys([method.prompt], weights, torch.float32).values()  # text encoders and vocabularies
    sheet = settings.compare and settings.reference and str(settings.reference.resolve())
    how = asdict(method) | {name: getattr(settings, name) for name in HOW}
    how["operators"] = settings.degrade and str(degrade.parse(settings.degrade))  # a preset's may have changed
    del how["assumed"]  # what was assumed counts
    return how | {"compare": sheet or settings.compare, "lora": list(method.lora), "base": base}
