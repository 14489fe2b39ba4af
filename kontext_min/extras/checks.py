"""Check the flags before anything is loaded: a contradiction, or a run that must fail, gives one clear line.

Each row of a table is a condition and the line to print if it holds: the flag, what was given, what to do. The range of
a single number is part of its flag (flags.py).
"""

import atexit
import filecmp
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kontext_min import degrade
from kontext_min.checkpoints import FOLDERS, read_json
from kontext_min.data import Size
from kontext_min.extras import parallel, runs
from kontext_min.extras.flags import check_values
from kontext_min.extras.inventory import RECORD
from kontext_min.extras.pictures import existing


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
    may = not path.exists() or os.access(path, os.W_OK)
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


def check_degradation(spec: str) -> None:
    """That a text describes a degradation.

    Raises:
        ValueError: it is none, or one that leaves every picture as it is.
    """
    step, rng = degrade.parse(spec), np.random.default_rng(0)
    sides = (64, 1400)  # dust is so rare that it may miss a small picture
    pictures = [Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8)) for side in sides]
    found = _operators(step, pictures)
    idle = [operator for operator, works in found if not works]
    refuse((len(idle) == len(found), f"--degrade {spec}: changes nothing; give stronger values"))
    if idle and parallel.place()[0] == 0:
        print(f"note: --degrade {spec:.1000}: never changes a picture: {', '.join(idle)}", file=sys.stderr)


def _operators(step: degrade.Step, pictures: Sequence[Image.Image]) -> list[tuple[str, bool]]:
    """Every operator of a degradation, and whether it can run and changes one of the pictures in one of 16 draws."""
    if step.chance is not None and step.chance < 1e-9:
        pictures = []
    if step.kind in ("all", "one"):
        return [found for part in step.parts for found in _operators(part, pictures)]
    return [(step.kind, any(_changes(step, picture) for picture in pictures))]


def _changes(step: degrade.Step, picture: Image.Image) -> bool:
    """Whether an operator changes a picture in one of 16 draws."""
    rng = np.random.default_rng(0)
    return any(step(picture, rng).tobytes() != picture.tobytes() for _ in range(16))


def check_training(s: Any) -> None:
    """The settings of train.py.

    Raises:
        ValueError: a value outside its range, or flags that contradict each other.
    """
    check_values(s)
    for text in s.degrade:
        check_degradation(text)
    check_text("--prompt", *s.prompt)
    check_text("--validation-prompt", s.validation_prompt)
    check_folders(s)
    most = 4 * (os.cpu_count() or 1)
    whole = "so it excludes --quantize and --stream; leave them out"
    auto = s.start_time == "auto"
    refuse(
        (s.full and (s.quantize or s.stream), f"--full trains all weights, {whole}"),
        (s.shard and (s.quantize or s.stream), f"--shard spreads the weights themselves, {whole}"),
        (
            s.shard and parallel.place()[1] < 2,
            "--shard spreads the weights over processes; start them with torchrun --nproc-per-node N",
        ),
        (
            s.stream and s.gradient_checkpointing not in (None, "all"),
            f"--gradient-checkpointing {s.gradient_checkpointing}: --stream recomputes every block; leave it out",
        ),
        (
            s.validation_prompt and s.validate_every_epochs == 0,
            "--validation-prompt: with --validate-every-epochs 0 it is not used; leave one of the two out",
        ),
        (s.full and s.dtype == "bfloat16", "--full trains in float32; leave --dtype out"),
        (
            s.full and (s.alpha or s.rank != type(s).rank or s.lora_targets != type(s).lora_targets),
            "--full trains no LoRA; leave out --rank, --alpha and --lora-targets",
        ),
        (
            s.objective == "kontext" and s.context,
            "--objective kontext has the reference tokens of --context already; leave --context out",
        ),
        (
            s.full and s.init_lora,
            f"--init-lora {s.init_lora}: --full trains no LoRA; merge it into the base first: "
            "python -m kontext_min.extras.export merge",
        ),
        (
            not auto and not 1e-3 <= number(s.start_time) <= 1,
            f"--start-time: got {s.start_time}, expected auto or a number from 0.001 to 1",
        ),
        (
            s.objective == "kontext" and (s.source_noise or auto or number(s.start_time) != 1),
            "--objective kontext starts from pure noise; leave out --source-noise and --start-time",
        ),
        (s.workers > most, f"--workers: got {s.workers}, expected at most {most}, four per CPU core"),
        (
            s.tensorboard and not find_spec("tensorboard"),
            "--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out",
        ),
        (
            len(s.prompt) not in (0, max(1, len(s.degrade))),
            f"--prompt: got {len(s.prompt)} for {len(s.degrade)} --degrade; give one for each, or none",
        ),
        (
            len(s.degrade) > 1 and s.cache_latents,
            "--cache-latents keeps the latents of one --degrade; leave it out",
        ),
        (s.degrade and s.lr_root, "--degrade: the pictures in --lr-root are degraded already; leave one of them out"),
        (
            s.val_root and s.validate_every_epochs == 0,
            "--val-root: with --validate-every-epochs 0 its pictures are not used; leave one of the two out",
        ),
    )


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
    pictures = (("--hr-root", s.hr_root), ("--lr-root", s.lr_root), ("--val-root", s.val_root))
    cached = ["prompts"] + ["latents"] * bool(s.cache_latents) + ["quantized"] * bool(s.stream and s.quantize)
    refuse(
        (lost, f"--overwrite: {lost} lies in --output-dir {out} and may be deleted; choose another --output-dir"),
        (s.output_dir and page.exists() and not is_report(page), f"--output-dir: {page} is not that of a run; move it"),
        (
            not all(can_write(s.cache_dir / name / "file") for name in cached),
            f"--cache-dir {s.cache_dir}: can't be written; name another folder",
        ),
        (same(s.lr_root, s.hr_root), f"--lr-root {s.lr_root}: is --hr-root, so the LoRA would learn to change nothing"),
        (
            s.lr_root and _lies_in(s.lr_root, s.hr_root),
            f"--lr-root {s.lr_root}: lies in --hr-root, so its pictures would be trained on as clean ones; move it",
        ),
        (
            same(s.val_root, s.hr_root),
            f"--val-root {s.val_root}: is --hr-root; leave it out, and a few pictures are held out",
        ),
        (
            s.val_root and (_lies_in(s.val_root, s.hr_root) or _lies_in(s.hr_root, s.val_root)),
            f"--val-root {s.val_root}: has pictures in common with --hr-root {s.hr_root}; move one of the two folders",
        ),
        *(
            (
                root and root.is_dir() and _lies_in(folder, root),
                f"{flag} {folder}: lies in {name}, among your pictures; name another folder",
            )
            for flag, folder in (("--output-dir", out), ("--cache-dir", s.cache_dir))
            for name, root in pictures
        ),
        *(
            (
                root and _lies_in(root, folder / name),
                f"{flag} {folder}: its {name}/ would hold results among the pictures of {root}; name another folder",
            )
            for flag, folder, names in (
                ("--output-dir", out, ("validation", "checkpoints", "transformer", "tensorboard")),
                ("--cache-dir", s.cache_dir, ("prompts", "latents", "quantized")),
            )
            for name in names
            for _, root in pictures
        ),
        (
            out.resolve() == Path(out.resolve().anchor) or _lies_in(out, s.weights),
            f"--output-dir {out}: is no place for a run; name a folder outside --weights, such as runs/mine",
        ),
    )


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
    still = f"--lr: got {s.lr:g}, which moves no weight by more than {s.lr * s.steps:g} in {s.steps} steps; give more"
    refuse((s.lr * s.steps < 1e-7, still))  # AdamW's step is about the learning rate
    longer = s.warmup and s.warmup > s.steps
    refuse((longer, f"--warmup: got {s.warmup}, but the run has {s.steps} steps and would never reach --lr; give less"))


def whose_scores(s: Any) -> str:
    """The line in the record of --output that says that --json holds its scores, and against what."""
    against = s.degrade or (s.reference and s.reference.resolve())
    return json.dumps({"json": str(s.json.resolve()), "against": str(against)})


def check_sampling(s: Any) -> None:
    """The settings of sample.py.

    Raises:
        ValueError: a value outside its range, or flags that contradict each other.
    """
    check_values(s)
    alone = "sample.py is one process; start it without torchrun, or unset WORLD_SIZE"
    refuse((parallel.place()[1] > 1, f"WORLD_SIZE={parallel.place()[1]} in the environment: {alone}"))
    if s.degrade:
        check_degradation(s.degrade)
    check_text("--prompt", s.prompt)
    folder, page = s.input.is_dir(), s.output / "report.html"
    record = s.output / RECORD
    noted = record.read_text(encoding="utf-8", errors="replace").splitlines() if record.is_file() else []
    json_file = s.json and s.json.resolve()
    own = (
        json_file
        and json_file.parent == s.output.resolve()
        and (json_file == page.resolve() or json_file.name[0] == ".")
    )
    refuse(
        (
            s.degrade and s.reference,
            "--reference: with --degrade the input is the clean picture; leave one of the two out",
        ),
        (same(s.reference, s.input), f"--reference {s.reference}: is --input; name clean pictures"),
        (
            s.reference and s.reference.is_file() and s.input.is_file() and filecmp.cmp(s.reference, s.input, False),
            f"--reference {s.reference}: is a copy of --input; name the clean picture",
        ),
        (
            s.reference and folder and not s.reference.is_dir(),
            f"--reference {s.reference}: is a file, but --input is a folder; name a folder",
        ),
        (
            s.json and not (s.degrade or s.reference),
            "--json: scores need a clean picture; add --reference, or --degrade on a clean input",
        ),
        (s.json and s.json.is_dir(), f"--json {s.json}: is a folder; name a file"),
        (
            same(s.json, s.output) or own,  # hidden files are the lock and the record of the folder
            f"--json {s.json}: is written by another flag; name another file",
        ),
        (s.json and not s.json.parent.is_dir(), f"--json {s.json}: no such folder; make it first"),
        (s.json and not can_write(s.json), f"--json {s.json}: can't be written; name another file"),
        (
            s.json and s.json.exists() and not is_scores(s.json),
            f"--json {s.json}: exists and holds no scores; name another file",
        ),
        (
            s.json and s.json.exists() and s.json.stat().st_size and not (s.overwrite or whose_scores(s) in noted),
            f"--json {s.json}: exists and holds the scores of another call; name another file, or add --overwrite",
        ),
        (s.report and not folder, "--report: is for folders; of one picture, --compare shows before and after"),
        (
            s.report and page.exists() and (page.with_name("settings.json").exists() or not is_report(page)),
            f"--report: {page} exists and is not that of a restored folder; choose another --output",
        ),
    )


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
    free = shutil.disk_usage("/dev/shm").free
    if free < needed:
        raise ValueError(
            f"/dev/shm: {free / 1e6:.0f} MB free, but {workers} workers need {needed / 1e6:.0f} MB for their "
            "batches; use --workers 0 or fewer workers, or give the container more (docker run --shm-size=2g)."
        )


def is_report(file: Path) -> bool:
    """Whether a file may be replaced by report.html: it was made from the page beside report.py."""
    template = Path(__file__).with_name("report.html").read_bytes()[:50]
    return file.is_file() and file.read_bytes()[:50] == template


def is_scores(file: Path) -> bool:
    """Whether a file may be replaced by scores: it is empty, or holds those of an earlier run."""
    try:
        rows = json.loads(file.read_bytes() or b"[]") if file.is_file() else None  # a pipe would never end
        return isinstance(rows, list) and all("name" in row and "restored" in row for row in rows)
    except (OSError, ValueError, TypeError, RecursionError):
        return False
