"""train.py: schedule, split, faults, bad input; killed runs end as those that were never killed."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

import extremes
import kill_test
import memorise
import peer_training
import sample
import train
from conftest import TINY, make_pictures
from kontext_min import data, degrade, flow
from kontext_min.checkpoints import find, metadata
from kontext_min.extras import (
    base,
    checkpointing,
    checks,
    held_out,
    plan,
    prompts,
    ready,
    report,
    runs,
    tasks,
    validation,
)
from kontext_min.extras.flags import given, parse_flags
from kontext_min.extras.lora_files import trained_with
from kontext_min.extras.program import restore_command
from train import Settings

FLAGS = "--resolution 64 --steps 4 --accumulate 1 --batch-size 2 --warmup 1 --workers 0 --checkpoint-every 2"


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
    assert 0 < train.learning_rate(s, 109) < 1e-3


def test_the_warm_up_is_a_tenth_of_a_short_run():
    sizes = plan.Sizes()
    warmups = [train.settled(Settings(hr_root=Path(), steps=n), sizes).warmup for n in (5, 60, 3000)]
    assert warmups == [0, 6, 100]
    assert train.settled(Settings(hr_root=Path(), steps=60, warmup=30), sizes).warmup == 30


def test_the_density_of_sigma_depends_on_the_objective():
    chosen = [("bridge", None), ("kontext", None), ("kontext", "uniform")]
    settings = [Settings(hr_root=Path(), objective=objective, sigma=sigma) for objective, sigma in chosen]
    assert [train.settled(s, plan.Sizes()).sigma for s in settings] == ["uniform", "shift", "uniform"]


def test_validation_comes_with_every_few_epochs_and_at_the_end():
    s = Settings(hr_root=Path(), steps=22, accumulate=2, validate_every_epochs=2)
    between = held_out.batches_between(s, 5, held=8)
    assert [k for k in range(1, 23) if held_out.due(s, between, k)] == [5, 10, 15, 20, 22]
    for k in range(23):
        assert held_out.still_due(s, between, k) == sum(n > k for n in (5, 10, 15, 20, 22))
    s = Settings(hr_root=Path(), steps=9, accumulate=8, validate_every_epochs=1)  # several epochs in a step
    assert [held_out.still_due(s, 2, k) for k in range(10)] == [*range(9, -1, -1)]


@pytest.mark.parametrize("batches_per_epoch", [2, 14, 300])
@pytest.mark.parametrize("held", [1, 3, 8])
@pytest.mark.parametrize(("steps", "batch", "accumulate"), [(300, 4, 1), (3000, 1, 4), (7, 1, 1)])
def test_validation_costs_a_tenth_of_a_run_at_most(batches_per_epoch, held, steps, batch, accumulate):
    s = Settings(hr_root=Path(), steps=steps, batch_size=batch, accumulate=accumulate)
    between = held_out.batches_between(s, batches_per_epoch, held)
    count = 1 + sum(held_out.due(s, between, k) for k in range(1, steps + 1))  # one before the first step
    assert between >= 5 * batches_per_epoch and count == 1 + held_out.still_due(s, between, 0)
    assert count == 2 or count * held * held_out.COST <= steps * batch * accumulate / 10


def test_a_run_writes_what_it_promises(run, tmp_path, capsys):
    assert run("--ema", 0.5) == 0
    folder, said = tmp_path / "run", capsys.readouterr()
    assert "the average's decay rises to 0.308\n" in said.out
    assert {p.name for p in folder.iterdir()} >= {
        "settings.json", "metrics.jsonl", "validation", "checkpoints", "lora.safetensors", "report.html",
    }  # fmt: skip
    training, validations = rows(folder), rows(folder, validation=True)
    assert [r["step"] for r in training] == [1, 2, 3, 4]
    assert [r["step"] for r in validations] == [0, 4]
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
    assert "parameters train" in said.out


def test_phases_are_named_and_the_last_line_restores_a_picture(run, pictures, tmp_path, capsys):
    folder = tmp_path / "it's my run"
    assert run("--output-dir", folder, "--device", "cpu") == 0
    *lines, command = capsys.readouterr().out.splitlines()
    for phase in ("encoding ", "loading the transformer", "training", f"done; curves and pictures: {folder}"):
        assert any(re.match(r"\d+s: ", line) and phase in line for line in lines), phase
    assert "--device cpu" in command and "--output-dir" not in command
    command = command.replace("PICTURE", shlex.quote(str(next(pictures.glob("*.png")))))
    command = command.replace("restored.png", shlex.quote(str(tmp_path / "restored.png")))
    done = subprocess.run(f"{command} --steps 1 --tile 64", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "restored.png").exists()


def test_a_part_of_a_degradation_that_changes_nothing_is_named(capsys):
    for spec, side, message in (
        ("gamma=10,gamma=0.1", None, "changes nothing"),
        ("(gamma=2,gamma=0.5)@0.5|(contrast=0.5,contrast=2)@0.1", None, "changes nothing"),
        ("noise=0.0005", None, "changes nothing; "),
        ("fade=0/0", None, "leaves next to nothing"),
        ("contrast=0.002", 64, "leaves next to nothing"),
        ("underexpose=12/1/10000", None, "leaves next to nothing"),  # two pictures still differ, by noise
        ("dust=100000/100/1", 64, "leaves next to nothing"),
        ("gamma=10,gamma=10", None, "leaves next to nothing"),
        ("resize=1.005", 48, "changes nothing of 48 x 48 pixels"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"--degrade {spec}: {message}")):
            checks.check_degradation(spec, side)
    for spec, idle in (
        ("resize=0.25,resize=1/area", ""),
        ("resize=1.005", ""),
        ("blur=1,noise=0.1@0,gamma=1", "noise, gamma"),
        ("(blur=1@1|noise=0.1)", "noise"),
        ("blur=1,(dust=0,jpeg=50)", "dust"),
        ("guide@0,blur=1", "blur, noise, jpeg"),
        ("blur=1,scratches=1/1/0.5", ""),
        ("blur=8,noise=0.25", ""),  # large forms stay
        *((name, "") for name in degrade.PRESETS),
    ):
        checks.check_degradation(spec)
        said = f"note: --degrade {spec}: never changes a picture: {idle}\n" if idle else ""
        assert capsys.readouterr().err == said, spec
    checks.check_degradation("blur=4,noise=0.1,jpeg=50", 64)


def test_the_printed_command_is_one(pictures):
    settings = parse_flags(Settings, ["--hr-root", str(pictures), "--no-resume", "--plan", "--degrade", "blur=1"], "")
    assert given(settings) == f"--hr-root {pictures} --degrade blur=1 --no-resume --plan"
    assert parse_flags(Settings, shlex.split(given(settings)), "") == settings


def test_what_is_filled_in_is_no_changed_setting(run, tmp_path):
    assert run("--steps", 1) == 0
    table = report.settings_table(json.loads((tmp_path / "run" / "settings.json").read_text()))
    changed, others = dict(table["changed"]), dict(table["others"])
    assert changed["resolution"] == "64" and {"prompt", "degrade", "gradient_checkpointing"} < others.keys()
    argv = shlex.split(table["command"])[2:]
    assert {word[2:].replace("-", "_") for word in argv if word.startswith("--")} == changed.keys()


def test_killed_and_resumed_runs_end_bit_for_bit_like_the_others():
    """The short form; `python tests/kill_test.py` is the long one, with 30 runs."""
    assert kill_test.main(["--runs", "2"]) == 0


def test_a_changed_setting_is_named_and_must_be_confirmed(run, tmp_path, capsys):
    assert run("--steps", 2) == 0
    capsys.readouterr()
    assert run("--resume", "--lr", 3e-4) == 2  # more steps are a change too: the cosine ends elsewhere
    error = capsys.readouterr().err
    assert "lr was 0.0001, is 0.0003" in error and "pictures" not in error
    assert run("--resume", "--degrade", "denoise", "--prompt", "another") == 2
    error = capsys.readouterr().err
    assert "prompt was" in error and "degrade was" in error and "pictures" not in error
    assert "steps was 2, is 4" in error
    assert "--accept-changes" in error
    lora = tmp_path / "run" / "lora.safetensors"
    assert run("--resume", "--accept-changes", "--init-lora", shutil.copy(lora, tmp_path / "start.safetensors")) == 2
    assert f"--init-lora {tmp_path / 'start.safetensors'}: {tmp_path / 'run'} continues from" in capsys.readouterr().err
    assert run("--resume", "--lr", 3e-4, "--accept-changes") == 0
    said = capsys.readouterr().out
    assert "continuing from" in said and "lora.safetensors is that of the run before, until this one is done" in said
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["best_step"] == 4  # those of before may have had easier pictures
    changed = ["after step-000002: steps was 2, is 4; lr was 0.0001, is 0.0003"]
    assert run("--resume", "--lr", 3e-4) == 0
    assert "is that of the run before" not in capsys.readouterr().out  # it is that of this one, which was done
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["changes"] == changed
    assert trained_with(metadata(lora), "")["changes"] == changed


def test_a_changed_picture_or_caption_must_be_confirmed(run, tmp_path, capsys):
    """A picture of the same name and shape, a caption that was not there: the run would not end as it began."""
    hr = make_pictures(tmp_path / "hr")
    first, second = sorted(hr.iterdir())[:2]
    assert run("--steps", 2, "--hr-root", hr) == 0
    before = first.read_bytes()
    Image.new("RGB", Image.open(first).size).save(first)
    assert run("--hr-root", hr, "--steps", 2) == 2
    assert "pictures were added, removed or changed" in capsys.readouterr().err
    first.write_bytes(before)
    assert run("--hr-root", hr, "--steps", 2) == 0
    first.write_bytes(before[:-1] + b"x")  # the size stays: of an uncompressed picture it does so often
    assert run("--hr-root", hr, "--steps", 2) == 2
    assert "pictures were added, removed or changed" in capsys.readouterr().err
    first.write_bytes(before)
    second.with_suffix(".txt").write_text("Restore the sky.")
    assert run("--hr-root", hr, "--steps", 2) == 2
    assert "pictures were added, removed or changed" in capsys.readouterr().err
    assert run("--hr-root", hr, "--steps", 3, "--accept-changes") == 0
    assert "pictures to validate on may have been trained on before" in capsys.readouterr().out


def test_a_changed_alpha_says_what_the_learned_part_counts(run, capsys):
    assert run("--steps", 2, "--rank", 4) == 0
    assert run("--steps", 3, "--rank", 4, "--alpha", 16, "--accept-changes") == 0
    assert "alpha was None, is 16.0: what is learned counts 4 times" in capsys.readouterr().out
    assert run("--steps", 4, "--rank", 4, "--alpha", 16, "--prompt", "sharp", "--accept-changes") == 0
    assert "if pictures changed too, those to validate on may have been" in capsys.readouterr().out


def test_pictures_that_are_held_out_only_now_have_been_trained_on_whatever_the_prompt(run, capsys):
    assert run("--steps", 2, "--validate-every-epochs", 0) == 0
    assert run("--steps", 3, "--prompt", "sharp", "--accept-changes") == 0
    assert "note: pictures to validate on may have been" in capsys.readouterr().out


def test_a_picture_that_keeps_its_size_when_it_is_edited_is_known_by_its_time(tmp_path):
    for ending, known in (
        ("bmp", True),
        ("tga", True),
        ("png", False),
    ):  # of a PNG the time does not count: a copy is as good
        file = tmp_path / f"a.{ending}"
        Image.effect_noise((300, 300), 50).convert("RGB").save(file)
        picture = data.Picture(file, file.name, 300, 300)
        before = runs.marks([picture])
        content = bytearray(file.read_bytes())
        content[len(content) // 4] ^= 1
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))
        assert (runs.marks([picture]) != before) == known


def test_a_picture_that_is_turned_in_place_is_another(tmp_path):
    """The EXIF of a WebP stands at its end, and the turn in front of the camera's notes."""
    file, parts = tmp_path / "a.webp", []
    for way in (2, 3):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = way
        exif.get_ifd(ExifTags.IFD.Exif)[37500] = bytes(30_000)
        parts.append(exif.tobytes().removeprefix(b"Exif\0\0"))
    Image.effect_noise((300, 300), 50).convert("RGB").save(file, exif=parts[0])
    picture, content = data.Picture(file, file.name, 300, 300), file.read_bytes()
    before = runs.marks([picture])
    assert content.count(parts[0]) == 1
    file.write_bytes(content.replace(*parts))
    assert runs.marks([picture]) != before


def test_a_pipe_as_caption_is_not_waited_for_and_an_empty_one_is_named(run, tmp_path, capsys):
    make_pictures(hr := tmp_path / "hr", texts=0)
    names = sorted(path.stem for path in hr.glob("*.png"))
    os.mkfifo(hr / f"{names[0]}.txt")
    (hr / f"{names[1]}.txt").touch()
    (hr / f"{names[2]}.txt").symlink_to("nowhere")
    assert run("--steps", 1, "--hr-root", hr) == 0
    printed = capsys.readouterr().out
    assert "3 files left out (3 .txt)" in printed
    for name, reason in zip(names, ("not a file", "an empty caption; --prompt", "a link that leads"), strict=False):
        assert f"{name}.txt: {reason}" in printed


def test_a_run_that_continues_keeps_its_start_in_settings_json(run, tmp_path, capsys):
    assert run("--steps", 1, "--output-dir", tmp_path / "first") == 0
    assert run("--steps", 2, "--checkpoint-every", 1, "--init-lora", tmp_path / "first") == 0
    out = capsys.readouterr().out  # its pictures are of three shapes, and batches of two have one shape
    assert re.search(r"(\d+) pictures to train on for ([\d.]+) epochs", out.split("new run")[2]).groups() == (
        "11",
        "0.33",
    )
    for where, step in (("checkpoints/step-000001", 1), (".", 2)):
        about = metadata(tmp_path / "run" / where / "lora.safetensors")
        assert trained_with(about, "")["steps"] == step and about["ss_steps"] == str(step)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    (tmp_path / "run" / "lora.safetensors").unlink()
    assert run("--steps", 2, "--checkpoint-every", 1) == 0
    assert "the code was edited" not in capsys.readouterr().out
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["init_lora"] == str(tmp_path / "first")
    assert settings["defaults"]["init_lora"] is None  # so that the report's command has it
    shutil.copy(tmp_path / "run" / "lora.safetensors", tmp_path / "first")  # another LoRA of the same name
    (tmp_path / "run" / "settings.json").write_text(
        json.dumps(settings | {"versions": settings["versions"] | {"code": "0"}})
    )
    assert run("--steps", 2) == 0
    assert "the code was edited or updated since; the result may differ" in capsys.readouterr().out
    assert run("--steps", 2, "--init-lora", tmp_path / "first") == 2
    assert "continues from step-000002; leave the flag out" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "lora.safetensors").unlink()
    assert run("--steps", 2) == 2  # it would begin without it
    assert f"init_lora was {tmp_path / 'first'}, is None. Give --accept-changes" in capsys.readouterr().err
    assert run("--steps", 2, "--init-lora", tmp_path / "first") == 0


def test_a_base_that_was_trained_for_another_objective_is_said(pictures, capsys, monkeypatch):
    argv, line = ["--hr-root", str(pictures), "--plan", "--steps", "1"], " was trained for bridge, so kontext starts "
    for objective in ("bridge", "kontext"):
        checks.check_training(parse_flags(Settings, [*argv, "--objective", objective], ""))
        assert (line in capsys.readouterr().err) == (objective == "kontext")
    checks.check_training(parse_flags(Settings, [*argv, "--context", "--guidance", "4"], ""))
    said = capsys.readouterr().err
    assert "was trained for context False, not for True" in said and "with --guidance 1.5, not with 4" in said
    checks.check_training(parse_flags(Settings, [*argv, "--degrade", "low-light"], ""))
    assert not capsys.readouterr().err
    checks.check_training(parse_flags(Settings, [*argv, "--start-time", "auto"], ""))
    assert "was trained for start time 1.0; auto may find another" in capsys.readouterr().err
    about = trained_with(metadata(base := find(TINY, "transformer")[0]), base) | {"prompts": ["Fix it.", "a"]}
    monkeypatch.setattr(checks, "training_of", lambda *_: (base, about))
    checks.check_training(parse_flags(Settings, [*argv, "--degrade", "low-light"], ""))
    said = f"was trained with --prompt 'Fix it.', not with {degrade.PROMPTS['low-light']!r}\n"
    assert capsys.readouterr().err.endswith(f"{base.name}: {said}")
    about |= {"vae": "another", "base": "what --full began with", "prompts": ["Fix it."]}
    checks.check_training(parse_flags(Settings, [*argv, "--prompt", "Fix it."], ""))
    said = f"note: {base}: was trained on another autoencoder, or another file of it\n"
    assert capsys.readouterr().err == said


def test_a_start_from_a_lora_that_was_trained_for_something_else_says_so(run, tmp_path, capsys):
    assert run("--steps", 1) == 0
    file, about = tmp_path / "lora.safetensors", trained_with(metadata(tmp_path / "run" / "lora.safetensors"), "")
    other = {
        "kontext_min": json.dumps(
            about | {"base": "another", "vae": "another", "start_time": 0.001, "source_noise": 0.5}
        )
    }
    save_file(load_file(tmp_path / "run" / "lora.safetensors"), file, other)
    capsys.readouterr()
    assert run("--steps", 1, "--objective", "kontext", "--init-lora", file, "--overwrite") == 0
    said = capsys.readouterr().err
    assert "was trained for bridge, not for kontext" in said and "on another base model" in said
    again = ["--steps", 1, "--objective", "kontext", "--output-dir", tmp_path / "b"]
    assert run(*again, "--init-lora", tmp_path / "run") == 0
    assert "note: --init-lora" not in capsys.readouterr().err
    assert run("--steps", 1, "--context", "--init-lora", file, "--overwrite") == 0
    said = capsys.readouterr().err
    for what in ("context False, not for True", "source noise 0.5, not for 0.0", "start time 0.001, not for 1"):
        assert f"was trained for {what}\n" in said
    assert "--prompt" not in said and "--guidance" not in said and "on another autoencoder" in said
    assert run("--steps", 1, "--guidance", 4, "--prompt", "Brighten it.", "--init-lora", file, "--overwrite") == 0
    said = capsys.readouterr().err
    assert (
        f"note: --init-lora {file}: was trained with --prompt {degrade.PROMPTS['guide']!r}, not with 'Brighten it.'\n"
        in said
    )
    assert f"note: --init-lora {file}: was trained with --guidance 1.5, not with 4\n" in said


def test_several_tasks_take_turns_and_each_has_its_prompt(run, small_bundle, pictures, tmp_path, capsys):
    """--degrade twice: picture i of epoch e has task (i + e) mod 2, as if that one alone were given."""
    prompts = {"noise=0.1": "Remove the noise.", "blur=2": "Remove the blur."}
    buckets, names = data.buckets(64), list(prompts)
    make = partial(data.Pairs, data.scan(pictures)[0], buckets, seed=1)
    one = [make(degrade=degrade.parse(name), prompt=prompt) for name, prompt in prompts.items()]
    both = tasks.Tasks(make(degrade=degrade.parse("guide"), prompt="?"), names, list(prompts.values()))
    for epoch, i in ((0, 3), (0, 4), (1, 3), (2, 3)):
        k = (epoch + i) % 2
        expected, item = one[k][epoch, i], both[epoch, i]
        assert item["prompt"] == prompts[names[k]] and torch.equal(item["control"], expected["control"])
        assert torch.equal(item["target"], expected["target"]) and item["name"] == expected["name"]
    flags = [word for pair in prompts.items() for word in zip(("--degrade", "--prompt"), pair, strict=True)]
    argv = [word for words in flags for word in words]
    assert run(*argv, "--steps", 2) == 0
    printed = capsys.readouterr().out
    assert "encoding 2 prompts" in printed and "captions are not read" in printed
    about = trained_with(metadata(tmp_path / "run" / "lora.safetensors"), "")
    assert (about["degrade"], about["prompt"]) == ("noise=0.1 + blur=2", "Remove the noise.")
    for prompt, said in (
        ((), "that of the first"),
        (("--prompt", "?"), "of none"),
        (("--prompt", prompts["blur=2"]), ""),
    ):
        words = ["--input", next(pictures.glob("*.png")), "--output", tmp_path / "o.png", "--overwrite", *prompt]
        words += ["--lora", tmp_path / "run", "--weights", small_bundle, "--steps", 1, "--tile", 64]
        assert sample.main([str(word) for word in words]) == 0
        error = capsys.readouterr().err
        line = f"has several tasks; the prompt is {said}; --prompt chooses: ['Remove the noise.', 'Remove the blur.']"
        assert line in error if said else "several tasks" not in error
    assert run(*argv, "--steps", 2) == 0  # continues: the settings are those of before
    assert run(*argv, "--prompt", "a third", "--steps", 2) == 2
    assert "--prompt: got 3 for 2 --degrade" in capsys.readouterr().err


def test_a_run_is_overwritten_only_when_all_else_is_right(run, tmp_path, capsys):
    assert run("--steps", 2) == 0
    before = (tmp_path / "run" / "lora.safetensors").read_bytes()
    for wrong in (["--lora-targets", "nothing"], ["--shard"], ["--weights", tmp_path / "nowhere"]):
        assert run("--overwrite", *wrong) == 2
        assert (tmp_path / "run" / "lora.safetensors").read_bytes() == before
        assert runs.latest_checkpoint(tmp_path / "run").name == "step-000002"
    assert run("--overwrite", "--steps", 1) == 0
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert len(rows(tmp_path / "run")) == 1


def test_a_run_that_lost_its_settings_or_has_other_pictures_says_so(run, pictures, tmp_path, capsys):
    hr = shutil.copytree(pictures, tmp_path / "hr")
    assert run("--hr-root", hr, "--steps", 2) == 0
    (hr / "03.png").unlink()
    assert run("--hr-root", hr, "--steps", 2) == 2
    assert "pictures were added, removed or changed" in capsys.readouterr().err
    for text in ("{ not JSON", None):
        (tmp_path / "run" / "settings.json").unlink()
        if text:
            (tmp_path / "run" / "settings.json").write_text(text)
        assert run("--hr-root", hr, "--steps", 2) == 2
        assert "settings.json: missing or broken" in capsys.readouterr().err
    assert run("--hr-root", hr, "--steps", 3, "--accept-changes") == 0
    assert "settings.json: missing or broken, so nothing tells what is changed" in capsys.readouterr().out


def test_a_picture_that_breaks_later_is_named_once_and_counted(run, pictures, tmp_path, capsys):
    """A TIFF that is cut off looks whole until it is decoded; eight epochs meet it eight times."""
    hr = shutil.copytree(pictures, tmp_path / "hr")
    Image.open(hr / "00.png").save(hr / "cut.tif")
    (hr / "cut.tif").write_bytes((hr / "cut.tif").read_bytes()[:-3000])
    assert run("--hr-root", hr, "--steps", 60, "--validate-every-epochs", 0, "--checkpoint-every", 60) == 0
    assert capsys.readouterr().out.count("cut.tif") == 1
    assert [r["unreadable"] for r in rows(tmp_path / "run")][-1] == 1


def test_pictures_that_change_while_the_run_goes_on_are_said(run, pictures, tmp_path, capsys, monkeypatch):
    """Also the degraded ones of --lr-root."""
    hr, lr = (shutil.copytree(pictures, tmp_path / name) for name in ("hr", "lr"))
    for file in lr.glob("*.png"):
        Image.open(file).point(lambda x: x // 2).save(file)
    flags = ["--hr-root", hr, "--lr-root", lr, "--prompt", "Mend this.", "--steps", 1, "--validate-every-epochs", 0]
    said = "note: pictures were changed or removed while the run went on\n"
    assert run(*flags) == 0
    assert said not in capsys.readouterr().out
    rewind = runs.rewind_metrics
    for folder in (hr, lr):

        def replace(*args, folder=folder):  # the run begins here
            shutil.copyfile(folder / "03.png", folder / "00.png")
            return rewind(*args)

        monkeypatch.setattr(runs, "rewind_metrics", replace)
        assert run(*flags, "--overwrite") == 0
        assert said in capsys.readouterr().out


def test_results_have_the_permissions_that_the_umask_gives(run, tmp_path):
    assert run("--steps", 1) == 0
    plain = tmp_path / "plain"
    plain.write_text("")
    for file in (tmp_path / "run" / "lora.safetensors", *(tmp_path / "cache" / "prompts").iterdir()):
        assert file.stat().st_mode == plain.stat().st_mode, file


def test_a_loss_that_is_not_finite_is_skipped_and_in_the_end_stops_the_run(run, tmp_path, monkeypatch, capsys):
    true_loss, calls = flow.loss, []

    def broken(*args):
        calls.append(None)
        return true_loss(*args) * (math.nan if len(calls) in bad else 1)

    monkeypatch.setattr(flow, "loss", broken)
    monkeypatch.setattr(train, "MAX_SKIPS", 3)
    bad = {2}
    assert run("--validate-every-epochs", 0) == 0
    assert [r["skipped"] for r in rows(tmp_path / "run")] == [0, 1, 1, 1]
    calls.clear()
    bad = set(range(4, 100))
    assert run("--validate-every-epochs", 0, "--steps", 20, "--overwrite") == 1
    error = capsys.readouterr().err
    assert "no finite loss for 3 steps" in error
    assert "step-000002" in error  # the last good checkpoint
    kept = load_file(runs.latest_checkpoint(tmp_path / "run") / "trained.safetensors")
    assert all(t.isfinite().all() for t in kept.values())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory; --plan shows what it takes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; --plan shows"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader worker was killed, perhaps"),
    ],
)
def test_want_of_memory_is_one_line(run, monkeypatch, capsys, error, line):
    def full(*_):
        raise error

    monkeypatch.setattr(flow, "loss", full)
    assert run("--steps", 1) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"train.py: {line}") and "Traceback" not in said


def test_a_validation_that_is_not_finite_is_one_line(run, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("the result is not finite (NaN or infinity): a LoRA is too strong.")

    monkeypatch.setattr(validation, "validate", broken)
    assert run("--steps", 1) == 1
    said = capsys.readouterr().err
    assert "run: a validation failed, the result is not finite" in said and "Traceback" not in said


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch, capsys):
    real = runs.save_file

    def full(tensors, path, *args, **kwargs):
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        return real(tensors, path, *args, **kwargs)

    monkeypatch.setattr(runs, "save_file", full)
    assert run("--validate-every-epochs", 0) != 0
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert runs.latest_checkpoint(tmp_path / "run").name == "step-000002"
    monkeypatch.undo()
    assert run("--validate-every-epochs", 0, "--resume") == 0


@pytest.mark.parametrize(
    ("objective", "full", "steps", "lr", "bound"),
    [  # the base was trained as a bridge: from pure noise all weights take 300 steps to 0.1
        ("bridge", True, 60, 2e-3, 0.1),
        ("bridge", False, 40, 5e-3, 0.4),
        ("kontext", True, 50, 2e-3, 0.4),
        ("kontext", False, 80, 3e-3, 0.4),
    ],
)
def test_four_crops_are_learnt_by_heart(objective, full, steps, lr, bound):
    """On weights/tiny; `python tests/memorise.py` goes on to 0.1 where this one stops short of it."""
    assert memorise.fall(objective, full, steps, lr) < bound


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
        (["--output-dir", "{here}/text.jpg/run"], "--output-dir {here}/text.jpg/run: can't be made or written: Not a"),
        (["--degrade", "blurr=2"], "blurr"),
        (["--degrade", "jpeg=3 0"], "quality of jpeg must be"),
        (["--steps", "0"], "--steps: got 0"),
        (["--seed", "4294967296"], "--seed: got 4294967296"),  # torch would take it for 0
        (["--objective", "kontext", "--source-noise", "0.1"], "starts from pure noise"),
        (["--lora-targets", "nothing"], "matches no Linear"),
        (["--shard"], "torchrun"),
        (["--guidance", "nan"], "--guidance: got nan"),
        (["--alpha", "inf"], "--alpha: got inf"),
        (["--val-root", "{here}/empty"], "--val-root {here}/empty: no usable picture"),
        (
            ["--hr-root", "{here}", "--output-dir", "{here}/run"],
            "/run: would write among your pictures in {here}; name",
        ),
        (["--full", "--dtype", "bfloat16"], "leave --dtype out"),
        (["--lora-targets", "(.+)+x"], "--lora-targets (.+)+x: such a pattern may search for ever"),
        (["--lora-targets", "(.|.)*x"], "--lora-targets (.|.)*x: such a pattern may search for ever"),
        (["--full", "--init-lora", "{here}/text.jpg"], "--full trains no LoRA (merge it: python -m"),
        (["--full", "--rank", "4"], "--full trains no LoRA, so it excludes --rank; leave one"),
        (["--objective", "kontext", "--context"], "--objective kontext has the reference tokens of"),
        (["--init-lora", "{here}/nowhere"], "--init-lora {here}/nowhere: no such file or folder; check the path"),
        (["--lr-root", "{here}/nowhere"], "--lr-root {here}/nowhere: no such folder; check the path"),
        (["--lr-root", "{hr}"], "--lr-root {hr}: is --hr-root or in it"),
        (["--hr-root", "{here}", "--lr-root", "{here}/empty"], "--lr-root {here}/empty: is --hr-root or in it"),
        (
            ["--lr-root", "{here}/empty", "--degrade", "guide"],
            "holds degraded pictures, so it excludes --degrade",
        ),
        (["--val-root", "{hr}"], "--val-root {hr}: has pictures in common with --hr-root {hr}; move one of"),
        (["--val-root", "{hr}/.."], "--val-root {hr}/..: has pictures in common with --hr-root {hr}; move one of"),
        (["--workers", "5000"], "--workers: got 5000"),
        (["--warmup", "7", "--steps", "6"], "--warmup: got 7, but the run has 6 steps"),
        (["--resolution", "100000"], "--resolution: got 100000, expected at least 24 and at most 4096"),
        (["--rank", "100000"], "--rank: got 100000, expected 1 to"),
        (["--cache-dir", "{here}/text.jpg"], "--cache-dir {here}/text.jpg: can't be written"),
        (["--cache-dir", "{hr}/cache"], "--cache-dir {hr}/cache: would write among your pictures"),
        (["--alpha", "1e-300"], "--alpha: got 1e-300, expected at least 0.001"),
        (["--output-dir", "x" * 256], f"--output-dir {'x' * 200}: File name too long; check the path"),
        (["--vae", "{here}/tiny.txt"], "tiny.txt: not a safetensors file"),
        (["--output-dir", "/"], "--output-dir /: is no place for a run"),
        (["--output-dir", "{weights}/transformer", "--overwrite"], "/transformer: is no place for a run"),
        (
            ["--val-root", "{here}/empty", "--validate-every-epochs", "0"],
            "validates nothing, so it excludes --val-root",
        ),
        (["--validation-prompt", "a", "--validate-every-epochs", "0"], "so it excludes --validation-prompt; leave"),
        (["--stream", "--gradient-checkpointing", "half"], "--stream recomputes every block, so it excludes --grad"),
        (["--degrade", "blur=1", "--degrade", "noise=0.1"], "--degrade: two tasks have the same prompt"),
        *(
            (["--degrade", spec], f"--degrade {spec}: changes nothing")
            for spec in ("noise=0", "blur=1@0", "downsample=1", "(noise=0@0.5|blur=0@0.5),jpeg=5@0")
        ),
        (["--prompt", "\udc80"], "--prompt '\\udc80': expected text in UTF-8"),
        (["--validation-prompt", "\udc80"], "--validation-prompt '\\udc80': expected text in UTF-8"),
        (["--lora-targets", "x" * 10000], "xxx ... xxx"),
        (["--hr-root", "{here}/mine"], "/mine/restored/deep/00.png: a result of this program"),
        (["--hr-root", "{here}/mine/restored/deep"], "/mine/restored/deep/00.png: a result of this program"),
        (["--hr-root", "{here}/runs/old/validation"], "/runs/old/validation/00.png: a result of this program"),
        (["--degrade", "blur=1", "--degrade", "jpeg=9", "--prompt", "a", "--prompt", "a "], "have the same prompt"),
        (["--val-root", "{here}/runs"], "/runs/old/validation/00.png: a result of this program"),
        (["--val-root", "{here}/empty", "--output-dir", "{here}/empty/run"], "run: would write among your pictures in"),
        (
            ["--hr-root", "{here}/d/validation", "--output-dir", "{here}/d"],
            "/d: would write among your pictures in",
        ),
        (["--val-root", "{here}/c/latents/a", "--cache-dir", "{here}/c"], "/c: would write among your pictures in"),
        (["--hr-root", "{here}/sheets"], "/sheets/step-000001.png: a result of this program"),
        (
            ["--output-dir", "{here}/runs/old/checkpoints"],
            "/runs/old/checkpoints: lies in another run, {here}/runs/old",
        ),
        (
            [
                "--degrade",
                "blur=1",
                "--prompt",
                "a",
                "--degrade",
                "jpeg=9",
                "--prompt",
                "b",
                "--steps",
                "1",
                "--batch-size",
                "1",
            ],
            "--degrade: got 2 tasks, but the run sees 1 pictures; give more",
        ),
        (["--degrade", "blur=1", "--prompt", "a", "--degrade", "blur=1.0", "--prompt", "b"], "two tasks are the same"),
        (["--ema", "1e-300"], "--ema: got 1e-300, expected 0 or at least 0.001"),
        (["--source-noise", "1e-7"], "--source-noise: got 1e-07, expected 0 or at least 0.001"),
        (["--lr", "1e-9", "--steps", "2"], "--lr: got 1e-09, which moves no weight by more than 2e-09 in 2 steps"),
        (["--start-time", "1e-300"], "--start-time: got 1e-300, expected auto or a number from 0.001 to 1"),
        *(
            (["--weights", "{bad}", "--defaults", text], f"{{bad}}/defaults.json: {message}")
            for text, message in (
                ('{{"batch_size": 2.5}}', "batch_size is 2.5, expected a number such as 1"),
                ('{{"lr": NaN}}', "--lr: got nan, expected at least 1e-09"),
                ('{{"lr": 5}}', "--lr: got 5, expected at least 1e-09"),
            )
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(run, small_bundle, pictures, tmp_path, capsys, flags, message):
    for name in ("empty", "broken", "d/validation", "c/latents/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "tiny.txt").write_text("mine")
    (tmp_path / "broken" / "text.jpg").write_text("this is no picture")
    photo = (Path(__file__).parent / "photos" / "bowl.jpg").read_bytes()
    (tmp_path / "broken" / "cut.JPG").write_bytes(photo[: len(photo) // 3])
    flux = small_bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    bad = shutil.copytree(small_bundle, tmp_path / "bad") if "{bad}" in flags else ""
    if bad:  # a file's text, not a flag
        (bad / "defaults.json").write_text(flags[-1].format())
        flags = flags[:2]
    shutil.copytree(pictures, tmp_path / "mine" / "restored" / "deep")
    (tmp_path / "mine" / "restored" / ".restored-with.jsonl").write_text('{"picture": "deep/00.png"}\n[]\n')
    for name in ("left-out.txt", "metrics.jsonl"):
        (shutil.copytree(pictures, tmp_path / "runs/old/validation", dirs_exist_ok=True).parent / name).touch()
    (tmp_path / "runs" / "old" / "checkpoints").mkdir()
    runs.save_picture(tmp_path / "runs" / "old", 1, Image.new("RGB", (64, 64)))
    (tmp_path / "sheets").mkdir()
    (tmp_path / "runs/old/validation/step-000001.png").rename(tmp_path / "sheets" / "step-000001.png")
    names = {"here": tmp_path, "flux": flux, "bad": bad, "hr": pictures, "weights": small_bundle}
    assert run(*(f.format(**names) for f in flags)) == 2
    printed = capsys.readouterr()
    error = printed.err.strip().splitlines()[-1]
    assert error.startswith("train.py: ")
    assert message.format(**names) in error
    assert "Traceback" not in printed.err
    if "broken" in flags[-1]:
        assert "text.jpg: not a picture" in printed.out
        assert "cut.JPG: " in printed.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-dir", "run\r"], "argument --output-dir: got 'run\\r', with a line end; save the script with"),
        (["—steps", "1"], "—steps: starts with another dash than -; type it again"),
        (["\r"], "\\r: belongs to no flag"),
        ([""], ": belongs to no flag"),
    ],
)
def test_words_of_other_systems_are_one_clear_line(run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(*flags)
    error = capsys.readouterr().err
    assert f"train.py: {message}" in error and error.count("\n") == 1


def test_a_tilde_that_the_shell_leaves_is_your_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_flags(Settings, ["--hr-root=~/photos"], "").hr_root == Path("/home/me/photos")
    assert parse_flags(Settings, ["--hr-root", "~nosuchuser/photos"], "").hr_root == Path("~nosuchuser/photos")


def test_your_files_in_a_checkpoint_stay(run, tmp_path, capsys):
    """One that a run passes, and one of which you kept the LoRA only."""
    assert run("--steps", 4, "--checkpoint-every", 1, "--validate-every-epochs", 0) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{k:06d}" for k in (2, 3, 4)]
    state = json.loads((folder / "step-000004" / "state.json").read_text())
    (folder / "step-000002" / "test.png").touch()
    for path in (folder / "step-000003").iterdir():
        if path.name != "lora.safetensors":
            path.unlink()
    for step in (3, 5, 6, 7):
        runs.save_checkpoint(tmp_path / "run", {}, state | {"step": step}, lambda path: None)
    assert (folder / "step-000002" / "test.png").exists() and not (folder / "step-000004").exists()
    kept = [p for p in folder.glob("step-000003-kept*") if (p / "lora.safetensors").exists()]
    said = capsys.readouterr().out
    assert len(kept) == 1 and f"no whole checkpoint any more; renamed to {kept[0].name}\n" in said
    assert f"note: {folder / 'step-000002'}: is kept, because test.png in it is not the run's\n" in said
    assert run("--steps", 8) == 2
    assert "checkpoints/step-000002/test.png, which no run wrote; move it" in capsys.readouterr().err


def test_your_copies_of_a_whole_model_in_a_checkpoint_stay(tmp_path):
    for k in range(1, 7):
        for name in ("config.json", "diffusion_pytorch_model.safetensors", *["mine.safetensors"] * (k == 2)):
            (tmp_path / "checkpoints" / f"step-{k:06d}" / "transformer").mkdir(parents=True, exist_ok=True)
            (tmp_path / "checkpoints" / f"step-{k:06d}" / "transformer" / name).touch()
        (tmp_path / "checkpoints" / f"step-{k:06d}" / "state.json").write_text("{}")
    runs.save_checkpoint(tmp_path, {}, {"step": 7, "best_step": None}, lambda path: None)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step-{k:06d}" for k in (2, 5, 6, 7)]


def test_the_best_step_is_kept_when_changed_settings_are_accepted(run, tmp_path):
    """What follows is not compared with it, and its checkpoint is deleted in time."""
    assert run("--steps", 2, "--validate-every-epochs", 0) == 0
    folder = tmp_path / "run" / "checkpoints"
    runs.keep_best(tmp_path / "run", 2)
    runs.keep_best(tmp_path / "run", None)
    (folder / "step-000002-best" / "mine").touch()
    runs.keep_best(tmp_path / "run", 2)  # under another name
    assert (folder / "step-000002-best" / "mine").exists() and len([*folder.glob("step-000002-best-*")]) == 1
    (folder / "step-000002-best" / "mine").unlink()
    assert [p.name for p in (folder / "step-000002-best").iterdir()] == ["lora.safetensors"]
    assert run("--steps", 9, "--checkpoint-every", 1, "--validate-every-epochs", 0, "--accept-changes") == 0
    assert not (folder / "step-000002").exists() and (folder / "step-000002-best" / "lora.safetensors").exists()


def test_what_is_missing_before_the_imports_is_one_line(tmp_path, monkeypatch):
    assert ready.problem() is None
    for text, said in (
        ('[mine]\nspec = "blur=1', "mend it, or take it back"),
        ('[mine]\nspec = "blur=1"\n', "[mine]: expected a name without blanks, and spec and prompt"),
        ('[mine]\nspec = 3\nprompt = ""\n', "[mine]: expected"),
        ('["my own"]\nspec = "blur=1"\nprompt = ""\n', "[my own]: expected"),
        ("mine = 1\n", "[mine]: expected"),
        ('\ufeff[mine]\nspec = "blur=1"\nprompt = "a"\n', None),  # as Windows' editors save it
    ):
        (tmp_path / "presets.toml").write_text(text, encoding="utf-8")
        found = ready.problem(tmp_path / "presets.toml")
        assert said in found if said else found is None, text
    assert subprocess.run(
        [sys.executable, "-S", "-m", "kontext_min.extras.contact_sheet"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    ).stderr.startswith(f"kontext_min: {sys.executable} lacks torch, ")
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    assert "expected 3.11 or later" in ready.problem()
    monkeypatch.undo()
    monkeypatch.setattr(ready, "PACKAGES", ("numpy", "no_such_package"))
    assert f"{sys.executable} lacks no_such_package; activate the environment" in ready.problem()


def test_a_preset_that_has_changed_is_another_degradation(run, monkeypatch, capsys):
    assert run("--steps", 1) == 0
    monkeypatch.setitem(degrade.PRESETS, "guide", "blur=3")
    assert run("--steps", 1) == 2
    assert "settings changed: the operators of --degrade changed." in capsys.readouterr().err


def test_a_cache_behind_a_link_that_leads_nowhere_is_named(run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert run("--cache-dir", tmp_path / "link") == 2
    assert f"--cache-dir {tmp_path / 'link'}: can't be written" in capsys.readouterr().err


def test_all_weights_train_in_float32_on_a_machine_that_multiplies_bfloat16(run, monkeypatch, tmp_path, capsys):
    """Of a checkpoint the weights to use must be whole too, though the run continues from others."""
    monkeypatch.setattr(train, "compute_dtype", lambda choice, device: torch.bfloat16)
    flags = ("--full", "--validate-every-epochs", 0)
    assert run(*flags) == 0
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        file = tmp_path / "run/checkpoints/step-000004/transformer" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        assert run(*flags) == 2
        assert re.search(f"step-000004: broken .*{name}.*; delete it to continue", capsys.readouterr().err)
        file.write_bytes(whole)
    shutil.copytree(tmp_path / "run/checkpoints/step-000004", tmp_path / "run/checkpoints/step-000009")  # it went on
    result = tmp_path / "run" / "transformer"
    assert run("--transformer", result, "--output-dir", tmp_path / "next", "--plan") == 0
    later = tmp_path / "run/checkpoints/step-000009/transformer"
    said = f"note: {result}: is of step 4; its run went on to {later}, and is not at its end\n"
    assert said in capsys.readouterr().err


def test_one_broken_picture_among_good_ones_is_named_and_the_run_goes_on(run, pictures, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for photo in sorted(pictures.glob("*.png"))[:6]:
        (folder / photo.name).write_bytes(photo.read_bytes())
    (folder / "bad.jpg").write_text("this is no picture")
    assert run("--hr-root", folder) == 0
    printed = capsys.readouterr().out
    assert "1 file left out" in printed
    assert (tmp_path / "run" / "left-out.txt").read_text() == "bad.jpg: not a picture of a known format\n"
    assert "bad.jpg: not a picture of a known format" in printed
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["hr_root"] == str(folder)


# ----------------------------------------------------------------------------------------------- what flags come to do


def watched(argv):
    """train.main(argv), and the arguments that its parts were given, in the order of the calls; not those of validate.

    t5 holds weak references to the T5 encoders, t5_gone whether all were gone when the transformer was loaded.
    """
    names = {"loss": flow, "batch": prompts, "AdamW": torch.optim}
    names |= {"checkpoint": checkpointing, "validate": validation, "load_t5": prompts, "load_flux": base}
    seen = SimpleNamespace(**{name: [] for name in names}, t5=[], t5_gone=None, made=[], chosen=[])
    validating = []

    def spy(real, name):
        def call(*args, **kwargs):
            if not validating:
                getattr(seen, name).append((args, kwargs))
            if name == "load_flux":
                seen.t5_gone = all(t5() is None for t5 in seen.t5)
            validating.extend([1] * (name == "validate"))
            result = real(*args, **kwargs)
            if name == "validate":
                validating.pop()
            if name == "load_t5":
                seen.t5.append(weakref.ref(result))
            if name == "batch" and not validating:
                seen.made.append((result, args, kwargs))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, module in names.items():
            patch.setattr(module, name, spy(getattr(module, name), name))
        for table in (flow.SIGMA_DENSITIES, flow.WEIGHTINGS):
            for key, function in table.items():
                patch.setitem(table, key, partial(lambda f, k, *a: (seen.chosen.append(k), f(*a))[1], function, key))
        seen.code = train.main([str(a) for a in argv])
    return seen


@pytest.fixture(scope="module")
def two_runs(small_bundle, pictures, tmp_path_factory):
    """A run by the defaults, and one with another value of every flag below; two steps of three batches of three."""
    here = tmp_path_factory.mktemp("flags")
    for picture in pictures.glob("*.png"):  # partners of one colour
        (here / "lr").mkdir(exist_ok=True)
        Image.new("RGB", Image.open(picture).size, (90, 60, 30)).save(here / "lr" / picture.name)
    (here / "val").mkdir()
    for name in ("a.png", "b.png"):
        Image.open(pictures / "03.png").save(here / "val" / name)
        Image.open(here / "lr" / "03.png").save(here / "lr" / name)
    (here / "few").mkdir()
    for file in pictures.glob("0[0-8].*"):  # three of each shape, so that an epoch is a step
        shutil.copy(file, here / "few")
    common = [
        *("--hr-root", pictures, "--weights", small_bundle, "--resolution", 64, "--steps", 2, "--accumulate", 3),
        *("--batch-size", 3, "--warmup", 0, "--workers", 0),
    ]
    others = [
        *("--hr-root", here / "few", "--lr-root", here / "lr", "--prompt", "Mend this.", "--alpha", 4, "--context"),
        *("--start-time", 0.75, "--sigma", "mode", "--weighting", "cosmap", "--guidance", 3.5, "--lr", 2e-4),
        *("--val-root", here / "val"),
        *("--validate-every-epochs", 1, "--validation-prompt", "Mend that.", "--gradient-checkpointing"),
    ]
    both = []
    for name, more in (("plain", []), ("other", others)):
        folder = here / name
        seen = watched([*common, *more, "--output-dir", folder, "--cache-dir", here / f"{name}-cache"])
        assert seen.code == 0
        seen.rows, seen.lora = rows(folder), load_file(folder / "lora.safetensors")
        seen.texts = {text for (_, texts, *_), _ in seen.batch for text in texts}
        seen.again = [*common, *more, "--output-dir", folder, "--cache-dir", here / f"{name}-cache", "--overwrite"]
        both.append(seen)
    return both


GUIDE = degrade.PROMPTS["guide"]
REACHES = {  # flag: what arrives, its value by default, its value in the other run
    # The partners are of one colour, so that all latents of a batch are one.
    "lr-root": (lambda seen: all((c - c[:1]).abs().max() < 1e-4 for (_, c, *_), _ in seen.loss), [False, True]),
    "prompt": (lambda seen: (GUIDE in seen.texts, "Mend this." in seen.texts), [(True, False), (False, True)]),
    "alpha": (lambda seen: {v.item() for k, v in seen.lora.items() if k.endswith("alpha")}, [{16.0}, {4.0}]),
    "context": (lambda seen: {a[6].context for a, _ in seen.loss}, [{False}, {True}]),
    "start-time": (lambda seen: {a[6].start_time for a, _ in seen.loss}, [{1.0}, {0.75}]),
    "sigma": (lambda seen: "mode" in seen.chosen, [False, True]),
    "weighting": (lambda seen: "cosmap" in seen.chosen, [False, True]),
    "guidance": (lambda seen: {g for a, _ in seen.loss for g in a[5].guidance.tolist()}, [{1.5}, {3.5}]),
    "lr": (lambda seen: seen.rows[0]["lr"], [1e-4, 2e-4]),
    "val-root": (lambda seen: {len(a[2]) for a, _ in seen.validate}, [{1}, {2}]),
    "validate-every-epochs": (lambda seen: len(seen.validate), [2, 3]),
    "validation-prompt": (lambda seen: "Mend that." in seen.texts, [False, True]),
    "gradient-checkpointing": (lambda seen: len(seen.checkpoint) > 0, [False, True]),
}


@pytest.mark.parametrize("flag", REACHES)
def test_a_flag_reaches_its_part(two_runs, flag):
    what, expected = REACHES[flag]
    assert [what(seen) for seen in two_runs] == expected


def test_captions_and_places_reach_the_loss(two_runs):
    """Rows of the prompt are those of the pictures' own texts; sigma covers the path in every step."""
    for seen in two_runs:
        assert {"fix photo 0", "fix photo 1"} <= seen.texts
        assert len(seen.loss) == 6
        called = {id(result): args for result, args, _ in seen.made}
        for (_, _, _, _, _, prompt, _), _ in seen.loss:
            encoded, texts, *_ = called[id(prompt)]
            files = [load_file(encoded[t]) for t in texts]
            assert torch.equal(prompt.txt, torch.stack([f["txt"] for f in files]))
            assert torch.equal(prompt.y, torch.stack([f["y"] for f in files]))
    plain = two_runs[0]  # uniform: one of the nine pictures of a step in each ninth of the path
    for step in (plain.loss[:3], plain.loss[3:]):
        sigma = torch.cat([args[4] for args, _ in step])
        assert sorted((9 * sigma).long().tolist()) == list(range(9))


def test_text_encoders_are_loaded_once_and_gone_before_the_transformer(two_runs):
    """And not loaded at all where every prompt is cached."""
    for seen in two_runs:
        assert len(seen.t5) == 1 and seen.t5_gone
    again = watched(two_runs[0].again)
    assert again.code == 0 and again.t5 == []


def test_a_damaged_cache_does_not_change_the_start_time(run, tmp_path, capsys):
    flags = [
        "--steps",
        2,
        "--cache-latents",
        1,
        "--start-time",
        "auto",
        "--cache-dir",
        tmp_path / "cache",
        "--overwrite",
    ]
    assert run(*flags) == 0
    (found,) = re.findall(r"--start-time auto: \S+", capsys.readouterr().out)
    for file in (tmp_path / "cache" / "latents").rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-500] + bytes(500))
        assert run(*flags) in (0, 2)
        assert found in capsys.readouterr().out
        file.write_bytes(content)


def test_small_pictures_are_left_out_and_a_start_time_can_be_found(run, tmp_path, capsys):
    few = ("--steps", 1, "--validate-every-epochs", 0)
    assert run(*few, "--resolution", 96) == 2
    assert "no usable picture" in capsys.readouterr().err
    assert run(*few, "--resolution", 48, "--start-time", "auto") == 0
    metadata = read_about(tmp_path / "run" / "lora.safetensors")
    assert 0 < metadata["start_time"] < 1 and metadata["resolution"] == 48
    again = ("--resolution", 48, "--start-time", "auto", "--degrade", "noise=0.3", *few, "--steps")
    assert run(*again, 2) == 2
    assert run(*again, 2, "--accept-changes") == 0
    (changes,) = json.loads((tmp_path / "run" / "settings.json").read_text())["changes"]
    found = read_about(tmp_path / "run" / "lora.safetensors")["start_time"]
    assert f"start_time_found was {metadata['start_time']}, is {found}" in changes and found != metadata["start_time"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    (tmp_path / "run" / "lora.safetensors").unlink()
    assert run(*again, 2, "--accept-changes") == 0 == run(*again, 2)  # settings.json has it from its start on


def read_about(file):
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["kontext_min"])


def test_cached_latents_follow_resolution_and_partners(run, pictures, tmp_path):
    """Over one cache another --resolution or --lr-root gives other latents, and those of a run without a cache."""

    def loss(*flags):
        assert run("--steps", 1, "--validate-every-epochs", 0, "--overwrite", *flags) == 0
        return rows(tmp_path / "run")[0]["loss"]

    for name, colour in (("one", 200), ("two", 50)):
        (tmp_path / name).mkdir()
        for picture in pictures.glob("*.png"):
            Image.new("L", Image.open(picture).size, colour).save(tmp_path / name / picture.name)
    kinds = [(), ("--resolution", 48), ("--lr-root", tmp_path / "one"), ("--lr-root", tmp_path / "two")]
    cached = [loss("--cache-latents", 1, *kind) for kind in kinds]
    assert len({round(x, 5) for x in cached}) == 4
    assert cached[3] == pytest.approx(loss(*kinds[3]), rel=1e-4)


def test_variants_that_no_epoch_uses_are_not_encoded(run, tmp_path, capsys):
    """Two epochs; the LoRA is that of as many variants, and more would take hours."""
    made = []
    for count in (2, 10_000):
        assert run("--cache-latents", count, "--steps", 9, "--validate-every-epochs", 0, "--overwrite") == 0
        made.append((tmp_path / "run" / "lora.safetensors").read_bytes())
        assert ("so no more are made" in capsys.readouterr().out) == (count > 2)
    assert load(made[0]).keys() == load(made[1]).keys()
    assert all(torch.equal(x, load(made[1])[name]) for name, x in load(made[0]).items())
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == 24


def test_the_same_training_written_with_diffusers_and_peft(tmp_path):
    """Six of the fifty steps of `python tests/peer_training.py`."""
    argv = ["--hr-root", str(Path(__file__).parent / "photos"), "--cache-dir", str(tmp_path / "cache")]
    argv += [*peer_training.FLAGS.split(), "--resolution", "64", "--warmup", "3", "--steps", "6"]
    assert peer_training.compare(argv, tmp_path / "run") <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["", "--quantize int8", "--stream", "--gradient-checkpointing half", "--full"])
def test_a_run_on_a_gpu_goes_on_and_ends_as_on_a_cpu(run, small_bundle, pictures, tmp_path, flags):
    """Stopped and resumed on the GPU, then the result restores a picture there; in float32, losses as on the CPU."""
    flags = f"--validate-every-epochs 0 --dtype float32 --workers 2 {flags}".split()
    assert run("--device", "cpu", *flags) == 0
    expected = [row["loss"] for row in rows(tmp_path / "run")]
    assert run("--device", "cuda", "--overwrite", *flags, "--steps", "2") == 0
    assert run("--device", "cuda", "--accept-changes", *flags) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses == pytest.approx(expected, rel=1e-2)  # cuDNN's convolutions take tf32
    made = ["--transformer", tmp_path / "run" / "transformer"]
    made = made if "--full" in flags else ["--lora", tmp_path / "run" / "lora.safetensors"]
    argv = ["--input", pictures / "00.png", "--output", tmp_path / "o.png", "--weights", small_bundle, *made]
    argv += ["--cache-dir", tmp_path / "cache", "--device", "cuda", "--tile", "64", "--steps", "2"]
    assert sample.main([str(a) for a in argv]) == 0
    assert Image.open(tmp_path / "o.png").size == Image.open(pictures / "00.png").size


def test_the_lists_of_what_is_tried_know_every_flag_and_every_end():
    """`python tests/extremes.py` makes the calls, which take an hour."""
    for program, module in extremes.PROGRAMS.items():
        calls = [given[1:] for given in extremes.flags([f"{program}."])]
        assert {name for _, name, _ in calls} == set(module.Settings.__dataclass_fields__)
        for field in module.Settings.__dataclass_fields__.values():
            values = {value for _, name, value in calls if name == field.name}
            assert {str(field.metadata[end]) for end in ("least", "most") if field.metadata[end] is not None} <= values
            assert set(field.metadata["choices"] or ()) <= values
    tried = " ".join(extremes.specifications())
    assert all(f"{operator}=" in tried for operator in degrade.OPERATORS)


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (0, "done\n", None),
        (2, "3 pictures\ntrain.py: --lr: got x.\n", "refused"),
        (2, "train.py: one\ntrain.py: two\n", "FAULT lines"),
        (2, "train.py: one\nmore\n", "FAULT lines"),
        (1, "train.py: no finite loss\n", "FAULT exit 1"),
        (1, "Traceback (most recent call last)\n", "FAULT traceback"),
        (None, "step 1\n", "long"),
    ],
)
def test_how_a_call_may_end(code, text, kind):
    end = extremes.ended("train", code, text, "")
    assert (end and end[0]) == kind


def test_commands_with_a_path_that_starts_with_a_dash():
    """As separate words the path would be read as a flag."""
    settings = Settings(hr_root=Path("-hr"), weights=Path("-w"), stream=True, resume=False, prompt=("-a", "b"))
    assert given(settings) == "--hr-root=-hr --prompt=-a --prompt b --weights=-w --no-resume --stream"
    assert restore_command(settings, Path("-run")).endswith(" --weights=-w --stream --lora=-run/lora.safetensors")
