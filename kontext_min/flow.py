"""THE METHOD: flow matching from the degraded latent to the clean one, and how the velocity is followed.

sigma in [0, 1] runs from the source (sigma = 0, degraded) to the target (sigma = 1, clean) along a straight line:

    x_sigma = (1 - sigma) * z_source + sigma * z_target          v = d x_sigma / d sigma = z_target - z_source
    loss    = mean( weight(sigma) * (v_pred - v)^2 )             restored = z_source + integral of v_pred from 0 to 1

Flux was trained with the time t = 1 (noise) to t = 0 (data) and predicts dx/dt = noise - data. Its clock runs against
ours, so t = 1 - sigma and v_pred = -flux(x, t): the pretrained network keeps its own sense of time and direction.

    objective   z_source                              context tokens             who can run what it learns
    bridge      control + source_noise * eps          none, or the control       this project's sample.py
    kontext     eps, plain Gaussian noise             the control, always        every Kontext pipeline

A bridge may start where its source lies on Flux's own clock, at T < 1 instead of at pure noise ("anchored bridge"): the
network sees t = T (1 - sigma) and v_pred = -T * flux(x, t), so that flux is asked for (source - target) / T.

Sources: Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast"; Albergo
& Vanden-Eijnden 2023 (bridges between two data sets); Esser et al. 2024, "Scaling Rectified Flow Transformers" (SD3:
densities of t, weightings, shift); black-forest-labs/flux at 802fb47, src/flux/sampling.py (schedule, packing, ids).
Shapes: B batch, C latent channels, h, w sides of the latent, L = (h/2)(w/2) tokens. Everything here is float32; only
what enters the network has the dtype of the computation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kontext_min.utils import torch_generator

Network = Callable[..., Tensor]  # flux.Flux, or anything that is called like it

# ------------------------------------------------------------------------------------------------------ latent tokens


def pack(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, L, 4C): every 2x2 patch is a token, row by row; inside it the channel runs slowest."""
    return rearrange(z, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, L, 4C) -> (B, C, h, w), the inverse of pack."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h // 2, w=w // 2, ph=2, pw=2)


def token_ids(h: int, w: int, index: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Positions of the tokens of an h x w latent: (1, L, 3) of (index, row, column), counted in 2x2 patches.

    The generated picture has index 0 and the reference picture index 1; both start at row 0, column 0. This first axis
    alone tells them apart. Source: sampling.py `prepare`, `prepare_kontext`.
    """
    rows = torch.arange(h // 2, device=device).float()[:, None].expand(h // 2, w // 2)
    columns = torch.arange(w // 2, device=device).float()[None, :].expand(h // 2, w // 2)
    return rearrange(torch.stack([torch.full_like(rows, index), rows, columns], dim=-1), "h w a -> 1 (h w) a")


# ---------------------------------------------------------------------------------------------------------- the path


@dataclass(frozen=True)
class Objective:
    """What the velocity leads from, and what the network sees besides the point on the path."""

    name: str = "bridge"  # bridge | kontext
    context: bool = False  # append the control as reference tokens; always so for kontext
    source_noise: float = 0.0  # bridge: standard deviation of the noise that is part of the source
    start_time: float = 1.0  # bridge: Flux's time T at sigma = 0

    def __post_init__(self) -> None:
        if self.name not in ("bridge", "kontext"):
            raise ValueError(f"objective: got {self.name!r}, expected bridge or kontext.")
        if self.name == "kontext" and (self.source_noise or self.start_time != 1.0):
            raise ValueError("objective kontext starts from pure noise: leave out --source-noise and --start-time.")
        if not 0.0 <= self.source_noise <= 1.0:
            raise ValueError(f"source noise: got {self.source_noise}, expected a deviation from 0 to 1.")
        if not 0.0 < self.start_time <= 1.0:
            raise ValueError(f"start time: got {self.start_time}, expected more than 0 and at most 1.")

    @property
    def sees_control(self) -> bool:
        """Whether the control latent is appended as reference tokens."""
        return self.context or self.name == "kontext"

    def source(self, control: Tensor, eps: Tensor) -> Tensor:
        """z_source, (B, C, h, w), from the degraded latent and noise of the same shape."""
        return eps if self.name == "kontext" else control + self.source_noise * eps


@dataclass(frozen=True)
class Prompt:
    """What steers the network besides the picture; one row a picture."""

    txt: Tensor  # (B, L_txt, context_in_dim) T5 states
    y: Tensor  # (B, vec_in_dim) pooled CLIP vector
    guidance: Tensor  # (B,) distilled guidance scale, a raw number such as 1.5


def velocity(flux: Network, x: Tensor, sigma: Tensor, control: Tensor, prompt: Prompt, objective: Objective) -> Tensor:
    """v_pred = -T * flux(x, t = T (1 - sigma)), the direction from degraded to clean.

    Args:
        flux: the transformer, official sign.
        x: (B, C, h, w) point on the path, float32.
        sigma: (B,) or scalar, 0 = source, 1 = target.
        control: (B, C, h', w') the degraded latent, seen only if the objective appends it.
        prompt: text and guidance.
        objective: decides on the context tokens and on T.

    Returns:
        (B, C, h, w) float32.
    """
    h, w = x.shape[-2:]
    img, img_ids = pack(x), token_ids(h, w, device=x.device)
    generated = img.shape[1]
    if objective.sees_control:  # [generated, reference]; the reference stays clean: it is no part of the path
        img = torch.cat([img, pack(control)], dim=1)
        img_ids = torch.cat([img_ids, token_ids(*control.shape[-2:], index=1, device=x.device)], dim=1)
    t = objective.start_time * (1 - sigma.to(x)).expand(len(x))
    out = flux(
        img.to(prompt.txt.dtype),
        img_ids.expand(len(x), -1, -1),
        prompt.txt,
        torch.zeros(*prompt.txt.shape[:2], 3, device=x.device),
        t,
        prompt.y,
        prompt.guidance,
        generated,  # what the network need not compute beyond these, it does not
    )
    return -objective.start_time * unpack(out[:, :generated].float(), h, w)


def path(source: Tensor, target: Tensor, eps: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """THE PATH: x_s and v = d x_s / d s, (B, C, h, w) each, at the places s, (B, 1, 1, 1).

    To try another one, change the line below. With noise in the middle, for example, x has `+ c * s * (1 - s) * eps`
    and v `+ c * (1 - 2 * s) * eps`; mind that the source of kontext, or with source_noise, is made of eps too.
    Restoring follows the velocity and knows no more of the path than that it begins at the source and ends at the
    target. A straight one is taken for granted by --strength and --fidelity (restore.py), by the weighting `clean`, and
    where one step is said to give the mean.
    """
    return (1 - s) * source + s * target, target - source


def losses(
    flux: Network, control: Tensor, target: Tensor, eps: Tensor, sigma: Tensor, prompt: Prompt, objective: Objective
) -> Tensor:
    """Mean squared error of the velocity, picture by picture: (B,) float32, unweighted. The whole method.

    Args:
        flux: the transformer.
        control: (B, C, h, w) degraded latent.
        target: (B, C, h, w) clean latent.
        eps: (B, C, h, w) Gaussian noise.
        sigma: (B,) places on the path.
        prompt: text and guidance.
        objective: bridge or kontext.
    """
    source = objective.source(control, eps)
    x, v = path(source, target, eps, sigma.to(target)[:, None, None, None])
    v_pred = velocity(flux, x, sigma, control, prompt, objective)
    return (v_pred - v).square().mean(dim=(1, 2, 3))


def start_time(control: Tensor, target: Tensor, source_noise: float = 0.0) -> float:
    """T = r / (1 + r), r the RMS of z_source - z_target: Flux's time whose noise is as strong as the degradation.

    Flux at time t has the signal-to-noise ratio (1 - t) / t; setting it to 1 / r gives T. The closed form of the match
    that OMGSR (2025) makes for one-step restoration. Control and target: latents (B, C, h, w).
    """
    r = math.sqrt((control - target).square().mean().item() + source_noise**2)
    return max(r / (1 + r), 1e-3)


# ------------------------------------------------------------------------------------- where on the path: sigma, weight


def draw(seed: int, step: int, positions: Sequence[int], shape: Sequence[int], total: int = 0) -> tuple[Tensor, Tensor]:
    """Noise and uniform numbers of some pictures of a step, the same whichever process draws them, always on the CPU.

    Args:
        seed: of the run.
        step: of the optimizer.
        positions: places of the pictures in the step's global batch.
        shape: (C, h, w).
        total: stratified if given: picture i draws its u from (i, i + 1) / total, the number of pictures in the step.

    Returns:
        eps (B, C, h, w) ~ N(0, 1) and u (B,) ~ U(0, 1), float32.
    """
    eps, u = [], []
    for i in positions:
        g = torch_generator(seed, "flow", step, i)
        u.append(torch.rand((), generator=g))
        eps.append(torch.randn(tuple(shape), generator=g))
    uniform = torch.stack(u)
    if total:
        uniform = (torch.tensor(list(positions)) % total + uniform) / total
    return torch.stack(eps), uniform


SIGMA_DENSITIES = ("uniform", "logit-normal", "mode", "shift")


def density(u: Tensor, name: str, image_tokens: int) -> Tensor:
    """Turn uniform numbers into sigma of the wanted density (the inverse of its distribution function).

    uniform        sigma = u
    logit-normal   t = 1 / (1 + exp(-n)), n standard normal: the middle of the path (SD3, equation 19, m = 0, s = 1)
    mode           t = 1 - u - 1.29 (cos(pi u / 2)^2 - 1 + u): heavy tails, never zero at the ends (SD3, equation 20)
    shift          t as the sampling schedule spends it at this size: towards the source (SD3, equation 23)

    Args:
        u: (B,) in (0, 1).
        name: one of SIGMA_DENSITIES.
        image_tokens: L, for `shift`.

    Returns:
        (B,) sigma = 1 - t.

    Raises:
        ValueError: another name.
    """
    if name == "uniform":
        return u
    if name == "logit-normal":
        return 1 - torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).float()
    if name == "mode":
        return u + 1.29 * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    if name == "shift":
        return 1 - shift_time(1 - u, image_tokens)
    raise ValueError(f"sigma density: got {name!r}, expected one of {', '.join(SIGMA_DENSITIES)}.")


WEIGHTINGS = ("uniform", "sigma-sqrt", "cosmap", "clean")


def weight(sigma: Tensor, name: str) -> Tensor:
    """Weight of the squared error at sigma, with t = 1 - sigma: (B,) -> (B,).

    uniform      1
    sigma-sqrt   t^-2, t held above 0.05: stresses the clean end (SD3 training code; peers call it sigma_sqrt)
    cosmap       2 / (pi (1 - 2t + 2t^2)): stresses the middle (SD3, section 3.1)
    clean        3 t^2: since x_sigma + t v_pred estimates the clean latent, t^2 times the squared error of v IS the
                 squared error of that estimate; the 3 makes the mean weight 1. It stresses the degraded end, where a
                 restoration in few steps is decided.

    Raises:
        ValueError: another name.
    """
    t = 1 - sigma
    if name == "uniform":
        return torch.ones_like(t)
    if name == "sigma-sqrt":
        return t.clamp(min=0.05) ** -2
    if name == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
    if name == "clean":
        return 3 * t.square()
    raise ValueError(f"weighting: got {name!r}, expected one of {', '.join(WEIGHTINGS)}.")


PENALTIES = ("mse", "psnr")


def penalty(loss: Tensor, name: str) -> Tensor:
    """What is minimised of the mean squared error of each picture: (B,) -> (B,).

    mse    itself
    psnr   its logarithm, -PSNR / 4.34 dB and a constant: every picture's gradient is divided by its own error, so that
           a smooth picture counts as much as a sharp one, whose error is ten times as large. Used for restoration since
           HINet (Chen et al. 2021, arXiv 2105.06086). An error far below 1e-5 gains nothing more.

    Raises:
        ValueError: another name.
    """
    if name == "mse":
        return loss
    if name == "psnr":
        return torch.log(loss + 1e-5)
    raise ValueError(f"penalty: got {name!r}, expected one of {', '.join(PENALTIES)}.")


# --------------------------------------------------------------------------------------------- following the velocity


def shift_time(t: Tensor, image_tokens: int) -> Tensor:
    """Flux's shift of time by the size of the picture: t' = e^mu / (e^mu + 1/t - 1).

    mu = 0.5 + (L - 256) (1.15 - 0.5) / (4096 - 256), not clipped. L counts the generated tokens only. Written as
    e^mu t / (e^mu t + 1 - t), which is the same and also holds at t = 0. Any shape. Source: sampling.py `time_shift`.
    """
    mu = 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


def schedule(steps: int, image_tokens: int, shift: bool = True) -> Tensor:
    """Places on the path at which the velocity is evaluated.

    Args:
        steps: number of steps, at least 1.
        image_tokens: L = (h/2)(w/2), the generated tokens alone.
        shift: official Kontext schedule, for paths that start at noise; bridges use equal steps.

    Returns:
        (steps + 1,) float64 sigmas rising from 0 to 1; the official times are 1 - sigma.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1.")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 1 - (shift_time(t, image_tokens) if shift else t)


SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2}  # network evaluations a step


def evaluations(wanted: int, solver: str) -> int:
    """Network evaluations of whole steps: the least number that is not below `wanted`."""
    return math.ceil(wanted / SOLVERS[solver]) * SOLVERS[solver]


@torch.no_grad()
def integrate(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor, solver: str = "euler") -> Tensor:
    """Follow dx/dsigma = velocity(x, sigma) from sigmas[0] to sigmas[-1].

    euler      x + h v(x, s)                                          1 evaluation a step, what the official code does
    midpoint   x + h v(x + h/2 v(x, s), s + h/2)                      2 evaluations, error of order h^2
    heun       x + h/2 (v(x, s) + v(x + h v(x, s), s + h))            2 evaluations, error of order h^2

    Args:
        velocity: (x, scalar sigma) -> tensor like x.
        x: state at sigmas[0].
        sigmas: rising places on the path, from `schedule`.
        solver: one of SOLVERS.

    Returns:
        The state at sigmas[-1], in the shape and dtype of x.

    Raises:
        ValueError: another solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}.")
    for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = (s_next - s).item()
        v = velocity(x, s)
        if solver == "midpoint":
            v = velocity(x + h / 2 * v, s + h / 2)
        elif solver == "heun":
            v = (v + velocity(x + h * v, s_next)) / 2
        x = x + h * v
    return x
