"""Restore one picture with a bridge LoRA in stock diffusers, without this project's code.

    pip install diffusers transformers peft pillow
    python docs/diffusers_bridge.py old.jpg new.png --lora lora.safetensors

A bridge starts at the latent of the degraded picture, and diffusers' Euler sampler starts at any latents it is given:

    x_0 = z_degraded + source_noise * eps          t_k = T * (1 - k / steps)          x <- x + (t_next - t) * flux(x, t)

so `latents` is the packed x_0, `sigmas` are the t_k, and the scheduler must not shift them. All numbers are in the
header of the LoRA. A LoRA trained with context also sees the degraded picture as reference, which FluxKontextPipeline
adds.

The result equals `sample.py --solver euler` to one level of 255. Stock pipelines have no midpoint rule (sample.py's
default, which restores more texture from the same number of evaluations), no tiles for large pictures, no --strength
and no --fidelity. In bfloat16 they also round x at every step. Pictures have 8 bits here, and lose EXIF and alpha.

Source: diffusers 0.42.1, pipelines/flux/pipeline_flux.py, pipeline_flux_kontext.py, FlowMatchEulerDiscreteScheduler.
"""

import argparse
import json
import os

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from PIL import Image, ImageOps
from safetensors import safe_open


def restore(
    weights: str, lora: str, image: Image.Image, steps: int = 4, seed: int = 42, prompt: str | None = None
) -> Image.Image:
    """The restored picture, in the size of the degraded one.

    Args:
        weights: a diffusers folder or hub name of FLUX.1-Kontext.
        lora: a bridge LoRA's file; for weights of another width than the official one, in peft format.
        image: the degraded picture, RGB.
        steps: network evaluations.
        seed: of the source noise.
        prompt: that of the LoRA if None; of one that was trained on several tasks, that of the first.

    Raises:
        ValueError: the file is no bridge LoRA.
    """
    with safe_open(lora, framework="pt") as f:
        trained = json.loads((f.metadata() or {}).get("kontext_min", "{}"))
    if trained.get("objective") != "bridge":
        raise ValueError(f"{lora}: no bridge LoRA; load it in FluxKontextPipeline as any other LoRA.")
    if prompt is None and len(tasks := trained.get("prompts", [])) > 1:
        print(f"note: {lora} has several tasks, and the prompt is that of the first; --prompt chooses: {tasks}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = FluxKontextPipeline if trained["context"] else FluxPipeline
    pipe = pipeline.from_pretrained(weights, torch_dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipe.load_lora_weights(lora)
    pipe.to(device)

    # Both sides become multiples of one token (16 pixels), by reflection; the pipelines would cut or resize.
    grid = 2 * pipe.vae_scale_factor
    pixels = np.asarray(image)
    pixels = np.pad(pixels, [(0, -pixels.shape[0] % grid), (0, -pixels.shape[1] % grid), (0, 0)], "reflect")
    height, width = pixels.shape[:2]
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device, pipe.vae.dtype) / 127.5 - 1  # (1, 3, H, W)

    # The source of the bridge, (1, C, h, w), packed into tokens as the pipeline packs its noise.
    with torch.no_grad():
        z = (pipe.vae.encode(x).latent_dist.mode() - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    z = z + trained["source_noise"] * eps.to(z)
    latents = pipe._pack_latents(z, *z.shape)  # (1, h/2 * w/2, 4 C)

    reference = {}
    if trained["context"]:  # in the picture's own size, not in one of Kontext's
        reference = {"image": Image.fromarray(pixels), "max_area": height * width, "_auto_resize": False}
    restored = pipe(
        prompt=prompt or trained["prompt"],
        height=height,
        width=width,
        num_inference_steps=steps,
        sigmas=(trained["start_time"] * np.linspace(1, 1 / steps, steps)).tolist(),
        guidance_scale=trained["guidance"],
        latents=latents,
        max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
        **reference,
    ).images[0]
    return restored.crop((0, 0, *image.size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="the degraded picture")
    parser.add_argument("output", help="where the restored one goes")
    parser.add_argument(
        "--weights", default="black-forest-labs/FLUX.1-Kontext-dev", help="diffusers folder or hub name"
    )
    parser.add_argument("--lora", required=True, help="bridge LoRA of kontext_min")
    parser.add_argument("--steps", type=int, default=4, help="network evaluations (default 4)")
    parser.add_argument("--seed", type=int, default=42, help="of the source noise (default 42)")
    parser.add_argument("--prompt", help="default: the LoRA's")
    args = parser.parse_args()
    if os.path.exists(args.output):
        parser.error(f"{args.output}: exists; name a new file")
    picture = ImageOps.exif_transpose(Image.open(args.input))
    if picture.mode[0] in "IF":  # convert() would clip it
        parser.error(f"{args.input}: has more than 8 bits a channel; convert it to 8 bits")
    restored = restore(args.weights, args.lora, picture.convert("RGB"), args.steps, args.seed, args.prompt)
    options = {"quality": 95, "subsampling": 0} if args.output.lower().endswith((".jpg", ".jpeg", ".webp")) else {}
    profile = picture.info.get("icc_profile") if picture.mode == "RGB" else None
    restored.save(args.output, icc_profile=profile, **options)
