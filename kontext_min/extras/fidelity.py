"""Pull each step of a restoration towards the input, for --fidelity.

Each velocity v predicts a clean latent x1, which is pulled towards the degraded one:

    x1 = x + (1 - sigma) v        x1 <- x1 - W (1 - sigma)^4 (x1 - z_control)        v <- (x1 - x) / (1 - sigma)

    z = restore_latent(..., velocity=pulled(W))

Source: Yu et al. 2024, "SUPIR" (arXiv 2401.13627), restoration-guided sampling; W = 1 is theirs with tau = 4. It
assumes a straight path from noise. A bridge without noise starts at the input: the pull, strongest there, only holds
the restoration back, and later steps make up for it, with midpoint sometimes more than that.
"""

from collections.abc import Callable

from torch import Tensor

from kontext_min import flow
from kontext_min.flow import Network, Objective, Prompt


def pulled(fidelity: float) -> Callable[..., Tensor]:
    """flow.velocity, (B, C, h, w) as there, drawn to the input by a fidelity W in [0, 1].

    Raises:
        ValueError: another fidelity.
    """
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity: got {fidelity}, expected a number from 0 to 1.")

    def velocity(
        flux: Network, x: Tensor, sigma: Tensor, control: Tensor, prompt: Prompt, objective: Objective
    ) -> Tensor:
        v, left = flow.velocity(flux, x, sigma, control, prompt, objective), 1 - sigma.item()
        # The equation at the top, divided by 1 - sigma on paper so that sigma = 1 is allowed.
        return v - fidelity * left**3 * (x + left * v - control)

    return velocity
