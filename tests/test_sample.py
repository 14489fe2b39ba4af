"""sample.py: a picture or a folder in, the same names, sizes and metadata out; bad input named in one line."""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import large_bench
import processes
import sample
import train
from kontext_min import data, degrade
from kontext_min.checkpoints import Stored, find, load_flux
from kontext_min.extras import base, checks, fidelity, folders, metrics, pictures
from kontext_min.extras.inventory import marked
from kontext_min.extras.lora_files import lora_bytes, save_lora
from kontext_min.extras.method import HOW, made_with, method_of
from kontext_min.extras.progress import Progress
from kontext_min.extras.scores import Scores
from kontext_min.extras.validation import GAP
from kontext_min.lora import add_lora, lora_layers
from test_loop import HOLD
from test_report import data_of

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "tests" / "photos" / "bowl.jpg"
TINY, GOLDEN = ROOT / "weights" / "tiny", ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def small(tmp_path_factory, small_bundle):
    """A small photograph and a LoRA whose header says what it was trained for."""
    folder = tmp_path_factory.mktemp("sample")
    Image.open(PHOTO).convert("RGB").crop((300, 300, 375, 351)).save(folder / "in.png")
    flux = load_flux(small_bundle, dtype=torch.float32)
    add_lora(flux, rank=2)
    about = {"objective": "bridge", "context": False, "source_noise": 0.1, "start_time": 1.0, "guidance": 2.0,
             "prompt": "Remove the noise from this photo.", "resolution": 64}  # fmt: skip
    save_lora(flux, folder / "lora.safetensors", metadata={"kontext_min": json.dumps(about)})
    return folder


def run(*flags: object) -> int:
    return sample.main([str(f) for f in flags])


def test_a_picture_comes_back_at_its_own_size(small, small_bundle, tmp_path, capsys):
    args = ["--input", small / "in.png", "--steps", 1]
    assert run(*args, "--output", tmp_path / "out.png") == 0  # by weights/tiny
    assert Image.open(tmp_path / "out.png").size == (75, 51)
    args += ["--weights", small_bundle]
    assert run(*args, "--output", tmp_path / "out.jpg", "--lora", small / "lora.safetensors") == 0
    assert "75x51, bridge, 1 network evaluations, euler" in capsys.readouterr().out
    flags = ["--degrade", "guide", "--compare", "--lora", f"{small / 'lora.safetensors'}=0.5", "--tile", 32]
    assert run(*args, *flags, "--output", tmp_path / "three.png") == 0
    assert Image.open(tmp_path / "three.png").size == (3 * 75 + 8, 51)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["input,", "restored", "PSNR", "PSNR-Y", "SSIM", "texture"]
    assert lines[-2].split()[0] == "in.png" and len(lines[-2].split()) == 9
    assert run(*args, "--output", tmp_path / "k.png", "--objective", "kontext", "--solver", "heun") == 0
    assert "kontext, 2 network evaluations, heun" in capsys.readouterr().out
    for objective, method in (
        ("bridge", "4 network evaluations, midpoint"),
        ("kontext", "28 network evaluations, euler"),
    ):
        flags = ["--input", small / "in.png", "--output", tmp_path / f"{objective}.png", "--weights", small_bundle]
        assert run(*flags, "--objective", objective) == 0
        assert method in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nothing.jpg", "--output", "o.png"], "nothing.jpg"),
        (["--input", "{text}", "--output", "o.png"], "not a picture"),
        (["--input", "{cut}", "--output", "o.png"], "cut.jpg"),
        (["--output", "no/such/folder/o.png"], "no such folder for --output"),
        (["--output", "{here}/o.xyz"], "unknown picture format"),
        (["--output", "{here}/o.png", "--weights", "weights/nowhere"], "weights/nowhere"),
        (["--output", "{here}/o.png", "--vae", "{lora}"], "It looks like a LoRA"),
        (["--output", "{here}/o.png", "--lora", "{weights}"], "it is no LoRA"),
        (["--output", "{here}/o.png", "--lora", "nowhere.safetensors"], "no such LoRA file"),
        (["--output", "{here}/o.png", "--lora", "{lora}", "--objective", "kontext"], "was trained for bridge"),
        (["--output", "{here}/o.png", "--degrade", "blurr=2"], "blurr"),
        (["--output", "{here}/o.png", "--steps", "-1"], "expected at least 1"),
        (["--output", "{here}/o.png", "--device", "quantum"], "--device"),
        (["--output", "{here}/o.png", "--device", "x" * 9999], "xxx ... xxx"),
        (["--output", "{here}/o.png", "--lora", "a\n\x1b[31m\u202e"], "a\\n\\x1b[31m\\u202e"),
        (["--output", "{here}/o.png", "--prompt", "\udc80"], "--prompt '\\udc80': expected text in UTF-8"),
        (["--output", "{here}/o.png", "--degrade", "noise=0"], "--degrade noise=0: changes nothing"),
        (["--output", "{here}/new"], "use .png, .jpg, .webp or .tif, or an existing folder"),
        (["--input", "{cut}", "--output", "o.png", "--reference", "{cut}"], "cut.jpg: is --input or a copy of it"),
        (["--output", "/proc/o.png", "--steps", "1"], "/proc"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(small, small_bundle, tmp_path, capsys, flags, message):
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "cut.jpg").write_bytes(PHOTO.read_bytes()[:20_000])
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    names = {"text": tmp_path / "text.jpg", "cut": tmp_path / "cut.jpg", "here": tmp_path,
             "weights": tmp_path / "weights.safetensors", "lora": small / "lora.safetensors"}  # fmt: skip
    flags = [f.format(**names) for f in flags]
    if "--input" not in flags:
        flags = ["--input", str(small / "in.png"), *flags]
    assert (
        run(
            "--weights",
            small_bundle,
            *flags,
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sample.py: ")
    assert message in error


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "default: 4, kontext 28" in text and "{none,wavelet,adain}" in text
    for name in sample.Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


# -------------------------------------------------------------------------------------------------------------- folders


def crop(width, height, k=0):
    return Image.open(PHOTO).convert("RGB").crop((200 + k, 200 + k, 200 + k + width, 200 + k + height))


BROKEN = {
    "cut.jpg": lambda whole: whole[: len(whole) // 2],
    "text.jpg": lambda _: b"this is no picture",
    "sub/empty.png": lambda _: b"",
    "sub/zeros.jpg": lambda whole: bytes(len(whole)),
    "head.jpeg": lambda whole: whole[:20],
    "cut.png": None,
    "one.png": None,
    "sub/thin.webp": None,
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """50 files in three folders: 42 pictures of six kinds and seven shapes, 8 that are none. And a note in words."""
    folder = tmp_path_factory.mktemp("mixed") / "in"
    (folder / "sub" / "Über").mkdir(parents=True)
    kinds = [("jpg", {}), ("PNG", {}), ("webp", {}), ("tif", {}), ("jpeg", {"quality": 60}), ("gif", {})]
    for k in range(42):
        ending, options = kinds[k % 6]
        picture = crop(24 + 5 * (k % 7), 40 - 3 * (k % 7), k)
        picture = [picture, picture.convert("L"), picture.convert("CMYK")][k % 3 if ending == "jpg" else 0]
        picture.save(folder / ["", "sub", "sub/Über"][k % 3] / f"{k:02d} photo.{ending}", **options)
    crop(40, 40).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    crop(40, 40).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:500])
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("RGB", (90, 3)).save(folder / "sub" / "thin.webp")
    for name, spoil in BROKEN.items():
        if spoil:
            (folder / name).write_bytes(spoil(whole))
    (folder / "notes.txt").write_text("no picture, and passed over")
    assert sum(f.is_file() for f in folder.rglob("*")) == 51
    return folder


@pytest.fixture
def identity(monkeypatch):
    """sample.py with networks that change nothing: what comes out is what the files' handling makes of the input."""
    seen = []

    def restore_latent(image, *_, **options):
        seen.append({"shape": tuple(image.shape), **options})
        return image

    monkeypatch.setattr(sample, "restore_latent", restore_latent)
    monkeypatch.setattr(sample, "decode", lambda autoencoder, z, *_: z.clone())
    monkeypatch.setattr(sample, "shared_norms", lambda *_: contextlib.nullcontext())
    return seen


def test_a_folder_of_fifty_with_eight_broken(mixed, small_bundle, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--input", mixed, "--output", out, "--weights", small_bundle, "--steps", 1]
    assert run(*args) == 1
    said = capsys.readouterr()
    assert "42 restored, 0 there before, 8 not restored, bridge, 1 network evaluations, euler" in said.out
    assert "picture 1 of 42, " in said.out and re.search(r"[\d.]+ s a megapixel", said.out)
    for name in BROKEN:
        assert sum(line.startswith(f"not restored: {name}: ") for line in said.err.splitlines()) == 1, name
    names = {p.name for p in data.scan(mixed)[0]}
    made = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} - {folders.RECORD, ".lock"}
    assert made == {name + ".png" * name.endswith(".gif") for name in names} and len(made) == 42
    for name in names:
        with Image.open(mixed / name) as before, Image.open(out / (name + ".png" * name.endswith(".gif"))) as after:
            assert before.size == after.size
            assert after.format == {"gif": "PNG"}.get(name[-3:], before.format)

    times = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    assert run(*args) == 1  # the broken ones are still there
    said = capsys.readouterr()
    assert "all 42 pictures are there already" in said.out and said.err.count("not restored") == 8
    assert times == {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    gone = out / "01 photo.PNG" if (out / "01 photo.PNG").exists() else out / "sub" / "01 photo.PNG"
    kept = Image.open(gone).tobytes()
    gone.unlink()
    assert run(*args) == 1
    assert "1 restored, 41 there before, 8 not restored" in capsys.readouterr().out
    again = np.frombuffer(Image.open(gone).tobytes(), np.uint8).astype(int)
    assert np.array_equal(again, np.frombuffer(kept, np.uint8))


def test_overwrite_and_an_output_inside_the_input(identity, small_bundle, tmp_path, capsys):
    crop(32, 32).save(tmp_path / "a.png")
    args = ["--input", tmp_path, "--output", tmp_path / "restored", "--weights", small_bundle]
    assert run(*args) == 0
    assert run(*args, "--overwrite") == 0
    assert len(identity) == 2  # what was restored is not taken for an input
    assert sorted(f.name for f in (tmp_path / "restored").iterdir()) == [".lock", folders.RECORD, "a.png"]


def test_a_failing_picture_is_counted_and_a_full_disk_stops(identity, small_bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for k in range(3):
        crop(32, 32, k).save(tmp_path / "in" / f"{k}.png")
    write = pictures.write

    def refuse(path, *args, number=22):
        if path.name == "1.png":
            raise OSError(number, "this one not")
        write(path, *args)

    monkeypatch.setattr(pictures, "write", refuse)
    args = [
        "--input",
        tmp_path / "in",
        "--weights",
        small_bundle,
    ]
    assert run(*args, "--output", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "2 restored, 0 there before, 1 not restored" in said.out and "not restored: 1.png: " in said.err
    monkeypatch.setattr(pictures, "write", lambda *a: refuse(*a, number=28))
    assert run(*args, "--output", tmp_path / "full") == 2
    assert not (tmp_path / "full" / "2.png").exists()


# ------------------------------------------------------------------------------------------------------ what files hold


def with_metadata(path, mode="RGB", **options):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "Leica", 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "1999:12:31 23:59:59"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    crop(60, 40).convert(mode).save(path, exif=exif, icc_profile=profile, dpi=(300, 300), **options)
    return profile


@pytest.mark.parametrize(("ending", "target"), [("jpg", "jpg"), ("png", "png"), ("webp", "webp"), ("jpg", "webp")])
def test_orientation_is_applied_and_metadata_kept(identity, small_bundle, tmp_path, ending, target):
    profile = with_metadata(tmp_path / f"in.{ending}", **({"lossless": True} if ending == "webp" else {}))
    args = [
        "--weights",
        small_bundle,
    ]
    assert run("--input", tmp_path / f"in.{ending}", "--output", tmp_path / f"out.{target}", *args) == 0
    with Image.open(tmp_path / f"in.{ending}") as before, Image.open(tmp_path / f"out.{target}") as after:
        assert after.size == (40, 60)  # upright
        exif = after.getexif()
        assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.Make] == "Leica"
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "1999:12:31 23:59:59"
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
        assert after.info["icc_profile"] == profile
        if target != "webp":
            assert after.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        elif ending != "webp":
            assert (exif[ExifTags.Base.XResolution], exif[ExifTags.Base.ResolutionUnit]) == (300, 2)
        upright = ImageOps.exif_transpose(before).convert("RGB")
        difference = np.abs(np.asarray(upright).astype(int) - np.asarray(after.convert("RGB")))
        assert difference.max() == 0 if target == "png" else difference.mean() < 4


def test_transparency_passes_through(identity, small_bundle, tmp_path, capsys):
    picture = crop(48, 32)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size).point(lambda a: max(a - 40, 0)))
    picture.save(tmp_path / "in.png")
    args = [
        "--input",
        tmp_path / "in.png",
        "--weights",
        small_bundle,
    ]
    assert run(*args, "--output", tmp_path / "out.png") == 0
    assert "transparency" in capsys.readouterr().err
    before, after = np.asarray(picture), np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(before[..., 3], after[..., 3])
    seen = before[..., 3] > 0
    assert np.array_equal(before[seen], after[seen])  # straight colours: not laid on white and then made transparent
    assert (after[~seen][:, :3] == 255).all() and (~seen).any()
    assert run(*args, "--output", tmp_path / "out.jpg") == 0
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    assert metrics.psnr(Image.open(tmp_path / "out.jpg").convert("RGB"), on_white) > 35


@pytest.mark.parametrize(
    "kind", ["16-bit grey", "16-bit colour", "grey profile", "frames", "broken EXIF", "opaque alpha", "plain"]
)
def test_what_is_not_kept_is_said_in_one_line(identity, small_bundle, tmp_path, capsys, monkeypatch, kind):
    file, grey = tmp_path / "in.png", np.asarray(crop(40, 30).convert("L"), dtype=np.uint16) * 257
    if kind == "16-bit grey":
        Image.fromarray(grey).save(file)
    elif kind == "16-bit colour":
        write_png16(file, np.stack([grey] * 3, axis=-1))
    elif kind == "grey profile":
        profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        profile[16:20] = b"GRAY"
        crop(40, 30).convert("L").save(file, icc_profile=bytes(profile))
    elif kind == "frames":
        crop(40, 30).save(file, save_all=True, append_images=[crop(40, 30, 9)])
    elif kind == "broken EXIF":
        crop(40, 30).save(file)
        monkeypatch.setattr(Image.Image, "getexif", lambda self: 1 / 0)
    else:
        crop(40, 30).convert("RGBA" if kind == "opaque alpha" else "RGB").save(file)
    assert (
        run(
            "--input",
            file,
            "--output",
            tmp_path / "o.png",
            "--weights",
            small_bundle,
        )
        == 0
    )
    words = {"16": "8 bits", "gr": "GRAY color profile", "fr": "2 frames", "br": "EXIF", "op": "", "pl": ""}[kind[:2]]
    error = capsys.readouterr().err
    assert error.count("\n") == bool(words) and words in error
    with Image.open(tmp_path / "o.png") as made:
        assert made.mode == "RGB" and "icc_profile" not in made.info
        if kind.startswith("16"):  # scaled, not clipped
            assert np.abs(np.asarray(made)[..., 0].astype(int) - grey // 257).max() <= 1


def write_png16(file, array):
    """An RGB PNG of 16 bits, which Pillow reads but doesn't write."""
    import struct
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    h, w, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


# ------------------------------------------------------------------------------------------------ what flags come to do


def test_sizes_to_restore_at(identity, small_bundle, tmp_path):
    crop(90, 60).save(tmp_path / "in.png")
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "o.png", "--weights", small_bundle]
    for flags, shape in [((), (60, 90)), (("--resolution", 147), (120, 180))]:
        assert run(*args, "--overwrite", *flags) == 0
        assert identity[-1]["shape"] == (1, 3, *shape)
        assert Image.open(tmp_path / "o.png").size == (90, 60)


def test_dials_reach_the_network(identity, small_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "pulled", lambda w, s: ("pulled", w, s))
    crop(32, 32).save(tmp_path / "in.png")
    flags = ["--strength", 0.5, "--fidelity", 0.25, "--seed", 7, "--tile", 32]
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "o.png", "--weights", small_bundle, *flags]
    assert run(*args) == 0
    (seen,) = identity
    apply = seen.pop("apply")
    assert apply.side * apply.factor == 32
    assert seen == {"shape": (1, 3, 32, 32), "strength": 0.5, "pull": ("pulled", 0.25, 0.5), "seed": 7}


def test_compiled_blocks_are_what_runs(small_bundle, tmp_path, monkeypatch, capsys):
    """The graphs themselves are checked in test_compile.py."""
    compiled = []

    def compiler(forward, **how):
        assert how == {"backend": "inductor", "fullgraph": True, "dynamic": True}
        return lambda *args: compiled.append(forward) or forward(*args)

    monkeypatch.setattr(torch, "compile", compiler)
    (tmp_path / "in").mkdir()
    for name, side in (("a.png", 32), ("b.png", 64)):
        crop(side, side).save(tmp_path / "in" / name)
    args = ["--input", tmp_path / "in", "--weights", small_bundle, "--steps", 1]
    for output, *more in (("plain",), ("compiled", "--compile"), ("streamed", "--compile", "--stream")):
        compiled.clear()
        assert run(*args, "--output", tmp_path / output, *more) == 0
        assert len(compiled) == (2 * len(set(compiled)) if more else 0) and bool(compiled) == bool(more)
        assert capsys.readouterr().out.count("compiled; the first pass took") == bool(more)
        for name in ("a.png", "b.png"):  # the same but for the last block, which then computes every token
            got, plain = (np.asarray(Image.open(tmp_path / o / name)).astype(int) for o in (output, "plain"))
            assert np.abs(got - plain).max() <= 1


def test_colour_fix(small_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "restore_latent", lambda image, *_, **__: image // 2)
    monkeypatch.setattr(sample, "decode", lambda autoencoder, z, *_: z)
    crop(64, 64).save(tmp_path / "in.png")
    means = []
    for fix in ("none", "wavelet", "adain"):
        args = ["--input", tmp_path / "in.png", "--output", tmp_path / "o.png", "--color-fix", fix, "--overwrite"]
        assert run(*args, "--weights", small_bundle) == 0
        means.append(np.asarray(Image.open(tmp_path / "o.png")).mean() / np.asarray(crop(64, 64)).mean())
    assert means == pytest.approx([0.5, 1, 1], abs=0.02)


def test_degradation_depends_on_seed_and_name(identity, small_bundle, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        crop(32, 32).save(tmp_path / "in" / name)
    args = ["--weights", small_bundle, "--degrade", "noise=0.1"]
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", *args) == 0
    assert run("--input", tmp_path / "in" / "b.png", "--output", tmp_path / "b.png", *args) == 0
    assert run("--input", tmp_path / "in" / "b.png", "--output", tmp_path / "c.png", *args, "--seed", 1) == 0
    a, b, alone, other = (
        np.asarray(Image.open(tmp_path / f)).astype(int) for f in ("out/a.png", "out/b.png", "b.png", "c.png")
    )
    assert np.array_equal(b, alone) and not np.array_equal(a, b) and not np.array_equal(b, other)
    expected = degrade.parse("noise=0.1")(crop(32, 32), data.numpy_generator(42, "degrade", 0, "b.png"))
    assert np.array_equal(b, np.asarray(expected))


# --------------------------------------------------------------------------------------------------- what the LoRA does

ABOUT = {"objective": "bridge", "context": False, "source_noise": 0.1, "start_time": 1.0, "guidance": 2.0,
         "prompt": "Remove the noise from this photo.", "resolution": 64}  # fmt: skip


@pytest.fixture(scope="module")
def pixels(small_bundle, tmp_path_factory):
    """pixels(flags, about, lora): bytes that sample.py makes with a LoRA that does something, of the given header."""
    folder = tmp_path_factory.mktemp("lora")
    crop(40, 32).save(folder / "in.png")
    flux = load_flux(small_bundle, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in add_lora(flux, rank=2):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    @functools.cache
    def made(flags, about, lora):
        save_lora(flux, folder / "lora.safetensors", metadata={"kontext_min": about})
        args = [
            "--input",
            folder / "in.png",
            "--output",
            folder / "out.png",
            "--steps",
            2,
            "--overwrite",
        ]
        loras = ["--lora", lora.format(folder / "lora.safetensors")] if lora else []
        assert run(*args, "--weights", small_bundle, *loras, *flags) == 0
        return np.asarray(Image.open(folder / "out.png")).astype(int)

    return lambda *flags, about=ABOUT, lora="{}": made(flags, json.dumps(about), lora)


def differ(a, b):
    return a.shape != b.shape or np.abs(a - b).mean() > 0.1  # of 255; equal runs are equal to the last bit


@pytest.mark.parametrize("name", ["prompt", "guidance", "source_noise", "context", "start_time", "objective"])
def test_each_default_comes_from_the_header(pixels, name):
    """Another header, other pixels; and where there is a flag, it brings the first ones back."""
    other = {"prompt": "Remove the blur from this photo.", "guidance": 6.0, "source_noise": 0.5, "context": True,
             "start_time": 0.6, "objective": "kontext"}  # fmt: skip
    about = ABOUT | {name: other[name]}
    if name == "objective":
        about["source_noise"] = 0.0
    assert differ(pixels(), pixels(about=about))
    if name in ("prompt", "guidance"):
        assert np.array_equal(pixels(), pixels(f"--{name}", ABOUT[name], about=about))
        assert np.array_equal(pixels(f"--{name}", other[name]), pixels(about=about))


def test_a_prompt_that_was_not_trained_is_said(pixels, capsys):
    other = "Upscale the haze"
    for about, prompt, said in (
        (ABOUT | {"strange": 1}, ABOUT["prompt"], False),
        (ABOUT | {"strange": 2}, other, True),
        (ABOUT | {"prompts": [other]}, other, False),
        ({}, other, False),  # a file of another trainer says nothing
    ):
        pixels("--prompt", prompt, about=about)
        line = f" was trained with {ABOUT['prompt']!r}; another prompt may spoil pictures\n"
        assert (line in capsys.readouterr().err) == said, (about, prompt)


def test_a_prompt_of_one_of_several_loras_is_one_that_was_trained(small, small_bundle, tmp_path, capsys):
    loras = []
    for prompt in ("Denoise.", "Deblur."):
        loras += ["--lora", tmp_path / f"{prompt}safetensors"]
        about = {"objective": "bridge", "prompt": prompt, "guidance": len(prompt)}
        about["prompts"] = [prompt, "Sharpen."] if prompt == "Deblur." else [prompt]
        save_file(load_file(small / "lora.safetensors"), loras[-1], {"kontext_min": json.dumps(about)})
    for flag, value, said in (
        ("--prompt", "Denoise.", ""),
        ("--prompt", "Deblur.", ""),
        ("--prompt", "Sharpen.", ""),
        ("--prompt", "Dehaze.", "another prompt may spoil"),
        ("--guidance", 8, ""),
        ("--guidance", 7, ""),
        ("--guidance", 3, "with guidance 8, not with 3"),
    ):
        for order in (loras, loras[2:] + loras[:2]):
            flags = ["--input", small, "--output", "o", "--weights", small_bundle, *order, flag, value]
            method_of(sample.parse_flags(sample.Settings, [str(f) for f in flags], ""), base.Weights(small_bundle))
            lines = [line for line in capsys.readouterr().err.splitlines() if "gives way" not in line]
            if order is loras:
                assert (said in lines[0]) if said else (not lines), (flag, value, lines)
            else:  # the first has several tasks
                tasks = [line for line in lines if "several tasks; the prompt is" in line]
                assert bool(tasks) == (flag == "--guidance" or value == "Dehaze."), (flag, value, lines)


def test_a_guidance_that_was_not_trained_is_said(pixels, capsys):
    for about, guidance, said in ((ABOUT, ABOUT["guidance"], False), (ABOUT, 7.5, True), ({}, 7.5, False)):
        pixels("--guidance", guidance, about=about | {"strange": guidance})
        line = f" was trained with guidance {ABOUT['guidance']:g}, not with 7.5\n"
        assert (line in capsys.readouterr().err) == said, (about, guidance)


def test_the_lora_its_strength_and_the_seed_change_pixels(pixels):
    whole = pixels()
    assert np.array_equal(whole, pixels(lora="{}=1.0"))
    base = {k: ABOUT[k] for k in ("prompt", "guidance")}
    silent = pixels(lora="{}=0.0")  # the source noise of the header, but no correction
    assert differ(whole, silent) and differ(whole, pixels(lora="{}=0.5")) and differ(silent, pixels(lora="{}=0.5"))
    without = pixels("--prompt", base["prompt"], "--guidance", base["guidance"], lora="")
    still = ABOUT | {"source_noise": 0.0}
    assert np.array_equal(without, pixels(about=still, lora="{}=0.0"))  # the bare base: a bridge without noise
    assert differ(without, pixels(about=still))
    assert differ(whole, pixels("--seed", 1))
    assert np.array_equal(pixels(about=still), pixels("--seed", 1, about=still))  # no noise, no seed


def test_tiles_are_as_large_as_the_lora_was_trained_at(identity, pixels):
    cases = [((), 48, 48), ((), 63, 64), ((), 24, 32), (("--tile", 40), 48, 40)]  # 4 tokens at least: 32 pixels here
    for flags, trained, tile in cases:
        pixels(*flags, about=ABOUT | {"resolution": trained})
        apply = identity[-1]["apply"]
        assert apply.side * apply.factor == tile


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.fixture
def scored(identity, small_bundle, tmp_path):
    """A folder of three noisy pictures, clean ones for two of them, one under another ending; and the flags."""
    for k, name in enumerate(("a", "sub/b", "c")):
        for folder in ("in", "clean"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        noisy = degrade.parse("noise=0.1")(crop(48, 40, k), np.random.default_rng(k))
        noisy.save(tmp_path / "in" / f"{name}.png")
        if name != "c":
            crop(48, 40, k).save(tmp_path / "clean" / f"{name}.{'bmp' if k else 'png'}")
    return ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle,
            "--reference", tmp_path / "clean"]  # fmt: skip


def test_a_shift_is_in_the_report_too(scored, tmp_path, capsys):
    large = Image.open(PHOTO).convert("RGB").resize((320, 320))
    large.save(tmp_path / "in" / "a.png")
    large.rotate(0, translate=(5, 0)).save(tmp_path / "clean" / "a.png")
    assert run(*scored, "--report") == 0
    said = "shifted by 5 pixels"
    assert f"a.png: {said}" in capsys.readouterr().out
    assert said in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_line_says_that_scores_are_made(scored, tmp_path, monkeypatch):
    """Also where all is restored already: of large pictures they take seconds each."""
    shown = []
    monkeypatch.setattr(Progress, "show", lambda self, text, **more: shown.append((text, more)))
    for _ in range(2):
        assert run(*scored) == 0
        assert ("a.png: scores", {"last": False}) in shown
        shown.clear()


@pytest.mark.parametrize("flags", [(), ("--compare",)])
def test_scores_of_a_later_call_are_those_of_the_first(identity, small_bundle, tmp_path, flags):
    """They are those of the files: JPEG and WebP lose a part."""
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.webp", "c.png"):
        crop(48, 40).save(tmp_path / "in" / name)
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle, *flags]
    args += ["--degrade", "noise=0.1", "--json", tmp_path / "s.json"]
    assert run(*args) == 0
    first = (tmp_path / "s.json").read_text()
    assert len(json.loads(first)) == 4
    assert run(*args) == 0 and (tmp_path / "s.json").read_text() == first


def test_scores_do_not_replace_what_is_printed(identity, small_bundle, tmp_path, capfd):
    """`sample.py --json log.txt > log.txt`, or /dev/stdout there: the text would be gone."""
    crop(48, 40).save(tmp_path / "in.png")
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "out.png", "--weights", small_bundle]
    assert run(*args, "--degrade", "noise=0.1", "--json", "/dev/stdout") == 2
    assert "--json /dev/stdout: is where this program prints; name another file" in capfd.readouterr().err


def test_scores_are_those_of_the_metrics(scored, tmp_path, capsys):
    assert run(*scored, "--json", tmp_path / "scores.json") == 0
    said = capsys.readouterr()
    assert "note: c.png: no such picture in --reference" in said.err
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["name"] for row in rows] == ["a.png", "sub/b.png", "mean"] and rows[-1]["pictures"] == 2
    for row, k in zip(rows[:2], (0, 1), strict=True):
        restored, clean = Image.open(tmp_path / "out" / row["name"]), crop(48, 40, k)
        for name in ("psnr", "psnr_y", "ssim", "texture"):
            assert row["restored"][name] == row["input"][name] == pytest.approx(getattr(metrics, name)(restored, clean))
    for part in ("input", "restored"):
        for name, value in rows[2][part].items():
            assert value == pytest.approx((rows[0][part][name] + rows[1][part][name]) / 2)
    lines = said.out.splitlines()[-4:]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert lines[1].split()[1] == f"{rows[0]['input']['psnr']:.2f}" and lines[3].startswith("mean")


def test_clean_pictures_that_are_not_or_fit_twice_are_named(scored, tmp_path, capsys):
    clean = tmp_path / "clean"
    shutil.copy(clean / "a.png", clean / "extra.png"), (clean / "c.heic").touch()
    for path in (clean / "a.png", tmp_path / "in" / "c.png"):
        with Image.open(path) as picture:
            picture.save(path, exif=marked(Image.Exif()))
    shutil.copy(tmp_path / "in" / "c.png", clean / "c.png")
    assert run(*scored) == 0
    said = capsys.readouterr().err
    assert f"note: {clean}: no input goes with c.heic, extra.png\n" in said
    assert f"note: {clean}: 1 of 3 are copies of the inputs\n" in said
    assert f"note: a.png: {clean / 'a.png'} is a result of this program, not clean\n" in said
    assert "note: c.png: is a result of this program itself\n" in said
    (tmp_path / "empty").mkdir()
    assert run(*scored[:-1], tmp_path / "empty", "--overwrite") == 2
    assert f"--reference {tmp_path / 'empty'}: none of its pictures has the name of one of" in capsys.readouterr().err
    (clean / "a.png").rename(clean / "a.webp"), shutil.copy(clean / "c.png", clean / "a.bmp")
    assert run(*scored) == 2
    assert f"--reference {clean}: a.bmp and a.webp go with a.png; keep one of them" in capsys.readouterr().err
    (clean / "a.bmp").unlink(), shutil.copy(tmp_path / "in" / "c.png", tmp_path / "in" / "a.jpg")
    assert run(*scored) == 2
    assert "a.webp goes with two pictures of --input; rename one of them" in capsys.readouterr().err
    one = ["--input", clean / "c.png", "--reference", tmp_path / "in" / "c.png", "--output", tmp_path / "o.png"]
    assert run(*one) == 2
    assert "in/c.png: is --input or a copy of it; name the clean pictures" in capsys.readouterr().err


def test_scores_of_another_folder_or_reference_are_kept(scored, tmp_path, capsys):
    json_file, other = tmp_path / "scores.json", tmp_path / "other"
    shutil.copytree(tmp_path / "clean", tmp_path / "clean2")
    assert run(*scored, "--json", json_file) == 0
    assert run(*scored, "--json", json_file) == 0  # the same call
    before = json_file.read_bytes()
    assert run(*scored[:2], "--output", other, *scored[4:6]) == 0
    more = shutil.copytree(scored[1], tmp_path / "more")
    for wrong in (["--output", other], ["--reference", tmp_path / "clean2"], ["--input", more]):
        assert run(*scored, "--json", json_file, *wrong) == 2
        assert "exists and holds the scores of another call" in capsys.readouterr().err
    assert json_file.read_bytes() == before
    assert run(*scored, "--json", json_file, "--input", more, "--overwrite") == 0
    assert run(*scored, "--json", json_file) == 2  # the last call counts


def test_a_picture_too_small_for_scores_has_its_clean_one_on_the_sheet(identity, small_bundle, tmp_path, capsys):
    crop(8, 40).save(tmp_path / "in.png")
    flags = ["--input", tmp_path / "in.png", "--output", tmp_path / "out.png", "--weights", small_bundle, "--compare"]
    assert run(*flags, "--degrade", "noise=0.1") == 0
    assert "in.png: scores need 11 pixels a side" in capsys.readouterr().err
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width == 3 * 8 + 2 * GAP
        assert sheet.crop((sheet.width - 8, 0, sheet.width, 40)).tobytes() == crop(8, 40).tobytes()


def test_two_names_that_print_alike_are_named(identity, small_bundle, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in (b"bad\xff.png", rb"bad\xff.png", b"ok.png"):
        crop(32, 32).save(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name), "PNG")
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle) == 1
    assert "two files print alike, one name is not UTF-8; rename one" in capsys.readouterr().err


def test_a_disk_that_ignores_case_is_asked_before_the_work(identity, small_bundle, tmp_path, capsys, monkeypatch):
    for name in ("in/IMG.png", "in/img.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        crop(32, 32).save(tmp_path / name)
    flags = ["--input", tmp_path / "in", "--weights", small_bundle, "--overwrite", "--output"]
    assert run(*flags, tmp_path / "out") == 0
    assert not pictures._ignores_case(tmp_path) and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    monkeypatch.setattr(pictures, "_ignores_case", lambda folder: True)
    assert run(*flags, tmp_path / "new") == 2
    assert "img.png: would replace the output of " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_version_says_so(scored, tmp_path, capsys, monkeypatch):
    assert run(*scored) == 0
    assert "kontext_min" not in capsys.readouterr().err
    monkeypatch.setattr("kontext_min.extras.folders.__version__", "99.0")
    assert run(*scored) == 0
    assert "restored some of these pictures, this is 99.0; --overwrite restores all" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("kontext_min.extras.folders.CODE", "edited")
    assert run(*scored) == 0
    assert "code that was edited since restored some; --overwrite restores all" in capsys.readouterr().err


def test_sample_is_one_process(scored, monkeypatch, capsys):
    torchrun = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 29914}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    assert run(*scored) == 2
    assert "WORLD_SIZE=2 in the environment: sample.py is one process" in capsys.readouterr().err


def test_what_a_reference_has_besides_the_scene_is_named(scored, tmp_path, capsys):
    """Its alpha, and what the script that wrote the inputs has dropped: orientation and profile."""
    clean = crop(192, 160)
    for folder in ("in", "clean"):
        clean.save(tmp_path / folder / "a.png")
    assert run(*scored) == 0
    assert "note: a.png" not in capsys.readouterr().err
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    clean.save(tmp_path / "clean" / "a.png", exif=exif)
    assert run(*scored, "--overwrite") == 0
    assert "a.png: its pixels are turned against the input; write both" in capsys.readouterr().err
    clean.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "clean" / "a.png", exif=exif)
    assert run(*scored, "--overwrite") == 0
    assert "note: a.png" not in capsys.readouterr().err
    mask = Image.linear_gradient("L").resize(clean.size)
    clean.putalpha(mask)
    clean.save(tmp_path / "clean" / "a.png")
    assert run(*scored, "--overwrite") == 0
    assert "a.png: it has an alpha channel: laid on white where it is transparent" in capsys.readouterr().err


def test_a_reference_of_another_size_is_named(scored, tmp_path, capsys):
    crop(47, 40).save(tmp_path / "clean" / "a.png")
    assert run(*scored) == 1
    said = capsys.readouterr()
    assert "2 restored, 0 there before, 1 not restored" in said.out
    assert "not restored: a.png: " in said.err and "the input 48x40" in said.err and "47x40" in said.err


def test_a_restored_picture_that_is_cut_counts_once(scored, capsys):
    assert run(*scored) == 0
    restored = scored[scored.index("--output") + 1] / "a.png"
    restored.write_bytes(restored.read_bytes()[:-50])
    assert run(*scored) == 1
    assert "0 restored, 2 there before, 1 not restored" in capsys.readouterr().out


def test_sheets_of_pictures_with_a_profile_are_scored_as_before(scored, tmp_path):
    """The sheet is in sRGB, so the second call reads in it what the first one has scored."""
    adobe = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    adobe = adobe.replace(b"rXYZ", b"?XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"?XYZ", b"gXYZ", 1)
    red = (1, 0, 0, 0, 0, 0.3, 0, 0, 0, 0, 0.3, 0)  # a profile shows on strong colors
    for folder, profile in (("in", adobe), ("clean", None)):
        with Image.open(tmp_path / folder / "a.png") as picture:
            picture.convert("RGB", red).save(tmp_path / folder / "a.png", icc_profile=profile)
    scores = []
    for _ in range(2):
        assert run(*scored, "--compare", "--json", tmp_path / "scores.json") == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text())[0]["restored"]["psnr"])
    assert scores[0] == pytest.approx(scores[1], abs=0.5)  # rounded to bytes once more


def test_a_degradation_that_has_changed_makes_other_pictures(scored, monkeypatch, capsys):
    args = [*scored[:6], "--degrade", "guide"]
    assert run(*args) == 0 == run(*args)
    monkeypatch.setitem(degrade.PRESETS, "guide", "blur=3")
    assert run(*args) == 2
    assert "operators was" in capsys.readouterr().err


def test_the_report_of_another_input_is_kept(scored, tmp_path, capsys):
    assert run(*scored, "--report") == 0 == run(*scored, "--report")
    page, other = tmp_path / "out" / "report.html", tmp_path / "other"
    other.mkdir()
    crop(48, 40).save(other / "z.png")
    before = page.read_bytes()
    assert run("--input", other, *scored[2:6], "--report") == 2
    assert f"--report: {page} shows the pictures of another --input" in capsys.readouterr().err
    assert page.read_bytes() == before
    assert run("--input", other, *scored[2:6], "--report", "--overwrite") == 0 and page.read_bytes() != before


def test_a_report_of_an_earlier_call_is_named(scored, tmp_path, capsys):
    assert run(*scored, "--report") == 0
    assert "is of an earlier call" not in capsys.readouterr().out
    assert run(*scored, "--overwrite", "--strength", 0.5) == 0
    assert "report.html is of an earlier call; --report writes it again" in capsys.readouterr().out
    scores, line = tmp_path / "s.json", f"note: {tmp_path / 's.json'} has the scores of an earlier call"
    assert run(*scored, "--overwrite", "--json", scores) == 0 == run(*scored, "--overwrite", "--json", scores)
    assert line not in capsys.readouterr().out
    assert run(*scored, "--overwrite", "--strength", 0.5) == 0
    assert f"{line}; --json writes it again" in capsys.readouterr().out
    assert run(*scored, "--overwrite", "--json", scores) == 0
    again = [*scored, "--json", tmp_path / "s2.json"]  # of the same pictures
    assert run(*again) == 0
    assert "scores of an earlier call" not in capsys.readouterr().out


def test_a_report_that_came_since_the_start_is_kept(scored, tmp_path, capsys, monkeypatch):
    write, page = Scores.write, tmp_path / "out" / "report.html"
    monkeypatch.setattr(Scores, "write", lambda *a: page.write_text("yours") and write(*a))
    assert run(*scored, "--report") == 0
    assert f"--report: {page} has come since the start, and is kept" in capsys.readouterr().out
    assert page.read_text() == "yours"


def test_report_of_a_folder(scored, tmp_path):
    assert run(*scored, "--report", "--compare") == 0
    data = data_of(tmp_path / "out" / "report.html")
    figures, facts = data["figures"], {name: value for name, value, _ in data["facts"]}
    assert [one["title"] for one in figures] == ["a.png", "c.png", "sub/b.png"]
    assert [one["after"][0]["file"] for one in figures] == ["a.png", "c.png", "sub/b.png"]
    assert [bool(one["clean"]) for one in figures] == [True, False, True]
    for one in figures:
        assert all(p.startswith("data:image/jpeg") for p in (one["before"], one["after"][0]["picture"]))
    assert facts["Gain in PSNR"] == "+0.00 dB" and facts["Restored"] == "3" and data["title"] == "out"
    with Image.open(tmp_path / "out" / "a.png") as sheet:
        assert sheet.size == (3 * 48 + 8, 40)
    with Image.open(tmp_path / "out" / "c.png") as sheet:
        assert sheet.size == (2 * 48 + 4, 40)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "{folder}", "--output", "{here}/in.png"], "--input is a folder; name a folder"),
        (["--input", "{folder}", "--output", "{folder}"], "would replace the input"),
        (
            ["--input", "{folder}", "--output", "{here}/o.jpg"],
            "o.jpg: is named like a picture, but --input is a folder",
        ),
        (["--input", "{empty}"], "no pictures in this folder"),
        (["--input", "{here}/pipe.png"], "pipe.png: a pipe or device; save"),
        (["--reference", "{here}/pipe.png"], "pipe.png: a pipe or device; save"),
        (["--input", "{broken}"], "none of its pictures can be read"),
        (["--output", "{here}/in.png"], "would replace the input"),
        (["--output", "{here}/o.gif"], "unknown picture format"),
        (["--tile", "0"], "--tile: got 0"),
        (["--seed", "4294967296"], "--seed: got 4294967296"),
        (["--tile", "1000000000"], "--tile: got 1000000000"),
        (["--tile", "31"], "--tile: got 31, expected at least 32 pixels, 4 tokens"),
        (["--steps", "1000000000000"], "--steps: got 1000000000000"),
        (["--strength", "0"], "--strength: got 0.0"),
        (["--strength", "nan"], "--strength: got nan"),
        (["--strength", "1e-300"], "--strength: got 1e-300, expected at least 0.001"),
        (["--fidelity", "1.5"], "--fidelity: got 1.5"),
        (["--fidelity", "1", "--steps", "1"], "--fidelity 1 in one step gives the input back"),
        (["--fidelity", "1", "--steps", "2"], "--fidelity 1 in one step gives the input back"),
        (["--fidelity", "1e-300"], "--fidelity: got 1e-300, expected 0 or at least 0.001"),
        (["--reference", "{here}/nowhere"], "nowhere: no such file or folder"),
        (["--reference", "{here}/text.jpg"], "text.jpg: not a picture"),
        (["--reference", "{here}/in.png", "--degrade", "guide"], "leave one of the two out"),
        (["--input", "{folder}", "--reference", "{here}/in.png"], "is a file, but --input is a folder"),
        (["--json", "{here}/s.json"], "s.json: scores need a clean picture"),
        (["--json", "{here}/no/s.json", "--degrade", "guide"], "s.json: can't be written; name a file in a folder"),
        (["--json", "{folder}/a.png", "--degrade", "guide"], "exists and holds no scores"),
        (["--json", "{folder}/a.png", "--degrade", "guide", "--overwrite"], "exists and holds no scores"),
        (["--json", "{here}/mine.json", "--degrade", "guide", "--overwrite"], "exists and holds no scores"),
        (["--json", "{weights}/vae/config.json", "--degrade", "guide"], "exists and holds no scores"),
        (["--json", "{here}/out.png", "--degrade", "guide"], "out.png: is written by another flag"),
        (
            [
                "--input",
                "{folder}",
                "--output",
                "{here}/d",
                "--json",
                "{here}/d/report.html",
                "--report",
                "--degrade",
                "guide",
            ],
            "report.html: is written by another flag",
        ),
        *(
            (["--input", "{folder}", "--output", "{here}/d", "--json", name, "--degrade", "guide"], "by another flag")
            for name in ("{here}/d/.lock", "{here}/d/.restored-with.jsonl", "{here}/../{last}/d/.restored-with.json")
        ),
        (["--device", "meta"], "--device: got 'meta'"),
        (["--json", "{folder}", "--degrade", "guide"], "folder: exists and holds no scores"),
        (["--json", "{here}/pipe.png", "--degrade", "guide"], "pipe.png: exists and holds no scores"),
        (["--json", "/dev/full", "--degrade", "guide"], "--json /dev/full: exists and holds no scores"),
        (["--output", "{here}/pipe.png", "--overwrite"], "pipe.png: is no file, or a link that leads to none"),
        (["--output", "{here}/nowhere.png"], "nowhere.png: is no file, or a link that leads to none"),
        (["--output", "{here}/loop.png"], "loop.png: is no file, or a link that leads to none"),
        (["--input", "{here}/loop.png"], "loop.png"),
        (["--input", "{here}/nowhere"], "--input {here}/nowhere: no such file or folder; check the path"),
        (["--report"], "--report: is for folders"),
        (
            ["--input", "{folder}", "--output", "{here}", "--report"],
            "report.html exists and is not that of a restored folder",
        ),
    ],
)
def test_more_bad_input(small_bundle, tmp_path, capsys, flags, message):
    for name in ("folder", "empty", "broken", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "d" / ".lock").touch()
    for path in (tmp_path / "in.png", tmp_path / "folder" / "a.png"):
        crop(32, 32).save(path)
    for path in (tmp_path / "text.jpg", tmp_path / "broken" / "text.jpg"):
        path.write_text("this is no picture")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone" / "a.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "report.html").write_text("<!doctype html>\n<title>mine</title>")
    names = {name: tmp_path / name for name in ("folder", "empty", "broken")} | {"weights": small_bundle}
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "out.png", "--weights", small_bundle]
    assert run(*args, *(f.format(here=tmp_path, last=tmp_path.name, **names) for f in flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sample.py: ") and message.format(here=tmp_path) in lines[-1]
    assert all(line.startswith("not restored: text.jpg") for line in lines[:-1])
    assert not (tmp_path / "out.png").exists()
    assert Image.open(tmp_path / "in.png").size == Image.open(tmp_path / "folder" / "a.png").size == (32, 32)
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}' and not (tmp_path / "d" / ".lock").read_text()


@pytest.mark.parametrize("source", ["in.png", "folder"])
def test_a_base_that_is_damaged_writes_nothing_and_names_the_picture(small_bundle, tmp_path, capsys, source):
    broken = shutil.copytree(small_bundle, tmp_path / "weights")
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = torch.nan
    save_file(weights, file)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "in.png", tmp_path / "folder" / "in.png"):
        crop(32, 32).save(path)
    output = tmp_path / ("out" if source == "folder" else "out.png")
    assert run("--input", tmp_path / source, "--output", output, "--weights", broken) == 2
    assert "in.png: the result is not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.png")) and not (tmp_path / "out.png").exists()


def test_scores_of_sheets_are_whole_when_a_folder_is_continued(small_bundle, tmp_path, capsys):
    """--compare writes sheets; a second call takes the restored picture out of each. --json keeps a link."""
    (tmp_path / "in").mkdir()
    for name, width in (("a", 48), ("b", 32)):
        crop(width, 32).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "link.json").symlink_to(tmp_path / "scores.json")
    (tmp_path / "scores.json").touch()
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle, "--compare"]
    args += ["--degrade", "noise=0.1", "--json", tmp_path / "link.json", "--report"]
    assert run(*args) == 0
    first = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "out" / "b.png").unlink()
    assert run(*args) == 0
    assert "1 restored, 1 there before, 0 not restored" in capsys.readouterr().out
    assert len(first) == 3 and json.loads((tmp_path / "scores.json").read_text()) == first
    assert (tmp_path / "link.json").is_symlink()


def test_one_name_that_cannot_be_written_does_not_stop_a_folder(small_bundle, tmp_path, capsys):
    """A name that becomes too long, for a folder that is not there yet; a.gif beside a.gif.png, which it becomes."""
    (tmp_path / "in").mkdir()
    for name in ("a.gif", "a.gif.png", f"{'l' * 250}.gif", "z.png", "z.jfif"):
        crop(32, 32).save(tmp_path / "in" / name)
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle) == 1
    said = capsys.readouterr().err
    assert "not restored: a.gif: would become a.gif.png, which is another picture of the folder" in said
    assert f"{'l' * 250}.gif.png: File name too long; rename the picture" in said
    assert sorted(path.name for path in (tmp_path / "out").glob("[az]*")) == ["a.gif.png", "z.jfif", "z.png"]
    assert "out: written as PNG are 2, such as a.gif.png" in said


def test_a_name_that_the_terminal_cannot_show_is_no_error(small_bundle, tmp_path):
    (tmp_path / "in").mkdir()
    crop(32, 32).save(tmp_path / "in" / "caf\u00e9.png")
    argv = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    program = Path(sample.__file__)
    done = subprocess.run([sys.executable, program, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "caf\u00e9.png").exists()


def test_a_name_that_the_locale_lacks_letters_for_is_named(tmp_path, monkeypatch):
    job = pictures.Job(tmp_path / "in.png", "in.png", tmp_path / "caf\u00e9.png", (8, 8))
    assert pictures._unwritable(job) is None
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("ascii"))  # LC_ALL=C with PYTHONUTF8=0
    assert "lack some of its letters; set LC_ALL=C.UTF-8" in pictures._unwritable(job)


def test_scores_that_came_since_the_start_are_kept(small_bundle, tmp_path, capsys, monkeypatch):
    """Two calls at once with one --json."""
    crop(32, 32).save(tmp_path / "in.png")
    write = Scores.write

    def late(self, restored):
        (tmp_path / "s.json").write_text("[]")
        return write(self, restored)

    monkeypatch.setattr(Scores, "write", late)
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "a.png", "--weights", small_bundle]
    assert run(*args, "--degrade", "noise=0.1", "--json", tmp_path / "s.json") == 0
    assert "s.json: has come since the start, and is kept" in capsys.readouterr().out
    assert (tmp_path / "s.json").read_text() == "[]"


def test_scores_of_another_call_are_kept(small_bundle, tmp_path, capsys):
    crop(32, 32).save(tmp_path / "in.png")
    scored = ["--input", tmp_path / "in.png", "--weights", small_bundle, "--json", tmp_path / "s.json", "--degrade"]
    assert run(*scored, "noise=0.1", "--output", tmp_path / "a.png") == 0
    before = (tmp_path / "s.json").read_bytes()
    assert run(*scored, "noise=0.2", "--output", tmp_path / "b.png") == 2
    assert "exists and holds the scores of another call" in capsys.readouterr().err
    assert (tmp_path / "s.json").read_bytes() == before and not (tmp_path / "b.png").exists()
    assert run(*scored, "noise=0.2", "--output", tmp_path / "b.png", "--overwrite") == 0
    assert (tmp_path / "s.json").read_bytes() != before


def test_a_lora_of_zeros_says_that_it_changes_nothing(small_bundle, tmp_path, capsys):
    flux = load_flux(small_bundle, dtype=torch.float32)
    add_lora(flux, 2, 2, "attention")  # B is zero
    save_lora(flux, tmp_path / "lora.safetensors")
    assert "so its weights change nothing" in capsys.readouterr().err, "train.py says so too"
    crop(32, 32).save(tmp_path / "in.png")
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "a.png", "--weights", small_bundle]
    assert run(*args, "--lora", tmp_path / "lora.safetensors") == 0
    assert "so its weights change nothing" in capsys.readouterr().err
    for layer in lora_layers(flux).values():
        layer.lora_B.data.fill_(0.01)
    save_lora(flux, tmp_path / "lora.safetensors")
    for strength, said in (("0", True), ("1", False), ("tiny B", True)):
        if strength == "tiny B":
            for layer in lora_layers(flux).values():
                layer.lora_B.data.fill_(1e-9)
            save_lora(flux, tmp_path / "lora.safetensors")
            strength = "1"
        assert run(*args, "--overwrite", "--lora", f"{tmp_path / 'lora.safetensors'}={strength}") == 0
        assert ("so its weights change nothing" in capsys.readouterr().err) == said


def after_first_picture(number):
    """For a process of its own: a signal arrives when a picture has been written."""
    write = pictures.write

    def wrapped(*args):
        write(*args)
        os.kill(os.getpid(), number)

    pictures.write = wrapped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_folder_and_the_same_command_goes_on(small_bundle, tmp_path, capsys, number):
    (tmp_path / "in").mkdir()
    for name in "abc":
        crop(32, 32).save(tmp_path / "in" / f"{name}.png")
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle]
    log = tmp_path / "log"
    [process] = processes.joined(
        [processes.start(args, log, functools.partial(after_first_picture, number), program="sample")]
    )
    assert process.exitcode == 130
    last = log.read_text().splitlines()[-1]
    assert last == "sample.py: stopped; 1 of 3 pictures are there, and the same command continues"
    assert "Traceback" not in log.read_text()
    assert [p.name for p in (tmp_path / "out").glob("*.png")] == ["a.png"]
    assert run(*args) == 0
    assert "2 restored, 1 there before" in capsys.readouterr().out


@pytest.mark.parametrize("plan", [(), ("--plan",)])
@pytest.mark.parametrize(("part", "other"), [("vae", TINY / "vae"), ("clip", GOLDEN), ("t5", GOLDEN)])
def test_parts_of_different_models(small_bundle, tmp_path, capsys, part, other, plan):
    """Such as --transformer without --weights: a line before anything is loaded."""
    folder = other if other.name == "vae" else other / f"{part}_tiny.safetensors"
    args = ["--input", PHOTO, "--output", tmp_path / "o.png", "--weights", small_bundle]
    assert run(*args, f"--{part}", folder, *plan) == 2
    said = capsys.readouterr().err
    assert re.search(rf"{folder}: its .* gives \d+ channels, but the transformer of {small_bundle} takes \d+;", said)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "known", "code"), [("clip", 1025, 0), ("clip", 1023, 2), ("t5", 768, 0), ("t5", 539, 2)]
)
def test_an_encoder_of_another_vocabulary(identity, small_bundle, tmp_path, capsys, part, known, code):
    """A note for one that knows more tokens, which may be meant; fewer can't be right."""
    crop(32, 32).save(tmp_path / "in.png")
    source = find(small_bundle, part)[0]
    tensors = load_file(source)
    for name, x in tensors.items():
        if x.shape[0] == {"clip": 1024, "t5": 640}[part]:
            tensors[name] = x.new_zeros(known, x.shape[1])
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / source.name)
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "o.png", "--weights", small_bundle]
    assert run(*args, f"--{part}", tmp_path / "other" / source.name) == code
    said = capsys.readouterr()
    assert f"knows {known} tokens, the vocabulary in {small_bundle} " in said.out + said.err
    assert code == 2 or (run(*args, "--overwrite") == 0 and "knows" not in capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "--prompt: got an empty value; give one, or leave the flag out"),
        (["--degrade", " "], "--degrade: got an empty value"),
        (["--ouput", "x.png"], "--ouput: no such flag; did you mean --output"),
        (["--input", "a.png", "b.png"], "b.png: belongs to no flag; each flag takes one value"),
        (["--steps", "x"], "--steps: invalid int value: 'x'"),
        (["--output", ""], "--output: got an empty value"),
        (["--lora=--"], "--lora=--: -- is no value; give one, or leave the flag out"),
    ],
)
def test_flags_that_cannot_be_read(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        run("--input", PHOTO, *flags)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and message in said and "--help shows all flags" in said


def test_closed_outputs_stop_nothing(identity, small_bundle, tmp_path, monkeypatch):
    crop(32, 32).save(tmp_path / "in.png")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run("--input", tmp_path / "in.png", "--output", tmp_path / "o.png", "--weights", small_bundle) == 0


def test_a_folder_is_written_by_one_run_at_a_time(small_bundle, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    crop(32, 32).save(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle]
        assert run(*args) == 2
        assert f"--output {tmp_path / 'out'}: another run is using it" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert run(*args) == 0


@pytest.fixture
def foreign(monkeypatch):
    """Folders and files of this name are another user's, on a machine where root may write everything."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "foreign" and access(path, mode))


@pytest.mark.parametrize("flag", ["input", "output", "reference"])
def test_a_folder_that_may_not_be_entered_is_named_with_its_flag(foreign, tmp_path, flag):
    """Without the check, --input IN would be blamed for an --output that can't be read."""
    for name in ("in", "out", "foreign"):
        (tmp_path / name).mkdir()
    places = {"input": tmp_path / "in", "output": tmp_path / "out", flag: tmp_path / "foreign"}
    with pytest.raises(ValueError, match=re.escape(f"--{flag} {tmp_path / 'foreign'}: Permission denied")):
        checks.check_sampling(sample.Settings(**places))


@pytest.mark.parametrize("place", ["in.png/cache", "foreign", "file"])
def test_where_nothing_can_be_written(foreign, tmp_path, place):
    """A file where a folder is wanted, and a folder that another user owns: sample.py keeps its cache elsewhere.

    That place is new and its own: one of a fixed name in the temporary folder could be another user's.
    """
    (tmp_path / "in.png").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "prompts").write_text("")
    own = [checks.cache_for(tmp_path / place) for _ in range(2)]
    assert own[0] != own[1] and all(path.stat().st_mode & 0o777 == 0o700 for path in own)
    assert {path.parent for path in own} == {Path(tempfile.gettempdir())}
    assert checks.cache_for(tmp_path / "new" / "er") == tmp_path / "new" / "er"
    reason = "Permission denied" if place == "foreign" else "can't be written"
    with pytest.raises(ValueError, match=re.escape(f"--cache-dir {tmp_path / place}: {reason}")):
        checks.check_training(
            train.Settings(hr_root=tmp_path, output_dir=tmp_path / "x" / "y", cache_dir=tmp_path / place)
        )


@pytest.mark.parametrize(
    ("name", "flags"), [("latents", {"cache_latents": 1}), ("quantized", {"stream": True, "quantize": "int8"})]
)
def test_every_cache_that_a_run_needs_is_checked(tmp_path, name, flags):
    (tmp_path / name).write_text("a file where a folder is wanted")
    (tmp_path / "hr").mkdir()
    settings = train.Settings(hr_root=tmp_path / "hr", output_dir=tmp_path / ".." / "run", cache_dir=tmp_path)
    checks.check_training(settings)
    with pytest.raises(ValueError, match=re.escape(f"--cache-dir {tmp_path}: can't be written")):
        checks.check_training(dataclasses.replace(settings, **flags))


@pytest.mark.parametrize("name", ["foreign/s.json", "foreign"])
def test_scores_that_could_not_be_written_are_refused_before_the_work(foreign, small, tmp_path, capsys, name):
    """A file is written aside and renamed, so its folder counts too."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("[]")
    args = ["--input", small / "in.png", "--output", tmp_path / "o.png", "--degrade", "guide", "--json", file]
    assert run(*args) == 2
    assert f"--json {file}: can't be written" in capsys.readouterr().err and not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    "what", ["LoRA", "base", "vocabulary", "prompt", "--compare", "--reference", "--quantize", "--resolution", "input"]
)
def test_pictures_made_in_another_way_do_not_count_as_restored(identity, small, small_bundle, tmp_path, capsys, what):
    """Whatever decides how they look is part of the record, by content: files keep their names when they change."""
    weights, lora = shutil.copytree(small_bundle, tmp_path / "w"), tmp_path / "lora.safetensors"
    shutil.copy(small / "lora.safetensors", lora)
    (tmp_path / "in").mkdir()
    crop(32, 32).save(tmp_path / "in" / "a.png")
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", weights, "--lora", lora]
    assert run(*args) == run(*args) == run(*args[:-1], f"{lora}=1") == 0
    if what in ("LoRA", "base"):
        file = lora if what == "LoRA" else weights / "vae" / "diffusion_pytorch_model.safetensors"
        with safe_open(file, "pt") as f:
            tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
        save_file({name: x + 1e-3 for name, x in tensors.items()}, file, metadata=about)
    if what == "input":
        os.utime(tmp_path / "in" / "a.png", (1e9, 1e9))  # even by an older one
    if what == "vocabulary":
        file = weights / "tokenizer" / "merges.txt"
        *lines, last = file.read_text().splitlines()
        file.write_text("\n".join([*lines[:-1], last, lines[-1]]) + "\n")
    if what == "--reference":
        assert run(*args, "--compare", "--overwrite") == 0
        shutil.copytree(tmp_path / "in", tmp_path / "clean")
    more = {"--compare": ["--compare"], "--quantize": ["--quantize", "int8"], "prompt": ["--prompt", "x"]}.get(what, [])
    more += ["--resolution", 24] * (what == "--resolution")
    more += ["--compare", "--reference", tmp_path / "clean"] * (what == "--reference")
    assert run(*args, *more) == 2
    named = {"LoRA": "lora was", "base": "base was", "input": "their inputs have changed since"}
    named |= {"vocabulary": "base was", "prompt": "prompt was", "--reference": "compare was True, is "}
    assert named.get(what, f"{what[2:]} was") in capsys.readouterr().err
    assert run(*args, *more, "--overwrite") == 0


@pytest.mark.parametrize("source", ["in", "in/a.png"])
def test_a_lora_that_is_replaced_while_the_networks_load_restores_nothing(
    small, small_bundle, tmp_path, capsys, monkeypatch, source
):
    """As a run that ends does it. The record, and the settings of the LoRA, would be those of the old file."""
    lora = Path(shutil.copy(small / "lora.safetensors", tmp_path))
    (tmp_path / "in").mkdir()
    crop(32, 32).save(tmp_path / "in" / "a.png")

    def late(*args, load=sample.load_base):
        with safe_open(lora, "pt") as f:
            tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
        save_file({name: 2 * x for name, x in tensors.items()}, lora, metadata=about)
        return load(*args)

    monkeypatch.setattr(sample, "load_base", late)
    output = tmp_path / ("out" if source == "in" else "out.png")
    assert run("--input", tmp_path / source, "--output", output, "--weights", small_bundle, "--lora", lora) == 2
    assert "--lora: a file was replaced while the networks were loaded; start again." in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.png")) and not (tmp_path / "out.png").exists()


def test_the_settings_beside_a_lora_of_peft_are_in_the_record(tmp_path):
    lora = tmp_path / "adapter_model.safetensors"
    lora.write_bytes(b"x")
    before = lora_bytes(lora)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert lora_bytes(lora) != before
    assert lora_bytes(Path(shutil.copy(lora, tmp_path / "mine.safetensors"))) == before


def test_every_flag_that_decides_how_a_picture_looks_is_in_the_record(small, small_bundle):
    """Also where a LoRA has a setting of the same name, as --resolution."""
    values = {"degrade": "blur=1", "seed": 1, "strength": 0.5, "fidelity": 0.5, "color_fix": "adain", "tile": 64}
    values |= {"resolution": 48, "quantize": "int8", "prompt": "x", "guidance": 3.0, "steps": 3, "solver": "euler"}
    flags = ["--input", small, "--output", "o", "--weights", small_bundle, "--lora", small / "lora.safetensors"]
    plain = sample.parse_flags(sample.Settings, [str(f) for f in flags], "")
    weights = base.Weights(small_bundle)

    def record(settings):
        return made_with(settings, weights, method_of(settings, weights))

    assert set(HOW) < set(values)
    for name, value in values.items():
        assert record(dataclasses.replace(plain, **{name: value})) != record(plain), name


def test_why_an_objective_is_taken_is_said(small, small_bundle, tmp_path):
    """A LoRA of another trainer does not say its objective; a base that train.py wrote says its own."""
    theirs = tmp_path / "theirs.safetensors"
    save_file(load_file(small / "lora.safetensors"), theirs)
    base_of_run = find(TINY, "transformer")[0]
    for flags, said in (
        (
            ["--weights", small_bundle, "--lora", theirs],
            "(a bridge is assumed; FLUX.1-Kontext and LoRAs of others",
        ),
        (["--lora", theirs], f"(as {base_of_run} was trained; the LoRA does not say what for)"),
        (["--lora", theirs, "--objective", "bridge"], ""),
        (["--lora", small / "lora.safetensors"], ""),
        ([], ""),
    ):
        argv = [str(f) for f in ["--input", small, "--output", "o", "--weights", TINY, *flags]]
        settings = sample.parse_flags(sample.Settings, argv, "")
        shown = str(method_of(settings, base.Weights(settings.weights)))
        assert (said in shown) if said else "(" not in shown


@pytest.mark.parametrize("when", ["while it is restored", "with its time kept"])
def test_a_picture_that_is_replaced_is_restored_again(identity, small_bundle, tmp_path, capsys, monkeypatch, when):
    """While it is restored, or by another of the same size and time, such as one that a tool has turned."""
    (tmp_path / "in").mkdir()
    old, new = tmp_path / "in" / "a.bmp", tmp_path / "new.bmp"
    crop(32, 32).save(old)
    crop(32, 32).rotate(90).save(new)
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle]

    def replace(job, *rest, load=pictures.load):
        photo = load(job, *rest)
        shutil.copyfile(new, old)
        return photo

    with monkeypatch.context() as patch:
        if when == "while it is restored":
            patch.setattr(pictures, "load", replace)
        assert run(*args) == 0
    if when == "with its time kept":
        time = old.stat().st_mtime_ns
        shutil.copyfile(new, old)
        os.utime(old, ns=(time, time))
    capsys.readouterr()
    assert run(*args) == 2
    assert "holds 1 of these pictures, but their inputs have changed since" in capsys.readouterr().err


def test_a_sheet_is_made_anew_when_its_clean_picture_is_another(scored, tmp_path, capsys):
    assert run(*scored, "--compare") == 0
    os.utime(tmp_path / "clean" / "sub" / "b.bmp", (1e9, 1e9))
    assert run(*scored, "--compare") == 2
    assert (
        "holds 1 of these pictures, but their inputs or the clean pictures beside them have" in capsys.readouterr().err
    )


def test_the_record_is_of_each_picture(identity, small_bundle, tmp_path, capsys, monkeypatch):
    """Two methods in one folder, and an --overwrite that was stopped, are told apart; a cut line is not read."""
    for folder, names in (("in", "abc"), ("other", "d")):
        (tmp_path / folder).mkdir()
        for name in names:
            crop(32, 32).save(tmp_path / folder / f"{name}.png")
    args = ["--output", tmp_path / "out", "--weights", small_bundle, "--input"]
    first, second = [*args, tmp_path / "in"], [*args, tmp_path / "in", "--seed", 1]
    assert run(*first) == run(*args, tmp_path / "other", "--seed", 1) == 0
    assert "out: also holds pictures that are not in --input: a.png, b.png, c.png\n" in capsys.readouterr().err
    assert run(*first) == 0
    assert run(*second) == 2
    assert "holds 3 of these pictures, but seed was 42, is 1; --overwrite" in capsys.readouterr().err

    record = tmp_path / "out" / ".restored-with.jsonl"
    whole = record.read_bytes()
    # A cut line, one of no picture, then others behind them.
    record.write_bytes(whole[:-10] + b'\n{"picture": 5, "input": [], "file": null, "how": {}}\n')
    assert run(*second, "--overwrite") == 0
    assert run(*first) == 2
    assert "holds 3 of these pictures, but seed was 1, is 42" in capsys.readouterr().err
    assert run(*first, "--overwrite") == 0
    record.write_bytes(whole)

    write, written = pictures.write, []

    def stopped(path, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "write", stopped)
        assert run(*second, "--overwrite") == 130
    assert run(*second) == 2
    assert "holds 2 of these pictures, but seed was 42, is 1" in capsys.readouterr().err
    record = tmp_path / "out" / folders.RECORD
    record.write_text(record.read_text()[:-20] + "\n[[[\n3\n")
    assert run(*second) == 2 and "holds 3 of these" in capsys.readouterr().err
    assert run(*second, "--overwrite") == 0 and run(*second) == 0
    assert "not as they were written" not in capsys.readouterr().err
    (tmp_path / "out" / "b.png").write_bytes(b"cut")
    assert run(*second) == 0
    assert "out: not as they were written, and kept: b.png; --overwrite restores all" in capsys.readouterr().err


def test_a_record_that_has_lost_its_last_lines_does_not_vouch_for_pictures(identity, small_bundle, tmp_path, capsys):
    """A TIFF keeps its size, so more than that must be known of the file."""
    (tmp_path / "in").mkdir()
    crop(32, 32).save(tmp_path / "in" / "a.tif")
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle]
    assert run(*args) == 0
    record, first = tmp_path / "out" / ".restored-with.jsonl", (tmp_path / "out" / "a.tif").stat().st_size
    lines = record.read_bytes()
    assert run(*args, "--overwrite", "--degrade", "noise=0.2") == 0 and record.read_bytes().startswith(lines)
    assert (tmp_path / "out" / "a.tif").stat().st_size == first
    record.write_bytes(lines + b'{"picture": "a.tif", "inp')
    capsys.readouterr()
    assert run(*args) == 0
    assert "not as they were written, and kept: a.tif" in capsys.readouterr().err


def test_a_full_disk_ends_a_folder_and_names_the_file(identity, small_bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abc":
        crop(32, 32).save(tmp_path / "in" / f"{name}.png")
    save, written = Image.Image.save, []

    def until_full(self, file, *args, **options):
        written.append(file)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", until_full)
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", small_bundle) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    full = f"{tmp_path / 'out' / 'b.png'}: No space left on device"
    assert said == f"sample.py: {full}; 1 of 3 pictures are there, and the same command continues"
    assert len(written) == 2


ENDS = ["EPIPE", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "EACCES", "EPERM", "ESTALE", "ENODEV"]


@pytest.mark.parametrize("name", [*ENDS, "EINVAL"])
def test_an_error_that_every_picture_would_meet_ends_the_folder(name, tmp_path):
    """A closed pipe, a disk that is full or gone, a limit; others are the picture's own."""
    job, failed = pictures.Job(tmp_path / "a.png", "a.png", tmp_path / "b.png", (1, 1)), []
    job.path.touch()
    with (
        pytest.raises(OSError) if name in ENDS else contextlib.nullcontext(),
        folders.spared(job, [job], failed, {"compare": False}),
    ):
        raise OSError(getattr(errno, name), "")
    assert bool(failed) == (name not in ENDS)


@pytest.mark.parametrize("source", ["in", "in/b.png"])
def test_a_file_that_appears_after_the_start_is_kept(identity, small_bundle, tmp_path, capsys, monkeypatch, source):
    (tmp_path / "in").mkdir()
    for name in "abc":
        crop(32, 32).save(tmp_path / "in" / f"{name}.png")
    output = tmp_path / ("out" if source == "in" else "b.png")
    mine = output / "b.png" if source == "in" else output
    load = pictures.load

    def slow(job, *rest):
        mine.write_text("mine")
        return load(job, *rest)

    args = ["--input", tmp_path / source, "--output", output, "--weights", small_bundle]
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "load", slow)
        assert run(*args) == (1 if source == "in" else 2)
    assert f"{mine}: has come since the start, and is kept" in capsys.readouterr().err
    assert mine.read_text() == "mine" and (source != "in" or len(list(output.glob("*.png"))) == 3)
    assert run(*args, "--overwrite") == 0
    assert Image.open(mine).size == (32, 32)


def test_earlier_results_below_the_input_are_no_inputs(identity, small_bundle, tmp_path, capsys):
    """Written into another folder of --input; a folder of results as --input itself is restored again."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        crop(32, 32).save(tmp_path / name)
    args = ["--weights", small_bundle, "--input", tmp_path]
    assert run(*args, "--output", tmp_path / "one") == 0
    assert "note" not in capsys.readouterr().err
    assert run(*args, "--output", tmp_path / "sub" / "two") == 0
    assert f"note: {tmp_path / 'one'}: holds restored pictures, left out" in capsys.readouterr().err
    crop(32, 32).save(tmp_path / "sub" / "two" / "own.png")
    assert run(*args, "--output", tmp_path / "sub" / "two") == 0
    said = f"note: {tmp_path / 'sub' / 'two'}: is --output, so pictures in it are not restored: 1\n"
    assert said in capsys.readouterr().err
    (tmp_path / "sub" / "two" / "own.png").unlink()
    assert sorted(p.name for p in (tmp_path / "sub" / "two").rglob("*.png")) == ["a.png", "b.png"]
    assert run(*args[:-1], tmp_path / "one", "--output", tmp_path / "three") == 0
    assert len(identity) == 6
    (tmp_path / "in").mkdir()  # an output elsewhere, which a link in the input leads to
    crop(32, 32).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "out").symlink_to(tmp_path / "four")
    (tmp_path / "four").mkdir()
    (tmp_path / "view").mkdir()  # a folder of links to pictures below the output
    (tmp_path / "data" / "raw").mkdir(parents=True)
    crop(32, 32).save(tmp_path / "data" / "raw" / "b.png")
    (tmp_path / "view" / "b.png").symlink_to(tmp_path / "data" / "raw" / "b.png")
    capsys.readouterr()
    assert run(*args[:-1], tmp_path / "view", "--output", tmp_path / "data") == 0
    assert "note" not in capsys.readouterr().err and (tmp_path / "data" / "b.png").exists()
    again = [*args[:-1], tmp_path / "in", "--output", tmp_path / "in" / "out"]
    assert run(*again) == 0
    for name in (".01234567.tmp", ".mine.tmp"):  # what a kill in the middle of writing leaves, and what it does not
        (tmp_path / "four" / name).touch()
    assert run(*again) == 0
    names = {p.name for p in (tmp_path / "four").iterdir()}
    assert ".mine.tmp" in names and ".01234567.tmp" not in names and "a.png" in names


class Unread(io.StringIO):
    def flush(self):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_an_output_that_cannot_be_printed_is_named(small_bundle, tmp_path):
    crop(32, 32).save(tmp_path / "in.png")
    args = ["--input", tmp_path / "in.png", "--output", tmp_path / "o.png", "--weights", small_bundle]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "sample.py", *args], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == "sample.py: stopped, its output can't be printed: No space left on device\n"
    assert done.returncode == 1


def test_scores_are_saved_before_anything_is_printed(scored, tmp_path, capsys, monkeypatch):
    """`sample.py ... --json s.json | head`: the hour is not lost."""

    say = sample.Progress.say

    def closed(self, text):
        if "3 restored" in text:
            monkeypatch.setattr(sys, "stdout", Unread())
        say(self, text)

    monkeypatch.setattr(sample.Progress, "say", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    code = run(*scored, "--json", tmp_path / "s.json", "--report")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "sample.py: stopped, its output can't be printed: Broken pipe"
    assert code == 1 and json.loads((tmp_path / "s.json").read_text())[-1]["name"] == "mean"
    assert len(list(tmp_path.rglob("report.html"))) == 1


def test_a_file_may_go_to_a_folder(identity, small_bundle, tmp_path):
    crop(32, 32).save(tmp_path / "in.gif")
    (tmp_path / "out").mkdir()
    args = ["--input", tmp_path / "in.gif", "--output", tmp_path / "out", "--weights", small_bundle]
    assert (
        run(
            *args,
        )
        == 0
    )
    assert Image.open(tmp_path / "out" / "in.gif.png").size == (32, 32)


@pytest.mark.slow
def test_memory_grows_by_the_picture_and_its_latent_alone(small_bundle, tmp_path):
    """Bytes a pixel: 4 + 4 in Pillow, 3 + 3 as tensors, 1 for each of five latents. Floats in and out would be 24."""
    peaks = []
    for megapixels in (1, 6):
        file, _ = large_bench.make(tmp_path, megapixels)
        peaks.append(
            large_bench.measure(file, tmp_path / f"o-{megapixels}.jpg", "--tile", 256, "--weights", small_bundle)[1]
        )
    print(peaks, "MB at 1 and 6 MP")
    assert (peaks[1] - peaks[0]) / 5 < 20


def test_guidance_for_a_base_without_it_is_named(monkeypatch, capsys):
    flux = SimpleNamespace(params=SimpleNamespace(guidance_embed=False))
    monkeypatch.setattr(base, "_load", lambda *_: (flux, None))
    monkeypatch.setattr(base, "skip_unread", lambda flux: None)
    for guidance, said in ((None, ""), (2.0, "note: --guidance has no effect: base has no guidance embedding\n")):
        settings = sample.Settings(input=Path("a"), output=Path("b"), guidance=guidance)
        base.load_base(settings, Path("base"), torch.float32, torch.device("cpu"), Path("cache"))
        assert capsys.readouterr().err == said


def test_a_base_of_8_bits_is_not_quantized_again(monkeypatch, capsys):
    flux = SimpleNamespace(params=SimpleNamespace(guidance_embed=True))
    monkeypatch.setattr(base, "_load", lambda *_: (flux, None))
    monkeypatch.setattr(base, "skip_unread", lambda flux: None)
    monkeypatch.setattr(base, "find", lambda path, part: path)
    for stored, said in (("F8_E4M3", 1), ("BF16", 0)):
        monkeypatch.setattr(base, "read_headers", lambda path, stored=stored: {"w": Stored((4, 4), stored)})
        settings = sample.Settings(input=Path("a"), output=Path("b"), quantize="int8")
        base.load_base(settings, Path("base"), torch.float32, torch.device("cpu"), Path("cache"))
        assert capsys.readouterr().err.count("--quantize int8: base has 8 bits already and is used as it is") == said


def test_a_seed_without_effect_is_named(small_bundle, tmp_path, capsys):
    crop(32, 32).save(tmp_path / "in.png")
    args = ["--input", tmp_path / "in.png", "--weights", small_bundle, "--seed", 7, "--output"]
    for k, (flags, said) in enumerate(
        (
            ([], True),
            (["--degrade", "blur=1,jpeg=50"], True),
            (["--degrade", "noise=0.1"], False),
            (["--degrade", "blur=1:4"], False),
            (["--degrade", "blur=2@0.02"], False),
        )
    ):
        assert run(*args, tmp_path / f"{k}.png", *flags) == 0
        assert ("note: --seed has no effect" in capsys.readouterr().err) == said
