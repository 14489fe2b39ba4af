"""Restore a folder: skip what is done, check that it was made the same way, and go on if one file fails.

`.restored-with.json` in the output folder records how its pictures were made. A folder that was stopped continues with
the same method, and pictures from another LoRA do not count as finished.
"""

import errno
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kontext_min.extras.pictures import Job
from kontext_min.extras.runs import in_words, lock, write_json

RECORD = ".restored-with.json"
ENDS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE)  # every further picture would fail as this one did


def to_do(jobs: Sequence[Job], source: Path, target: Path, how: dict[str, Any], overwrite: bool) -> list[Job]:
    """The jobs whose pictures are not there yet, or all of them with `overwrite`.

    Args:
        jobs: from pictures.find.
        source: --input.
        target: --output.
        how: what the pictures are made with, as plain JSON values; written into the folder.
        overwrite: replace what is there.

    Raises:
        ValueError: there is nothing to restore, the output holds files that would be replaced or pictures that were
            made in another way, or another run writes into it.
    """
    if not jobs:
        raise ValueError(f"--input {source}: none of its pictures can be read.")
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        lock(target, "--output")
    there = [] if overwrite else [job for job in jobs if job.output.exists()]
    if not source.is_dir():
        if there:
            raise ValueError(f"--output {there[0].output}: exists; --overwrite replaces it, or choose another.")
        return list(jobs)
    record = target / RECORD
    if there:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
            changed = [f"{k} was {before[k]}, is {how[k]}" for k in how if before[k] != how[k]]
            newer = sum(job.path.stat().st_mtime > job.output.stat().st_mtime for job in there)
            changed += [f"{newer} of their inputs have changed since"] * (newer > 0)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            changed = [f"no {RECORD} says how they were made"]
        if changed:
            raise ValueError(
                f"--output {target}: holds {len(there)} of these pictures, but {'; '.join(changed)}; --overwrite "
                "restores them again, or choose another folder."
            )
    todo = [job for job in jobs if job not in there]
    if todo:
        write_json(record, how)
    return todo


@contextmanager
def spared(job: Job, jobs: Sequence[Job], failed: list[tuple[str, str]], stop: bool) -> Iterator[None]:
    """A picture that fails is named and added to `failed`, and the folder goes on.

    Raises:
        ValueError, OSError: with `stop`, that of the picture.
        OSError, KeyboardInterrupt: the disk takes no more pictures, or you stop it; a note says how many are there.
    """
    try:
        yield
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if stop:
            if isinstance(error, ValueError) and job.name not in str(error):
                raise ValueError(f"{job.name}: {error}") from None
            raise
        if isinstance(error, KeyboardInterrupt) or getattr(error, "errno", None) in ENDS:
            there = sum(other.output.exists() for other in jobs)
            error.add_note(f"{there} of {len(jobs)} pictures are there, and the same command continues")
            raise
        print(f"not restored: {job.name}: {in_words(error)}", file=sys.stderr)
        failed.append((job.name, in_words(error)))
