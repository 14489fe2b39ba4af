"""The same training twice: by train.py, and written with diffusers and peft on the same weights, batches and seeds.

    python tests/peer_training.py [--steps 50] [flags of train.py]       weights/tiny on tests/photos, a minute or two

Both sides share the pictures (kontext_min.data), the random numbers (flow.draw) and torch's AdamW. Theirs uses the text
encoders, autoencoder, packing and ids of FluxKontextPipeline, FluxTransformer2DModel, peft's LoRA and diffusers' cosine
schedule. Where diffusers splits a layer of Flux (q, k, v), ours has one A for the whole layer. So peft's three A are
tied to one parameter. Both LoRAs start from the same numbers.

The output is the largest difference of the loss, relative to the loss, and the images per second of both sides, with
reading and encoding of pictures. The exit code is 1 above a difference of 1e-4.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import FluxKontextPipeline  # noqa: E402
from diffusers.optimization import get_cosine_schedule_with_warmup  # noqa: E402
from peft import LoraConfig  # noqa: E402

import train  # noqa: E402
from kontext_min import checkpoints, data, degrade, flow  # noqa: E402
from kontext_min.extras import base, plan, prompts, runs  # noqa: E402
from kontext_min.extras.flags import parse_flags  # noqa: E402
from kontext_min.lora import add_lora, lora_layers  # noqa: E402

FLAGS = (
    "--resolution 128 --batch-size 4 --accumulate 1 --workers 0 --lr 1e-3 --warmup 10 --dtype float32 "
    "--weighting clean --validate-every-epochs 0"
)


def ours(argv: list[str], folder: Path) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step of train.py."""
    assert train.main([*argv, "--output-dir", str(folder)]) == 0
    rows = runs.read_metrics(folder)
    return [row["loss"] for row in rows], [row["seconds"] for row in rows]


def their_lora(transformer, settings) -> list[torch.nn.Parameter]:
    """Add peft's LoRA with the first numbers of ours. Returns the parameters that train."""
    flux = checkpoints.load_flux(settings.weights / "transformer", dtype=torch.float32)
    add_lora(flux, settings.rank, settings.alpha, settings.lora_targets, seed=settings.seed)
    names = {name: checkpoints.flux_modules(flux.params)[name] for name in lora_layers(flux)}
    targets = [n for theirs in names.values() for n in theirs]
    transformer.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets))
    modules = dict(transformer.named_modules())
    for name, theirs in names.items():
        tied = torch.nn.Parameter(lora_layers(flux)[name].lora_A.detach().clone())
        for n in theirs:
            modules[n].lora_A["default"].weight = tied
    return [p for p in transformer.parameters() if p.requires_grad]


def theirs(argv: list[str]) -> tuple[list[float], list[float]]:
    """Losses and seconds of the same steps with diffusers and peft."""
    settings = parse_flags(train.Settings, argv, "")
    pipe = FluxKontextPipeline.from_pretrained(settings.weights, torch_dtype=torch.float32)
    transformer, vae = pipe.transformer.requires_grad_(False), pipe.vae.requires_grad_(False)
    settings = train.settled(settings, plan.Sizes.of(base.Weights(settings.weights)))
    prompt = settings.prompt[0]
    length = prompts.max_length(base.Weights(settings.weights))
    with torch.no_grad():
        txt, pooled, txt_ids = pipe.encode_prompt(prompt, None, max_sequence_length=length)
    params = their_lora(transformer, settings)
    optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=train.WEIGHT_DECAY)
    # Their warm-up starts at a rate of 0, ours one step further on. After the warm-up both rates are equal.
    rate = get_cosine_schedule_with_warmup(optimizer, settings.warmup, settings.steps).lr_lambdas[0]

    buckets = data.buckets(settings.resolution, multiple=2 * 2 ** (len(vae.config.block_out_channels) - 1))
    pictures, _ = data.usable(data.scan(settings.hr_root)[0], buckets)
    pairs = data.Pairs(pictures, buckets, degrade.parse(settings.degrade[0]), settings.seed, prompt)
    sampler = data.BucketSampler(pairs.bucket_of, settings.batch_size, settings.seed)
    loader = iter(torch.utils.data.DataLoader(pairs, batch_sampler=sampler, collate_fn=data.collate))

    @torch.no_grad()
    def encode(images):
        # One at a time, as train.py: sums in another order would be off by 1e-4, beside the constants of weights/tiny.
        z = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mode() for x in images.split(1)])
        return (z - vae.config.shift_factor) * vae.config.scaling_factor

    def pack(z):
        return pipe._pack_latents(z, *z.shape)

    losses, seconds = [], []
    for step in range(settings.steps):
        began = time.monotonic()
        batch = next(loader)
        control, target = encode(torch.cat([batch["control"], batch["target"]])).chunk(2)
        count, (h, w) = len(control), target.shape[-2:]
        _, sigma = flow.draw(settings.seed, step, range(count), target.shape[1:], count)
        weight = 3 * (1 - sigma) ** 2 if settings.weighting == "clean" else torch.ones_like(sigma)
        s = sigma[:, None, None, None]
        out = transformer(
            hidden_states=pack((1 - s) * control + s * target), timestep=1 - sigma,
            guidance=torch.full((count,), settings.guidance), pooled_projections=pooled.expand(count, -1),
            encoder_hidden_states=txt.expand(count, -1, -1), txt_ids=txt_ids,
            img_ids=pipe._prepare_latent_image_ids(count, h // 2, w // 2, "cpu", torch.float32), return_dict=False,
        )[0]  # fmt: skip
        loss = (out - pack(control - target)).square().mean(dim=(1, 2))  # Flux points from the clean to the noisy end
        ((weight * loss).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(params, train.CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step + (step < settings.warmup))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
        seconds.append(time.monotonic() - began)
    return losses, seconds


def compare(argv: list[str], folder: Path) -> float:
    """Train on both sides. Returns the largest difference of the losses, relative to the loss."""
    (a, fast), (b, slow) = ours(argv, folder), theirs(argv)
    assert len(a) == len(b)
    difference = max(abs(x - y) / y for x, y in zip(a, b, strict=True))
    print(f"{len(a)} steps: loss {b[0]:.4f} -> {b[-1]:.4f}, largest difference {difference:.1e} of the loss")
    batch = parse_flags(train.Settings, argv, "").batch_size
    ips = [batch * len(s[3:]) / sum(s[3:]) for s in (fast, slow)]  # the first steps allocate memory
    print(f"images per second: ours {ips[0]:.2f}, diffusers and peft {ips[1]:.2f}, ratio {ips[0] / ips[1]:.2f}")
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    known, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--hr-root", str(ROOT / "tests" / "photos"), "--cache-dir", f"{folder}/cache"]
        argv += [*FLAGS.split(), "--steps", str(known.steps), *more]
        return int(compare(argv, Path(folder) / "run") > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
