"""The method: signs, schedules, packing, the whole official edit; each against golden numbers or a known solution."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext_min import flow
from kontext_min.checkpoints import load_autoencoder, load_flux
from kontext_min.data import BucketSampler, to_float, to_tensor
from kontext_min.flow import Objective, Prompt
from kontext_min.restore import restore

GOLDEN = Path(__file__).parent / "golden"


def test_schedules_are_the_official_ones():
    cases = json.loads((GOLDEN / "schedules.json").read_text())["cases"]
    assert len(cases) > 10
    for case in cases:
        t = 1 - flow.schedule(case["steps"], case["image_seq_len"])
        assert (t - torch.tensor(case["bfl_timesteps"], dtype=torch.float64)).abs().max() <= 1e-6
        assert (t - torch.tensor(case["diffusers_sigmas"], dtype=torch.float64)).abs().max() <= 1e-6
    even = flow.schedule(4, 4096, shift=False)
    assert even.tolist() == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match="expected at least 1"):
        flow.schedule(0, 256)


def test_packing_and_ids():
    units = load_file(GOLDEN / "units.safetensors")
    assert torch.equal(flow.pack(units["pack.latent"]), units["pack.packed"])
    h, w = units["pack.latent"].shape[-2:]
    assert torch.equal(flow.unpack(units["pack.packed"], h, w), units["pack.latent"])
    assert torch.equal(flow.token_ids(6, 10)[0], units["ids.img_6x10_latent"].reshape(-1, 3).float())
    assert torch.equal(flow.token_ids(6, 10, index=1)[0], units["ids.context_6x10_latent"].reshape(-1, 3).float())


def test_whole_official_edit():
    """BFL's Kontext edit from picture and noise to picture, 1e-4 as the official libraries agree."""
    io = load_file(GOLDEN / "kontext_e2e.io.safetensors")
    info = json.loads((GOLDEN / "kontext_e2e.json").read_text())
    flux = load_flux(GOLDEN / "flux_tiny.bfl.safetensors")
    ae = load_autoencoder(GOLDEN / "ae_tiny.bfl.safetensors", dtype=torch.float32)
    prompt = Prompt(io["txt"], io["y"], torch.full((1,), info["guidance"]))
    reference = to_float(to_tensor(Image.fromarray(io["ref_image_uint8_hwc"].numpy())))[None]
    control = ae.encode(reference)
    assert (control - io["ref_z"]).abs().max() <= 2e-5
    noise, kontext = io["noise_latent"], Objective("kontext")
    sigmas = flow.schedule(info["steps"], io["img_ids"].shape[-2])
    assert (1 - sigmas - io["timesteps"]).abs().max() <= 1e-6
    z = flow.integrate(lambda x, s: flow.velocity(flux, x, s, control, prompt, kontext), noise, sigmas)
    assert (z - io["out_latent"]).abs().max() <= 1e-4
    assert (ae.decode(z) - io["out_image"]).abs().max() <= 1e-4


def official_euler(flux, x: torch.Tensor, timesteps: list[float]) -> torch.Tensor:
    """sampling.py `denoise`, written out: x <- x + (t_next - t) flux(x, t), t from 1 to 0."""
    for t, t_next in zip(timesteps[:-1], timesteps[1:], strict=True):
        x = x + (t_next - t) * flux(x, t)
    return x


def perfect_flux(source: torch.Tensor, target: torch.Tensor, start_time: float = 1.0):
    """A network that knows the answer in Flux's own sign: (noise side - data side) / T for every token and time."""

    def call(img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        answer = flow.pack((source - target) / start_time)
        return torch.cat([answer, torch.full_like(img[:, answer.shape[1] :], 1e3)], dim=1)  # reference tokens: dropped

    return call


PROMPT = Prompt(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.ones(2))


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(context=True),
        Objective(source_noise=0.3),
        Objective(start_time=0.4),
        Objective("kontext"),
    ],
)
def test_a_perfect_velocity_carries_the_degraded_latent_to_the_clean_one(solver, steps, objective):
    torch.manual_seed(0)
    control, target, eps = torch.randn(3, 2, 4, 6, 8).unbind()
    source = objective.source(control, eps)
    flux = perfect_flux(source, target, objective.start_time)
    sigmas = flow.schedule(steps, 12, shift=objective.name == "kontext")
    end = flow.integrate(lambda x, s: flow.velocity(flux, x, s, control, PROMPT, objective), source, sigmas, solver)
    assert (end - target).abs().max() <= 1e-5
    t = (objective.start_time * (1 - sigmas)).tolist()
    tokens = (2, 12, 16)
    official = official_euler(
        lambda x, t: flux(x, None, None, None, t, None), flow.pack(source).reshape(tokens), t
    )  # the official loop, with Flux's own sign and clock, ends at the same place
    assert (flow.unpack(official, 6, 8) - target).abs().max() <= 1e-5


def test_the_velocity_is_the_derivative_of_the_path():
    """And the path leads from the source to the target."""
    torch.manual_seed(0)
    source, target, eps = torch.randn(3, 3, 4, 6, 8, dtype=torch.float64).unbind()
    at = lambda s: flow.path(source, target, eps, torch.full((3, 1, 1, 1), s, dtype=torch.float64))  # noqa: E731
    assert torch.equal(at(0.0)[0], source) and torch.equal(at(1.0)[0], target)
    for s in (0.1, 0.5, 0.9):
        slope = (at(s + 1e-5)[0] - at(s - 1e-5)[0]) / 2e-5
        assert (slope - at(s)[1]).abs().max() < 1e-8


def test_the_path_is_a_straight_line():
    """The one test that holds it; another path needs another."""
    source, target, eps = torch.randn(3, 2, 4, 6, 8).unbind()
    x, v = flow.path(source, target, eps, torch.full((2, 1, 1, 1), 0.25))
    assert torch.equal(x, 0.75 * source + 0.25 * target) and torch.equal(v, target - source)


def test_the_degraded_end_is_sigma_zero_and_time_one():
    """What the network is told: t = T (1 - sigma); and what is returned has the opposite sign."""
    seen = []

    def flux(img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        seen.append((timesteps.tolist(), img.shape[1], img_ids[0, :, 0].unique().tolist()))
        return torch.ones_like(img)

    x = torch.zeros(2, 4, 4, 4)
    v = flow.velocity(flux, x, torch.tensor([0.0, 0.25]), x, PROMPT, Objective())
    assert seen[-1] == ([1.0, 0.75], 4, [0.0])
    assert torch.equal(v, -torch.ones_like(x))
    v = flow.velocity(flux, x, torch.tensor([0.0, 1.0]), x, PROMPT, Objective(context=True, start_time=0.5))
    assert seen[-1] == ([0.5, 0.0], 8, [0.0, 1.0])
    assert torch.equal(v, -0.5 * torch.ones_like(x))


def test_first_kontext_euler_step_equals_the_official_one():
    io = load_file(GOLDEN / "kontext_e2e.io.safetensors")
    flux = load_flux(GOLDEN / "flux_tiny.bfl.safetensors")
    guidance = torch.full((1,), json.loads((GOLDEN / "kontext_e2e.json").read_text())["guidance"])
    t, t_next = io["timesteps"][:2].tolist()
    tokens = torch.cat([io["noise_packed"], io["ref_seq"]], dim=1)
    ids = torch.cat([io["img_ids"], io["ref_ids"]], dim=1)
    pred = flux(tokens, ids, io["txt"], io["txt_ids"], torch.tensor([t]), io["y"], guidance)
    official = io["noise_packed"] + (t_next - t) * pred[:, : io["noise_packed"].shape[1]]
    noise, prompt = io["noise_latent"], Prompt(io["txt"], io["y"], guidance)
    sigmas = torch.tensor([1 - t, 1 - t_next], dtype=torch.float64)
    ours = flow.integrate(
        lambda x, s: flow.velocity(flux, x, s, io["ref_z"], prompt, Objective("kontext")), noise, sigmas
    )
    assert (flow.pack(ours) - official).abs().max() <= 1e-5


def test_loss_is_zero_for_a_perfect_network_and_known_for_a_blind_one():
    torch.manual_seed(0)
    control, target, eps = torch.randn(3, 2, 4, 6, 8).unbind()
    for objective in (Objective(source_noise=0.2), Objective("kontext")):
        source = objective.source(control, eps)
        sigma = torch.tensor([0.2, 0.7])
        _, v = flow.path(source, target, eps, sigma[:, None, None, None])
        perfect = flow.loss(perfect_flux(torch.zeros_like(v), v), control, target, eps, sigma, PROMPT, objective)
        assert perfect.max() <= 1e-10
        blind = flow.loss(lambda img, *_: torch.zeros_like(img), control, target, eps, sigma, PROMPT, objective)
        assert torch.allclose(blind, v.square().mean(dim=(1, 2, 3)))
        # the source's noise is in x AND in v: the blind loss of the noisy bridge exceeds the plain one by its variance
    plain = flow.loss(lambda img, *_: torch.zeros_like(img), control, target, eps, sigma, PROMPT, Objective())
    noisy = flow.loss(
        lambda img, *_: torch.zeros_like(img), control, target, eps, sigma, PROMPT, Objective(source_noise=1.0)
    )
    assert (noisy > plain).all()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge_with_their_order(solver, order):
    """dx/ds = x cos(s): x(1) = exp(sin 1). Halving the step divides the error by 2^order."""
    x = torch.ones(1, dtype=torch.float64)
    errors = []
    for steps in (32, 64):
        end = flow.integrate(lambda x, s: x * math.cos(s), x, flow.schedule(steps, 256, shift=False), solver)
        errors.append(abs(end.item() - math.exp(math.sin(1))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


# ------------------------------------------------------------------------------------------------------ random places


def test_densities_against_their_definitions():
    u = (torch.arange(200_000) + 0.5) / 200_000
    t = {name: 1 - density(u, 4096).double() for name, density in flow.SIGMA_DENSITIES.items()}
    for values in t.values():
        assert values.min() >= -1e-6
        assert values.max() <= 1 + 1e-6
    assert torch.allclose(t["uniform"], 1 - u.double())
    logit = torch.logit(t["logit-normal"].clamp(1e-9, 1 - 1e-9))
    assert logit.mean().abs() < 1e-2
    assert logit.std() == pytest.approx(1, abs=1e-2)
    cosine = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    assert torch.allclose(t["mode"].float(), cosine, atol=1e-6)
    assert torch.allclose(t["shift"], flow.shift_time(1 - u.double(), 4096), atol=1e-6)
    at_source = t["source"] == 1
    assert at_source.double().mean() == pytest.approx(0.75, abs=1e-4)
    assert t["source"][~at_source].mean() == pytest.approx(0.5, abs=1e-4)


def test_weights_against_their_definitions():
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = 1 - sigma
    assert torch.equal(flow.WEIGHTINGS["uniform"](sigma), torch.ones_like(t))
    assert torch.allclose(flow.WEIGHTINGS["sigma-sqrt"](sigma), t.clamp(min=0.05) ** -2)
    assert torch.allclose(flow.WEIGHTINGS["cosmap"](sigma), 2 / (math.pi * (1 - 2 * t + 2 * t**2)))
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert flow.WEIGHTINGS["clean"](grid).mean().item() == pytest.approx(1, abs=1e-4)


def test_draws_depend_on_seed_step_and_position_alone():
    both, u = flow.draw(1, 5, [0, 1], (4, 6, 8), 3)
    second, v = flow.draw(1, 5, [1], (4, 6, 8), 3)
    assert torch.equal(both[1:], second)
    assert torch.equal(u[1:], v)
    for other in [(2, 5, [1]), (1, 6, [1]), (1, 5, [2])]:
        assert not torch.equal(flow.draw(*other, (4, 6, 8), 3)[0], second)


def test_each_step_covers_the_path_and_each_place_sees_all_of_it():
    """Stratified over the step, uniform for every place in the batch."""
    u = torch.stack([flow.draw(0, step, range(8), (1, 1, 1), 8)[1] for step in range(500)])  # (steps, places)
    assert torch.equal((u * 8).long().sort(dim=1).values, torch.arange(8).expand(500, 8))
    assert (u.mean(dim=0) - 0.5).abs().max() < 0.06  # four deviations of the mean of 500 uniform numbers
    assert (u.var(dim=0) - 1 / 12).abs().max() < 0.02


@pytest.mark.parametrize(
    ("batch", "accumulate", "world"), [(1, 1, 1), (1, 4, 1), (2, 3, 1), (4, 1, 1), (4, 2, 2), (3, 1, 2)]
)
def test_every_picture_is_trained_along_the_whole_path(batch, accumulate, world):
    """Uniform u for each picture of buckets of 1, 3 and 5, and for each place in a step, as the loop draws it.

    The largest distance of a distribution of n draws from its true one exceeds e with a probability of at most
    2 exp(-2 n e^2) (Dvoretzky, Kiefer, Wolfowitz; Massart 1990); strata only lower it. 1e-9 for each of some hundred
    distributions gives e = sqrt(ln(2e9) / 2n), 0.19 at n = 300. A place that is tied to its stratum, of an even
    number of strata, is off by 0.5 at least, and a picture that stands alone at the first of four tied places by 0.75.
    """
    bucket_of, total = [0] + [1] * 3 + [2] * 5, batch * accumulate * world
    samplers = [BucketSampler(bucket_of, batch, seed=1, rank=rank, world=world) for rank in range(world)]
    batches = [iter(sampler) for sampler in samplers]
    of_picture, of_place = defaultdict(list), defaultdict(list)
    for step in range(-(-300 * samplers[0].batches_per_epoch // accumulate)):
        for micro in range(accumulate):
            for rank in range(world):
                first = (micro * world + rank) * batch
                places = range(first, first + batch)
                _, u = flow.draw(1, step, places, (1, 1, 1), total)
                for place, (_, picture), value in zip(places, next(batches[rank]), u.tolist(), strict=True):
                    of_picture[picture].append(value)
                    of_place[place].append(value)
    assert len(of_picture) == 9 and len(of_place) == total
    for draws in (*of_picture.values(), *of_place.values()):
        u, n = np.sort(draws), len(draws)
        distance = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
        assert n >= 300 and distance < math.sqrt(math.log(2e9) / (2 * n))


def test_start_time_matches_the_strength_of_the_degradation():
    control, target = torch.full((1, 4, 2, 2), 0.5), torch.zeros(1, 4, 2, 2)
    assert flow.start_time(control, target) == pytest.approx(0.5 / 1.5)
    assert flow.start_time(target, target, source_noise=1.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "bad", [{"name": "both"}, {"name": "kontext", "source_noise": 0.1}, {"source_noise": -1.0}, {"start_time": 0.0}]
)
def test_objectives_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"objective|--source-noise|--start-time"):
        Objective(**bad)


def test_restore_keeps_the_size_of_any_picture():
    flux = load_flux(GOLDEN / "flux_tiny.bfl.safetensors")
    ae = load_autoencoder(GOLDEN / "ae_tiny.bfl.safetensors", dtype=torch.float32)
    prompt = Prompt(torch.zeros(1, 3, 40), torch.zeros(1, 24), torch.ones(1))
    for height, width in ((33, 50), (16, 16), (7, 90)):
        image = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, height, width)).astype(np.float32))
        assert restore(image, flux, ae, prompt, Objective(), steps=1).shape == image.shape


def test_only_what_enters_the_network_is_bfloat16(monkeypatch):
    """Under a bfloat16 prompt time, guidance, positions, the point on the path, sigma and the loss are float32."""
    units, seen = load_file(GOLDEN / "units.safetensors"), []

    def flux(img, img_ids, txt, txt_ids, timesteps, y, guidance):
        seen.append((img, img_ids, txt_ids, timesteps, guidance))
        return torch.full_like(img, 0.1)

    true_velocity = flow.velocity
    points = []

    def velocity(flux, x, sigma, *args):
        points.append((x, sigma))
        return true_velocity(flux, x, sigma, *args)

    monkeypatch.setattr(flow, "velocity", velocity)
    control, target, eps = torch.randn(3, 2, 4, 6, 10, generator=torch.Generator().manual_seed(0)).unbind()
    prompt = Prompt(torch.zeros(2, 5, 4).bfloat16(), torch.zeros(2, 4).bfloat16(), torch.tensor([2.5, 1.7]))
    sigma = torch.tensor([0.2969, 0.0001])
    loss = flow.loss(flux, control, target, eps, sigma, prompt, Objective(start_time=0.9))
    img, img_ids, txt_ids, t, guidance = seen[0]
    x, s = points[0]
    assert img.dtype == torch.bfloat16
    assert img_ids.dtype == txt_ids.dtype == t.dtype == guidance.dtype == x.dtype == s.dtype == torch.float32
    assert torch.equal(t, 0.9 * (1 - sigma)) and torch.equal(s, sigma) and torch.equal(guidance, prompt.guidance)
    assert torch.equal(img_ids, units["ids.img_6x10_latent"].expand(2, -1, -1))
    assert torch.equal(txt_ids, units["ids.txt_5"].expand(2, -1, -1))
    point, leads = flow.path(control, target, eps, sigma[:, None, None, None])
    assert torch.equal(x, point)
    assert torch.equal(img, flow.pack(x).bfloat16())
    v = -0.9 * torch.tensor(0.1).bfloat16().float()  # the answer is widened before anything is computed with it
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (v - leads).square().mean(dim=(1, 2, 3)), rtol=1e-6, atol=0)


def test_under_the_psnr_penalty_every_picture_counts_alike():
    """The gradient of each picture is that of its error divided by the error: of minus its PSNR, but for a factor."""
    x = torch.tensor([[0.1, -0.2], [1.0, 3.0]], requires_grad=True)
    error = x.square().mean(dim=1)
    (plain,) = torch.autograd.grad(flow.PENALTIES["mse"](error).sum(), x, retain_graph=True)
    (psnr,) = torch.autograd.grad(flow.PENALTIES["psnr"](error).sum(), x, retain_graph=True)
    torch.testing.assert_close(psnr, plain / (error + 1e-5)[:, None])
    (of_psnr,) = torch.autograd.grad((-10 * torch.log10(error)).sum(), x)
    torch.testing.assert_close(psnr, -of_psnr / 4.342945, rtol=1e-3, atol=0)
