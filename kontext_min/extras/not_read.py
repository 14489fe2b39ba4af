"""What of a picture's file is not read, or not kept, in words: one line for each, in training and in restoring.

Pillow gives the pixels. Of some formats it leaves out the color profile, the depth, or entries that describe the
photograph; a few bytes at either end of the file tell that they are there.

Sources: PNG (3rd edition), chunks cHRM, gAMA, cICP; ISO 15444-1, annexes A and I (boxes colr, resd, uuid, xml; marker
SIZ); ISO 23000-22 and the AV1 specification for av1C; Windows' BITMAPV5HEADER; Photoshop's image resources.
"""

import os
import re
from contextlib import suppress
from typing import BinaryIO

from PIL import ExifTags, Image

from kontext_min.data import srgb_transform

NEAR, FAR = 1 << 16, 1 << 24  # bytes at either end of a file that are searched: of many files, of one
PROFILES = {  # of color, that Pillow does not read
    "JPEG2000": rb"colr([\x02\x03]|\x01..\x00\x00\x00[^\x10-\x12])",  # as a profile, or another space by number
    "BMP": rb"^BM.{12}[\x6c-\xff]\x00{3}.{52}(DEBM|KNIL)",  # MBED or LINK, the other way around
    "GIF": rb"ICCRGBG1",
}
# Primaries and transfer, as in ITU-T H.273.
SPACES = {"PNG": rb"\x00\x00\x00\x04cICP(.)(.)", "AVIF": rb"colrnclx\x00(.)\x00(.)"}
SRGB = {1, 2}, {1, 2, 6, 13, 14, 15}  # those of sRGB, unknown ones, and some much like them
PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # of sRGB: x and y of white, red, green, blue
RESOURCES = {1005: "dpi", 1028: "IPTC", 1058: "EXIF", 1060: "XMP"}  # of a PSD
PATHS = range(2000, 3000)  # the resources for outlines that somebody drew
FULL = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)  # the range of YCbCr in a TIFF that says none, or as in a JPEG
GEO, LAYERS = 34735, 37724  # tags of a TIFF: where it lies, what Photoshop shows
BOXES = {rb"resd": "dpi", rb"uuid": "EXIF or XMP", rb"xml ": "XML"}  # of a JPEG 2000
# Parts of a JPEG that are kept, named by another line, or technical.
SEGMENTS = (b"Exif", b"http://ns.adobe.com/x", b"ICC_PROFILE", b"MPF", b"Photoshop", b"Adobe\0")
SEGMENTS += (b"Ducky", b"AROT", b"FPXR", b"urn:iso:std:iso:ts:21496")
# Behind or beside a JPEG: MP4 and the like, WAV; what phones write of it into XMP or a trailer.
MEDIA = rb"ftyp(mp4|isom|qt  |avc|3gp|MSNV)|RIFF.{4}WAVE|M(otionPhoto|icroVideo)(_Data|(=.|>)1)"
SECOND = {"JPEG": rb"hdrgm:", "MPO": rb"hdrgm:", "AVIF": rb"tmap|auxiliary:depth|auxid:2"}  # a gain map, a depth map
# Texts; those of a PNG that tell of programs, or repeat what is kept, do not count.
WORDS = {"comment": "comment", "Comment": "Comment", "id_section": "image ID"}  # of a TGA
TEXTS = {  # that Pillow does not read
    "GIF": (rb"\x00!\xfe.+\x00;\x00*$", "comment"),  # behind the picture
    "PPM": (rb"^P(4\s(\d+\s+)?|[^4]\s(\d+\s+){0,2})#", "comment"),  # before its last number
    "TGA": (rb"(?!\x00{4}).{8}TRUEVISION-XFILE\.", "extension area"),
}
TECHNICAL = re.compile(r"XML:com\.adobe\.xmp|Raw profile type exif|Software|(date|png|icc|Thumb):.*")  # of PNG
REPEATED = re.compile(r"(exif|tiff):.*")  # what ImageMagick writes besides EXIF, or instead of it


def ends(file: BinaryIO, most: int = NEAR) -> bytes:
    """The first and the last bytes of a file, where headers and entries are; a small file once."""
    place = file.tell()
    file.seek(0)
    first = file.read(most)
    file.seek(max(len(first), file.seek(0, os.SEEK_END) - most))
    last = file.read(most)
    file.seek(place)
    return first + last


def not_read(image: Image.Image, ends: bytes) -> list[str]:
    """What changes the look of a picture and is not read, from `ends` of its file.

    The frames of an MPO are versions of one, unless it says that they are several; those of a PSD are its layers.
    """
    frames = 1 if image.format == "PSD" else getattr(image, "n_frames", 1)
    if image.format == "MPO":
        frames = sum(kind.startswith("Multi-Frame") for kind in _mpo_kinds(image))
    found = [f"{frames} frames or pages: the first is read"] * (frames > 1)
    tags = getattr(image, "tag_v2", {})
    levels = tags.get(262) == 6 and tags.get(259, 1) == 1 and (529 in tags or tags.get(532, FULL) != FULL)
    found += ["its own levels of YCbCr (ReferenceBlackWhite, YCbCrCoefficients) are not applied"] * levels
    found += ["it holds further pictures (SubIFDs), of which it may be a smaller version"] * (330 in tags)
    found += ["its further channel is not read"] * (0 in tags.get(338, ()))
    found += ["its cut-out (clap) is not applied"] * (image.format == "AVIF" and b"clap" in ends)
    channels = image.format == "JPEG2000" and (b"pclr" in ends or b"cdef" in ends)
    found += ["its palette or order of channels (pclr, cdef) may be read wrong; look at its colors"] * channels
    hollow = any(k == 1057 and data[4:5] == b"\0" for k, _, data in getattr(image, "resources", ()))
    found += ["it was saved without its picture; save it with maximum compatibility"] * hollow
    kind = ends[25:26] if image.format == "PSD" else b""
    found += ["it is multichannel or duotone, and read as gray"] * (kind in (b"\7", b"\x08"))
    more = image.format == "PSD" and int.from_bytes(ends[12:14], "big") > Image.getmodebands(image.mode)
    found += ["its further channels are not read"] * more
    found += ["its fourth channel is taken for transparency"] * (image.format == "PSD" and image.mode == "RGBA")
    space = re.search(SPACES.get(image.format, rb"(?!)"), ends, re.DOTALL)
    apart = bool(space) and any(value[0] not in known for value, known in zip(space.groups(), SRGB, strict=True))
    profile = image.info.get("icc_profile", b"")
    found += ["its color profile can't be read: dropped"] * (profile is None)
    if profile and srgb_transform(profile, kind := kind_of(image)) is None:
        space = space_of(profile)
        fits = space == {"L": "GRAY"}.get(kind, kind)
        fault = "can't be read: taken for sRGB" if fits else "does not fit its pixels: dropped"
        found.append(f"its {space} color profile {fault}")
    guess = image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info
    found += ["its CMYK lacks Adobe's mark, which tells ink from light: perhaps read as a negative"] * guess
    told = "srgb" in image.info or image.info.get("icc_profile")
    if told and not (apart and image.format == "PNG"):  # there cICP comes first
        return found
    found += ["its EXIF says Adobe RGB, but it has no color profile: taken for sRGB"] * _is_adobe_rgb(image, ends)
    found += ["CMYK without a color profile: its colors are a guess"] * (image.mode == "CMYK")
    linear = image.format == "QOI" and ends[13:14] == b"\1"
    gamma, primaries = image.info.get("gamma", 1.0 if linear else 1 / 2.2), image.info.get("chromaticity", PRIMARIES)
    found += [f"its gamma of {gamma:g} is not applied"] * (abs(gamma - 1 / 2.2) > 0.01)
    found += ["its gamma (TransferFunction) is not applied"] * (301 in tags)
    if {318, 319} <= set(tags):  # of a TIFF
        primaries = (*tags[318], *tags[319])
    apart |= max(abs(a - b) for a, b in zip(primaries, PRIMARIES, strict=True)) > 0.01
    found += ["its colors are not those of sRGB (cHRM, cICP or nclx), and are not converted"] * apart
    profile = re.search(PROFILES.get(image.format, rb"(?!)"), ends, re.DOTALL)
    return found + ["its color profile is not read, so its colors are taken for sRGB"] * bool(profile)


def not_shown(image: Image.Image, ends: bytes, decode: bool = False) -> list[str]:
    """As not_read, and the transparency, which is not read of a clean picture; `decode` to see if there is some."""
    found, clear = not_read(image, ends), image.has_transparency_data
    if clear and decode:
        clear = image.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    return found + ["it has an alpha channel: laid on white where it is transparent"] * clear


def kind_of(image: Image.Image) -> str:
    """RGB, L or CMYK: what the profile of a picture is for, as in data.py."""
    return {"CMYK": "CMYK", "P": "RGB"}.get(image.mode) or Image.getmodebase(image.mode)


def space_of(profile: bytes) -> str:
    """What an ICC profile says that it is for, such as RGB or GRAY."""
    return re.sub(r"\W", "", profile[16:20].decode("ascii", "replace")) or "broken"


def _segments(image: Image.Image) -> list[str]:
    """Parts of a JPEG that are neither kept nor named elsewhere, such as `APP1 FLIR`."""
    parts = [part for part in getattr(image, "applist", ()) if part[0] not in ("APP0", "COM")]
    parts = [(name, data) for name, data in parts if not data.startswith(SEGMENTS)]
    return sorted({f"{name} {re.match(rb'[ -~]{0,20}', data)[0].decode()}".strip() for name, data in parts})


def _mpo_kinds(image: Image.Image) -> list[str]:
    """Of the pictures of an MPO, in words."""
    return [entry["Attribute"]["MPType"] for entry in getattr(image, "mpinfo", {}).get(0xB002, ())]


def _is_adobe_rgb(image: Image.Image, ends: bytes) -> bool:
    """Whether its EXIF says so, as that of a camera does: index R03 of the interoperability part, or ColorSpace 2."""
    with suppress(Exception):
        exif, content = Image.Exif(), image.info.get("exif", b"")
        if image.format == "TIFF":
            exif = Image.Image.getexif(image)
        elif image.format == "PNG" and not content and (place := ends.rfind(b"eXIf")) > 0:  # behind the pixels
            content = ends[place + 4 :][: int.from_bytes(ends[place - 4 : place], "big")]
        if content:  # not by getexif, which would not look again behind the pixels
            exif.load(content)
        color_space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        return exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03" or color_space == 2
    return False


def is_deep(image: Image.Image, ends: bytes) -> bool:
    """Whether a file, opened and not yet loaded, has more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")) or re.search("(?<!BGR);16|SGI16", str(image.tile)):
        return True
    # The tile of a PPM holds its white.
    whites = [n for t in image.tile if t[0].startswith("ppm") for n in re.findall(r"\d{3,}", str(t[3]))]
    size = image.format == "JPEG2000" and re.search(rb"\xff\x4f\xff\x51.{38}(.)", ends, re.DOTALL)  # SIZ: bits - 1
    high = image.format == "AVIF" and re.search(rb"av1C..(.)", ends, re.DOTALL)
    return any(int(n) > 255 for n in whites) or bool(size and size[1][0] & 127 > 7) or bool(high and high[1][0] & 64)


def not_kept(image: Image.Image, ends: bytes) -> list[str]:
    """The entries that a restored picture does not have, from the loaded picture and both `ends` of its file."""
    words = {WORDS[name] for name in image.info if name in WORDS}
    pattern, text = TEXTS.get(image.format, (rb"(?!)", ""))
    words |= {text} if re.search(pattern, ends, re.DOTALL) else set()
    texts = {name for name in getattr(image, "text", ()) if not TECHNICAL.fullmatch(name)}
    words |= {
        name for name in texts if not (REPEATED.fullmatch(name) and {"exif", "Raw profile type exif"} & {*image.info})
    }
    # That of a TIFF may be stored as numbers, of which Pillow gives the first, or among Photoshop's parts.
    tags = getattr(image, "tag_v2", {})
    resources = re.findall(rb"8BIM(..)", bytes(tags.get(34377, b"")), re.DOTALL)
    resources = {int.from_bytes(number, "big") for number in resources} | {*(image.info.get("photoshop") or ())}
    resources |= {kind for kind, *_ in getattr(image, "resources", ()) if kind not in RESOURCES}
    words |= {"XMP"} if "XML:com.adobe.xmp" in getattr(image, "text", ()) and "xmp" not in image.info else set()
    words |= {"IPTC"} if 1028 in resources or not isinstance(tags.get(33723, b""), bytes) else set()
    words |= {"URL"} if 1035 in resources else set()
    words |= {"paths"} if not resources.isdisjoint(PATHS) else set()
    found = [f"its {', '.join(sorted(words))}: dropped, as only EXIF and XMP are kept"] * bool(words)
    info = image.info
    aspect = info.get("aspect") or (info.get("jfif_unit") == 0 and info.get("jfif_density")) or (1, 1)
    found += [f"its pixels of {aspect[0]}:{aspect[1]}: dropped, and taken for square"] * (aspect[0] != aspect[1])
    found += ["its place on a map (GeoTIFF): dropped"] * (GEO in tags)
    layered = re.search(b"Layr|ryaL", bytes(tags.get(LAYERS, b"")))
    found += ["its Photoshop layers: dropped"] * bool(layered)
    media = image.format in ("JPEG", "MPO") and re.search(MEDIA, ends, re.DOTALL)
    found += ["its film or sound (a motion photo): dropped"] * bool(media)
    others = not {"Undefined", "Unknown"}.isdisjoint(_mpo_kinds(image)[1:])
    second = others or re.search(SECOND.get(image.format, rb"(?!)"), ends)
    found += ["its second picture, such as a gain map (HDR): dropped"] * bool(second)
    found += ["its content credentials (C2PA): dropped, as they hold for the old pixels"] * (b"jumdc2pa" in ends)
    of_psd = {RESOURCES[kind] for kind, *_ in getattr(image, "resources", ()) if kind in RESOURCES}
    parts = [name for name in _segments(image) if not (name.startswith("APP11 JP") and b"jumdc2pa" in ends)]
    found += [f"its parts {', '.join(parts[:5])}{' ...' * (len(parts) > 5)}: dropped"] * bool(parts)
    of_jp2 = {name for box, name in BOXES.items() if image.format == "JPEG2000" and box in ends}
    of_gif = {"XMP"} if image.format == "GIF" and b"XMP DataXMP" in ends and "xmp" not in info else set()
    unread = ", ".join(sorted(of_psd | of_jp2 | of_gif))
    return found + [f"its {unread}: dropped, as they are not read from a {image.format}"] * bool(unread)
