"""The data pipeline: buckets, files of every kind and state, crops, pairs, order, cached latents."""

import io
import json
import math
import os
import random
import resource
import shutil
import struct
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFilter, ImageOps
from safetensors.torch import load_file, save_file

from conftest import linear_gray_profile
from kontext_min import data, degrade
from kontext_min.data import BucketSampler, Pairs, Picture
from kontext_min.extras import checks, held_out, inventory
from kontext_min.extras import paired as paired_folders
from kontext_min.extras.latents import CachedPairs, content_mark, fill
from kontext_min.extras.paired import PairedFolders, match, pair_up
from kontext_min.extras.stand_ins import StandIns

GOLDEN = Path(__file__).parent / "golden"
PHOTOS = Path(__file__).parent / "photos"
SMALL = data.buckets(64, 16)


def smooth(size, seed=0, mode="RGB"):
    """A picture with structure at all scales, so that crops can be told apart."""
    w, h = size
    rng = np.random.default_rng(seed)
    parts = [
        Image.fromarray(rng.integers(0, 256, (max(2, h // k), max(2, w // k), 3), dtype=np.uint8)).resize(size)
        for k in (4, 16, 64)
    ]
    return Image.blend(Image.blend(parts[0], parts[1], 0.6), parts[2], 0.4).convert(mode)


def folder_of(root, sizes, ending="png"):
    for k, size in enumerate(sizes):
        smooth(size, k).save(root / f"{k:03d}.{ending}")
    return data.scan(root)[0]


def noisy(image, rng):
    """A cheap degradation that uses the generator."""
    x = np.asarray(image, dtype=np.float32) + rng.normal(0, 10, (*image.size[::-1], 3)).astype(np.float32)
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def cover_crop(image, size, rng=None):
    """What Pairs shows of one picture: anywhere if there is a generator, else the middle."""
    return data.crop(image, Picture(Path("a.png"), "a.png", *image.size), size, rng)


def paired(pictures, root):
    """Pictures with partners from a folder."""
    return PairedFolders(Pairs(pictures, SMALL, noisy, 1, "restore"), root)


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_buckets_are_the_official_list_and_scale():
    golden = json.loads((GOLDEN / "kontext_resolutions.json").read_text())
    assert [list(b) for b in data.PREFERRED] == golden["preferred_wh"]
    assert data.buckets() == data.PREFERRED
    for resolution, multiple in ((1024, 32), (768, 16), (512, 16), (256, 8), (64, 16), (16, 16)):
        scaled = data.buckets(resolution, multiple)
        assert len(set(scaled)) == len(scaled) <= 17
        assert all(w % multiple == h % multiple == 0 for w, h in scaled)
        assert [b[::-1] for b in scaled] == scaled[::-1], "the list is its own transpose"
    assert (512, 512) in data.buckets(512) and len(data.buckets(512)) == 17
    for w, h in data.buckets(512):
        assert abs(w * h / 512**2 - 1) < 0.06  # sides are rounded by up to 8 of at least 336
    with pytest.raises(ValueError, match="resolution: got 8"):
        data.buckets(8, 16)


def test_each_bucket_is_nearest_to_itself_at_any_size():
    for w, h in data.PREFERRED:
        for k in (0.5, 1, 3):
            assert data.nearest_bucket(int(w * k), int(h * k), data.PREFERRED) == (w, h)


def test_nearest_bucket_and_the_official_choice():
    """The official rule is |w/h - w/h|. Over the golden cases both agree; elsewhere they may differ by one bucket."""
    golden = json.loads((GOLDEN / "kontext_resolutions.json").read_text())
    for case in golden["cases"]:
        assert data.nearest_bucket(*case["input_wh"], data.PREFERRED) == tuple(case["bfl_resized_wh"])

    def official(w, h):
        return min((abs(w / h - a / b), a, b) for a, b in data.PREFERRED)[1:]

    differ = 0
    for w in range(300, 1600, 7):
        ours = data.nearest_bucket(w, 1000, data.PREFERRED)
        assert data.nearest_bucket(1000, w, data.PREFERRED) == ours[::-1], "a transposed picture, a transposed bucket"
        logs = [abs(math.log(w / 1000 * b / a)) for a, b in data.PREFERRED]
        assert ours == data.PREFERRED[int(np.argmin(logs))]
        steps = abs(data.PREFERRED.index(ours) - data.PREFERRED.index(official(w, 1000)))
        assert steps <= 1
        differ += steps
    assert differ > 0, "the rules are not the same one"
    # Half way between these two is 0.7039 in logarithms and 0.7050 in ratios.
    assert data.nearest_bucket(7045, 10000, data.PREFERRED) == (880, 1184)
    assert official(7045, 10000) == (832, 1248)
    # Equally near: the narrower.
    assert data.nearest_bucket(100, 100, [(200, 100), (100, 200)]) == (100, 200)


# ---- scan ------------------------------------------------------------------------------------------------------------


def test_scan_takes_every_kind_of_name_and_format(tmp_path):
    (tmp_path / "a" / "b c").mkdir(parents=True)
    for folder in (".hidden", "@eaDir", "$RECYCLE.BIN"):
        (tmp_path / folder).mkdir()
    picture = smooth((40, 30))
    (tmp_path / "$old").mkdir()
    names = [
        "$old/x.png",
        "x.jpg",
        "y.JPG",
        "z.JpEg",
        "a/p.png",
        "a/b c/ü.WebP",
        "a/t.tif",
        "a/g.gif",
        "q.bmp",
        "r.ppm",
        "s.avif",
    ]
    for name in names:
        picture.save(tmp_path / name)
    for name in (".hidden/h.png", "._x.jpg", "@eaDir/thumb.jpg", "$RECYCLE.BIN/r.png"):
        picture.save(tmp_path / name)
    (tmp_path / "x.txt").write_text("  a caption\n over two lines ")
    (tmp_path / "a" / "notes.json").write_text("{}")
    (tmp_path / "b.PNG").write_bytes((tmp_path / "x.jpg").read_bytes())  # a JPEG under another ending is a picture
    pictures, rejected = data.scan(tmp_path)
    assert [p.name for p in pictures] == sorted([*names, "b.PNG"]) and rejected == []
    assert {(p.width, p.height) for p in pictures} == {(40, 30)}
    captions = {p.name: p.caption for p in pictures if p.caption}
    assert captions == {"x.jpg": tmp_path / "x.txt"}
    for p in pictures:
        assert np.abs(np.asarray(data.open_picture(p.path), int) - np.asarray(picture, int)).mean() < 12  # gif: palette
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.scan(tmp_path / "absent")


@pytest.mark.parametrize(
    ("counts", "batch", "said"),
    [
        ([16, 1, 1], 1, ""),
        ([16, 1, 1], 8, "note: pictures of rare shapes (2) repeat up to 8 times in an epoch, to fill its batches"),
        ([40, 30], 16, ""),
        ([3], 8, "note: a batch is larger than the largest bucket (3 pictures), so pictures repeat within it"),
    ],
)
def test_pictures_that_fill_batches_are_named(counts, batch, said):
    bucket_of = [k for k, n in enumerate(counts) for _ in range(n)]
    assert inventory.repeats(bucket_of, batch) == [said] * bool(said)
    sampler = data.BucketSampler(bucket_of, batch, 0)
    shown = np.bincount([i for b in islice(sampler, sampler.batches_per_epoch) for _, i in b])
    means = [shown[np.array(bucket_of) == k].mean() for k in range(len(counts))]
    assert (max(means) >= 2) == bool(said) and shown.sum() == sampler.batches_per_epoch * batch


def test_a_picture_has_the_name_of_its_own_folder_where_links_lead_there_too(tmp_path):
    for name in ("2019/a.png", "2020/b.png", "2020/best/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "2019" / "best").symlink_to("../2020/best")
    (tmp_path / "favourites").symlink_to("2020/best")
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    Image.new("RGB", (40, 40)).save(outside / "d.png")
    (tmp_path / "2019" / "more").symlink_to(outside)
    names = [p.name for p in data.scan(tmp_path)[0]]
    assert names == ["2019/a.png", "2019/more/d.png", "2020/b.png", "2020/best/c.png"]


def test_scan_survives_links_and_odd_files(tmp_path):
    smooth((40, 30)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    smooth((40, 30)).save(tmp_path / "sub" / "b.png")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    smooth((40, 30)).save(os.fsencode(tmp_path) + b"/\xff.png")  # a name that is no UTF-8
    pictures, rejected = data.scan(tmp_path)
    smooth((40, 30)).save(os.fsencode(tmp_path) + b"/x.j\xffg", "PNG")
    (left_out,) = (reason for name, reason in inventory.unread(tmp_path, []) if name == "x.j\\xffg")
    assert left_out == "a picture, but its ending is .j\\xffg; rename or convert it"  # can be written
    assert [p.name for p in pictures] == ["\\xff.png", "a.png", "sub/b.png"]
    assert dict(rejected) == {"gone.jpg": "No such file or directory", "pipe.png": "not a file"}
    print(inventory.describe(tmp_path, pictures, rejected, SMALL))  # can be printed


# ---- broken and unusual files ----------------------------------------------------------------------------------------


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height):
    """A PNG that only claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
            + png_chunk(b"IEND", b""))  # fmt: skip


def encoded(kind, size=(64, 48), **options):
    file = io.BytesIO()
    smooth(size).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken EXIF
def test_fuzz_broken_pictures_are_all_named_and_nothing_crashes(tmp_path):
    """Truncated at every kind of place, bytes flipped, empty, wrong endings, bombs: rejected by name, or readable."""
    rng = random.Random(0)
    formats = {"jpg": encoded("JPEG"), "png": encoded("PNG"), "webp": encoded("WEBP"), "tif": encoded("TIFF"),
               "bmp": encoded("BMP"), "ppm": encoded("PPM"), "avif": encoded("AVIF"), "jp2": encoded("JPEG2000"),
               "gif": encoded("GIF"), "tga": encoded("TGA"), "progressive.jpg": encoded("JPEG", progressive=True),
               "exif.jpg": encoded("JPEG", exif=b"Exif\0\0" + b"II*\0" + bytes(60))}  # fmt: skip
    truncated = set()
    for ending, content in formats.items():
        n = len(content)
        for cut in {0, 1, 2, 4, 10, 20, 60, 200, n // 4, n // 2, 3 * n // 4, n - 100, n - 20, n - 3, n - 1}:
            name = f"cut{cut:06d}.{ending}"
            (tmp_path / name).write_bytes(content[: max(cut, 0)])
            if 0 <= cut <= n // 2:
                truncated.add(name)
        for k in range(10):
            flipped = bytearray(content)
            for _ in range(1 + k):
                flipped[rng.randrange(n)] = rng.randrange(256)
            (tmp_path / f"flip{k}.{ending}").write_bytes(flipped)
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    (tmp_path / "huge.png").write_bytes(png_header(2**31 - 1, 2**31 - 1))
    (tmp_path / "zero.png").write_bytes(png_header(0, 10))
    (tmp_path / "empty.webp").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is a text")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    text_bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 80_000_000))
    (tmp_path / "text-bomb.png").write_bytes(formats["png"][:33] + text_bomb + formats["png"][33:])

    pictures, rejected = data.scan(tmp_path)
    assert len(pictures) + len(rejected) == len(list(tmp_path.iterdir()))
    reasons = dict(rejected)
    hostile = {"bomb.png", "huge.png", "zero.png", "empty.webp", "text.jpg", "program.jpg", "one.png", "text-bomb.png"}
    assert hostile <= set(reasons)
    assert "exceeds limit" in reasons["bomb.png"] and "1 x 1" in reasons["one.png"]
    assert reasons["text.jpg"] == "not a picture of a known format"
    assert all("\n" not in reason and reason for reason in reasons.values())
    named = set(reasons)
    for p in pictures:
        try:
            assert data.open_picture(p.path).mode == "RGB"
        except ValueError as error:
            assert p.name in str(error) and "\n" not in str(error)
            named.add(p.name)
    # Half a file is never taken for a picture. A GIF is an exception of Pillow's, which shows what it has.
    assert {name for name in truncated - named if not name.endswith("gif")} == set()
    # A cut JPEG or PNG is found at the start, not when it is needed.
    late = {p.name for p in pictures} & truncated
    assert not {name for name in late if name.endswith(("jpg", "png"))}


def test_strip_is_too_small_and_cropped_without_exhausting_memory(tmp_path):
    Image.new("RGB", (30000, 20), "red").save(tmp_path / "strip.png")
    pictures, _ = data.scan(tmp_path)
    kept, small = data.usable(pictures, data.PREFERRED)
    assert kept == [] and small == [("strip.png", "30000 x 20, smaller than its bucket 1568 x 672; lower --resolution")]
    image = cover_crop(data.open_picture(pictures[0].path), (1568, 672), np.random.default_rng(0))
    assert image.size == (1568, 672) and image.getextrema() == ((255, 255), (0, 0), (0, 0))


def _tiff_of_12_bits():
    """16 x 16 pixels of the value 4000, packed."""
    tags = ((256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 16), (279, 384))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return file.ljust(122, b"\0") + bytes.fromhex("fa0fa0") * 128


def _png_of_16_bits(rgb, transparent):
    """A PNG of 16 bits a channel, which Pillow does not write."""
    height, width = rgb.shape[:2]
    head = struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb))
    chunks = [(b"IHDR", head), *[(b"tRNS", transparent)] * bool(transparent), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _png_of_2_bits():
    """A gray PNG of 2 bits with a transparent gray."""
    rows = zlib.compress(b"\0\x1b\x1b\x1b\x1b" * 16)
    head = struct.pack(">2I5B", 16, 16, 2, 0, 0, 0, 0)
    chunks = (b"IHDR", head), (b"tRNS", b"\0\2"), (b"IDAT", rows), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _tiff_of_16_bit_planes():
    """An uncompressed TIFF of 16 x 16 pixels, three planes of 16 bits."""
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, 170), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 176)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 3, 188), (284, 3, 1, 2)]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = (b"II*\0" + struct.pack("<I", 8) + ifd).ljust(170, b"\0")
    sizes = struct.pack("<3H", 16, 16, 16) + struct.pack("<3I", 200, 712, 1224) + struct.pack("<3I", 512, 512, 512)
    return head + sizes + np.arange(768, dtype="<u2").tobytes()


def test_modes_become_rgb(tmp_path):
    def opened(image, name, **options):
        """What a file of this picture is read as."""
        image.save(tmp_path / name, **options)
        return np.asarray(data.open_picture(tmp_path / name))

    ramp = np.arange(256, dtype=np.uint16)[None].repeat(16, 0)
    for name in ("grey16.png", "grey16.tif"):  # 0..65535 in steps of 257 is 0..255 exactly
        assert (opened(Image.fromarray(ramp * 257), name) == ramp[..., None]).all()
    assert (opened(Image.fromarray((ramp / 255).astype(np.float32)), "float.tif") == ramp[..., None]).all()
    (tmp_path / "deep.pgm").write_bytes(b"P5 256 16 65535\n" + (ramp * 257).astype(">u2").tobytes())
    assert (np.asarray(data.open_picture(tmp_path / "deep.pgm")) == ramp[..., None]).all()
    with pytest.raises(ValueError, match=r"its white is not 1 \(values from 0.0 to 1000.0\); convert it"):
        opened(Image.fromarray(np.linspace(0, 1000, 256, dtype=np.float32).reshape(16, 16)), "hdr.tif")
    with pytest.raises(ValueError, match=r"32bit\.tif: its white is not 65535 \(values from 0 to 255\)"):
        opened(Image.fromarray(ramp.astype(np.int32)), "32bit.tif")
    for name, tags in (("white-is-0", {262: 0}), ("signed", {339: 2})):
        with pytest.raises(ValueError, match=rf"{name}\.tif: its white is not 65535"):
            opened(Image.fromarray(ramp * 127), f"{name}.tif", tiffinfo=tags)
    with pytest.raises(ValueError, match=r"signed8\.tif: stored in a way that Pillow reads wrong"):
        opened(Image.fromarray(ramp.astype(np.uint8)), "signed8.tif", tiffinfo={339: 2})
    (tmp_path / "12bit.tif").write_bytes(_tiff_of_12_bits())
    with pytest.raises(ValueError, match=r"12bit.tif: its white is not 65535"):
        data.open_picture(tmp_path / "12bit.tif")
    for name in ("12-of-16.png", "12-of-16.tif"):  # no tag says so
        with pytest.raises(ValueError, match=r"more than 8 bits, but nearly black \(at most 15 of 255\); convert it"):
            opened(Image.fromarray(ramp * 15), name)
    for name, scale, extra, message in (
        ("a", 15, b"", "nearly black"),
        ("b", 257, b"\0\1" * 3, "that Pillow reads wrong"),
    ):
        (tmp_path / f"{name}.png").write_bytes(_png_of_16_bits(np.repeat(ramp[..., None] * scale, 3, axis=2), extra))
        with pytest.raises(ValueError, match=message):
            data.open_picture(tmp_path / f"{name}.png")
    for mode in ("L", "P", "CMYK", "RGB"):  # Pillow maps some of them, with sides swapped
        lying = smooth((60, 48), mode="RGB").convert(mode)
        exif = Image.Exif()
        exif[274] = 6
        upright = lying.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        assert np.abs(opened(lying, f"{mode}6.tif", exif=exif).astype(int) - upright).max() <= 1, mode
    (tmp_path / "gray2.png").write_bytes(_png_of_2_bits())
    with pytest.raises(ValueError, match="stored in a way that Pillow reads wrong"):
        data.open_picture(tmp_path / "gray2.png")
    (tmp_path / "planes.tif").write_bytes(_tiff_of_16_bit_planes())
    with pytest.raises(ValueError, match="stored in a way that Pillow reads wrong"):
        data.open_picture(tmp_path / "planes.tif")
    (tmp_path / "bits.xbm").write_text("#define a_width 8\n#define a_height 1\nstatic char a_bits[] = { 0x0f };\n")
    with pytest.raises(ValueError, match="not a picture"):  # Pillow shows its negative
        data.open_picture(tmp_path / "bits.xbm")
    named = dict(inventory.unread(tmp_path, []))["bits.xbm"]
    assert named == ".xbm files are not read; convert it to PNG or JPEG"
    assert (opened(Image.fromarray(ramp.astype(np.uint8)), "grey.png") == ramp[..., None]).all()
    assert set(np.unique(opened(Image.fromarray(ramp > 100), "bits.png"))) == {0, 255}

    # Alpha is laid on white: half-transparent red is (255, 127, 127), and hidden colours do not show.
    half = opened(Image.new("RGBA", (16, 16), (255, 0, 0, 128)), "half.png")
    assert np.abs(half.astype(int) - (255, 127, 127)).max() <= 1
    assert (opened(Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "clear.webp", lossless=True) == 255).all()
    assert (opened(Image.new("LA", (16, 16), (0, 0)), "la.png") == 255).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (opened(palette, "palette.png") == (10, 20, 30)).all()
    assert (opened(palette, "clear.gif", transparency=1) == 255).all()
    assert (opened(palette, "clear-palette.png", transparency=1) == 255).all()
    key = Image.new("RGB", (16, 16), (1, 2, 3))
    assert (opened(key, "key.png", transparency=(1, 2, 3)) == 255).all()

    # CMYK: no ink is white, full black is black; files by Adobe store it inverted, which Pillow undoes.
    for name in ("white.jpg", "white.tif"):
        assert (opened(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), name) == 255).all()
    assert opened(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "black.jpg").max() <= 1
    assert (opened(Image.new("RGB", (16, 16), (0, 0, 255)).convert("YCbCr"), "ycbcr.tif")[..., 2] > 250).all()
    lab = ImageCms.applyTransform(
        Image.new("RGB", (16, 16), "red"),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert np.abs(opened(lab, "lab.tif").astype(int) - (255, 0, 0)).max() < 8  # 8-bit Lab is coarse

    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "lime", "blue")]
    for name, options in (("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True})):
        assert (opened(frames[0], name, save_all=True, append_images=frames[1:], **options) == (255, 0, 0)).all()
    Image.open(tmp_path / "white.jpg").save(tmp_path / "z.jpeg")
    said = inventory.describe(tmp_path, *data.scan(tmp_path), SMALL)
    assert "CMYK6.tif: CMYK without a color profile: its colors are a guess, and 4 more like it" in said
    assert "a.gif: 3 frames or pages: the first is read, and 2 more like it" in said


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
def test_orientation_is_applied_to_size_and_content(tmp_path, ending):
    """All eight EXIF orientations: the stored picture is the inverse turn of one reference. 0 and 9 mean nothing."""
    reference = Image.new("RGB", (48, 32), "black")
    reference.paste((255, 0, 0), (0, 0, 24, 16))
    reference.paste((0, 255, 0), (24, 0, 48, 16))
    reference.paste((0, 0, 255), (0, 16, 24, 32))
    turn = Image.Transpose
    undo = {0: None, 9: None, 1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
            5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}  # fmt: skip
    for orientation, method in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = reference.transpose(method) if method is not None else reference
        stored.save(tmp_path / f"{orientation}.{ending}", exif=exif, quality=95)
    pictures, rejected = data.scan(tmp_path)
    assert len(pictures) == 10 and rejected == []
    for p in pictures:
        assert (p.width, p.height) == (48, 32), p.name
        for minimum in (None, (6, 4)):  # also through reduced decoding
            image = data.open_picture(p.path, minimum)
            w, h = image.size
            corners = [image.getpixel((int(w * x), int(h * y))) for y in (0.25, 0.75) for x in (0.25, 0.75)]
            for got, expected in zip(corners, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)], strict=True):
                assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 30, (p.name, minimum)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken EXIF
def test_broken_exif_does_not_lose_a_picture(tmp_path):
    smooth((48, 32)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    pictures, rejected = data.scan(tmp_path)
    assert [(p.width, p.height) for p in pictures] == [(48, 32)] and rejected == []
    assert data.open_picture(pictures[0].path).size == (48, 32)


# ---- what was once silently wrong ------------------------------------------------------------------------------------

# Colourants and white of two usual profiles, in the XYZ of D50, with the gamma of each: enough for a matrix profile.
PROFILES = {
    "adobe": ([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 563 / 256),
    "p3": ([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)], 2.2),
}


def profile(name):
    """An ICC v2 display profile of three colourants and one gamma, as bytes."""
    columns, gamma = PROFILES[name]

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = name.encode() + b"\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78 + -len(text) % 4)
    tags = {b"desc": description, b"wtpt": xyz((0.9642, 1, 0.8249)), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    tags |= {kind + b"XYZ": xyz(c) for kind, c in zip((b"r", b"g", b"b"), columns, strict=True)}
    tags |= {kind + b"TRC": curve for kind in (b"r", b"g", b"b")}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for kind, content in tags.items():
        table += kind + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I", start + len(body)) + b"lcms\x02\x40\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return head + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + table + body


def in_profile(image, name):
    """An sRGB picture's colours, written in another space."""
    srgb, other = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile(name)))
    return ImageCms.profileToProfile(image, srgb, other, outputMode="RGB")


def muted(size, seed=0):
    """A picture whose colours all of the spaces hold."""
    x = np.asarray(smooth(size, seed).filter(ImageFilter.GaussianBlur(3)), float)
    return Image.fromarray((128 + 0.6 * (x - 128)).astype(np.uint8))


@pytest.mark.parametrize("name", PROFILES)
def test_training_pictures_are_brought_to_srgb(tmp_path, name):
    """One scene in two colour spaces is one picture: alone, and as a pair, which must not learn a colour shift."""
    high, low = tmp_path / "high", tmp_path / "low"
    high.mkdir(), low.mkdir()
    scene = muted((96, 96))
    scene.save(high / "a.png")
    stored = in_profile(scene, name)
    stored.save(low / "a.png", icc_profile=profile(name))
    difference = np.abs(np.asarray(stored, int) - np.asarray(scene, int))
    assert difference.mean() > 2, "or this would prove nothing"
    item = paired(data.scan(high)[0], low)[(0, 0)]
    assert (item["control"].int() - item["target"].int()).abs().max() <= 3
    degraded = Pairs(data.scan(low)[0], SMALL, lambda image, rng: image, 1, "restore")[(0, 0)]
    assert (degraded["target"].int() - item["target"].int()).abs().max() <= 3
    # Restored alone it keeps profile and numbers.
    assert (np.asarray(data.open_picture(low / "a.png")) == np.asarray(stored)).all()
    converted = np.asarray(data.open_picture(low / "a.png", to_srgb=True), int)
    assert np.abs(converted - np.asarray(scene, int)).max() <= 3


def test_profiles_that_do_not_fit_or_are_broken_are_ignored(tmp_path):
    scene = muted((64, 64))
    for name, content in (("broken", b"no profile"), ("cut", profile("adobe")[:200])):
        scene.save(tmp_path / f"{name}.png", icc_profile=content)
        assert (np.asarray(data.open_picture(tmp_path / f"{name}.png", to_srgb=True)) == np.asarray(scene)).all()
    # RGB profiles on pictures of other kinds: grey and CMYK stay what they were without one.
    for mode, ending in (("L", "png"), ("CMYK", "tif")):
        path = tmp_path / f"{mode}.{ending}"
        scene.convert(mode).save(path, icc_profile=profile("adobe"))
        assert (np.asarray(data.open_picture(path, to_srgb=True)) == np.asarray(data.open_picture(path))).all()
    # With alpha, with a palette, with 16 bits of grey, and turned: read as without `to_srgb`, then converted.
    alpha = scene.copy()
    alpha.putalpha(200)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {"alpha": (alpha, {}), "palette": (scene.quantize(64), {}), "turned": (scene, {"exif": exif})}
    for name, (image, options) in kinds.items():
        image.save(tmp_path / f"{name}.png", icc_profile=profile("p3"), **options)
        plain, converted = (data.open_picture(tmp_path / f"{name}.png", to_srgb=on) for on in (False, True))
        plain.save(tmp_path / "rgb.png", icc_profile=profile("p3"))
        expected = np.asarray(data.open_picture(tmp_path / "rgb.png", to_srgb=True), int)
        assert (np.asarray(converted) == expected).all(), name
        assert np.abs(np.asarray(plain, int) - expected).mean() > 2, name
    # Nothing is to be converted from sRGB itself.
    scene.save(tmp_path / "srgb.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert (np.asarray(data.open_picture(tmp_path / "srgb.png", to_srgb=True)) == np.asarray(scene)).all()


def with_chunk_behind_pixels(content, chunk):
    """A PNG with one more chunk between its pixels and its end."""
    end = content.rindex(b"IEND") - 4
    return content[:end] + chunk + content[end:]


def test_orientation_behind_the_pixels_of_a_png(tmp_path):
    image = Image.new("RGB", (48, 32), "black")
    image.paste((255, 0, 0), (0, 0, 24, 16))
    file = io.BytesIO()
    image.save(file, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf tiff:Orientation=\"6\"/></x:xmpmeta>"
    chunks = {"exif": png_chunk(b"eXIf", exif.tobytes()[6:]), "xmp": png_chunk(b"iTXt", xmp)}
    chunks["far"] = chunks["exif"] + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b" " * 60_000)
    for name, chunk in chunks.items():
        (tmp_path / f"{name}.png").write_bytes(with_chunk_behind_pixels(file.getvalue(), chunk))
    pictures, rejected = data.scan(tmp_path)
    assert rejected == [] and {(p.name, p.width, p.height) for p in pictures} == {(f"{n}.png", 32, 48) for n in chunks}
    for p in pictures:
        for minimum in (None, (16, 16)):
            upright = data.open_picture(p.path, minimum)
            assert upright.size == (32, 48) and upright.getpixel((24, 8)) == (255, 0, 0), p.name


def test_png_with_much_text_or_a_large_profile_is_read(tmp_path):
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 5_000_000))
    colours = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile("adobe") + bytes(3_000_000)))
    for name, chunk in (("text", text), ("profile", colours)):
        content = encoded("PNG")
        (tmp_path / f"{name}.png").write_bytes(content[:33] + chunk + content[33:])
    pictures, rejected = data.scan(tmp_path)
    assert rejected == [] and [p.name for p in pictures] == ["profile.png", "text.png"]
    assert all(data.open_picture(p.path).size == (64, 48) for p in pictures)


def test_pictures_of_188_megapixels_are_read_and_the_limit_can_be_raised(tmp_path):
    import subprocess
    import sys

    (tmp_path / "large.png").write_bytes(png_header(16000, 11750))
    pictures, rejected = data.scan(tmp_path)
    assert [(p.width, p.height) for p in pictures] == [(16000, 11750)] and rejected == []
    (tmp_path / "larger.png").write_bytes(png_header(30000, 30000))
    reason = dict(data.scan(tmp_path)[1])["larger.png"]
    assert "KONTEXT_MAX_PIXELS" in reason and "500,000,000" in reason

    code = "import pathlib, sys; from kontext_min import data; from kontext_min.extras import program; "
    code += "print(len(data.scan(pathlib.Path(sys.argv[1]))[0]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    for bad in ("inf", "0"):
        ran = subprocess.run(command, env=os.environ | {"KONTEXT_MAX_PIXELS": bad}, capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1
        assert ran.stderr.startswith(f"-c: KONTEXT_MAX_PIXELS: got {bad!r}, expected a number of pixels")
    ran = subprocess.run(command, env=os.environ | {"KONTEXT_MAX_PIXELS": "1e9"}, capture_output=True, text=True)
    assert ran.stdout.strip() == "2" and not ran.stderr


def test_picture_files_that_cannot_be_read_are_named_and_counted(tmp_path):
    for name in ("a.HEIC", "b.heic", "c.nef", "d.dng", "e.jxl", "f.svg", "g.eps", "scan.pdf", "film.mp4"):
        (tmp_path / name).write_bytes(b"whatever")
    for name, format in (("h.jpg_large", "JPEG"), ("i", "PNG"), ("j.sr2", "TIFF"), ("k.bak", "WEBP")):
        smooth((80, 80)).save(tmp_path / name, format)
    smooth((80, 80)).save(tmp_path / "z.png")
    pictures, rejected = data.scan(tmp_path)
    assert [p.name for p in pictures] == ["z.png"] and rejected == []
    rejected = inventory.unread(tmp_path, pictures)
    names, reasons = zip(*rejected, strict=True)
    assert names[:7] == ("a.HEIC", "b.heic", "c.nef", "d.dng", "e.jxl", "f.svg", "g.eps")
    assert names[7:] == ("h.jpg_large", "i", "j.sr2", "k.bak", "scan.pdf")
    assert all("convert it to PNG or JPEG" in reason for reason in (*reasons[:7], reasons[-1]))
    assert reasons[7:9] == tuple(
        f"a picture, but its ending is {ending}; rename or convert it" for ending in (".jpg_large", "missing")
    )
    text = inventory.describe(tmp_path, pictures, rejected, SMALL)
    assert "12 files left out (2 .heic, 1 .nef, 1 .dng, 1 .jxl, 1 .svg, 1 .eps, 1 .jpg_large, 1 other, 1 .sr2," in text


def test_every_other_file_is_counted(tmp_path):
    """A line says how many files of a folder nothing else names."""
    for name in ("a.dcm", "b.dcm", "c.pct", "notes.txt", "z.txt", "made/report.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"whatever")
    smooth((80, 80)).save(tmp_path / "z.png")
    assert inventory.others(tmp_path, {"z.png"}, {(tmp_path / "made").resolve()}) == [
        f"note: {tmp_path}: 5 other files (2 .dcm, 1 .pct, 2 .txt), not read as pictures or captions"
    ]
    for captions, said in ((True, "5 other files (2 .dcm, 1 .pct, 1 .txt, 1 .html)"), (False, "6 other files")):
        assert said in inventory.describe(tmp_path, data.scan(tmp_path)[0], [], SMALL, captions)
    assert inventory.unused(tmp_path, {"z.png"}, "input")[0].startswith(f"note: {tmp_path}: 6 other files")
    (tmp_path / "z.TXT").write_text("another")  # one of both is read
    assert "6 other files" in inventory.describe(tmp_path, data.scan(tmp_path)[0], [], SMALL)


def test_captions_under_other_names_are_named_and_counted(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "b.png", "sub/c.png", "d.png"):
        smooth((80, 80)).save(tmp_path / name)
    for name in ("a.jpg.txt", "b.caption", "sub/c.png.caption", "d.txt", "d.caption", "alone.txt", "alone.caption"):
        (tmp_path / name).write_text("a caption")
    smooth((80, 80)).save(tmp_path / "e.png")
    (tmp_path / "e.txt").write_text(" \n")
    pictures, rejected = data.scan(tmp_path)
    kept, small = data.usable(pictures, SMALL)
    assert rejected == small == [] and kept == pictures
    left_out = inventory.unread(tmp_path, kept)
    assert dict(left_out) == {
        "a.jpg.txt": "not read as a caption; rename it to a.txt",
        "b.caption": "not read as a caption; rename it to b.txt",
        "sub/c.png.caption": "not read as a caption; rename it to c.txt",
        "e.txt": "an empty caption; --prompt takes its place",
    }
    assert "4 files left out (2 .txt, 2 .caption)" in inventory.describe(tmp_path, kept, left_out, SMALL)
    assert Pairs(kept, SMALL, noisy, 1, "restore").prompts == ["restore", "restore", "a caption", "restore", "restore"]


def test_partners_of_no_picture_are_named_and_copies_refused(tmp_path, capsys):
    high, low = tmp_path / "high", tmp_path / "low"
    high.mkdir(), low.mkdir()
    for name in ("a.png", "b.png"):
        smooth((80, 80)).save(high / name)
        smooth((80, 80)).save(low / name)
    pictures, _ = data.scan(high)
    with pytest.raises(ValueError, match="holds copies of the clean pictures"):
        paired(pictures, low)
    for name in ("a.png", "b.png"):  # saved again: other bytes
        smooth((80, 80)).save(low / name, compress_level=1)
    for equal in (True, False):
        paired(pictures, low)
        assert ("all 2 that were looked at have the pixels of the clean pictures" in capsys.readouterr().out) == equal
        smooth((80, 80), 1).save(low / "b.png")
    for name in ("a.png", "b.png"):
        shutil.copy(high / name, low)

    def unused():
        return inventory.unused(low, {p.name for p in match(pictures, low)}, "usable clean picture")

    assert unused() == []
    for name in ("c.png", "d.heic", "e.png", "f.jpg"):
        (low / name).write_text("no picture")
    (low / "b.jpg").write_text("no picture")
    said = f"note: {low}: no usable clean picture goes with b.jpg, c.png, d.heic and 2 more"
    assert unused() == [said]
    smooth((80, 80), 9).save(low / "b.png")
    paired(pictures, low)
    assert "1 of 2 to train on are copies of the clean pictures" in capsys.readouterr().out
    (low / "a.png").unlink()
    (low / "a.heic").touch()
    with pytest.raises(ValueError, match=r"a\.png \(\.heic files are not read"):
        paired(pictures, low)


def test_pictures_to_train_and_to_validate_on_do_not_share_a_partner(tmp_path, capsys):
    for name in ("high", "low", "other"):
        (tmp_path / name).mkdir()
        smooth((80, 80), seed=len(name)).save(tmp_path / name / "a.png")
    pairs, held = (Pairs(data.scan(tmp_path / name)[0], SMALL, noisy, 1, "restore") for name in ("high", "other"))
    both = f"{held.pictures[0].path} and {pairs.pictures[0].path}"
    with pytest.raises(ValueError, match=rf"low/a\.png: goes with {both}; rename one"):
        pair_up(pairs, held, tmp_path / "low")
    _, again, lines = pair_up(pairs, pairs, tmp_path / "low")  # the same photograph
    assert again.partners[0].name == "a.png" and lines == []


def test_partners_of_a_mac_are_found_and_of_many_missing_ones_a_few_are_guessed(tmp_path, monkeypatch):
    for folder in ("hr", "lr"):
        (tmp_path / folder).mkdir()
    smooth((80, 80)).save(tmp_path / "hr" / "f\u00fcr.png"), smooth((80, 80), 1).save(tmp_path / "lr" / "fu\u0308r.png")
    pictures, _ = data.scan(tmp_path / "hr")
    assert [p.name for p in match(pictures, tmp_path / "lr")] == ["fu\u0308r.png"]
    smooth((80, 80), 1).save(tmp_path / "lr" / "IMG_07_rain.png")
    asked = []  # a guess compares a name with all others, which takes minutes for a thousand pictures
    monkeypatch.setattr(paired_folders.difflib, "get_close_matches", lambda *a: asked.append(a) or [])
    missing = [Picture(pictures[0].path, f"IMG_{k:02d}.png", 80, 80) for k in range(90)]
    with pytest.raises(ValueError, match=r"IMG_07\.png \(missing; is it 'IMG_07_rain\.png'\?\).* and 80 more"):
        match(missing, tmp_path / "lr")
    assert len(asked) == 9


def test_clean_pictures_that_share_a_partner_or_are_their_own_are_refused(tmp_path):
    high, low = tmp_path / "high", tmp_path / "low"
    high.mkdir(), low.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        smooth((80, 80)).save(high / name)
    for name in ("a.webp", "b.png"):
        smooth((80, 80)).save(low / name)
    pictures, _ = data.scan(high)
    with pytest.raises(ValueError, match=r"1 of 3 pictures .* a\.png \(shares a\.webp with a\.jpg\)"):
        paired(pictures, low)
    (tmp_path / "link").symlink_to(high)
    for same in (high, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"3 of 3 pictures .* a\.jpg \(the clean picture itself\)") as error:
            paired(pictures, same)
        assert "\n" not in str(error.value)


def test_a_link_to_itself_is_named_and_the_rest_is_used(tmp_path):
    smooth((80, 80)).save(tmp_path / "a.png")
    for name in ("loop.png", "loop"):
        (tmp_path / name).symlink_to(tmp_path / name)
    pictures, rejected = data.scan(tmp_path)
    assert [p.name for p in pictures] == ["a.png"]
    assert [name for name, _ in rejected + inventory.unread(tmp_path, pictures)] == ["loop.png", "loop"]


def test_a_picture_that_changes_its_shape_while_training_is_not_squashed(tmp_path):
    pictures = folder_of(tmp_path, [(100, 60)] * 2)
    pairs = Pairs(pictures, SMALL, noisy, 1, "restore")
    smooth((60, 100)).save(tmp_path / "000.png")
    item = StandIns(pairs)[(0, 0)]
    assert item["name"] == "001.png" and "000.png: is now 60 x 100" in item["unreadable"][0]


def test_too_little_shared_memory_is_a_line_and_no_hang(monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    # 2 pictures x 3 bytes x 1024^2 x 4 a batch are 25.2 MB; 2 workers have 4 on their way, and one is in use.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 64 << 20))
    with pytest.raises(ValueError, match=r"/dev/shm: 67 MB free, .* 126 MB .*--workers 0.*--shm-size") as error:
        checks.check_shared_memory([(64, 64), (1024, 1024)], 4, 2)
    assert "\n" not in str(error.value)
    checks.check_shared_memory([(1024, 1024)], 4, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 200 << 20))
    checks.check_shared_memory([(1024, 1024)], 4, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    checks.check_shared_memory([(1024, 1024)], 4, 2)  # one process, in a shell of another launcher
    monkeypatch.setattr(checks.parallel, "place", lambda: (0, 2))  # two processes share it
    with pytest.raises(ValueError, match=r"210 MB free, but 2 workers a process need 252 MB"):
        checks.check_shared_memory([(1024, 1024)], 4, 2)


# ---- crop ------------------------------------------------------------------------------------------------------------


def test_cover_crop_equals_resize_then_crop():
    image = smooth((600, 400))
    for size in ((96, 96), (128, 48), (48, 128), (240, 160), (700, 700)):
        scale = max(size[0] / 600, size[1] / 400)
        whole = image.resize((round(600 * scale), round(400 * scale)), Image.LANCZOS)
        x, y = (int(600 * scale) - size[0]) // 2, (int(400 * scale) - size[1]) // 2
        plain = np.asarray(whole.crop((x, y, x + size[0], y + size[1])), float)
        ours = np.asarray(cover_crop(image, size, None), float)
        # The plain way rounds the covering size to pixels, so that it is off by up to half a pixel at the far end.
        assert np.sqrt(((plain - ours) ** 2).mean()) < 4, size


def test_crop_is_never_squashed_and_reaches_every_place():
    x, y = np.meshgrid(np.linspace(0, 255, 501), np.linspace(0, 255, 301))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], axis=2).round().astype(np.uint8))
    lefts = []
    for seed in range(60):
        a = np.asarray(cover_crop(ramp, (96, 96), np.random.default_rng(seed)), float)
        across = np.diff(a[10:-10, 10:-10, 0], axis=1).mean() * 501
        down = np.diff(a[10:-10, 10:-10, 1], axis=0).mean() * 301
        assert abs(across / down - 1) < 0.02  # bytes: half a level of the 255 over 76 pixels
        lefts.append(round(a[:, 0, 0].mean() / 255 * 501 * 96 / 301))
    room = int(501 * 96 / 301 - 96)
    assert min(lefts) <= 2 and max(lefts) >= room - 2 and len(set(lefts)) > 25


def test_picture_of_bucket_size_is_not_resampled():
    image = smooth((120, 96))
    a = np.asarray(cover_crop(image, (96, 96), np.random.default_rng(3)))
    assert any((a == np.asarray(image)[:, x : x + 96]).all() for x in range(25))


def test_reduced_decoding_is_used_and_loses_nothing(tmp_path):
    source = Image.open(PHOTOS / "life.jpg").convert("RGB").resize((1600, 1200), Image.LANCZOS)
    source.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "a.jpg", quality=95)  # as sharp as a camera's pixels
    for size, shrunk in (((400, 300), 2), ((200, 150), 4), ((100, 75), 8), ((600, 450), 1)):
        image = data.open_picture(tmp_path / "a.jpg", size)
        assert image.size == (1600 // shrunk, 1200 // shrunk)
        full = np.asarray(cover_crop(data.open_picture(tmp_path / "a.jpg"), size, None), float)
        mse = ((np.asarray(cover_crop(image, size, None), float) - full) ** 2).mean()
        assert 10 * math.log10(255**2 / max(mse, 1e-9)) > 40
    exif = Image.Exif()
    exif[0x0112] = 6  # is seen as 1600 x 400
    Image.new("RGB", (400, 1600)).save(tmp_path / "upright.jpg", exif=exif)
    assert data.open_picture(tmp_path / "upright.jpg", (400, 100)).size == (800, 200)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_functions_of_seed_epoch_and_name(tmp_path):
    pictures = folder_of(tmp_path, [(100, 80), (80, 100), (90, 90), (200, 50)])
    pairs = Pairs(pictures, SMALL, noisy, 1, "restore")
    item = StandIns(pairs)[(3, 1)]
    assert item["control"].dtype == item["target"].dtype == torch.uint8
    assert item["prompt"] == "restore" and item["name"] == "001.png" and item["unreadable"] == []
    w, h = SMALL[pairs.bucket_of[1]]
    assert item["target"].shape == (3, h, w)
    again = Pairs(pictures[1:], SMALL, noisy, 1, "restore")[(3, 0)]  # other position, same picture
    assert torch.equal(item["control"], again["control"]) and torch.equal(item["target"], again["target"])
    others = [pairs[(4, 1)], Pairs(pictures, SMALL, noisy, 2, "restore")[(3, 1)]]
    assert not any(torch.equal(item["control"], other["control"]) for other in others)
    assert pairs[(5, 0)]["target"].float().std() > 5

    fixed = Pairs(pictures, SMALL, noisy, 1, "restore", train=False)
    for i in range(4):
        a, b = fixed[(0, i)], fixed[(7, i)]
        assert torch.equal(a["control"], b["control"]) and not torch.equal(a["control"], a["target"])
        centred = cover_crop(data.open_picture(pictures[i].path), SMALL[fixed.bucket_of[i]], None)
        assert torch.equal(a["target"], data.to_tensor(centred))
    x = data.to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32 and x.tolist() == [-1, 1]
    with pytest.raises(ValueError, match="no usable picture"):
        Pairs([], SMALL, noisy, 1, "restore")


def stream(pairs, sampler, workers, count):
    loader = torch.utils.data.DataLoader(
        StandIns(pairs), batch_sampler=sampler, num_workers=workers, collate_fn=data.collate
    )
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def test_same_batches_with_any_number_of_workers(tmp_path):
    pictures = folder_of(tmp_path, [(100, 80), (80, 100), (90, 90), (200, 50), (100, 80), (95, 76), (90, 90)])
    pairs = Pairs(pictures, SMALL, degrade.parse("blur=0.5:1,noise=0.05,jpeg=40:90@0.7"), 1, "restore")
    runs = [stream(pairs, BucketSampler(pairs.bucket_of, 2, 5), workers, 9) for workers in (0, 2)]
    runs.append([None] * 4 + stream(pairs, BucketSampler(pairs.bucket_of, 2, 5, start=4), 2, 5))  # resumed
    for k, (a, b, c) in enumerate(zip(*runs, strict=True)):
        for other in (b, c) if k >= 4 else (b,):
            assert a.keys() == {"control", "target", "prompt", "name", "unreadable"}
            assert a["name"] == other["name"] and len(a["name"]) == 2
            for key in ("control", "target"):
                assert torch.equal(a[key], other[key])


def test_captions(tmp_path):
    folder_of(tmp_path, [(64, 64)] * 3)
    (tmp_path / "000.txt").write_text("\ufeff a boat,\n on the sea \n", encoding="utf-8")
    (tmp_path / "001.TXT").write_text(" \n")
    pairs = Pairs(data.scan(tmp_path)[0], SMALL, noisy, 1, "restore")
    assert pairs.prompts == ["a boat, on the sea", "restore", "restore"]
    assert pairs[(0, 0)]["prompt"] == "a boat, on the sea"
    (tmp_path / "002.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"002\.txt: not UTF-8"):
        Pairs(data.scan(tmp_path)[0], SMALL, noisy, 1, "restore")


def test_picture_lost_while_training_is_replaced_and_named(tmp_path):
    sizes = [(100, 100)] * 6 + [(100, 60)] * 2
    pictures = folder_of(tmp_path, sizes)
    pairs = Pairs(pictures, SMALL, noisy, 1, "restore")
    before, stood_in = [pairs[(0, i)] for i in range(8)], StandIns(pairs)
    lost = ("002.png", "003.png", "006.png", "007.png")  # the last two are all of their bucket
    for name in lost:
        (tmp_path / name).unlink()
    (tmp_path / "003.png").write_bytes(b"no picture")
    for i in (2, 3, 6, 7):
        a, b = stood_in[(0, i)], stood_in[(0, i)]
        assert a["name"] == b["name"] not in lost and torch.equal(a["control"], b["control"])
        assert f"{i:03d}.png" in a["unreadable"][0] and a["prompt"] == "restore"
        assert a["target"].shape == before[i]["target"].shape
        assert i > 3 or pairs.bucket_of[int(a["name"][:3])] == pairs.bucket_of[i], "of the same bucket if there is one"
    assert torch.equal(pairs[(0, 0)]["control"], before[0]["control"])
    batch = data.collate([stood_in[(0, i)] for i in (1, 2, 3)])
    assert batch["control"].shape[0] == 3 and sum(map(len, batch["unreadable"])) >= 2
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(OSError, match="is the disk there"):
        stood_in[(0, 0)]


def test_a_link_to_a_folder_beside_it_gives_no_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "b")
    smooth((40, 30)).save(tmp_path / "b" / "x.png")
    assert [p.name for p in data.scan(tmp_path)[0]] == ["b/x.png"]


def test_pairs_that_lost_their_exif_or_profile_are_named(tmp_path):
    """As a script of three lines writes the degraded ones: open, filter, save."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    for name in ("hr", "lr"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for k, content in enumerate((profile("p3"), srgb, b"")):
        picture = Image.open(photos[k]).convert("RGB").resize((96, 64))
        picture.save(tmp_path / "hr" / f"{k}.png", icc_profile=content)
        picture.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "lr" / f"{k}.png")

    def lines():
        pairs = Pairs(data.scan(tmp_path / "hr")[0], SMALL, noisy, 1, "restore")
        return [line for line in pair_up(pairs, None, tmp_path / "lr")[2] if "color profile" in line]

    (line,) = lines()
    assert line.startswith(f"note: {tmp_path / 'lr'}: 1 of 3 lack the color profile of their clean pictures")
    for name in ("hr", "lr"):  # the same with a profile of gray
        content = linear_gray_profile() if name == "hr" else b""
        picture.convert("L").save(tmp_path / name / "1.png", icc_profile=content)
        picture.save(tmp_path / "hr" / "2.png")
    assert lines() == [line.replace("1 of 3", "2 of 3")]
    picture.convert("L").save(tmp_path / "lr" / "1.png", icc_profile=profile("p3"))  # which gray does not have
    picture.convert("L").save(tmp_path / "hr" / "1.png")
    assert lines()[1:] == [line]
    for name in ("hr", "lr"):
        picture.save(tmp_path / name / "1.png")
    exif[ExifTags.Base.Orientation] = 3
    picture.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "hr" / "2.png", exif=exif)  # as seen it is the same
    assert lines() == [line]
    picture.save(tmp_path / "hr" / "2.png", exif=exif)  # its partner was read without EXIF
    with pytest.raises(ValueError, match=r"1 of 1 pairs whose EXIF .* are turned against each other, such as 2\.png"):
        lines()
    Image.eval(Image.open(tmp_path / "lr" / "2.png"), lambda x: x // 8).save(tmp_path / "lr" / "2.png")  # a dark one
    with pytest.raises(ValueError, match="are turned against each other"):
        lines()
    picture.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "lr" / "2.png", exif=exif)  # turned, EXIF copied
    with pytest.raises(ValueError, match="are turned against each other"):
        lines()
    ImageOps.invert(picture).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "lr" / "2.png")  # a negative
    assert lines() == [line]
    picture.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "lr" / "2.png")  # alike again, and a file that breaks
    whole = (tmp_path / "lr" / "2.png").read_bytes()
    (tmp_path / "lr" / "2.png").write_bytes(whole[:900] + b"xxxx" + whole[904:])  # train.py leaves it out
    assert lines() == [line]


def test_partners_that_are_enlarged_or_shrunk_are_named(tmp_path):
    """Also those of pictures to validate on: they are scored with another damage than that of training."""
    rng = np.random.default_rng(0)

    def lines(*sides):
        for name, size in {"hr": [64] * 4, "lr": sides}.items():
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name).mkdir()
            for k, side in enumerate(size):
                noise = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / name / f"{k}.png")
        pictures = data.scan(tmp_path / "hr")[0]
        pairs, held = (Pairs(some, SMALL, noisy, 1, "restore") for some in (pictures[:2], pictures[2:]))
        return [line.partition("lr: ")[2].partition(",")[0] for line in pair_up(pairs, held, tmp_path / "lr")[2]]

    assert lines(64, 64, 64, 64) == []
    assert lines(64, 64, 64, 16) == ["1 of 4 are smaller than their bucket"]
    assert lines(16, 64, 64, 16) == ["2 of 4 are smaller than their bucket"]
    assert lines(128, 128, 64, 128) == ["shrunk 2.0 times to train"]


@pytest.mark.parametrize("how", ["record", "exif"])
def test_partners_that_are_restored_already_are_named(tmp_path, how):
    for name in ("hr", "lr"):
        (tmp_path / name).mkdir()
    pictures = folder_of(tmp_path / "hr", [(64, 64)] * 3)
    for k in range(3):
        exif = inventory.marked(Image.Exif()) if how == "exif" and k == 1 else None
        smooth((64, 64), k + 9).save(tmp_path / "lr" / f"00{k}.png", exif=exif)
    if how == "record":
        (tmp_path / "lr" / inventory.RECORD).write_text('{"picture": "001.png"}\n')
    pairs = Pairs(pictures, SMALL, noisy, 1, "restore")
    assert pair_up(pairs, None, tmp_path / "lr")[2] == [
        f"note: {tmp_path / 'lr'}: 1 of 3 are results of this program, such as 001.png; the LoRA learns to repair "
        "what is left in them"
    ]


def test_a_picture_of_one_color_is_left_out(tmp_path, capsys):
    """It shows nothing, or is read wrong: as 16 bits with an unknown white may be."""
    pictures = folder_of(tmp_path, [(64, 64)] * 3)
    pairs = Pairs(pictures, SMALL, noisy, 1, "restore")
    assert not StandIns(pairs)[(0, 0)]["unreadable"]
    for k in range(3):
        Image.new("RGB", (64, 64), (255, 250, 240)).save(pictures[k].path)
        item = StandIns(pairs)[(0, 0)]
        if k < 2:
            assert item["name"] not in [p.name for p in pictures[: k + 1]]
            assert "000.png: nearly one color; look at the file" in item["unreadable"]
    assert item["name"] == "000.png" and item["unreadable"] == [], "there is no other"
    pictures[0].path.write_bytes(b"broken")
    assert "000.png" in StandIns(pairs)[(0, 0)]["unreadable"][0]
    Image.new("RGB", (64, 64), (255, 250, 240)).save(pictures[0].path)
    assert len(held_out.load(pairs, torch.device("cpu"))) == 3
    assert capsys.readouterr().out.count("nearly one color; look at the file") == 3


def test_a_partner_of_one_color_is_left_out(tmp_path, capsys):
    for name in ("hr", "lr"):
        (tmp_path / name).mkdir()
    pictures, partners = (folder_of(tmp_path / name, [(64, 64)] * 3) for name in ("hr", "lr"))
    for p in partners:
        p.path.write_bytes(p.path.read_bytes() + b"\0")  # no copies
    Image.new("RGB", (64, 64)).save(partners[0].path)
    pairs = paired(pictures, tmp_path / "lr")
    item, line = StandIns(pairs)[(0, 0)], f"{partners[0].path}: nearly one color; look at the file"
    assert item["name"] != "000.png" and item["unreadable"] == [line]
    held_out.load(pairs, torch.device("cpu"))
    assert capsys.readouterr().out.count(line) == 1
    dark = np.zeros((64, 64, 3), np.uint8)  # a photograph of the night
    dark[20:40] = 2
    Image.fromarray(dark).save(partners[0].path)
    assert StandIns(pairs)[(0, 0)]["name"] == "000.png"


def test_a_failing_degradation_is_no_unreadable_picture(tmp_path):
    def fails(image, rng):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        StandIns(Pairs(folder_of(tmp_path, [(64, 64)] * 2), SMALL, fails, 1, "restore"))[(0, 0)]


def test_own_pairs_share_the_crop(tmp_path):
    high, low = tmp_path / "high", tmp_path / "low"
    for folder in (high, low):
        (folder / "sub").mkdir(parents=True)
    for name, size, other in (("a.png", (256, 200), "a.png"), ("sub/b.jpg", (200, 320), "sub/b.webp"),
                              ("c.png", (301, 200), "c.png")):  # fmt: skip
        clean = smooth(size, 4).filter(ImageFilter.GaussianBlur(2))
        clean.save(high / name, quality=98)
        factor = 4 if name == "a.png" else 3 if name == "c.png" else 1  # c: 100.33 x 66.67 is rounded
        control = clean.resize((round(size[0] / factor), round(size[1] / factor)), Image.LANCZOS)
        control.save(low / other, **({"lossless": True} if other.endswith("webp") else {}))
    pictures, _ = data.scan(high)
    pairs = paired(pictures, low)
    for epoch in range(6):
        for i in range(3):
            item = pairs[(epoch, i)]
            a, b = data.to_float(item["control"]).flatten(), data.to_float(item["target"]).flatten()
            assert item["control"].shape == item["target"].shape
            # The same place: a shift by two pixels, or a mirror image, would be below 0.9.
            assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.97, item["name"]

    # A large JPEG is decoded in full, or it would be shifted against its partner by part of a pixel.
    jpeg, png = high / "d.jpg", low / "d.png"
    smooth((1001, 803)).save(jpeg)
    Image.open(jpeg).save(png)
    item = paired([p for p in data.scan(high)[0] if p.name == "d.jpg"], low)[(0, 0)]
    assert torch.equal(item["control"], item["target"])

    (low / "a.png").unlink()
    smooth((100, 90)).save(low / "c.png")
    (low / "sub" / "b.webp").write_text("this is no picture")
    with pytest.raises(ValueError) as error:
        paired(pictures, low)
    assert "3 of 3" in str(error.value) and "a.png (missing)" in str(error.value)
    assert "sub/b.jpg (not a picture of a known format)" in str(error.value)
    assert "c.png (100 x 90 for 301 x 200)" in str(error.value) and "\n" not in str(error.value)


def test_describe(tmp_path):
    sizes = [(2000, 2000)] * 3 + [(3000, 2000)]
    pictures = [Picture(Path(f"{k}"), f"{k}", *size) for k, size in enumerate(sizes)]
    text = inventory.describe(tmp_path, pictures, [(f"{k}.jpg", "empty") for k in range(12)], data.PREFERRED)
    assert text.startswith("4 pictures in 2 of 17 buckets\n   1024 x 1024         3\n   1248 x 832          1\n")
    assert "12 files left out (12 .jpg)" in text and "9.jpg: empty" in text and "10.jpg" not in text
    assert text.endswith("... and 2 more")


# ---- order -----------------------------------------------------------------------------------------------------------


def take(sampler, count):
    batches = iter(sampler)
    return [next(batches) for _ in range(count)]


BUCKET_OF = np.random.default_rng(0).choice(5, size=101, p=[0.4, 0.3, 0.2, 0.08, 0.02]).tolist() + [7]


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (4, 1), (2, 2), (1, 3), (3, 4), (64, 2)])
def test_every_picture_once_an_epoch_and_the_ranks_share_it(batch, world):
    ranks = [BucketSampler(BUCKET_OF, batch, 3, rank, world) for rank in range(world)]
    alone = BucketSampler(BUCKET_OF, batch * world, 3)
    n = alone.batches_per_epoch
    assert n == sum(-(-count // (batch * world)) for count in np.bincount(BUCKET_OF)) == ranks[-1].batches_per_epoch
    streams = [take(sampler, 2 * n) for sampler in ranks]
    whole = take(alone, 2 * n)
    for k, expected in enumerate(whole):
        parts = [s[k] for s in streams]
        assert {len(part) for part in parts} == {batch}, "every batch of every rank is full"
        assert [place for part in parts for place in part] == expected, "the same places as one process, in order"
        assert len({BUCKET_OF[index] for _, index in expected}) == 1, "one shape"
    for epoch in range(2):
        batches = whole[epoch * n : (epoch + 1) * n]
        assert {e for b in batches for e, _ in b} == {epoch}
        counts = np.bincount([i for b in batches for _, i in b], minlength=102)
        for bucket in set(BUCKET_OF):
            members = np.flatnonzero(np.array(BUCKET_OF) == bucket)
            filled = -(-len(members) // (batch * world)) * batch * world
            assert counts[members].sum() == filled, "a bucket fills up its own last batch"
            # Repeated from its beginning: nobody is seen twice more than another.
            assert counts[members].min() >= 1 and counts[members].max() - counts[members].min() <= 1
    orders = [[i for b in take(BucketSampler(BUCKET_OF, 4, seed), 20) for _, i in b] for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_the_last_batch_is_filled_up_from_the_beginning_of_its_bucket():
    batches = [[i for _, i in b] for b in take(BucketSampler([0] * 5, 4, 3), 2)]
    assert any(end[1:] == start[:3] for start, end in (batches, batches[::-1])), batches


def test_order_changes_between_epochs_and_mixes_buckets():
    sampler = BucketSampler(BUCKET_OF, 4, 3)
    n = sampler.batches_per_epoch
    epochs = take(sampler, 2 * n)
    assert [b[0][1] for b in epochs[:n]] != [b[0][1] for b in epochs[n:]]
    shapes = [BUCKET_OF[b[0][1]] for b in epochs[:n]]
    assert shapes != sorted(shapes)
    partners = [{frozenset(i for _, i in b) for b in epochs[a : a + n] if len({*b}) == 4} for a in (0, n)]
    assert len(partners[0] & partners[1]) <= 1, "batches are made anew in every epoch"


def test_resume_at_any_batch_is_the_uninterrupted_stream():
    n = BucketSampler(BUCKET_OF, 3, 3, rank=1, world=2).batches_per_epoch
    whole = take(BucketSampler(BUCKET_OF, 3, 3, rank=1, world=2), 3 * n)
    for start in range(2 * n + 3):
        assert take(BucketSampler(BUCKET_OF, 3, 3, rank=1, world=2, start=start), 5) == whole[start : start + 5]


def test_sampler_of_100000_pictures_is_small_and_quick():
    import time
    import tracemalloc

    bucket_of = np.random.default_rng(0).integers(0, 17, 100_000)
    tracemalloc.start()
    start = time.perf_counter()
    next(iter(BucketSampler(bucket_of, 4, 1, start=10**9)))
    assert time.perf_counter() - start < 2, "jumping anywhere reads and generates nothing in between"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * len(bucket_of)  # bytes


# ---- cached latents --------------------------------------------------------------------------------------------------


def pooled(pictures):
    """A stand-in for the autoencoder: it keeps enough of a picture to recognise it."""
    return torch.nn.functional.avg_pool2d(data.to_float(pictures), 4)


def cached(root, cache, k, epochs, start=0, seed=1):
    """Check that everything a cached run sees is what a run without cache sees, and count the encoded variants."""
    pairs = Pairs(data.scan(root)[0], SMALL, noisy, seed, "restore")
    latents = CachedPairs(pairs, *cache, k)
    encoded = []
    unreadable = fill(latents, lambda x: encoded.append(len(x)) or pooled(x))
    sampler = BucketSampler(pairs.bucket_of, 2, 9, start=start)
    batches = stream(latents, sampler, 0, epochs * sampler.batches_per_epoch)
    for batch, places in zip(batches, sampler, strict=False):  # the sampler never ends
        for n, (epoch, index) in enumerate(places):
            expected = pairs[(epoch % k, index)]
            assert batch["name"][n] == expected["name"] and batch["prompt"][n] == expected["prompt"]
            for key in ("control", "target"):
                assert torch.equal(batch[key][n], pooled(expected[key][None])[0]), (key, epoch, index)
    assert unreadable == []
    return sum(encoded) // 2  # control and target


def test_no_latent_meets_another_pictures_caption_or_target(tmp_path):
    """Shuffled over epochs, resumed, with K changed, pictures added, changed and removed, other seeds, other keys."""
    root = tmp_path / "photos"
    root.mkdir()
    folder_of(root, [(100, 100), (101, 100), (100, 99), (120, 80), (121, 80), (80, 120)])
    for k in range(6):
        (root / f"{k:03d}.txt").write_text(f"caption of {k}")
    cache = (tmp_path / "latents", "noise 10, tiny autoencoder")
    assert cached(root, cache, 2, epochs=5) == 12
    assert cached(root, cache, 2, epochs=2, start=7) == 0  # resumed: nothing is encoded again
    assert cached(root, cache, 3, epochs=4) == 6  # variants 0 and 1 are those of before
    assert cached(root, cache, 1, epochs=2) == 0
    smooth((100, 100), 77).save(root / "0005.png")  # sorts between the others: all positions shift
    assert cached(root, cache, 3, epochs=4) == 3
    smooth((100, 100), 78).save(root / "001.png")
    assert cached(root, cache, 3, epochs=4) == 3
    (root / "000.png").unlink()
    (root / "002.png").rename(root / "000.png")  # another picture under a known name
    assert cached(root, cache, 3, epochs=4) == 3
    assert cached(root, cache, 2, epochs=3, seed=2) == 12
    assert cached(root, (tmp_path / "latents", "other weights"), 1, epochs=1) == 6
    (root / "003.txt").write_text("a new caption")
    assert cached(root, cache, 3, epochs=4) == 0  # captions are not in the cache


def test_latents_of_another_bucket_or_partner_are_others(tmp_path):
    """Over one cache: other sizes of the buckets, partners, none, and a partner whose file changes."""
    for k, name in enumerate(("hr", "lr", "lr2")):
        (tmp_path / name).mkdir()
        smooth((100, 100), 2 + k).save(tmp_path / name / "a.png")
    pictures, _ = data.scan(tmp_path / "hr")
    made = []

    def control(buckets=((64, 64),), lr=None):
        pairs = Pairs(pictures, list(buckets), noisy, 1, "restore")
        pairs = PairedFolders(pairs, tmp_path / lr) if lr else pairs
        latents = CachedPairs(pairs, tmp_path / "latents", "base", 1)
        fill(latents, lambda x: made.append(1) or pooled(x))
        item, plain = latents[(0, 0)], pairs[(0, 0)]
        assert torch.equal(item["control"], pooled(plain["control"][None])[0])
        assert torch.equal(item["target"], pooled(plain["target"][None])[0])

    control()
    control(buckets=[(32, 32)])
    control(lr="lr")
    control(lr="lr2")
    smooth((100, 100), 9).save(tmp_path / "lr" / "a.png")
    control(lr="lr")
    assert len(made) == 10  # control and target of five
    control(), control(lr="lr2")
    assert len(made) == 10


def test_broken_latents_are_made_again_and_lost_ones_replaced(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    pictures = folder_of(root, [(100, 100)] * 4)
    cache = (tmp_path / "latents", "base")
    assert cached(root, cache, 2, epochs=1) == 8
    files = sorted((tmp_path / "latents").rglob("*.safetensors"))
    assert len(files) == 8 and files[0].parent.parent.parent == tmp_path / "latents"
    files[0].write_bytes(files[0].read_bytes()[:-10])
    files[1].write_bytes(b"")
    files[2].unlink()
    files[3].write_bytes(files[4].read_bytes())  # another picture's latents
    save_file({"control": torch.zeros(1)}, files[5])
    assert cached(root, cache, 2, epochs=2) == 5
    assert not list((tmp_path / "latents").rglob("*.tmp"))

    latents = CachedPairs(Pairs(pictures, SMALL, noisy, 1, "restore"), *cache, 2)
    files = [latents.file(latents.key(1, i)) for i in range(4)]
    files[2].unlink()
    item = StandIns(latents)[(3, 2)]
    assert item["name"] != "002.png" and "002.png: its latents of variant 1" in item["unreadable"][0]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (os.open(os.devnull, os.O_RDONLY), limits[1]))  # no more files
    try:
        with pytest.raises(data.UnreadableError, match=r"001\.png: its latents of variant 1"):
            latents.read(1, 1, latents.buckets[latents.bucket_of[1]])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert files[1].exists()  # nothing is wrong with it
    assert latents.read(1, 1, latents.buckets[latents.bucket_of[1]])

    (root / "003.png").unlink()  # vanishes between scan and fill: is reported, and nobody else is stored for it
    files[3].unlink()
    for again in (latents, CachedPairs(latents.pairs, *cache, 2)):
        stored = len(list((tmp_path / "latents").rglob("*.safetensors")))
        unreadable = fill(again, pooled)
        assert unreadable and all("003.png" in line for line in unreadable)
        assert files[2].exists() and not files[3].exists()
        assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == stored + (again is latents)


def test_a_blank_page_that_nothing_can_stand_in_for_is_named_before_the_run(tmp_path):
    pictures = folder_of(tmp_path, [(100, 100)] * 2 + [(300, 100)])
    Image.new("RGB", (300, 100), "white").save(tmp_path / "002.png")
    latents = CachedPairs(Pairs(pictures, SMALL, noisy, 1, "restore"), tmp_path / "latents", "base", 1)
    with pytest.raises(
        ValueError, match=r"^--cache-latents: 002\.png: nearly one color.*no other picture has its shape"
    ):
        fill(latents, pooled)
    assert StandIns(latents)[(0, 0)]["name"] == "000.png"


def test_a_picture_that_changes_while_latents_are_made_is_not_kept_under_the_old_ones_key(tmp_path):
    (tmp_path / "photos").mkdir()
    pictures = folder_of(tmp_path / "photos", [(100, 100)] * 3)
    latents = CachedPairs(Pairs(pictures, SMALL, noisy, 1, "restore"), tmp_path / "latents", "base", 1)
    shutil.copyfile(pictures[1].path, pictures[2].path)
    assert fill(latents, pooled) == ["002.png: was changed since the start"]
    assert [latents.file(latents.key(0, i)).exists() for i in range(3)] == [True, True, False]


def test_latents_cut_at_any_byte_are_made_again(tmp_path):
    latents = CachedPairs(Pairs(folder_of(tmp_path, [(64, 64)]), SMALL, noisy, 1, "restore"), tmp_path / "l", "base", 1)
    fill(latents, pooled)
    file = latents.file(latents.key(0, 0))
    content = file.read_bytes()
    for cut in (*range(0, 400, 7), *range(400, len(content), 97), len(content) - 1):
        file.write_bytes(content[:cut])
        assert latents.stored(latents.key(0, 0)) is None, cut
    fill(latents, pooled)
    assert file.read_bytes() == content
    flipped = bytearray(content)
    flipped[-2] ^= 1
    file.write_bytes(flipped)
    assert latents.stored(latents.key(0, 0)) is None
    save_file(load_file(file), file, {"key": latents.key(0, 0)})  # as before there was a checksum
    assert latents.stored(latents.key(0, 0), header_only=True) is None


@pytest.mark.parametrize("place", [0, 20_000, 95_000])
def test_a_changed_picture_of_the_same_size_and_time_has_other_latents(tmp_path, place):
    """An uncompressed picture, in which a change leaves the rest of the file as it was."""
    picture = smooth((64, 500))
    picture.save(tmp_path / "a.bmp")
    before, state = content_mark(tmp_path / "a.bmp"), os.stat(tmp_path / "a.bmp")
    changed = bytearray((tmp_path / "a.bmp").read_bytes())
    for k in range(place, place + 1000 if place else 1000):
        changed[k] ^= 255
    (tmp_path / "a.bmp").write_bytes(changed)
    os.utime(tmp_path / "a.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    after = os.stat(tmp_path / "a.bmp")
    assert (after.st_size, after.st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert content_mark(tmp_path / "a.bmp") != before


def test_several_processes_fill_the_cache_together(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    pictures = folder_of(root, [(100, 100)] * 5)
    pairs = Pairs(pictures, SMALL, noisy, 1, "restore")
    fill(CachedPairs(pairs, tmp_path / "one", "base", 2), pooled)
    lists = [[], []]
    # Each process lists what is missing before any has written, as they do when they start together.
    for rank in range(2):
        part = CachedPairs(pairs, tmp_path / f"rank{rank}", "base", 2)
        fill(part, pooled, rank=rank, world=2, report=lambda done, total, r=rank: lists[r].append((done, total)))
    names = [{f.name for f in (tmp_path / f).rglob("*.safetensors")} for f in ("one", "rank0", "rank1")]
    assert names[1] | names[2] == names[0] and not names[1] & names[2]
    assert lists == [[(k + 1, n) for k in range(n)] for n in (6, 4)]  # 3 and 2 pictures of 2 variants
