"""Describe a folder of pictures: how many are in each bucket, which files are left out and why.

data.scan ignores files that Pillow does not know as pictures. `unread` names those that you may have meant to use.
"""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image

from kontext_min.data import ENDINGS, FORMATS, THREADS, Picture, Size, as_text, nearest_bucket, scan, walk
from kontext_min.extras.not_read import ends, not_shown

RECORD = ".restored-with.jsonl"  # marks a folder of restored pictures: see folders.py
MARK = "kontext_min"  # how the software of a restored picture or a sheet starts, in its EXIF
ONE_COLOR = 16  # of 255: a picture whose channels span no more shows nothing, or is read wrong
ZEROS = "its end is missing, and zeros stand in its place; copy it again"
# Pictures that are not read: those that Pillow does not know, and what it knows besides photographs.
UNREAD = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".exr", ".hdr", ".heic", ".heif", ".hif", ".iiq", ".jxl", ".nef",
    ".nrw", ".orf", ".pef", ".psb", ".raf", ".raw", ".rw2", ".spi", ".spider", ".srw", ".svg", ".x3f", ".xcf",
    *Image.registered_extensions(),
} - ENDINGS  # fmt: skip
# Those that Pillow knows by their first bytes; the others only by their ending.
SIGNED = sorted(set(Image.OPEN) - {"BUFR", "CUR", "GRIB", "HDF5", "ICO", "MPEG", "PCX", "SGI", "SPIDER", "TGA"})


def scan_whole(root: Path) -> tuple[list[Picture], list[tuple[str, str]]]:
    """As data.scan, without files that `zeros_at_end` knows; those are among the rejected."""
    pictures, rejected = scan(root)
    with ThreadPoolExecutor(THREADS) as pool:
        are_cut = list(pool.map(zeros_at_end, [p.path for p in pictures]))
    rejected += [(p.name, ZEROS) for p, is_cut in zip(pictures, are_cut, strict=True) if is_cut]
    return [p for p, is_cut in zip(pictures, are_cut, strict=True) if not is_cut], sorted(rejected)


def zeros_at_end(path: Path) -> bool:
    """Whether zeros stand in place of a file's end, as after a download that stopped. Pillow reads them as pixels."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
        if any(file.read()):
            return False
        file.seek(0)
        content = file.read().rstrip(b"\0")
        if content.startswith(b"\xff\xd8"):  # a JPEG: its end follows the start of its scan, unlike that of a thumbnail
            return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
        if content.startswith(b"\x89PNG"):
            return b"IEND" not in content[-8:]
        # The EXIF of a WebP may be last, and end in zeros, or the free space of an AVIF.
        last = {b"RIFF": b"EXIF", b"ftyp": b"free"}.get(content[:4] if content[:4] == b"RIFF" else content[4:8])
        return last is not None and last not in content
    return False


def unread(root: Path, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """(name, reason) of files below a folder that `scan` does not read.

    These are pictures of formats that Pillow lacks or with another ending, links that lead nowhere, pipes, empty
    captions, and text files that other programs take for captions of the pictures.

    Raises:
        ValueError: some of the pictures were made by sample.py or train.py, so they are not clean.
    """
    if made := results(root, pictures):
        raise ValueError(f"{made[0]}: a result of this program, and {root} should hold clean pictures; move it.")
    found = list(walk(root))
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    files = dict(found)
    left_out = [(name, "two files print alike, one name is not UTF-8; rename one") for name in twice]
    for name, path in files.items():
        ending = as_text(path.suffix.lower())
        if ending in UNREAD:
            left_out.append((name, f"{ending} files are not read; convert it to PNG or JPEG"))
        elif ending in ENDINGS:
            continue
        elif not path.is_file():  # a pipe as a caption would be waited for
            left_out.append((name, "not a file" if path.exists() else "a link that leads nowhere"))
        elif ending != ".txt" and _is_picture(path):
            left_out.append((name, f"a picture, but its ending is {ending or 'missing'}; rename or convert it"))
    # Some programs write .TXT.
    lower = {name[: -len(path.suffix)] + path.suffix.lower(): name for name, path in files.items() if path.suffix}
    for p in pictures:
        stem = p.name.rpartition(".")[0]
        others = [text for text in (f"{p.name}.txt", f"{stem}.caption", f"{p.name}.caption") if text in lower]
        if p.caption and not _start(p.caption).decode("utf-8-sig", "replace").strip():
            left_out.append((f"{stem}.txt", "an empty caption; --prompt takes its place"))
        if others and not p.caption:
            reason = f"not read as a caption; rename it to {PurePosixPath(stem).name}.txt"
            left_out.append((lower[others[0]], reason))
    return left_out


def results(root: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Those of some pictures below `root` that sample.py has restored, or that are sheets, such as train.py writes."""
    paths = [root.resolve() / p.name for p in pictures]
    records = {folder / RECORD for path in paths for folder in path.parents if (folder / RECORD).is_file()}
    restored = {record.parent / name for record in records for name in _recorded(record)}
    with ThreadPoolExecutor(THREADS) as pool:  # a name that is not UTF-8 is another in p.path
        marked = list(pool.map(is_result, [p.path for p in pictures]))
    sheets = (p.parent.name == "validation" and (p.parent.parent / "left-out.txt").exists() for p in paths)
    return [
        path
        for path, is_marked, is_sheet in zip(paths, marked, sheets, strict=True)
        if path in restored or is_marked or is_sheet
    ]


def _recorded(record: Path) -> Iterator[str]:
    """The names below its folder of the pictures in a record; a .gif, for instance, is restored as .gif.png."""
    for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            name = str(json.loads(line)["picture"])
            yield from (name, f"{name}.png")


def is_result(path: Path) -> bool:
    """Whether the EXIF of a picture says that it is a result."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            software = Image.Image.getexif(image).get(ExifTags.Base.ProcessingSoftware)  # as in data._orientation
            return str(software).startswith(MARK)
    except Exception:  # as in data.open_picture, anything
        return False


def marked(exif: Image.Exif) -> Image.Exif:
    """The EXIF of a result: with it, train.py does not take the picture for a clean one."""
    exif[ExifTags.Base.ProcessingSoftware] = MARK
    return exif


def _start(path: Path) -> bytes:
    """The first megabyte of a file."""
    with path.open("rb") as file:
        return file.read(10**6)


def is_one_color(rgb: Image.Image) -> bool:
    """Whether a picture shows nothing; perhaps its scale is one that Pillow does not know."""
    return all(high - low <= ONE_COLOR for low, high in rgb.getextrema())


def parts_not_read(root: Path, pictures: Sequence[Picture]) -> list[str]:
    """A line for each kind of part that is not read: the first of the pictures, and how many follow."""

    def parts(picture: Picture) -> list[str]:
        with suppress(Exception), picture.path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return not_shown(image, b"" if image.format == "JPEG" else ends(file))
        return []  # as in data.open_picture, anything is raised

    kinds: dict[str, list[str]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for p, found in zip(pictures, pool.map(parts, pictures), strict=True):
            for what in found:
                kinds.setdefault(re.sub(r"\d", "", what), []).append(f"{p.name}: {what}")
    more = {kind: f", and {len(found) - 1} more like it" * (len(found) > 1) for kind, found in kinds.items()}
    return [f"note: {root}: {printable(found[0])}{more[kind]}" for kind, found in kinds.items()]


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows what is in a file, whatever its ending."""
    try:
        with Image.open(path, formats=SIGNED):
            return True
    except Exception:  # as in data.open_picture, anything
        return False


def others(root: Path, named: Collection[str], made: Set[Path] = frozenset()) -> list[str]:
    """A line about the files below a folder that no other line names, if there are some.

    Args:
        root: the folder.
        named: the pictures and captions in use, and the files that are left out.
        made: folders of results, whose files are left out.
    """
    rest = [name for name, path in walk(root) if name not in named and made.isdisjoint(path.resolve().parents)]
    return [f"note: {root}: {_count(rest, 'other file')}, not read as pictures or captions"] if rest else []


def unused(root: Path, used: Collection[str], whose: str) -> list[str]:
    """A line about the pictures below `root`, whole or not, that are not among those in use, one about other files."""
    found, rejected = scan(root)
    pictures = {p.name for p in found} | {name for name, _ in rejected + unread(root, [])}
    rest = sorted(pictures - set(used))
    more = f" and {len(rest) - 3} more" * (len(rest) > 3)
    lines = [f"note: {root}: no {whose} goes with {printable(', '.join(rest[:3]))}{more}"] if rest else []
    return lines + others(root, pictures)


def repeats(bucket_of: Sequence[int], batch: int) -> list[str]:
    """A line if an epoch shows some pictures at least twice as often as others, as batches are filled up.

    Args:
        bucket_of: the bucket of each picture.
        batch: pictures of all processes in a batch.
    """
    counts = np.bincount(bucket_of)
    counts = counts[counts > 0]
    if batch > (largest := counts.max()):
        return [f"note: a batch is larger than the largest bucket ({largest} pictures), so pictures repeat within it"]
    times = -(-counts // batch) * batch / counts  # data.BucketSampler fills the last batch of a bucket
    rare = counts[times >= 2].sum()
    text = (
        f"note: pictures of rare shapes ({rare}) repeat up to {times.max():.0f} times in an epoch, to fill its batches"
    )
    return [text] * bool(rare)


def printable(name: str) -> str:
    """A name with its control characters spelled out."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in name)


def _count(names: Sequence[str], what: str) -> str:
    """Such as: 3 files (2 .heic, 1 other)."""
    endings = Counter(printable(PurePosixPath(name).suffix.lower()) or "other" for name in names)
    kinds = ", ".join(f"{count} {ending}" for ending, count in endings.items())
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({kinds})"


def caption_of(picture: Picture) -> str:
    """The name of the caption below the root, as data.scan knows it."""
    return picture.name[: -len(picture.path.suffix)] + picture.caption.suffix


def describe(
    root: Path,
    pictures: Sequence[Picture],
    left_out: Sequence[tuple[str, str]],
    buckets: Sequence[Size],
    captions: bool = True,
) -> str:
    """Text to print: pictures in each bucket, files left out by ending, the first ten of those with reasons, others."""
    counts = Counter(nearest_bucket(p.width, p.height, buckets) for p in pictures)
    lines = [f"{len(pictures)} pictures in {len(counts)} of {len(buckets)} buckets"]
    lines += [f"  {w:5d} x {h:<5d} {counts[w, h]:8d}" for w, h in buckets if (w, h) in counts]
    if left_out:
        lines.append(_count([name for name, _ in left_out], "file").replace(" (", " left out ("))
        lines += [f"  {printable(name)}: {reason}" for name, reason in left_out[:10]]
        lines += [f"  ... and {len(left_out) - 10} more"] * (len(left_out) > 10)
    lines += parts_not_read(root, pictures)
    named = {p.name for p in pictures} | {name for name, _ in left_out}
    return "\n".join(lines + others(root, named | {caption_of(p) for p in pictures if p.caption and captions}))
