"""The run folder: what a run writes, whole or not at all, and how it goes on after a stop.

    settings.json          every flag, versions, fingerprint of the weights and of the list of pictures
    left-out.txt           the picture files that can't be used, and why
    metrics.jsonl          one object a line; a resumed run first drops the rows behind its checkpoint
    validation/            step-000500.png: degraded | restored | clean
    checkpoints/step-000500/   lora.safetensors for use; trained, optimizer (and ema) and state.json to go on from
    lora.safetensors       the result

A checkpoint is written into a folder aside, flushed to the disk and renamed, so a kill at any moment leaves either the
old state or the new one. Only the first of several processes writes.
"""

import atexit
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kontext_min.checkpoints import save_file

# --------------------------------------------------------------------------------------------------------- the folder


def open_run(
    folder: Path,
    settings: Mapping[str, Any],
    resume: bool,
    accept: bool,
    write: bool = True,
    overwrite: bool = False,
) -> Path | None:
    """Make a run folder, or return to one: the last whole checkpoint in it, or None for a fresh start.

    Args:
        folder: of the run.
        settings: plain JSON values, compared with those of the stopped run.
        resume: go on if the folder holds a checkpoint; if not wanted, a folder with checkpoints is an error.
        accept: go on even though settings changed.
        write: whether this process is the one that writes.
        overwrite: start afresh; what is there is deleted later, when all else has proved right (`delete_run`).

    Raises:
        ValueError: settings changed and that was not accepted, or a finished run would be overwritten.
        OSError: the folder can't be written.
    """
    last = None if overwrite else latest_checkpoint(folder)
    if last and not resume:
        raise ValueError(f"{folder}: holds a run already ({last.name}); leave out --no-resume, or --overwrite it.")
    stored = folder / "settings.json"
    if last and not accept:
        try:
            before = json.loads(stored.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(
                f"{stored}: gone or broken, so nobody can say whether settings changed since {last.name}; go on with "
                "--accept-changes, or start again with --overwrite or another --output-dir."
            ) from None
        changed = [k for k in settings if k in before and before[k] != settings[k] and k not in MAY_CHANGE]
        if changed:
            what = "; ".join(f"{k} was {before[k]}, is {settings[k]}" for k in changed)
            raise ValueError(
                f"{folder}: settings changed since {last.name}: {what}. Go on with --accept-changes, or start again "
                "with --overwrite or another --output-dir."
            )
    if write:
        make_folders(folder)
        for leftover in (folder / "checkpoints").glob(".*"):  # of a process that was killed while writing
            shutil.rmtree(leftover, ignore_errors=True)
    return last


MAY_CHANGE = (  # settings that change no result, but for rounding
    *("resume", "accept_changes", "overwrite", "output_dir", "cache_dir", "workers", "versions"),
    *("checkpoint_every", "keep", "max_skips", "tensorboard", "validate_every_epochs", "validate_every_steps"),
    *("device", "shard", "stream", "gradient_checkpointing", "offload_activations", "compile"),
    *("lora_format", "plan", "budget"),
    "batch_size",  # what counts is its product with the number of processes
)


def make_folders(folder: Path) -> None:
    """The run folder and those in it."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "validation").mkdir(exist_ok=True)


def delete_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else that lies there."""
    for name in ("checkpoints", "validation", "tensorboard", "transformer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("settings.json", "metrics.jsonl", "report.html", "lora.safetensors", "left-out.txt"):
        (folder / name).unlink(missing_ok=True)
    make_folders(folder)


class Stopped(Exception):
    """A run that could not go on, for a reason outside the program; the message is one line for its owner."""


@contextmanager
def under_way(folder: Path) -> Iterator[None]:
    """Errors from here on are not those of the command line: the disk's end the run, any other is a bug and is shown.

    Raises:
        Stopped: disk full, folder not writable, or pictures gone.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1]  # that of a loader process ends a whole traceback
        last = latest_checkpoint(folder)
        kept = f"{last} is whole and the same command goes on from it" if last else "there is no checkpoint yet"
        raise Stopped(f"{folder}: the run had to stop, {reason}; {kept}.") from error
    except ValueError as error:
        raise RuntimeError("this is a bug in the program, please report it") from error


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file aside and rename it."""
    write_text(file, json.dumps(values, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file aside and rename it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


# -------------------------------------------------------------------------------------------------------- checkpoints


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step that is whole."""
    found = sorted((folder / "checkpoints").glob("step-*/state.json"), key=lambda p: int(p.parent.name[5:]))
    return found[-1].parent if found else None


def save_checkpoint(
    folder: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    save_result: Callable[[Path], None],
) -> Path:
    """Write checkpoints/step-000500/: a safetensors file for each of `files`, state.json, and what is for use.

    Raises:
        OSError: disk full or folder not writable; the checkpoints before this one are untouched.
    """
    target = folder / "checkpoints" / f"step-{step:06d}"
    if target.exists():  # stopped right behind a regular checkpoint: the same step of the same run
        return target
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, aside / f"{name}.safetensors")
        save_result(aside)
        (aside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
        for path in (*aside.rglob("*"), aside):  # the data must be on the disk before the name is
            flush(path)
        aside.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def flush(path: Path) -> None:
    """Until a file, or the list of a folder's files, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def prune_checkpoints(folder: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the last `keep` checkpoints and the best one; keep 0 keeps all."""
    found = sorted((folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    for old in found[:-keep] if keep else []:
        if int(old.name[5:]) != best:
            gone = old.rename(old.with_name(f".{old.name}"))  # no longer a checkpoint, wherever the deletion is cut off
            shutil.rmtree(gone)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The safetensors files of a checkpoint by name, and its state.

    Raises:
        ValueError: a file is broken.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {f.stem: load_file(f) for f in checkpoint.glob("*.safetensors")}, state
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{checkpoint}: broken ({error}); delete it to go on from the one before.") from None


def put_back(params: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Give parameters the values of a checkpoint, sharded as they are.

    Raises:
        ValueError: the checkpoint has other parameters.
    """
    if {n: p.shape for n, p in params.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError("the checkpoint holds other parameters; --full, --rank and --lora-targets can't change.")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(like(p, tensors[name]))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer as named tensors: `17.exp_avg` belongs to its 18th parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": whole(torch.as_tensor(v)) for i, values in state.items() for k, v in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments back, sharded like the parameters that they belong to."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor if key == "step" else like(params[int(index)], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, in its own shape, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor laid out like a parameter: on its device, and sharded if it is."""
    tensor = tensor.to(parameter.device)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


# ------------------------------------------------------------------------------------------------------------ metrics


def append_metrics(folder: Path, row: Mapping[str, Any], board: Any = None) -> None:
    """Add one line to metrics.jsonl, where what is not finite becomes null, and its numbers to tensorboard's board."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(finite(row)) + "\n")
    if board:
        group = "validation" if row.get("validation") else "train"
        for name, value in row.items():
            if isinstance(value, float):
                board.add_scalar(f"{group}/{name}", value, row["step"])


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null, wherever in a value they are."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_picture(folder: Path, step: int, picture: Image.Image, board: Any = None) -> None:
    """Keep the validation pictures of a step, for tensorboard too."""
    picture.save(folder / "validation" / f"step-{step:06d}.png")
    if board:
        board.add_image("validation", np.array(picture), step, dataformats="HWC")


def open_tensorboard(folder: Path, step: int) -> Any:
    """A tensorboard writer whose curves go on behind a step; the package is optional, so it is imported here."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
    atexit.register(board.close)
    return board


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl; a last line that a kill cut short is left out."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the rows behind a checkpoint, which the resumed run will write again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# -------------------------------------------------------------------------------------------- signals and the terminal


class StopSignal:
    """SIGTERM and SIGINT ask the loop to finish its step; a second one ends the process at once (143 or 130)."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        os.write(2, b"\nstopping after this step (once more: at once)\n")  # print may be what was interrupted


def outlive_signals(worker: int) -> None:
    """For loader processes: terminals and schedulers signal the whole group, but the step still needs its pictures."""

    def leave_later(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(30.0, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_later)
