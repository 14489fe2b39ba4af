"""Run train.py or sample.py in processes of their own: killed, signalled or several together.

A fork server imports torch once; every process is forked from it, leads its own process group and writes into a log.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

TESTS = Path(__file__).parent
for folder in (str(TESTS), str(TESTS.parent)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train", "sample", "processes"])


def start(argv, log, setup=None, env=None, program="train"):
    """A process that runs `main(argv)` of a program, after `setup()`, a picklable function, has had its way with it."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the fork server when it starts: two processes on two cores
    process = context.Process(target=_run, args=(program, [str(a) for a in argv], str(log), setup, env or {}))
    process.start()
    return process


def together(argv, log, world=2, setup=None):
    """Several processes as torchrun starts them, rank by rank; their exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    return [p.exitcode for p in joined([start(argv, f"{log}.{r['RANK']}", setup, r) for r in ranks])]


def joined(processes, seconds=300):
    """The processes, ended; one that hangs is killed, so that its exit code shows it."""
    for p in processes:
        p.join(seconds)
        if p.exitcode is None:
            p.kill()
            p.join()
    return processes


def _run(program, argv, log, setup, env):
    os.setsid()
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    code = 70
    try:
        if setup:
            setup()
        code = importlib.import_module(program).main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
