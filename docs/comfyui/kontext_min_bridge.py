"""A ComfyUI node that samples with a bridge LoRA of kontext_min; README.md beside it says how to install it.

A bridge goes from the degraded latent z at Flux's time T S to the clean one at 0, with T the start time and S the
strength. ComfyUI starts at s noise + (1 - s) z, where s is the first sigma. With s = T S and the noise below, this is
the source of the bridge, z + S source_noise eps. From there on dx/dt = flux(x, t), as for every Flux.

Source: ComfyUI 0.3.75 (commit 9d8a8179), comfy/samplers.py `KSAMPLER`, `CFGGuider`, comfy/model_sampling.py `CONST`.
"""

import json
import math
from types import SimpleNamespace
from typing import Any

import folder_paths
import nodes
from comfy.samplers import KSAMPLER
from torch import Generator, Tensor, linspace, randn
from torch.nn.functional import pad


def follow(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool, order: int) -> Tensor:
    """x (B, C, h, w) at sigmas[0] -> at sigmas[-1], by Euler's rule (order 1) or the midpoint rule (order 2)."""

    def flux(x: Tensor, t: Tensor) -> Tensor:
        return (x - model(x, t.expand(len(x)), **extra_args)) / t  # ComfyUI's model returns x - t flux(x, t)

    for i, (t, h) in enumerate(zip(sigmas[:-1], sigmas.diff(), strict=True)):
        v = flux(x, t)
        if callback:  # progress bar and preview
            callback({"i": i, "x": x, "denoised": x - t * v})
        x = x + h * (flux(x + h / 2 * v, t + h / 2) if order == 2 else v)
    return x


class KontextMinBridge:
    """From a LoRA file and a degraded picture, all that SamplerCustomAdvanced needs; nothing has to be typed."""

    CATEGORY, FUNCTION = "sampling/custom_sampling", "build"
    RETURN_TYPES = ("MODEL", "NOISE", "SAMPLER", "SIGMAS", "LATENT", "LATENT", "STRING", "FLOAT", "INT", "INT")
    RETURN_NAMES = (
        "model", "noise", "sampler", "sigmas", "latent", "reference", "prompt", "guidance", "width", "height",
    )  # fmt: skip

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Sockets and widgets, in ComfyUI's form."""
        files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
        return {"required": {
            "model": ("MODEL",), "vae": ("VAE",), "image": ("IMAGE",), "lora_name": (files,),
            "evaluations": ("INT", {"default": 4, "min": 1, "max": 100}), "solver": (["midpoint", "euler"],),
            "strength": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            "seed": ("INT", {"default": 42, "min": 0, "max": 2**32 - 1}),
        }}  # fmt: skip

    def build(
        self, model: Any, vae: Any, image: Tensor, lora_name: str,
        evaluations: int, solver: str, strength: float, seed: int,
    ) -> tuple:  # fmt: skip
        """image (B, H, W, 3) in [0, 1] -> the outputs named above. Raises: ValueError: no bridge LoRA."""
        with open(folder_paths.get_full_path_or_raise("loras", lora_name), "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        trained = json.loads(header.get("__metadata__", {}).get("kontext_min", "{}"))
        if trained.get("objective") != "bridge":
            raise ValueError(f"{lora_name}: no bridge LoRA of kontext_min; LoraLoaderModelOnly loads it.")
        model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_name, 1.0)[0]
        height, width = image.shape[1:3]
        missing = (0, -width % 16, 0, -height % 16)  # to whole tokens, at the right and the bottom
        padded = pad(image[..., :3].movedim(-1, 1), missing, mode="reflect")
        latent = {"samples": vae.encode(padded.movedim(1, -1))}

        def generate_noise(latent: dict[str, Tensor]) -> Tensor:
            z = model.model.process_latent_in(latent["samples"])
            eps = randn(z.shape[1:], generator=Generator().manual_seed(seed))  # as sample.py draws it
            return z + trained["source_noise"] / trained["start_time"] * eps.to(z)

        noise = SimpleNamespace(seed=seed, generate_noise=generate_noise)
        order = 2 if solver == "midpoint" else 1  # also the evaluations of a step
        sigmas = linspace(trained["start_time"] * strength, 0, math.ceil(evaluations / order) + 1)
        prompt = trained["prompt"].replace("(", r"\(").replace(")", r"\)")  # brackets are weights in ComfyUI
        reference = latent if trained["context"] else None
        sampler = KSAMPLER(follow, {"order": order})
        return model, noise, sampler, sigmas, latent, reference, prompt, float(trained["guidance"]), width, height


NODE_CLASS_MAPPINGS = {"KontextMinBridge": KontextMinBridge}
