"""Scores and before/after pictures of a restored folder: printed, written as JSON, shown in report.html.

Pictures are converted to sRGB: with different color profiles they could not be compared.
"""

import math
from functools import partial
from typing import Any

import torch
from PIL import Image

from kontext_min import __version__
from kontext_min.extras import checks, metrics, pictures, report
from kontext_min.extras.flags import defaults, to_json
from kontext_min.extras.inventory import RECORD, printable
from kontext_min.extras.progress import Progress
from kontext_min.extras.runs import finite, write_json
from kontext_min.extras.saving import append_line

LARGE = 4e6  # pixels of a picture whose scores take seconds


class Scores:
    """What is collected picture by picture and written at the end, as the flags of sample.py ask for it."""

    def __init__(self, settings: Any, device: torch.device, progress: Progress) -> None:
        self.progress = progress
        values = to_json(settings)
        versions = {"kontext_min": __version__, "torch": torch.__version__, "device": str(device)}
        self.settings = values | {"defaults": defaults(settings, values), "versions": versions}
        self.known = settings.overwrite or (settings.json and settings.json.exists())  # at the start, checks.py looked
        self.json, self.folder = settings.json, settings.output if settings.report else None
        self.record, self.page = settings.output / RECORD, settings.output / "report.html"
        self.had_page, self.older = settings.overwrite or self.page.exists(), partial(checks.older_scores, settings)
        self.of_json = settings.json and checks.whose_scores(settings)
        self.of_report = checks.whose_report(settings)
        self.wanted = bool(settings.degrade or settings.reference or settings.report)
        self.rows: list[metrics.Row] = []
        self.figures: list[dict[str, Any]] = []

    def add(self, photo: pictures.Photo, restored: Image.Image) -> None:
        """A picture with its restored one, both in sRGB or in the colors of the file."""
        name, degraded = photo.job.name, pictures.as_seen(photo.degraded, photo.file)
        score = ""
        self.progress.show(f"{name}: scores", last=math.prod(photo.job.size) > LARGE)
        if photo.clean and min(photo.clean.size) >= pictures.SCORED:
            row = metrics.row(name, degraded, restored, photo.clean)
            self.rows.append(row)
            score = report.from_to(row["input"]["psnr"], row["restored"]["psnr"])
            score += f", shifted by {row['shift']} pixels" * bool(row["shift"])
        if self.folder and len(self.figures) < report.RESTORED:
            file = photo.job.output.relative_to(self.folder).as_posix()
            self.figures.append(report.figure(name, degraded, restored, photo.clean, score, file))

    def write(self, restored: int) -> list[str]:
        """Write --json and --report; returns the table and the report's path. `restored` pictures are in the folder."""
        mean = metrics.mean_row(self.rows) if self.rows else None
        rows = [*self.rows, mean] if mean else []
        lines, notes = [metrics.table([row | {"name": printable(row["name"])} for row in rows])] if mean else [], []
        if self.json and self.json.exists() and not self.known:
            lines.append(f"--json {self.json}: has come since the start, and is kept; the scores are those above")
        elif self.json and not rows and self.json.exists():
            lines.append(f"--json {self.json}: nothing was scored, so it is kept as it was")
        elif self.json:
            write_json(self.json.resolve(), finite(rows))  # a link stays, and what it leads to is written
            notes.append(self.of_json)
        lines += [f"note: {file} has the scores of an earlier call; --json writes it again" for file in self.older()]
        if self.figures and self.page.exists() and not self.had_page:
            lines.append(f"--report: {self.page} has come since the start, and is kept")
        elif self.figures:
            lines.append(
                report.write_restored_report(
                    self.folder, self.figures, restored, mean, self.settings, len(metrics.counted(self.rows))
                )
            )
            notes.append(self.of_report)
        elif report.is_report(self.page):
            lines.append(f"note: {self.page} is of an earlier call; --report writes it again")
        for note in notes if self.record.is_file() else ():
            append_line(self.record, note)
        return lines
