"""The autoencoder equals the official one: 2e-5 on latents, 1e-4 on pictures (what the official libraries agree to)."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.checkpoints import autoencoder_name, load_autoencoder
from kontext_min.data import to_float, to_tensor

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def test_golden():
    ae = load_autoencoder(GOLDEN / "ae_tiny.bfl.safetensors", dtype=torch.float32)
    io = load_file(GOLDEN / "ae_tiny.io.safetensors")
    for case in ("a", "odd"):  # odd: 44 x 61 pixels floor to 5 x 7
        assert (ae.moments(io[f"{case}.image"]) - io[f"{case}.moments"]).abs().max() <= 2e-5
        assert (ae.encode(io[f"{case}.image"]) - io[f"{case}.z"]).abs().max() <= 2e-5
        assert (ae.decode(io[f"{case}.z"]) - io[f"{case}.decoded"]).abs().max() <= 1e-4
    assert (ae.decode(io["rand.z"]) - io["rand.decoded"]).abs().max() <= 1e-4
    assert ae.factor == 8


def test_norms_are_exact_whatever_the_layout_of_the_input():
    """Pictures from the loader and latents from unpack are not NCHW in memory. Against float64 arithmetic.

    The norms of weights/tiny hold constants up to 2^19, so float32 rounds at about 1e-3. In channels-last order torch's
    variance, an E[x^2] - E[x]^2, would be off by more than the picture.
    """
    ae = load_autoencoder(ROOT / "weights" / "tiny", dtype=torch.float32)
    exact = copy.deepcopy(ae).double()
    photo = Image.open(ROOT / "tests" / "photos" / "bowl.jpg").convert("RGB").crop((300, 300, 428, 396))
    image = to_float(to_tensor(photo))[None]
    assert not image.is_contiguous()
    layouts = []
    norms = [module for module in ae.modules() if isinstance(module, torch.nn.GroupNorm)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: layouts.append(args[0].is_contiguous()))
    z = exact.encode(image.double())
    last = z.float().contiguous(memory_format=torch.channels_last)
    assert (ae.encode(image) - z).abs().max() <= 2e-3
    assert (ae.decode(last) - exact.decode(last.double())).square().mean().sqrt() <= 4e-3
    assert len(layouts) == len(norms) and all(layouts)


SIZES = [((1, 2), 1, 4), ((1, 2, 4), 1, 16), ((1, 1, 2, 2), 2, 8)]


@pytest.mark.parametrize(("ch_mult", "blocks", "z"), SIZES)
@pytest.mark.parametrize("shape", [(2, 3, 40, 56), (1, 3, 33, 47)])
def test_live_parity_with_diffusers(ch_mult, blocks, z, shape):
    torch.manual_seed(len(ch_mult))
    levels = len(ch_mult)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(32 * m for m in ch_mult), layers_per_block=blocks, latent_channels=z,
        scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    ).requires_grad_(False)  # fmt: skip
    params = AutoencoderParams(
        ch=32, ch_mult=ch_mult, num_res_blocks=blocks, z_channels=z, scale_factor=0.5, shift_factor=0.1
    )
    ours = Autoencoder(params).requires_grad_(False)
    state = {autoencoder_name(name, len(ch_mult)): p for name, p in theirs.state_dict().items()}
    for name, p in ours.named_parameters():
        p.copy_(state.pop(name).reshape(p.shape))
    assert not state  # every tensor of theirs was used
    image = torch.rand(shape) * 2 - 1
    latent = (theirs.encode(image).latent_dist.mode() - 0.1) * 0.5
    assert (ours.encode(image) - latent).abs().max() <= 2e-5
    assert (ours.decode(latent) - theirs.decode(latent / 0.5 + 0.1).sample).abs().max() <= 1e-4


def test_both_layouts_of_one_autoencoder(tmp_path):
    """Reversed decoder levels and 1x1 convolutions stored as matrices come back exactly."""
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).requires_grad_(False)  # fmt: skip
    theirs.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(tmp_path)
    assert ours.params == AutoencoderParams(
        ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, scale_factor=1.0, shift_factor=0.0
    )
    z = torch.randn(1, 4, 6, 5)
    assert (ours.decode(z) - theirs.decode(z).sample).abs().max() <= 1e-4
