"""report.html: a run's curves, pictures and settings, or the pictures that sample.py restored, in one file.

    settings.json, metrics.jsonl, validation/step-000500.png  ->  report.html in the run folder
    python -m kontext_min.extras.report runs/NAME                 writes it again
    before and after of restored pictures                     ->  report.html beside them

This file gathers the data. The page is report.html, next to this file: its script draws the charts and the
sliders from one JSON object, and needs neither the network nor other files.

    smoothed   m_n = sum_i d^(n-i) y_i / sum_i d^(n-i),  d = 1 - 2 / (window + 1): an exponential mean whose start is
               not pulled towards zero (Kingma and Ba 2015, "Adam", section 3)
    thinned    the lowest and the highest point of each stretch of steps, so that every spike stays

The rows of metrics.jsonl are data from a file: a value of the wrong type is left out, and none of them becomes markup.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from kontext_min.extras.flags import as_words
from kontext_min.extras.progress import clock
from kontext_min.extras.runs import latest_checkpoint, note_lost_rows, read_metrics, validated, write_text

GAP = 4  # white pixels between the pictures of a sheet, see validation.grid
SIDE, QUALITY = 1280, 85  # embedded pictures: longest side in pixels, JPEG quality
PICTURES, STEPS = 4, 3  # pictures per validation; validations besides the best one: below 10 MB in sum
RESTORED = 24  # figures of a report on restored pictures: below 25 MB in sum
LIMIT = 600  # points of a curve
SCORES = ("psnr_degraded", "psnr", "ssim_degraded", "ssim")  # of a validation
LIST = 10  # elements of a list that are drawn
ONCE = ("overwrite", "accept_changes")  # flags of one call

Row = dict[str, Any]
Points = list[tuple[float, float]]


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder (first under another name, then renamed); returns its path.

    Missing or broken files leave their part of the page empty.

    Raises:
        OSError: the folder can't be written.
    """
    rows = [row for row in read_metrics(folder) if isinstance(row, dict) and is_step(row.get("step"))]
    rows.sort(key=lambda row: row["step"])
    training = [row for row in rows if not row.get("validation")]
    validations = [row for row in rows if row.get("validation")]
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        print(f"note: {folder / 'settings.json'} is missing or broken; the page has no settings, nor the steps to come")
        settings = {}
    # With --accept-changes, those before may be of other pictures, degradations, paths or prompts.
    last = next((row["psnr_degraded"] for row in reversed(validations) if is_number(row.get("psnr_degraded"))), None)
    alike = [row for row in validations if not is_number(y := row.get("psnr_degraded")) or abs(y - last) < 0.01]
    alike = [row for row in alike if row.get("how") == validations[-1].get("how")]
    start = "the base with --init-lora" if settings.get("init_lora") else "the base alone" if settings else "at step 0"
    goal, done = settings.get("steps"), training[-1]["step"] if training else 0
    along = evenly([row for row in validations if isinstance(row.get("loss_at"), list)], 5)
    data = {
        "facts": run_facts(training, validations, alike, goal, start),
        "unfinished": is_step(goal) and done < goal,
        **sliders(folder, alike),
        "training": curves(training),
        "validation": curves(validations),
        "along": [[row["step"], [y if is_number(y) else None for y in row["loss_at"][:LIST]]] for row in along],
        "settings": settings_table(settings),
    }
    return save_page(folder, data)


def write_restored_report(
    folder: Path, figures: list[Row], restored: int, mean: Row | None, settings: Row, scored: int | None = None
) -> str:
    """Write report.html beside restored pictures (first under another name, then renamed); returns its path.

    Args:
        folder: of the restored pictures; it exists.
        figures: from `figure`, at most RESTORED of them.
        restored: number of pictures that were restored.
        mean: metrics.mean_row if there are clean pictures, or None.
        settings: every flag of sample.py, with `defaults` and `versions` as in settings.json of a run.
        scored: number of pictures that `mean` is of; all if None.

    Raises:
        OSError: the folder can't be written.
    """
    facts = [["Restored", f"{restored:,}", "picture" + "s" * (restored != 1)]]
    if mean and scored not in (None, restored):
        facts.append(["Scored", f"{scored:,}", "with a clean picture that differs"])
    if mean:
        before, after = mean["input"], mean["restored"]
        texture = ["Texture, clean = 1", f"{after['texture']:.2f}", f"before {before['texture']:.2f}"]
        facts = [*gains(before["psnr"], after["psnr"], before["ssim"], after["ssim"]), texture, *facts]
    note = "" if len(figures) == restored else f"{len(figures)} of {restored:,} pictures are shown. "
    note += f"Pictures above {SIDE} pixels are shrunk here; the links lead to the whole files."
    figures = sorted(figures, key=lambda f: f["title"])
    data = {"facts": facts, "figures": figures, "note": note, "settings": settings_table(settings, "sample.py")}
    return str(save_page(folder, data))


def figure(
    title: str,
    degraded: Image.Image,
    restored: Image.Image,
    clean: Image.Image | None = None,
    score: str = "",
    file: str = "",
) -> Row:
    """One slider: a picture before and after. The pictures have one size.

    Args:
        title: name of the picture.
        degraded: the input, at the left of the handle.
        restored: the result, at its right.
        clean: the reader may choose it for the left. Without it the input is called "original".
        score: text behind the title.
        file: path of the whole result, relative to the report, for a link.
    """
    return {
        "title": title,
        "size": degraded.size,
        "before": embed(degraded),
        "clean": embed(clean) if clean else None,
        "after": [result(restored, score, file)],
    }


def result(restored: Image.Image, score: str, file: str) -> Row:
    """The right side of a slider; see `figure`."""
    return {"picture": embed(restored), "score": score, "file": quote(os.fsencode(file))}


def save_page(folder: Path, data: Row) -> Path:
    """Fill report.html: the data slot, and the policy, which names style and script by their hashes."""
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        page = page.replace(f"{tag}-hash", f"sha256-{digest}")
    data |= {"title": folder.resolve().name, "written": round(time.time() * 1000), "side": SIDE}
    text = json.dumps(data).replace("<", "\\u003c")  # "</script>" or "<!--" inside a string would end the slot
    write_text(folder / "report.html", page.replace("{data}", text))
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------ parts of a run's page


def run_facts(
    training: Sequence[Row], validations: Sequence[Row], alike: Sequence[Row], goal: Any, start: str
) -> list[list[str]]:
    """[name, value, note]: what the best of the comparable validations gained over the degraded pictures, and the cost.

    Args:
        training: rows of steps.
        validations: all of them, for the time.
        alike: those that can be compared with the last one.
        goal: steps of the whole run.
        start: what was validated at step 0, in words.
    """
    facts = []
    if top := best(alike):
        facts += gains(*(top[key] for key in SCORES))
        first, last = (row.get("psnr") for row in (alike[0], alike[-1]))
        if alike[0].get("step") == 0 and is_number(first):
            facts.append(["Before training", f"{first:.2f} dB", start])
        note = f"by PSNR; the last: {last:.2f} dB" if is_number(last) else "by PSNR"
        facts.append(["Best step", f"{top['step']:,}", note])
    if training:
        skipped = training[-1].get("skipped")
        note = (f"of {goal:,}" if is_step(goal) else "") + (f", {skipped} skipped" if skipped else "")
        facts.append(["Steps", f"{training[-1]['step']:,}", note])
        spent = (row.get("seconds") for row in (*training, *validations))
        facts.append(["Time", clock(sum(s for s in spent if is_number(s))), "validation included"])
    return facts


def gains(psnr_before: float, psnr: float, ssim_before: float, ssim: float) -> list[list[str]]:
    """[name, value, note] of two scores; a PSNR may be infinite."""
    gain = 0.0 if psnr == psnr_before else psnr - psnr_before
    text = f"{gain:+.2f} dB".replace("-", "−").replace("inf", "∞")
    return [["Gain in PSNR", text, from_to(psnr_before, psnr)], ["SSIM", f"{ssim:.3f}", f"before {ssim_before:.3f}"]]


def sliders(folder: Path, validations: Sequence[Row]) -> Row:
    """Figures of the last validation that has pictures; the restored pictures of the best one and some others too."""
    rows = {row["step"]: row for row in validations if row.get("pictures") and isinstance(row["pictures"], list)}
    top = best(list(rows.values()))
    figures, steps, lost = [], [], []
    for step in sorted({*evenly(list(rows), STEPS), *([top["step"]] if top else [])}, reverse=True):
        file, infos = f"validation/step-{step:06d}.png", rows[step]["pictures"][:PICTURES]
        try:
            cut = slices(folder / file, infos)
            scores = [from_to(info.get("psnr_degraded"), info.get("psnr")) for info in infos]
        except Exception:  # gone, cut short, too large or of other sizes: Pillow raises anything on broken files
            lost.append(file)
            continue
        if not figures:
            named = enumerate(zip(cut, scores, strict=True), 1)
            figures = [figure(f"Picture {n}", *pictures, score, file) for n, (pictures, score) in named]
        elif [pictures[0].size for pictures in cut] == [one["size"] for one in figures]:
            for one, pictures, score in zip(figures, cut, scores, strict=True):
                one["after"].insert(0, result(pictures[1], score, file))
        else:  # from before the validation pictures were changed
            continue
        steps.insert(0, f"{step:,}" + (", best" if top and step == top["step"] else ""))
    note = (
        f"PSNR from degraded to restored. Pictures above {SIDE} pixels are shrunk here; the links lead to the sheets. "
    )
    note = note * bool(figures) + f"Not shown, as they can't be read: {', '.join(lost)}." * bool(lost)
    return {"figures": figures, "steps": steps, "note": note}


def curves(rows: Sequence[Row]) -> dict[str, dict[str, Points]]:
    """Every number of the rows over the step, as it is and smoothed; element k of a list is a curve of its own."""
    points: dict[str, Points] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, str):
                continue
            parts = enumerate(value[:LIST]) if isinstance(value, list) else [("", value)]
            for k, y in parts:
                line = points.setdefault(f"{key}{k}", [])  # an interval without a picture has an empty one
                if is_number(y):
                    line.append((row["step"], y))

    def short(points: Points) -> Points:
        return [(x, float(f"{y:.5g}")) for x, y in thin(points)]

    return {name: {"each": short(p), "mean": short(smooth(p))} for name, p in points.items()}


def settings_table(settings: Row, program: str = "train.py") -> Row:
    """[name, value] pairs: flags that differ from their defaults, and all else; and the command line of the former.

    settings["defaults"] holds every flag, null for a required one. Without it no flag counts as changed. The command
    line leaves out what holds for one call only: it must not delete anything where it is pasted.
    """
    defaults, versions = (settings.get(key) for key in ("defaults", "versions"))
    defaults, versions = (part if isinstance(part, dict) else {} for part in (defaults, versions))
    changed = {k: v for k, v in settings.items() if k in defaults and v != defaults[k] and k not in ONCE}
    others: Row = {}
    for key, value in settings.items():
        if key not in ("defaults", *changed):
            others |= {f"{key} {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    table = {"changed": changed, "others": others, "about": {"device": settings.get("device", "unknown")} | versions}
    texts = {k: [[n, v if isinstance(v, str) else json.dumps(v)] for n, v in part.items()] for k, part in table.items()}
    first = ["python"]
    with suppress(TypeError, ZeroDivisionError):  # of a folder that somebody edited
        if (processes := settings.get("pictures_a_batch", 1) // settings.get("batch_size", 1)) > 1:
            first = ["torchrun", "--nproc-per-node", str(processes)]
    return texts | {"command": shlex.join([*first, program, *as_words(changed)]) if changed else ""}


# ----------------------------------------------------------------------------------------------- numbers and pictures


def is_number(x: Any) -> bool:
    """A finite number that a chart can show. NaN compares as false."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e100


def is_step(x: Any) -> bool:
    """A whole number of steps."""
    return isinstance(x, int) and is_number(x) and 0 <= x < 1e15


def from_to(before: Any, after: Any) -> str:
    """PSNR of a picture before and after in dB; infinite (null in JSON) for a picture that equals the clean one."""
    shown = ("∞" if x in (None, math.inf) else f"{x:.2f}" if is_number(x) else "?" for x in (before, after))
    return " → ".join(shown) + " dB"


def best(validations: Sequence[Row]) -> Row | None:
    """The validation with the highest PSNR."""
    scored = [row for row in validations if all(is_number(row.get(key)) for key in SCORES)]
    return max(scored, key=lambda row: row["psnr"], default=None)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, the first and the last among them."""
    places = {round(k * (len(items) - 1) / (count - 1)) for k in range(count)} if items else set()
    return [items[i] for i in sorted(places)]


def smooth(points: Points) -> Points:
    """The exponential mean of the file's docstring. Its window is a fiftieth of the points, or ten if they are few."""
    window = max(len(points) // 50, min(len(points) // 5, 10), 1)
    decay, total, weight, means = 1 - 2 / (window + 1), 0.0, 0.0, []
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1
        means.append((x, total / weight))
    return means


def thin(points: Points, limit: int = LIMIT) -> Points:
    """At most `limit` points: the lowest and the highest of each stretch."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [p for s in stretches for p in sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])})]


def slices(file: Path, infos: Sequence[Row]) -> list[list[Image.Image]]:
    """Cut a sheet that validation.grid wrote into [degraded, restored, clean] of each picture.

    Raises:
        ValueError: the sizes in `infos` do not fit the sheet.
    """
    with Image.open(file) as opened:
        sheet, top, cut = opened.convert("RGB"), 0, []
    for w, h in ((info["width"], info["height"]) for info in infos):
        if not (0 < w <= (sheet.width - 2 * GAP) / 3 and 0 < h <= sheet.height - top):
            raise ValueError(f"{file}: {sheet.size[0]} x {sheet.size[1]} pixels, too few for pictures of {w} x {h}.")
        cut.append([sheet.crop((left, top, left + w, top + h)) for left in (0, w + GAP, 2 * (w + GAP))])
        top += h + GAP
    return cut


def embed(picture: Image.Image) -> str:
    """A picture, shrunk if it is large, as a data URI."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def is_report(file: Path) -> bool:
    """Whether a file may be replaced by report.html: it was made from the page beside this file, or is empty."""
    template = Path(__file__).with_suffix(".html").read_bytes()[:50]
    return file.is_file() and file.read_bytes()[:50] in (template, b"")


def main(arguments: Sequence[str]) -> int:
    """Write the page of a run again. Returns the exit code.

    Raises:
        ValueError: it is no run, or its report.html is a file of yours.
    """
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    if len(arguments) != 1:
        raise ValueError("usage: python -m kontext_min.extras.report RUN_FOLDER.")
    folder = Path(arguments[0])
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: is no run; expected a folder with a metrics.jsonl, which train.py writes.")
    if (page := folder / "report.html").exists() and not is_report(page):
        raise ValueError(f"{page}: is not that of a run; move it.")
    last = latest_checkpoint(folder)
    known = max([0, *validated(folder), *([int(last.name[5:])] if last else [])])  # steps that the run has done
    note_lost_rows(folder, read_metrics(folder), known)
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    from kontext_min.extras import program

    sys.exit(program.run("report", main, sys.argv[1:]))
