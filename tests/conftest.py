"""What several tests share: --slow, a bundle of weights that takes milliseconds a step, and pictures to match."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import sample
from kontext_min.data import to_float, to_tensor
from kontext_min.extras.saving import save_flux
from kontext_min.flux import Flux, FluxParams

collect_ignore = ["kill_test.py"]  # a program, though its name looks like that of a test
TESTS = Path(__file__).parent
TINY = TESTS.parent / "weights" / "tiny"
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long forms of the tests too")


def pytest_collection_modifyitems(config, items):
    skips = {"slow": not config.getoption("--slow"), "gpu": not torch.cuda.is_available()}
    for item in items:
        for name, skip in skips.items():
            if skip and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{name}: --slow, or a GPU, is needed"))


@pytest.fixture(autouse=True)
def as_on_a_machine_without_a_gpu(request, monkeypatch):
    """The numbers of these tests are those of a CPU; only tests marked gpu see what else there is."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def prompts_of_sample_are_kept_apart(monkeypatch, tmp_path_factory):
    """sample.py keeps encoded prompts in runs/cache, which is not the place for those of the tests."""
    monkeypatch.setattr(sample, "CACHE", tmp_path_factory.getbasetemp() / "sample-cache")


def make_bundle(folder, seed=0):
    """A hub folder: the text encoders of weights/tiny, a random autoencoder of factor 4 and a random transformer."""
    generator = torch.Generator().manual_seed(seed)
    config = {name: json.loads((TINY / name / "config.json").read_text()) for name in TEXT[:2]}
    flux = Flux(
        FluxParams(
            in_channels=16,  # 2x2 patches of 4 channels
            out_channels=16,
            vec_in_dim=config["text_encoder"]["hidden_size"],
            context_in_dim=config["text_encoder_2"]["d_model"],
            hidden_size=48,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=(4, 10, 10),
        )
    )
    with torch.no_grad():
        for name, p in flux.named_parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
            elif name.endswith("bias"):  # the scales of the q and k norms stay at 1
                p.zero_()
    save_flux(flux, folder / "transformer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = 3
        autoencoder = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            block_out_channels=[32] * blocks,
            layers_per_block=0,
            latent_channels=4,
            norm_num_groups=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    with torch.no_grad():
        photo = Image.open(TESTS / "photos" / "bowl.jpg").reduce(4)
        z = autoencoder.encode(to_float(to_tensor(photo))[None]).latent_dist.mean
    autoencoder.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    autoencoder.save_pretrained(folder / "vae")
    for name in TEXT:
        shutil.copytree(TINY / name, folder / name)
    return folder


def make_pictures(folder, count=12, side=72, texts=2):
    """Crops of the photographs in three shapes, some with a caption beside them."""
    folder.mkdir(parents=True)
    photos = sorted((TESTS / "photos").glob("*.jpg"))
    shapes = [(side, side), (round(side * 1.45), side), (side, round(side * 1.45))]
    for k in range(count):
        photo = Image.open(photos[k % len(photos)]).convert("RGB")
        w, h = shapes[k % 3]
        rng = np.random.default_rng(k)
        x, y = int(rng.integers(photo.width - 4 * w)), int(rng.integers(photo.height - 4 * h))
        photo.crop((x, y, x + 4 * w, y + 4 * h)).resize((w, h), Image.Resampling.BOX).save(folder / f"{k:02d}.png")
        if k < texts:
            (folder / f"{k:02d}.txt").write_text(f"fix photo {k}")
    return folder


def linear_gray_profile():
    """The smallest ICC profile of linear gray: a white point and a curve of gamma 1."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white, b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0)}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for kind, content in tags.items():
        table += kind + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I", start + len(body)) + b"lcms\x02\x40\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    return head + white + bytes(48) + table + body


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("weights") / "small")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "hr")
