"""Tiles blend without a seam; bytes, batches, solvers, strength and fidelity do what their equations say."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from kontext_min import flow
from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.checkpoints import load_autoencoder, load_flux
from kontext_min.data import to_float, to_tensor
from kontext_min.extras import pictures, prompts, shared_norms
from kontext_min.extras.base import Weights
from kontext_min.extras.fidelity import pulled
from kontext_min.extras.tiles import Room, Tiles, starts, tiled
from kontext_min.flow import Objective, Prompt
from kontext_min.restore import WHOLE, decode, pad_to_grid, restore, restore_latent, to_bytes, to_image

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "tests" / "photos" / "bowl.jpg"
PIXELS = SimpleNamespace(factor=1, encode=lambda x: x, decode=lambda z: z, decoder=torch.nn.Identity())  # does nothing
PROMPT = Prompt(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1))


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (130, 70), (258, 254)])
def test_tiles_of_a_local_function_give_the_function(size):
    """What does not look beyond a position must come out exactly, at every scale; each position is covered."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    assert (tiled(lambda x: 2 * x + 1, (x,), 64, 2) - (2 * x + 1)).abs().max() <= 1e-5
    up = torch.nn.functional.interpolate(x, scale_factor=4.0)
    out = tiled(lambda x: torch.nn.functional.interpolate(x, scale_factor=4.0), (x,), 64, 2, 4)
    assert (out - up).abs().max() <= 1e-5
    down = torch.nn.functional.avg_pool2d(x, 2)
    assert (tiled(lambda x: torch.nn.functional.avg_pool2d(x, 2), (x,), 64, 2, 0.5) - down).abs().max() <= 1e-5
    both = tiled(lambda a, b: a - b, (x, x.flip(0)), 64, 2)
    assert (both - (x - x.flip(0))).abs().max() <= 1e-5


def test_tiles_overlap_by_a_quarter_and_reach_the_end():
    """And no tile is computed twice, down to the smallest that is allowed."""
    for tile in (64, 8):
        for length in range(tile, 700, 2):
            tops = starts(length, tile, 2)
            assert tops[0] == 0
            assert tops[-1] == length - tile
            assert all(0 < b - a <= 0.75 * tile + 2 for a, b in zip(tops[:-1], tops[1:], strict=True))
            assert all(s % 2 == 0 for s in tops)


def test_no_seam_where_tiles_disagree():
    """Each tile adds an offset of its own; blended, no step between neighbours exceeds a tenth of it."""
    offsets = iter([0.0, 1.0] * 4)
    out = tiled(lambda x: x + next(offsets), (torch.zeros(1, 1, 256, 1024),), 256, 2)
    assert (out[..., 1:] - out[..., :-1]).abs().max() < 0.1
    assert out.min() >= 0
    assert out.max() <= 1


def test_pictures_survive_the_way_to_tensors_and_back():
    image = Image.open(PHOTO).convert("RGB").crop((0, 0, 50, 33))
    assert to_image(to_tensor(image)).tobytes() == image.tobytes()
    assert to_image(to_float(to_tensor(image))).tobytes() == image.tobytes()


def test_golden_pictures():
    """Bytes to [-1, 1] as officially; back they are rounded half to even as in diffusers, not cut off as by BFL."""
    units = load_file(ROOT / "tests" / "golden" / "units.safetensors")
    original = Image.fromarray(units["image.in_uint8_hwc"].numpy())
    resized = original.resize((64, 48), Image.Resampling.LANCZOS)
    assert torch.equal(to_float(to_tensor(resized)), units["image.normalised_chw"])
    assert torch.equal(to_bytes(units["image.decoded"]), units["image.diffusers_uint8_round"])
    assert not torch.equal(to_bytes(units["image.decoded"]), units["image.bfl_uint8_trunc"])


def test_bytes_are_padded_by_reflection():
    x = torch.randint(0, 256, (1, 3, 13, 30), dtype=torch.uint8)
    assert torch.equal(pad_to_grid(x, 8).float(), F.pad(x.float(), (0, 2, 0, 3), mode="reflect"))
    assert torch.equal(pad_to_grid(x, 1), x)
    assert pad_to_grid(torch.tensor([[[[1.0, 2.0, 3.0]]]]), 8)[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert torch.equal(pad_to_grid(torch.ones(1, 3, 1, 1), 16), torch.ones(1, 3, 16, 16))


def test_bytes_go_in_and_come_out():
    """Bytes and floats are equal inputs, and come out with the rounding of to_image, padding and cropping included."""
    x = torch.randint(0, 256, (2, 3, 50, 75), dtype=torch.uint8)
    brighter = latents(to_float(x), constant(0.5), tile=32)[..., :50, :75]
    assert (brighter - to_float(x) - 0.5).abs().max() < 1e-5
    for image in (x, to_float(x)):
        out = restore(image, constant(0.5), PIXELS, prompt_of(2), BRIDGE, 1, apply=Tiles(32, PIXELS))
        assert out.dtype == torch.uint8 and out.shape == x.shape
        assert torch.equal(out, to_bytes(brighter))
        assert to_image(out[1]).tobytes() == to_image(brighter[1]).tobytes()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_result_that_is_not_finite_is_an_error(value):
    """A NaN would come out as a black picture. 1e38 overflows on the way."""
    message = r"^the result is not finite \(NaN or infinity\): [^\n]+$"
    with pytest.raises(ValueError, match=message):
        latents(torch.zeros(1, 3, 16, 48), lambda img, *_: (img + 1) * value * 10, tile=16)
    z = torch.zeros(1, 3, 16, 48)
    z[0, 0, 3, 40] = torch.tensor(value) * 10
    with pytest.raises(ValueError, match=message):
        decode(PIXELS, z, (48, 16), Tiles(16, PIXELS))


def test_tiles_larger_than_the_picture_are_the_picture_and_tiny_ones_are_refused():
    x = torch.zeros(1, 3, 16, 48)
    assert torch.equal(latents(x, constant(0.5), tile=10**9), latents(x, constant(0.5), tile=48))
    for call in (lambda: latents(x, constant(0.5), tile=7), lambda: decode(PIXELS, x, (48, 16), Tiles(7, PIXELS))):
        with pytest.raises(ValueError, match=r"^--tile: got 7, expected at least 8 pixels, 4 tokens\.$"):
            call()


def test_working_size_keeps_the_shape():
    assert pictures.working_size(6000, 4000, None) == (6000, 4000)
    assert pictures.working_size(6000, 4000, 1024) == (1254, 836)  # 1024^2 pixels, 3:2
    assert pictures.working_size(300, 200, 1024) == (1254, 836)
    assert pictures.working_size(10000, 1, 10) == (1000, 1)


# ----------------------------------------------------------------------------------------------- following the velocity


def constant(value):
    """A network whose velocity is `value` everywhere: out = -v."""
    return lambda img, *_: torch.full_like(img, -value)


BRIDGE = Objective()


def prompt_of(rows):
    return Prompt(*(x.expand(rows, *x.shape[1:]) for x in (PROMPT.txt, PROMPT.y, PROMPT.guidance)))


def latents(image, flux, objective=BRIDGE, steps=1, tile=None, report=lambda part: None, **options):
    """Latents that are the pictures in floats, as PIXELS changes nothing."""
    apply = Tiles(tile, PIXELS, report) if tile else WHOLE
    return restore_latent(image, flux, PIXELS, prompt_of(len(image)), objective, steps, apply=apply, **options)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("midpoint", 6), ("heun", 6)])
def test_steps_are_network_evaluations_and_all_passes_are_reported(solver, evaluations):
    calls, ticks = [], []

    def flux(img, *_):
        calls.append(1)
        return img * 0

    image = torch.zeros(1, 3, 24, 40)
    z = latents(image, flux, steps=5, solver=solver, tile=16, report=ticks.append)
    decode(PIXELS, z, (40, 24), apply := Tiles(16, PIXELS, ticks.append))
    tiles = 2 * 3
    assert len(calls) == tiles * evaluations
    assert len(ticks) == tiles * (evaluations + 2) == apply.passes(40, 24, 5, solver)


def test_a_picture_is_the_same_alone_and_in_a_batch():
    torch.manual_seed(0)
    x = torch.rand(3, 3, 24, 20) * 2 - 1
    objective = Objective(source_noise=0.3)
    together = latents(x, constant(0.1), objective, seed=5)
    for k in range(3):
        assert torch.allclose(together[k], latents(x[k : k + 1], constant(0.1), objective, seed=5)[0], atol=1e-6)
    assert not torch.allclose(together[:1], latents(x[:1], constant(0.1), objective, seed=6), atol=0.01)
    noise = torch.randn(x[:1].shape[1:], generator=torch.Generator().manual_seed(5))
    assert torch.allclose(together - x, (0.3 * noise + 0.1).expand(x.shape), atol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_noise_of_a_seed_is_the_official_noise(number):
    """Float32, where the official code draws bfloat16; the same generator, shape and order."""
    units = load_file(ROOT / "tests" / "golden" / "units.safetensors")
    seed, height, width = units[f"noise{number}.seed_h_w"].tolist()
    shape = units[f"noise{number}.shape"].tolist()
    autoencoder = SimpleNamespace(
        factor=8,
        encode=lambda x: torch.zeros(shape),
        decode=lambda z: z[:, :3].repeat_interleave(8, -1)[..., :1, :],
        decoder=torch.nn.Identity(),
    )
    seen = []

    def flux(img, *_):
        seen.append(img)
        return img * 0

    image = torch.zeros(1, 3, height, width)
    restore(image, flux, autoencoder, PROMPT, Objective("kontext"), 1, seed=seed)
    z = flow.unpack(seen[0][:, : shape[2] * shape[3] // 4], *shape[2:])
    assert torch.equal(z.flatten()[:64], units[f"noise{number}.f32_first64"])


@pytest.mark.parametrize(("size", "tile", "tokens"), [((32, 32), 64, 256), ((32, 80), 32, 256), ((24, 80), 40, 240)])
def test_bridges_take_equal_steps_and_kontext_those_of_its_tile(size, tile, tokens):
    for objective in (Objective(), Objective(source_noise=0.3), Objective("kontext")):
        times = []

        def flux(img, img_ids, txt, txt_ids, t, *_, times=times):
            times.append(t.item())
            return img * 0

        latents(torch.zeros(1, 3, *size), flux, objective, steps=4, tile=tile)
        expected = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
        if objective.name == "kontext":
            mu = 0.5 + (tokens - 256) * 0.65 / 3840
            expected = math.exp(mu) / (math.exp(mu) + 1 / expected - 1)
        assert sorted(set(times), reverse=True) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("objective", [Objective("kontext"), Objective(source_noise=0.5), Objective(start_time=0.5)])
def test_strength_starts_part_way_along_the_path(objective):
    """x at s0 = 1 - S is (1 - s0) source + s0 control, the network is first asked at t = T S, and 0 changes nothing."""
    times, first = [], []

    def flux(img, img_ids, txt, txt_ids, t, y, guidance):
        times.append(t.item())
        first.append(img.clone())
        return img * 0

    x, eps = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    out = latents(x, flux, objective, steps=4, noise=eps, strength=0.25)
    assert times[0] == pytest.approx(0.25 * objective.start_time)
    assert len(times) == 4 and all(0 < b < a for a, b in zip(times[:-1], times[1:], strict=True))
    source = eps if objective.name == "kontext" else x + objective.source_noise * eps
    assert torch.allclose(out, 0.25 * source + 0.75 * x, atol=1e-6)
    assert (latents(x, flux, objective, noise=eps, strength=1e-6) - x).abs().max() < 1e-5
    with pytest.raises(ValueError, match="strength: got 0"):
        latents(x, flux, strength=0)


def test_fidelity_is_the_equation():
    """One Euler step by hand, at a place inside the path; 1 at sigma = 0 is the input itself, 0 changes nothing."""
    torch.manual_seed(0)
    control, eps, v = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16), 0.7
    kontext, w, s = Objective("kontext"), 0.6, 0.5
    out = latents(control, constant(v), kontext, noise=eps, strength=1 - s, pull=pulled(w))
    x = (1 - s) * eps + s * control
    x1 = x + (1 - s) * v
    x1 = x1 - w * (1 - s) ** 4 * (x1 - control)
    assert torch.allclose(out, x + (1 - s) * (x1 - x) / (1 - s), atol=1e-5)
    assert (latents(control, constant(v), pull=pulled(1.0)) - control).abs().max() < 1e-6
    assert torch.allclose(latents(control, constant(v), pull=pulled(0.5)), control + 0.5 * v, atol=1e-6)
    nearer = [
        (latents(control, constant(v), steps=4, pull=pulled(f)) - control).mean().item() for f in (0, 0.3, 0.6, 1)
    ]
    assert nearer[0] == pytest.approx(v, abs=1e-5) and nearer == sorted(nearer, reverse=True)
    for solver in ("midpoint", "heun"):  # at sigma = 1 nothing is divided by zero
        assert latents(control, constant(v), steps=4, pull=pulled(1.0), solver=solver).isfinite().all()
    with pytest.raises(ValueError, match=r"fidelity: got 1\.5"):
        pulled(1.5)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_more_fidelity_ends_nearer_to_the_input(solver, steps):
    """Of a network that sees how far it is: it makes up for a pull, but not for more than that."""
    control, ends, sigmas = torch.zeros(1), [], torch.linspace(0, 0.9, steps + 1, dtype=torch.float64)
    for fidelity in (0.0, 0.3, 0.6, 1.0):
        pull = partial(pulled(fidelity), control)
        ends.append(flow.integrate(lambda x, s: (1 - x) / (1 - s), control, sigmas, solver, pull).item())
    assert all(a > b - 1e-6 for a, b in zip(ends, ends[1:], strict=False)) and ends[0] > ends[-1] + 1e-3
    assert (ends[-1] == 0) == (steps == 1)


@pytest.mark.parametrize(("solver", "steps"), [("euler", 2), ("midpoint", 4), ("heun", 4)])
@pytest.mark.parametrize("fidelity", [0.3, 1.0])
def test_less_strength_changes_less_at_any_fidelity(solver, steps, fidelity):
    control, v = torch.zeros(1, 3, 16, 16), 0.7
    ends = []
    for strength in (0.2, 0.5, 0.7, 0.8, 0.9, 1.0):
        pull = pulled(fidelity, strength)
        ends.append(latents(control, constant(v), BRIDGE, steps, strength=strength, solver=solver, pull=pull).mean())
    assert ends == sorted(ends) and ends[0] < 0.3 * ends[-1]


# ------------------------------------------------------------------------------------------------------------- the seam


def seam(x, length, tile, grid):
    """Mean step between neighbours in a row, at the edges of tiles over elsewhere: 1 where nothing is to be seen."""
    steps = (x[..., 1:] - x[..., :-1]).abs().mean(dim=tuple(range(x.ndim - 1)))
    tops = starts(length, tile, grid)
    edges = torch.tensor(sorted({s - 1 for s in tops[1:]} | {s + tile - 1 for s in tops[:-1]}))
    elsewhere = torch.ones_like(steps, dtype=torch.bool)
    elsewhere[edges] = False
    return (steps[edges].mean() / steps[elsewhere].mean()).item()


def test_no_seam_though_every_tile_has_a_colour_of_its_own():
    """A network that answers each call with a random colour: the worst that tiles can disagree."""
    g = torch.Generator().manual_seed(0)

    def flux(img, *_):
        return torch.randn(1, 1, 3, generator=g).repeat_interleave(4, dim=-1).expand_as(img) * 0.5

    torch.manual_seed(1)
    x = 0.1 * torch.randn(1, 3, 64, 512)
    out = latents(x, flux, steps=4, tile=64)
    assert (out - x).std() > 0.1  # the tiles did disagree
    assert seam(out, 512, 64, 2) < 1.05
    hard = x.clone()
    for start in starts(512, 64, 2):  # the later tile over the earlier: what a seam looks like
        hard[..., start : start + 64] += 0.5 * torch.randn(1, 3, 1, 1, generator=g)
    assert seam(hard, 512, 64, 2) > 1.5


def embedded():
    """Transformer, autoencoder and a prompt of weights/tiny."""
    weights = Weights(ROOT / "weights" / "tiny")
    flux, autoencoder = (f(weights.root, dtype=torch.float32) for f in (load_flux, load_autoencoder))
    text = "Remove the noise from this photo."
    encoded = prompts.encode([text], weights, None, torch.float32, "cpu")
    return flux, autoencoder, prompts.batch(encoded, [text], 1.5, torch.float32, "cpu")


def test_tiles_of_the_embedded_model_agree_with_the_whole_picture():
    """What tiles change lies as much between their edges as on them."""
    flux, autoencoder, prompt = embedded()
    image = to_tensor(Image.open(PHOTO).convert("RGB").crop((300, 300, 460, 364)))[None]
    whole, tiles = (
        restore(image, flux, autoencoder, prompt, Objective(), 1, apply=apply).float() / 127.5
        for apply in (WHOLE, Tiles(64, autoencoder))
    )
    error = (tiles - whole).abs().mean().item()
    assert 0 < error < 0.1 * (whole - whole.mean()).abs().mean().item()
    assert seam(tiles, 160, 64, 8) < 1.1 * seam(whole, 160, 64, 8)  # the picture itself is not as rough everywhere


def test_a_picture_of_the_embedded_model_is_the_same_alone_and_in_a_batch():
    """Up to rounding: sums of another batch size are added in another order."""
    flux, autoencoder, prompt = embedded()
    photo = Image.open(PHOTO).convert("RGB")
    image = torch.stack([to_tensor(photo.crop((x, 300, x + 96, 364))) for x in (300, 400)])
    rows = Prompt(*(x.expand(2, *x.shape[1:]) for x in (prompt.txt, prompt.y, prompt.guidance)))
    objective = Objective(source_noise=0.1)
    together = restore(image, flux, autoencoder, rows, objective, 2).int()
    for k in range(2):
        alone = restore(image[k : k + 1], flux, autoencoder, prompt, objective, 2)[0].int()
        assert (together[k] - alone).abs().max() <= 1


def latent_of(name, autoencoder, width=384, height=256):
    """A crop of a photograph of tests/photos, encoded, and its size."""
    image = Image.open(ROOT / "tests" / "photos" / f"{name}.jpg").convert("RGB").crop((0, 0, width, height))
    with torch.no_grad():
        return autoencoder.encode(to_float(to_tensor(image))[None]), image.size


def test_decoding_in_tiles_is_decoding_at_once():
    """With the embedded model, whose norms hardly depend on the picture: what is left is rounding, and a few places."""
    autoencoder = load_autoencoder(ROOT / "weights" / "tiny", dtype=torch.float32)
    z, size = latent_of("picosdeeuropa", autoencoder)
    apply = Tiles(192, autoencoder)
    with torch.no_grad():
        whole = to_bytes(autoencoder.decode(z)).float()
        with shared_norms.shared_norms(autoencoder, z, apply):
            far = decode(autoencoder, z, size, apply).float() - whole
        assert torch.equal(to_bytes(autoencoder.decode(z)).float(), whole)  # the norms are themselves again
    assert (far.abs() <= 1).float().mean() > 0.999
    assert F.avg_pool2d(far, 16).abs().max() < 0.5  # colors, in levels of 255


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("photograph", ["picosdeeuropa", "friends"])
def test_norms_of_tiles_see_nearly_what_they_see_of_the_whole(photograph, seed):
    """The mean and the deviation of every norm, in deviations: less than half as far off as those of a tile.

    In the official architecture, narrow and of three levels, with random weights: its norms depend on the picture.
    """
    z, _ = latent_of(photograph, load_autoencoder(ROOT / "weights" / "tiny", dtype=torch.float32))
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderParams(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=z.shape[1]))
    norms = [m for m in autoencoder.decoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    ticks, shared = [], []
    with torch.no_grad():
        apply, side = Tiles(192, autoencoder), 192 // autoencoder.factor
        whole = shared_norms.gather(autoencoder, norms, z)
        alone = [shared_norms.gather(autoencoder, norms, z[..., :side, left:][..., :side]) for left in (0, side)]
        with shared_norms.shared_norms(autoencoder, z, apply, ticks.append):
            for norm in norms:  # two numbers in each group tell which mean and variance it takes
                x = torch.tensor([0.0, 1.0]).expand(1, norm.num_channels, 1, 2)
                low, high = norm(x).unflatten(1, (norm.num_groups, -1)).mean((2, 3)).unbind(-1)
                shared.append((-low / (high - low), (high - low) ** -2))

    def error(of_tiles):
        far = [
            torch.cat([(m - mean) / variance.sqrt(), (v / variance).sqrt() - 1])
            for found in of_tiles
            for (m, v), (mean, variance) in zip(found, whole, strict=True)
        ]
        return torch.cat(far).abs().mean().item()

    assert error([shared]) < 0.5 * error(alone)
    assert len(ticks) == 2
    assert all(norm.forward.__func__ is torch.nn.GroupNorm.forward for norm in norms)


def test_norms_that_see_a_constant_are_shared_too():
    """A group whose channels do not vary has no variance to extrapolate from: its norm gives zeros, and no NaN."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderParams(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4))
    z = torch.full((1, 4, 40, 40), 0.5)
    torch.nn.init.zeros_(autoencoder.decoder.conv_in.weight)
    with torch.no_grad(), shared_norms.shared_norms(autoencoder, z, apply := Tiles(32, autoencoder)):
        assert apply(autoencoder.decode, [z], autoencoder.factor).isfinite().all()


def test_the_tile_of_the_autoencoder_is_the_one_with_the_least_arithmetic_that_fits():
    """By hand: without attention the whole picture, else tiles; never more than fits, never less than 4 tokens."""
    flux = Room(free=1e9, alive=1e4, linear=1e9, quadratic=0.0)
    assert flux.side(296, 222) == 296  # 657 million bytes
    assert replace(flux, free=6e8).side(296, 222) < math.sqrt(6e4)
    assert replace(flux, free=0).side(296, 222) == 8
    assert 64 <= replace(flux, quadratic=1e6).side(296, 222) < 70  # the context that it keeps
    assert flux.flops(100, 50, 100) == 5000 * 1e9
    assert replace(flux, quadratic=2.0).flops(100, 50, 60) == 2 * (60 * 50 * 1e9 + (60 * 50) ** 2 * 2.0)
    for free in (1e8, 1e7):
        for n in (1e4, 1e6):
            room = replace(flux, free=free, quadratic=1e5)
            k = room.sample(n)
            assert k * room.alive <= free and k * room.linear + k * k * room.quadratic <= 0.5 * n * room.linear * 1.001
    area = [flux.flops(n, n, flux.side(n, n), shared=True) / n**2 for n in (300, 600, 1200, 2400)]
    assert max(area) < 2 * area[0]  # time grows with the area, to the overlap of tiles and the shared norms


def test_the_autoencoder_has_tiles_of_its_own():
    """Seen from the networks: the encoder and the decoder get the whole picture, the transformer its tiles."""
    seen = []

    class Coder(torch.nn.Module):
        factor, decoder = 2, torch.nn.Identity()

        def encode(self, x):
            seen.append(("encode", *x.shape[-2:]))
            return F.avg_pool2d(x, 2)

        def decode(self, z):
            seen.append(("decode", *z.shape[-2:]))
            return F.interpolate(z, scale_factor=2.0)

    def flux(img, *_):
        seen.append(("step", img.shape[1]))
        return img * 0

    ticks = []
    apply = Tiles(32, Coder(), ticks.append, Room(1e9, 1.0, 1.0, 0.0))
    restore(torch.zeros(1, 3, 64, 96), flux, Coder(), PROMPT, BRIDGE, 1, apply=apply)
    assert seen[0] == ("encode", 64, 96) and seen[-1] == ("decode", 32, 48)
    assert [s for s in seen if s[0] == "step"] == [("step", 64)] * 12
    assert len(seen) == len(ticks) == apply.passes(96, 64, 1, "euler")
    assert list(dict.fromkeys(ticks)) == ["encoding", "restoring", "decoding"]
