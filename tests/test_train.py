"""train.py: schedule, split, faults, bad input; killed runs end as those that were never killed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kill_test
import memorise
import train
from kontext_min import flow, runs
from train import Settings

FLAGS = (
    "--resolution 64 --steps 4 --accumulate 1 --batch-size 2 --warmup 1 --workers 0 --checkpoint-every 2 --val-count 1"
)


@pytest.fixture
def run(small_bundle, pictures, tmp_path):
    """run(flags) -> exit code, in this process; the run folder is tmp_path/run."""

    def call(*flags):
        argv = ["--hr-root", pictures, "--weights", small_bundle, "--cache-dir", tmp_path / "cache", *FLAGS.split()]
        return train.main([str(a) for a in (*argv, "--output-dir", tmp_path / "run", *flags)])

    return call


def rows(folder: Path, validation: bool = False) -> list[dict]:
    return [r for r in runs.read_metrics(folder) if bool(r.get("validation")) == validation]


def test_learning_rate_is_a_function_of_the_step():
    s = Settings(hr_root=Path(), steps=110, warmup=10, lr=1.0)
    assert [train.learning_rate(s, k) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert train.learning_rate(s, 60) == pytest.approx(0.5)
    assert train.learning_rate(s, 35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert train.learning_rate(replace(s, lr_schedule="linear"), 60) == pytest.approx(0.5)
    assert train.learning_rate(replace(s, lr_schedule="constant"), 109) == 1.0


def test_validation_comes_with_every_few_epochs_or_steps():
    s = Settings(hr_root=Path(), steps=20, accumulate=2, validate_every_epochs=2)
    assert [k for k in range(1, 21) if train.validation_due(s, 5, k)] == [5, 10, 15, 20]
    s = replace(s, validate_every_steps=7)
    assert [k for k in range(1, 21) if train.validation_due(s, 5, k)] == [7, 14, 20]


def test_a_run_writes_what_it_promises(run, tmp_path, capsys):
    assert run("--validate-every-steps", 2, "--ema", 0.5) == 0
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} >= {
        "settings.json", "metrics.jsonl", "validation", "checkpoints", "lora.safetensors", "report.html",
    }  # fmt: skip
    training, validations = rows(folder), rows(folder, validation=True)
    assert [r["step"] for r in training] == [1, 2, 3, 4]
    assert [r["step"] for r in validations] == [2, 4]
    for row in training:
        assert {"loss", "sigma_loss", "lr", "grad_norm", "images_per_second", "epoch"} <= row.keys()
        assert len(row["sigma_loss"]) == train.INTERVALS
    assert len(validations[0]["loss_at"]) == 9
    assert {"psnr", "ssim", "psnr_degraded", "ssim_degraded"} <= validations[0].keys()
    assert (folder / "validation" / "step-000004.png").exists()
    checkpoint = folder / "checkpoints" / "step-000004"
    assert {p.stem for p in checkpoint.iterdir()} == {"lora", "trained", "optimizer", "ema", "state"}
    last = load_file(folder / "lora.safetensors")
    kept = load_file(checkpoint / "lora.safetensors")
    assert all(torch.equal(last[k], kept[k]) for k in last)
    assert any(v.abs().max() > 0 for k, v in last.items() if "lora_up" in k)
    assert "parameters train" in capsys.readouterr().out


def test_killed_and_resumed_runs_end_bit_for_bit_like_the_others():
    """The short form; `python tests/kill_test.py` is the long one, with 30 runs."""
    assert kill_test.main(["--runs", "2"]) == 0


def test_a_changed_setting_is_named_and_must_be_confirmed(run, capsys):
    assert run("--steps", 2) == 0
    capsys.readouterr()
    assert run("--resume", "--lr", 3e-4) == 2  # more steps are a change too: the cosine ends elsewhere
    error = capsys.readouterr().err
    assert "lr was 0.0001, is 0.0003" in error
    assert "steps was 2, is 4" in error
    assert "--accept-changes" in error
    assert run("--resume", "--lr", 3e-4, "--accept-changes") == 0
    assert "going on from" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_skipped_and_in_the_end_stops_the_run(run, tmp_path, monkeypatch, capsys):
    true_losses, calls = flow.losses, []

    def broken(*args):
        calls.append(None)
        return true_losses(*args) * (math.nan if len(calls) in bad else 1)

    monkeypatch.setattr(flow, "losses", broken)
    bad = {2}
    assert run("--val-count", 0) == 0
    assert [r["skipped"] for r in rows(tmp_path / "run")] == [0, 1, 1, 1]
    calls.clear()
    bad = set(range(4, 100))
    assert run("--val-count", 0, "--steps", 20, "--max-skips", 3, "--overwrite") == 1
    error = capsys.readouterr().err
    assert "no finite loss for 3 steps in a row" in error
    assert "step-000002" in error  # the last good checkpoint
    kept = load_file(runs.latest_checkpoint(tmp_path / "run") / "trained.safetensors")
    assert all(t.isfinite().all() for t in kept.values())


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch, capsys):
    real = runs.save_file

    def full(tensors, path, *args, **kwargs):
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        return real(tensors, path, *args, **kwargs)

    monkeypatch.setattr(runs, "save_file", full)
    assert run("--val-count", 0) != 0
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert runs.latest_checkpoint(tmp_path / "run").name == "step-000002"
    monkeypatch.undo()
    assert run("--val-count", 0, "--resume") == 0


@pytest.mark.parametrize(
    ("objective", "full", "lr", "bound"),
    [  # the base was trained as a bridge: from pure noise it has the longer way
        ("bridge", True, 2e-3, 0.6),
        ("bridge", False, 5e-3, 0.8),
        ("kontext", True, 2e-3, 0.8),
        ("kontext", False, 5e-3, 0.97),
    ],
)
def test_four_crops_are_learnt_by_heart(objective, full, lr, bound):
    """The short form, 60 steps on weights/tiny; the long one, `python tests/memorise.py`, wants 0.1 and 0.4."""
    assert memorise.fall(objective, full, steps=60, lr=lr) < bound


@pytest.mark.parametrize(("fallen", "code"), [((0.1, 0.4), 0), ((0.11, 0.4), 1), ((0.1, 0.41), 1), ((math.nan, 0), 1)])
def test_memorise_fails_when_a_bound_is_missed(monkeypatch, capsys, fallen, code):
    monkeypatch.setattr(memorise, "fall", lambda objective, full, steps, lr: fallen[0 if full else 1])
    assert memorise.main() == code
    assert capsys.readouterr().out.count("loss falls by") == 4


@pytest.mark.slow
def test_four_crops_are_learnt_by_heart_to_the_end():
    assert memorise.main() == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hr-root", "{here}/empty"], "no usable picture"),
        (["--hr-root", "{here}/nowhere"], "no such folder"),
        (["--hr-root", "{here}/broken"], "no usable picture"),
        (["--weights", "{here}/nowhere"], "no such file or folder"),
        (["--vae", "{flux}"], "It looks like the Flux transformer"),
        (["--output-dir", "{here}/text.jpg/run"], "text.jpg"),
        (["--degrade", "blurr=2"], "blurr"),
        (["--steps", "0"], "--steps: got 0"),
        (["--objective", "kontext", "--source-noise", "0.1"], "starts from pure noise"),
        (["--lora-targets", "nothing"], "matches no Linear"),
        (["--shard"], "torchrun"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(run, small_bundle, tmp_path, capsys, flags, message):
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "broken" / "text.jpg").write_text("this is no picture")
    photo = (Path(__file__).parent / "photos" / "bowl.jpg").read_bytes()
    (tmp_path / "broken" / "cut.JPG").write_bytes(photo[: len(photo) // 3])
    flux = small_bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    assert run(*(f.format(here=tmp_path, flux=flux) for f in flags)) == 2
    printed = capsys.readouterr()
    error = printed.err.strip().splitlines()[-1]
    assert error.startswith("train.py: ")
    assert message in error
    assert "Traceback" not in printed.err
    if "broken" in flags[-1]:
        assert "text.jpg: not a picture" in printed.out
        assert "cut.JPG: " in printed.out


def test_one_broken_picture_among_good_ones_is_named_and_the_run_goes_on(run, pictures, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for photo in sorted(pictures.glob("*.png"))[:6]:
        (folder / photo.name).write_bytes(photo.read_bytes())
    (folder / "bad.jpg").write_text("this is no picture")
    assert run("--hr-root", folder) == 0
    printed = capsys.readouterr().out
    assert "1 files left out" in printed
    assert "bad.jpg: not a picture that Pillow can read" in printed
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["hr_root"] == str(folder)
