"""Four crops are learnt by heart: how far the loss of weights/tiny falls, trained whole and by a LoRA of rank 16.

    python tests/memorise.py            both objectives, some minutes; exit code 1 if a loss falls too little

Each step sees every crop at four places on the path. The LoRA is on all Linears: the base is a bridge, and from pure
noise the velocity holds the noise itself, which the layers at the two ends have to let through. On the blocks alone
the kontext loss stops at the variance of that noise, half of what it was.

Measured is not the noisy loss of a step but one that can be compared: the mean of flow.loss over the four crops at
sigma 0.1, 0.3, 0.5, 0.7, 0.9 with noise of its own, which the training never drew, before and after.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kontext_min import checkpoints, degrade, flow  # noqa: E402
from kontext_min.data import to_float, to_tensor  # noqa: E402
from kontext_min.extras import base, prompts  # noqa: E402
from kontext_min.flow import Objective  # noqa: E402
from kontext_min.lora import add_lora  # noqa: E402

TEXT = degrade.PROMPTS["guide"]
SPEC = "blur=2,noise=0.1,fade=0.7/0.15"


PLACES = 4  # on the path, of each crop in each step


def crops(autoencoder: torch.nn.Module, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (4, C, h, w) of four degraded and clean crops."""
    pairs = []
    for k, name in enumerate(("bowl", "brushes", "life", "picosdeeuropa")):
        photo = Image.open(ROOT / "tests" / "photos" / f"{name}.jpg").convert("RGB")
        clean = photo.crop((500, 400, 500 + side, 400 + side))
        pairs.append(
            [to_float(to_tensor(x))[None] for x in (degrade.parse(SPEC)(clean, np.random.default_rng(k)), clean)]
        )
    with torch.no_grad():
        return tuple(autoencoder.encode(torch.cat([p[i] for p in pairs])) for i in (0, 1))


def fall(objective: str, full: bool, steps: int, lr: float, weights: Path = ROOT / "weights" / "tiny") -> float:
    """Loss after over loss before."""
    where = base.Weights(weights)
    control, target = crops(checkpoints.load_autoencoder(weights, dtype=torch.float32))
    flux = checkpoints.load_flux(weights, dtype=torch.float32)
    params = list(flux.requires_grad_(True).parameters()) if full else add_lora(flux, rank=16, targets="all")
    encoded = prompts.encode([TEXT], where, None, torch.float32, "cpu")
    few, many = (prompts.batch(encoded, [TEXT] * n, 1.5, torch.float32, "cpu") for n in (4, 4 * PLACES))
    what = Objective(objective)

    @torch.no_grad()
    def measure() -> float:
        eps, _ = flow.draw(1, 0, range(4), target.shape[1:], 4)
        at = (0.1, 0.3, 0.5, 0.7, 0.9)
        return sum(flow.loss(flux, control, target, eps, torch.full((4,), s), few, what).mean().item() for s in at)

    before = measure()
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0)
    for step in range(steps):
        eps, u = flow.draw(0, step, range(4 * PLACES), target.shape[1:], 4 * PLACES)
        pair = (x.repeat(PLACES, 1, 1, 1) for x in (control, target))
        flow.loss(flux, *pair, eps, u, many, what).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 20, (steps - step) / steps * 1.5, 1)
        optimizer.step()
        optimizer.zero_grad()
    return measure() / before


def main() -> int:
    missed = 0
    for objective in ("bridge", "kontext"):
        for full, steps, lr, bound in ((True, 300, 2e-3, 0.1), (False, 200, 5e-3, 0.4)):
            ratio = fall(objective, full, steps, lr)
            what = "all weights" if full else "LoRA, rank 16"
            wanted = f"(wanted {1 - bound:.0%})"
            print(f"{objective:8} {what:14} {steps} steps: loss falls by {1 - ratio:.1%} {wanted}", flush=True)
            missed += not ratio <= bound
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
