"""Picture files on their way through sample.py: which ones, what a file holds besides RGB, and where it goes.

    --input FILE      one job           --output FILE, or a folder that exists
    --input FOLDER    a job a picture   --output FOLDER, the same relative names

A restored picture keeps the size, ICC profile, EXIF, resolution (dpi) and transparency of its file. EXIF orientation is
applied and its tag set to 1. What can't be kept is said in a line: bits beyond 8 a channel, a profile of a grey or CMYK
picture (the result is RGB), transparency where the format has none.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from kontext_min.data import ENDINGS, FORMATS, TURNS, Size, UnreadableError, open_picture, scan
from kontext_min.utils import numpy_generator

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
LAYOUT = {  # TIFF tags that say how the old file's pixels lie: nothing of a photograph
    *range(254, 260), 262, 273, *range(277, 280), 284, 317, *range(320, 326), 338, 339, 347, *range(512, 522), 530, 532,
    34675,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A picture file, its name below --input, and a file for each sample of it."""

    path: Path
    name: str
    outputs: tuple[Path, ...]
    size: Size  # as seen


@dataclass(frozen=True)
class File:
    """What a file holds."""

    rgb: Image.Image  # upright; on white where it is fully transparent
    alpha: Image.Image | None
    keep: dict[str, Any]  # EXIF, profile, dpi as Pillow's save() takes them
    notes: tuple[str, ...]  # what is not kept, in words


@dataclass(frozen=True)
class Photo:
    """A job's pictures in memory, all of one size."""

    job: Job
    file: File
    degraded: Image.Image  # what is to be restored
    clean: Image.Image | None


# ----------------------------------------------------------------------------------------------------------- which ones


def find(source: Path, target: Path, samples: int = 1) -> tuple[list[Job], list[tuple[str, str]]]:
    """The jobs of --input and --output, by name, and (name, reason) of files in the folder that can't be read.

    Raises:
        OSError: there is no such input, or no place for the output.
        ValueError: no picture is found, the output can't be written in that format or would replace the input.
    """
    if not source.is_dir():
        if target.is_dir():
            target = target / _writable(source.name)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent}: no such folder for --output; make it first.")
        if target.suffix.lower() not in KINDS:
            raise ValueError(f"--output {target}: unknown picture format; use .png, .jpg, .webp or .tif.")
        if target.resolve() == source.resolve():
            raise ValueError(f"--output {target}: would replace the input; choose another name.")
        return [Job(source, source.name, _numbered(target, samples), open_picture(source).size)], []
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"--output {target}: is a file, but --input is a folder; name a folder.")
    if target.resolve() == source.resolve():
        raise ValueError(f"--output {target}: would replace the input; choose another folder.")
    below = target.resolve()  # the output may lie in the input: what is restored is not restored again
    pictures, rejected = scan(source)
    jobs = [
        Job(p.path, p.name, _numbered(target / _writable(p.name), samples), (p.width, p.height))
        for p in pictures
        if below not in p.path.resolve().parents
    ]
    rejected = [(name, reason) for name, reason in rejected if below not in (source / name).resolve().parents]
    if not jobs and not rejected:
        raise ValueError(f"--input {source}: no pictures in this folder.")
    return jobs, rejected


def _writable(name: str) -> str:
    """The name itself, or with .png behind it where its format is no place for a restored picture, such as .gif."""
    return name if Path(name).suffix.lower() in KINDS else name + ".png"


def _numbered(path: Path, samples: int) -> tuple[Path, ...]:
    if samples == 1:
        return (path,)
    return tuple(path.with_stem(f"{path.stem}-{k}") for k in range(1, samples + 1))


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """At most `size` pictures of one shape together, in the order of their names."""
    shapes: dict[Size, list[Job]] = {}
    for job in jobs:
        shapes.setdefault(job.size, []).append(job)
    return [group[k : k + size] for group in shapes.values() for k in range(0, len(group), size)]


def reference_of(job: Job, folder_or_file: Path) -> Path | None:
    """The file itself, or the picture of the same name in the folder; of another ending if there is no such one."""
    if not folder_or_file.is_dir():
        return folder_or_file
    same = folder_or_file / job.name
    if same.is_file() or not same.parent.is_dir():
        return same if same.is_file() else None
    others = (p for p in same.parent.iterdir() if p.stem == same.stem and p.suffix.lower() in ENDINGS)
    return min(others, default=None)


# ------------------------------------------------------------------------------------------------------ one in, one out


def load(job: Job, degradation: Callable | None, reference: Path | None, seed: int) -> Photo:
    """The pictures of a job. What will be lost, and that there is no clean picture, is printed.

    Args:
        job: from `find`.
        degradation: from degrade.parse: makes the input from the file, which then is the clean picture; its random
            numbers depend on (seed, name) alone.
        reference: the clean picture, or a folder of them.
        seed: of the degradation.

    Raises:
        ValueError: a file can't be read, or the clean picture has another size.
    """
    file = read(job.path)
    notes, degraded, clean = list(file.notes), file.rgb, None
    if file.rgb.size != job.size:
        raise UnreadableError(f"{job.path}: has changed since the start.")
    if degradation:
        degraded, clean = degradation(file.rgb, numpy_generator(seed, "degrade", 0, job.name)), file.rgb
    elif reference:
        if path := reference_of(job, reference):
            clean = read(path).rgb
            if clean.size != job.size:
                sizes = "the input {}x{}, --reference {} {}x{}".format(*job.size, path, *clean.size)
                raise ValueError(f"{job.path}: {sizes}; expected one size.")
        else:
            notes.append("no such picture in --reference, so no scores")
    if clean and min(clean.size) < 11:
        notes.append("scores need 11 pixels a side")
        clean = None
    for note in notes:
        print(f"note: {job.name}: {note}", file=sys.stderr)
    return Photo(job, file, degraded, clean)


def read(path: Path) -> File:
    """A file with all that can be kept of it. Raises UnreadableError, a ValueError that names the file."""
    rgb = open_picture(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            keep, notes, alpha = {}, [], None
            if image.mode.startswith(("I", "F")) or any(";16" in str(tile) for tile in image.tile):
                notes.append("more than 8 bits a channel: restored and written with 8")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                notes.append(f"{image.n_frames} frames or pages: the first is restored")
            if profile := image.info.get("icc_profile"):
                if (space := profile[16:20].decode("latin1").strip()) == "RGB":
                    keep["icc_profile"] = profile
                else:
                    notes.append(f"its {space} colour profile does not fit RGB: dropped")
            if min(dpi := image.info.get("dpi", (0, 0))) > 0:
                keep["dpi"] = tuple(map(float, dpi))
            try:
                turn, exif = _exif(image)
            except Exception:  # the picture itself may be fine
                turn, exif = None, None
                notes.append("its EXIF can't be read: dropped")
            if exif:
                keep["exif"] = exif
            if image.has_transparency_data:
                straight = image.convert("RGBA")
                straight = straight.transpose(turn) if turn is not None else straight
                alpha = straight.getchannel("A")
                if alpha.getextrema() == (255, 255):
                    alpha = None
                else:
                    # The colours themselves, not laid on white: else a half transparent edge would be whitened twice.
                    rgb.paste(straight.convert("RGB"), mask=alpha.point(lambda a: 255 * (a > 0)))
                    notes.append("transparency is kept as it is (a JPEG is laid on white)")
    except Exception as error:  # see data._read_header: Pillow's parsers raise anything
        raise UnreadableError(f"{path}: {error}") from error
    return File(rgb, alpha, keep, tuple(notes))


def _exif(image: Image.Image) -> tuple[Image.Transpose | None, bytes | None]:
    """How data.open_picture turned the picture, and EXIF without that and without the layout of the old file."""
    exif = Image.Image.getexif(image)  # as data.py reads it: see there
    turn = None if image.format == "TIFF" else TURNS.get(exif.get(ExifTags.Base.Orientation))
    for tag in LAYOUT & set(exif):
        del exif[tag]
    if not exif:
        return turn, None
    exif[ExifTags.Base.Orientation] = 1
    return turn, exif.tobytes()


def write(path: Path, rgb: Image.Image, file: File, quality: int) -> None:
    """Save a restored picture with what its file held, aside and renamed.

    Args:
        path: its ending chooses the format; folders are made.
        rgb: of the size of file.rgb; a sheet of another size gets no transparency.
        file: whence EXIF and so on come.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        OSError, ValueError: it can't be written; an older file is still there.
    """
    kind = KINDS[path.suffix.lower()]
    if file.alpha and rgb.size == file.alpha.size:
        if kind == "JPEG":
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), file.alpha)
        else:
            rgb = rgb.copy()
            rgb.putalpha(file.alpha)
    options = {"quality": quality} if kind in ("JPEG", "WEBP") else {}
    if kind == "JPEG" and quality >= 90:
        options["subsampling"] = 0  # colour at full resolution: halved, it shows on red edges
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        rgb.save(aside, kind, **options, **file.keep)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
