"""Train on your own pairs: the degraded partner of each picture comes from a folder, not from a degradation.

A partner has the name of its picture (the extension may differ) and its aspect ratio, at any size. Both get one crop.
Source: none, it is file handling.
"""

import difflib
import filecmp
import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from torch import Tensor

from kontext_min.data import THREADS, Pairs, Picture, Size, UnreadableError, crop, open_picture, to_tensor
from kontext_min.extras.alike import are_turned, looks
from kontext_min.extras.inventory import parts_not_read, results, scan_whole, unread, unused
from kontext_min.extras.report import evenly
from kontext_min.utils import numpy_generator

SHOWN = 10  # problems
TRIED, FEW = 32, 8  # pairs with an orientation that are looked at, and pairs whose pixels are compared


class PairedFolders(Pairs):
    """Pairs whose control is the partner of the picture.

    Args:
        pairs: the clean pictures.
        root: folder of their partners.

    Raises:
        ValueError: partners are missing, have another shape, or all are the clean pictures.
    """

    def __init__(self, pairs: Pairs, root: Path) -> None:
        vars(self).update(vars(pairs))  # the same pictures, buckets, prompts, seed
        self.partners = match(pairs.pictures, root)
        both = [*zip(self.partners, self.pictures, strict=True)]
        copies = sum(filecmp.cmp(a.path, b.path, shallow=False) for a, b in both)
        if copies == len(both) and self.train:
            raise ValueError(f"{root}: holds copies of the clean pictures, so the LoRA would learn to change nothing.")
        few = evenly(both, FEW)
        if self.train and all(_show_the_same(*pair) for pair in few):  # the first that differs ends the comparison
            text = f"all {len(few)} that were looked at have the pixels of the clean pictures"
            print(f"note: {root}: {text}; the LoRA learns to change nothing")
        if copies:
            use = "train" if self.train else "validate"
            print(f"note: {root}: {copies} of {len(self.pictures)} to {use} on are copies of the clean pictures")

    def read(self, epoch: int, i: int, bucket: Size) -> tuple[Tensor, Tensor]:
        """(control, target) of picture i in a bucket: bytes (3, H, W) each. Raises UnreadableError."""
        shown = []
        for file in (self.partners[i], self.pictures[i]):
            # Decoding at reduced size rounds, which would shift a picture against its partner by part of a pixel.
            image = open_picture(file.path, to_srgb=True)
            # The same numbers for both, so that they show the same window.
            rng = numpy_generator(self.seed, "crop", epoch, self.pictures[i].name) if self.train else None
            shown.append(to_tensor(crop(image, self.pictures[i], bucket, rng)))
        control, target = shown
        return control, target


def _show_the_same(a: Picture, b: Picture) -> bool:
    """Whether two files have the same pixels, such as a picture that was saved again."""
    try:
        shown = (a.width, a.height) == (b.width, b.height) and [open_picture(p.path, to_srgb=True) for p in (a, b)]
        return bool(shown) and shown[0].tobytes() == shown[1].tobytes()
    except UnreadableError:  # training names it
        return False


def pair_up(pairs: Pairs, held: Pairs | None, root: Path) -> tuple[PairedFolders, PairedFolders | None, list[str]]:
    """The pairs to train on and to validate on with their partners below `root`, and lines to print.

    Raises:
        ValueError: as for PairedFolders; or two pictures, one of each, have the same partner.
    """
    pairs, held = PairedFolders(pairs, root), held and PairedFolders(held, root)
    owners = {partner.name: p.path for partner, p in zip(pairs.partners, pairs.pictures, strict=True)}
    for partner, p in zip(held.partners, held.pictures, strict=True) if held else ():
        if partner.name in owners and not filecmp.cmp(p.path, owners[partner.name], shallow=False):
            raise ValueError(f"{root / partner.name}: goes with {p.path} and {owners[partner.name]}; rename one.")
        owners[partner.name] = p.path
    both = [*zip(pairs.partners, pairs.pictures, strict=True)]
    both += [*zip(held.partners, held.pictures, strict=True)] if held else []
    with ThreadPoolExecutor(THREADS) as pool:  # programs that write the degraded ones may drop the EXIF and the profile
        headers = [[*pool.map(looks, (file.path for file in files))] for files in zip(*both, strict=True)]
    of_pairs = [*zip(both, *headers, strict=True)]
    profiles = sum(degraded[0] != clean[0] for _, degraded, clean in of_pairs)
    turns = [pair for pair, degraded, clean in of_pairs if {degraded[1], clean[1]} != {1}]
    tried = evenly(turns, TRIED)
    with ThreadPoolExecutor(THREADS) as pool:
        are = pool.map(lambda pair: are_turned(pair[0].path, pair[1].path), tried)
        turned = [degraded.name for (degraded, _), is_turned in zip(tried, are, strict=True) if is_turned]
    if turned:
        raise ValueError(
            f"{root}: {len(turned)} of {len(tried)} pairs whose EXIF tells an orientation are turned against each "
            f"other, such as {turned[0]}; write both pictures with one orientation."
        )
    partners = [*pairs.partners, *(held.partners if held else ())]
    lines = parts_not_read(root, partners)
    if made := results(root, partners):
        text = (
            f"{len(made)} of {len(partners)} are results of this program, such as {made[0].relative_to(root.resolve())}"
        )
        lines.append(f"note: {root}: {text}; the LoRA learns to repair what is left in them")
    lines += unused(root, owners, "usable clean picture")
    if profiles:
        lines.append(
            f"note: {root}: {profiles} of {len(both)} lack the color profile of their clean pictures, or have one "
            "that these lack; where both have the same values, the LoRA learns a shift of color"
        )
    shown = [(p, of.buckets[k]) for of in (pairs, held) if of for p, k in zip(of.partners, of.bucket_of, strict=True)]
    if smaller := sum(p.width < 0.95 * bucket[0] for p, bucket in shown):
        lines.append(
            f"note: {root}: {smaller} of {len(shown)} are smaller than their bucket, and are enlarged to train; "
            "enlarge what you restore as well"
        )
    shrink = median((p.width * p.height / math.prod(bucket)) ** 0.5 for p, bucket in shown)
    if shrink > 1.5:
        lines.append(
            f"note: {root}: shrunk {shrink:.1f} times to train, and their damage with them; train with a larger "
            "--resolution, or restore with the --resolution of the run"
        )
    return pairs, held, lines


def _stem(name: str) -> str:
    """A name without its ending, its letters composed: a Mac writes an umlaut as two."""
    return unicodedata.normalize("NFC", name.rpartition(".")[0])


def _guess(stem: str, stems: Iterable[str]) -> str:
    """Which of some names is perhaps meant, or nothing: in another folder or case, longer, or much like it."""
    longer = (other for other in stems if other.startswith(stem) or other.casefold().endswith(stem.casefold()))
    return next(longer, "") or "".join(difflib.get_close_matches(stem, stems, 1))


def match(pictures: Sequence[Picture], root: Path) -> list[Picture]:
    """The partner of each picture: the same name below `root`, or else the same name up to its ending.

    Raises:
        ValueError: some are missing, unreadable, shared, the picture itself, or differ in shape by over one pixel.
    """
    found, rejected = scan_whole(root)
    reasons = {_stem(name): reason for name, reason in rejected + unread(root, [])}
    stems: dict[str, list[Picture]] = {}
    for p in found:
        stems.setdefault(_stem(p.name), []).append(p)
    partners, problems, owners = [], [], {}
    for p in pictures:
        stem = _stem(p.name)
        others = stems.get(stem, [])
        others = [other for other in others if other.name == p.name] or others
        if len(others) != 1:
            guess = "" if others or len(problems) >= SHOWN else _guess(stem, stems)  # a guess for each would take hours
            missing = f"missing; is it {stems[guess][0].name!r}?" if guess else "missing"
            problems.append(f"{p.name} ({reasons.get(stem, 'several' if others else missing)})")
            continue
        partner = others[0]
        partners.append(partner)
        if (owner := owners.setdefault(partner.name, p.name)) != p.name:
            problems.append(f"{p.name} (shares {partner.name} with {owner})")
        elif os.path.realpath(partner.path) == os.path.realpath(p.path):
            problems.append(f"{p.name} (the clean picture itself)")
        elif abs(partner.width - partner.height * p.width / p.height) > max(1.0, p.width / p.height):
            problems.append(f"{p.name} ({partner.width} x {partner.height} for {p.width} x {p.height})")
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{root}: {len(problems)} of {len(pictures)} pictures have no degraded partner of the same name and shape: "
            f"{', '.join(problems[:SHOWN])}{more}."
        )
    return partners
