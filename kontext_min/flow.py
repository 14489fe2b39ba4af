"""THE METHOD: flow matching from the degraded latent to the clean one, and the solvers that follow the velocity.

sigma in [0, 1] runs from the source (sigma = 0, degraded) to the target (sigma = 1, clean) along a straight line:

    x_sigma = (1 - sigma) * z_source + sigma * z_target          v = d x_sigma / d sigma = z_target - z_source
    loss    = mean( weight(sigma) * (v_pred - v)^2 )             restored = z_source + integral of v_pred from 0 to 1

Flux's time runs from t = 1 (noise) to t = 0 (data), and Flux predicts dx/dt = noise - data. Sigma runs the other way,
so t = 1 - sigma and v_pred = -flux(x, t): the pretrained network keeps its own convention of time and sign.

    objective   z_source                              reference tokens
    bridge      control + source_noise * eps          none, or the control
    kontext     eps, plain Gaussian noise             the control, always: this is official Kontext

Sources: Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast"; Albergo
& Vanden-Eijnden 2023 (bridges between two data sets); Esser et al. 2024, "Scaling Rectified Flow Transformers" (SD3:
densities of t, weightings, shift); black-forest-labs/flux at 802fb47, src/flux/sampling.py (schedule, packing, ids).
Shapes: B batch, C latent channels, h, w sides of the latent, L = (h/2)(w/2) tokens. Latents and losses are float32,
a schedule is float64; only the inputs of the network are cast to the compute dtype.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kontext_min.utils import numpy_generator, torch_generator

Network = Callable[..., Tensor]  # flux.Flux, or anything with the same call signature

# ------------------------------------------------------------------------------------------------------ latent tokens


def pack(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, L, 4C): every 2x2 patch is a token, row by row; within a token the channel varies slowest."""
    return rearrange(z, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, L, 4C) -> (B, C, h, w), the inverse of pack."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h // 2, w=w // 2, ph=2, pw=2)


def token_ids(h: int, w: int, index: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Positions of the tokens of an h x w latent: (1, L, 3) of (index, row, column), counted in 2x2 patches.

    The generated picture has index 0 and the reference picture index 1; both start at row 0, column 0. Only this
    first axis tells them apart. Source: sampling.py `prepare`, `prepare_kontext`.
    """
    rows = torch.arange(h // 2, device=device).float()[:, None].expand(h // 2, w // 2)
    columns = torch.arange(w // 2, device=device).float()[None, :].expand(h // 2, w // 2)
    return rearrange(torch.stack([torch.full_like(rows, index), rows, columns], dim=-1), "h w a -> 1 (h w) a")


# ----------------------------------------------------------------------------------------------- the path and the loss


@dataclass(frozen=True)
class Objective:
    """Which flow the network learns: where it starts, and what the network sees besides the point on the path."""

    name: str = "bridge"  # bridge | kontext
    context: bool = False  # append the control as reference tokens; kontext always does
    source_noise: float = 0.0  # bridge: standard deviation of the noise added to the source
    start_time: float = 1.0  # bridge: T, Flux's time at sigma = 0

    def __post_init__(self) -> None:
        if self.name not in ("bridge", "kontext"):
            raise ValueError(f"objective: got {self.name!r}, expected bridge or kontext.")
        if self.name == "kontext" and (self.source_noise or self.start_time != 1.0):
            raise ValueError("objective kontext starts from pure noise: leave out --source-noise and --start-time.")
        if not 0.0 <= self.source_noise <= 1.0:
            raise ValueError(f"--source-noise: got {self.source_noise}, expected a deviation from 0 to 1.")
        if not 0.0 < self.start_time <= 1.0:
            raise ValueError(f"--start-time: got {self.start_time}, expected more than 0 and at most 1.")

    @property
    def sees_control(self) -> bool:
        """Whether the control latent is appended as reference tokens."""
        return self.context or self.name == "kontext"

    def source(self, control: Tensor, eps: Tensor) -> Tensor:
        """z_source, (B, C, h, w), from the degraded latent and noise of the same shape."""
        return eps if self.name == "kontext" else control + self.source_noise * eps


@dataclass(frozen=True)
class Prompt:
    """What conditions the network besides the picture; one row per picture."""

    txt: Tensor  # (B, L_txt, context_in_dim) T5 states, in the compute dtype
    y: Tensor  # (B, vec_in_dim) pooled CLIP vector
    guidance: Tensor  # (B,) distilled guidance scale, a raw number such as 1.5


def path(source: Tensor, target: Tensor, eps: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """THE PATH: x_s and v = d x_s / d s, (B, C, h, w) each, at the points s of the path, (B, 1, 1, 1).

    To try another path, change the line below. To put noise in the middle, for example, add `c * s * (1 - s) * eps` to
    x and `c * (1 - 2 * s) * eps` to v. Restoring follows the learned velocity, so it needs no change, but --strength
    (restore.py), --fidelity, the weighting `clean` and one-step restoration assume a straight line.
    """
    return (1 - s) * source + s * target, target - source


def velocity(flux: Network, x: Tensor, sigma: Tensor, control: Tensor, prompt: Prompt, objective: Objective) -> Tensor:
    """v_pred = -T * flux(x, t = T (1 - sigma)), the direction from source to clean.

    Args:
        flux: the transformer, official sign.
        x: (B, C, h, w) point on the path, float32.
        sigma: (B,) or scalar, 0 = source, 1 = target.
        control: (B, C, h', w') the degraded latent; the network sees it only if the objective appends it.
        prompt: text and guidance.
        objective: sets T, and whether there are reference tokens.

    Returns:
        (B, C, h, w) float32.
    """
    h, w = x.shape[-2:]
    img, img_ids = pack(x), token_ids(h, w, device=x.device)
    generated = img.shape[1]
    if objective.sees_control:
        # [generated, reference]: the reference gets no noise, because it is not on the path.
        img = torch.cat([img, pack(control)], dim=1)
        img_ids = torch.cat([img_ids, token_ids(*control.shape[-2:], index=1, device=x.device)], dim=1)
    # Text has position (0, 0, 0) for every token: Flux does not rotate it.
    txt_ids = torch.zeros(*prompt.txt.shape[:2], 3, device=x.device)
    # A bridge may start at Flux's time T < 1, where Flux expects a mix of noise and data.
    t = objective.start_time * (1 - sigma.to(x)).expand(len(x))
    img, img_ids = img.to(prompt.txt.dtype), img_ids.expand(len(x), -1, -1)
    out = flux(img, img_ids, prompt.txt, txt_ids, t, prompt.y, prompt.guidance)  # (B, L + L_ref, 4C)
    # The output at the reference tokens has no meaning: drop it. Minus, because Flux points from data to noise.
    return -objective.start_time * unpack(out[:, :generated].float(), h, w)


def loss(
    flux: Network, control: Tensor, target: Tensor, eps: Tensor, sigma: Tensor, prompt: Prompt, objective: Objective
) -> Tensor:
    """THE LOSS: mean squared error of the velocity of each picture, (B,) float32; train.py weights and averages it.

    control is the degraded latent, target the clean one and eps Gaussian noise: (B, C, h, w) each. sigma (B,) is the
    point on the path. The other arguments are those of `velocity`.
    """
    source = objective.source(control, eps)
    x, v = path(source, target, eps, sigma.to(target)[:, None, None, None])
    v_pred = velocity(flux, x, sigma, control, prompt, objective)
    return (v_pred - v).square().mean(dim=(1, 2, 3))


def start_time(control: Tensor, target: Tensor, source_noise: float = 0.0) -> float:
    """T = r / (1 + r), r the RMS of z_source - z_target: the Flux time whose noise is as strong as the degradation.

    Flux at time t has the signal-to-noise ratio (1 - t) / t; setting it to 1 / r gives T. OMGSR (2025) makes the same
    match for one-step restoration. control and target are latents (B, C, h, w).
    """
    r = math.sqrt((control - target).square().mean().item() + source_noise**2)
    return max(r / (1 + r), 1e-3)


# ------------------------------------------------------------------------------------ where on the path: sigma, weight


def draw(seed: int, step: int, places: Sequence[int], shape: Sequence[int], total: int) -> tuple[Tensor, Tensor]:
    """Draw noise and uniform numbers for some of the `total` pictures of a step, always on the CPU.

    They depend only on (seed, step, place), so a resumed run and any number of processes draw the same. A place is the
    index of a picture, 0 to total - 1, counted over all micro-batches and processes of a step; shape is (C, h, w).

    Returns:
        eps (B, C, h, w) ~ N(0, 1) and u (B,) ~ U(0, 1), float32.
    """
    # Stratified: each picture draws u from its own interval of length 1 / total, which lowers the noise of the loss.
    # The strata are shuffled at every step; otherwise the place in the batch would fix the interval.
    strata = numpy_generator(seed, "strata", step).permutation(total)
    eps, u = [], []
    for place in places:
        generator = torch_generator(seed, "flow", step, place)
        u.append((int(strata[place]) + torch.rand((), generator=generator)) / total)
        eps.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(eps), torch.stack(u)


def shift_time(t: Tensor, image_tokens: int) -> Tensor:
    """Flux's time shift, which depends on the size of the picture: t' = e^mu / (e^mu + 1/t - 1).

    mu = 0.5 + (L - 256) (1.15 - 0.5) / (4096 - 256), not clipped. L counts the generated tokens only. Written as
    e^mu t / (e^mu t + 1 - t), which is the same and also holds at t = 0. Any shape. Source: sampling.py `time_shift`.
    """
    mu = 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


# Each density of sigma, as a map: (u ~ U(0, 1), number of image tokens) -> sigma, (B,) -> (B,). SD3 writes the
# densities in t = 1 - sigma.
SIGMA_DENSITIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform": lambda u, tokens: u,
    # t = sigmoid(n), n standard normal: the middle of the path. SD3, equation 19, m = 0, s = 1.
    "logit-normal": lambda u, tokens: torch.sigmoid(-torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).float(),
    # t = 1 - u - 1.29 (cos(pi u / 2)^2 - 1 + u): heavy tails, never zero at the ends. SD3, equation 20.
    "mode": lambda u, tokens: u + 1.29 * (torch.cos(math.pi / 2 * u).square() - 1 + u),
    # t shifted as in the sampling schedule at this size: towards the source. SD3, equation 23.
    "shift": lambda u, tokens: 1 - shift_time(1 - u, tokens),
    # Three in four at sigma = 0, the only point that a restoration in one step evaluates; the others uniform.
    "source": lambda u, tokens: (4 * u - 3).clamp(min=0),
}
# Weight of the squared error at sigma, (B,) -> (B,), with t = 1 - sigma.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    # t^-2: emphasizes the clean end. `sigma_sqrt` of diffusers' scripts, whose sigma is our t; the clamp is ours.
    "sigma-sqrt": lambda sigma: (1 - sigma).clamp(min=0.05) ** -2,
    # 2 / (pi (1 - 2t + 2t^2)): emphasizes the middle. SD3, section 3.1.
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square())),
    # 3 t^2: x_sigma + t v_pred estimates the clean latent, so t^2 times the error of v IS the error of that estimate;
    # the 3 makes the mean weight 1. It emphasizes the degraded end, which matters most for restoring in few steps.
    "clean": lambda sigma: 3 * (1 - sigma).square(),
}
# What training minimizes, a function of the mean squared error of each picture, (B,) -> (B,).
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda error: error,
    # Its logarithm, -PSNR / 4.34 dB: a smooth picture then counts as much as a sharp one, whose error is ten times as
    # large (HINet, Chen et al. 2021, arXiv 2105.06086). Below about 1e-5 a smaller error no longer counts.
    "psnr": lambda error: torch.log(error + 1e-5),
}

# ---------------------------------------------------------------------------------------------- following the velocity


def schedule(steps: int, image_tokens: int, shift: bool = True) -> Tensor:
    """The sigmas from which and to which the solver steps: (steps + 1,) float64, rising from 0 to 1.

    `shift` gives the official Kontext schedule, for paths that start at noise; bridges use equal steps. image_tokens is
    L = (h/2)(w/2), without reference tokens. The official times are 1 - sigma.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1.")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 1 - (shift_time(t, image_tokens) if shift else t)


SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2}  # network evaluations per step


def evaluations(wanted: int, solver: str) -> int:
    """Round `wanted` network evaluations up to whole steps of the solver."""
    return math.ceil(wanted / SOLVERS[solver]) * SOLVERS[solver]


@torch.no_grad()
def integrate(
    velocity: Callable[..., Tensor], x: Tensor, sigmas: Tensor, solver: str = "euler", pull: Callable | None = None
) -> Tensor:
    """Follow dx/dsigma = velocity(x, sigma) from x (B, C, h, w) at sigmas[0] to the result, like x, at sigmas[-1].

    euler      x + h v(x, s)                                          1 evaluation per step, as the official code
    midpoint   x + h v(x + h/2 v(x, s), s + h/2)                      2 evaluations, error of order h^2
    heun       x + h/2 (v(x, s) + v(x + h v(x, s), s + h))            2 evaluations, error of order h^2

    velocity maps (x, scalar sigma) to a tensor like x, and pull (x, sigma, v of a step) to the v that is followed.

    Raises:
        ValueError: an unknown solver.
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
        x = x + h * (pull(x, s, v) if pull else v)
    return x
