"""Restore a folder: skip what is done, check that it was made the same way, and go on if one file fails.

`.restored-with.jsonl` in the output folder has a line for each picture: how it was made, and from which input. A folder
that was stopped continues, and pictures made in another way do not count as restored.
"""

import errno
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kontext_min import __version__
from kontext_min.extras.fingerprint import core_files, hash_of_code, size_and_samples
from kontext_min.extras.inventory import RECORD, printable
from kontext_min.extras.pictures import ASIDE, Job, reference_of, writable_name
from kontext_min.extras.runs import in_words, lock
from kontext_min.extras.saving import append_line

# Every further picture would fail as this one did: a disk that is full, gone, broken or not yours, a limit, a pipe.
ENDS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
ENDS += (errno.ENODEV, errno.EPIPE)
CODE = hash_of_code(*core_files())


def to_do(jobs: Sequence[Job], source: Path, target: Path, how: dict[str, Any], overwrite: bool) -> list[Job]:
    """The jobs whose pictures are not there yet, or all of them with `overwrite`.

    Args:
        jobs: from pictures.find.
        source: --input.
        target: --output.
        how: what the pictures are made with, as plain JSON values.
        overwrite: replace what is there.

    Raises:
        ValueError: there is nothing to restore, the output holds files that would be replaced or pictures that were
            made in another way, or another run writes into it.
    """
    if not jobs:
        raise ValueError(f"--input {source}: none of its pictures can be read.")
    if source.is_dir():
        lock("--output", target)
        for folder in {job.output.parent for job in jobs}:
            for cut in folder.glob(".*.tmp"):  # of a call that was killed
                if ASIDE.fullmatch(cut.name):
                    cut.unlink()
    there = [] if overwrite else [job for job in jobs if job.output.exists()]
    if not source.is_dir():
        if there:
            raise ValueError(f"--output {there[0].output}: exists; --overwrite replaces it, or choose another.")
        return list(jobs)
    made = _read(target / RECORD)
    reasons = Counter(reason for job in there if (reason := _difference(made.get(job.name), job, how)))
    if reasons:
        raise ValueError(
            f"--output {target}: holds {reasons.total()} of these pictures, but {'; '.join(reasons)}; --overwrite "
            "restores them again, or choose another folder."
        )
    unknown = [j.name for j in there if made[j.name]["file"] is None]
    if unknown:
        text = f"written as a run was stopped, and kept: {_few(unknown)}; look at them"
        print(f"note: {target}: {text}", file=sys.stderr)
    edited = [j.name for j in there if made[j.name]["file"] not in (None, list(size_and_samples(j.output)))]
    if edited:
        text = f"not as they were written, and kept: {_few(edited)}; --overwrite restores all"
        print(f"note: {target}: {text}", file=sys.stderr)
    if before := {made[j.name]["program"] for j in there} - {__version__}:
        text = f"{', '.join(map(str, before))} restored some of these pictures, this is {__version__}"
        print(f"note: {target}: kontext_min {text}; --overwrite restores all", file=sys.stderr)
    elif {made[j.name]["code"] for j in there} - {CODE}:
        print(f"note: {target}: code that was edited since restored some; --overwrite restores all", file=sys.stderr)
    others = [name for name in sorted(made) if not (source / name).exists()]
    if others := [name for name in others if (target / writable_name(name)).exists()]:
        print(f"note: {target}: also holds pictures that are not in --input: {_few(others)}", file=sys.stderr)
    done = set(there)
    return [job for job in jobs if job not in done]


def _few(names: Sequence[str]) -> str:
    return printable(f"{', '.join(names[:3])}{' ...' * (len(names) > 3)}")


def _read(record: Path) -> dict[str, dict[str, Any]]:
    """The last line of each picture; a line that a kill cut short is left out."""
    made = {}
    for text in record.read_text(encoding="utf-8", errors="replace").splitlines() if record.is_file() else []:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            line = json.loads(text)
            made[str(line["picture"])] = {"how": dict(line["how"]), "input": line["input"], "file": line.get("file")}
            made[str(line["picture"])] |= {"program": line.get("program", __version__), "code": line.get("code", CODE)}
    return made


def _difference(line: dict[str, Any] | None, job: Job, how: dict[str, Any]) -> str:
    """Why a picture that is there does not count as restored; empty if it does."""
    if line is None:
        return f"no {RECORD} says how they were made"
    changed = [f"{k} was {line['how'].get(k)}, is {how[k]}" for k in how if line["how"].get(k) != how[k]]
    state = _state(job, how)
    without_samples = [n for k, n in enumerate(state) if k % 3 != 2]  # of older records
    which = "inputs or the clean pictures beside them" if isinstance(how["compare"], str) else "inputs"
    return "; ".join(changed) or f"their {which} have changed since" * (line["input"] not in (state, without_samples))


def _state(job: Job, how: dict[str, Any]) -> list[int]:
    """What changes when the input is replaced, or the clean picture beside it on a sheet of --compare."""
    clean = reference_of(job, Path(how["compare"])) if isinstance(how["compare"], str) else None
    files = [file for file in (job.path, clean) if file]
    return [n for f in files for n in (f.stat().st_size, f.stat().st_mtime_ns, size_and_samples(f)[1])]


@contextmanager
def noted(job: Job, target: Path, how: dict[str, Any], state: list[int], overwrite: bool) -> Iterator[None]:
    """Say in the record how the picture that the block writes is made, and from what; of a single one, nothing.

    That is before a new picture is written, but only after an old one is replaced: wherever a kill falls in between,
    no picture counts as made in a way that it was not. Its file is known, and noted, after both.

    Raises:
        ValueError: without `overwrite`, a file of this name has come since the start.
    """
    replaces, record = job.output.exists(), target / RECORD
    if replaces and not overwrite:
        raise ValueError(f"{job.output}: has come since the start, and is kept; --overwrite replaces it.")

    def note(file: tuple[int, int] | None) -> None:
        if how:
            line = {"picture": job.name, "input": state, "file": file, "how": how}
            append_line(record, json.dumps(line | {"program": __version__, "code": CODE}))

    if not replaces:
        note(None)
    yield
    note(size_and_samples(job.output) if how else None)


@contextmanager
def spared(
    job: Job, jobs: Sequence[Job], failed: list[tuple[str, str]], how: dict[str, Any], overwrite: bool = False
) -> Iterator[list[int]]:
    """A picture that fails is named and added to `failed`, and the folder goes on. Yields the state of its files.

    Raises:
        ValueError, OSError: of a single picture, whose `how` is empty.
        OSError, KeyboardInterrupt: the disk takes no more pictures, or you stop it; a note says how many are there.
    """
    try:
        yield _state(job, how) if how else []  # before it is read: it may be replaced while it is restored
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if not how:
            if isinstance(error, ValueError) and job.name not in str(error):
                raise ValueError(f"{job.name}: {error}") from None
            raise
        if isinstance(error, KeyboardInterrupt) or getattr(error, "errno", None) in ENDS:
            there = sum(other.output.exists() for other in jobs)
            then = (
                "some perhaps from before, and --overwrite begins again"
                if overwrite
                else "and the same command continues"
            )
            error.add_note(f"{there} of {len(jobs)} pictures are there, {then}")
            raise
        print(f"not restored: {printable(job.name)}: {in_words(error)}", file=sys.stderr)
        failed.append((job.name, in_words(error)))
