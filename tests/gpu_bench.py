"""A Kontext of full size on one GPU: time and memory against diffusers with peft, both programs against their plans.

    python tests/gpu_bench.py network            the transformer with random weights, 24 GB; needs 60 GB on the card
    python tests/gpu_bench.py runs FOLDER        train.py and sample.py at 1024x1024; writes FOLDER/weights (34 GB)
    python tests/gpu_bench.py runs FOLDER int8   only the runs with "int8" in their name

network: bfloat16, 512 text and 4096 picture tokens, a LoRA of rank 16 on the same Linears. Both sides have the same
weights and inputs and take turns; figures are medians. Each part first compares the outputs, or the gradients of the
first LoRA. The last column is the share of the matmul peak of this card.

runs: each run is a process of its own. It reports the most that torch's allocator held (max_memory_allocated), beside
the plan of kontext_min/extras/plan.py without its half GB for the CUDA context.
"""

import argparse
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import bench  # noqa: E402
from kontext_min.flux import Flux, FluxParams  # noqa: E402

GB = 2.0**30
bench.SIZES["12B"] = (FluxParams(), (512, 4096, 0))
LORA = ["--accumulate", "1", "--workers", "8", "--validate-every-epochs", "0", "--steps", "6"]
CHECKPOINTED = [*LORA, "--gradient-checkpointing"]
RUNS = {  # name -> script and flags
    "train, int8": ["train.py", *CHECKPOINTED, "--quantize", "int8"],
    "train, stream": ["train.py", *LORA, "--stream"],
    "train, bf16": ["train.py", *CHECKPOINTED],
    "train, nf4": ["train.py", *CHECKPOINTED, "--quantize", "nf4"],
    "train, int8, context": ["train.py", *CHECKPOINTED, "--quantize", "int8", "--context"],
    "sample, int8": ["sample.py", "--steps", "4", "--quantize", "int8"],
    "sample, stream": ["sample.py", "--steps", "4", "--stream"],
    "sample, bf16": ["sample.py", "--steps", "4"],
    "train, stream, 512": ["train.py", *LORA, "--stream", "--resolution", "512"],
    "train, bf16, compiled": ["train.py", *CHECKPOINTED, "--compile"],
    "sample, bf16, compiled": ["sample.py", "--steps", "4", "--compile"],
}

PARTS = ("forward", "step", "step, checkpointed", "step, checkpointed, ours compiled")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU tries the script itself
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def card() -> str:
    return f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(*functions: Callable[[], object], repeats: int = 5) -> list[float]:
    """Median seconds of each function. They take turns; the first turn does not count."""
    taken: list[list[float]] = [[] for _ in functions]
    for k in range(repeats + 1):
        for f, found in zip(functions, taken, strict=True):
            synchronize()
            began = time.perf_counter()
            f()
            synchronize()
            if k:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in taken]


def peak_of(f: Callable[[], object]) -> float:
    """Peak of the memory that a call allocates, in GB."""
    if DEVICE == "cpu":  # resident memory of a process tells nothing about one call
        return math.nan
    f()  # workspaces
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return (torch.cuda.max_memory_allocated() - before) / GB


def both_networks(size: str) -> tuple[Flux, torch.nn.Module]:
    """Ours with random bfloat16 weights on the GPU, and the network of diffusers on the same memory."""
    from test_checkpoints import to_diffusers

    with torch.device("meta"):
        ours, theirs = Flux(bench.SIZES[size][0]), bench.their_flux(size)
    ours = ours.to(DTYPE).to_empty(device=DEVICE).requires_grad_(False)
    torch.manual_seed(0)
    for name, p in ours.named_parameters():
        if p.ndim == 2:
            p.normal_(std=p.shape[1] ** -0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    theirs.load_state_dict(to_diffusers(ours), assign=True)
    return ours, theirs.requires_grad_(False)


def network(size: str) -> None:
    """Print the table. Each part is a process of its own, since a process can't use CUDA after an illegal access."""
    print("| what | diffusers + peft | ours | ratio | of the matmul peak |\n|---|--:|--:|--:|--:|", flush=True)
    for what in PARTS:
        done = subprocess.run([sys.executable, __file__, "part", size, what], capture_output=True, text=True)
        print(done.stdout or f"| {what} | {done.stderr[-500:]} |", end="", flush=True)


def part(size: str, what: str) -> None:
    """Print two rows: seconds and memory of both sides."""
    from kontext_min.extras.checkpointing import checkpoint_blocks
    from kontext_min.extras.compiling import compile_blocks

    side = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    peak = 2 * side**3 / seconds(lambda: a @ b, repeats=20)[0]
    ours, theirs = both_networks(size)
    x = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in bench.inputs(size)]
    x = [v.to(DTYPE) if i in (0, 2, 5) else v for i, v in enumerate(x)]
    x[4], x[6] = torch.full_like(x[4], 0.5), torch.ones_like(x[6])  # diffusers rounds 1000 times these to bfloat16
    if what == "forward":
        pair = [lambda: bench.forward(bench.their_call, theirs, x), lambda: bench.forward(bench.our_call, ours, x)]
        compared = [f() for f in pair]
    else:
        names, modules = bench.same_loras(size, ours, theirs)
        if "compiled" in what:
            compile_blocks(ours)
        if "checkpointed" in what:  # wraps the compiled blocks
            checkpoint_blocks(ours, "all")
            theirs.train().enable_gradient_checkpointing()
        pair = [lambda: bench.step(bench.their_call, theirs, x), lambda: bench.step(bench.our_call, ours, x)]
        for f in pair:
            f()
        first = next(iter(names))
        compared = [
            torch.cat([modules[n].lora_B["default"].weight.grad for n in names[first]]),
            ours.get_submodule(first).lora_B.grad,
        ]
    far = ((compared[1].float() - compared[0].float()).norm() / compared[0].float().norm()).item()
    assert far < 0.1, f"{what}: the two sides differ by {far:.1e}"  # bfloat16 over 57 blocks
    flops = 0 if "compiled" in what else bench.flop_count(pair[1])
    for name, unit, (theirs_took, ours_took) in (
        (what, "s", seconds(*pair)),
        (f"memory, {what}", "GB", [peak_of(f) for f in pair]),
    ):
        share = f"{flops / ours_took / peak:.2f}" if flops and unit == "s" else ""
        ratio = ours_took / theirs_took
        print(f"| {name} | {theirs_took:.3f} {unit} | {ours_took:.3f} {unit} | {ratio:.2f} | {share} |", flush=True)
    print(f"({card()}, matmul {peak / 1e12:.0f} TFLOP/s; the two sides differ by {far:.1e})", flush=True)


def child(argv: list[str]) -> None:
    """Run one program in this process; print its planned memory, the peak of the card, seconds."""
    import sample
    import train
    from kontext_min.extras import plan

    planned, encoding, restoring = [], [], []
    plan.fit = lambda setting, sizes, device: planned.append(plan.measure(setting, sizes).device) or setting

    def timed(function, taken):
        def call(*arguments, **options):
            synchronize()
            began = time.perf_counter()
            result = function(*arguments, **options)
            synchronize()
            taken.append(time.perf_counter() - began)
            return result

        return call

    train.to_latents = timed(train.to_latents, encoding)
    sample.restore_latent, sample.decode = (timed(f, restoring) for f in (sample.restore_latent, sample.decode))
    code = {"train.py": train, "sample.py": sample}[argv[0]].main(argv[1:])
    if DEVICE == "cuda":
        peak, held = torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
        planned[0] -= plan.CUDA_CONTEXT
    else:  # the whole process, with Python and torch in it
        peak = held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    encoded = statistics.median(encoding) if encoding else 0.0
    memory = f"{planned[0] / GB:.2f} {peak:.2f} {held:.2f}"
    print(f"child: {code} {memory} {encoded:.3f} {sum(restoring):.2f}")


def runs(folder: Path, chosen: str, small: bool) -> None:
    """Run both programs on a random Kontext of full size, or on weights/tiny."""
    from full_size import write_weights

    weights, side = (ROOT / "weights" / "tiny", 128) if small else (folder / "weights", 1024)
    if not small:
        write_weights(weights, 512)
    (folder / "pictures").mkdir(exist_ok=True)
    for k, photo in enumerate(sorted((TESTS / "photos").glob("*.jpg"))):
        Image.open(photo).convert("RGB").resize((side, side)).save(folder / "pictures" / f"{k}.png")
    shared = ["--weights", str(weights), "--device", DEVICE]
    print(f"\n{card()}, {side}x{side} (another size is in the name), batch 1, rank 16, 512 text tokens\n")
    print("| run | planned, GB | allocated, GB | ratio | reserved, GB | s a step | of it encoding | s in all |")
    print("|---|" + "--:|" * 7, flush=True)
    streamed = []
    for name, (script, *flags) in RUNS.items():
        if chosen not in name or (chosen in RUNS and chosen != name):
            continue
        out, began = folder / name.replace(", ", "-"), time.monotonic()
        if script == "train.py":
            where = ["--hr-root", str(folder / "pictures"), "--output-dir", str(out), "--overwrite"]
        else:
            where = ["--input", str(folder / "pictures" / "0.png"), "--output", f"{out}.png"]
        if small:
            flags = ["64" if flag == "512" else flag for flag in flags]
            flags = [*flags, *(["--resolution", str(side)] if "--resolution" not in flags else [])]
        command = [sys.executable, __file__, "child", script, *where, *shared, *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # its cache is runs/cache below it
        whole, lines = time.monotonic() - began, done.stdout.splitlines()
        if not lines or not lines[-1].startswith("child: 0"):
            print(f"\n{name}: exit code {done.returncode}", *lines[-5:], done.stderr[-2000:], sep="\n", flush=True)
            continue
        _, _, planned, peak, held, encoded, restored = lines[-1].split()
        if script == "train.py":
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            step = statistics.median(row["seconds"] for row in metrics[2:])
        else:
            step = float(restored) / 4
        cells = planned, peak, f"{float(peak) / float(planned):.2f}", held, f"{step:.2f}", encoded, f"{whole:.0f}"
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
        streamed += [f"{name}: {line}" for line in lines if line.startswith("streamed")]
    print("", *streamed, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("network").add_argument("--size", default="12B", choices=bench.SIZES, help="default: 12B")
    one = commands.add_parser("runs")
    one.add_argument("folder", type=Path, help="for weights, pictures, cache and results; 46 GB")
    one.add_argument("--small", action="store_true", help="weights/tiny at 128 pixels")
    one.add_argument("chosen", nargs="?", default="", help="only the runs with this text in their name")
    if sys.argv[1:2] in (["child"], ["part"]):  # the processes that the two commands start
        child(sys.argv[2:]) if sys.argv[1] == "child" else part(*sys.argv[2:])
        return
    arguments = parser.parse_args()
    if arguments.command == "network":
        network(arguments.size)
    else:
        runs(arguments.folder.resolve(), arguments.chosen, arguments.small)


if __name__ == "__main__":
    main()
