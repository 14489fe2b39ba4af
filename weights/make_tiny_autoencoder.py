"""Trains the autoencoder of weights/tiny: a photograph (3, H, W) becomes a latent (16, H/4, W/4), on a CPU.

From random weights, minutes of training give 25 dB. So encoder and decoder start as a linear code:

    encoder   a 4x4 patch has 48 numbers; project them on their 16 principal components. The components are orthonormal,
              so an error of a latent weighs what the same error of a pixel weighs. The encoder is exactly this and is
              not trained further: whatever learns on its latents stays valid when the decoder gets better.
    decoder   the convolutions on its straight way, trained alone in minutes; then, from there, the whole of it.

How the official architecture computes something linear: each residual branch ends in a convolution that starts at zero;
and the norm and the swish before each conv_out see groups (a, -a, K), K a constant much larger than a, so that the norm
divides by a constant, and

    swish(a) - swish(-a) = a sigmoid(a) + a sigmoid(-a) = a.

That needs three channels in a norm group, and every Flux autoencoder has 32 groups: hence the width of 96. (With one or
two channels a group, the last norm of the decoder removes the mean color: a plain wall has no way through.)
Shapes: B batch, H, W sides in pixels, z latent channels, N patches.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.degrade import parse
from kontext_min.extras.runs import load_optimizer, optimizer_tensors
from kontext_min.extras.saving import save_file

# No ResNet blocks in the levels of the encoder (and one in those of the decoder): at full size they would cost five
# times the rest of the encoder, which runs in every step of a LoRA's training, and a linear code needs none.
PARAMS = AutoencoderParams(ch=96, ch_mult=(1, 1, 1), num_res_blocks=0, scale_factor=1.0, shift_factor=0.0)
STATISTICS, POOL = 10**6, 2 * 10**6  # batches from here on are for statistics, and for the linear code

# ----------------------------------------------------------------------------------------------------- the photographs

TEST_PHOTOS = (  # the originals behind tests/photos, which no network may have seen
    *("Picture_0B_by_freespace", "Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi"),
    *("friends_by_Aitzol_Berasategi", "life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi"),
    "seeding_by_Clements_Engelhardt",
)


def kept_out(name: str) -> bool:
    """True for the photographs to measure on: those of the tests, and one in eight of the others, by a hash."""
    return any(test in name for test in TEST_PHOTOS) or hashlib.sha256(name.encode()).digest()[0] < 32


def sharpness(image: Image.Image) -> float:
    """Deviation of the Laplacian of the luma, in parts of white: below 0.07 a photograph counts as smooth here."""
    y = np.asarray(image.convert("L"), dtype=np.float32) / 255
    return float((4 * y[1:-1, 1:-1] - y[:-2, 1:-1] - y[2:, 1:-1] - y[1:-1, :-2] - y[1:-1, 2:]).std())


def prepare(source: Path, work: Path) -> None:
    """Each photograph at half its size or less, by Lanczos, which leaves no noise and no JPEG blocks to learn."""
    for path in sorted(p for p in source.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
        with Image.open(path) as image:
            image = image.convert("RGB")
        factor = max(2.0, max(image.size) / 1600)
        image = image.resize([round(side / factor) for side in image.size], Image.Resampling.LANCZOS)
        split = "training"
        if kept_out(path.name):
            split = "kept-out/sharp" if sharpness(image) >= 0.07 else "kept-out/smooth"
        target = work / split / f"{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
        print(f"{split:15} {image.width:5}x{image.height:<5} {sharpness(image):.3f} {path.name}", flush=True)


def load_photos(work: Path) -> list[np.ndarray]:
    """The training photographs, (H, W, 3) uint8 each."""
    photos = [np.asarray(Image.open(path)) for path in sorted((work / "training").glob("*.png"))]
    if not photos:
        raise ValueError(f"{work}/training: no photographs; expected PNG files, run --stage photographs first.")
    return photos


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]."""
    return torch.tensor(pixels, dtype=torch.float32).movedim(-1, -3) / 127.5 - 1


def crops(photos: list[np.ndarray], seed: int, step: int, pixels: int) -> Tensor:
    """The batch of a step: (B, 3, side, side) random crops, about `pixels` pixels in all, a third of them degraded.

    A photograph is drawn by the root of its area, so that small ones count too. Degraded pictures have to pass the
    autoencoder as well as clean ones. The sides vary, or the norms would get used to one.
    """
    rng = np.random.default_rng([seed, 1, step])
    side = int(rng.choice([48, 64, 96]))
    weights = np.sqrt([photo.shape[0] * photo.shape[1] for photo in photos])
    degrade = parse("blur=0.5:2@0.5,downsample=2@0.3,noise=0.01:0.06@0.5,jpeg=30:90@0.6")
    batch = []
    for index in rng.choice(len(photos), max(1, pixels // side**2), p=weights / weights.sum()):
        height, width = photos[index].shape[:2]
        y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = photos[index][y : y + side, x : x + side]
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        if rng.random() < 1 / 3:
            crop = np.asarray(degrade(Image.fromarray(crop), rng))
        batch.append(crop)
    return to_tensor(np.stack(batch)).contiguous(memory_format=torch.channels_last)


def statistics_batches(work: Path, seed: int) -> Iterator[Tensor]:
    """Eight batches of crops that the training does not see, to take means and deviations over."""
    photos = load_photos(work)
    return (crops(photos, seed, STATISTICS + i, 2**16) for i in range(8))


# ------------------------------------------------------------------------------------------------------ the linear code


def linear_autoencoder() -> nn.ModuleList:
    """Encoder and decoder without blocks, norms and swish, and narrower."""

    def conv(n: int, m: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(n, m, 3, stride=stride, padding=2 - stride)

    z, pad, up = PARAMS.z_channels, nn.ZeroPad2d((0, 1, 0, 1)), nn.Upsample(scale_factor=2)
    encoder = nn.Sequential(conv(3, 3), pad, conv(3, 12, 2), pad, conv(12, z, 2), conv(z, z))
    decoder = nn.Sequential(conv(z, 64), up, conv(64, 32), up, conv(32, 12), conv(12, 3))
    return nn.ModuleList([encoder, decoder])


@torch.no_grad()
def set_patch_code(encoder: nn.Sequential, patches: Tensor) -> None:
    """Make the linear encoder project 4x4 patches on the principal components of the given ones, (N, 48)."""
    z, mean = PARAMS.z_channels, patches.mean(0)
    u = torch.linalg.svd((patches - mean).T @ (patches - mean))[0][:, :z]  # (48, z), orthonormal columns
    first, sort, project, last = (layer for layer in encoder if isinstance(layer, nn.Conv2d))
    for p in encoder.parameters():
        p.zero_()
    first.weight[range(3), range(3), 1, 1] = 1
    # The padding is right and below only: taps 0 and 1 are the pixels (y, x) of a 2x2 square.
    sort.weight[:, :, :2, :2] = rearrange(torch.eye(12), "n (y x c) -> n c y x", y=2, x=2)
    project.weight[:, :, :2, :2] = rearrange(u, "(py y px x c) z -> z (y x c) py px", py=2, y=2, px=2, x=2)
    last.weight[range(z), range(z), 1, 1] = 1
    last.bias.copy_(-(u.T @ mean))


def train_linear(work: Path, seed: int, steps: int) -> nn.ModuleList:
    """The patch code with its best linear decoder, cached in WORK."""
    linear, file = linear_autoencoder(), work / "linear.safetensors"
    if file.exists():
        linear.load_state_dict(load_file(file))
        return linear.requires_grad_(False)
    encoder, decoder = linear
    squares = [rearrange(x, "b c (h y) (w x) -> (b h w) (y x c)", y=4, x=4) for x in statistics_batches(work, seed)]
    set_patch_code(encoder.requires_grad_(False), torch.cat(squares))
    photos, random = load_photos(work), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in decoder.parameters():
            bound = p[0].numel() ** -0.5 if p.ndim == 4 else 0.0
            p.copy_(bound * (2 * torch.rand(p.shape, generator=random) - 1))
    images = [crops(photos, seed, POOL + i, 2**15) for i in range(400)]
    adam = torch.optim.Adam(decoder.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        adam.param_groups[0]["lr"] = 3e-3 * warm_cosine(step, steps)
        image = images[step % len(images)]
        error = decoder(encoder(image)) - image
        adam.zero_grad()
        error.abs().mean().backward()
        adam.step()
        if (step + 1) % 200 == 0:
            print(f"linear {step + 1:5} psnr {psnr(error.detach().square().mean().item()):.2f}", flush=True)
    save_file(linear.state_dict(), file)
    return linear.requires_grad_(False)


def warm_cosine(step: int, steps: int) -> float:
    """From 0 to 1 in 100 steps, and down to 0 along a cosine."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def psnr(mse: float) -> float:
    """In dB, of pictures in [-1, 1]."""
    return 10 * float(np.log10(4 / mse))


# ------------------------------------------------------------------------------------------------------ the autoencoder


@torch.no_grad()
def from_linear(linear: nn.ModuleList, seed: int) -> Autoencoder:
    """An autoencoder that computes what the linear one computes."""
    random, model = torch.Generator().manual_seed(seed), Autoencoder(PARAMS)
    for name, p in model.named_parameters():  # norms keep their 1 and 0
        if p.ndim == 4:
            ends_branch = "conv2" in name or "proj_out" in name
            p.copy_((0 if ends_branch else p[0].numel() ** -0.5) * torch.randn(p.shape, generator=random))
        elif name.endswith("bias"):
            p.zero_()
    down, up = [level.downsample for level in model.encoder.down], [level.upsample for level in model.decoder.up]
    ways = (
        (model.encoder, down[0].conv, down[1].conv, model.encoder.mid.block_2),
        (model.decoder, up[2].conv, up[1].conv, model.decoder.up[0].block[0]),
    )
    for fitted, (half, second, third, block) in zip(linear, ways, strict=True):
        layers = [layer for layer in fitted if isinstance(layer, nn.Conv2d)]
        for conv, layer in zip((half.conv_in, second), layers[:2], strict=True):
            n, m = layer.weight.shape[:2]
            conv.weight[:n] = 0
            conv.weight[:n, :m] = layer.weight
            conv.bias[:n] = layer.bias
        through_norm(third, block, half.norm_out, half.conv_out, *layers[2:])
    model.encoder.conv_out.bias[PARAMS.z_channels :] = -9.0  # log variance: whoever samples gets little noise
    return model.to(memory_format=torch.channels_last)


def through_norm(
    before: nn.Conv2d, block: nn.Module, norm: nn.GroupNorm, after: nn.Conv2d, first: nn.Conv2d, last: nn.Conv2d
) -> None:
    """Let `before`, the block, norm, swish and `after` compute last(first(x)).

    `first` has n outputs a. `before` gives a, -a, 0 for each, and the block adds K to each 0. The norm group (a, -a, K)
    has the mean K/3 and, for K much larger than a, the deviation sqrt(2) K/3.
    """
    k, (n, m) = 512.0, first.weight.shape[:2]  # float32 still has four digits of a beside it
    before.weight[: 3 * n] = 0
    after.weight.zero_()
    for place, sign in ((0, 1), (1, -1)):
        channels = slice(place, 3 * n, 3)
        before.weight[channels, :m] = sign * first.weight
        before.bias[channels] = sign * first.bias
        norm.weight[channels] = 2**0.5 * k / 3
        norm.bias[channels] = k / 3
        after.weight[: len(last.weight), channels] = sign * last.weight
    after.bias[: len(last.bias)] = last.bias
    block.conv2.bias[2 : 3 * n : 3] = k


def train(work: Path, seed: int, steps: int, linear_steps: int) -> Autoencoder:
    """Train the decoder with Adam on |decode(encode(x)) - x|; returns the running average of its weights."""
    linear = train_linear(work, seed, linear_steps)
    photos, encoder = load_photos(work), linear[0]  # computes what the whole encoder computes, and at once
    model, average = from_linear(linear, seed), from_linear(linear, seed).requires_grad_(False)
    # Adam moves each of the 864 weights into an output by about lr, whatever their size: more would leave the start.
    lr = 6e-5
    adam = torch.optim.Adam(model.decoder.parameters(), lr=lr)
    state = work / "autoencoder.safetensors"
    done = resume(state, model, average, adam) if state.exists() else 0
    began, errors = time.time(), []
    for step in range(done, steps):
        adam.param_groups[0]["lr"] = lr * warm_cosine(step, steps)
        image = crops(photos, seed, step, 2**15)
        error = model.decode(encoder(image)) - image
        adam.zero_grad()
        error.abs().mean().backward()
        adam.step()
        keep = min(0.995, (step + 1) / (step + 10))
        for a, p in zip(average.decoder.parameters(), model.decoder.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - keep)
        errors.append(error.detach().square().mean().item())
        if (step + 1) % 50 == 0:
            left = (time.time() - began) / (step + 1 - done) * (steps - step - 1) / 60
            print(f"step {step + 1:5} psnr {psnr(np.mean(errors[-50:])):.2f}, {left:.1f} minutes left", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(state, model, average, adam, step + 1)
    return average


def save(path: Path, model: nn.Module, average: nn.Module, adam: torch.optim.Adam, step: int) -> None:
    """What a resumed run needs."""
    state = {f"model.{name}": p for name, p in model.state_dict().items()}
    state |= {f"average.{name}": p for name, p in average.state_dict().items()}
    state |= {f"adam.{name}": value for name, value in optimizer_tensors(adam).items()}
    save_file({name: p.contiguous() for name, p in state.items()} | {"step": torch.tensor(step)}, path)


def resume(path: Path, model: nn.Module, average: nn.Module, adam: torch.optim.Adam) -> int:
    """Load what `save` wrote; returns the steps done."""
    state = load_file(path)
    for prefix, network in (("model.", model), ("average.", average)):
        network.load_state_dict({name[len(prefix) :]: p for name, p in state.items() if name.startswith(prefix)})
    load_optimizer(adam, {name[5:]: value for name, value in state.items() if name.startswith("adam.")})
    return int(state["step"])


@torch.no_grad()
def measure(model: Autoencoder, work: Path) -> None:
    """PSNR of decode(encode(x)) on the middle 256 pixels of each photograph kept out, as it is and degraded."""
    degrade = parse("blur=1.5,downsample=2,noise=0.05,jpeg=50")
    for split in ("sharp", "smooth"):
        rows = []
        for path in sorted((work / "kept-out" / split).glob("*.png")):
            image = Image.open(path)
            w, h = (min(256, side // 8 * 8) for side in image.size)
            x, y = (image.width - w) // 2, (image.height - h) // 2
            clean = image.crop((x, y, x + w, y + h))
            bad = degrade(clean, np.random.default_rng([0, len(rows)]))
            clean, bad = (to_tensor(np.asarray(picture))[None] for picture in (clean, bad))
            out_clean, out_bad = (model.decode(model.encode(picture)).clamp(-1, 1) for picture in (clean, bad))
            pairs = ((out_clean, clean), (out_bad, bad), (bad, clean))
            rows.append([psnr(F.mse_loss(a, b).item()) for a, b in pairs])
            print(f"{split:6} " + " ".join(f"{value:6.2f}" for value in rows[-1]) + f"  {path.name}")
        means = " ".join(f"{value:6.2f}" for value in np.mean(rows, axis=0))
        print(f"{split:6} {means}  mean of {len(rows)}: clean through it, degraded through it, degraded against clean")
