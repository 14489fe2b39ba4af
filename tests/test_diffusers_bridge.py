"""docs/diffusers_bridge.py: stock diffusers restores with a bridge LoRA as sample.py does, to one level of 255."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from kontext_min.checkpoints import load_flux
from kontext_min.extras.lora_files import read_lora, save_lora
from kontext_min.lora import add_lora

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"
SCRIPT = str(ROOT / "docs" / "diffusers_bridge.py")
CASES = {
    "plain": {},
    "source noise": {"source_noise": 0.2},
    "start time": {"start_time": 0.4},
    "context": {"context": True},
    "all three": {"source_noise": 0.1, "start_time": 0.7, "context": True},
}


def write_lora(path, about, size=0.3):
    flux = load_flux(TINY, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in add_lora(flux, 4, 4):
            p.copy_(size * torch.randn(p.shape, generator=generator))
    save_lora(flux, path, "peft", {"kontext_min": json.dumps(about)})


@pytest.mark.parametrize("case", CASES)
def test_it_draws_the_picture_of_sample_py(tmp_path, monkeypatch, case):
    about = {"objective": "bridge", "context": False, "source_noise": 0.0, "start_time": 1.0, "guidance": 1.5}
    about |= {"prompt": "Restore this photograph."} | CASES[case]
    write_lora(tmp_path / "a.safetensors", about)
    photo = Image.open(ROOT / "tests" / "photos" / "bowl.jpg").convert("RGB").crop((0, 0, 360, 280))
    photo.resize((90, 70)).save(tmp_path / "in.png")  # no multiple of a token

    monkeypatch.setattr(sample, "compute_dtype", lambda *_: torch.float32)

    def ours(*flags):
        flags = ["--input", tmp_path / "in.png", "--output", tmp_path / "ours.png", "--overwrite", *flags]
        flags += ["--solver", "euler", "--steps", 4, "--seed", 7]
        assert sample.main([str(f) for f in flags]) == 0
        return np.asarray(Image.open(tmp_path / "ours.png"), dtype=int)

    argv = [SCRIPT, tmp_path / "in.png", tmp_path / "theirs.png", "--weights", TINY, "--seed", 7]
    monkeypatch.setattr(sys, "argv", [str(a) for a in [*argv, "--lora", tmp_path / "a.safetensors"]])
    runpy.run_path(SCRIPT, run_name="__main__")
    theirs = np.asarray(Image.open(tmp_path / "theirs.png"), dtype=int)
    restored = ours("--lora", tmp_path / "a.safetensors")
    assert theirs.shape == restored.shape == (70, 90, 3)
    assert np.abs(theirs - restored).max() <= 1
    # The case tells right from wrong: the LoRA is seen in the picture, and so is the setting.
    assert np.abs(ours("--lora", f"{tmp_path / 'a.safetensors'}=0") - restored).max() > 3
    if CASES[case]:
        plain = {**about, "context": False, "source_noise": 0.0, "start_time": 1.0}
        write_lora(tmp_path / "plain.safetensors", plain)
        assert np.abs(ours("--lora", tmp_path / "plain.safetensors") - restored).max() > 3
    hint = read_lora(tmp_path / "a.safetensors")[1]["modelspec.usage_hint"]
    assert "docs/diffusers_bridge.py" in hint and ("FluxKontextPipeline" in hint) == about["context"]


def test_it_refuses_what_is_no_bridge(tmp_path):
    write_lora(tmp_path / "a.safetensors", {"objective": "kontext"})
    restore = runpy.run_path(SCRIPT)["restore"]
    with pytest.raises(ValueError, match="no bridge LoRA; load it in FluxKontextPipeline"):
        restore(str(TINY), str(tmp_path / "a.safetensors"), Image.new("RGB", (32, 32)))
