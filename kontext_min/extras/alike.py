"""Whether two files of one scene lie and are colored alike: a degraded picture and its clean one.

Programs that write the degraded one may drop the EXIF orientation and the color profile of the clean one. Then the two
hold the same values, and are seen in other colors, or one of them upside down. Source: none, it is file handling.
"""

from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from kontext_min.data import FORMATS, TURNS, UnreadableError, open_picture, srgb_transform
from kontext_min.extras.not_read import kind_of

SEEN = 32  # pixels a side, to see which way up a picture is


@lru_cache(16)
def _shifts_colors(profile: bytes, kind: str) -> bool:
    """Whether a color profile of RGB or of gray (L) says other colors than sRGB does."""
    transform = srgb_transform(profile, kind) if kind in ("RGB", "L") else None
    if not transform:
        return False
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    chart = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    values = Image.fromarray(chart if kind == "RGB" else steps[None])
    shown = np.subtract(ImageCms.applyTransform(values, transform), values.convert("RGB"), dtype=float)
    return bool(np.abs(shown).max() > 8)  # LittleCMS rounds by a few


def looks(path: Path) -> tuple[bool, int]:
    """Whether a file has a profile of other colors, and its EXIF orientation."""
    with suppress(Exception), Image.open(path, formats=FORMATS) as image:  # as in data.open_picture
        profile = image.info.get("icc_profile") or b""
        return _shifts_colors(profile, kind_of(image)), Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return False, 1  # whoever reads it says why it can't be


def are_turned(degraded: Path, clean: Path) -> bool:
    """Whether a degraded picture fits its clean one best in another orientation than the one that EXIF tells."""
    seen = []
    for path in (degraded, clean):
        try:
            x = np.asarray(open_picture(path, (SEEN, SEEN)).convert("L").resize((SEEN, SEEN)), dtype=np.float32)
        except UnreadableError:
            return False
        seen.append((x - x.mean()) / (x.std() + 1))  # a dark picture fits a light one, and a negative its positive
    upright = Image.fromarray(seen[1])
    ways = [upright, *map(upright.transpose, TURNS.values())]
    apart = [min(np.abs(seen[0] - sign * np.asarray(way)).mean() for sign in (1, -1)) for way in ways]
    return bool(min(apart) < apart[0] / 2)


def differences(degraded: Path, clean: Path) -> list[str]:
    """In words, what a score of the two would count besides the damage."""
    (profile, way), (other_profile, other_way) = looks(degraded), looks(clean)
    found = []
    if profile != other_profile:
        found.append(
            "only one of the two has a color profile other than sRGB; equal values then score as a shift of color"
        )
    if {way, other_way} != {1} and are_turned(degraded, clean):
        found.append("its pixels are turned against the input; write both with one EXIF orientation")
    return found
