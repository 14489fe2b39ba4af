"""The run folder: what a run writes, how a write is complete or absent, and how the run continues after a stop.

    settings.json          every flag, versions, fingerprint of the weights and of the list of pictures
    left-out.txt           picture files that are not used, and why
    metrics.jsonl          one object a line; a resumed run first drops the rows after its checkpoint
    validation/            step-000500.png: degraded | restored | clean
    checkpoints/step-000500/   lora.safetensors to use; trained, optimizer (and ema) and state.json to continue from
    lora.safetensors       the result

A checkpoint is written to a temporary folder, flushed to disk and renamed, so a kill at any moment leaves either the
old state or the new one. Only the first of several processes writes, and only one run at a time uses a folder.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kontext_min import __version__
from kontext_min.checkpoints import metadata, read_json
from kontext_min.data import THREADS
from kontext_min.extras.fingerprint import PAGE, core_files, hash_of_code, size_and_samples
from kontext_min.extras.inventory import marked
from kontext_min.extras.lora_files import lora_file
from kontext_min.extras.saving import append_line, checksum, naming, save_file, write_picture

# What a run writes. Nothing else in its folder is replaced or deleted.
WRITTEN = re.compile(
    r"settings\.json|left-out\.txt|metrics\.jsonl|report\.html|lora\.safetensors|checkpoints/step-\d+"
    r"|validation/step-\d+\.png|tensorboard/events\.out\.tfevents\.[^/]*|transformer/(config\.json"
    r"|diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors)"
)
CHECKPOINT = {"state.json", "trained.safetensors", "optimizer.safetensors", "ema.safetensors"}  # what continues a run
CHECKPOINT |= {"lora.safetensors", "transformer"}  # what is used
LEFTOVER = re.compile(r"\.step-\d+(\.\d+)?")  # of a process that was killed while it wrote or deleted a checkpoint
EXIF_AT_END = 1 << 17  # bytes: the turn of a picture may stand there, behind the camera's notes
COMPRESSED = re.compile(r"\.(a?png|avif|gif|j2k|jp2|jpx|jpe?g|jpe|jfif|mpo|webp)", re.IGNORECASE)  # endings
KEEP = 3  # checkpoints besides the best one
MAY_CHANGE = (  # settings that change no result, apart from rounding
    *("resume", "accept_changes", "overwrite", "output_dir", "cache_dir", "workers", "versions", "defaults"),
    *("checkpoint_every", "tensorboard", "validate_every_epochs", "device", "shard", "stream"),
    *("gradient_checkpointing", "compile", "plan"),
    *("init_lora", "hr_root", "weights", "transformer", "vae", "clip", "t5"),  # what is in them is compared
    *("init_lora_holds", "changes"),  # of a run that continues
    "batch_size",  # its product with the number of processes counts: pictures_a_batch
)

OWN = (  # what each of several processes may have of its own: places, and its part of the machine
    *("hr_root", "lr_root", "val_root", "output_dir", "cache_dir", "init_lora", "weights"),
    *("transformer", "vae", "clip", "t5", "device", "workers", "versions"),
)

# --------------------------------------------------------------------------------------------------------- the folder


def open_run(
    folder: Path, settings: Mapping[str, Any], resume: bool, accept: bool, overwrite: bool, write: bool
) -> Path | None:
    """Make a run folder, or return to one: the last whole checkpoint in it, or None for a fresh start.

    Args:
        folder: of the run.
        settings: plain JSON values, compared with those of the stopped run.
        resume: continue if the folder holds a checkpoint; otherwise a folder with checkpoints is an error.
        accept: continue although settings changed.
        overwrite: start afresh; the old run is deleted later, when everything else is known to be right (`delete_run`).
        write: whether this process is the one that writes.

    Raises:
        ValueError: another run uses the folder, holds files that this run did not write, or settings changed.
        OSError: the folder can't be written.
    """
    for name in ("transformer", *("checkpoints", "validation", "tensorboard") * overwrite):
        if (folder / name).is_symlink():
            raise ValueError(f"--output-dir {folder}: its {name}/ is a link, and a run may replace it; remove it.")
    last, there = latest_checkpoint(folder), [path.relative_to(folder).as_posix() for path in written(folder)]
    before = _settings_of_a_run(folder)
    is_run = before is not None or (last and (last / "trained.safetensors").exists())
    checkpoints = (p for p in folder.glob("checkpoints/step-*") if WRITTEN.fullmatch(f"checkpoints/{p.name}"))
    foreign = [p.relative_to(folder).as_posix() for checkpoint in checkpoints for p in _foreign(checkpoint)]
    if foreign := sorted(foreign) if is_run else there:
        shown = ", ".join(foreign[:3]) + ", ..." * (len(foreign) > 3)
        advice = "move it" if is_run else "choose another folder"
        raise ValueError(f"--output-dir {folder}: holds {shown}, which no run wrote; {advice}.")
    if write:
        lock("--output-dir", folder, folder / "checkpoints", folder / "validation")
        for path in (folder / "checkpoints").iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
    results = [name for name in there if name.startswith(("lora", "transformer"))]
    models = [name for name in results if name.endswith(".safetensors")]
    yours = [name for name in models if not _of_this_project(folder / name, broken=overwrite)]
    if overwrite and yours:
        raise ValueError(f"{folder}: holds {yours[0]}, which no run wrote; move it.")
    if overwrite:
        return None
    instead = "start again with --overwrite or another --output-dir"
    if last and not resume:
        raise ValueError(f"{folder}: holds a run already ({last.name}); leave out --no-resume, or {instead}.")
    if results and not last:
        raise ValueError(f"{folder}: holds {results[0]}, but no checkpoint to continue from; {instead}.")
    if yours := [name for name in yours if settings.get("full") or not name.startswith("transformer")]:
        raise ValueError(f"{folder}: holds {yours[0]}, which no run wrote or which is cut; move it.")
    start = settings.get("init_lora")
    asked = start, (holds := _holds(start))
    if last and before and start and asked != (before.get("init_lora"), before.get("init_lora_holds", holds)):
        raise ValueError(f"--init-lora {start}: {folder} continues from {last.name}; leave the flag out, or {instead}.")
    if results and write and last.name != f"step-{settings.get('steps', 0):06d}":  # else this one was done
        print(f"note: {folder / results[0]} is that of the run before, until this one is done")
    lines = _changes(before, settings) if before else []
    if last and before and write:
        then, now = before["versions"], settings.get("versions", {})
        others = [k for k in now if then.get(k) not in (None, now[k], now[k].split()[0])]
        if "code" in others:
            print(f"note: {folder}: the code was edited or updated since; the result may differ")
        if others := [f"{k} was {then[k]}, is {now[k]}" for k in others if k != "code"]:
            print(f"note: {folder}: {'; '.join(others)}; the result may differ, as by rounding")
    if before and not last and not start and before.get("init_lora"):  # it begins again, and not from there
        lines.append(f"init_lora was {before['init_lora']}, is None")
    if there and accept and write and before is None:
        print(f"note: {folder}/settings.json: missing or broken, so nothing tells what is changed, or how it began")
    if there and accept and write and lines:
        _note_changes(folder, before, settings, lines)
    if there and not accept:
        if before is None:
            raise ValueError(
                f"{folder}/settings.json: missing or broken, so changed settings can't be seen; continue with "
                f"--accept-changes, or {instead}."
            )
        if lines:
            raise ValueError(f"{folder}: settings changed: {'; '.join(lines)}. Give --accept-changes, or {instead}.")
        if last and (made_with := _read_state(last).get("settings")) and made_with != _result_settings(folder):
            raise ValueError(
                f"{last}: is of a run with other settings than settings.json; delete it if it is, or {instead}. If you "
                "changed the settings, give --accept-changes again."
            )
    return last


def _changes(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Settings that change the result and are not those of before, in words."""
    changed = {k: before[k] for k in settings if k in before and before[k] != settings[k]}
    words = {"pictures": "pictures were added, removed or changed (TIFFs and BMPs: or copied), or their captions were"}
    if before.get("validate_every_epochs") != settings.get("validate_every_epochs"):
        words["pictures"] += ", or --validate-every-epochs holds out others"
    words["files"] = "degraded pictures or those to validate on were added, removed or changed"
    words["operators"] = "the operators of --degrade changed"
    if "alpha" in changed:
        times = (settings["alpha"] or settings["rank"]) / (before["alpha"] or before.get("rank", settings["rank"]))
        words["alpha"] = f"alpha was {before['alpha']}, is {settings['alpha']}"
        words["alpha"] += f": what is learned counts {times:g} times" * (times != 1)
    if "degrade" in changed:
        changed.pop("operators", None)
    if "prompt" in changed:  # one of the pictures' prompts, which the hash of the pictures holds too
        changed.pop("pictures", None)
    if "pictures" in changed:
        changed.pop("files", None)
    return [words.get(k, f"{k} was {v}, is {settings[k]}") for k, v in changed.items() if k not in MAY_CHANGE]


def _note_changes(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any], lines: list[str]) -> None:
    print(f"note: {folder}: settings changed: {'; '.join(lines)}")
    if any(before.get(k) != settings[k] for k in ("pictures", "files") if k in settings):
        # Their hash holds the prompt too; that of `files` does not.
        sure = before.get("prompt") == settings.get("prompt") or before.get("files") != settings.get("files")
        which = "pictures" if sure else "if pictures changed too, those"
        print(f"note: {which} to validate on may have been trained on before, and score too high then")


def lock(flag: str, folder: Path, *inside: Path) -> None:
    """Make the folder of a flag and those inside, and hold it until this process ends, even by a kill.

    Raises:
        ValueError: another process holds it.
        OSError: a folder can't be made or written.
    """
    path = folder
    try:
        for path in (folder, *inside):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        path = folder / ".lock"
        _held.append(path.open("a"))
        import fcntl

        fcntl.lockf(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by loader processes
    except ImportError:  # Windows
        print(f"note: {folder}: no locks on this system; start no other run in this folder", flush=True)
    except BlockingIOError:
        raise ValueError(f"{flag} {folder}: another run is using it; wait for it, or choose another.") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise OSError(f"{flag} {path}: can't be made or written: {error.strerror}.") from None
        print(f"note: {folder}: its disk has no locks; start no other run in this folder", flush=True)


_held: list[Any] = []


def close_run() -> None:
    """Let another run use the folder, and close tensorboard's file."""
    while _held:
        _held.pop().close()


def _settings_of_a_run(folder: Path) -> dict[str, Any] | None:
    """What settings.json holds, or None if there is none, or it is broken or of another program."""
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    versions = found.get("versions") if isinstance(found, dict) else None
    return found if isinstance(versions, dict) and "kontext_min" in versions else None


def _result_settings(folder: Path) -> str:
    """A hash of the settings in settings.json that the result depends on."""
    settings = _settings_of_a_run(folder) or {}
    found = "start_time_found"  # which older runs do not have
    return hash_of(sorted((k, v) for k, v in settings.items() if k not in (*MAY_CHANGE, found)))


def flags_of_all(settings: Mapping[str, Any]) -> list[Any]:
    """What all processes of a run have to be given. Where pictures are may differ: what they hold is compared."""
    return [*sorted((k, v) for k, v in settings.items() if k not in OWN), _holds(settings["init_lora"])]


def versions(device: str, program: str) -> dict[str, str]:
    """Of what a run's numbers depend on besides its settings; the code is that of the core and of the program."""
    known = {"kontext_min": __version__, "torch": torch.__version__, "device": device}
    return known | {"code": hash_of_code(*core_files(), program)}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds; empty if it is broken, which `load_checkpoint` says."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    return {}


def _of_this_project(file: Path, broken: bool = False) -> bool:
    """Whether the header of a result says that train.py wrote it; `broken` if it has none that can be read.

    A model that `export merge` wrote has the same header, and the names of the LoRAs in it.
    """
    with suppress(ValueError, FileNotFoundError):
        about = metadata(file).get("kontext_min", "")
        return bool(about) and '"merged":' not in about
    return broken


def _foreign(checkpoint: Path) -> list[Path]:
    """The files in a checkpoint that no run wrote."""
    found = [p for p in checkpoint.glob("*") if p.name not in CHECKPOINT and p.name[0] != "."]
    inside = (p for p in checkpoint.glob("transformer/*") if p.name[0] != ".")
    return found + [p for p in inside if not WRITTEN.fullmatch(f"transformer/{p.name}")]


def written(folder: Path) -> list[Path]:
    """The files and checkpoints in a folder that a run wrote, or that have their names."""
    found = (*folder.glob("*"), *folder.glob("*/*"))
    return sorted(path for path in found if WRITTEN.fullmatch(path.relative_to(folder).as_posix()))


def delete_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else that lies there."""
    for path in written(folder):
        _delete(path)
    if others := sorted(folder.glob("checkpoints/step-*")):
        print(f"note: {others[0]}{' ...' * (len(others) > 1)}: kept; it is no checkpoint of the new run")


def _delete(path: Path) -> None:
    """A file, a folder with all that it holds, or a link, but not what the link leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def in_words(error: BaseException) -> str:
    """An error without the [Errno 28] of the system's own, and with the file it is about."""
    system = [getattr(error, part, None) for part in ("filename", "strerror")]
    if getattr(error, "errno", None) == errno.EMFILE:
        system[1] = "this program may open no more files; raise the limit with ulimit -n"
    return ": ".join(str(part) for part in system if part) or str(error).strip()


class Stopped(Exception):
    """A run that cannot continue, for a reason outside the program; the message is one line for its owner."""


@contextmanager
def under_way(folder: Path) -> Iterator[None]:
    """From here on errors are no longer about the command line: a failing disk stops the run, any other is a bug.

    Raises:
        Stopped: disk full, folder not writable, or pictures gone.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = in_words(error).splitlines()[-1]  # that of a loader process is the last line of a traceback
        last = latest_checkpoint(folder)
        kept = f"{last} is whole, and the same command continues from it" if last else "there is no checkpoint yet"
        raise Stopped(f"{folder}: the run had to stop, {reason}; {kept}.") from error
    except ValueError as error:
        if "not finite" in str(error):
            raise Stopped(f"{folder}: a validation failed, {error} Lower --lr, or raise --warmup.") from error
        raise RuntimeError("this is a bug in the program, please report it") from error


def write_json(file: Path, values: Any) -> None:
    """Write a JSON file aside and rename it."""
    write_text(file, json.dumps(values, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file aside and rename it."""
    aside = file.with_name(f".{os.getpid()}.{file.suffix}.tmp")
    try:
        with naming(file):
            aside.write_text(text, encoding="utf-8")
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def hash_of(values: Any) -> str:
    """16 hex digits that name some JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def begun(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to write: with the --init-lora that the run began with, and all that --accept-changes changed since."""
    last = latest_checkpoint(folder)
    before = (_settings_of_a_run(folder) if last else None) or {}
    start, lines = settings.get("init_lora") or before.get("init_lora"), _changes(before, settings)
    changes = [*before.get("changes", ()), *([f"after {last.name}: {'; '.join(lines)}"] if lines else [])]
    holds = before.get("init_lora_holds") or _holds(start)
    return {**settings, "init_lora": start, "init_lora_holds": holds, "changes": changes}


def _holds(lora: str | None) -> list[int] | None:
    """What tells the LoRA of --init-lora from another one of its name."""
    return list(size_and_samples(lora_file(lora))) if lora and Path(lora).exists() else None


def marks(pictures: Iterable[Any]) -> list[tuple[str, int, int, int]]:
    """(name, bytes, checksum of start, middle and end, time of change where it is needed) of each of some data.Picture.

    Without compression an edited picture keeps its size, and most of its bytes. Of others the time does not count, so
    that a run continues with a copy of its pictures.
    """

    def mark(picture: Any) -> tuple[str, int, int, int]:
        ending = picture.path.suffix.lower()
        plain = not COMPRESSED.fullmatch(ending)
        found = size_and_samples(picture.path, EXIF_AT_END if ending in (".webp", ".avif") else PAGE)
        return picture.name, *found, picture.path.stat().st_mtime_ns * plain

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(mark, pictures))


def hash_of_pictures(pairs: Any) -> str:
    """Of the pictures to train on, and their prompts."""
    return hash_of([*marks(pairs.pictures), *pairs.prompts])


def hash_of_files(pairs: Any, held: Any) -> str:
    """Of the pictures of a run besides those to train on: the ones to validate on, and degraded partners."""
    partners = [p for some in (pairs, held) for p in getattr(some, "partners", ())]
    return hash_of(marks([*(held.pictures if held else ()), *partners]))


def changed_since(begun: Mapping[str, Any], pairs: Any, held: Any) -> list[str]:
    """A line if pictures are no longer those of these settings."""
    with suppress(OSError):  # one is gone
        if (hash_of_pictures(pairs), hash_of_files(pairs, held)) == (begun["pictures"], begun["files"]):
            return []
    return ["note: pictures were changed or removed while the run went on"]


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints_of(folder: Path) -> list[Path]:
    """The whole checkpoints, by step. A copy with another name, such as step-000020-good, is yours and not touched."""
    found = {int(p.name[5:]): p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)}
    return [found[step] for step in sorted(found) if (found[step] / "state.json").exists()]


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step."""
    found = checkpoints_of(folder)
    return found[-1] if found else None


def best_step(folder: Path, state: dict[str, Any]) -> list[str]:
    """A line if training changed nothing, or if another step than the last one has the best PSNR: where it is kept."""
    rows = [row for row in read_metrics(folder) if row.get("validation") and row.get("psnr")]
    scores = {f"{row['psnr']:.2f} dB, SSIM {row.get('ssim') or 0:.3f}" for row in rows}
    if len(rows) > len(scores) == 1 and state["best_step"] in {row["step"] for row in rows}:  # else some are lost
        return [f"note: training has not changed the PSNR, {scores.pop()}; raise --lr or --steps"]
    step, psnr = state["best_step"], state["best_psnr"]
    if step in (None, state["step"]):
        return []
    kept = folder / "checkpoints" / f"step-{step:06d}"
    if step and kept.exists():
        try:
            files = [*kept.glob("lora.safetensors"), *kept.glob("transformer/*.safetensors")]
            for file in files or [kept / "lora.safetensors"]:
                metadata(file)
        except (OSError, ValueError) as error:
            return [f"note: step {step} has the best PSNR, {psnr:.2f} dB, but its result is broken: {error}"]
        return [f"note: step {step} has the best PSNR, {psnr:.2f} dB; to restore with it, name {kept}"]
    return [f"note: step {step} has the best PSNR, {psnr:.2f} dB: the steps after it did not help; try another --lr"]


def _free(path: Path) -> Path:
    """The path, or one with more behind its name that is not there."""
    return path.with_name(f"{path.name}-{secrets.token_hex(3)}") if path.exists() else path


def keep_best(folder: Path, step: int | None) -> None:
    """The result of the best checkpoint stays under another name, when what follows is not compared with it."""
    best = folder / "checkpoints" / f"step-{step or 0:06d}"
    if best.exists():
        kept = _free(best.with_name(f"{best.name}-best"))
        shutil.copytree(best, kept, ignore=shutil.ignore_patterns("state.*", "trained.*", "optimizer.*", "ema.*"))
        print(f"note: the best step so far is kept in {kept}")


def save_checkpoint(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    save_result: Callable[[Path], None],
) -> None:
    """Write checkpoints/step-000500/: a safetensors file for each of `files`, state.json, and the result to use.

    Then all but the last KEEP checkpoints and the best one (state["best_step"]) are deleted.

    Raises:
        OSError: disk full or folder not writable; the checkpoints before this one are untouched.
    """
    target = folder / "checkpoints" / f"step-{state['step']:06d}"
    if (target / "state.json").exists():  # stopped right after a regular checkpoint: the same step of the same run
        return
    results = (target / name for name in ("lora.safetensors", "transformer"))
    if any(path.exists() for path in results) and not target.is_symlink():  # it was whole; you kept only its result
        target.rename(kept := _free(target.with_name(f"{target.name}-kept")))
        print(f"note: {target}: is no whole checkpoint any more; renamed to {kept.name}")
    _delete(target)  # it was never whole
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, aside / f"{name}.safetensors")
        save_result(aside)
        made_with = {"settings": _result_settings(folder), "checksums": {k: checksum(v) for k, v in files.items()}}
        (aside / "state.json").write_text(json.dumps(state | made_with, indent=1) + "\n", encoding="utf-8")
        for path in (*aside.rglob("*"), aside):  # the data must be on the disk before the name is
            _flush(path)
        aside.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoints_of(folder)[:-KEEP]:
        if yours := _foreign(old):
            print(f"note: {old}: is kept, because {yours[0].name} in it is not the run's")
        elif int(old.name[5:]) != state["best_step"]:
            # Renamed first: no longer a checkpoint, wherever the deletion is cut off.
            _delete(old.rename(old.with_name(f".{old.name}")))


def _flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows writes it by itself, and opens no folder
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what may be written
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The safetensors files of a checkpoint by name, and its state.

    Raises:
        ValueError: a file is broken.
    """
    for file in filter(Path.is_file, checkpoint.iterdir()):
        file.open("rb").close()  # a file that you may not read is not broken
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        files = {f.stem: load_file(f) for f in checkpoint.glob("*.safetensors")}
        for file in checkpoint.glob("transformer/*"):  # of --full: you may use it, so it must be whole
            read_json(file) if file.suffix == ".json" else metadata(file)
        if not {"trained", "optimizer"} <= files.keys():
            raise ValueError("trained.safetensors or optimizer.safetensors is missing")
        counts = [state[key] for key in ("step", "skipped", "skipped_in_a_row")] + [state["best_step"] or 0]
        right = all(type(n) is int and 0 <= n <= counts[0] for n in counts) and counts[0] == int(checkpoint.name[5:])
        right &= type(state["best_psnr"]) in (float, type(None)) and type(state["unreadable"]) is list
        right &= type(state.setdefault("checksums", {})) is dict  # older checkpoints have none
        if not right or not all(type(line) is str for line in state["unreadable"]):
            raise ValueError("state.json is not the state of this step")
        for name, tensors in files.items():
            if not all(x.is_floating_point() and x.isfinite().all() for x in tensors.values()):
                raise ValueError(f"{name}.safetensors holds values that are no finite numbers")
        return files, state
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        odd = isinstance(error, KeyError | TypeError)
        reason = "state.json is not the state of this step" if odd else in_words(error)
        raise ValueError(
            f"{checkpoint}: broken ({reason}); delete it to continue from the one before it, if any."
        ) from None


def restore(
    checkpoint: Path, trained: Mapping[str, Tensor], ema: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put all values of a checkpoint back into a run's tensors, in place (any shapes); returns its state.

    Raises:
        ValueError: a file is broken, or it is the checkpoint of another model.
    """
    files, state = load_checkpoint(checkpoint)
    try:
        put_back(trained, files["trained"])
        if ema:
            put_back(dict(zip(trained, ema, strict=True)), files.get("ema", files["trained"]))
        load_optimizer(optimizer, files["optimizer"])
        for name, value in state["checksums"].items():
            if name not in files or checksum(files[name]) != value:
                raise ValueError(f"{name}.safetensors is not the one that was written; delete the checkpoint.")
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    return state


def put_back(params: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Give parameters the values of a checkpoint, sharded as they are.

    Raises:
        ValueError: the checkpoint has other parameters.
    """
    if {n: p.shape for n, p in params.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError("holds other parameters; --full, --rank and --lora-targets can't change.")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(_like(p, tensors[name]))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer as named tensors: `17.exp_avg` belongs to its 18th parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": whole(torch.as_tensor(v)) for i, values in state.items() for k, v in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments back, sharded like the parameters that they belong to.

    Raises:
        ValueError: they are those of other parameters, or not whole.
    """
    known = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        found.setdefault(index, {})[key] = tensor
    for index, moments in found.items():
        shape = known[index].shape if index in known else None
        if {k: x.shape for k, x in moments.items()} != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError("its optimizer.safetensors has not the moments of these parameters; delete it.")
        state[int(index)] = {k: x if k == "step" else _like(known[index], x) for k, x in moments.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, in its own shape, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor laid out like a parameter: on its device, and sharded if it is."""
    tensor = tensor.to(parameter.device)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


# ------------------------------------------------------------------------------------------------------------ metrics


def append_metrics(folder: Path, row: Mapping[str, Any], board: Any = None) -> None:
    """Add one line to metrics.jsonl, where a number that is not finite becomes null, and to tensorboard's board."""
    append_line(folder / "metrics.jsonl", json.dumps(finite(row)))
    if board:
        group = "validation" if row.get("validation") else "train"
        for name, value in row.items():
            if isinstance(value, float):
                board.add_scalar(f"{group}/{name}", value, row["step"])


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null in their place, wherever in a value they are."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_picture(folder: Path, step: int, picture: Image.Image, board: Any = None) -> None:
    """Keep the validation pictures of a step, for tensorboard too."""
    write_picture(picture, folder / "validation" / f"step-{step:06d}.png", "PNG", exif=marked(Image.Exif()))
    if board:
        board.add_image("validation", np.array(picture), step, dataformats="HWC")


def open_tensorboard(folder: Path, step: int) -> Any:
    """A tensorboard writer whose curves continue after a step; the package is optional, so it is imported here."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
    _held.append(board)
    return board


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl; a last line that a kill cut short is left out."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def note_lost_rows(folder: Path, rows: list[dict[str, Any]], step: int) -> None:
    """A line if rows of metrics.jsonl up to a step are missing."""
    # (step, whether it is of a validation); each of these has left a picture.
    due = {(n, True) for n in validated(folder) if n <= step} | {(n, False) for n in range(1, step + 1)}
    if lost := {n for n, _ in due - {(row["step"], bool(row.get("validation"))) for row in rows}}:
        print(f"note: {folder / 'metrics.jsonl'} is broken; it has lost the rows of {len(lost)} steps")


def validated(folder: Path) -> dict[int, Path]:
    """The validation pictures by step."""
    return {int(p.stem[5:]): p for p in folder.glob("validation/step-*.png") if p.stem[5:].isdigit()}


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the rows and the validation pictures after a checkpoint, which the resumed run writes again."""
    for n, picture in validated(folder).items():
        if n > step:
            picture.unlink()
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    note_lost_rows(folder, rows, step)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------- signals


def on_stop(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Call a handler on Ctrl-C, `kill` and a closed terminal; what the program was started to ignore stays ignored."""
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # Windows has no SIGHUP, `nohup` ignores it
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


class StopSignal:
    """A signal, a closed terminal or pipe asks the loop to finish its step; a second signal ends it at once."""

    def __init__(self) -> None:
        self.received = False
        on_stop(self._handle)
        sys.stdout = _Output(sys.stdout, self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        with suppress(OSError):  # the terminal may be gone, and print may be what was interrupted
            os.write(2, b"\nstopping after this step (once more: at once)\n")


class _Output:
    """stdout until nobody reads it any more (`train.py | head`); then the run stops in order instead of failing."""

    def __init__(self, stream: Any, stop: StopSignal) -> None:
        self.stream, self.stop = stream, stop

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def isatty(self) -> bool:
        return self.stream.isatty()

    def _give_up(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes there
        self.stop.received = True
        with suppress(OSError):  # of a terminal that is gone
            print(f"stopping after this step, as its output can't be printed: {error.strerror}", file=sys.stderr)


def outlive_signals(worker: int) -> None:
    """For loader processes: terminals and schedulers signal the whole group, but the step still needs its pictures."""

    def leave_later(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(30.0, os._exit, (0,))
        timer.daemon = True
        timer.start()

    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_later)
