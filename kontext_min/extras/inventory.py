"""Describe a folder of pictures: how many are in each bucket, which files are left out and why.

data.scan ignores files that Pillow does not know as pictures. `unread` names those that you may have meant to use.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from kontext_min.data import ENDINGS, Picture, Size, nearest_bucket, walk

RECORD = ".restored-with.jsonl"  # marks a folder of restored pictures: see folders.py
# Pictures that Pillow cannot read.
UNREAD = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".hif", ".iiq",
    ".jxl", ".nef", ".nrw", ".orf", ".palm", ".pdf", ".pef", ".ps", ".psb", ".raf", ".raw", ".rw2", ".spi", ".spider",
    ".srw", ".svg", ".wmf", ".x3f", ".xcf",
}  # fmt: skip
# JPEG, PNG, GIF, TIFF, most raw formats, Photoshop, QOI, DDS, WebP, BMP, PPM, JPEG 2000 and XL, HEIF, AVIF begin so.
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|II\*\0|MM\0\*|FUJIFILM|8BPS|qoif|DDS |RIFF....WEBP|BM....\0{4}|P[4-6]\s\d|"
    rb"\0\0\0\x0c(jP  |JXL )|....ftyp(hei|hev|mif|avi)",
    re.DOTALL,
)


def unread(root: Path, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """(name, reason) of files below a folder that `scan` does not read.

    These are pictures of formats that Pillow lacks or with another ending, links that lead nowhere, pipes, empty
    captions, and text files that other programs take for captions of the pictures.

    Raises:
        ValueError: some of the pictures were made by sample.py or train.py, so they are not clean.
    """
    _refuse_results(root.resolve(), [p.name for p in pictures])
    files, left_out = dict(walk(root)), []
    for name, path in files.items():
        ending = path.suffix.lower()
        if ending in UNREAD - ENDINGS:
            left_out.append((name, f"Pillow cannot read {ending} files; convert it to PNG or JPEG"))
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
        small = p.caption and p.caption.stat().st_size < 5000
        if small and not p.caption.read_bytes().decode("utf-8-sig", "replace").strip():
            left_out.append((f"{stem}.txt", "an empty caption; --prompt takes its place"))
        if others and not p.caption:
            reason = f"not read as a caption; rename it to {PurePosixPath(stem).name}.txt"
            left_out.append((lower[others[0]], reason))
    return left_out


def _refuse_results(root: Path, names: Sequence[str]) -> None:
    """Raises ValueError if a picture is one that sample.py has restored, or that train.py wrote to validate."""
    records = {folder / RECORD for name in names for folder in (root / name).parents if (folder / RECORD).is_file()}
    restored = {record.parent / name for record in records for name in _recorded(record)}
    for path in (root / name for name in names):
        if path in restored:
            raise ValueError(f"{path}: restored by sample.py, and {root} should hold clean pictures; move it.")
        if path.parent.name == "validation" and (path.parent.parent / "left-out.txt").exists():
            raise ValueError(f"{path}: written by train.py, and {root} should hold clean pictures; move it.")


def _recorded(record: Path) -> Iterator[str]:
    """The names below its folder of the pictures in a record; a .gif, for instance, is restored as .gif.png."""
    for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            name = str(json.loads(line)["picture"])
            yield from (name, f"{name}.png")


def _is_picture(path: Path) -> bool:
    """Whether a file begins as one of a picture."""
    try:
        with path.open("rb") as file:
            return bool(BEGINNINGS.match(file.read(12)))
    except OSError:
        return False


def describe(pictures: Sequence[Picture], left_out: Sequence[tuple[str, str]], buckets: Sequence[Size]) -> str:
    """Text to print: pictures in each bucket, files left out by ending, and the first ten of those with reasons."""
    counts = Counter(nearest_bucket(p.width, p.height, buckets) for p in pictures)
    lines = [f"{len(pictures)} pictures in {len(counts)} of {len(buckets)} buckets"]
    lines += [f"  {w:5d} x {h:<5d} {counts[w, h]:8d}" for w, h in buckets if (w, h) in counts]
    if left_out:
        endings = Counter(PurePosixPath(name).suffix.lower() or "other" for name, _ in left_out)
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        lines.append(f"{len(left_out)} file{'s' * (len(left_out) > 1)} left out ({kinds})")
        lines += [f"  {name}: {reason}" for name, reason in left_out[:10]]
        lines += [f"  ... and {len(left_out) - 10} more"] * (len(left_out) > 10)
    return "\n".join(lines)
