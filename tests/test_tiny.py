"""weights/tiny: small, whole, read alike by diffusers and by us, true to photographs; prompts in it differ."""

import copy
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from einops import rearrange
from PIL import Image

from kontext_min import degrade
from kontext_min.checkpoints import load_autoencoder, load_clip, load_flux, load_t5
from kontext_min.clip import ClipTokenizer
from kontext_min.data import to_tensor
from kontext_min.extras import metrics, prompts
from kontext_min.extras.base import Weights
from kontext_min.flow import Objective
from kontext_min.restore import restore, to_image
from kontext_min.t5 import T5Tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"
PHOTOS = sorted((ROOT / "tests" / "photos").glob("*.jpg"))
sys.path.append(str(ROOT / "weights"))  # scripts, not a package
import make_tiny  # noqa: E402
import make_tiny_autoencoder as ae  # noqa: E402

PROMPTS = [
    "",
    "restore this photograph",
    "remove noise",
    "remove blur",
    "Remove the scratches from the old photo.",
    "brighten the dark picture",
    "upscale this low resolution image and recover fine details",
]


def config(part):
    return json.loads((TINY / part / "config.json").read_text())


@pytest.fixture(scope="module")
def pipeline():
    return FluxKontextPipeline.from_pretrained(TINY, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(TINY, dtype=torch.float32)


def photo_crops(side=192):
    """The middle of each test photograph, (8, 3, side, side) in [-1, 1]. No network has seen these photographs."""
    crops = []
    for path in PHOTOS:
        image = Image.open(path).convert("RGB")
        x, y = (image.width - side) // 2, (image.height - side) // 2
        crops.append(np.asarray(image.crop((x, y, x + side, y + side))))
    return ae.to_tensor(np.stack(crops))


def test_the_bundle_is_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) < 24e6


def test_configs_fit_together():
    transformer, vae = config("transformer"), config("vae")
    assert transformer["in_channels"] == 4 * vae["latent_channels"] == 96
    assert transformer["joint_attention_dim"] == config("text_encoder_2")["d_model"]
    assert transformer["pooled_projection_dim"] == config("text_encoder")["hidden_size"]
    assert sum(transformer["axes_dims_rope"]) == transformer["attention_head_dim"]
    assert vae["norm_num_groups"] == 32  # as official, and not a parameter of kontext_min.autoencoder
    vocab = json.loads((TINY / "tokenizer" / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(config("text_encoder")["vocab_size"]))


def test_diffusers_runs_an_edit(pipeline):
    """The whole bundle loads, by the classes of its model_index.json, and a picture comes out."""
    image = Image.open(PHOTOS[0]).resize((128, 96))
    result = pipeline(
        image, PROMPTS[1], height=96, width=128, max_area=96 * 128, _auto_resize=False, num_inference_steps=2,
        guidance_scale=2.5, max_sequence_length=32, generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    assert result.shape == (1, 96, 128, 3)
    assert np.isfinite(result).all()
    assert result.std() > 0.01


def test_prompts_as_in_transformers(pipeline):
    """Ids are equal, states to 2e-5 (float32 sums in another order)."""
    ids, ids_2 = ClipTokenizer(TINY / "tokenizer")(PROMPTS), T5Tokenizer(TINY / "tokenizer_2")(PROMPTS, 32)
    pad = {"padding": "max_length", "return_tensors": "pt", "truncation": True}
    torch.testing.assert_close(pipeline.tokenizer(PROMPTS, max_length=77, **pad).input_ids, ids)
    torch.testing.assert_close(pipeline.tokenizer_2(PROMPTS, max_length=32, **pad).input_ids, ids_2)
    with torch.no_grad():
        pooled, states = load_clip(TINY, dtype=torch.float32)(ids)[1], load_t5(TINY, dtype=torch.float32)(ids_2)
        torch.testing.assert_close(pooled, pipeline.text_encoder(ids).pooler_output, atol=2e-5, rtol=0)
        torch.testing.assert_close(states, pipeline.text_encoder_2(ids_2)[0], atol=2e-5, rtol=0)


def test_latents_and_pictures_as_in_diffusers(autoencoder):
    """To 1e-6 in float64. In float32 a norm rounds beside its constant: by less than a step of a byte, 2 / 255, in the
    mean square, in diffusers too.
    """
    theirs, ours = AutoencoderKL.from_pretrained(TINY / "vae"), copy.deepcopy(autoencoder).double()
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    images = photo_crops(64)[:2]
    with torch.no_grad():
        rounded = theirs.decode(theirs.encode(images).latent_dist.mode()).sample
        mean = theirs.double().encode(images.double()).latent_dist.mode()
        z = ours.encode(images.double())
        torch.testing.assert_close(z, (mean - shift) * scale, atol=1e-6, rtol=0)
        torch.testing.assert_close(autoencoder.encode(images).double(), z, atol=2e-3, rtol=0)
        pictures = ours.decode(z)
        torch.testing.assert_close(pictures, theirs.decode(mean).sample, atol=1e-6, rtol=0)
        for other in (autoencoder.decode(z.float()), rounded):
            assert (other - pictures).square().mean().sqrt() < 2 / 255
        noise = torch.randn(1, 24, 64, 64, generator=torch.Generator().manual_seed(0)).double()
        expected = theirs.decode(noise / scale + shift).sample
        torch.testing.assert_close(ours.decode(noise), expected, atol=1e-6, rtol=0)


def test_prompts_differ():
    """By at least a third of a deviation in both encoders: less, and a small network could not tell them apart."""
    with torch.no_grad():
        pooled = load_clip(TINY, dtype=torch.float32)(ClipTokenizer(TINY / "tokenizer")(PROMPTS))[1]
        states = load_t5(TINY, dtype=torch.float32)(T5Tokenizer(TINY / "tokenizer_2")(PROMPTS, 32)).flatten(1)
    for vectors in (pooled, states):
        deviation = vectors.pow(2).mean().sqrt()
        torch.testing.assert_close(deviation, torch.tensor(1.0), atol=0.05, rtol=0)
        apart = torch.pdist(vectors) / vectors.shape[1] ** 0.5
        assert apart.min() > 0.33


def test_words_of_prompts_are_one_token():
    clip, t5 = ClipTokenizer(TINY / "tokenizer"), T5Tokenizer(TINY / "tokenizer_2")
    words = {word for slot in make_tiny.SLOTS.values() for word in slot.split()}
    assert len(words) > 80
    assert [w for w in words if len(clip.encode(w)) > 1 or len(t5.encode(w)) > 1] == []


def test_vocabulary_is_the_scripts():
    """The committed merges are what the script makes, as far as the first 50 (all take some seconds)."""
    words = Counter(w.strip(",.:") for line in make_tiny.sentences(42) for w in line.lower().split())
    lines = (TINY / "tokenizer" / "merges.txt").read_text().splitlines()
    assert [" ".join(pair) for pair in make_tiny.byte_pairs(words, 50)] == lines[1:51]


def test_autoencoder_is_true_to_photographs(autoencoder):
    """On photographs kept out of its components: 49.5 dB in the mean, 38.6 at worst; less 1 dB here."""
    images = photo_crops()
    with torch.no_grad():
        outputs = autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1)
    values = [metrics.psnr((a + 1) / 2, (b + 1) / 2) for a, b in zip(outputs, images, strict=True)]
    assert np.mean(values) > 48.5, values
    assert min(values) > 37.6, values


@pytest.mark.parametrize("side", [64, 160])
def test_a_plain_wall_keeps_its_colour(autoencoder, side):
    """Within 3 of 255, whatever the size: what fewer than three channels a norm group could not do."""
    for colour in ((-0.9, -0.9, -0.9), (0.8, 0.6, -0.2), (0.95, 0.95, 0.95)):
        image = torch.tensor(colour)[None, :, None, None].expand(1, 3, side, side)
        with torch.no_grad():
            output = autoencoder.decode(autoencoder.encode(image))
        assert (output - image).abs().mean() < 3 / 127.5, colour


def test_latents_are_normalised_and_weigh_as_pixels(autoencoder):
    """Mean 0 and deviation 1, roughly, on photographs; and small white noise comes through at about its own deviation.

    The 24 components are orthonormal, so each has gain 1, within the scatter of 8 x 48 x 48 samples (0.5 %).
    """
    images = photo_crops()
    noise = 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, noisy = autoencoder.encode(images), autoencoder.encode(images + noise)
    assert z.mean().abs() < 0.3
    assert 0.6 < z.std() < 1.5  # eight photographs of many: their brightness differs
    gain = (noisy - z).std(dim=(0, 2, 3)) / autoencoder.params.scale_factor / 0.02
    torch.testing.assert_close(gain, torch.ones(24), atol=0.03, rtol=0)


def test_the_decoder_is_the_inverse_of_the_code():
    """from_code, for any code: the encoder projects patches on it, and the decoder gives the projection back.

    40 dB, where a decoder that gives each square its mean has less than 20.
    """
    images, random = photo_crops(), torch.Generator().manual_seed(0)
    patches = rearrange(images, "b c (h y) (w x) -> (b h w) (y x c)", y=4, x=4)
    u = torch.linalg.svd(patches.T @ patches)[0][:, :24]
    u = u @ torch.linalg.qr(torch.randn(24, 24, generator=random))[0]  # the same space, other components
    bias = torch.randn(24, generator=random) / 10
    model = ae.from_code(u, bias, patches)
    code = rearrange(patches @ u + bias, "(b h w) z -> b z h w", b=len(images), h=48)
    back = rearrange(patches @ u @ u.T, "(b h w) (y x c) -> b c (h y) (w x)", b=len(images), h=48, y=4, x=4)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images), code, atol=5e-3, rtol=0)
        errors = (model.decode(code) - back).square().mean(dim=(1, 2, 3))
    assert ae.psnr(errors.max().item()) > 40, errors


@pytest.mark.parametrize("side", [96, 192, 288])
def test_pictures_are_the_linear_inverse_of_their_latents(autoencoder, side):
    """Within 48 dB of it, 1 in 255, for every photograph, at sizes whose norms see other statistics."""
    weight = autoencoder.encoder.down[1].downsample.conv.weight[0:72:3, :12, :2, :2]
    u = rearrange(weight, "z (y x c) py px -> (py y px x c) z", y=2, x=2)
    images = photo_crops(side)
    patches = rearrange(images, "b c (h y) (w x) -> b h w (y x c)", y=4, x=4)
    inverse = rearrange(patches @ u @ u.T, "b h w (y x c) -> b c (h y) (w x)", y=4, x=4)
    with torch.no_grad():
        errors = (autoencoder.decode(autoencoder.encode(images)) - inverse).square().mean(dim=(1, 2, 3))
    assert ae.psnr(errors.max().item()) > 48, errors


def test_photographs_of_the_tests_are_kept_out():
    originals = re.findall(r"`(\w+\.jpg)`", (ROOT / "tests" / "photos" / "CREDITS.md").read_text())
    assert len(originals) >= len(PHOTOS) > 0
    for name in originals:
        if name != "picosdeeuropa.jpg":  # named again, by its new name
            assert ae.kept_out(f"package--main--{name}"), name
    names = [f"{i}.jpg" for i in range(400)]
    assert 30 < sum(map(ae.kept_out, names)) < 70  # one in eight


def test_the_base_takes_damage_away_and_leaves_light_alone_whatever_the_prompt_says(autoencoder):
    """Crops of photographs that the base has not seen, noisy, dark or clean, under four prompts.

    Noise goes. A dark picture stays as it is, to the -0.1 dB that its noise, cut off at black, had added to its light.
    A clean one comes back at over 40 dB.
    """
    flux, names = load_flux(TINY, dtype=torch.float32), ("guide", "denoise", "low-light", "real-esrgan")
    encoded = prompts.encode([degrade.PROMPTS[name] for name in names], Weights(TINY), None, torch.float32, "cpu")
    gain = dict.fromkeys([(spec, name) for spec in ("denoise", "low-light", "clean") for name in names], 0.0)
    for k, path in enumerate(PHOTOS[:4]):
        clean = Image.open(path).convert("RGB").reduce(2).crop((100, 100, 164, 164))
        for spec, name in gain:
            bad = clean if spec == "clean" else degrade.parse(spec)(clean, np.random.default_rng(k))
            before = 0.0 if spec == "clean" else metrics.psnr(bad, clean)
            prompt = prompts.batch(encoded, [degrade.PROMPTS[name]], 1.5, torch.float32, "cpu")
            x = restore(to_tensor(bad)[None], flux, autoencoder, prompt, Objective(), steps=1)
            gain[spec, name] += (metrics.psnr(to_image(x[0]), clean) - before) / 4
    for (spec, name), value in gain.items():
        assert value > {"denoise": 8, "low-light": -0.1, "clean": 40}[spec], (spec, name, gain)
