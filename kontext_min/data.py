"""A folder of photographs becomes training batches: find, assign to a bucket, crop, degrade, stack.

    folder --scan--> pictures --usable--> those that cover their bucket --Pairs--> (control, target) --collate--> batch
                                          order of the pairs: BucketSampler

* A bucket is one of Kontext's 17 training shapes, scaled to --resolution. A picture goes to the bucket of the nearest
  aspect ratio, |log((w / h) / (w_bucket / h_bucket))|, is resized to cover it and cropped. It is never squashed.
* Crop and degradation of a picture depend only on (seed, epoch, name), the order of an epoch only on (seed, epoch). A
  run is therefore the same with any number of loader workers, after a resume, and on any number of GPUs.

Sizes are (width, height) as in Pillow and in Kontext's list. Pictures are bytes (3, H, W), batches (B, 3, H, W).
Source: the shapes are PREFERED_KONTEXT_RESOLUTIONS (sic) of black-forest-labs/flux at 802fb47, src/flux/util.py.
torchvision's ImageFolder reads a folder too, but has no buckets, and no order that is the same after a resume.
"""

import functools
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from torch import Tensor

from kontext_min.utils import numpy_generator

Size = tuple[int, int]

# ---- buckets ---------------------------------------------------------------------------------------------------------

# About one megapixel each, from 3:7 to 7:3; sides are multiples of 16, because one token covers 16 x 16 pixels.
PREFERRED: list[Size] = [
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
]  # fmt: skip


def buckets(resolution: int = 1024, multiple: int = 16) -> list[Size]:
    """The preferred shapes, scaled to the area of a square of `resolution` pixels a side; 1024 gives the official list.

    Sides are multiples of `multiple`: twice the autoencoder's factor, because a token is 2 x 2 latents.

    Raises:
        ValueError: the resolution is smaller than one token.
    """
    if resolution < multiple:
        raise ValueError(f"resolution: got {resolution}, expected at least {multiple} pixels, one token of this model.")
    tokens = resolution / 1024 / multiple
    scaled = [(max(1, round(w * tokens)) * multiple, max(1, round(h * tokens)) * multiple) for w, h in PREFERRED]
    return list(dict.fromkeys(scaled))  # each once, in order: small shapes may round to the same one


def nearest_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket with the nearest aspect ratio, by |log|; a tie goes to the narrower."""
    # The official rule compares |w/h - w/h|, in which 2:1 is twice as far from the square as 1:2 is.
    # On a log scale both are equally far, so a transposed picture gets the transposed bucket, and the crop loses least.
    return min(buckets, key=lambda b: (abs(math.log(width * b[1] / (height * b[0]))), b[0]))


# ---- finding pictures ------------------------------------------------------------------------------------------------

# Those of photographs. Pillow opens more, and reads some of them as negatives or in false colors.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"]
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
# A complete file has this mark within this many bytes of its end.
END_MARKS = {"JPEG": (b"\xff\xd9", 1 << 12), "PNG": (b"IEND", 1 << 17)}
# These hold the orientation of a PNG. If they follow the pixels, Pillow finds them only by decoding.
ORIENTATION_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
SMALLEST = 16  # pixels a side
THREADS = 8  # reading headers is mostly waiting for the disk
HIDDEN = {"$recycle.bin", "#recycle", "@eadir", "__macosx"}  # folders that systems keep: waste bins, thumbnails

# Pillow refuses more than twice its limit, so that a small file cannot unpack to more than your memory.
Image.MAX_IMAGE_PIXELS = 250_000_000  # KONTEXT_MAX_PIXELS in the environment raises it: extras/program.py
warnings.filterwarnings("ignore", module="PIL")  # of sizes and broken EXIF; what matters is an error
# It allows 1 MB for each text or color profile of a PNG; editors write more. The total stays limited to 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


@dataclass(frozen=True, slots=True)
class Picture:
    """A file to train on, as its header describes it."""

    path: Path
    name: str  # path below the root, with "/" on every system
    width: int  # as seen, after EXIF orientation
    height: int
    caption: Path | None = None  # the .txt beside it


def scan(root: Path) -> tuple[list[Picture], list[tuple[str, str]]]:
    """The pictures below a folder, sorted by name, and (name, reason) of picture files that cannot be used.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a folder of pictures.")
    pictures, rejected = [], []
    files = dict(walk(root, lambda error: rejected.append((as_text(error.filename), _reason(error)))))
    captions = {name[:-4]: path for name, path in files.items() if name.lower().endswith(".txt") and path.is_file()}
    found = {name: path for name, path in files.items() if path.suffix.lower() in ENDINGS}
    with ThreadPoolExecutor(THREADS) as pool:
        for (name, path), header in zip(found.items(), pool.map(_read_header, found.values()), strict=True):
            if isinstance(header, str):
                rejected.append((name, header))
            else:
                pictures.append(Picture(path, name, *header, captions.get(name[: -len(path.suffix)])))
    return sorted(pictures, key=lambda p: p.name), sorted(rejected)


def walk(root: Path, failed: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, Path]]:
    """(name below the root, path) of every file; hidden files and folders are skipped."""
    seen, starts = set(), [root]
    for start in starts:  # links to folders come last: a folder keeps its own name
        for folder, folders, names in os.walk(start, onerror=failed):
            if (real := os.path.realpath(folder)) in seen:  # a link may lead back to a parent folder
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if name[0] != "." and name.lower() not in HIDDEN)
            starts += [path for path in map(Path(folder).joinpath, folders) if path.is_symlink()]
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                yield as_text(path.relative_to(root).as_posix()), path


def _read_header(path: Path) -> Size | str:
    """(width, height), or the reason why the file cannot be used."""
    try:
        # Opening a named pipe would block forever.
        if path.exists() and not path.is_file():
            return "not a file"
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            mark, length = END_MARKS.get(image.format or "", (b"", 0))
            file.seek(max(0, file.seek(0, os.SEEK_END) - length))
            tail = file.read()
            # Decode a file without its end mark now, so that a truncated one is found now, not in mid-run.
            if mark not in tail or any(m in tail for m in ORIENTATION_MARKS):
                image.load()
            width, height = image.size if _orientation(image) < 5 else image.size[::-1]
        if min(width, height) < SMALLEST:
            return f"{width} x {height} pixels, less than {SMALLEST} a side"
        return width, height
    # On broken files, Pillow's parsers raise anything from OSError to KeyError.
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"size exceeds limit of {2 * Image.MAX_IMAGE_PIXELS:,} pixels; set KONTEXT_MAX_PIXELS to raise it"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(as_text(text).split()) or f"broken, Pillow stops with {type(error).__name__}"


def as_text(name: str | Path) -> str:
    """A file name that can be printed: bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def usable(pictures: Sequence[Picture], buckets: Sequence[Size]) -> tuple[list[Picture], list[tuple[str, str]]]:
    """The pictures that cover their bucket, and (name, reason) of the others."""
    kept, small = [], []
    for p in pictures:
        w, h = nearest_bucket(p.width, p.height, buckets)
        # A model that trains on enlarged targets learns to leave pictures soft.
        if p.width >= w and p.height >= h:
            kept.append(p)
        else:
            small.append((p.name, f"{p.width} x {p.height}, smaller than its bucket {w} x {h}; lower --resolution"))
    return kept, small


# ---- one picture -----------------------------------------------------------------------------------------------------

# EXIF orientation -> what turns the stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times faster. We do so if the result is still this many
# times as large as needed, so that Lanczos does the last step. The crop's PSNR against that of a full decode is then
# 51 dB in the median; with a margin of 1.0 it is 45 dB, and the crop 5 percent softer (tests/data_bench.py draft).
DRAFT_MARGIN = 1.7


class UnreadableError(ValueError):
    """A file that cannot be read; the message is one line that names it."""


def open_picture(path: Path, minimum: Size | None = None, to_srgb: bool = False) -> Image.Image:
    """A picture as RGB bytes, upright. Alpha is composited on white, as in browsers; of an animation, the first frame.

    A JPEG much larger than the `minimum` size that you need is decoded at reduced size. `to_srgb` converts colors from
    the file's ICC profile: the autoencoder takes every picture as sRGB, so a pair with two profiles would teach a
    color shift. The official code ignores profiles. Raises UnreadableError, a ValueError that names the file.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if minimum and image.format in ("JPEG", "MPO"):
                w, h = minimum if _orientation(image) < 5 else minimum[::-1]
                image.draft(None, (math.ceil(w * DRAFT_MARGIN), math.ceil(h * DRAFT_MARGIN)))
            tile = str(image.tile)  # how it is stored; gone after load()
            image.load()
            # Only now: in a PNG the orientation may follow the pixels.
            orientation = _orientation(image)
            rgb = _to_rgb(image, to_srgb, tile)
    except Exception as error:
        raise UnreadableError(f"{as_text(path)}: {_reason(error)}") from error
    return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; it is 1 for a TIFF with a tag, which Pillow turns itself, and where EXIF is broken."""
    try:
        # Not image.getexif(): for a PNG it decodes the whole picture to look for EXIF after the pixels.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return found if found in TURNS and ExifTags.Base.Orientation not in getattr(image, "tag_v2", ()) else 1
    except Exception:
        return 1


def _to_rgb(image: Image.Image, to_srgb: bool, tile: str) -> Image.Image:
    profile = image.info.get("icc_profile") if to_srgb else None
    kind = {"CMYK": "CMYK", "P": "RGB"}.get(image.mode) or Image.getmodebase(image.mode)
    deep, tags = image.mode[0] in "IF" or bool(re.search("[;I]16", tile)), getattr(image, "tag_v2", {})
    wrong = image.format == "PSD" and image.mode == "1"  # read as its negative
    wrong |= "transparency" in image.info and bool(re.search("[LIB];(2|4|16)", tile))  # its bits, compared with 8
    # A byte with a sign, read without; planes of 16 bits, read as 8.
    wrong |= not deep and (2 in tags.get(339, ()) or (tags.get(284) == 2 and max(tags.get(258, (8,))) > 8))
    if wrong:
        raise ValueError("stored in a way that Pillow reads wrong; convert it to gray or RGB of 8 bits")
    if image.mode == "F" or image.mode.startswith("I"):  # float, 16 and 32 bits: convert() would clip them at 255
        x, white = np.asarray(image), 1 if image.mode == "F" else 65535
        # A TIFF may have its white at 0 (262), 12 or 32 bits (258), or a sign (339): known are uint16 and float32.
        layout = tags.get(262, 1), tags.get(258, (16,)), tags.get(339, (1,))
        if (tags and layout not in ((1, (16,), (1,)), (1, (32,), (3,)))) or not (x.min() >= 0 and x.max() <= white):
            raise ValueError(f"its white is not {white} (values from {x.min()} to {x.max()}); convert it to 8 bits")
        image = Image.fromarray(np.rint(x * np.float32(255 / white)).astype(np.uint8))
    if deep and (white := max(high for _, high in image.convert("RGB").getextrema())) <= 16:
        raise ValueError(f"more than 8 bits, but nearly black (at most {white} of 255); convert it to 8 bits")
    if image.has_transparency_data:  # colors under full transparency are undefined, so they must not show
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if profile and (transform := srgb_transform(profile, kind)):
        return ImageCms.applyTransform(image if image.mode == kind else image.convert(kind), transform)
    return image.convert("RGB")


# A folder has only a few profiles, and a CMYK one takes long to prepare.
@functools.lru_cache(16)
def srgb_transform(profile: bytes, kind: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of RGB, L or CMYK to sRGB, or None for a profile that is broken or of another kind."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), kind, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None


def crop(image: Image.Image, picture: Picture, size: Size, rng: np.random.Generator | None) -> Image.Image:
    """A window of a picture, resized to `size`: at a random place, or in the middle without a generator.

    The image may be any version of the picture; equal generators choose the same window in each. Raises UnreadableError
    if the image's aspect ratio is not the one that the scan found.
    """
    # The window would squash a file that was replaced since the scan. A smaller version's rounding stays below 10 %.
    if not 0.9 < image.width * picture.height / (image.height * picture.width) < 1.1:
        raise UnreadableError(f"{picture.name}: is now {image.width} x {image.height}, of another shape.")
    scale = max(size[0] / picture.width, size[1] / picture.height)
    starts, ends = [], []
    for side, shown, pixels in zip((picture.width, picture.height), size, image.size, strict=True):
        # How far the window can move, in whole pixels of the result.
        room = int(side * scale - shown + 1e-6)
        start = int(rng.integers(room + 1)) if rng else room // 2
        starts.append(start / (side * scale) * pixels)
        ends.append(min((start + shown) / (side * scale), 1.0) * pixels)
    # Crop and resize at once: one pass, and pixels outside of the window cost nothing.
    return image.resize(size, Image.Resampling.LANCZOS, box=(*starts, *ends))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to bytes (3, H, W)."""
    # Loader workers send bytes: a quarter of the size of floats, and exact. The GPU converts them to floats.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(pictures: Tensor) -> Tensor:
    """Bytes of any shape to float32 in [-1, 1], as the official autoencoder expects them: x / 127.5 - 1."""
    return pictures.to(torch.float32, copy=True).div_(127.5).sub_(1)


# ---- pairs and batches -----------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """(control, target): a crop of each picture, degraded and clean.

    `degrade` makes a control from a target and a generator (degrade.parse). `prompt` is for pictures without a caption;
    the constructor reads all captions. Without `train`, crops are centered and nothing depends on the epoch.

    Raises:
        ValueError: no pictures, or a caption that is not UTF-8.
    """

    def __init__(
        self, pictures: Sequence[Picture], buckets: Sequence[Size],
        degrade: Callable[[Image.Image, np.random.Generator], Image.Image], seed: int, prompt: str, train: bool = True,
    ) -> None:  # fmt: skip
        if not pictures:
            raise ValueError("no usable picture; expected a folder with photographs at least as large as their bucket.")
        self.pictures, self.buckets, self.degrade = list(pictures), list(buckets), degrade
        self.seed, self.train = seed, train
        self.bucket_of = np.array([self.buckets.index(nearest_bucket(p.width, p.height, buckets)) for p in pictures])
        self.prompts = [_caption(p) or prompt for p in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The item at (epoch, index); see `item`."""
        return self.item(*place, self.buckets[self.bucket_of[place[1]]])

    def item(self, epoch: int, i: int, bucket: Size) -> dict[str, Any]:
        """Picture i in a bucket: control, target (3, H, W) as from `read`; prompt, name. Raises UnreadableError."""
        control, target = self.read(epoch, i, bucket)
        return {"control": control, "target": target, "prompt": self.prompts[i], "name": self.pictures[i].name}

    def read(self, epoch: int, i: int, bucket: Size) -> tuple[Tensor, Tensor]:
        """(control, target) of picture i in a bucket: bytes (3, H, W) each. Raises UnreadableError."""
        picture, epoch = self.pictures[i], (epoch if self.train else 0)
        rng = numpy_generator(self.seed, "crop", epoch, picture.name) if self.train else None
        target = crop(open_picture(picture.path, bucket, to_srgb=True), picture, bucket, rng)
        control = self.degrade(target, numpy_generator(self.seed, "degrade", epoch, picture.name))
        return to_tensor(control), to_tensor(target)


def _caption(picture: Picture) -> str:
    """The caption of a picture on one line, empty if there is none."""
    try:
        return " ".join(picture.caption.read_text(encoding="utf-8-sig").split()) if picture.caption else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{as_text(picture.caption)}: not UTF-8 ({error.reason}); save it as UTF-8.") from error


class BucketSampler:
    """Endless batches, each from one bucket, for DataLoader's `batch_sampler`: lists of (epoch, index).

    Every epoch has each picture at least once, in an order that depends on (seed, epoch). Every batch is full: the last
    one of a bucket is filled up with its first pictures. N processes (`world`) with batches of B see what one process
    with batches of N B sees; process `rank` takes its part. A resumed run skips `start` batches without reading them.
    """

    def __init__(
        self, bucket_of: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:  # fmt: skip
        self.bucket_of, self.seed, self.start = np.asarray(bucket_of), seed, start
        self.whole = batch_size * world
        self.mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self.batches_per_epoch = int((-(-np.bincount(self.bucket_of) // self.whole)).sum())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches from `start` on, forever."""
        epoch, skip = divmod(self.start, self.batches_per_epoch)
        while True:
            rng = numpy_generator(self.seed, "order", epoch)
            order = rng.permutation(len(self.bucket_of))
            groups = [order[self.bucket_of[order] == bucket] for bucket in np.unique(self.bucket_of)]
            # np.resize repeats a group from its beginning until all of its batches are full.
            batches = np.concatenate([np.resize(g, (-(-len(g) // self.whole), self.whole)) for g in groups])
            # Mix the buckets: otherwise an epoch would be all portraits first, then all landscapes.
            for batch in rng.permutation(batches)[skip:, self.mine]:
                yield [(epoch, index) for index in batch.tolist()]
            epoch, skip = epoch + 1, 0


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch: tensors are stacked, such as control (B, 3, H, W); anything else becomes a list of length B."""
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {key: torch.stack(x) if isinstance(x[0], Tensor) else x for key, x in columns.items()}


def load(
    pairs: torch.utils.data.Dataset, batches: Iterable[list[tuple[int, int]]], workers: int, pin_memory: bool = False,
    prepare_worker: Callable[[int], None] | None = None,
) -> torch.utils.data.DataLoader:  # fmt: skip
    """A loader of batches (see `collate`) of the pairs at these places; worker processes read and degrade them."""
    return torch.utils.data.DataLoader(
        pairs, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        # Fork, not the fork server, Python's default from 3.14 on: a signal to the process group kills that server and
        # its workers, and if the run itself is killed, both outlive it.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )  # fmt: skip
