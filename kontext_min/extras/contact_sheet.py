"""Every preset of degrade.py on your photographs: python -m kontext_min.extras.contact_sheet PHOTO... SHEET.jpg

The sheet shows the first photograph, clean and with each preset: the whole picture, and below it a crop of the middle
at full size. The command also prints a table with the PSNR of every preset on every photograph, in dB. Photographs of
more than 1 megapixel are shrunk to that first, and all are brought to sRGB, as in training. What is drawn at random
depends on a photograph's place in the list.
"""

import sys
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kontext_min.data import FORMATS, open_picture
from kontext_min.degrade import PRESETS, parse
from kontext_min.extras.inventory import ZEROS, is_one_color, is_result, marked, printable, zeros_at_end
from kontext_min.extras.metrics import psnr
from kontext_min.extras.not_read import ends, not_shown
from kontext_min.extras.pictures import KINDS, working_size
from kontext_min.extras.saving import write_picture

SIDE = 1024  # in pixels, of a square of the largest area


def contact_sheet(pictures: dict[str, Image.Image]) -> Image.Image:
    """A sheet of named pictures of one size, four in a row."""
    first, w, font = next(iter(pictures.values())), 320, ImageFont.load_default(15)
    h = min(160, first.height)
    whole, x, y = round(w * first.height / first.width), max(0, first.width - w) // 2, (first.height - h) // 2
    tile = 24 + whole + h
    sheet = Image.new("RGB", (4 * w, tile * ceil(len(pictures) / 4)), "white")
    for i, (name, picture) in enumerate(pictures.items()):
        left, top = i % 4 * w, i // 4 * tile
        ImageDraw.Draw(sheet).text((left + 4, top + 3), name, fill="black", font=font)
        sheet.paste(picture.resize((w, whole), Image.LANCZOS), (left, top + 24))
        sheet.paste(picture.crop((x, y, min(x + w, picture.width), y + h)), (left, top + 24 + whole))
    return sheet


def main(arguments: Sequence[str]) -> int:
    """Print the table, and write the sheet of the first photograph: PHOTO... SHEET. Returns the exit code.

    Raises:
        ValueError: a photograph can't be read, or the sheet not be written.
    """
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    if len(arguments) < 2:
        raise ValueError("usage: python -m kontext_min.extras.contact_sheet PHOTO... SHEET.jpg.")
    *photos, sheet = (Path(name) for name in arguments)
    _check_new(sheet)
    if not sheet.parent.is_dir():
        raise ValueError(f"{sheet}: no such folder; make it first.")
    if sheet.suffix.lower() not in KINDS:
        raise ValueError(f"{sheet}: unknown picture format; name the sheet .jpg or .png.")
    print(f"{'PSNR, dB':20}" + "".join(f"{name:>18}" for name in PRESETS), flush=True)
    table, first = [], {}
    for seed, path in enumerate(photos):
        photo = open_picture(path, to_srgb=True)
        if zeros_at_end(path):
            raise ValueError(f"{path}: {ZEROS}.")
        if is_result(path):
            print(f"note: {path}: is a result of this program, not clean", file=sys.stderr)
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            for what in not_shown(image, ends(file), decode=True):
                print(f"note: {path}: {what}", file=sys.stderr)
        if is_one_color(photo):
            print(f"note: {path}: nearly one color; look at the file", file=sys.stderr)
        if max(photo.size) > 20 * min(photo.size):
            raise ValueError(f"{path}: {photo.width} x {photo.height} pixels, too long for a sheet; leave it out.")
        if photo.width * photo.height > SIDE**2:  # as in training
            photo = photo.resize(working_size(*photo.size, SIDE), Image.Resampling.LANCZOS)
        pictures = {name: parse(name)(photo, np.random.default_rng(seed)) for name in PRESETS}
        table.append([psnr(picture, photo) for picture in pictures.values()])
        print(_row(printable(path.name), table[-1]), flush=True)
        first = first or {"clean": photo, **pictures}
    print(_row("mean", np.mean(table, axis=0)))
    _check_new(sheet)  # a file may have come since
    write_picture(contact_sheet(first), sheet, KINDS[sheet.suffix.lower()], quality=85, exif=marked(Image.Exif()))
    print(f"{sheet}: what they do to {photos[0]}")
    return 0


def _check_new(sheet: Path) -> None:
    if sheet.exists():  # perhaps a photograph, if you forgot to name the sheet
        raise ValueError(f"{sheet}: exists; name a new file for the sheet, behind the photographs.")


def _row(name: str, values: Iterable[float]) -> str:
    """A row of the table."""
    return f"{name:20}" + "".join(f"{value:18.2f}" for value in values)


if __name__ == "__main__":
    from kontext_min.extras import program

    sys.exit(program.run("contact_sheet", main, sys.argv[1:]))
