"""Restore a picture: follow the velocity that a LoRA has learnt, from the degraded latent to the clean one.

    python sample.py --input old.jpg --output restored.png --lora runs/mine/lora.safetensors

Without --weights the small embedded model runs. Prompt, objective, guidance and source noise are those that the LoRA
was trained with, unless a flag says otherwise; several --lora add up. A LoRA trained for a bridge is followed by this
program alone, one trained for kontext by the stock pipelines too. To try it on a clean photo, degrade it first:

    python sample.py --input photo.jpg --output three.png --lora ... --degrade blur=1.5,noise=0.05 --compare
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kontext_min import degrade, parallel
from kontext_min.checkpoints import Weights, fingerprint, load_autoencoder, load_flux
from kontext_min.data import open_picture
from kontext_min.flags import flag, parse
from kontext_min.flow import SOLVERS, Objective
from kontext_min.lora_files import BRIDGE_ONLY, load_lora, purpose, strength_of
from kontext_min.metrics import psnr, ssim
from kontext_min.prompts import batch, encode
from kontext_min.quantize import DTYPES, QUANTIZED, compute_dtype
from kontext_min.restore import restore, to_image, to_tensor
from kontext_min.stream import load_streamed
from kontext_min.validation import grid


@dataclass(frozen=True)
class Settings:
    """Every flag of sample.py, once."""

    input: Path = flag(..., "the picture to restore", "pictures")
    output: Path = flag(..., "where the restored picture goes; its ending chooses the format", "pictures")
    degrade: str | None = flag(None, "degrade the input first (a preset or e.g. blur=1.5,noise=0.02)", "pictures")
    compare: bool = flag(False, "write input | restored, and with --degrade | the clean input too", "pictures")
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
    steps: int | None = flag(None, "solver steps; else 4 for bridge, 28 for kontext", "method")
    solver: str = flag("euler", "how the velocity is followed", "method", SOLVERS)
    seed: int = flag(42, "seed of the source noise and of --degrade", "method")
    tile: int | None = flag(
        None, "side in pixels above which tiles are used; else the LoRA's resolution, else 1024", "method"
    )
    cache_dir: Path = flag(Path("runs/cache"), "where encoded prompts are kept", "machine")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes cuda if there is one", "machine")
    dtype: str = flag("auto", "of the computation; auto: bfloat16 where the hardware multiplies it", "machine", DTYPES)
    stream: bool = flag(False, "leave the weights in their files, two blocks at a time in memory", "machine")


def sample(settings: Settings) -> None:
    """Restore one picture as the settings say."""
    device = parallel.start(settings.device).device
    dtype = compute_dtype(settings.dtype, device)
    weights = Weights(settings.weights, settings.transformer, settings.vae, settings.clip, settings.t5)
    if not settings.output.parent.is_dir():
        raise FileNotFoundError(f"{settings.output.parent}: no such folder for --output; make it first.")
    if settings.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {settings.output}: unknown picture format; use .png, .jpg or .webp.")

    clean = open_picture(settings.input)
    picture = clean
    if settings.degrade:
        picture = degrade.parse(settings.degrade)(clean, np.random.default_rng(settings.seed))

    lora, loras = purpose(settings.lora), " + ".join(settings.lora)
    text = settings.prompt or lora.get("prompt") or degrade.PROMPTS["guide"]
    guidance = settings.guidance if settings.guidance is not None else lora.get("guidance", 1.5)
    name = settings.objective or lora.get("objective", "bridge")
    if name != lora.get("objective", name):
        raise ValueError(f"--objective {name}: {loras} was trained for {lora['objective']}; leave the flag out.")
    objective = Objective(name, **{k: lora[k] for k in ("context", "source_noise", "start_time") if k in lora})
    steps = settings.steps if settings.steps is not None else 28 if name == "kontext" else 4
    if lora.get("base", base := fingerprint(weights.path("transformer"), "transformer")) != base:
        print(f"note: {loras} was trained on another base model than --weights", file=sys.stderr)

    encoded = encode([text], weights, settings.cache_dir / "prompts", dtype, device, settings.stream)  # then T5 is gone
    autoencoder = load_autoencoder(weights.path("vae"), dtype=torch.float32, device=device)
    if settings.stream:
        made = settings.cache_dir / "quantized"
        flux, stream = load_streamed("transformer", weights.path("transformer"), dtype, device, settings.quantize, made)
        stream.wrap()
    else:
        kind = settings.quantize or "stored"
        flux = load_flux(weights.path("transformer"), dtype=dtype, device=device, kind=kind)
    for each in settings.lora:
        load_lora(flux, *strength_of(each))
    if lora.get("objective") == "bridge":
        print(f"{loras}: {BRIDGE_ONLY}")

    began = time.monotonic()
    restored = restore(
        to_tensor(picture).to(device),
        flux,
        autoencoder,
        batch(encoded, [text], guidance, dtype, device),
        objective,
        steps,
        settings.solver,
        seed=settings.seed,
        tile=settings.tile or lora.get("resolution", 1024),
    )
    result = to_image(restored[0])
    seconds = time.monotonic() - began

    shown = grid([[picture, result, clean] if settings.degrade else [picture, result]]) if settings.compare else result
    shown.save(settings.output, quality=95)  # of JPEG and WebP; PNG is exact
    print(
        f"{settings.output}: {result.width}x{result.height}, {name}, {steps} {settings.solver} steps, {seconds:.1f} s"
    )
    if settings.stream:
        print(stream.report())
    if settings.degrade:
        before, after = (f"{psnr(p, clean):.2f} dB / {ssim(p, clean):.3f}" for p in (picture, result))
        print(f"PSNR / SSIM against the clean input: degraded {before}, restored {after}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 2 bad input, 1 anything else."""
    settings = parse(Settings, argv, __doc__)
    try:
        sample(settings)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
