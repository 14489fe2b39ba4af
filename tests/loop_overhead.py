"""How much of a step the loop itself takes, besides pictures, forward, backward and optimizer.

    python tests/loop_overhead.py [flags of train.py]           weights/tiny on tests/photos at 128 pixels, one minute

The program times the calls that do the work, and the time between the first and the last row of metrics. The rest is
the loop: drawing noise and sigma, prompts, sums of losses, learning rate, metrics.jsonl, the progress line. Validation
and checkpoints are off, since a run has them only every few hundred steps.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from kontext_min import flow  # noqa: E402
from kontext_min.autoencoder import Autoencoder  # noqa: E402
from kontext_min.extras import runs  # noqa: E402

FLAGS = (
    "--resolution 128 --steps 40 --accumulate 4 --workers 0 --validate-every-epochs 0 --checkpoint-every 100000 "
    "--warmup 5"
)
WORK = {
    "pictures": (torch.utils.data.dataloader._BaseDataLoaderIter, "__next__"),
    "autoencoder": (Autoencoder, "encode"),
    "forward": (flow, "loss"),
    "backward": (torch.Tensor, "backward"),
    "clipping": (torch.nn.utils, "clip_grad_norm_"),
    "optimizer": (torch.optim.AdamW, "step"),
}


def measure(argv: list[str]) -> tuple[float, Counter, int]:
    """Seconds from the first to the last row of metrics, seconds of each kind of work, number of steps."""
    spent, rows, kept = Counter(), [], []

    def replace(owner, name, function):
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def timed(kind, function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[kind] += time.perf_counter() - began

        return call

    append = runs.append_metrics

    def first_and_last(*args):
        append(*args)
        rows.append(time.perf_counter())
        if len(rows) == 1:
            spent.clear()

    for kind, (owner, name) in WORK.items():
        replace(owner, name, timed(kind, getattr(owner, name)))
    replace(runs, "append_metrics", first_and_last)
    try:
        with tempfile.TemporaryDirectory() as work:
            code = train.main([*argv, "--output-dir", f"{work}/run", "--cache-dir", f"{work}/cache"])
    finally:
        for owner, name, original in reversed(kept):
            setattr(owner, name, original)
    assert code == 0
    return rows[-1] - rows[0], spent, len(rows) - 1


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    extra = sys.argv[1:] if argv is None else argv
    defaults = ["--hr-root", str(ROOT / "tests" / "photos"), "--weights", str(ROOT / "weights" / "tiny")]
    total, spent, steps = measure([*defaults, *FLAGS.split(), *extra])
    for kind, seconds in [*spent.items(), ("the loop", total - spent.total())]:
        print(f"{kind:12} {1000 * seconds / steps:8.2f} ms a step  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
