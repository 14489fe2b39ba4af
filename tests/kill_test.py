"""Kill runs with SIGKILL, resume them, and compare them bit for bit with a run that is never killed.

    python tests/kill_test.py                    30 runs, some minutes; the tests call it with --runs 2

Half of the kills come at a random moment. The other half come at a random step of writing to the disk: before or after
an fsync, a rename or a deletion, or in the middle of a file, which is then half written. A run is killed up to three
times. Runs alternate between 0 and 2 loader processes and between pictures and cached latents. All have accumulation,
an EMA, three buckets, captions and validation.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import processes
from conftest import make_bundle, make_pictures
from kontext_min.extras import lora_files, runs

FLAGS = (
    "--resolution 64 --steps 24 --batch-size 2 --accumulate 2 --ema 0.9 --warmup 3 --lr 1e-3 "
    "--checkpoint-every 5 --validate-every-epochs 2"
)
KINDS = list(product((2, 0), (2, 0)))  # loader processes, variants of cached latents; the hardest first


class DiskSteps:
    """Counts the steps of writing to disk and saves the count in a file. At step `fatal` the process kills itself."""

    def __init__(self, fatal=None, file=None):
        self.count, self.fatal, self.file = 0, fatal, file
        for module, name in (
            *((os, n) for n in ("fsync", "rename", "replace")),
            (shutil, "rmtree"),
            (runs, "save_file"),
            (lora_files, "save_file"),
        ):
            setattr(module, name, self.counted(getattr(module, name), is_save=name == "save_file"))

    def counted(self, function, is_save):
        def call(*args, **kwargs):
            self.count += 2  # before and after
            if self.fatal == self.count - 1:
                if is_save:
                    function(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if self.fatal == self.count:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.file:
                self.file.write_text(str(self.count))
            return result

        return call


def outcome(folder):
    """The bytes of the LoRA file, and the metrics without the two columns of time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (folder / "lora.safetensors").read_bytes(), [
        {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=3, help="at most so many per run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: %(default)s)")
    args = parser.parse_args(argv)
    rng, began = random.Random(args.seed), time.monotonic()
    kills = {"at a random moment": 0, "while writing": 0}
    reached, wrong = [], 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        common = ["--hr-root", make_pictures(work / "hr"), "--weights", make_bundle(work / "w"), *FLAGS.split()]

        def run(folder, kind, setup=None):
            here = ["--output-dir", work / folder, "--cache-dir", work / f"{folder}-cache"]
            flags = [*common, *here, "--workers", kind[0], "--cache-latents", kind[1]]
            return processes.start(flags, work / f"{folder}.log", setup)

        expected, seconds, writes = {}, {}, {}
        for cached in sorted({cached for _, cached in KINDS[: args.runs]}):
            folder, before = f"whole-{cached}", time.monotonic()
            process = run(folder, (0, cached), partial(DiskSteps, file=work / "count"))
            process.join()
            assert process.exitcode == 0, (work / f"{folder}.log").read_text()
            seconds[cached], writes[cached] = time.monotonic() - before, int((work / "count").read_text())
            expected[cached] = outcome(work / folder)
            took = f"{seconds[cached]:.1f} s, {writes[cached]} writing steps"
            print(f"never killed, latents {cached}: {took}", flush=True)

        for i in range(args.runs):
            kind = KINDS[i % len(KINDS)]
            folder, log, killed, last = f"run-{i}", work / f"run-{i}.log", 0, 0
            for k in range(rng.randint(1, args.kills)):
                left = 1 - 0.7 * last / 24  # roughly the part of the run that remains
                if (i + k) % 2:
                    how = "while writing"
                    process = run(folder, kind, partial(DiskSteps, fatal=rng.randint(1, round(left * writes[kind[1]]))))
                else:
                    how = "at a random moment"
                    process = run(folder, kind)
                    time.sleep(rng.uniform(0.1, 1) * left * seconds[kind[1]])
                    if process.exitcode is None:
                        try:
                            # killpg takes its loaders too
                            (os.kill if rng.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
                        except ProcessLookupError:  # so young that it has no process group yet
                            process.kill()
                process.join()
                if process.exitcode == -signal.SIGKILL:
                    kills[how], killed = kills[how] + 1, killed + 1
                    checkpoint = runs.latest_checkpoint(work / folder)
                    last = int(checkpoint.name[5:]) if checkpoint else 0
                    reached.append(last)
            process = run(folder, kind)
            process.join()
            leftovers = [p.name for p in (work / folder / "checkpoints").glob(".*")]
            same = process.exitcode == 0 and not leftovers and outcome(work / folder) == expected[kind[1]]
            wrong += not same
            verdict = "same" if same else "DIFFERENT"
            print(f"run {i}: {kind[0]} loaders, latents {kind[1]}, {killed} kills, {verdict}", flush=True)
            if not same:
                print(leftovers, log.read_text(), file=sys.stderr)
            shutil.rmtree(work / folder, ignore_errors=True)
    resumed = {step: reached.count(step) for step in sorted(set(reached))}
    print(f"{args.runs} runs, kills {kills}, resumed from step (times) {resumed}, {time.monotonic() - began:.0f} s")
    print(f"{wrong} runs differ from the one that was never killed")
    return 1 if wrong or not sum(kills.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
