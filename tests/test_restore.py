"""Tiles blend without a seam; sample.py restores a picture at its own size with what the LoRA file says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from kontext_min.checkpoints import load_flux
from kontext_min.lora import add_lora
from kontext_min.lora_files import save_lora
from kontext_min.restore import _starts, tiled, to_image, to_tensor

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "tests" / "photos" / "bowl.jpg"


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (130, 70), (258, 254)])
def test_tiles_of_a_local_function_give_the_function(size):
    """What does not look beyond a position must come out exactly, at every scale; each position is covered."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    assert (tiled(lambda x: 2 * x + 1, (x,), 64, 2) - (2 * x + 1)).abs().max() <= 1e-5
    up = torch.nn.functional.interpolate(x, scale_factor=4.0)
    out = tiled(lambda x: torch.nn.functional.interpolate(x, scale_factor=4.0), (x,), 64, 2, 4)
    assert (out - up).abs().max() <= 1e-5
    down = torch.nn.functional.avg_pool2d(x, 2)
    assert (tiled(lambda x: torch.nn.functional.avg_pool2d(x, 2), (x,), 64, 2, 0.5) - down).abs().max() <= 1e-5
    both = tiled(lambda a, b: a - b, (x, x.flip(0)), 64, 2)
    assert (both - (x - x.flip(0))).abs().max() <= 1e-5


def test_tiles_overlap_by_a_quarter_and_reach_the_end():
    for length in range(64, 700, 2):
        starts = _starts(length, 64, 2)
        assert starts[0] == 0
        assert starts[-1] == length - 64
        assert all(0 < b - a <= 48 + 2 for a, b in zip(starts[:-1], starts[1:], strict=True))
        assert all(s % 2 == 0 for s in starts)


def test_no_seam_where_tiles_disagree():
    """Each tile adds an offset of its own; blended, no step between neighbours exceeds a tenth of it."""
    offsets = iter([0.0, 1.0] * 4)
    out = tiled(lambda x: x + next(offsets), (torch.zeros(1, 1, 256, 1024),), 256, 2)
    assert (out[..., 1:] - out[..., :-1]).abs().max() < 0.1
    assert out.min() >= 0
    assert out.max() <= 1


def test_pictures_survive_the_way_to_tensors_and_back():
    image = Image.open(PHOTO).convert("RGB").crop((0, 0, 50, 33))
    assert to_image(to_tensor(image)[0]).tobytes() == image.tobytes()


# ----------------------------------------------------------------------------------------------------------- sample.py


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small photograph and a LoRA whose header says what it was trained for."""
    folder = tmp_path_factory.mktemp("sample")
    Image.open(PHOTO).convert("RGB").crop((300, 300, 375, 351)).save(folder / "in.png")
    flux = load_flux(ROOT / "weights" / "tiny", dtype=torch.float32)
    add_lora(flux, rank=2)
    about = {"objective": "bridge", "context": False, "source_noise": 0.1, "start_time": 1.0, "guidance": 2.0,
             "prompt": "Remove the noise from this photo.", "resolution": 64}  # fmt: skip
    save_lora(flux, folder / "lora.safetensors", metadata={"kontext_min": json.dumps(about)})
    return folder


def run(*flags: object) -> int:
    return sample.main([str(f) for f in flags])


def test_a_picture_comes_back_at_its_own_size(small, tmp_path, capsys):
    args = ["--input", small / "in.png", "--cache-dir", tmp_path, "--steps", 1]
    assert run(*args, "--output", tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").size == (75, 51)
    assert run(*args, "--output", tmp_path / "out.jpg", "--lora", small / "lora.safetensors") == 0
    assert "75x51, bridge, 1 euler steps" in capsys.readouterr().out
    flags = ["--degrade", "guide", "--compare", "--lora", f"{small / 'lora.safetensors'}=0.5", "--tile", 32]
    assert run(*args, *flags, "--output", tmp_path / "three.png") == 0
    assert Image.open(tmp_path / "three.png").size == (3 * 75 + 8, 51)
    assert "PSNR / SSIM against the clean input" in capsys.readouterr().out
    assert run(*args, "--output", tmp_path / "k.png", "--objective", "kontext", "--solver", "heun") == 0


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
        (["--output", "/proc/o.png", "--steps", "1"], "/proc"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(small, tmp_path, capsys, flags, message):
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "cut.jpg").write_bytes(PHOTO.read_bytes()[:20_000])
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    names = {"text": tmp_path / "text.jpg", "cut": tmp_path / "cut.jpg", "here": tmp_path,
             "weights": tmp_path / "weights.safetensors", "lora": small / "lora.safetensors"}  # fmt: skip
    flags = [f.format(**names) for f in flags]
    if "--input" not in flags:
        flags = ["--input", str(small / "in.png"), *flags]
    assert run(*flags, "--cache-dir", tmp_path / "cache") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sample.py: ")
    assert message in error


def test_unknown_flags_and_help():
    for flags, code, text in ((["--inputt", "x"], 2, "usage:"), (["--help"], 0, "--tile")):
        done = subprocess.run([sys.executable, "sample.py", *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code
        assert text in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
