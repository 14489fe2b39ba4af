"""Makes the autoencoder of weights/tiny: a photograph (3, H, W) becomes a latent (24, H/4, W/4). Nothing is trained.

    encoder   a 4x4 patch p has 48 numbers: m = U^T p + b, U its 24 principal components. They are orthonormal, so an
              error of a latent weighs what the same error of a pixel weighs.
    decoder   the least-squares inverse p = U (m - b): 12 numbers for each quarter of the patch, then 3 for each pixel.

How the official architecture computes something linear: each residual branch ends in a convolution that can be zero.
Where a norm and a swish stand in the way, a group of three channels (a, -a, K), K a constant much larger than a, lets
the norm divide by a constant, and

    swish(a) - swish(-a) = a sigmoid(a) + a sigmoid(-a) = a.

Every Flux autoencoder has 32 groups: hence the width of 96.

How the decoder tells the pixels of a square apart. Nearest-neighbor upsampling gives the same x to the four pixels of a
2x2 square, and a convolution treats all pixels alike. So no linear decoder can give the pixel (p, q) of the square the
value W_pq x that it should have. But one of the four diagonal neighbors of a pixel lies in its own square, and only
that one has the same x. The block after each upsampling computes, with some linear functions c of x,

    E_pq = g sum |c(neighbor that is in the square if the pixel is (p, q)) - c(x)|              0 at (p, q) alone
    y    = M x + sum_pq [swish(D_pq x + T - E_pq) - swish(T - E_pq)]                            M = mean W, D = W - M

where |d| = swish(d) + swish(-d) for large d. A bracket is D_pq x at its own pixel and 0 at the other three. In a plain
area E is 0 everywhere, and the D_pq add up to 0: y is the mean of the square.
Shapes: B batch, H, W sides in pixels, z latent channels, N patches.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.degrade import parse

# No ResNet blocks in the levels of the encoder (and one in those of the decoder): at full size they would cost five
# times the rest of the encoder, which runs in every step of a LoRA's training, and a linear code needs none.
PARAMS = AutoencoderParams(
    ch=96, ch_mult=(1, 1, 1), num_res_blocks=0, z_channels=24, scale_factor=1.0, shift_factor=0.0
)
GROUPS, GATES = 32, 28  # of a norm; beside the gates, four groups hold T - E of the four places
LAST = 28  # the groups from here on are free for what a norm and the last convolution follow
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
# Powers of two, so that their sums are exact. The larger, the less a norm depends on the picture, and the more float32
# rounds what stands beside it. LOUD is for the pairs that hold differences, or E with its thousands.
QUIET, LOUD = 2.0**11, 2.0**19
DIFFERENCE, ENERGY, T = 100.0, 20.0, 10.0  # the gain g is the product of the first two

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


def crops(photos: list[np.ndarray], seed: int, number: int, pixels: int) -> Tensor:
    """(B, 3, side, side) random crops, about `pixels` pixels in all, a third of them degraded.

    A photograph is drawn by the root of its area, so that small ones count too. Degraded pictures have to pass the
    autoencoder as well as clean ones.
    """
    rng = np.random.default_rng([seed, 1, number])
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
    """Eight batches of crops, to take components, means and deviations over."""
    photos = load_photos(work)
    return (crops(photos, seed, i, 2**16) for i in range(8))


def psnr(mse: float) -> float:
    """In dB, of pictures in [-1, 1]."""
    return 10 * float(np.log10(4 / mse))


# ------------------------------------------------------------------------------------------------------ the autoencoder


@torch.no_grad()
def make(patches: Tensor) -> Autoencoder:
    """The autoencoder whose code is the principal components of the given 4x4 patches, (N, 48) as (y x c)."""
    mean = patches.mean(0)
    u = torch.linalg.svd((patches - mean).T @ (patches - mean))[0][:, : PARAMS.z_channels]
    return from_code(u, -(u.T @ mean), patches)


@torch.no_grad()
def from_code(u: Tensor, bias: Tensor, patches: Tensor) -> Autoencoder:
    """The autoencoder of the code m = u^T p + bias, u (48, z) orthonormal; the patches (N, 48) are typical ones."""
    model = Autoencoder(PARAMS)
    for module in model.modules():  # every residual branch adds zero
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            module.bias.zero_()
    set_encoder(model, u, bias)
    # The whole patch is (py y px x c): the quarter (py, px) of 2x2 pixels, then the pixel (y, x) in it.
    z, decoder = PARAMS.z_channels, model.decoder
    decoder.conv_in.weight[range(z), range(z), 1, 1] = 1
    decoder.conv_in.bias[:z] = -bias
    quarters = rearrange(u, "(py y px x c) z -> (py px) (y x c) z", py=2, px=2, y=2, x=2)
    pixels = rearrange(torch.eye(12), "(place c) n -> place c n", place=4)
    samples = (patches - patches.mean(0)) @ u  # (N, z)
    parts = rearrange(samples @ u.T, "n (py y px x c) -> (n py px) (y x c)", py=2, px=2, y=2, x=2)
    up = decoder.up
    stream = separate(up[2].upsample.conv, up[1].block[0], torch.eye(z, PARAMS.ch), quarters, samples, 2)
    separate(up[1].upsample.conv, up[0].block[0], stream, pixels, parts, 4)
    keep(decoder.norm_out, up[1].upsample.conv.bias[2::3])
    for place, sign in ((0, 1), (1, -1)):
        decoder.conv_out.weight[range(3), range(3 * LAST + place, 3 * LAST + 9, 3), 1, 1] = sign
    return model


def set_encoder(model: Autoencoder, u: Tensor, bias: Tensor) -> None:
    """Sort the pixels of 2x2 squares into channels, project four squares on the components, and pass the norm."""
    z, encoder = PARAMS.z_channels, model.encoder
    sort, project = (level.downsample.conv for level in encoder.down[:2])
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    # The padding is right and below only: taps 0 and 1 are the pixels (y, x) of a 2x2 square.
    sort.weight[:12, :3, :2, :2] = rearrange(torch.eye(12), "n (y x c) -> n c y x", y=2, x=2)
    weight = rearrange(u, "(py y px x c) z -> z (y x c) py px", py=2, y=2, px=2, x=2)
    for place, sign in ((0, 1), (1, -1)):
        project.weight[place : 3 * z : 3, :12, :2, :2] = sign * weight
        encoder.conv_out.weight[range(z), range(place, 3 * z, 3), 1, 1] = sign
    project.bias[2::3] = QUIET
    keep(encoder.norm_out, project.bias[2::3])
    encoder.conv_out.bias[:z] = bias
    encoder.conv_out.bias[z:] = -9.0  # log variance: whoever samples gets little noise


def keep(norm: nn.GroupNorm, k: Tensor) -> None:
    """Let the norm of groups (a, b, K), with a + b about 0 in the mean, give a and b back; k (32,) are their K.

    A group has the mean K/3 and, for K much larger than a and b, the deviation sqrt(2) K/3.
    """
    norm.weight.zero_()
    norm.bias.zero_()
    for place in (0, 1):
        norm.weight[place::3] = 2**0.5 * k / 3
        norm.bias[place::3] = k / 3


def separate(conv: nn.Conv2d, block: nn.Module, read: Tensor, maps: Tensor, samples: Tensor, functions: int) -> Tensor:
    """Let the convolution after an upsampling and the block behind it give y = maps[pq] x at the places pq of a square.

    Args:
        read: (n, 96) x = read @ stream, the channels below the upsampling.
        maps: (4, m, n).
        samples: (N, n) of x, zero in the mean: the gates go to the directions of the largest deviation.
        functions: how many c(x) tell the diagonal neighbors apart.

    Returns:
        (m, 96) y = result @ stream, the channels behind the block. If groups are left for it, the pairs from group LAST
        on are y and -y too, for a norm that follows.
    """
    (m, n), center = maps.shape[1:], (1, 1)
    covariance = (samples.T @ samples).double() / len(samples) + 1e-5 * torch.eye(n).double()
    root = torch.linalg.cholesky(covariance)
    mean = maps.mean(0)

    # ---- the gates: D_pq = sum_j out_j in_j^T, the strongest of all places
    gates = []
    for place, d in enumerate((maps - mean).double()):
        out, strength, back = torch.linalg.svd(d @ root, full_matrices=False)
        back = torch.linalg.solve_triangular(root, back, upper=False, left=False)
        gates += [(strength[j].item(), place, out[:, j] * strength[j], back[j]) for j in range(len(strength))]
    gates = sorted(gates, key=lambda gate: -gate[0])[:GATES]

    # ---- the convolution gives pairs: x, and the differences of random functions c(x) to the diagonal neighbors
    c = torch.randn(functions, n, generator=torch.Generator().manual_seed(0)).double()
    c /= covariance.diagonal().sqrt().clamp(min=0.02)
    c /= (c @ root).square().sum(1, keepdim=True).sqrt()
    conv.weight[0 : 3 * n : 3, :, *center] = read
    for k, row in enumerate(c.float() @ read):
        for place, (p, q) in enumerate(PLACES):
            group = 3 * (n + 4 * k + place)
            conv.weight[group, :, *center] = -DIFFERENCE * row
            conv.weight[group, :, 2 - 2 * p, 2 - 2 * q] = DIFFERENCE * row
    apart = LAST if n + 4 * functions <= LAST else 0  # where y goes: to groups of its own, or beside x
    if apart:
        conv.weight[3 * apart : 3 * (apart + m) : 3, :, *center] = mean @ read
    conv.weight[1::3] = -conv.weight[0::3]
    conv.bias[2::3] = QUIET
    conv.bias[2::3][n : n + 4 * functions] = LOUD
    keep(block.norm1, conv.bias[2::3])

    # ---- the block's first convolution: pairs of D_pq x + T - E_pq, and of T - E_pq alone
    first = torch.zeros(GROUPS, PARAMS.ch)
    rows = [*((row, place) for row, (_, place, _, _) in enumerate(gates)), *((GATES + p, p) for p in range(4))]
    for row, place in rows:
        for k in range(functions):
            group = 3 * (n + 4 * k + place)
            first[row, group : group + 2] = -ENERGY
    for row, (_, _, _, back) in enumerate(gates):
        first[row, 0 : 3 * n : 3], first[row, 1 : 3 * n : 3] = back.float(), -back.float()
    block.conv1.weight[0::3, :, *center], block.conv1.weight[1::3, :, *center] = first, -first
    block.conv1.bias[0::3], block.conv1.bias[1::3], block.conv1.bias[2::3] = T, -T, LOUD
    keep(block.norm2, block.conv1.bias[2::3])

    # ---- its second adds the gates
    added = torch.zeros(m, PARAMS.ch)
    for row, (_, place, out, _) in enumerate(gates):
        added[:, 3 * row] += out.float()
        added[:, 3 * (GATES + place)] -= out.float()
    block.conv2.weight[3 * apart + 1 : 3 * (apart + m) : 3, :, *center] = -added if apart else added
    result = torch.zeros(m, PARAMS.ch)
    if apart:
        block.conv2.weight[3 * apart : 3 * (apart + m) : 3, :, *center] = added
        result[range(m), range(3 * apart, 3 * (apart + m), 3)] = 1
    else:  # to the channel of -x: beside x, what was added is the sum of both
        for place in (0, 1):
            result[range(m), range(place, 3 * m, 3)] = 1
        result[:, 0 : 3 * n : 3] += mean
    return result


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
