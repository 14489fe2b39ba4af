"""Pull each step of a restoration towards the input, for --fidelity.

The velocity v of a step from (x, sigma) predicts a clean latent x1, which is pulled towards the degraded one:

    x1 = x + (1 - sigma) v      x1 <- x1 - W ((1 - sigma) / S)^4 (x1 - z_control)      v <- (x1 - x) / (1 - sigma)

    z = restore_latent(..., strength=S, pull=pulled(W, S))

A step of midpoint or heun is pulled once, as a whole. Were each of its two evaluations pulled, the second one would see
a picture that the first one has held back, and lead past the clean one.

Source: Yu et al. 2024, "SUPIR" (arXiv 2401.13627), restoration-guided sampling; W = 1 is theirs with tau = 4. It
assumes a straight path. Theirs is the whole path, S = 1. A strength S starts at sigma = 1 - S, where the pull is W too:
else less strength would leave less of it, and change more.
"""

from collections.abc import Callable

from torch import Tensor


def pulled(fidelity: float, strength: float = 1.0) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What draws a velocity to the input by a fidelity W in [0, 1]: (control, x, scalar sigma, v) -> v, (B, C, h, w).

    `strength` is that of restore_latent.

    Raises:
        ValueError: another fidelity.
    """
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity: got {fidelity}, expected a number from 0 to 1.")

    def pull(control: Tensor, x: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        left = 1 - sigma.item()
        # The equation at the top, divided by 1 - sigma on paper so that sigma = 1 is allowed.
        return v - fidelity * left**3 / strength**4 * (x + left * v - control)

    return pull
