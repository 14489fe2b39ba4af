"""The picture files of sample.py: which to read, what to keep besides RGB, where to write, and color fixes.

    --input FILE      one job           --output FILE, or a folder that exists
    --input FOLDER    a job per picture   --output FOLDER, the same relative names

A restored picture keeps the size, the ICC profile, the resolution (dpi), the transparency and those EXIF and XMP
entries of its file that describe the photograph. Entries that describe the old pixels go. EXIF orientation is applied
and its tag set to 1; ProcessingSoftware names kontext_min, so that train.py does not take the picture for a clean one.
Lines say what else is lost: bits beyond 8 per channel, the profile of a gray or CMYK picture (the result is RGB),
transparency where the format has none, and what not_read.py lists. Pictures are compared in sRGB. The camera's own
notes (MakerNote) are copied byte by byte: those that name places in the old file, such as Canon's, can't all be read.

Restored tiles may drift in color, from each other and from the input. Two color fixes give the restored picture the
colors of the degraded one. Use neither for faded or dark pictures, whose colors you want to change:

    wavelet    out = high(restored) + low(degraded)                       low: five passes of the 3 x 3 binomial kernel
                   = restored + low(degraded - restored)                  at dilations 1, 2, 4, 8, 16; high = x - low(x)
    adain      out = (restored - mean(restored)) std(degraded) / std(restored) + mean(degraded)       channel by channel

Sources: IceClear/StableSR, scripts/wavelet_color_fix.py (also SUPIR and OSEDiff); Huang & Belongie 2017, "Arbitrary
Style Transfer in Real-time with Adaptive Instance Normalization", equation 8. The second form of `wavelet` holds since
low is linear; it needs one filter instead of two. Pictures are RGB of one size; borders are repeated.
"""

import filecmp
import functools
import io
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffTags

from kontext_min.data import ENDINGS, FORMATS, TURNS, Size, UnreadableError, as_text, open_picture, scan, srgb_transform
from kontext_min.extras.alike import differences
from kontext_min.extras.inventory import (
    RECORD,
    ZEROS,
    is_one_color,
    is_result,
    marked,
    others,
    printable,
    unread,
    unused,
    zeros_at_end,
)
from kontext_min.extras.not_read import FAR, ends, is_deep, kind_of, not_kept, not_read, not_shown, space_of
from kontext_min.extras.saving import naming, write_picture
from kontext_min.extras.validation import GAP
from kontext_min.utils import numpy_generator

KINDS = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
KINDS |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
ASIDE = re.compile(r"\.[0-9a-f]{8}\.tmp")  # names of files that are being written
SCORED = 11  # pixels a side that SSIM needs
QUALITY = 95  # of JPEG and WebP
LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # in pixels, of the formats' encoders
LARGEST_SEGMENT = 65502 - 64  # bytes of EXIF or XMP in a JPEG; the mark takes some
IPTC, COMMENT = 33723, ExifTags.Base.UserComment
# Title, camera, resolution, software, date, artist, computer, copyright, rating, Windows' title to subject.
KEPT = {IPTC, 269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 18246, 18249, *range(40091, 40096)}
KEPT |= {285, 33434, 33437, 34855, 36867, 36868, 37386, 50735}  # page; exposure, date, lens and body, of some TIFFs
# Of the pixels, or handled elsewhere: IPTC, Photoshop, ICC, XMP, parts of EXIF, places on maps, padding.
LAYOUT = {*range(254, 269), *range(273, 282), *range(284, 294), 297, 301, *range(317, 348), *range(512, 533), 700, 11}
LAYOUT |= {4096, 4097, 32995, 32996, 32997, 32998, 33421, 33422, 33550, IPTC, 33922, 34264, *range(34735, 34738), 34377}
LAYOUT |= {34665, 34675, 34853, 37439, 37724, 40965, 50341, 59932, 59933}
OF_TIFF = {700, IPTC, 34377, *range(34735, 34738)}  # which other formats keep elsewhere
NAMES = ExifTags.TAGS | ExifTags.GPSTAGS
# Of the Exif part all is kept but the layout of the old pixels, and an offset into the old file.
DROPPED = {37121, 37122, ExifTags.IFD.Interop}
PLACES = {37396, 41492}  # of the subject, in the pixels before the picture is turned
# Bytes of the Exif and the GPS part whose type is UNDEFINED: Pillow does not know these, and would write BYTE.
UNDEFINED = {
    ExifTags.IFD.Exif: (34856, 37500, COMMENT, 41484, *range(41728, 41731), 41995, 42082),
    ExifTags.IFD.GPSInfo: (27, 28),
}
for _part, _tags in UNDEFINED.items():
    _known = {tag: TiffTags.TagInfo(tag, str(tag), TiffTags.UNDEFINED, None) for tag in _tags}
    TiffTags.TAGS_V2_GROUPS[_part] = TiffTags.TAGS_V2_GROUPS.get(_part, {}) | _known
# XMP with one of these describes the old pixels: their size, their layers, raw settings that would be applied twice.
XMP_OF_PIXELS = (b"tiff:", b"exif:Pixel", b"photoshop:", b"crs:", b"xmpMM:", b"GPano:", b"hdrgm:", b"Container:")
# Depths and the like in parts that are not read; small pictures; films; faces by their place.
XMP_OF_PIXELS += (b"xmpNote:", b"xmpGImg:", b"GCamera:", b"mwg-rs:", b"MP:RegionInfo", b"MPReg:", b"acdsee-rs:")
XMP_OF_PIXELS += (b"Iptc4xmpExt:ImageRegion",)


@dataclass(frozen=True)
class Job:
    """A picture file, its name below --input, and where its restored picture goes."""

    path: Path
    name: str
    output: Path
    size: Size  # as seen


@dataclass(frozen=True)
class File:
    """What a file holds."""

    rgb: Image.Image  # upright; on white where it is fully transparent
    alpha: Image.Image | None
    keep: dict[str, Any]  # exif, icc_profile, dpi, xmp as Pillow's save() takes them
    notes: tuple[str, ...]  # what is not kept, in words


@dataclass(frozen=True)
class Photo:
    """A job's pictures in memory, all of one size."""

    job: Job
    file: File
    degraded: Image.Image  # what is to be restored, in the colors of its file
    clean: Image.Image | None  # in sRGB


def working_size(width: int, height: int, resolution: int | None) -> Size:
    """The size to restore at, in pixels: the area of resolution^2 in the same shape, or the picture's own size."""
    scale = resolution / math.sqrt(width * height) if resolution else 1.0
    return max(1, round(width * scale)), max(1, round(height * scale))


# ----------------------------------------------------------------------------------------------------------- which ones


def find(
    source: Path, target: Path, protected: Sequence[Path] = (), across: int = 1
) -> tuple[list[Job], list[tuple[str, str]]]:
    """The jobs of --input and --output, by name, and (name, reason) of files in the folder that can't be restored.

    Every reason why an output can't be written is found here, before any work.

    Args:
        source: --input.
        target: --output.
        protected: files that no output may replace, besides the inputs: LoRAs, weights, references. Of a folder, the
            files that belong to the jobs (`reference_of`).
        across: pictures side by side in each output, with --compare.

    Raises:
        OSError: there is no such input, or no place for the output.
        ValueError: no picture is found, the output can't be written in that format or would replace another file.
    """
    if source.is_dir():
        jobs, rejected = _find_in_folder(source, target, across)
    else:
        if target.is_dir():
            target = target / writable_name(source.name)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent}: no such folder for --output; make it first.")
        if target.suffix.lower() not in KINDS:
            raise ValueError(
                f"--output {target}: unknown picture format; use .png, .jpg, .webp or .tif, or an existing folder."
            )
        jobs, rejected = [Job(source, as_text(source.name), target, open_picture(source).size)], []
        if source.with_suffix(".txt").is_file():
            print(f"note: {source.with_suffix('.txt')}: a caption for training, not read here", file=sys.stderr)
        if reason := _unwritable(jobs[0], across):
            raise OSError(f"--output {reason}")
    taken = {_identity(job.path): f"the input {job.path}" for job in jobs}
    for path in protected:
        files = [reference_of(job, path) for job in jobs] if path.is_dir() else [path]
        found = [str(file) for file in files if file]
        taken |= {_identity(Path(file)): file for file in found}
        if path.is_dir():  # of clean pictures
            if shared := [file for file, count in Counter(found).items() if count > 1]:
                raise ValueError(f"--reference: {shared[0]} goes with two pictures of --input; rename one of them.")
            pairs = [(job.path, file) for job, file in zip(jobs, files, strict=True) if file]
            if not pairs:
                raise ValueError(
                    f"--reference {path}: none of its pictures has the name of one of --input, such as {jobs[0].name}."
                )
            lines = unused(path, {file.relative_to(path).as_posix() for _, file in pairs}, "input")
            copies = sum(filecmp.cmp(*pair, shallow=False) for pair in pairs)
            lines += [f"note: {path}: {copies} of {len(pairs)} are copies of the inputs"] * bool(copies)
            print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr)
    for job in jobs:
        place = _identity(job.output)
        if place in taken:
            raise ValueError(f"--output {job.output}: would replace {taken[place]}; choose another name or folder.")
        taken[place] = f"the output of {job.path}"
    for folder in {existing(job.output.parent) for job in jobs}:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"--output {folder}: nothing can be written there: {error.strerror}.") from error
    return jobs, rejected


def _find_in_folder(source: Path, target: Path, across: int) -> tuple[list[Job], list[tuple[str, str]]]:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"--output {target}: is a file, but --input is a folder; name a folder.")
    if target.resolve() == source.resolve():
        raise ValueError(f"--output {target}: would replace the input; choose another folder.")
    pictures, rejected = scan(source)
    rejected += unread(source, [])
    jobs = [Job(p.path, p.name, target / writable_name(p.name), (p.width, p.height)) for p in pictures]
    if odd := [p.name for p in pictures if p.name != p.path.relative_to(source).as_posix()]:
        print(
            f"note: {source}: not UTF-8 are {len(odd)} of the names; their pictures are written as here: {odd[0]}",
            file=sys.stderr,
        )
    # The output may lie in the input, and so may that of an earlier call: what is restored is not restored again.
    root, new = source.resolve(), target.resolve()
    made = {folder for folder in (new, *(record.parent for record in root.rglob(RECORD))) if root in folder.parents}
    linked = {new} - {root, *root.parents}  # a link in the input may lead to the output

    def is_made(path: Path) -> bool:
        real = path.parent.resolve()
        return not (made.isdisjoint(path.resolve().parents) and linked.isdisjoint((real, *real.parents)))

    for folder in sorted(made - {new}):
        print(f"note: {folder}: holds restored pictures, left out; to restore these, make it --input", file=sys.stderr)
    left_out = {job for job in jobs if is_made(job.path)}
    jobs = [job for job in jobs if job not in left_out]
    inside = {path for job in left_out if new in (path := job.path.resolve()).parents}
    if own := inside - {job.output.resolve() for job in jobs}:
        print(f"note: {target}: is --output, so pictures in it are not restored: {len(own)}", file=sys.stderr)
    rejected = [(name, why) for name, why in rejected if not is_made(source / name)]
    if not jobs and not rejected:
        raise ValueError(f"--input {source}: no pictures in this folder.")
    for line in others(source, {p.name for p in pictures} | {name for name, _ in rejected}, made):
        print(line, file=sys.stderr)
    if jobs and not target.exists() and target.suffix.lower() in ENDINGS:
        raise ValueError(f"--output {target}: is named like a picture, but --input is a folder; name a folder.")
    names = {job.name for job in jobs}
    if renamed := [job.output.name for job in jobs if job.output.name != Path(job.name).name]:
        print(f"note: {target}: written as PNG are {len(renamed)}, such as {printable(renamed[0])}", file=sys.stderr)
    reasons = {job.name: reason for job in jobs if (reason := _unwritable(job, across))}
    for job in jobs:  # a.gif becomes a.gif.png
        if (written := job.output.relative_to(target).as_posix()) != job.name and written in names:
            reasons[job.name] = f"would become {written}, which is another picture of the folder; rename one of them"
    rejected = sorted([*rejected, *reasons.items()])
    return [job for job in jobs if job.name not in reasons], [(printable(name), why) for name, why in rejected]


def writable_name(name: str) -> str:
    """The name itself, or with .png behind it where its format is no place for a restored picture, such as .gif."""
    return name if Path(name).suffix.lower() in KINDS else name + ".png"


def _unwritable(job: Job, across: int = 1) -> str | None:
    """Why the output of a job, a sheet of so many pictures side by side, can't be written, or None."""
    limit = LARGEST_SIDE.get(KINDS[job.output.suffix.lower()])
    width = across * (job.size[0] + GAP) - GAP
    side, most = max(width, job.size[1]), 2 * Image.MAX_IMAGE_PIXELS
    if across > 1 and width * job.size[1] > most:
        return (
            f"{job.output}: a sheet of more than {most:,} pixels could not be read; set KONTEXT_MAX_PIXELS to raise it."
        )
    if limit and side > limit:
        return f"{job.output}: {side} pixels a side, but this format has at most {limit}; use .png or .tif."
    try:
        if len(os.fsencode(job.output.name)) > 255:  # the folder may not be there yet, and could not say so
            return f"{job.output}: File name too long; rename the picture."
        if job.output.is_dir():
            return f"{job.output}: is a folder, expected a file or nothing."
        os.lstat(job.output)
        if not job.output.is_file():  # a device, a pipe, a link to a disk that is not there
            return f"{job.output}: is no file, or a link that leads to none; expected a file or nothing."
    except FileNotFoundError:
        pass
    except UnicodeEncodeError:  # a locale that is not UTF-8
        return f"{job.output}: this locale's file names lack some of its letters; set LC_ALL=C.UTF-8."
    except OSError as error:  # such as a name that is too long
        return f"{job.output}: {error.strerror}."
    return None


def _identity(path: Path) -> object:
    """What two paths to one file share: links do not matter, nor the case of letters on a disk that ignores it."""
    try:
        inode = path.stat()
        return inode.st_dev, inode.st_ino
    except OSError:
        return str(path.resolve()).casefold() if _ignores_case(existing(path.parent)) else path.resolve()


@functools.lru_cache(1000)
def _ignores_case(folder: Path) -> bool:
    """Whether a.png and A.png are one file in a folder, as on most disks of Windows, a Mac, and on memory cards."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".Case") as file:
        return Path(file.name).with_name(Path(file.name).name.swapcase()).exists()
    return False  # a folder that can't be written is named later


def existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    return path if path.exists() or path.is_symlink() else existing(path.parent)


def reference_of(job: Job, folder_or_file: Path) -> Path | None:
    """The file itself, or the picture of the same name in the folder; of another ending if there is no such one.

    Raises:
        ValueError: there are several of other endings.
    """
    if not folder_or_file.is_dir():
        return folder_or_file
    same = folder_or_file / job.name
    if same.is_file() or not same.parent.is_dir():
        return same if same.is_file() else None
    stems = {same.stem, *(unicodedata.normalize(form, same.stem) for form in ("NFC", "NFD"))}  # a Mac has the latter
    found = sorted(
        name for stem in stems for name in _by_stem(same.parent, same.parent.stat().st_mtime_ns).get(stem, ())
    )
    if len(found) > 1:
        raise ValueError(f"--reference {folder_or_file}: {' and '.join(found)} go with {job.name}; keep one of them.")
    return same.with_name(found[0]) if found else None


@functools.lru_cache(1000)
def _by_stem(folder: Path, changed: int) -> dict[str, list[str]]:
    """The picture files of a folder by their names without an ending; `changed` at a time."""
    found: dict[str, list[str]] = {}
    for path in folder.iterdir():
        if path.suffix.lower() in ENDINGS and path.is_file():
            found.setdefault(path.stem, []).append(path.name)
    return found


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
    notes += ["is a result of this program itself"] * is_result(job.path)
    if file.rgb.size != job.size:
        raise UnreadableError(f"{job.path}: has changed since the start.")
    notes += _fit(file.keep, KINDS[job.output.suffix.lower()])
    if degradation:
        degraded = degradation(file.rgb, numpy_generator(seed, "degrade", 0, job.name))
        clean = as_seen(file.rgb, file)
    elif reference:
        if path := reference_of(job, reference):
            notes += [f"{path} is a result of this program, not clean"] * is_result(path)
            with suppress(Exception), open(path, "rb") as opened, Image.open(opened, formats=FORMATS) as image:
                notes += [f"{path}: {what}" for what in not_shown(image, ends(opened, FAR), decode=True)]
            notes += [f"{path}: {what}" for what in differences(job.path, path)]
            if zeros_at_end(path):
                raise UnreadableError(f"{path}: {ZEROS}.")
            clean = open_picture(path, to_srgb=True)  # says what is wrong with the file, if anything is
            notes += [f"{path}: nearly one color; look at the file"] * is_one_color(clean)
            if clean.size != job.size:
                sizes = "the input {}x{}, --reference {} {}x{}".format(*job.size, path, *clean.size)
                raise ValueError(f"{job.path}: {sizes}; expected one size.")
        else:
            notes.append("no such picture in --reference, so no scores")
    if clean and min(clean.size) < SCORED:
        notes.append(f"scores need {SCORED} pixels a side")
    for note in notes:
        print(f"note: {printable(job.name)}: {note}", file=sys.stderr)
    return Photo(job, file, degraded, clean)


def load_restored(job: Job, compare: bool) -> Image.Image:
    """The restored picture as its file has it, in sRGB, for scores beside `Photo.clean`.

    Args:
        job: of the picture.
        compare: it is the second picture of a sheet.

    Raises:
        ValueError: it can't be read, or has another size than the input.
    """
    file = read(job.output)
    rgb, (width, height) = file.rgb, job.size
    if compare and rgb.height == height:
        rgb = rgb.crop((width + GAP, 0, min(2 * width + GAP, rgb.width), height))
    if rgb.size != job.size:
        sizes = "{}x{}, its input {}x{}".format(*file.rgb.size, *job.size)
        raise UnreadableError(f"{job.output}: {sizes}; add --overwrite to restore it again.")
    return as_seen(rgb, file)


def as_seen(picture: Image.Image, file: File) -> Image.Image:
    """A picture in the colors of this file -> in sRGB, on white where the file is transparent.

    It counts as sRGB if the profile is missing or broken.
    """
    picture = _on_white(picture, file.alpha) if file.alpha else picture
    if profile := file.keep.get("icc_profile"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            picture = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"))
        except (OSError, ImageCms.PyCMSError):
            pass
    return picture


def _on_white(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)


def read(path: Path) -> File:
    """A file with all that can be kept of it. Raises UnreadableError, a ValueError that names the file."""
    rgb = open_picture(path)
    if zeros_at_end(path):
        raise UnreadableError(f"{path}: {ZEROS}.")
    try:
        with open(path, "rb") as opened, Image.open(opened, formats=FORMATS) as image:
            keep, alpha, foreign = {}, None, None
            both_ends = ends(opened, FAR)
            deep = is_deep(image, both_ends)
            # Before the pixels: counting the pages of a TIFF reads its first one again, which turns it back.
            notes = not_read(image, both_ends)
            way = _orientation(image) if image.format == "TIFF" else None  # which has it only until Pillow turns it
            by_xmp = way in TURNS and ExifTags.Base.Orientation not in image.tag_v2
            image.load()  # in a PNG, EXIF and text may stand behind the pixels
            lying = (way or _orientation(image)) in (5, 6, 7, 8)  # its x is y as seen
            if deep:
                notes.append("more than 8 bits a channel: restored and written with 8")
            if profile := image.info.get("icc_profile"):
                space, kind = space_of(profile), kind_of(image)
                if space == kind == "RGB":
                    keep["icc_profile"] = profile
                elif foreign := srgb_transform(profile, kind):
                    notes.append(f"its {space} color profile does not fit RGB: converted to sRGB")
                    rgb = open_picture(path, to_srgb=True)
            if image.format == "WEBP" and b"VP8L" in both_ends and b"VP8 " not in both_ends:
                keep["lossless"] = True
            dpi = tuple(map(float, _dpi(image)))  # a TIFF may have 0 / 0
            if all(0 < side < math.inf for side in dpi):
                keep["dpi"] = dpi[::-1] if lying else dpi
            if xmp := image.info.get("xmp"):
                xmp = xmp if isinstance(xmp, bytes) else xmp.encode()
                if any(word in xmp for word in XMP_OF_PIXELS):
                    notes.append("its XMP describes the old pixels: dropped")
                else:
                    keep["xmp"] = xmp
            notes += not_kept(image, both_ends)
            try:
                turn, exif = _exif(image, rgb.size, lying)
                others = _tags_dropped(image, exif)
                broken = len(image.info.get("exif") or b"") > 32 and not Image.Image.getexif(image)
            except Exception:  # the picture itself may be fine
                turn, exif, others, broken = None if way else TURNS.get(_orientation(image)), None, [], True
            if broken:
                notes.append("its EXIF can't be read: dropped")
            if exif:
                keep["exif"] = exif
            if others:
                notes.append(f"its tags {', '.join(others[:5])}{' ...' * (len(others) > 5)}: dropped")
            by_xmp |= turn is not None and b"tiff:Orientation" in (xmp or b"") and not _has_own_orientation(image)
            if by_xmp:
                notes.append("turned as its XMP says; some viewers show it as it lies")
            if image.has_transparency_data:
                straight = image.convert("RGBA")
                straight = straight.transpose(turn) if turn is not None else straight
                alpha = straight.getchannel("A")
                if alpha.getextrema() == (255, 255):
                    alpha = None
                else:
                    # The colors themselves, not laid on white: else a half transparent edge would be whitened twice.
                    colors = straight.convert("RGB")
                    if foreign:
                        colors = ImageCms.applyTransform(colors.convert(kind), foreign)
                    rgb.paste(colors, mask=alpha.point(lambda a: 255 * (a > 0)))
                    notes.append("transparency is kept as it is (a JPEG and a sheet of --compare are laid on white)")
    except Exception as error:  # see data._read_header: Pillow's parsers raise anything
        raise UnreadableError(f"{path}: {error}") from error
    notes += ["nearly one color; look at the file"] * is_one_color(rgb)
    return File(rgb, alpha, keep, tuple(notes))


def _dpi(image: Image.Image) -> tuple[float, float]:
    """Zeros if the file tells none: Pillow then says 1 of a TIFF, and 72 of a JPEG with EXIF."""
    info, has = image.info, image.format not in ("JPEG", "MPO", "TIFF") or image.info.get("jfif_unit")
    with suppress(Exception):  # the picture itself may be fine
        has = has or 282 in (image.tag_v2 if image.format == "TIFF" else Image.Image.getexif(image))
    # Of the EXIF of a JPEG Pillow takes one side for both, and 72 where it names no unit.
    told = None if image.format in ("JPEG", "MPO") and not info.get("jfif_unit") else info.get("dpi")
    if has:
        return told or _dpi_of_exif(image)
    block = (info.get("photoshop") or {}).get(0x03ED)  # Photoshop's own, of a JPEG
    return (block["XResolution"], block["YResolution"]) if isinstance(block, dict) else (0, 0)


def _dpi_of_exif(image: Image.Image) -> tuple[float, float]:
    """As a WebP or an AVIF has it; zeros if it tells none."""
    with suppress(Exception):  # the picture itself may be fine
        exif = Image.Image.getexif(image)
        scale = {2: 1.0, 3: 2.54}[exif.get(296, 2)]
        return float(exif[282]) * scale, float(exif[283]) * scale
    return 0, 0


def _orientation(image: Image.Image) -> int | None:
    with suppress(Exception):  # the picture itself may be fine
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return None


def _has_own_orientation(image: Image.Image) -> bool:
    """Whether it stands in EXIF: Pillow takes it from XMP otherwise."""
    exif = Image.Exif()
    with suppress(Exception):
        exif.load(image.info.get("exif") or b"")
    return ExifTags.Base.Orientation in exif


def _tags_dropped(image: Image.Image, kept: bytes | None) -> list[str]:
    """Names of the tags of EXIF, or of a TIFF, that `kept` lacks or cuts, and that do not describe the pixels."""
    old, new = Image.Image.getexif(image), _loaded(kept or b"")
    layout = LAYOUT if image.format == "TIFF" else LAYOUT - OF_TIFF
    found = [tag for tag in {*old} - {*new} - layout if not 0x5000 <= tag < 0x6000]
    for part in UNDEFINED:
        theirs, ours = old.get_ifd(part), new.get_ifd(part)
        found += {*theirs} - {*ours} - DROPPED - PLACES
        found += [tag for tag in {*theirs} & {*ours} if _count(theirs[tag]) > _count(ours[tag])]
    return [str(NAMES.get(tag, tag)) for tag in sorted(found)]


def _count(value: Any) -> int:
    """How many values an entry has: Pillow writes only the first of a tag that it knows as single."""
    return len(value) if isinstance(value, tuple | bytes) else 1


def _exif(image: Image.Image, size: Size, lying: bool) -> tuple[Image.Transpose | None, bytes | None]:
    """How data.open_picture turned the picture, and the EXIF of a picture of this size."""
    old, new = Image.Image.getexif(image), Image.Exif()  # as data.py reads it: see there
    new.endian = old.endian  # the camera's own notes and comments in UTF-16 depend on it
    turn = TURNS.get(old.get(ExifTags.Base.Orientation))  # of a TIFF there is none left: Pillow turned it
    new.update(_texts({tag: old[tag] for tag in KEPT & set(old) if tag != IPTC or isinstance(old[tag], bytes)}))
    if lying and {282, 283} <= set(new):  # resolution
        new[282], new[283] = new[283], new[282]
    dropped = DROPPED | PLACES if turn is not None or lying else DROPPED
    if photo := {tag: value for tag, value in old.get_ifd(ExifTags.IFD.Exif).items() if tag not in dropped}:
        width, height = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
        new.get_ifd(ExifTags.IFD.Exif).update(_texts(photo) | {width: size[0], height: size[1]})
    if place := old.get_ifd(ExifTags.IFD.GPSInfo):
        new.get_ifd(ExifTags.IFD.GPSInfo).update(_texts(place))
    if not (new or photo or place):
        return turn, None
    new[ExifTags.Base.Orientation] = 1
    with suppress(Exception):  # Pillow's writer raises anything
        return turn, new.tobytes()
    for part in (None, *UNDEFINED):  # some entry can't be written, such as a height below the sea's
        entries = new.get_ifd(part) if part else new
        for tag in [tag for tag, value in entries.items() if not _is_writable(part, tag, value)]:
            del entries[tag]
    return turn, new.tobytes()


def _is_writable(part: int | None, tag: int, value: Any) -> bool:
    """Whether Pillow can write an entry of a part of EXIF, or of its main part."""
    exif = Image.Exif()
    (exif.get_ifd(part) if part else exif)[tag] = value
    with suppress(Exception):
        return bool(exif.tobytes())
    return False


class _Text(str):
    """A text of EXIF. Pillow reads each byte as a letter, and would write ? for all beyond ASCII, such as UTF-8."""

    def encode(self, *_: str) -> bytes:  # as Pillow's writer calls it
        return super().encode("latin-1", "replace")


def _texts(entries: dict[int, Any]) -> dict[int, Any]:
    """Entries that Pillow can write. Numbers where EXIF wants bytes become bytes, or go if they are larger."""
    out = {tag: _Text(value) if isinstance(value, str) else value for tag, value in entries.items()}
    for tag in {*out} & {tag for tags in UNDEFINED.values() for tag in tags}:
        if not isinstance(value := out.pop(tag), bytes | str):
            value = value if isinstance(value, tuple) else (value,)
            value = bytes(value) if all(isinstance(n, int) and 0 <= n < 256 for n in value) else None
        out |= {} if value is None else {tag: value}
    return out


def _loaded(exif: bytes) -> Image.Exif:
    """Bytes that `_exif` made; its texts can be written again."""
    out = Image.Exif()
    out.load(exif)
    for part in (out, *(out.get_ifd(tag) for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) if tag in out)):
        part.update(_texts({tag: value for tag, value in part.items() if isinstance(value, str)}))
    return out


def _fit(keep: dict[str, Any], kind: str) -> list[str]:
    """Take from `keep` what can't be written in a format, such as 4 billion dpi; returns what, in words."""
    left_out, exif = [], _loaded(keep.get("exif", b""))
    if kind != "TIFF" and IPTC in exif:
        del exif[IPTC]
        keep["exif"] = exif.tobytes()
        left_out.append("its IPTC: left out, only a TIFF has a place for it")
    left_out += _fit_into_jpeg(keep) if kind == "JPEG" else []
    if kind == "PNG" and "xmp" in keep:
        try:
            keep["xmp"].decode()
        except UnicodeDecodeError:
            del keep["xmp"]
            left_out.append("its XMP: left out, a PNG takes only UTF-8")
    for name in tuple(keep):
        try:
            Image.new("RGB", (1, 1)).save(io.BytesIO(), kind, **{name: keep[name]})
        except Exception:  # Pillow's writers raise anything
            del keep[name]
            left_out.append(f"its {name}: left out, can't be written as {kind}")
    return left_out


def _fit_into_jpeg(keep: dict[str, Any]) -> list[str]:
    """Take from `keep` what a JPEG has no room for; returns what, in words."""
    left_out = []
    if len(keep.get("exif", b"")) > LARGEST_SEGMENT:
        exif = _loaded(keep["exif"])
        exif.get_ifd(ExifTags.IFD.Exif).pop(ExifTags.Base.MakerNote, None)
        keep["exif"], what = exif.tobytes(), "the camera's own notes (MakerNote)"
        if len(keep["exif"]) > LARGEST_SEGMENT:
            del keep["exif"]
            what = "its EXIF"
        left_out.append(f"{what}: left out, too large for a JPEG")
    if len(keep.get("xmp", b"")) > LARGEST_SEGMENT:
        del keep["xmp"]
        left_out.append("its XMP: left out, too large for a JPEG")
    if not all(1 <= x < 2**16 for x in keep.get("dpi", (1,))):
        del keep["dpi"]
        left_out.append("its dpi: left out, a JPEG has 1 to 65535")
    return left_out


def write(path: Path, rgb: Image.Image, file: File | None = None) -> None:
    """Save a restored picture with what its file held, aside and renamed.

    Args:
        path: its ending chooses the format; folders are made.
        rgb: of the size of file.rgb, in the colors of its profile.
        file: whence EXIF and so on come; None for a sheet of several pictures, in sRGB.

    Raises:
        OSError, ValueError: it can't be written; an older file is still there.
    """
    kind = KINDS[path.suffix.lower()]
    options: dict[str, Any] = dict(file.keep) if file else {}
    if file and file.alpha:
        if kind == "JPEG":
            rgb = _on_white(rgb, file.alpha)
        else:
            rgb = rgb.copy()
            rgb.putalpha(file.alpha)
    if kind in ("JPEG", "WEBP"):
        options["quality"] = QUALITY
    if kind == "JPEG":
        options["subsampling"] = 0  # color at full resolution: halved, it shows on red edges
    if "xmp" in options and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp").decode("utf-8", "replace"))
    exif = _loaded(options.get("exif", b""))
    if "xmp" in options and kind == "TIFF":
        exif[700] = options.pop("xmp")
    if kind == "TIFF" and exif.endian == ">":  # Pillow writes a TIFF in the other order
        for part in (exif.get_ifd(ifd) for ifd in UNDEFINED if ifd in exif):
            for tag, text in part.items():
                if isinstance(text, bytes) and text.startswith(b"UNICODE\0"):
                    part[tag] = text[:8] + text[8:].decode("utf-16-be", "replace").encode("utf-16-le")
    if "dpi" in options and kind == "WEBP":  # it has no other place for it
        exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = options.pop("dpi")
        exif[ExifTags.Base.ResolutionUnit] = 2  # per inch
    options["exif"] = marked(exif)
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()  # a link stays one
    # A short name: one made of path.name could be longer than file systems take.
    aside = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            write_picture(rgb, aside, kind, **options)
            if path.exists():  # with --overwrite
                shutil.copymode(path, aside)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- colors

DILATIONS = (1, 2, 4, 8, 16)
HALO = sum(DILATIONS)  # pixels that the five kernels together reach
BAND = 256  # rows that are filtered at once, so that memory does not grow with the picture


def wavelet(restored: Image.Image, degraded: Image.Image) -> Image.Image:
    """The low frequencies of `degraded` under the high ones of `restored`."""
    width, height = restored.size
    out = Image.new("RGB", restored.size)
    for top in range(0, height, BAND):
        first, last = max(top - HALO, 0), min(top + BAND + HALO, height)
        x, y = (np.asarray(p.crop((0, first, width, last)), dtype=np.float32) for p in (restored, degraded))
        x = (x + _low(y - x))[top - first : top - first + BAND]
        out.paste(Image.fromarray(np.rint(x.clip(0, 255)).astype(np.uint8)), (0, top))
    return out


def _low(x: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> the same size: (1 2 1) / 4 down and across, five times, ever wider."""
    for d in DILATIONS:
        for axis in (0, 1):
            n = x.shape[axis]
            p = np.pad(x, [(d, d) if a == axis else (0, 0) for a in range(3)], mode="edge")
            before, after = (p.take(range(k, k + n), axis=axis) for k in (0, 2 * d))
            x = (before + 2 * x + after) / 4
    return x


def adain(restored: Image.Image, degraded: Image.Image) -> Image.Image:
    """Mean and deviation of each channel of `degraded`. A byte goes to a byte, so a table of 256 does it."""
    values, tables = np.arange(256), []
    histograms = (np.reshape(p.histogram(), (3, 256)) for p in (restored, degraded))
    for of_restored, of_degraded in zip(*histograms, strict=True):
        (mean, std), (wanted_mean, wanted_std) = (_moments(values, h) for h in (of_restored, of_degraded))
        table = (values - mean) * (wanted_std / max(std, 1e-3)) + wanted_mean
        tables += np.rint(table.clip(0, 255)).astype(int).tolist()
    return restored.point(tables)


def _moments(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    mean = np.average(values, weights=counts)
    return float(mean), float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))


COLOUR_FIXES = {"none": lambda restored, degraded: restored, "wavelet": wavelet, "adain": adain}
