"""Photographs to training batches: find them, give each a bucket, crop, degrade, stack.

    folder --scan--> Pictures --usable--> those that fill their bucket --Pairs--> (control, target) --collate--> a batch
                                              order: BucketSampler

* A bucket is one of the 17 shapes that Kontext was trained on. A picture goes to the bucket whose aspect ratio is the
  nearest by |log((w / h) / (w_bucket / h_bucket))|, is resized to cover it and cropped: never squashed.
* The crop, the mirroring and the degradation of a picture are functions of (seed, epoch, name) alone, the order of an
  epoch of (seed, epoch). So it is the same run with any number of worker processes, resumed, or spread over many GPUs,
  and adding a picture leaves those of the others as they were.

Sizes are (width, height) as in Pillow and in Kontext's list; tensors are (3, H, W), batches (B, 3, H, W).
Sources: the 17 shapes are PREFERRED_KONTEXT_RESOLUTIONS of black-forest-labs/flux at 802fb47, src/flux/util.py.
"""

import hashlib
import json
import math
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from kontext_min.utils import numpy_generator

Size = tuple[int, int]

# ---- buckets ---------------------------------------------------------------------------------------------------------

PREFERRED: list[Size] = [
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
]  # fmt: skip


def buckets(resolution: int = 1024, multiple: int = 16) -> list[Size]:
    """The preferred shapes at the area of another square; small ones may coincide after rounding and appear once.

    Args:
        resolution: side of the square bucket in pixels; 1024 gives the official list.
        multiple: what sides are rounded to, in pixels: twice the autoencoder's factor, as tokens are 2 x 2 latents.

    Raises:
        ValueError: a resolution below one token.
    """
    if resolution < multiple:
        raise ValueError(f"resolution: got {resolution}, expected at least {multiple} pixels, one token of this model.")
    tokens = resolution / 1024 / multiple
    return list(dict.fromkeys((max(1, round(w * tokens)) * multiple, max(1, round(h * tokens)) * multiple)
                              for w, h in PREFERRED))  # fmt: skip


def nearest_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket of the nearest shape, by the ratio of the aspect ratios; of equally near ones the narrower.

    The official rule compares |w/h - w/h|, for which 2:1 is four times as far from square as 1:2; with logarithms a
    picture and its transpose get transposed buckets, and as little as possible is cropped.
    """

    def key(bucket: Size) -> tuple[float, int]:
        a, b = width * bucket[1], height * bucket[0]
        return max(a, b) / min(a, b), bucket[0]  # max(r, 1 / r) grows with |log r|, and ties stay exact

    return min(buckets, key=key)


# ---- finding pictures ------------------------------------------------------------------------------------------------

Image.init()
# What Pillow recognises but cannot decode by itself; EPS would run ghostscript on a file that came from anywhere.
FORMATS = sorted(set(Image.OPEN) - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # a whole file has it in its last bytes
TAIL = 4096
SMALLEST = 16  # pixels a side
THREADS = 8  # that read headers: on a network disk this is mostly waiting


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that can be trained on, as far as its header tells."""

    path: Path
    name: str  # path below the root, with "/" on every system
    width: int  # as seen: after EXIF orientation
    height: int
    mark: str  # changes with the content: a hash of file size, time of change and last bytes
    caption: Path | None = None  # the .txt beside it


def scan(root: Path, index: Path | None = None) -> tuple[list[Picture], list[tuple[str, str]]]:
    """All pictures below a folder, whatever their format and the case of their endings; headers only are read.

    Hidden files and folders and files with other endings are passed over. A file that looks cut off is decoded as a
    whole, so that the broken ones are named now and not at night.

    Args:
        root: the folder.
        index: where to remember headers, as JSON keyed by root, name, size and time of change.

    Returns:
        The pictures, sorted by name, and (name, reason) of every picture file that cannot be used.

    Raises:
        FileNotFoundError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a folder of pictures.")
    files, captions, rejected = _walk(root)
    remembered = _read_index(index) if index else {}
    known = remembered.get(str(root.resolve()), {})
    headers = {name: known[name] for name, (_, *state) in files.items() if name in known and known[name][:2] == state}
    new = [name for name in files if name not in headers]

    def read(names: list[str]) -> dict[str, tuple[Any, ...] | str]:
        return {name: _read_header(files[name][0]) for name in names}

    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(read, [new[i::THREADS] for i in range(THREADS)]):
            for name, header in part.items():
                if isinstance(header, str):  # is not remembered: the next start may have a better disk or Pillow
                    rejected.append((name, header))
                else:
                    headers[name] = [*files[name][1:], *header]
    if index and headers != known:
        index.parent.mkdir(parents=True, exist_ok=True)
        aside = index.with_name(f"{index.name}.{platform.node()}.{os.getpid()}.tmp")
        aside.write_text(json.dumps({**remembered, str(root.resolve()): headers}), encoding="utf-8")
        aside.replace(index)

    pictures = []
    for name, (_, _, width, height, mark) in sorted(headers.items()):
        if min(width, height) < SMALLEST:
            rejected.append((name, f"{width} x {height} pixels, less than {SMALLEST} a side"))
            continue
        path = files[name][0]
        pictures.append(Picture(path, name, width, height, mark, captions.get(name.rpartition(".")[0])))
    return pictures, sorted(rejected)


def _walk(root: Path) -> tuple[dict[str, tuple[Path, int, int]], dict[str, Path], list[tuple[str, str]]]:
    """{name: (path, size, time of change)} of pictures, {name without ending: path} of .txt files, what is refused."""
    files: dict[str, tuple[Path, int, int]] = {}
    captions: dict[str, Path] = {}
    refused: list[tuple[str, str]] = []
    folders, seen = [(str(root), "")], set()
    while folders:
        folder, prefix = folders.pop()
        try:
            inode = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            refused.append((prefix, _reason(error)))
            continue
        if (inode.st_dev, inode.st_ino) in seen:  # a link back to a folder above
            continue
        seen.add((inode.st_dev, inode.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + _text(entry.name)
            stem, dot, ending = name.rpartition(".")
            if entry.is_dir():
                folders.append((entry.path, name + "/"))
            elif ending.lower() == "txt":
                captions[stem] = Path(entry.path)
            elif dot + ending.lower() in ENDINGS:
                try:
                    inode = entry.stat()
                    if not stat.S_ISREG(inode.st_mode):  # a pipe would block for ever
                        raise OSError("not a file")
                    files[name] = Path(entry.path), inode.st_size, inode.st_mtime_ns
                except OSError as error:  # such as a link that leads nowhere
                    refused.append((name, _reason(error)))
    return files, captions, refused


def _read_index(index: Path) -> dict[str, Any]:
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
        whole = all(len(header) == 5 for headers in known.values() for header in headers.values())
    except (OSError, ValueError, AttributeError, TypeError):  # absent or broken: headers are read again
        return {}
    return known if whole else {}


def _read_header(path: Path) -> tuple[int, int, str] | str:
    """(width, height, mark), or in words why the file cannot be used."""
    try:
        with open(path, "rb") as file:
            inode = os.fstat(file.fileno())
            file.seek(max(0, inode.st_size - TAIL))
            tail = file.read()
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if _orientation(image) >= 5:
                    width, height = height, width
                if END_MARKS.get(image.format or "", b"") not in tail:
                    image.load()
        mark = hashlib.sha256(f"{inode.st_size} {inode.st_mtime_ns} ".encode() + tail).hexdigest()[:16]
        return width, height, mark
    except Exception as error:  # on broken files Pillow's parsers raise anything from OSError to KeyError
        return _reason(error)


def _reason(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture that Pillow can read"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(_text(text).split()) or type(error).__name__


def _text(name: str | Path) -> str:
    """A file name that can be printed: bytes that are no UTF-8 are spelt out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def usable(
    pictures: Sequence[Picture], buckets: Sequence[Size], upscale: bool
) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Those that cover their bucket without being blown up (all if `upscale`), and (name, reason) of the others.

    A model that trains on blown-up targets learns to leave pictures soft.
    """
    kept, small = [], []
    for p in pictures:
        w, h = nearest_bucket(p.width, p.height, buckets)
        if upscale or (p.width >= w and p.height >= h):
            kept.append(p)
        else:
            small.append((p.name, f"{p.width} x {p.height}, smaller than its bucket {w} x {h} (--upscale takes it)"))
    return kept, small


def describe(pictures: Sequence[Picture], rejected: Sequence[tuple[str, str]], buckets: Sequence[Size]) -> str:
    """How many pictures each bucket has, and the first ten that are left out, in lines to print."""
    counts = dict.fromkeys(buckets, 0)
    for p in pictures:
        counts[nearest_bucket(p.width, p.height, buckets)] += 1
    used = {bucket: count for bucket, count in counts.items() if count}
    lines = [f"{len(pictures)} pictures in {len(used)} of {len(buckets)} buckets"]
    lines += [f"  {w:5d} x {h:<5d} {count:8d}" for (w, h), count in used.items()]
    if rejected:
        lines.append(f"{len(rejected)} files left out")
        lines += [f"  {name}: {reason}" for name, reason in rejected[:10]]
        lines += [f"  ... and {len(rejected) - 10} more"] * (len(rejected) > 10)
    return "\n".join(lines)


def list_hash(pictures: Sequence[Picture]) -> str:
    """16 hex digits that name a list of pictures by their names and sizes: on these the order of an epoch depends."""
    return hashlib.sha256(json.dumps([(p.name, p.width, p.height) for p in pictures]).encode()).hexdigest()[:16]


def name_hash(picture: Picture) -> bytes:
    """A stable order that has nothing to do with names: for choosing some pictures."""
    return hashlib.sha256(picture.name.encode()).digest()


# ---- one picture -----------------------------------------------------------------------------------------------------

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size (from the low frequencies of each 8 x 8 block) if that leaves this
# many times the size needed, so that Lanczos still decides what stays. After it, photographs of 3 to 20 megapixels
# differ from the full decode by 51 dB in the median, half a level; at 1.0 times by 45 dB, and they are 5 percent softer
# (tests/data_bench.py draft).
DRAFT_MARGIN = 1.7


class UnreadableError(ValueError):
    """A file that cannot be read, in one line that names it."""


def open_picture(path: Path, minimum: Size | None = None) -> Image.Image:
    """A picture as RGB bytes, upright.

    EXIF orientation is applied; alpha is laid on white, as paper and browsers show it (the colours under full
    transparency are undefined); 16-bit grey is scaled, not clipped; of an animation this is the first frame. ICC
    profiles are ignored, as they are by the official code.

    Args:
        path: the file.
        minimum: (width, height) that the caller will cover; a much larger JPEG is then decoded at reduced size.

    Raises:
        UnreadableError: a ValueError that names the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation = _orientation(image)
            if minimum:
                w, h = minimum if orientation < 5 else minimum[::-1]
                image.draft(None, (math.ceil(w * DRAFT_MARGIN), math.ceil(h * DRAFT_MARGIN)))  # of a JPEG
            image.load()
            rgb = _to_rgb(image)
    except Exception as error:  # see _read_header
        raise UnreadableError(f"{_text(path)}: {_reason(error)}") from error
    return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation from the header, 1 to 8."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    try:
        # Not image.getexif(): that of a PNG would decode the picture to look for EXIF behind it.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF in a picture that is fine
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # float, 16 and 32 bits; convert() would clip at 255
        x = np.asarray(image)
        white = 1 if image.mode == "F" else 65535
        if not (x.min() >= 0 and x.max() <= white):
            raise ValueError(f"values from {x.min()} to {x.max()}, expected 0 to {white}")
        image = Image.fromarray(np.rint(x * np.float32(255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies even if there is nothing to do


def _window(width: int, height: int, size: Size, rng: np.random.Generator | None) -> tuple[float, float, float, float]:
    """What a crop shows, (left, top, right, bottom) as fractions of the picture; places are whole target pixels."""
    scale = max(size[0] / width, size[1] / height)
    edges = []
    for side, shown in ((width * scale, size[0]), (height * scale, size[1])):
        room = int(side - shown + 1e-6)
        start = int(rng.integers(room + 1)) if rng else room // 2
        edges.append((start / side, min((start + shown) / side, 1.0)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def _cut(image: Image.Image, window: tuple[float, float, float, float], size: Size, mirror: bool) -> Image.Image:
    """Crop and resize at once: what lies outside is not computed, and a 30000 x 20 strip does not become gigabytes."""
    w, h = image.size
    left, top, right, bottom = window
    image = image.resize(size, Image.Resampling.LANCZOS, box=(left * w, top * h, right * w, bottom * h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to bytes (3, H, W). Workers hand over bytes, a quarter of the floats; see to_float."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(pictures: Tensor) -> Tensor:
    """Bytes of any shape to float32 in [-1, 1], as the official autoencoder wants them: x / 127.5 - 1."""
    return pictures.to(torch.float32, copy=True).div_(127.5).sub_(1)


# ---- pairs -----------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """One item that a BucketSampler asks for."""

    epoch: int
    index: int  # of the picture
    weight: float = 1.0  # 0 if it only fills up the batches of all processes
    position: int = 0  # place in the global batch
    total: int = 1  # items of weight 1 in the global batch


class Pairs(torch.utils.data.Dataset):
    """(control, target): a crop of each picture, degraded and clean.

    A picture that can no longer be read does not end the run: another one of the same bucket stands in. Which one is
    a function of (seed, epoch, name), so that a repeated or resumed run is the same as long as the files are. The item
    says so in `unreadable`.

    Args:
        pictures: from `usable`.
        buckets: from `buckets`.
        degrade: target, generator -> control (degrade.parse); not used with `lr_root`.
        seed: of crop, mirroring and degradation.
        prompt: for pictures without a caption. Captions are read now, once.
        lr_root: folder of controls under the same names (another ending will do), of any size but the same shape.
        flip: mirror half of the pictures.
        variants: if not 0, epochs repeat after so many: what epoch e shows is what epoch e % variants showed.
        train: else the crop is centred and nothing depends on the epoch.
        lr_index: index of headers below `lr_root`, as in `scan`.

    Raises:
        ValueError: no pictures, or controls that are missing or have another shape; all counted, ten named.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        buckets: Sequence[Size],
        degrade: Callable[[Image.Image, np.random.Generator], Image.Image] | None,
        seed: int,
        prompt: str,
        lr_root: Path | None = None,
        flip: bool = False,
        variants: int = 0,
        train: bool = True,
        lr_index: Path | None = None,
    ) -> None:
        if not pictures:
            raise ValueError("no usable picture is left; expected a folder of photographs that cover their buckets "
                             "(lower --resolution, or --upscale).")  # fmt: skip
        self.pictures, self.buckets, self.degrade = list(pictures), list(buckets), degrade
        self.seed, self.flip, self.variants, self.train = seed, flip, variants, train
        numbers = {bucket: k for k, bucket in enumerate(self.buckets)}
        self.bucket_of = np.array([numbers[nearest_bucket(p.width, p.height, buckets)] for p in self.pictures])
        self.prompts = [_caption(p, prompt) for p in self.pictures]
        self.controls = match_controls(self.pictures, lr_root, lr_index) if lr_root else None

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.pictures)

    def __getitem__(self, draw: Draw | tuple[int, int]) -> dict[str, Any]:
        """What a Draw, or (epoch, index), asks for: see `item`. control and target are bytes (3, H, W)."""
        return self.item(draw, self.read)

    def read(self, epoch: int, i: int, bucket: Size) -> tuple[Tensor, Tensor]:
        """control, target: bytes (3, H, W) each. Raises UnreadableError."""
        picture = self.pictures[i]
        rng = numpy_generator(self.seed, "crop", epoch, picture.name) if self.train else None
        window = _window(picture.width, picture.height, bucket, rng)
        mirror = self.flip and rng is not None and rng.random() < 0.5
        # Reduced decoding rounds the size up, which would shift a picture against its partner by part of a pixel.
        minimum = None if self.controls else bucket
        target = _cut(open_picture(picture.path, minimum), window, bucket, mirror)
        if self.controls:
            control = _cut(open_picture(self.controls[i].path), window, bucket, mirror)
        else:
            control = self.degrade(target, numpy_generator(self.seed, "degrade", epoch, picture.name))
        return to_tensor(control), to_tensor(target)

    def item(
        self, draw: Draw | tuple[int, int], read: Callable[[int, int, Size], tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """The item of a draw: control, target, prompt, name, weight, position, total, unreadable.

        Control and target are what `read` gives: (3, H, W) bytes, or latents (C, h, w) from the cache.

        Raises:
            OSError: neither the picture nor any stand-in can be read.
        """
        draw = Draw(*draw)
        epoch, bucket = self.epoch(draw.epoch), self.buckets[self.bucket_of[draw.index]]
        unreadable = []
        for i in self._stand_ins(epoch, draw.index):
            try:
                control, target = read(epoch, i, bucket)
                break
            except UnreadableError as error:
                unreadable.append(str(error))
        else:
            raise OSError(f"{len(unreadable)} pictures in a row cannot be read; is the disk there? {unreadable[-1]}")
        return {
            "control": control, "target": target, "prompt": self.prompts[i], "name": self.pictures[i].name,
            "weight": draw.weight, "position": draw.position, "total": draw.total, "unreadable": unreadable,
        }  # fmt: skip

    def epoch(self, epoch: int) -> int:
        """The epoch whose random numbers are used."""
        if not self.train:
            return 0
        return epoch % self.variants if self.variants else epoch

    def _stand_ins(self, epoch: int, i: int) -> Iterator[int]:
        """The picture, then in its place seven of its bucket, then seven of any, which may have to be blown up."""
        yield i
        rng = numpy_generator(self.seed, "stand-in", epoch, self.pictures[i].name)
        for others in (np.flatnonzero(self.bucket_of == self.bucket_of[i]), np.arange(len(self.pictures))):
            yield from rng.permutation(others[others != i])[:7].tolist()


def match_controls(pictures: Sequence[Picture], root: Path, index: Path | None = None) -> list[Picture]:
    """The partner of each picture: of the same name below `root`, or of the same name up to its ending.

    Raises:
        ValueError: some are missing, unreadable, or differ in shape by more than a pixel of theirs.
    """
    found, rejected = scan(root, index)
    named = {p.name: p for p in found}
    stems: dict[str, list[Picture]] = {}
    for p in found:
        stems.setdefault(p.name.rpartition(".")[0], []).append(p)
    reasons = dict(rejected)
    partners, problems = [], []
    for p in pictures:
        others = [named[p.name]] if p.name in named else stems.get(p.name.rpartition(".")[0], [])
        if len(others) != 1:
            problems.append(f"{p.name} ({reasons.get(p.name, 'missing' if not others else 'several')})")
        elif abs(others[0].width - others[0].height * p.width / p.height) > max(1.0, p.width / p.height):
            problems.append(f"{p.name} ({others[0].width} x {others[0].height} for {p.width} x {p.height})")
        else:
            partners.append(others[0])
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{root}: {len(problems)} of {len(pictures)} pictures have no partner of the same name and shape: "
            f"{', '.join(problems[:10])}{more}."
        )
    return partners


def _caption(picture: Picture, prompt: str) -> str:
    """The text beside a picture on one line, or the prompt if there is none."""
    if not picture.caption:
        return prompt
    try:
        return " ".join(picture.caption.read_text(encoding="utf-8-sig").split()) or prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{_text(picture.caption)}: not UTF-8 ({error.reason}); expected a caption.") from error


def load(
    pairs: torch.utils.data.Dataset,
    batches: Iterable[list[Draw]],
    workers: int,
    pin_memory: bool = False,
    prepare_worker: Callable[[int], None] | None = None,
) -> torch.utils.data.DataLoader:
    """Batches (see `collate`) of what is asked for, loaded and degraded by so many processes.

    The processes are forked, where the system can: a fork server, the default from Python 3.14 on, dies of a signal to
    the group, and its workers with it; where the run itself is killed, both live on.
    """
    return torch.utils.data.DataLoader(
        pairs, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )  # fmt: skip


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch: control, target (B, 3, H, W); weight (B,) float32, position (B,) int64; lists of the strings.

    `total` is one int, the items of weight 1 in the batches of all processes; `unreadable` one list of lines to print.
    """
    return {
        "control": torch.stack([item["control"] for item in items]),
        "target": torch.stack([item["target"] for item in items]),
        "prompt": [item["prompt"] for item in items],
        "name": [item["name"] for item in items],
        "weight": torch.tensor([item["weight"] for item in items], dtype=torch.float32),
        "position": torch.tensor([item["position"] for item in items], dtype=torch.int64),
        "total": items[0]["total"],
        "unreadable": [line for item in items for line in item["unreadable"]],
    }


# ---- order -----------------------------------------------------------------------------------------------------------


class BucketSampler:
    """An endless stream of batches of one shape, for DataLoader's `batch_sampler`: lists of Draw.

    Every epoch has each picture once, in an order that is a function of (seed, epoch). A global batch, what all
    processes take together, comes from one bucket; process r gets its r-th part, so that N processes with batches of
    B see what one process with batches of N B sees. The last batch of a bucket may be incomplete. If its items do not
    divide over the processes, some are repeated with weight 0: every process has as many batches and as many items
    in each as the others, and at least one. Memory: three arrays of one number a picture.

    Args:
        bucket_of: the bucket's number of each picture.
        batch_size: items for one process.
        seed: of the order.
        rank: this process.
        world: number of processes.
        drop_last: leave out incomplete global batches.
        start: batches to skip, for resuming; nothing is read for them.

    Raises:
        ValueError: there is no batch at all.
    """

    def __init__(
        self,
        bucket_of: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        start: int = 0,
    ) -> None:
        self.bucket_of = np.asarray(bucket_of)
        self.seed, self.rank, self.world, self.drop_last, self.start = seed, rank, world, drop_last, start
        self.group = batch_size * world
        self.sizes = np.bincount(self.bucket_of)
        self.batches_per_epoch = int((self.sizes // self.group if drop_last else -(-self.sizes // self.group)).sum())
        if not self.batches_per_epoch:
            raise ValueError(
                f"no batch: no bucket has the {self.group} pictures of one batch of all processes; "
                "lower --batch-size or keep incomplete batches."
            )

    def __iter__(self) -> Iterator[list[Draw]]:
        """Batches from `start` on, for ever."""
        epoch, skip = divmod(self.start, self.batches_per_epoch)
        while True:
            order, starts, stops = self._epoch(epoch)
            for k in range(skip, len(starts)):
                yield self._share(epoch, order[starts[k] : stops[k]].tolist())
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures in order, grouped by bucket, and where each global batch starts and stops among them."""
        rng = numpy_generator(self.seed, "order", epoch)
        order = rng.permutation(len(self.bucket_of))
        order = order[np.argsort(self.bucket_of[order], kind="stable")]
        ends = np.cumsum(self.sizes)
        spare = self.group - 1 if self.drop_last else 0
        starts = np.concatenate(
            [np.arange(end - n, end - spare, self.group) for n, end in zip(self.sizes, ends, strict=True)]
        )
        rng.shuffle(starts)
        stops = np.minimum(starts + self.group, ends[np.searchsorted(ends, starts, side="right")])
        return order, starts, stops

    def _share(self, epoch: int, indices: list[int]) -> list[Draw]:
        """This process's part of a global batch."""
        total = len(indices)
        each = -(-total // self.world)
        places = range(self.rank * each, (self.rank + 1) * each)
        return [Draw(epoch, indices[k % total], float(k < total), k, total) for k in places]
