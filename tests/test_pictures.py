"""What files hold besides RGB, where restored pictures go, and that nothing else is ever replaced."""

import io
import os
import resource
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, TiffTags

from conftest import linear_gray_profile
from kontext_min import data, degrade
from kontext_min.extras import inventory, metrics, not_read, pictures
from kontext_min.extras.pictures import find, load, load_restored, read, write

PHOTO = Path(__file__).parent / "photos" / "bowl.jpg"
EXIF, GPS = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo


def crop(width, height, k=0):
    return Image.open(PHOTO).convert("RGB").crop((200 + k, 200 + k, 200 + k + width, 200 + k + height))


def swapped_profile():
    """sRGB with the primaries of red and green exchanged, the name of an odd colour space."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"?XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"?XYZ", b"gXYZ", 1)


def swapped(picture):
    """The same colours under `swapped_profile`."""
    red, green, blue = picture.split()
    return Image.merge("RGB", (green, red, blue))


# --------------------------------------------------------------------------------------------- nothing else is replaced


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        crop(20, 20).save(tmp_path / "in" / name)
    return tmp_path


def test_outputs_over_files_that_are_needed_are_refused(folder):
    a, b = folder / "in" / "a.png", folder / "in" / "b.png"
    (folder / "link.png").symlink_to(a)
    os.link(b, folder / "hard.png")
    (folder / "here").symlink_to(folder / "in")
    (folder / "clean").mkdir()
    crop(20, 20).save(folder / "clean" / "a.bmp")
    (folder / "clean" / "a.png").symlink_to(folder / "clean" / "a.bmp")
    cases = [
        (a, a, [], "the input"),
        (a, folder / "link.png", [], "the input"),
        (a, folder / "here" / "a.png", [], "the input"),
        (a, b, [b], "b.png"),
        (a, folder / "hard.png", [b], "b.png"),
        (folder / "in", folder / "here", [], "the input"),
        (folder / "in", folder / "clean", [folder / "clean"], "clean/a.png"),
        (folder / "clean", folder / "in", [b, a], "in/a.png"),
    ]
    for source, target, protected, words in cases:
        with pytest.raises(ValueError, match=rf"^--output [^\n]*would replace [^\n]*{words}[^\n]*$"):
            find(source, target, protected)
    assert find(a, folder / "new.png", [b])[0][0].output == folder / "new.png"
    assert len(find(folder / "in", folder / "out", [folder / "clean"])[0]) == 2


def test_outputs_over_other_inputs_of_the_folder_are_refused(folder):
    """The output of sub/a.png is the input a.png if --output is the folder above --input."""
    (folder / "in" / "sub").mkdir()
    crop(20, 20).save(folder / "in" / "sub" / "a.png")
    with pytest.raises(ValueError, match=r"would replace [^\n]*a\.png"):
        find(folder / "in" / "sub", folder / "in", [folder / "in" / "a.png"])
    jobs, _ = find(folder / "in" / "sub", folder / "in")
    assert [job.name for job in jobs] == ["a.png"]  # not hidden, though the input lies in the output


def test_two_inputs_of_one_output_are_named(folder):
    crop(20, 20).save(folder / "in" / "c.gif")
    crop(20, 20).save(folder / "in" / "c.gif.png")
    jobs, rejected = find(folder / "in", folder / "out")
    assert [job.name for job in jobs if job.name[0] == "c"] == ["c.gif.png"]
    assert dict(rejected)["c.gif"].startswith("would become c.gif.png, which is another picture of the folder")


def test_what_cannot_be_written_is_found_before_the_work(folder, monkeypatch):
    (folder / "out" / "b.png").mkdir(parents=True)
    crop(20, 20).save(folder / "in" / f"{'x' * 248}.gif")  # with .png behind it, 256 bytes
    Image.new("RGB", (17000, 16)).save(folder / "in" / "wide.tif")
    (folder / "in" / "wide.tif").rename(folder / "in" / "wide.webp")
    jobs, rejected = find(folder / "in", folder / "out")
    assert [job.name for job in jobs] == ["a.png"]
    reasons = {name[:4]: reason for name, reason in rejected}
    assert "is a folder" in reasons["b.pn"] and "too long" in reasons["xxxx"] and "at most 16383" in reasons["wide"]
    with pytest.raises(OSError, match="too long"):
        find(folder / "in" / "a.png", folder / f"{'x' * 256}.png")
    Image.new("RGB", (8000, 16)).save(folder / "strip.png")
    for across in (1, 2):
        assert find(folder / "strip.png", folder / "strip.webp", (), across)[1] == []
    with pytest.raises(OSError, match=r"strip\.webp: 24008 pixels a side, but this format has at most 16383"):
        find(folder / "strip.png", folder / "strip.webp", (), 3)  # a sheet of --compare

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pictures.tempfile, "TemporaryFile", refuse)
    for source, target in ((folder / "in", folder / "new" / "out"), (folder / "in" / "a.png", folder / "o.png")):
        with pytest.raises(OSError, match=rf"^--output {folder}: nothing can be written there: Permission denied\.$"):
            find(source, target)
    assert not (folder / "new").exists()


def test_the_longest_names_can_be_written(tmp_path):
    path = tmp_path / f"{'x' * 251}.png"
    write(path, crop(20, 20))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_result_that_is_replaced_keeps_who_may_read_it(tmp_path):
    crop(60, 40).save(tmp_path / "in.png")
    restored(tmp_path / "in.png", tmp_path / "out.png").close()
    usual = (tmp_path / "out.png").stat().st_mode
    (tmp_path / "out.png").chmod(0o600)
    restored(tmp_path / "in.png", tmp_path / "out.png").close()
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o600 != usual & 0o777


def test_a_link_as_output_stays_a_link(tmp_path):
    (tmp_path / "there.png").touch()
    (tmp_path / "link.png").symlink_to("there.png")
    write(tmp_path / "link.png", crop(20, 20))
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "there.png").size == (20, 20)


# -------------------------------------------------------------------------------------------------------- what is kept


def restored(path, output):
    """A file through load and write with nothing done to its pixels."""
    job = find(path, output)[0][0]
    photo = load(job, None, None, 0)
    write(output, Image.fromarray(np.asarray(photo.degraded)), photo.file)
    return Image.open(output)


def test_photoshop_tiffs_lose_their_layers_and_keep_the_photograph(tmp_path, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Artist], exif[33723] = "Leica", "A. Nonymous", b"\x1c\x02\x78\0\1x"
    exif[37724], exif[34377], exif[50341] = b"Adobe Photoshop Document Data Block\0MIB8ryaL", b"8BIM" * 9, b"PrintIM"
    exif[700] = b"<x:xmpmeta xmlns:photoshop='http://ns.adobe.com/photoshop/1.0/' photoshop:Layers='2'/>"
    exif.get_ifd(EXIF).update({ExifTags.Base.DateTimeOriginal: "1999:12:31 23:59:59", 40962: 600, 40963: 400})
    exif.get_ifd(GPS)[1] = "N"
    crop(60, 40).save(tmp_path / "in.tif", exif=exif.tobytes(), dpi=(300, 300))
    assert "its Photoshop layers: dropped" in read(tmp_path / "in.tif").notes
    with restored(tmp_path / "in.tif", tmp_path / "out.jpg") as made:
        assert made.getexif()[ExifTags.Base.Make] == "Leica" and 33723 not in made.getexif()
    assert "note: in.tif: its IPTC: left out, only a TIFF has a place for it\n" in capsys.readouterr().err
    with restored(tmp_path / "in.tif", tmp_path / "out.tif") as made:
        tags = dict(made.tag_v2)
        assert not {37724, 34377, 700, 50341} & set(tags)
        assert tags[ExifTags.Base.Make] == "Leica" and tags[ExifTags.Base.Artist] == "A. Nonymous" and 33723 in tags
        assert made.info["dpi"] == pytest.approx((300, 300))
        photo = made.getexif().get_ifd(EXIF)
        assert photo[ExifTags.Base.DateTimeOriginal] == "1999:12:31 23:59:59" and made.getexif().get_ifd(GPS)[1] == "N"
        assert (photo[40962], photo[40963]) == (60, 40)


@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("source", ["jpg", "webp"])
def test_xmp_is_kept_where_it_still_holds(tmp_path, capsys, source, target):
    for k, words in enumerate(("dc:title='Wine'", "tiff:Orientation='6'")):
        xmp = f"<x:xmpmeta {words}/>".encode()
        crop(60, 40).save(tmp_path / f"{k}.{source}", xmp=xmp)
        with restored(tmp_path / f"{k}.{source}", tmp_path / f"out{k}.{target}") as made:
            made.load()
            found = made.info.get("xmp", b"")
            found = found.encode() if isinstance(found, str) else bytes(found)
            assert found == (b"" if k else xmp)
        assert capsys.readouterr().err.count("XMP") == k


def with_exif_behind_the_pixels(path, orientation):
    """A PNG whose eXIf chunk stands between IDAT and IEND, as the standard allows."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "Leica"
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    crop(60, 40).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + chunk + whole[-12:])


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_the_resolution_of_a_lying_picture_turns_with_it(tmp_path, ending):
    for way, expected in ((6, (144, 72)), (3, (72, 144))):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation], exif[282], exif[283], exif[296] = way, 72, 144, 2
        crop(60, 40).save(tmp_path / f"in.{ending}", exif=exif, dpi=(72, 144))
        file = read(tmp_path / f"in.{ending}")
        write(tmp_path / f"out.{ending}", file.rgb, file)
        with Image.open(tmp_path / f"out.{ending}") as made:
            exif = made.getexif()
            found = made.info.get("dpi", (exif.get(282), exif.get(283)))
            assert made.size == ((40, 60) if way == 6 else (60, 40)) and tuple(map(round, found)) == expected


def test_orientation_behind_the_pixels(tmp_path):
    with_exif_behind_the_pixels(tmp_path / "in.png", 6)
    with restored(tmp_path / "in.png", tmp_path / "out.png") as made:
        assert made.size == (40, 60)
        assert np.array_equal(np.asarray(made), np.asarray(crop(60, 40).transpose(Image.Transpose.ROTATE_270)))
        assert made.getexif()[ExifTags.Base.Orientation] == 1 and made.getexif()[ExifTags.Base.Make] == "Leica"


@pytest.mark.parametrize("large", ["MakerNote", "UserComment"])
def test_too_much_exif_for_a_jpeg(tmp_path, capsys, large):
    """Written, with one line about what was left out; other formats take all of it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Leica"
    exif.get_ifd(EXIF)[ExifTags.Base.DateTimeOriginal] = "1999:12:31 23:59:59"
    exif.get_ifd(EXIF)[ExifTags.Base[large]] = bytes(70_000)
    crop(60, 40).save(tmp_path / "in.png", exif=exif)
    with restored(tmp_path / "in.png", tmp_path / "out.png") as made:
        assert len(made.getexif().get_ifd(EXIF)[ExifTags.Base[large]]) == 70_000
    assert capsys.readouterr().err == ""
    with restored(tmp_path / "in.png", tmp_path / "out.jpg") as made:
        exif = made.getexif()
        assert exif.get(ExifTags.Base.Make) == {"MakerNote": "Leica", "UserComment": None}[large]
        assert bool(exif.get_ifd(EXIF).get(ExifTags.Base.DateTimeOriginal)) == (large == "MakerNote")
    assert capsys.readouterr().err.count("left out, too large for a JPEG\n") == 1


def test_a_resolution_that_a_format_has_no_room_for(tmp_path, capsys):
    """Pillow's PNG writer raised OverflowError for 4 billion dpi, and its TIFF writer for more."""
    exif = Image.Exif()
    exif[ExifTags.Base.XResolution] = exif[ExifTags.Base.YResolution] = 2**32 - 1
    exif[ExifTags.Base.ResolutionUnit], exif[ExifTags.Base.Make] = 2, "Leica"
    jpeg = io.BytesIO()
    crop(60, 40).save(jpeg, "JPEG", exif=exif)
    data = jpeg.getvalue().replace(b"JFIF\0", b"AAAA\0")  # else its dpi count, and not those of the EXIF
    (tmp_path / "in.jpg").write_bytes(data)
    with restored(tmp_path / "in.jpg", tmp_path / "out.png") as made:
        assert made.getexif()[ExifTags.Base.Make] == "Leica" and "dpi" not in made.info
    assert capsys.readouterr().err == "note: in.jpg: its dpi: left out, can't be written as PNG\n"
    crop(60, 40).save(tmp_path / "in.bmp", dpi=(761_999, 1))
    restored(tmp_path / "in.bmp", tmp_path / "out.jpg").close()
    assert capsys.readouterr().err == "note: in.bmp: its dpi: left out, a JPEG has 1 to 65535\n"


@pytest.mark.parametrize(
    ("header", "size", "deep"),
    [
        (b"P5 9 9 100\n", 81, 0),
        (b"P6 9 9 255\n", 243, 0),
        (b"P6 9 9 65535\n", 486, 1),
        (b"P1 9 9\n" + b"1 0 " * 41, 0, 0),
    ],
)
def test_bits_that_a_ppm_loses_are_named(tmp_path, header, size, deep):
    (tmp_path / "in.ppm").write_bytes(header + bytes(i % 101 for i in range(size)))
    assert read(tmp_path / "in.ppm").notes == ("more than 8 bits a channel: restored and written with 8",) * deep


@pytest.mark.parametrize("width", [1, 2])
def test_bits_that_an_sgi_loses_are_named(tmp_path, width):
    """Its 16 bits are in another word of Pillow's than those of the other formats; nearly black ones are refused."""
    crop(40, 30).save(tmp_path / "in.rgb", "SGI", bpc=width)
    assert read(tmp_path / "in.rgb").notes == ("more than 8 bits a channel: restored and written with 8",) * (width - 1)
    crop(40, 30).point(lambda x: x // 17).save(tmp_path / "dark.rgb", "SGI", bpc=width)
    if width == 2:
        with pytest.raises(ValueError, match="more than 8 bits, but nearly black"):
            read(tmp_path / "dark.rgb")


def test_the_second_picture_of_a_stereo_camera_is_named():
    """An MPO may hold a preview, or what the other lens saw."""
    for kinds, said in ((["Baseline MP Primary Image", "Undefined"], 0), (["Multi-Frame Image: (Disparity)"] * 2, 1)):
        entries = [{"Attribute": {"MPType": kind}} for kind in kinds]
        file = SimpleNamespace(format="MPO", mode="RGB", n_frames=2, info={}, mpinfo={0xB002: entries})
        assert not_read.not_read(file, b"") == ["2 frames or pages: the first is read"] * said


def test_a_gain_map_and_a_film_are_named(tmp_path):
    """What phones put beside a JPEG, and behind its end."""
    crop(40, 30).save(tmp_path / "in.mpo", "MPO", save_all=True, append_images=[crop(20, 15)])
    assert read(tmp_path / "in.mpo").notes == ("its second picture, such as a gain map (HDR): dropped",)
    crop(40, 30).save(tmp_path / "in.jpg")
    assert read(tmp_path / "in.jpg").notes == ()
    for more in (
        b"\0\0\0\x18ftypmp42" + bytes(9000),
        b"RIFF\1\2\3\4WAVEfmt ",
        b"\0\0\x30\x0a\x10\0\0\0MotionPhoto_Data",
    ):
        (tmp_path / "more.jpg").write_bytes((tmp_path / "in.jpg").read_bytes() + more)
        assert read(tmp_path / "more.jpg").notes == ("its film or sound (a motion photo): dropped",)


@pytest.mark.parametrize(("kind", "said"), [("TIFF", 1), ("PSD", 0), ("MPO", 0)])
def test_the_layers_of_a_psd_are_no_frames(kind, said):
    """What is read is the picture of all layers."""
    file = SimpleNamespace(format=kind, mode="RGB", n_frames=2, info={})
    assert not_read.not_read(file, b"") == ["2 frames or pages: the first is read"] * said


def test_a_picture_of_nearly_one_color_is_named(tmp_path):
    """Such as a TIFF whose palette has 8 bits where 16 are the rule: it is read as black."""
    palette = [i for _ in range(3) for i in range(256)]
    Image.frombytes("P", (64, 64), bytes(range(256)) * 16).save(tmp_path / "in.tif", tiffinfo={320: tuple(palette)})
    assert "nearly one color; look at the file" in read(tmp_path / "in.tif").notes
    crop(60, 40).save(tmp_path / "in.png")
    assert read(tmp_path / "in.png").notes == ()


@pytest.mark.parametrize(("gamma", "said"), [(100_000, True), (45_455, False)])
def test_a_gamma_that_is_not_applied_is_named(tmp_path, gamma, said):
    crop(60, 40).save(tmp_path / "in.png")
    head, rest = (tmp_path / "in.png").read_bytes()[:33], (tmp_path / "in.png").read_bytes()[33:]
    chunk = b"gAMA" + gamma.to_bytes(4, "big")
    (tmp_path / "in.png").write_bytes(head + b"\0\0\0\4" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + rest)
    assert read(tmp_path / "in.png").notes == ("its gamma of 1 is not applied",) * said


# ------------------------------------------------------------------------------------------- colours that are compared


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_letters_beyond_ascii_are_kept(tmp_path, ending):
    """Copyright and lens in UTF-8, as programs write them; Pillow reads each byte as a letter."""
    copyright, lens = ("© Jürgen Müller".encode(), "Gerät".encode())
    exif = Image.Exif()
    exif[ExifTags.Base.Copyright] = pictures._Text(copyright.decode("latin-1"))
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] = pictures._Text(lens.decode("latin-1"))
    crop(40, 30).save(tmp_path / "in.jpg", exif=exif)
    assert copyright in (tmp_path / "in.jpg").read_bytes() and lens in (tmp_path / "in.jpg").read_bytes()
    file = read(tmp_path / "in.jpg")
    write(tmp_path / f"out.{ending}", file.rgb, file)
    with Image.open(tmp_path / f"out.{ending}") as made:
        found = made.getexif()
        assert found[ExifTags.Base.Copyright].encode("latin-1") == copyright
        assert found.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel].encode("latin-1") == lens


def boxed(kind, content):
    return struct.pack(">I", 8 + len(content)) + kind + content


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


NOT_SRGB = "its colors are not those of sRGB (cHRM, cICP or nclx), and are not converted"
ADOBE = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)  # cHRM of Adobe RGB
OF_SRGB = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (chunk(b"cHRM", ADOBE), True),
        (chunk(b"cHRM", OF_SRGB), False),
        (chunk(b"sRGB", b"\0") + chunk(b"cHRM", ADOBE), False),
        (chunk(b"cICP", bytes([9, 16, 0, 1])), True),  # BT.2020, PQ
        (chunk(b"cICP", bytes([1, 13, 0, 1])), False),
    ],
)
def test_colors_of_a_png_that_are_not_converted_are_named(tmp_path, added, said):
    crop(60, 40).save(tmp_path / "in.png")
    png = (tmp_path / "in.png").read_bytes()
    (tmp_path / "in.png").write_bytes(png[:33] + added + png[33:])
    assert read(tmp_path / "in.png").notes == (NOT_SRGB,) * said
    lines = inventory.parts_not_read(tmp_path, data.scan(tmp_path)[0])
    assert lines == [f"note: {tmp_path}: in.png: {NOT_SRGB}"] * said


def test_what_is_not_read_of_a_jpeg_2000_is_named(tmp_path):
    crop(40, 30).save(tmp_path / "in.jp2")
    plain = (tmp_path / "in.jp2").read_bytes()
    space = boxed(b"colr", b"\1\0\0" + struct.pack(">I", 16))
    before, inside, after = plain.partition(space)
    assert inside and read(tmp_path / "in.jp2").notes == ("its comment: dropped, as only EXIF and XMP are kept",)
    profile = boxed(b"colr", b"\2\0\0" + swapped_profile()) + boxed(b"res ", boxed(b"resd", b"\0\1\0\1\0\1\0\1\0\0"))
    start = before.index(b"jp2h") - 4
    size = struct.pack(">I", struct.unpack(">I", before[start : start + 4])[0] + len(profile) - len(space))
    exif = boxed(b"uuid", b"JpgTiffExif->JP2")
    (tmp_path / "in.jp2").write_bytes(before[:start] + size + before[start + 4 :] + profile + after + exif)
    notes = read(tmp_path / "in.jp2").notes
    assert "its color profile is not read, so its colors are taken for sRGB" in notes
    assert "its EXIF or XMP, dpi: dropped, as they are not read from a JPEG2000" in notes


@pytest.mark.parametrize(
    ("ending", "found", "place"), [("jp2", b"\xff\x4f\xff\x51", 42), ("avif", b"av1C", 6)], ids=("jp2", "avif")
)
def test_bits_beyond_eight_are_known_from_the_header(tmp_path, ending, found, place):
    """SIZ has bits - 1 of each channel, av1C a flag of high depth; Pillow gives 8 bits of both, as if that were all."""
    crop(40, 30).save(tmp_path / f"in.{ending}")
    plain = (tmp_path / f"in.{ending}").read_bytes()
    at = plain.index(found) + place
    deep = plain[:at] + bytes([11 if ending == "jp2" else plain[at] | 64]) + plain[at + 1 :]
    with Image.open(tmp_path / f"in.{ending}") as image:
        assert [not_read.is_deep(image, ends) for ends in (plain, deep)] == [False, True]


@pytest.mark.parametrize(("offset", "said"), [(0, False), (56, True)])
def test_a_profile_of_a_bmp_is_named(tmp_path, offset, said):
    crop(40, 30).save(tmp_path / "in.bmp")
    plain = (tmp_path / "in.bmp").read_bytes()
    header = bytearray(plain[14:54] + bytes(84))  # BITMAPV5HEADER
    header[:4] = struct.pack("<I", 124)
    header[offset : offset + 4] = b"DEBM" if said else header[offset : offset + 4]
    start = struct.pack("<I", 14 + 124)
    (tmp_path / "in.bmp").write_bytes(plain[:10] + start + header + plain[54:])
    file = read(tmp_path / "in.bmp")
    assert file.rgb.tobytes() == crop(40, 30).tobytes()
    assert file.notes == ("its color profile is not read, so its colors are taken for sRGB",) * said


def test_entries_of_a_psd_are_named(tmp_path):
    """Its resources: resolution and EXIF."""
    rows = crop(4, 4).split()
    resources = b"".join(b"8BIM" + struct.pack(">HHI", kind, 0, 2) + b"ab" for kind in (1005, 1058, 1007))
    head = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(4)
    body = struct.pack(">I", len(resources)) + resources + bytes(4) + b"\0\0" + b"".join(x.tobytes() for x in rows)
    (tmp_path / "in.psd").write_bytes(head + body)
    file = read(tmp_path / "in.psd")
    assert file.rgb.tobytes() == crop(4, 4).tobytes()
    assert "its EXIF, dpi: dropped, as they are not read from a PSD" in file.notes


def test_gray_with_alpha_and_a_profile_is_converted(tmp_path):
    """As without alpha: the linear gray becomes brighter."""
    gray = crop(40, 30).convert("L")
    gray.save(tmp_path / "gray.png", icc_profile=linear_gray_profile())
    gray.putalpha(128)
    gray.save(tmp_path / "alpha.png", icc_profile=linear_gray_profile())
    plain, clear = read(tmp_path / "gray.png"), read(tmp_path / "alpha.png")
    assert np.abs(np.asarray(plain.rgb, int) - np.asarray(clear.rgb, int)).max() <= 1
    assert np.asarray(plain.rgb).mean() > np.asarray(gray.convert("L")).mean() + 10


def test_colors_that_are_taken_for_srgb_are_named(tmp_path):
    crop(40, 30).convert("CMYK").save(tmp_path / "in.tif")
    assert read(tmp_path / "in.tif").notes == ("CMYK without a color profile: its colors are a guess",)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Leica"
    exif.get_ifd(EXIF)[40961] = 2  # as some programs write Adobe RGB
    for ending in ("jpg", "webp", "png", "tif"):
        crop(40, 30).save(tmp_path / f"in.{ending}", exif=exif.tobytes())
        assert any("Adobe RGB" in note for note in read(tmp_path / f"in.{ending}").notes)
    exif = Image.Exif()
    exif.get_ifd(EXIF)[40965] = {1: "R03"}  # as cameras write it
    for profile in (None, swapped_profile()):
        crop(40, 30).save(tmp_path / "in.jpg", exif=exif, icc_profile=profile)
        with Image.open(tmp_path / "in.jpg") as image:
            assert image.getexif().get_ifd(ExifTags.IFD.Interop)[1] == "R03"
        assert any("Adobe RGB" in note for note in read(tmp_path / "in.jpg").notes) == (not profile)
    for before in (True, False):  # in a PNG it may follow the pixels, and be asked for before they are read
        crop(40, 30).save(tmp_path / "in.png", exif=exif.tobytes())
        png = (tmp_path / "in.png").read_bytes()
        place = png.index(b"eXIf") - 4
        part = png[place : place + 12 + int.from_bytes(png[place : place + 4], "big")]
        if not before:
            (tmp_path / "in.png").write_bytes(png.replace(part, b"").replace(png[-12:], part + png[-12:]))
        (line,) = inventory.parts_not_read(tmp_path, [SimpleNamespace(path=tmp_path / "in.png", name="in.png")])
        assert "Adobe RGB" in line and sum("Adobe RGB" in note for note in read(tmp_path / "in.png").notes) == 1


def test_an_opaque_reference_is_not_said_to_be_transparent(tmp_path, capsys):
    for alpha, said in ((255, False), (254, True)):
        picture = crop(40, 30)
        picture.save(tmp_path / "in.png")
        picture.putalpha(alpha)
        picture.save(tmp_path / "clean.png")
        load(find(tmp_path / "in.png", tmp_path / "out.png")[0][0], None, tmp_path / "clean.png", 0)
        assert ("it has an alpha channel" in capsys.readouterr().err) == said


def test_pixels_that_are_not_square_and_places_on_maps_are_named(tmp_path):
    crop(40, 30).save(tmp_path / "in.png")
    png = (tmp_path / "in.png").read_bytes()
    for x, said in ((1, False), (2, True)):
        (tmp_path / "in.png").write_bytes(png[:33] + chunk(b"pHYs", struct.pack(">IIB", x, 1, 0)) + png[33:])
        assert read(tmp_path / "in.png").notes == ("its pixels of 2:1: dropped, and taken for square",) * said
    crop(40, 30).save(tmp_path / "in.tif", tiffinfo={34735: (1, 1, 0, 0)})
    assert read(tmp_path / "in.tif").notes == ("its place on a map (GeoTIFF): dropped",)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "avif"])
def test_a_file_whose_end_is_zeros_is_cut(tmp_path, ending):
    """As after a download that stopped, in a file made in its full size: Pillow reads gray or black rows."""
    file = tmp_path / f"in.{ending}"
    crop(300, 300).save(file)
    whole = file.read_bytes()
    good = tmp_path / f"good.{ending}"
    good.write_bytes(whole + bytes(100) if ending in ("jpg", "png") else whole)  # a card may add some
    file.write_bytes(whole[: len(whole) * 2 // 3] + bytes(len(whole) - len(whole) * 2 // 3))
    with pytest.raises(ValueError, match=rf"in\.{ending}"):
        read(file)
    pictures, rejected = inventory.scan_whole(tmp_path)
    assert [p.name for p in pictures] == [good.name] and [name for name, _ in rejected] == [file.name]
    assert read(good).rgb.size == (300, 300)
    assert inventory.zeros_at_end(file) and not inventory.zeros_at_end(good)
    if ending == "webp":  # Pillow reads it
        assert rejected == [(file.name, inventory.ZEROS)] and data.scan(tmp_path)[0][1].name == file.name


@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_iptc_that_is_stored_as_numbers_is_named(tmp_path):
    """Pillow reads the first of them only, and would write its digits."""
    numbers = TiffImagePlugin.ImageFileDirectory_v2()
    numbers[33723], numbers.tagtype[33723] = (28, 2, 3), TiffTags.LONG
    for tags, said in ((numbers, True), ({33723: b"\x1c\x02\x05"}, False)):
        crop(40, 30).save(tmp_path / "in.tif", tiffinfo=tags)
        file = read(tmp_path / "in.tif")
        assert file.notes == ("its IPTC: dropped, as only EXIF and XMP are kept",) * said
        write(tmp_path / "out.tif", file.rgb, file)
        with Image.open(tmp_path / "out.tif") as made:
            assert made.tag_v2.get(33723) == (None if said else b"\x1c\x02\x05")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_without_loss_stays_without(tmp_path, lossless):
    for alpha in (False, True):
        picture = crop(60, 40)
        if alpha:
            picture.putalpha(Image.linear_gradient("L").resize((60, 40)))
        profile = swapped_profile() + bytes(100_000) if alpha else None  # some are large
        picture.save(tmp_path / "in.webp", lossless=lossless, exact=True, icc_profile=profile)
        file = read(tmp_path / "in.webp")
        assert file.keep.get("lossless", False) == lossless
        noisy = Image.effect_noise((60, 40), 60).convert("RGB")
        for ending, exact in (("webp", lossless), ("jpg", False), ("png", True)):
            write(tmp_path / f"out.{ending}", noisy, file)
            if not alpha:
                assert (read(tmp_path / f"out.{ending}").rgb.tobytes() == noisy.tobytes()) == exact


def test_a_name_that_is_not_utf_8_is_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    crop(20, 20).save(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    jobs, _ = find(tmp_path / "in", tmp_path / "out")
    assert jobs[0].output.name == "caf\\xe9.png"
    assert "not UTF-8 are 1 of the names; their pictures are written as here: caf\\xe9.png" in capsys.readouterr().err


@pytest.mark.parametrize(("order", "code"), [("<", "utf-16-le"), (">", "utf-16-be")])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_keeps_its_byte_order(tmp_path, order, code, ending):
    """Comments in UTF-16 and the camera's own notes are bytes, which are read in the order of the whole."""
    exif = Image.Exif()
    exif.endian = order
    comment = b"UNICODE\0" + "größer".encode(code)
    exif.get_ifd(EXIF).update({37500: b"\0\1\2\3" * 9, 37510: comment})
    exif.get_ifd(GPS)[28] = comment
    crop(40, 30).save(tmp_path / "in.jpg", exif=exif)
    file = read(tmp_path / "in.jpg")
    write(tmp_path / f"out.{ending}", file.rgb, file)
    with Image.open(tmp_path / f"out.{ending}") as made:
        found, endian = made.getexif(), made.getexif().endian
        assert endian == ("<" if ending == "tif" else order)  # Pillow has no choice there
        assert found.get_ifd(EXIF)[37500] == b"\0\1\2\3" * 9
        for text in (found.get_ifd(EXIF)[37510], found.get_ifd(GPS)[28]):
            assert text[8:].decode("utf-16-le" if endian == "<" else "utf-16-be") == "größer"


def test_a_picture_with_alpha_and_broken_exif_is_upright(tmp_path, monkeypatch):
    """Its colors are taken from the stored picture, which has to be turned too."""
    exif, picture = Image.Exif(), crop(40, 30)
    exif[ExifTags.Base.Orientation] = 6
    picture.putalpha(128)
    picture.save(tmp_path / "in.webp", exif=exif, lossless=True, exact=True)
    good = read(tmp_path / "in.webp")
    monkeypatch.setattr(pictures, "_exif", lambda *_: 1 / 0)
    file = read(tmp_path / "in.webp")
    assert "its EXIF can't be read: dropped" in file.notes
    assert file.rgb.tobytes() == good.rgb.tobytes() and file.alpha.tobytes() == good.alpha.tobytes()
    assert file.rgb.size == file.alpha.size == (30, 40)


def test_a_profile_that_says_nothing_of_the_pixels_is_named_in_training(tmp_path):
    broken = bytearray(linear_gray_profile())
    broken[128:132] = b"\xff" * 4
    crop(40, 30).save(tmp_path / "a.png", icc_profile=linear_gray_profile())
    crop(40, 30).convert("L").save(tmp_path / "b.png", icc_profile=bytes(broken))
    crop(40, 30).convert("L").save(tmp_path / "c.png", icc_profile=linear_gray_profile())
    lines = inventory.parts_not_read(tmp_path, data.scan(tmp_path)[0])
    assert lines == [
        f"note: {tmp_path}: a.png: its GRAY color profile does not fit its pixels: dropped",
        f"note: {tmp_path}: b.png: its GRAY color profile can't be read: taken for sRGB",
    ]


@pytest.mark.parametrize("ending", ["tif", "jpg", "webp"])
def test_a_resolution_of_nothing_by_nothing_is_none(tmp_path, ending):
    """0 / 0 of a TIFF was compared with 0, which Pillow's rationals can't."""
    exif = Image.Exif()
    exif[282] = exif[283] = TiffImagePlugin.IFDRational(0, 0)
    crop(60, 40).save(tmp_path / f"in.{ending}", exif=exif)
    assert "dpi" not in read(tmp_path / f"in.{ending}").keep


def test_the_dpi_of_a_webp_reaches_a_png(tmp_path):
    exif = Image.Exif()
    exif.update({282: 300.0, 283: 150.0, 296: 2})
    crop(40, 30).save(tmp_path / "in.webp", exif=exif)
    assert read(tmp_path / "in.webp").keep["dpi"] == (300, 150)
    exif[296] = 3  # per cm
    crop(40, 30).save(tmp_path / "in.webp", exif=exif)
    assert read(tmp_path / "in.webp").keep["dpi"] == (762, 381)
    exif[283] = TiffImagePlugin.IFDRational(0, 0)
    crop(40, 30).save(tmp_path / "in.webp", exif=exif)
    assert "dpi" not in read(tmp_path / "in.webp").keep


def test_levels_of_a_tiff_that_are_not_applied_are_named(tmp_path):
    """Pillow reads uncompressed YCbCr by the formula of JPEG, whatever its range."""
    for name, levels in (("full", (0, 255, 128, 255, 128, 255)), ("studio", (16, 235, 128, 240, 128, 240))):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[532] = tuple(TiffImagePlugin.IFDRational(n) for n in levels)
        crop(40, 30).convert("YCbCr").save(tmp_path / f"{name}.tif", tiffinfo=tags)
        said = ("its own levels of YCbCr (ReferenceBlackWhite, YCbCrCoefficients) are not applied",)
        assert read(tmp_path / f"{name}.tif").notes == said * (name == "studio")


def test_regions_of_faces_of_other_programs_go(tmp_path):
    for words in (b"acdsee-rs:Regions", b"Iptc4xmpExt:ImageRegion", b"MPReg:Rectangle"):
        crop(40, 30).save(tmp_path / "in.jpg", xmp=b"<x " + words + b"='1'/>")
        file = read(tmp_path / "in.jpg")
        assert "xmp" not in file.keep and "its XMP describes the old pixels: dropped" in file.notes


def test_a_name_that_is_not_utf8_can_be_degraded(tmp_path):
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.png"))
    crop(40, 30).save(name)
    job = find(name, tmp_path / "out.png")[0][0]
    alike = find(tmp_path, tmp_path / "out")[0][0]
    assert job.name == alike.name == "a\\xff.png"
    degraded = [load(j, degrade.parse("noise=0.2"), None, 0).degraded for j in (job, alike)]
    assert degraded[0].tobytes() == degraded[1].tobytes() != crop(40, 30).tobytes()


def test_a_gray_profile_takes_no_color_away(tmp_path):
    picture = crop(40, 30)
    for alpha in (False, True):
        if alpha:
            picture.putalpha(Image.linear_gradient("L").resize((40, 30)))
        picture.save(tmp_path / "in.png", icc_profile=linear_gray_profile())
        file = read(tmp_path / "in.png")
        assert "its GRAY color profile does not fit its pixels: dropped" in file.notes
        seen = np.asarray(picture.convert("RGBA"))[..., 3] > 0
        assert (np.asarray(file.rgb)[seen] == np.asarray(picture.convert("RGB"))[seen]).all()


@pytest.mark.parametrize(("tags", "said"), [
    ({330: 8}, "it holds further pictures (SubIFDs), of which it may be a smaller version"),
    ({34377: b"8BIM\4\4\0\0\0\0\0\0"}, "its IPTC: dropped, as only EXIF and XMP are kept"),
    ({301: tuple(range(0, 65536, 257))}, "its gamma (TransferFunction) is not applied"),
])  # fmt: skip
def test_parts_of_a_tiff_that_are_not_read_are_named(tmp_path, tags, said):
    crop(40, 30).save(tmp_path / "in.tif", tiffinfo=tags)
    assert read(tmp_path / "in.tif").notes == (said,)


def test_further_channels_are_named(tmp_path):
    """The infrared of a scanner is none of the picture's; a saved selection of a PSD is taken for transparency."""
    crop(40, 30).convert("RGBX").save(tmp_path / "in.tif")
    file = read(tmp_path / "in.tif")
    assert file.rgb.tobytes() == crop(40, 30).tobytes() and "its further channel is not read" in file.notes
    image = SimpleNamespace(format="PSD", mode="RGBA", info={})
    assert not_read.not_read(image, b"") == ["its fourth channel is taken for transparency"]


@pytest.mark.parametrize("way", [1, 3, 6])
def test_the_first_of_several_lying_pages_is_seen_upright(tmp_path, way):
    """Counting the pages of a TIFF reads the first one again, as it lies."""
    picture, seen = crop(40, 30), {}
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    for pages in (1, 2):
        more = [picture] * (pages - 1)
        picture.save(tmp_path / "in.tif", save_all=True, append_images=more, tiffinfo={274: way, 271: "Leica"})
        file = read(tmp_path / "in.tif")
        assert ("2 frames or pages: the first is read" in file.notes) == (pages == 2)
        seen[pages] = file.rgb.size, file.rgb.tobytes(), file.alpha.tobytes(), file.keep["exif"]
    assert seen[1] == seen[2]
    upright = picture if way == 1 else picture.transpose(data.TURNS[way])
    assert seen[2][:3] == (upright.size, upright.convert("RGB").tobytes(), upright.getchannel("A").tobytes())


def test_places_in_a_lying_picture_do_not_stay(tmp_path):
    """Of the subject in EXIF, of faces in XMP: they count the pixels as they lay."""
    for way in (1, 6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = way
        exif.get_ifd(EXIF).update({37396: (5, 6), 37386: 50})
        crop(40, 30).save(tmp_path / "in.jpg", exif=exif, xmp=b"<x mwg-rs:Regions/>")
        file = read(tmp_path / "in.jpg")
        assert "its XMP describes the old pixels: dropped" in file.notes
        write(tmp_path / "out.jpg", file.rgb, file)
        with Image.open(tmp_path / "out.jpg") as made:
            assert (37396 in made.getexif().get_ifd(EXIF)) == (way == 1) and 37386 in made.getexif().get_ifd(EXIF)


def test_a_tiff_that_tells_no_resolution_gets_none(tmp_path):
    """Pillow says one pixel an inch of it."""
    for tags, expected in (({}, None), ({"dpi": (300, 300)}, (300, 300))):
        crop(40, 30).save(tmp_path / "in.tif", **tags)
        file = read(tmp_path / "in.tif")
        assert file.keep.get("dpi") == expected


def test_the_resolution_in_photoshops_part_of_a_jpeg_is_kept(tmp_path):
    """And that EXIF tells none is not 72 dpi, as Pillow says."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    crop(40, 30).save(tmp_path / "in.jpg", exif=exif)
    plain = (tmp_path / "in.jpg").read_bytes()
    with Image.open(tmp_path / "in.jpg") as image:
        assert image.info["dpi"] == (72, 72) and "dpi" not in read(tmp_path / "in.jpg").keep
    block = struct.pack(">IHHIHH", 300 << 16, 1, 1, 200 << 16, 1, 1)
    part = b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0" + struct.pack(">I", len(block)) + block
    (tmp_path / "in.jpg").write_bytes(plain[:2] + b"\xff\xed" + struct.pack(">H", 2 + len(part)) + part + plain[2:])
    assert read(tmp_path / "in.jpg").keep["dpi"] == (300, 200)


def test_what_imagemagick_and_gif_and_xmp_say_is_named(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("tiff:artist", "me")
    info.add_text("date:create", "today")
    for exif, said in ((None, True), (Image.Exif(), False)):
        if exif is not None:
            exif[ExifTags.Base.Artist] = "me"
        crop(40, 30).save(tmp_path / "in.png", pnginfo=info, exif=exif)
        assert read(tmp_path / "in.png").notes == ("its tiff:artist: dropped, as only EXIF and XMP are kept",) * said
    crop(40, 30).save(tmp_path / "in.gif")
    gif = (tmp_path / "in.gif").read_bytes()
    (tmp_path / "in.gif").write_bytes(gif[:-1] + b"!\xff\x0bXMP DataXMP\x01x\0" + gif[-1:])
    assert read(tmp_path / "in.gif").notes == ("its XMP: dropped, as they are not read from a GIF",)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    crop(40, 30).save(tmp_path / "in.jpg", xmp=xmp)
    file = read(tmp_path / "in.jpg")
    assert file.rgb.size == (30, 40) and "turned as its XMP says; some viewers show it as it lies" in file.notes


def test_tags_of_a_tiff_are_kept_or_named(tmp_path):
    """The page, and as some cameras write them date and exposure; what else is there is named."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[285], tags[36867], tags[50735], tags[42112] = "page 3", "2020:01:02 03:04:05", "A17", "<GDAL/>"
    crop(40, 30).save(tmp_path / "in.tif", tiffinfo=tags)
    file = read(tmp_path / "in.tif")
    assert file.notes == ("its tags 42112: dropped",)
    for ending in ("jpg", "tif"):
        write(tmp_path / f"out.{ending}", file.rgb, file)
        with Image.open(tmp_path / f"out.{ending}") as made:
            exif = made.getexif()
            assert [str(exif[tag]).strip("()',") for tag in (285, 36867, 50735)] == [
                "page 3",
                "2020:01:02 03:04:05",
                "A17",
            ]


def test_half_transparent_pictures_with_a_profile_are_one_picture(tmp_path):
    """As input and as reference: laid on white, then converted."""
    picture = crop(40, 30)
    picture.putalpha(Image.linear_gradient("L").resize((40, 30)))
    picture.save(tmp_path / "in.png", icc_profile=swapped_profile())
    seen = pictures.as_seen((file := read(tmp_path / "in.png")).rgb, file)
    other = data.open_picture(tmp_path / "in.png", to_srgb=True)
    assert np.abs(np.asarray(seen, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize(("ending", "kept"), [("png", False), ("jpg", True)])
def test_xmp_that_is_not_utf_8_is_not_damaged(tmp_path, ending, kept):
    (tmp_path / "in").mkdir()
    crop(40, 30).save(tmp_path / "in" / "a.jpg", xmp="<x>größer</x>".encode("latin-1"))
    jobs, _ = find(tmp_path / "in" / "a.jpg", tmp_path / f"out.{ending}")
    photo = load(jobs[0], None, None, 0)
    write(jobs[0].output, photo.degraded, photo.file)
    with Image.open(jobs[0].output) as made:
        assert made.info.get("xmp") == ("<x>größer</x>".encode("latin-1") if kept else None)


def test_a_scan_of_12_bits_in_16_is_refused(tmp_path):
    """Its white, 4095, is 16 of 255."""
    x = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(x).save(tmp_path / "in.png")
    with pytest.raises(ValueError, match=r"nearly black \(at most 16 of 255\)"):
        read(tmp_path / "in.png")


@pytest.mark.parametrize(("ending", "options", "edit", "text"), [
    ("tga", {"id_section": b"Bilbao, 1954"}, lambda file: file, "image ID"),
    ("tga", {}, lambda file: file[:-26] + struct.pack("<II", len(file) - 26, 0) + file[-18:], "extension area"),
    ("tga", {}, lambda file: file, None),
    ("ppm", {}, lambda file: b"P6 # a wedding\n" + file[3:], "comment"),
    ("ppm", {}, lambda file: b"P6\n40\n# a wedding\n30" + file[8:], "comment"),
    ("ppm", {}, lambda file: file, None),
    ("ppm", {}, lambda file: file[:13] + b"#" + file[14:], None),  # the first pixel
])  # fmt: skip
def test_texts_of_old_formats_are_named(tmp_path, ending, options, edit, text):
    file = tmp_path / f"in.{ending}"
    crop(40, 30).save(file, **options)
    file.write_bytes(edit(file.read_bytes()))
    assert read(file).notes == (f"its {text}: dropped, as only EXIF and XMP are kept",) * bool(text)


SECOND = "its second picture, such as a gain map (HDR): dropped"


def test_second_pictures_are_named_in_each_format(tmp_path):
    """Pillow tells them only where an MPO's index says that their kind is undefined."""
    crop(40, 30).save(tmp_path / "in.jpg", xmp=b'<x:xmpmeta hdrgm:Version="1.0"/>')
    assert SECOND in read(tmp_path / "in.jpg").notes
    kinds = [{"Attribute": {"MPType": kind}} for kind in ("Baseline MP Primary Image", "Unknown")]
    for image, ends in (
        (SimpleNamespace(format="MPO", info={}, mpinfo={0xB002: kinds}), b""),
        (SimpleNamespace(format="AVIF", info={}), b"infe\2\0\0\0\0\3\0\0tmap"),
        (SimpleNamespace(format="AVIF", info={}), b"auxCurn:mpeg:mpegB:cicp:systems:auxiliary:depth"),
    ):
        assert not_read.not_kept(image, ends) == [SECOND]
    assert not_read.not_kept(SimpleNamespace(format="AVIF", info={}), b"av01") == []


def test_a_cut_out_and_channels_that_pillow_does_not_read_are_named(tmp_path):
    image = SimpleNamespace(format="AVIF", mode="RGB", info={})
    assert not_read.not_read(image, b"pixi clap") == ["its cut-out (clap) is not applied"]
    image = SimpleNamespace(format="PSD", mode="RGB", info={}, resources=[(1057, "", b"\0\0\0\1\0")])
    assert not_read.not_read(image, b"")[0].startswith("it was saved without its picture")
    image.resources = [(1057, "", b"\0\0\0\1\1"), (2000, "", b""), (1035, "", b""), (1060, "", b"")]
    assert not_read.not_read(image, b"") == []
    assert not_read.not_kept(image, b"") == [
        "its URL, paths: dropped, as only EXIF and XMP are kept",
        "its XMP: dropped, as they are not read from a PSD",
    ]
    for mode, said in (("RGB", False), ("RGBA", True)):
        crop(40, 30).convert(mode).save(tmp_path / "in.jp2")
        assert any("order of channels" in note for note in read(tmp_path / "in.jp2").notes) == said


def test_xmp_and_comments_in_unusual_places_are_named(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", "<x/>")  # tEXt; Pillow reads iTXt
    crop(40, 30).save(tmp_path / "in.png", pnginfo=info)
    assert read(tmp_path / "in.png").notes == ("its XMP: dropped, as only EXIF and XMP are kept",)
    crop(40, 30).save(tmp_path / "in.gif")
    assert read(tmp_path / "in.gif").notes == ()
    gif = (tmp_path / "in.gif").read_bytes()
    (tmp_path / "in.gif").write_bytes(gif[:-1] + b"!\xfe\x04here\0;")
    assert read(tmp_path / "in.gif").notes == ("its comment: dropped, as only EXIF and XMP are kept",)


@pytest.mark.parametrize(("tags", "dpi"), [
    ({282: 300.0, 283: 150.0}, (300, 150)),
    ({282: 300.0, 283: 300.0, 296: 2}, (300, 300)),
    ({282: 100.0, 283: 100.0, 296: 3}, (254, 254)),
])  # fmt: skip
def test_the_resolution_of_exif_in_a_jpeg(tmp_path, tags, dpi):
    """The unit is inches where EXIF names none."""
    exif = Image.Exif()
    exif.update(tags)
    crop(40, 30).save(tmp_path / "in.jpg", exif=exif)
    jpeg = (tmp_path / "in.jpg").read_bytes()
    start = jpeg.index(b"\xff\xe0")  # JFIF, which a camera does not write
    (tmp_path / "in.jpg").write_bytes(jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]) :])
    assert read(tmp_path / "in.jpg").keep["dpi"] == dpi


def test_a_tiff_that_its_xmp_turns_is_scanned_as_seen(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    note = "turned as its XMP says; some viewers show it as it lies"
    for tags, size in (({700: xmp}, (30, 40)), ({700: xmp, 274: 1}, (40, 30))):
        crop(40, 30).save(tmp_path / "in.tif", tiffinfo=tags)
        (found,) = data.scan(tmp_path)[0]
        file = read(tmp_path / "in.tif")
        assert (found.width, found.height) == file.rgb.size == size
        assert (note in file.notes) == (size == (30, 40))


def test_a_cmyk_without_the_mark_of_adobe_is_named(tmp_path):
    """Pillow reads each as Adobe writes it, as light; without the mark it may be ink."""
    crop(40, 30).convert("CMYK").save(tmp_path / "in.jpg")
    plain = (tmp_path / "in.jpg").read_bytes()
    start = plain.index(b"\xff\xee")  # APP14
    length = int.from_bytes(plain[start + 2 : start + 4], "big")
    for content, said in ((plain, False), (plain[:start] + plain[start + 2 + length :], True)):
        (tmp_path / "in.jpg").write_bytes(content)
        assert any("perhaps read as a negative" in note for note in read(tmp_path / "in.jpg").notes) == said


def test_texts_outside_of_exif_are_named(tmp_path):
    crop(40, 30).save(tmp_path / "in.jpg", comment=b"a wedding")
    assert read(tmp_path / "in.jpg").notes == ("its comment: dropped, as only EXIF and XMP are kept",)
    content = (tmp_path / "in.jpg").read_bytes()  # with content credentials in an APP11 of 40 bytes, behind the SOI
    (tmp_path / "in.jpg").write_bytes(
        content[:2] + b"\xff\xeb\0\x28JP\0\1\0\0\0\1" + b"jumdc2pa".ljust(28) + content[2:]
    )
    assert any("(C2PA): dropped" in line for line in read(tmp_path / "in.jpg").notes)


def test_parts_of_a_jpeg_that_are_not_kept_are_named(tmp_path):
    crop(40, 30).save(tmp_path / "in.jpg")
    content = (tmp_path / "in.jpg").read_bytes()

    def notes(kind, data):
        part = b"\xff" + bytes([0xE0 + kind]) + (len(data) + 2).to_bytes(2, "big") + data
        (tmp_path / "more.jpg").write_bytes(content[:2] + part + content[2:])
        return read(tmp_path / "more.jpg").notes

    assert notes(12, b"[picture info]\r\nType=C-2020Z") == ("its parts APP12 [picture info]: dropped",)
    assert notes(1, b"FLIR\0\1") == ("its parts APP1 FLIR: dropped",)
    assert notes(13, b"Adobe_Photoshop2.5:\0") == ("its parts APP13 Adobe_Photoshop2.5:: dropped",)
    assert notes(11, b"JP\0\1\0\0\0\1jumb") == ("its parts APP11 JP: dropped",)
    assert notes(12, b"Ducky\0\1") == notes(2, b"urn:iso:std:iso:ts:21496:-1\0") == ()
    assert notes(1, b"http://ns.adobe.com/xap/1.0/\0<x/>") == ()
    assert notes(1, b'http://ns.adobe.com/xap/1.0/\0<x Camera:MotionPhoto="0"/>') == ()
    assert "film or sound" in notes(1, b'http://ns.adobe.com/xap/1.0/\0<x Camera:MotionPhoto="1"/>')[0]
    for number, word in ((1035, "URL"), (2000, "paths"), (2999, "paths")):
        part = b"Photoshop 3.0\0" + b"8BIM" + number.to_bytes(2, "big") + b"\0\0" + b"\0\0\0\2ab"
        assert notes(13, part) == (f"its {word}: dropped, as only EXIF and XMP are kept",)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.png", "a.webp"])
def test_a_disk_that_takes_only_a_part_is_an_error(tmp_path, name):
    """Pillow's own writing does not look how much of the last block the system took."""
    write(tmp_path / "whole" / name, crop(60, 40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "whole" / name).stat().st_size - 50, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: .*{name}"):
            write(tmp_path / name, crop(60, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_bytes_of_exif_keep_their_type(tmp_path):
    """UNDEFINED, as EXIF wants it; of the GPS part too."""
    exif = Image.Exif()
    exif.get_ifd(EXIF).update({37510: b"ASCII\0\0\0mine", 41728: b"\3", 41729: b"\1"})
    exif.get_ifd(GPS)[27] = b"ASCII\0\0\0GPS"
    crop(40, 30).save(tmp_path / "in.jpg", exif=exif)
    with restored(tmp_path / "in.jpg", tmp_path / "out.jpg") as made:
        content = made.info["exif"]
    for tag, size in ((37510, 12), (41728, 1), (41729, 1), (27, 11)):
        head = tag.to_bytes(2, "little"), size.to_bytes(4, "little")
        assert head[0] + b"\7\0" + head[1] in content or tag.to_bytes(2, "big") + b"\0\7" in content, tag


def test_exif_with_numbers_instead_of_bytes_is_kept():
    """As some programs write it: FileSource as SHORT, a comment as ASCII; a note of larger numbers goes."""
    entries = {41728: 3, 41729: (1,), 37510: "mine", 37500: (1, 70000), 33434: 0.5}
    kept = pictures._texts(entries)
    assert kept == {41728: b"\3", 41729: b"\1", 37510: "mine", 33434: 0.5}
    exif = Image.Exif()
    exif.get_ifd(EXIF).update(kept)
    again = Image.Exif()
    again.load(exif.tobytes())
    assert again.get_ifd(EXIF)[37510] == b"mine" and again.get_ifd(EXIF)[41728] == b"\3"


def test_an_entry_that_cannot_be_written_does_not_take_the_others_with_it(tmp_path):
    """A height below the sea's as a signed number: Pillow reads it, and writes only numbers without a sign."""
    exif = Image.Exif()
    exif[271] = "Leica"
    exif.get_ifd(GPS).update({2: (1.0, 2.0, 3.0), 6: 430.0})
    content = exif.tobytes()
    for name in "<>":
        unsigned, signed = (struct.pack(f"{name}HHI", 6, kind, 1) for kind in (5, 10))
        content = content.replace(unsigned, signed)
        content = content.replace(struct.pack(f"{name}II", 430, 1), struct.pack(f"{name}ii", -430, 1))
    crop(40, 30).save(tmp_path / "in.jpg", exif=content)
    file = read(tmp_path / "in.jpg")
    assert file.notes == ("its tags GPSAltitude: dropped",)


def test_an_entry_of_which_only_the_first_value_is_written_is_named(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(GPS)[40] = (2, 2, 0, 0)
    content = exif.tobytes()
    for name in "<>":  # as GPSVersionID, in SHORTs instead of bytes
        content = content.replace(struct.pack(f"{name}HHI", 40, 3, 4), struct.pack(f"{name}HHI", 0, 3, 4))
    crop(40, 30).save(tmp_path / "in.jpg", exif=content)
    assert read(tmp_path / "in.jpg").notes == ("its tags GPSVersionID: dropped",)


def test_parts_of_exif_that_cannot_be_kept_are_named(tmp_path):
    """Camera's notes of numbers beyond a byte; entries of the pixels (37121) are not named."""
    exif = Image.Exif()
    exif.get_ifd(EXIF).update({37501: (1, 70000), 37121: b"\1\2\3\0", 33434: 0.5})
    numbers = exif.tobytes()
    for order in ("little", "big"):
        numbers = numbers.replace((37501).to_bytes(2, order), (37500).to_bytes(2, order))
    crop(40, 30).save(tmp_path / "in.jpg", exif=numbers)
    assert read(tmp_path / "in.jpg").notes == ("its tags MakerNote: dropped",)


@pytest.fixture
def scene(tmp_path):
    """One scene as sRGB and under another profile."""
    crop(60, 40).save(tmp_path / "plain.png")
    swapped(crop(60, 40)).save(tmp_path / "odd.png", icc_profile=swapped_profile())
    return tmp_path


@pytest.mark.parametrize(("degraded", "clean"), [("plain", "odd"), ("odd", "plain"), ("odd", "odd")])
def test_pictures_are_compared_in_srgb(scene, degraded, clean, capsys):
    job = find(scene / f"{degraded}.png", scene / "out.png")[0][0]
    photo = load(job, None, scene / f"{clean}.png", 0)
    said = "only one of the two has a color profile other than sRGB" in capsys.readouterr().err
    assert said == (degraded != clean)
    assert metrics.psnr(pictures.as_seen(photo.degraded, photo.file), photo.clean) > 45
    write(job.output, photo.degraded, photo.file)
    assert metrics.psnr(load_restored(job, compare=False), photo.clean) > 45
    with Image.open(scene / "out.png") as made:  # restored alone, it keeps its colours and its profile
        assert made.tobytes() == photo.degraded.tobytes() == read(job.path).rgb.tobytes()
        assert ("icc_profile" in made.info) == (degraded == "odd")


def test_a_gray_clean_picture_is_compared_in_srgb(tmp_path):
    """One gray scene as sRGB, and linear with its profile."""
    gray = crop(60, 40).convert("L")
    curve = [i / 255 / 12.92 if i < 11 else ((i / 255 + 0.055) / 1.055) ** 2.4 for i in range(256)]
    gray.save(tmp_path / "in.png")
    gray.point([round(255 * x) for x in curve]).save(tmp_path / "clean.png", icc_profile=linear_gray_profile())
    photo = load(find(tmp_path / "in.png", tmp_path / "out.png")[0][0], None, tmp_path / "clean.png", 0)
    assert metrics.psnr(photo.degraded, photo.clean) > 35


@pytest.mark.parametrize("transparent", ["in.png", "clean.png", "both"])
def test_transparent_pictures_are_compared_on_white(tmp_path, transparent):
    """One picture with its transparency, and as it is seen."""
    picture = crop(60, 40)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    for name in ("in.png", "clean.png"):
        (picture if transparent in (name, "both") else on_white).save(tmp_path / name)
    photo = load(find(tmp_path / "in.png", tmp_path / "out.png")[0][0], None, tmp_path / "clean.png", 0)
    assert metrics.psnr(pictures.as_seen(photo.degraded, photo.file), photo.clean) > 48
    assert metrics.psnr(photo.clean, on_white) > 48


def test_a_degraded_picture_is_compared_with_itself_in_srgb(scene):
    photo = load(find(scene / "odd.png", scene / "out.png")[0][0], degrade.parse("noise=0.0001"), None, 0)
    assert metrics.psnr(photo.clean, crop(60, 40)) > 45
    assert metrics.psnr(pictures.as_seen(photo.degraded, photo.file), photo.clean) > 45


def test_a_restored_picture_is_read_again_for_its_scores(folder):
    """With transparency and turned by EXIF; a sheet of --compare is none."""
    picture = crop(40, 30)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(folder / "in" / "a.png", exif=exif)
    job = next(job for job in find(folder / "in", folder / "out")[0] if job.name == "a.png")
    photo = load(job, None, None, 0)
    write(job.output, photo.degraded, photo.file)
    seen = pictures.as_seen(photo.degraded, photo.file)
    assert load_restored(job, compare=False).tobytes() == seen.tobytes() and seen.size == (30, 40)
    write(job.output, crop(64, 40))
    with pytest.raises(ValueError, match=r"a\.png: 64x40, its input 30x40; add --overwrite"):
        load_restored(job, compare=False)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_a_result_or_a_sheet_among_clean_pictures_is_known(folder, ending):
    """Wherever it is moved, and whether or not its input had EXIF."""
    (folder / "clean").mkdir()
    write(folder / "clean" / f"sheet{ending}", crop(48, 40))
    with pytest.raises(ValueError, match=rf"sheet\{ending}: a result of this program, and .* should hold clean"):
        inventory.unread(folder / "clean", data.scan(folder / "clean")[0])
    (folder / "clean" / f"sheet{ending}").unlink()
    crop(48, 40).save(folder / "clean" / f"mine{ending}")
    assert inventory.unread(folder / "clean", data.scan(folder / "clean")[0]) == []
