"""Check the flags before anything is loaded: a contradiction, or a run that must fail, gives one clear line.

Each row of a table is a condition and the line to print if it holds: the flag, what was given, what to do. The range of
a single number is part of its flag (flags.py).
"""

import atexit
import filecmp
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kontext_min import degrade
from kontext_min.checkpoints import FOLDERS, read_json
from kontext_min.data import Size
from kontext_min.extras import parallel, prompts, runs
from kontext_min.extras.base import Weights, training_of
from kontext_min.extras.effect import check_degradation
from kontext_min.extras.flags import changed, check_values, name_of
from kontext_min.extras.inventory import RECORD
from kontext_min.extras.lora_files import note_other_base, note_other_path
from kontext_min.extras.pictures import existing
from kontext_min.extras.report import is_report

# A flag that is given (with this value, where there is one), what it does, and the flags that do not go with it.
EXCLUDES: tuple[tuple[str, Any, str, tuple[str, ...]], ...] = (
    ("full", None, "trains all weights", ("quantize", "stream")),
    ("full", None, "trains no LoRA", ("rank", "alpha", "lora_targets")),
    ("full", None, "trains no LoRA (merge it: python -m kontext_min.extras.export merge)", ("init_lora",)),
    ("shard", None, "spreads the weights themselves", ("quantize", "stream")),
    ("stream", None, "recomputes every block", ("gradient_checkpointing",)),
    ("objective", "kontext", "has the reference tokens of --context", ("context",)),
    ("objective", "kontext", "starts from pure noise", ("source_noise", "start_time")),
    ("validate_every_epochs", 0, "validates nothing", ("val_root", "validation_prompt")),
    ("lr_root", None, "holds degraded pictures", ("degrade",)),
    ("reference", None, "holds the clean pictures, which with --degrade --input does", ("degrade",)),
)


def check_flags(s: Any) -> None:
    """The settings of either program, one by one, and which do not go together.

    Raises:
        ValueError: a value is outside its range, or one flag excludes another.
    """
    check_values(s)
    given = changed(s)
    for name, value, does, others in EXCLUDES:
        clash = [name_of(other) for other in others if other in given]
        if clash and name in given and value in (None, given[name]):
            flag = name_of(name) + f" {value}" * (value is not None)
            raise ValueError(f"{flag} {does}, so it excludes {' and '.join(clash)}; leave one of the two out.")


def refuse(*rows: tuple[Any, str]) -> None:
    """Print the line of the first row whose condition holds.

    Raises:
        ValueError: a condition holds.
    """
    for holds, line in rows:
        if holds:
            raise ValueError(f"{line}.")


def same(a: Path | None, b: Path | None) -> bool:
    """Whether two paths lead to the same place."""
    return bool(a and b) and a.resolve() == b.resolve()


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path leads to a folder or into it."""
    return path.resolve().is_relative_to(folder.resolve())


def would_lose(path: Path, deleted: Path) -> bool:
    """Whether a file or folder that is read is gone, or holds less, when another is deleted; both are resolved."""
    return path.is_relative_to(deleted) or deleted.parent == path


def can_write(path: Path) -> bool:
    """Whether a file can be made there, in folders that may have to be made too, or replaced if it is there."""
    place = existing(path.parent)  # a file is written aside in its folder, then renamed
    may = not os.path.exists(path) or os.access(path, os.W_OK)  # not path.exists(), which raises where it may not look
    return may and place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def cache_for(folder: Path) -> Path:
    """The folder of a cache, or where nothing can be written there, a new one that goes with this process.

    A fixed one in the system's temporary folder could be another user's, with other blocks under the same names.
    """
    if all(can_write(folder / name / "file") for name in ("prompts", "quantized")):
        return folder
    print(f"note: nothing can be written in {folder}, so prompts and blocks are not kept", file=sys.stderr)
    own = Path(tempfile.mkdtemp(prefix="kontext_min-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def number(text: str) -> float:
    """The number in a text, NaN if there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _searches_long(pattern: str) -> bool:
    """Whether a pattern needs over a second for the name of a module, as (.+)+x does: each letter doubles it."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return False

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        re.fullmatch(pattern, "double_blocks.18.img_attn.norm.query_norm")
    except TimeoutError:
        return True
    except (re.error, RecursionError, OverflowError):
        pass  # `add_lora` says what is wrong
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def check_text(flag: str, *prompts: str | None) -> None:
    """That the prompts of a flag are text.

    Raises:
        ValueError: one has bytes that are none.
    """
    for text in prompts:
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise ValueError(f"{flag} {text!r:.100}: expected text in UTF-8; set the terminal to it.") from None


def check_training(s: Any) -> None:
    """The settings of train.py.

    Raises:
        ValueError: a value outside its range, or flags that contradict each other.
    """
    check_flags(s)
    different = len({str(degrade.parse(text)) for text in s.degrade})
    check_text("--prompt", *s.prompt)
    check_text("--validation-prompt", s.validation_prompt)
    check_folders(s)
    most = 4 * (os.cpu_count() or 1)
    tasks = max(1, len(s.degrade))
    refuse(
        (s.full and s.dtype == "bfloat16", "--full trains in float32; leave --dtype out"),
        (s.shard and parallel.place()[1] < 2, "--shard needs several processes: torchrun --nproc-per-node N"),
        (
            s.start_time != "auto" and not 1e-3 <= number(s.start_time) <= 1,
            f"--start-time: got {s.start_time}, expected auto or a number from 0.001 to 1",
        ),
        (_searches_long(s.lora_targets), f"--lora-targets {s.lora_targets:.99}: such a pattern may search for ever"),
        (s.workers > most, f"--workers: got {s.workers}, expected at most {most}, four per CPU core"),
        (
            s.tensorboard and not find_spec("tensorboard"),
            "--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out",
        ),
        (
            len(s.prompt) not in (0, tasks),
            f"--prompt: got {len(s.prompt)} for {len(s.degrade)} --degrade; give one for each, or none",
        ),
        (different < len(s.degrade), "--degrade: two tasks are the same; leave one of them out"),
        (tasks > 1 and s.cache_latents, "--cache-latents keeps the latents of one --degrade; leave it out"),
    )
    if parallel.place()[0] == 0:
        note_training_of_base(s)


def note_training_of_base(s: Any) -> None:
    """Lines of train.py if its base is one that train.py has trained otherwise."""
    with suppress(OSError, ValueError):  # what is wrong with it is said where it is loaded
        base, about = training_of(s.transformer or s.weights)
        if (learned := about.get("objective", s.objective)) != s.objective:
            print(f"note: {base} was trained for {learned}, so {s.objective} starts from far away", file=sys.stderr)
        else:
            about.pop("prompt", None)  # that of weights/tiny need not be yours; a run of --full names its `prompts`
            note_other_path(str(base), about, vars(s) | {"prompt": prompts_of(s)})
        parts = [part for part in ("vae", "clip", "t5", "words") if part in about]
        here = prompts.fingerprints(Weights(s.weights, s.transformer, s.vae, s.clip, s.t5), parts)
        note_other_base(str(base), {part: about[part] for part in parts}, here)


def prompts_of(s: Any) -> tuple[str, ...]:
    """The prompt of each --degrade of train.py, for pictures without a caption; by default the preset's."""
    return s.prompt or tuple(degrade.PROMPTS.get(d.strip(), degrade.PROMPTS["guide"]) for d in s.degrade or ("guide",))


def check_folders(s: Any) -> None:
    """The folders of train.py: what it writes must not replace, lose or mix with what it reads.

    Raises:
        ValueError: they do.
    """
    out = s.output_dir or Path("runs")
    read = [s.init_lora, s.transformer, s.vae, s.clip, s.t5, *(s.weights / name for name in FOLDERS.values())]
    read += [s.hr_root, s.lr_root, s.val_root]
    deleted = [path.resolve() for path in runs.written(out)] if s.overwrite and s.output_dir else []
    lost = next((p for p in read if p and any(would_lose(p.resolve(), path) for path in deleted)), None)
    page = out / "report.html"
    run = next(
        (p for p in out.resolve().parents if (p / "metrics.jsonl").is_file() and (p / "checkpoints").is_dir()), None
    )
    cached = ["prompts"] + ["latents"] * bool(s.cache_latents) + ["quantized"] * bool(s.stream and s.quantize)
    refuse(
        (lost, f"--overwrite: {lost} lies in --output-dir {out} and may be deleted; choose another --output-dir"),
        (s.output_dir and page.exists() and not is_report(page), f"--output-dir: {page} is not that of a run; move it"),
        (
            not all(can_write(s.cache_dir / name / "file") for name in cached),
            f"--cache-dir {s.cache_dir}: can't be written; name another folder",
        ),
        (
            s.lr_root and _lies_in(s.lr_root, s.hr_root),
            f"--lr-root {s.lr_root}: is --hr-root or in it, so its pictures would be trained on as clean ones; move it",
        ),
        (
            s.val_root and (_lies_in(s.val_root, s.hr_root) or _lies_in(s.hr_root, s.val_root)),
            f"--val-root {s.val_root}: has pictures in common with --hr-root {s.hr_root}; move one of the two folders, "
            "or leave the flag out, and a few pictures are held out",
        ),
        (
            out.resolve() == Path(out.resolve().anchor) or _lies_in(out, s.weights),
            f"--output-dir {out}: is no place for a run; name a folder outside --weights, such as runs/mine",
        ),
        (run, f"--output-dir {out}: lies in another run, {run}; name that, or a folder of its own"),
    )
    of_run, of_cache = ("validation", "checkpoints", "transformer", "tensorboard"), ("prompts", "latents", "quantized")
    for root in filter(None, (s.hr_root, s.lr_root, s.val_root)):
        for flag, folder, parts in (("--output-dir", out, of_run), ("--cache-dir", s.cache_dir, of_cache)):
            mixed = _lies_in(folder, root) or any(_lies_in(root, folder / part) for part in parts)
            refuse((mixed, f"{flag} {folder}: would write among your pictures in {root}; name another folder"))


def suited(file: Path, guide: dict[str, float]) -> dict[str, float]:
    """The defaults of a base: those of its defaults.json, if there is one, in place of the guide's.

    Raises:
        ValueError: one of them is of another type.
    """
    found = guide | (read_json(file) if file.exists() else {})
    for name, value in guide.items():
        kinds = {int} if type(value) is int else {int, float}
        wrong = type(found[name]) not in kinds
        refuse((wrong, f"{file}: {name} is {found[name]!r:.40}, expected a number such as {value}"))
    return found


def check_lengths(s: Any) -> None:
    """The numbers of train.py once the base has filled in its defaults; those of the flags were checked before.

    Raises:
        ValueError: a default is outside its range, or the warm-up is longer than the run.
    """
    try:
        check_values(s)
    except ValueError as error:
        raise ValueError(f"{s.weights / 'defaults.json'}: {error}") from None
    for text in () if s.lr_root else s.degrade:
        check_degradation(text, s.resolution)
    still = f"--lr: got {s.lr:g}, which moves no weight by more than {s.lr * s.steps:g} in {s.steps} steps; give more"
    refuse((s.lr * s.steps < 1e-7, still))  # AdamW's step is about the learning rate
    seen = s.steps * s.accumulate * s.batch_size * parallel.place()[1]
    refuse(
        (len(s.degrade) > seen, f"--degrade: got {len(s.degrade)} tasks, but the run sees {seen} pictures; give more")
    )
    longer = s.warmup and s.warmup > s.steps
    refuse((longer, f"--warmup: got {s.warmup}, but the run has {s.steps} steps and would never reach --lr; give less"))


def whose_scores(s: Any) -> str:
    """The line in the record of --output that says that --json holds its scores, of what and against what."""
    against = s.degrade or (s.reference and s.reference.resolve())
    return json.dumps({"json": str(s.json.resolve()), "input": str(s.input.resolve()), "against": str(against)})


def older_scores(s: Any) -> list[Path]:
    """Files of scores, besides that of --json, of pictures in --output of which some were restored since."""
    stale: dict[str, bool] = {}
    for line in _noted(s):
        with suppress(ValueError, TypeError, RecursionError):  # a line that a kill cut short
            if "json" in (about := json.loads(line)):
                stale[about["json"]] = False
            elif "picture" in about:
                stale = dict.fromkeys(stale, True)
    files = (Path(name) for name in sorted(stale) if stale[name])
    return [file for file in files if file.is_file() and is_scores(file) and not same(file, s.json)]


def whose_report(s: Any) -> str:
    """The line in the record of --output that says whose pictures its report.html shows."""
    return json.dumps({"report": str(s.input.resolve())})


def _noted(s: Any) -> list[str]:
    """The lines of the record of --output."""
    record = s.output / RECORD
    return record.read_text(encoding="utf-8", errors="replace").splitlines() if record.is_file() else []


def check_sampling(s: Any) -> None:
    """The settings of sample.py.

    Raises:
        ValueError: a value outside its range, or flags that contradict each other.
    """
    check_flags(s)
    alone = "sample.py is one process; start it without torchrun, or unset WORLD_SIZE"
    refuse((parallel.place()[1] > 1, f"WORLD_SIZE={parallel.place()[1]} in the environment: {alone}"))
    if s.degrade:
        check_degradation(s.degrade)
    check_text("--prompt", s.prompt)
    folder, page = s.input.is_dir(), s.output / "report.html"
    files = s.reference and s.reference.is_file() and s.input.is_file()
    shown = [line for line in _noted(s) if line.startswith('{"report"')][-1:] if s.report and not s.overwrite else []
    if s.json:
        check_json(s)
    refuse(
        (
            same(s.reference, s.input) or (files and filecmp.cmp(s.reference, s.input, shallow=False)),
            f"--reference {s.reference}: is --input or a copy of it; name the clean pictures",
        ),
        (
            s.reference and folder and not s.reference.is_dir(),
            f"--reference {s.reference}: is a file, but --input is a folder; name a folder",
        ),
        (s.report and not folder, "--report: is for folders; of one picture, --compare shows before and after"),
        (
            s.report and page.exists() and (page.with_name("settings.json").exists() or not is_report(page)),
            f"--report: {page} exists and is not that of a restored folder; choose another --output",
        ),
        (
            shown and page.exists() and whose_report(s) not in shown,
            f"--report: {page} shows the pictures of another --input, or {RECORD} is cut; choose another --output, "
            "or add --overwrite",
        ),
    )


def _is_printed_to(path: Path) -> bool:
    """As /dev/stdout is, and log.txt in `sample.py ... > log.txt`."""
    with suppress(OSError):
        return any(os.path.samestat(os.fstat(fd), path.stat()) for fd in (1, 2))
    return False


def check_json(s: Any) -> None:
    """That --json of sample.py can be written and replaces no file but the scores of this call.

    Raises:
        ValueError: it can't, or does.
    """
    json_file = s.json.resolve()
    # Hidden files are the lock and the record of the folder.
    beside = json_file.parent == s.output.resolve() and (json_file.name == "report.html" or json_file.name[0] == ".")
    old = s.json.exists()
    start = json.dumps({"json": str(json_file)})[:-1]
    last = next((line for line in reversed(_noted(s)) if line.startswith(start)), "")
    ours = json.loads(whose_scores(s))
    older = {name: value for name, value in ours.items() if name != "input"}  # as records had it before
    of_another = old and s.json.stat().st_size and not (s.overwrite or last in map(json.dumps, (ours, older)))
    for holds, problem in (
        (not (s.degrade or s.reference), "scores need a clean picture; add --reference, or --degrade on a clean input"),
        (same(s.json, s.output) or beside, "is written by another flag; name another file"),
        (_is_printed_to(s.json), "is where this program prints; name another file"),
        (old and not is_scores(s.json), "exists and holds no scores; name another file"),
        (
            not (
                (json_file.parent.is_dir() or (s.input.is_dir() and json_file.parent == s.output.resolve()))
                and can_write(json_file)
            ),
            "can't be written; name a file in a folder of yours",
        ),
        (
            of_another,
            f"exists and holds the scores of another call, or {RECORD} is cut; name another file, or add --overwrite",
        ),
    ):
        refuse((holds, f"--json {s.json}: {problem}"))


def check_shared_memory(buckets: Sequence[Size], batch_size: int, workers: int) -> None:
    """That /dev/shm holds the batches that loader workers prepare: a worker that finds it full hangs.

    Containers often have 64 MB there.

    Raises:
        ValueError: it is too small.
    """
    if not (workers and os.path.isdir("/dev/shm")):
        return
    # Two batches a worker are on their way, one is in use; each has a control and a target, in bytes.
    needed = (2 * workers + 1) * batch_size * 2 * max(3 * w * h for w, h in buckets)
    here = os.environ.get("LOCAL_WORLD_SIZE", "")  # processes of torchrun on this machine, with workers each
    needed *= int(here) if here.isdecimal() and parallel.place()[1] > 1 else 1
    free = shutil.disk_usage("/dev/shm").free
    if free < needed:
        raise ValueError(
            f"/dev/shm: {free / 1e6:.0f} MB free, but {workers} workers a process need {needed / 1e6:.0f} MB for their "
            "batches; use --workers 0 or fewer workers, or give the container more (docker run --shm-size=2g)."
        )


def is_scores(file: Path) -> bool:
    """Whether a file may be replaced by scores: it is empty, or holds those of an earlier run."""
    try:
        rows = json.loads(file.read_bytes() or b"[]") if file.is_file() else None  # a pipe would never end
        return isinstance(rows, list) and all("name" in row and "restored" in row for row in rows)
    except (OSError, ValueError, TypeError, RecursionError):
        return False
