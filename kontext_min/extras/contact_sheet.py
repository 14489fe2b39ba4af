"""Every preset of degrade.py on your photographs: python -m kontext_min.extras.contact_sheet PHOTO... SHEET.jpg

The sheet shows the first photograph, clean and with each preset: the whole picture, and below it a crop of the middle
at full size. The command also prints a table with the PSNR of every preset on every photograph, in dB:

    PSNR = -10 log10 mean (degraded - clean)^2,      pictures in [0, 1]
"""

import sys
from math import ceil, log10
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from kontext_min.degrade import PRESETS, parse, to_array


def contact_sheet(pictures: dict[str, Image.Image]) -> Image.Image:
    """A sheet of named pictures of one size, four in a row."""
    first, w, h, font = next(iter(pictures.values())), 320, 160, ImageFont.load_default(15)
    whole, x, y = round(w * first.height / first.width), (first.width - w) // 2, (first.height - h) // 2
    tile = 24 + whole + h
    sheet = Image.new("RGB", (4 * w, tile * ceil(len(pictures) / 4)), "white")
    for i, (name, picture) in enumerate(pictures.items()):
        left, top = i % 4 * w, i // 4 * tile
        ImageDraw.Draw(sheet).text((left + 4, top + 3), name, fill="black", font=font)
        sheet.paste(picture.resize((w, whole), Image.LANCZOS), (left, top + 24))
        sheet.paste(picture.crop((x, y, x + w, y + h)), (left, top + 24 + whole))
    return sheet


def main(photos: list[str], sheet: str) -> None:
    """Print the table, and write the contact sheet of the first photograph.

    Raises:
        ValueError: the sheet exists.
    """
    if Path(sheet).exists():  # perhaps a photograph, if you forgot to name the sheet
        raise ValueError(f"{sheet}: exists; name a new file for the sheet, behind the photographs.")
    table = []
    for seed, path in enumerate(photos):
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        pictures = {name: parse(name)(photo, np.random.default_rng(seed)) for name in PRESETS}
        table.append([-10 * log10(np.mean((to_array(p) - to_array(photo)) ** 2)) for p in pictures.values()])
        if seed == 0:
            contact_sheet({"clean": photo, **pictures}).save(sheet, quality=85)
    print(f"{'PSNR, dB':20}" + "".join(f"{name:>18}" for name in PRESETS))
    for path, row in zip([*photos, "mean"], [*table, np.mean(table, axis=0)], strict=True):
        print(f"{Path(path).name:20}" + "".join(f"{value:18.2f}" for value in row))
    print(f"{sheet}: what they do to {photos[0]}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m kontext_min.extras.contact_sheet PHOTO... SHEET.jpg")
    try:
        main(sys.argv[1:-1], sys.argv[-1])
    except (OSError, ValueError) as error:
        print(f"contact_sheet: {error}", file=sys.stderr)
        sys.exit(2)
