"""Ten questions about Flux, each answered by breaking the thing in question on weights/tiny.

    python docs/experiments.py          all ten; writes docs/questions.json and the tables of docs/questions.md
    python docs/experiments.py 4 9      these two; prints their tables and writes nothing

Each experiment is a function that calls the public functions of the core, first as they are meant and then with one
thing broken: mostly a network, or its positions, time or prompt, put between `flow` and `flux`. The pictures are crops
of tests/photos, which weights/tiny has not seen. Restored are other crops than those that a LoRA trains on.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from kontext_min import checkpoints, degrade, flow, flux
from kontext_min.autoencoder import Autoencoder
from kontext_min.data import to_float, to_tensor
from kontext_min.extras import prompts
from kontext_min.extras.base import Weights
from kontext_min.flow import Network, Objective, Prompt
from kontext_min.lora import add_lora, lora_layers
from kontext_min.restore import decode
from kontext_min.t5 import T5Tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"
PAGE, NUMBERS = ROOT / "docs" / "questions.md", ROOT / "docs" / "questions.json"
GUIDANCE = 1.5  # with which weights/tiny was trained
BRIDGE, KONTEXT = Objective("bridge"), Objective("kontext")
NOISE = ("noise=0.08", degrade.PROMPTS["denoise"])  # the base restores this
STRONG = ("noise=0.2", degrade.PROMPTS["denoise"])
FADE = ("fade=0.5/0.3", "Restore the faded photo.")  # the base has to learn this
OLD = ("fade=0.5/0.3,noise=0.1", FADE[1])
LARGE = 4096  # tokens of a picture of 1024 x 1024: mu = 1.15
PLACES = (0.0, 0.25, 0.5, 0.75, 0.95)  # on the path
WORDS = 8  # tokens of the prompt in trainings and wherever their LoRAs are used; a whole prompt has 32
STEPS, RATE = 80, 6e-3  # of a training: so few steps need a large learning rate
Table = dict[str, dict[str, float]]  # row -> column -> value; the first row is the right way

# ------------------------------------------------------------------------------- pictures, prompts, a short training


@dataclass(frozen=True, eq=False)
class Pairs:
    """Crops of photographs, degraded and clean, and their latents (N, C, h, w)."""

    degraded: list[Image.Image]
    clean: list[Image.Image]
    control: Tensor
    target: Tensor


@cache
def autoencoder() -> Autoencoder:
    """The autoencoder of weights/tiny."""
    return checkpoints.load_autoencoder(TINY, dtype=torch.float32)


def base() -> flux.Flux:
    """The transformer of weights/tiny, loaded again."""
    return checkpoints.load_flux(TINY, dtype=torch.float32)


@cache
def encoded(text: str) -> prompts.Encoded:
    """What the text encoders make of a prompt."""
    return prompts.encode([text], Weights(TINY), None, torch.float32, "cpu")


def prompt(text: str, count: int, guidance: float = GUIDANCE, tokens: int | None = None) -> Prompt:
    """The same prompt for `count` pictures, cut to its first tokens if `tokens` says how many."""
    whole = prompts.batch(encoded(text), [text] * count, guidance, torch.float32, "cpu")
    return replace(whole, txt=whole.txt[:, :tokens])


@cache
def photos() -> list[Image.Image]:
    """The test photographs at half their size."""
    return [Image.open(path).convert("RGB").reduce(2) for path in sorted((ROOT / "tests" / "photos").glob("*.jpg"))]


@cache
def pairs(spec: str, side: int, count: int, seed: int) -> Pairs:
    """`count` random crops of `side` pixels, as many of each photograph."""
    rng, make = np.random.default_rng(seed), degrade.parse(spec)
    clean = []
    for k in range(count):
        photo = photos()[k % len(photos())]
        x, y = (int(rng.integers(length - side)) for length in photo.size)
        clean.append(photo.crop((x, y, x + side, y + side)))
    degraded = [make(image, rng) for image in clean]
    with torch.no_grad():
        latents = [autoencoder().encode(torch.stack([to_float(to_tensor(i)) for i in x])) for x in (degraded, clean)]
    return Pairs(degraded, clean, *latents)


def fit(params: list[Tensor], loss: Callable[[int], Tensor], steps: int, lr: float, warmup: int = 10) -> None:
    """Minimize loss(step) by AdamW, with a linear warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0)
    for step in range(steps):
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 1.5 * (1 - step / steps), 1)
        optimizer.step()
        optimizer.zero_grad()


def train(
    objective: Objective,
    task: tuple[str, str],
    steps: int = STEPS,
    lr: float = RATE,
    sigma: Callable[[Tensor], Tensor] = lambda u: u,
    network: Callable[[Network], Network] = lambda f: f,
    model: flux.Flux | None = None,
    guidance: float = GUIDANCE,
    alpha: float | None = None,
    warmup: int = 10,
    seed: int = 0,
    tokens: int | None = WORDS,
) -> flux.Flux:
    """A LoRA on the base, or that of a `model` which has one already; `network` may break what the loss sees.

    It sees crops of 16 pixels and the first `tokens` of the prompt: a step then takes a tenth of a second.
    """
    (spec, text), batch = task, 16
    data, words = pairs(spec, 16, 256, seed=0), prompt(text, batch, guidance, tokens)
    model = model or with_lora(alpha, seed=seed)
    chosen = np.random.default_rng(seed)

    def error(step: int) -> Tensor:
        rows = torch.from_numpy(chosen.choice(len(data.target), batch, replace=False))
        eps, u = flow.draw(seed, step, range(batch), data.target.shape[1:], batch)
        return flow.loss(network(model), data.control[rows], data.target[rows], eps, sigma(u), words, objective).mean()

    fit([p for p in model.parameters() if p.requires_grad], error, steps, lr, warmup)
    return model


def with_lora(alpha: float | None = None, targets: str = "attention-mlp", seed: int = 0) -> flux.Flux:
    """The base with an untrained LoRA of rank 16."""
    model = base()
    add_lora(model, 16, alpha, targets, seed)
    return model


@torch.no_grad()
def sample(network: Network, x: Tensor, control: Tensor, text: Prompt, objective: Objective, sigmas: Tensor,
           solver: str = "euler") -> Tensor:  # fmt: skip
    """The latents at the last of the sigmas, from x at the first."""
    return flow.integrate(lambda x, s: flow.velocity(network, x, s, control, text, objective), x, sigmas, solver)


def texture(z: Tensor, data: Pairs) -> float:
    """The energy of the Laplacian in all decoded pictures, relative to that in the clean ones."""
    restored = decode(autoencoder(), z, data.clean[0].size)
    energy = []
    for pictures in (restored, torch.stack([to_tensor(image) for image in data.clean])):
        x = to_float(pictures)  # (N, 3, H, W)
        around = x[..., 2:, 1:-1] + x[..., :-2, 1:-1] + x[..., 1:-1, 2:] + x[..., 1:-1, :-2]
        energy.append((around - 4 * x[..., 1:-1, 1:-1]).square().sum().item())
    return energy[0] / energy[1]


def gain(z: Tensor, data: Pairs) -> float:
    """10 log10(|degraded - clean|^2 / |z - clean|^2) of the latents, in dB; 0: nothing is restored."""
    before, after = ((x - data.target).square().mean().item() for x in (data.control, z))
    return 10 * math.log10(before / after)


def put_between(network: Network, **change: Callable[[Tensor], Tensor]) -> Network:
    """A network that sees another img, img_ids, t or guidance, or whose output is changed (out)."""

    def changed(img, img_ids, txt, txt_ids, t, y, guidance):  # noqa: ANN001, ANN202, the signature of flux.Flux
        seen = {"img": img, "img_ids": img_ids, "t": t, "guidance": guidance}
        seen = {name: change[name](x) if name in change else x for name, x in seen.items()}
        out = network(seen["img"], seen["img_ids"], txt, txt_ids, seen["t"], y, seen["guidance"])
        return change["out"](out) if "out" in change else out

    return changed


def relative(x: Tensor, right: Tensor) -> float:
    """|x - right| / |right|."""
    return ((x - right).norm() / right.norm()).item()


# ---------------------------------------------------------------------------------- LoRAs that experiments share

PARTS = {"random": (0, 1), "source half": (0, 0.5), "clean half": (0.5, 1), "start only": (0, 0)}  # of sigma


@cache
def fade_lora(part: str = "random", **change: float | None) -> flux.Flux:
    """A bridge LoRA that brings faded colors back, trained on a part of the path."""
    low, high = PARTS[part]
    return train(BRIDGE, FADE, sigma=lambda u: low + (high - low) * u, **change)


def fade_gain(
    network: Network, steps: int = 1, solver: str = "euler", objective: Objective = BRIDGE, tokens: int | None = WORDS
) -> float:
    """The gain of a bridge on faded crops that no LoRA has seen."""
    data = pairs(FADE[0], 32, 64, seed=1)
    words, sigmas = prompt(FADE[1], 64, tokens=tokens), flow.schedule(steps, 1, shift=False)
    return gain(sample(network, data.control, data.control, words, objective, sigmas, solver), data)


@cache
def kontext_lora(density: str = "shift", index: int = 1) -> flux.Flux:
    """A LoRA on all Linears that starts from noise and sees the degraded picture as reference tokens."""
    sigma, network = flow.SIGMA_DENSITIES[density], partial(put_between, img_ids=partial(with_index, index=index))
    model = with_lora(targets="all")
    return train(KONTEXT, STRONG, 100, 1e-2, sigma=lambda u: sigma(u, LARGE), network=network, model=model)


def kontext_gain(network: Network, sigmas: Tensor) -> float:
    """The gain of a sample from noise, the degraded crops as its reference."""
    data = pairs(STRONG[0], 16, 64, seed=1)
    eps, _ = flow.draw(2, 0, range(64), data.target.shape[1:], 64)
    words = prompt(STRONG[1], 64, tokens=WORDS)
    return gain(sample(network, eps, data.control, words, KONTEXT, sigmas), data)


def with_index(ids: Tensor, index: int) -> Tensor:
    """Positions (B, L, 3) with another index of the reference tokens."""
    return torch.cat([torch.where(ids[..., :1] == 1, float(index), ids[..., :1]), ids[..., 1:]], dim=-1)


def moved(ids: Tensor, column: int) -> Tensor:
    """Positions (B, L, 3) with the reference tokens some columns further to the right."""
    return ids + (ids[..., :1] == 1) * torch.tensor([0.0, 0.0, float(column)])


def corrections(model: flux.Flux) -> tuple[Tensor, float]:
    """All (alpha / rank) B A of a LoRA in one vector, and the mean of their size relative to the weight's."""
    layers = [(x.scale * x.lora_B.float() @ x.lora_A.float(), x.base.weight) for x in lora_layers(model).values()]
    sizes = [(change.norm() / weight.norm()).item() for change, weight in layers]
    return torch.cat([change.flatten() for change, _ in layers]).detach(), float(np.mean(sizes))


# --------------------------------------------------------------------------------------------------- the experiments


def signs() -> Table:
    """One step of the base with one convention flipped, then with all of them."""
    data, model, text = pairs(NOISE[0], 64, 16, seed=1), base(), prompt(NOISE[1], 16)
    run = partial(sample, x=data.control, control=data.control, text=text, objective=BRIDGE)
    sigmas = flow.schedule(1, 1, shift=False)

    @torch.no_grad()
    def official(x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the official code: Flux's own sign and time."""
        return -flow.velocity(model, x, 1 - t, data.control, text, BRIDGE)

    return {
        "as in flow.py": {"gain": gain(run(model, sigmas=sigmas), data)},
        "sign: v_pred = +flux": {"gain": gain(run(put_between(model, out=torch.neg), sigmas=sigmas), data)},
        "time: t = sigma": {"gain": gain(run(put_between(model, t=lambda t: 1 - t), sigmas=sigmas), data)},
        "steps from sigma = 1 to 0": {"gain": gain(run(model, sigmas=sigmas.flip(0)), data)},
        "all three: dx/dt = flux, t from 1 to 0": {
            "gain": gain(flow.integrate(official, data.control, 1 - sigmas), data)
        },
    }


def shift() -> Table:
    """The schedule and the density of the training, each shifted as for a picture of LARGE tokens, and not."""
    return {
        f"trained {density}, sampled {name}": {
            f"gain, {n} steps": kontext_gain(kontext_lora(density), flow.schedule(n, LARGE, shifted)) for n in (4, 12)
        }
        for density in ("shift", "uniform")
        for name, shifted in (("shifted", True), ("plain", False))
    }


def guidance() -> Table:
    """Distil guidance into a LoRA, as the dev models were distilled; then train it on data with one value of it.

    The teacher takes two passes: v(g) = v(without) + g (v(with) - v(without)). Without the prompt is the base, which
    leaves faded colors alone; with the prompt is a LoRA that restores them. The student is another LoRA. It learns v(g)
    in one pass, from the guidance embedding alone.
    """
    values = (1.0, 1.5, 2.5)
    seen, new = (pairs(FADE[0], 16, 128, seed) for seed in (0, 1))
    start = torch.tensor(0.0)

    def velocity(network: Network, data: Pairs, g: float = GUIDANCE) -> Tensor:
        return flow.velocity(network, data.control, start, data.control, prompt(FADE[1], 128, g, WORDS), BRIDGE)

    def row(of: Callable[[float], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            return {f"gain at g = {g}": gain(new.control + of(g), new) for g in values}

    networks = base(), fade_lora()
    with torch.no_grad():
        teacher = {data: [velocity(network, data) for network in networks] for data in (seen, new)}
    student, words = with_lora(targets="all"), prompt(FADE[1], 16, tokens=WORDS)

    def distil(step: int) -> Tensor:
        rng = np.random.default_rng(step)
        rows, g = torch.from_numpy(rng.choice(128, 16, replace=False)), torch.from_numpy(rng.uniform(1, 3, 16)).float()
        without, with_prompt = (v[rows] for v in teacher[seen])
        wanted = without + g[:, None, None, None] * (with_prompt - without)
        x = seen.control[rows]
        return (flow.velocity(student, x, start, x, replace(words, guidance=g), BRIDGE) - wanted).square().mean()

    fit([p for p in student.parameters() if p.requires_grad], distil, 120, 1e-2)
    without, with_prompt = teacher[new]
    table = {
        "teacher, two passes": row(lambda g: without + g * (with_prompt - without)),
        "distilled, one pass": row(lambda g: velocity(student, new, g)),
    }
    distilled = {name: x.clone() for name, x in student.state_dict().items()}
    for g in values[1:]:
        student.load_state_dict(distilled)
        train(BRIDGE, FADE, 40, 2e-3, sigma=torch.zeros_like, model=student, guidance=g)
        table[f"distilled, then trained on data at g = {g}"] = row(lambda g: velocity(student, new, g))
    return table


def padding() -> Table:
    """The prompt without its padding, which equals a mask: in Flux alone, then in T5 too; longer padding."""
    data, model, text = pairs(NOISE[0], 64, 16, seed=1), base(), prompt(NOISE[1], 16)
    tokenizer, t5 = T5Tokenizer(TINY / "tokenizer_2"), checkpoints.load_t5(TINY, dtype=torch.float32)
    length = prompts.max_length(Weights(TINY))
    ids = tokenizer([NOISE[1]], length)  # (1, L_txt), padded with 0
    words = int((ids != 0).sum())
    table, right = {}, None
    with torch.no_grad():
        states = {
            "as trained: padded, no mask": t5(ids),
            "padding masked in Flux": t5(ids)[:, :words],
            "padding masked in T5 and Flux": t5(ids[:, :words]),
            "padded to half the length": t5(tokenizer([NOISE[1]], length // 2)),
            "padded to 8 times the length": t5(tokenizer([NOISE[1]], 8 * length)),
        }
        for name, txt in states.items():
            v = velocity_at(model, data, replace(text, txt=txt.expand(16, -1, -1)), 0.0)
            right = v if right is None else right
            table[name] = {"change of the velocity": relative(v, right), "gain": gain(data.control + v, data)}
    faded = pairs(FADE[0], 32, 64, seed=1)
    for name, trained in (("the padded prompt", None), (f"the first {WORDS} tokens", WORDS)):
        model = fade_lora(tokens=trained)
        with torch.no_grad():
            v = {n: velocity_at(model, faded, prompt(FADE[1], 64, tokens=n), 0.0) for n in (None, WORDS)}
        for other, sampled in (("padded", None), (f"{WORDS} tokens", WORDS)):
            row = {"change of the velocity": relative(v[sampled], v[trained])}
            table[f"LoRA trained on {name}, sampled with {other}"] = row | {"gain": fade_gain(model, tokens=sampled)}
    return table


@torch.no_grad()
def velocity_at(network: Network, data: Pairs, text: Prompt, sigma: float) -> Tensor:
    """Of a bridge, on the line from the degraded to the clean latent."""
    x, _ = flow.path(data.control, data.target, torch.zeros(()), torch.tensor(sigma))
    return flow.velocity(network, x, torch.tensor(sigma), data.control, text, BRIDGE)


@torch.no_grad()
def losses(network: Network, data: Pairs, text: str, objective: Objective) -> Tensor:
    """The mean loss of the pictures at each of PLACES on the path."""
    n = len(data.target)
    eps, _ = flow.draw(1, 0, range(n), data.target.shape[1:], n)
    words = prompt(text, n, tokens=WORDS)
    every = (torch.full((n,), sigma) for sigma in PLACES)
    return torch.stack([flow.loss(network, data.control, data.target, eps, s, words, objective).mean() for s in every])


def loss() -> Table:
    """The loss by sigma beside that of predicting no change; and two LoRAs of one loss that restore differently."""
    noisy, faded = (pairs(task[0], 16, 64, seed=1) for task in (STRONG, FADE))
    table: Table = {}

    def column(name: str, network: Network, data: Pairs, text: str, objective: Objective) -> None:
        none = losses(put_between(network, out=torch.zeros_like), data, text, objective)
        found = losses(network, data, text, objective)
        rows = {f"at sigma {s}": x.item() for s, x in zip(PLACES, found, strict=True)}
        rows = {"predicting no change": none.mean().item()} | rows | {"mean of the five": found.mean().item()}
        for row, value in (rows | {"deviation of a batch of 4": deviation(network, data, text, objective)}).items():
            table.setdefault(row, {})[name] = value

    column("bridge, noise", base(), noisy, STRONG[1], BRIDGE)
    column("kontext, noise", kontext_lora(), noisy, STRONG[1], KONTEXT)
    with of_equal_loss(faded) as pair:
        for part, model in pair.items():
            name = f"bridge of the {part}, fading"
            column(name, model, faded, FADE[1], BRIDGE)
            table.setdefault("gain of one step", {})[name] = fade_gain(model)
    return table


@torch.no_grad()
def deviation(network: Network, data: Pairs, text: str, objective: Objective) -> float:
    """The standard deviation of the loss between batches of 4 pictures, whose sigmas are drawn as in training."""
    found = []
    for k in range(16):
        eps, u = flow.draw(3, k, range(4), data.target.shape[1:], 4)
        pictures = (x[4 * k : 4 * k + 4] for x in (data.control, data.target))
        found.append(flow.loss(network, *pictures, eps, u, prompt(text, 4, tokens=WORDS), objective).mean())
    return torch.stack(found).std().item()


@contextmanager
def of_equal_loss(data: Pairs) -> Iterator[dict[str, flux.Flux]]:
    """LoRAs of the two halves of the path; the one of lower mean loss gets a strength at which both have the same."""
    measure = lambda model: losses(model, data, FADE[1], BRIDGE).mean().item()  # noqa: E731
    pair = {part: fade_lora(part) for part in ("source half", "clean half")}
    better, worse = sorted(pair, key=lambda part: measure(pair[part]))
    wanted, low, high = measure(pair[worse]), 0.0, 1.0
    for _ in range(7):  # the loss of a weaker LoRA is higher
        strength = (low + high) / 2
        with scaled(pair[better], strength):
            low, high = (strength, high) if measure(pair[better]) > wanted else (low, strength)
    with scaled(pair[better], high):
        yield pair


@contextmanager
def scaled(model: flux.Flux, strength: float) -> Iterator[flux.Flux]:
    """The LoRA at another strength for a while."""
    layers = lora_layers(model).values()
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= strength
    try:
        yield model
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scale = scale


def steps() -> Table:
    """Gain and texture by network evaluations, of a LoRA that trains at random times and of one at sigma = 0 alone."""
    data, words = pairs(OLD[0], 32, 32, seed=1), prompt(OLD[1], 32, tokens=WORDS)
    table: Table = {}
    for part, times in (("random", "random times"), ("start only", "sigma = 0")):
        low, high = PARTS[part]
        model = train(BRIDGE, OLD, sigma=lambda u, low=low, high=high: low + (high - low) * u)
        for solver, evaluations in {"euler": (1, 2, 4, 8), "midpoint": (2, 4, 8)}.items():
            for n in evaluations:
                sigmas = flow.schedule(n // flow.SOLVERS[solver], 1, shift=False)
                z = sample(model, data.control, data.control, words, BRIDGE, sigmas, solver)
                row = table.setdefault(f"{solver}, evaluations: {n}", {})
                row |= {f"gain, trained at {times}": gain(z, data), f"texture, trained at {times}": texture(z, data)}
    return table


def defaults() -> Table:
    """What is fixed by the weights, broken; and what is a choice, chosen otherwise."""
    data, model, text = pairs(NOISE[0], 64, 16, seed=1), base(), prompt(NOISE[1], 16)
    faded = pairs(FADE[0], 32, 64, seed=1)
    swap = lambda x: rearrange(x, "b l (c p) -> b l (p c)", p=4)  # noqa: E731
    back = lambda x: rearrange(x, "b l (p c) -> b l (c p)", p=4)  # noqa: E731
    anchored = replace(BRIDGE, start_time=flow.start_time(faded.control, faded.target))
    density = flow.SIGMA_DENSITIES["logit-normal"]

    def of_base(network: Network) -> dict[str, float]:
        z = sample(network, data.control, data.control, text, BRIDGE, flow.schedule(1, 1, shift=False))
        return {"gain of the base on noise": gain(z, data)}

    def of_lora(lora: flux.Flux, objective: Objective = BRIDGE) -> dict[str, float]:
        two = fade_gain(lora, 2, "midpoint", objective)
        return {"gain of a LoRA on fading": fade_gain(lora, objective=objective), "gain, 4 evaluations": two}

    return {
        "nothing broken": of_base(model) | of_lora(fade_lora()),
        "known: a token's numbers in another order": of_base(put_between(model, img=swap, out=back)),
        "known: time not times 1000": of_base(put_between(model, t=lambda t: t / 1000)),
        "guessed: --sigma logit-normal": of_lora(train(BRIDGE, FADE, sigma=lambda u: density(u, 0))),
        "guessed: --start-time auto": of_lora(train(anchored, FADE), anchored),
        "nothing broken, another seed": of_lora(train(BRIDGE, FADE, seed=1)),
    }


def lora() -> Table:
    """A LoRA that works, and six that do less or nothing: the size of the correction beside the weight's."""

    def row(model: flux.Flux) -> dict[str, float]:
        return {"correction / weight": corrections(model)[1], "gain": fade_gain(model)}

    model = fade_lora()
    other = base()
    other.single_blocks = torch.nn.ModuleList(reversed(other.single_blocks))
    add_lora(other, 16)
    values = {name: x for name, x in model.state_dict().items() if ".lora_" in name}
    assert not other.load_state_dict(values, strict=False).unexpected_keys
    table = {"trained, strength 1": row(model), "B at zero, as at the start": row(with_lora())}
    with scaled(model, 0.25):
        table["trained, strength 0.25"] = row(model)
    table["trained with alpha = rank / 16"] = row(fade_lora(alpha=1.0))
    table[f"learning rate {RATE / 60:g}, as many steps"] = row(fade_lora(lr=RATE / 60))
    table[f"warm-up of 2000 steps, stopped after {STEPS}"] = row(fade_lora(warmup=2000))
    table["on another base: its single blocks reversed"] = row(other)
    return table


def reference() -> Table:
    """The position of the reference tokens, and the output at them."""
    model, sigmas = kontext_lora(), flow.schedule(4, LARGE)
    at = lambda f, network=model: {"gain": kontext_gain(put_between(network, img_ids=f), sigmas)}  # noqa: E731
    kept = put_between(model, out=lambda out: out[:, out.shape[1] // 2 :])
    return {
        "index 1, same rows and columns": at(lambda ids: ids),
        "index 0, in sampling only": at(partial(with_index, index=0)),
        "index 0, in training too": at(partial(with_index, index=0), kontext_lora(index=0)),
        "one column to the right": at(partial(moved, column=1)),
        "right of the generated picture": at(
            partial(moved, column=int(pairs(STRONG[0], 16, 64, seed=1).target.shape[-1] // 2))
        ),
        "the reference's output instead of the picture's": {"gain": kontext_gain(kept, sigmas)},
    }


def precision() -> Table:
    """Rounded to bfloat16, one thing at a time: the error of the velocity, and what a LoRA learns."""
    data, model, text = pairs(NOISE[0], 64, 16, seed=1), base(), prompt(NOISE[1], 16)
    half = lambda x: x.bfloat16().float()  # noqa: E731
    exact = {sigma: velocity_at(model, data, text, sigma) for sigma in (0.137, 0.331, 0.719, 0.903)}

    def row(network: Network, text: Prompt = text) -> dict[str, float]:
        errors = [relative(velocity_at(network, data, text, sigma), v) for sigma, v in exact.items()]
        return {"error of the velocity": float(np.mean(errors))}

    rounded = put_between(model, t=lambda t: half(1000 * half(t)) / 1000)
    table = {"all in float32": row(model), "time in bfloat16": row(rounded)}
    rope = flux.rope
    with patch("kontext_min.flux.rope", lambda *args: half(rope(*args))):
        table["RoPE's cos and sin in bfloat16"] = row(model)
    narrow = replace(text, txt=text.txt.bfloat16(), y=text.y.bfloat16())
    table["weights and activations in bfloat16"] = row(base().bfloat16(), narrow)

    generator = torch.Generator().manual_seed(0)
    for width in (192, 3072):
        exact = None
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            model = with_lora()
            layers = lora_layers(model).values()
            for layer in layers:
                # A is uniform in +-1 / sqrt(in), so it is smaller in a wider network.
                layer.lora_A.data = (layer.lora_A.data * math.sqrt(192 / width)).to(dtype)
                layer.lora_B.data = layer.lora_B.data.to(dtype)
            start = torch.cat([layer.lora_A.detach().flatten() for layer in layers])
            sign = torch.randint(0, 2, start.shape, generator=generator) * 2 - 1
            lost = {u: ((start + u * sign).to(dtype) == start).float().mean().item() for u in (1e-4, 1e-5)}
            train(BRIDGE, FADE, 20, 1e-4, warmup=1, model=model)
            end = torch.cat([layer.lora_A.detach().flatten() for layer in layers])
            learned = corrections(model)[0]
            exact = learned if exact is None else exact
            table[f"LoRA in {name}, A as at width {width}"] = {
                **{f"A loses an update of {u:.0e}": share for u, share in lost.items()},
                "A after 20 steps: unchanged": (end == start).float().mean().item(),
                "error of B A": relative(learned, exact),
            }
    return table


# ------------------------------------------------------------------------------------------------ tables and numbers


@dataclass(frozen=True)
class Question:
    """A question of the page, its experiment and setting, and the two cells that stand at the head of the page."""

    text: str
    experiment: Callable[[], Table]
    setting: str  # the caption of the table: task, steps, size of the crops, units
    right: tuple[str, str]  # row, column
    broken: tuple[str, str]


G, CHANGE = "gain", "change of the velocity"  # columns
A_BASE = f"{NOISE[0]}; the base, 1 step, 16 crops of 64 pixels"
A_LORA = f"{FADE[0]}; LoRAs, 1 step, 64 crops of 32 pixels"
A_KONTEXT = f"{STRONG[0]}; LoRAs of `kontext` on all Linears, trained for 100 steps at 1e-2; 64 crops of 16 pixels"
QUESTIONS = {
    1: Question(
        "Which sign, which direction, which end is t = 1?", signs, f"{A_BASE}.",
        ("as in flow.py", G), ("sign: v_pred = +flux", G),
    ),
    2: Question(
        "Where does mu of the shift come from, and is it in training?", shift,
        f"{A_KONTEXT}. All shifts are those of {LARGE} tokens.",
        ("trained shift, sampled shifted", "gain, 12 steps"), ("trained uniform, sampled plain", "gain, 12 steps"),
    ),
    3: Question(
        "What is the guidance embedding, and which value in training?", guidance,
        f"{FADE[0]}; the student on all Linears, trained at sigma = 0: 120 steps of distillation, 40 on data; 1 step, "
        "128 crops of 16 pixels.",
        ("distilled, then trained on data at g = 1.5", "gain at g = 1.5"),
        ("distilled, then trained on data at g = 1.5", "gain at g = 2.5"),
    ),
    4: Question(
        "Why is the padding of the prompt not masked?", padding,
        f"The first five rows: {A_BASE}; the change is relative to the norm. The others: {A_LORA}.",
        ("LoRA trained on the padded prompt, sampled with padded", "change of the velocity"),
        (f"LoRA trained on the padded prompt, sampled with {WORDS} tokens", "change of the velocity"),
    ),
    5: Question(
        "What loss is normal, and why is it flat?", loss,
        f"First column: {STRONG[0]}, the base. Second: {STRONG[0]}, the `kontext` LoRA of question 2. Others: "
        f"{FADE[0]}, LoRAs. 64 crops of 16 pixels; mean squared errors of the velocity; gain of one step on 32 pixels.",
        ("gain of one step", "bridge of the source half, fading"),
        ("gain of one step", "bridge of the clean half, fading"),
    ),
    6: Question(
        "Why train at random times and sample in a few steps?", steps,
        f"{OLD[0]}; two LoRAs, 32 crops of 32 pixels. Texture: energy of the Laplacian, 1 as in the clean pictures.",
        ("euler, evaluations: 8", "gain, trained at random times"),
        ("euler, evaluations: 8", "gain, trained at sigma = 0"),
    ),
    7: Question(
        "Which of the defaults are known, confirmed or guessed?", defaults,
        f"First column: {A_BASE}. Second: {A_LORA}. Third: the same by 2 midpoint steps.",
        ("nothing broken", "gain of the base on noise"),
        ("known: a token's numbers in another order", "gain of the base on noise"),
    ),
    8: Question(
        "Why does a LoRA do nothing?", lora,
        f"{A_LORA}. correction / weight: norms of (alpha / rank) B A and of W, mean over the layers of their ratio.",
        ("trained, strength 1", G), ("on another base: its single blocks reversed", G),
    ),
    9: Question(
        "Why has the reference index 1, and why is its output cut?", reference,
        f"{A_KONTEXT}, 2 columns of tokens; 4 steps.",
        ("index 1, same rows and columns", G), ("one column to the right", G),
    ),
    10: Question(
        "Where does precision bite?", precision,
        f"First column: {NOISE[0]}; the base, 16 crops of 64 pixels, mean over four sigmas, relative to the norm. "
        f"Others: {FADE[0]}; LoRAs, learning rate 1e-4; shares of the numbers of A; norm relative to that in float32.",
        ("LoRA in float32, A as at width 3072", "A loses an update of 1e-05"),
        ("LoRA in bfloat16, A as at width 3072", "A loses an update of 1e-05"),
    ),
}  # fmt: skip


def cell(value: float | None, row: str, column: str) -> str:
    """A gain in dB with its sign; a loss, a ratio or a share with two digits that count."""
    if value is None:
        return ""
    return f"{value:+.1f} dB" if G in (row[:4], column[:4]) else f"{value:.2g}"


def markdown(number: int, table: Table) -> str:
    """The table of one experiment under its caption."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"*{QUESTIONS[number].setting}*", "", f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cell(row.get(c), name, c) for c in columns)} |" for name, row in table.items()]
    return "\n".join(lines)


def head(tables: dict[str, Table]) -> str:
    """The table at the head of the page: one row for each question."""
    lines = ["| | question | right | | broken | |", "|--:|---|---|--:|---|--:|"]
    for number, q in QUESTIONS.items():
        line = f"| [{number}](#q{number}) | {q.text} |"
        for row, column in (q.right, q.broken):
            name = row if column == G else f"{row}; {column}"
            line += f" {name} | {cell(tables[str(number)][row][column], row, column)} |"
        lines.append(line)
    return "\n".join(lines)


def page(text: str, tables: dict[str, Table]) -> str:
    """The text of docs/questions.md with the tables between its marks, `<!-- table N -->` to `<!-- end -->`."""
    for name, new in {"head": head(tables), **{n: markdown(int(n), table) for n, table in tables.items()}}.items():
        before, rest = text.split(f"<!-- table {name} -->\n")
        text = f"{before}<!-- table {name} -->\n\n{new}\n\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def run(number: int) -> Table:
    """The table of a question, on one thread: sums have one order then, and the networks are too small for more."""
    torch.set_num_threads(1)
    return QUESTIONS[number].experiment()


def run_side_by_side(numbers: Iterable[int]) -> dict[int, Future[Table]]:
    """The tables to come, made in as many processes as there are cores."""
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    made = {number: pool.submit(run, number) for number in numbers}
    pool.shutdown(wait=False)  # once all are made
    return made


def main(argv: list[str]) -> int:
    """Exit code 0, or 2 if a number is not that of a question."""
    wanted = [int(arg) if arg.isdigit() else 0 for arg in argv] or list(QUESTIONS)
    if not set(wanted) <= QUESTIONS.keys():
        print(f"experiments.py: got {' '.join(argv)}, expected numbers from 1 to {len(QUESTIONS)}, or none for all.")
        return 2
    tables = {}
    for number, table in run_side_by_side(wanted).items():
        tables[str(number)] = table.result()
        print(f"\n{number}. {QUESTIONS[number].text}\n\n{markdown(number, tables[str(number)])}", flush=True)
    if not argv:
        NUMBERS.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
