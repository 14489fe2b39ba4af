"""Everything that a GPU has to show, in at most 8 minutes: docs/gpu.md is made by this script.

    python tests/gpu_check.py FOLDER             on a GPU, a Kontext of full size; writes FOLDER/weights (34 GB)
    python tests/gpu_check.py FOLDER --small     on a CPU, weights/tiny at 128 pixels: tries the script itself

    tests      the tests marked gpu, each with a limit of its own; names and reasons of those that fail
    network    forward pass and LoRA step, checkpointed and not, compiled and not: diffusers + peft on the same weights
    runs       train.py and sample.py in bfloat16, int8, nf4 and streamed: step, and memory against the plan

The runs of sample.py restore 1024 pixels in 4 evaluations. After every row, FOLDER/gpu.json and FOLDER/gpu.md hold what
is known, so a run that is cut keeps what it had. A part that has no time left says so. With `--write`, docs/gpu.md is
rewritten. `gpu_bench.py` makes the rows of `network` and `runs`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LIMIT = 480.0  # seconds for everything
LIMIT_OF_A_TEST = 60.0
HEADS = {
    "tests": ["test", "result", "reason"],
    "network": ["what", "diffusers + peft", "ours", "ratio", "of the matmul peak"],
    "runs": [
        "run", "planned, GB", "allocated, GB", "ratio", "reserved, GB", "s a step", "of it encoding", "s in all",
    ],
}  # fmt: skip


class Report:
    """The rows by part, written to both files after each."""

    def __init__(self, folder: Path, small: bool, write: bool) -> None:
        self.folder, self.write, self.began = folder, write, time.monotonic()
        gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        size = "weights/tiny at small size" if small else "a Kontext of full size"
        self.found = {"device": device, "torch": torch.__version__, "size": size, "parts": {}}

    def left(self) -> float:
        """Seconds."""
        return LIMIT - (time.monotonic() - self.began)

    def add(self, part: str, row: list[str]) -> None:
        """One row of a part, printed and written."""
        print(f"{part}: {' | '.join(row)}", flush=True)
        self.found["parts"].setdefault(part, []).append(row)
        self.found["seconds"] = round(time.monotonic() - self.began)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1))
        for file in [self.folder / "gpu.md", *([ROOT / "docs" / "gpu.md"] if self.write else [])]:
            file.write_text(self.text())

    def text(self) -> str:
        """Markdown."""
        found = self.found
        lines = ["# What a GPU shows", "", "Made by `python tests/gpu_check.py FOLDER --write`.", ""]
        lines += [f"{found['device']}, torch {found['torch']}, {found['size']}, {found['seconds']} s in all."]
        if found["device"].startswith("CPU"):
            lines += ["", "**No GPU: these rows try the script itself, and say nothing about a GPU.**"]
        for part, rows in found["parts"].items():
            head = HEADS[part]
            lines += ["", f"## {part}", "", f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
            lines += [f"| {' | '.join([*row, *[''] * (len(head) - len(row))])} |" for row in rows]
        return "\n".join(lines) + "\n"


def call(report: Report, argv: list[str], limit: float) -> tuple[int, str]:
    """Run a program of the project. Returns its exit code and its output; 124 where the time was over."""
    limit = min(limit, report.left())
    if limit <= 0:
        return 124, "no time left"
    try:
        done = subprocess.run(
            [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=limit, env=os.environ.copy()
        )
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {limit:.0f} s"
    return done.returncode, done.stdout + done.stderr


def reason(output: str) -> str:
    """The line of an output that tells why it failed, fit for a cell of a table."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    told = [line for line in lines if re.match(r"E  |.*Error", line)]
    return (told or lines)[-1].strip().replace("|", "/")[:200]


def tests(report: Report, small: bool) -> None:
    """Every test marked gpu in a process of its own, since a process can't use CUDA after an illegal access."""
    code, output = call(report, ["-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "-m", "gpu", "tests"], LIMIT)
    names = [line for line in output.splitlines() if line.startswith("tests/")]
    if not names:
        report.add("tests", ["collecting", f"exit code {code}", reason(output)])
    for name in names[:2] if small else names:
        code, output = call(report, ["-m", "pytest", "-o", "addopts=", "-q", "-rs", name], LIMIT_OF_A_TEST)
        skipped = re.search(r"^SKIPPED.*?: (.*)$", output, re.M)
        result = "skipped" if skipped and not code else "passed" if not code else "failed"
        report.add("tests", [f"`{name}`", result, skipped[1] if skipped else reason(output) if code else ""])


def rows(report: Report, part: str, names: list[str], command: list[str]) -> None:
    """One call of gpu_bench.py for each name; its rows of a table."""
    for name in names:
        began = time.monotonic()
        code, output = call(report, [str(TESTS / "gpu_bench.py"), *command, name], LIMIT)
        found = [line for line in output.splitlines() if line.startswith(("| ", f"| {name}"))]
        found = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
        found = [row for row in found if row[0] not in ("what", "run")]
        for row in found:
            report.add(part, row)
        if not found:
            report.add(part, [name, f"exit code {code} after {time.monotonic() - began:.0f} s: {reason(output)}"])


def main() -> None:
    import gpu_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for weights, pictures, cache and results")
    parser.add_argument("--small", action="store_true", help="weights/tiny at 128 pixels, on a CPU or a GPU")
    parser.add_argument("--write", action="store_true", help="rewrite docs/gpu.md")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, arguments.small, arguments.write)
    small = ["--small"] if arguments.small else []
    tests(report, arguments.small)
    rows(report, "network", list(gpu_bench.PARTS), ["part", "tiny" if small else "12B"])
    rows(report, "runs", list(gpu_bench.RUNS), ["runs", *small, str(folder)])


if __name__ == "__main__":
    main()
