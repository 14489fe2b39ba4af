"""The loop of train.py: signals, disk errors, pictures that vanish, accumulation, EMA; and bad input of sample.py."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

import loop_overhead
import processes
import sample
import train
from kontext_min import data
from kontext_min.data import Picture
from kontext_min.extras import held_out, report, runs, validation

FLAGS = (
    "--resolution 64 --steps 6 --accumulate 6 --batch-size 1 --warmup 2 --lr 1e-3 --ema 0.5 --checkpoint-every 2 "
    "--validate-every-epochs 1"
)


@pytest.fixture(autouse=True)
def signals():
    """Runs inside this process leave its signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def flags(small_bundle, pictures, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return ["--hr-root", pictures, "--weights", small_bundle, "--cache-dir", cache, *FLAGS.split()]


@pytest.fixture(scope="module")
def outside(flags):
    """outside(folder, flags, setup) -> exit code and what was said, of train.py in a process of its own."""

    def call(folder, *more, setup=None):
        log = folder.with_suffix(".log")
        log.unlink(missing_ok=True)
        process = processes.start([*flags, "--output-dir", folder, *more], log, setup)
        return processes.joined([process], 120)[0].exitcode, log.read_text()

    return call


@pytest.fixture(scope="module")
def whole(outside, tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert outside(folder, "--workers", 0)[0] == 0
    return folder


def after_step(step, action):
    """For a process of its own: do something when the metrics of a step have been written."""
    append = runs.append_metrics

    def wrapped(folder, row, board=None):
        append(folder, row, board)
        if row["step"] == step and not row.get("validation"):
            action()

    runs.append_metrics = wrapped


def before_batch(count, action):
    """For a process of its own: do something when the loop asks for its `count`-th batch, then wait a second."""
    loader, asked = torch.utils.data.dataloader._BaseDataLoaderIter, []
    following = loader.__next__

    def wrapped(self):
        asked.append(None)
        if len(asked) == count:
            action()
            time.sleep(1)
        return following(self)

    loader.__next__ = wrapped


def under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    after_step(3, partial(send, signal.SIGHUP))


def before_loading(number):
    train.load_base = lambda *args: send(number)


def send(*numbers, group=False):
    """Signals to this process, or to its loaders too, as terminals and schedulers do."""
    for number in numbers:
        os.killpg(0, number) if group else os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_stopped_run_that_started_over_says_how_it_continues(outside, tmp_path):
    """The same command would start over again."""
    setup = partial(before_batch, 13, partial(send, signal.SIGTERM, group=True))
    code, said = outside(tmp_path / "run", "--workers", 0, "--overwrite", setup=setup)
    assert code == 130 and "stopped after step 3; the same command but without --overwrite continues" in said


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGINT, 0)])
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(outside, whole, tmp_path, number, workers):
    setup = partial(before_batch, 13, partial(send, number, group=True))  # the first of six of the third step
    code, said = outside(tmp_path / "run", "--workers", workers, setup=setup)
    assert code == 130, said
    assert "stopping after this step" in said
    assert f"stopped after step 3; the same command with --output-dir {tmp_path / 'run'} continues" in said
    assert "Traceback" not in said
    assert runs.latest_checkpoint(tmp_path / "run").name == "step-000003"
    assert not (tmp_path / "run" / "lora.safetensors").exists()
    code, said = outside(tmp_path / "run", "--workers", workers)
    assert code == 0, said
    assert (tmp_path / "run" / "lora.safetensors").read_bytes() == (whole / "lora.safetensors").read_bytes()


def test_the_end_names_the_best_step_if_it_is_not_the_last(flags, tmp_path, monkeypatch, capsys):
    validate, psnrs = validation.validate, iter([20, 21, 25.678, 23, 26, 25, 20.001, 20.003, 19.996])

    def wrapped(*args):
        row, sheet = validate(*args)
        return row | {"psnr": next(psnrs), "ssim": 0.5}, sheet

    monkeypatch.setattr(validation, "validate", wrapped)
    more = ["--output-dir", tmp_path / "run", "--workers", 0, "--steps", 3, "--accumulate", 1]
    monkeypatch.setattr(held_out, "batches_between", lambda *args: 1)
    assert train.main([str(x) for x in [*flags, *more]]) == 0
    best = tmp_path / "run" / "checkpoints" / "step-000002"
    assert f"note: step 2 has the best PSNR, 25.68 dB; to restore with it, name {best}\n" in capsys.readouterr().out
    assert (best / "lora.safetensors").exists()
    os.truncate(best / "lora.safetensors", 5000)
    said = runs.best_step(tmp_path / "run", {"step": 3, "best_step": 2, "best_psnr": 25.678})
    assert len(said) == 1 and f"25.68 dB, but its result is broken: {best / 'lora.safetensors'}: truncated" in said[0]
    assert train.main([str(x) for x in [*flags, *more, "--overwrite", "--steps", 1, "--warmup", 0]]) == 0
    assert "note: step 0 has the best PSNR, 26.00 dB: the steps after it did not help" in capsys.readouterr().out
    assert train.main([str(x) for x in [*flags, *more, "--overwrite", "--steps", 2, "--warmup", 0]]) == 0
    assert (
        "note: training has not changed the PSNR, 20.00 dB, SSIM 0.500; raise --lr or --steps\n"
        in capsys.readouterr().out
    )


def test_what_the_program_was_started_to_ignore_stays_ignored(outside, whole, tmp_path):
    """`nohup train.py &`: the run outlives its terminal."""
    code, said = outside(tmp_path / "run", "--workers", 0, setup=under_nohup)
    assert code == 0 and "stopp" not in said
    assert (tmp_path / "run" / "lora.safetensors").read_bytes() == (whole / "lora.safetensors").read_bytes()


def test_a_signal_before_the_first_step_is_one_line(outside, tmp_path):
    code, said = outside(tmp_path / "run", "--workers", 0, setup=partial(before_loading, signal.SIGTERM))
    assert code == 130
    assert said.strip().splitlines()[-1] == "train.py: stopped" and "Traceback" not in said


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_ctrl_c_while_the_packages_load_is_no_traceback(tmp_path, program):
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, Path(train.__file__).with_name(program)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(outside, tmp_path, second, code):
    got, said = outside(
        tmp_path / "run", "--workers", 0, setup=partial(after_step, 3, partial(send, signal.SIGTERM, second))
    )
    assert got == code, said
    assert runs.latest_checkpoint(tmp_path / "run").name == "step-000002"


# --------------------------------------------------------------------------------------------------- disks and pictures


def test_a_file_that_cannot_be_written_ends_the_run_and_the_last_checkpoint_is_whole(outside, whole, tmp_path):
    """The real thing: the system refuses to write more than 20 kB into one file, as it does on a full disk."""
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    code, said = outside(
        tmp_path / "run", "--workers", 0, "--validate-every-epochs", 0, setup=partial(after_step, 3, small)
    )
    assert code == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"train.py: {tmp_path / 'run'}: the run had to stop")
    assert "too large" in last
    assert f"{tmp_path / 'run'}/checkpoints/step-000002 is whole" in last
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    code, said = outside(tmp_path / "run", "--workers", 0, "--validate-every-epochs", 0)
    assert code == 0, said
    assert (tmp_path / "run" / "lora.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_vanish_end_the_run_in_one_line(outside, pictures, tmp_path, workers):
    hr = shutil.copytree(pictures, tmp_path / "hr")
    setup = partial(after_step, 1, partial(shutil.rmtree, hr))
    flags = ["--hr-root", hr, "--workers", workers, "--steps", 60, "--validate-every-epochs", 0]
    code, said = outside(tmp_path / "run", *flags, setup=setup)
    assert code == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"train.py: {tmp_path / 'run'}: the run had to stop")
    assert "is the disk there?" in last


def test_a_folder_that_cannot_be_a_run_is_refused(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    for output in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/no/run")):
        assert train.main([str(f) for f in [*flags, "--output-dir", output]]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_overwriting_deletes_the_run_and_nothing_else(flags, tmp_path):
    """Whatever folder it lies in: a copied checkpoint, pictures beside those of the validation, a vocabulary."""
    written = ("checkpoints/step-000002/state.json", "validation/step-000002.png", "lora.safetensors", "settings.json",
               "checkpoints/.step-000001/state.json", "transformer/config.json",
               "transformer/diffusion_pytorch_model-00001-of-00002.safetensors")  # fmt: skip
    mine = ("mine/photo.jpg", "notes.txt", "checkpoints/step-000002-good/state.json", "checkpoints/hr/photo.jpg",
            "checkpoints/.git/x.y", "validation/photo.png", "transformer/notes.txt", "tensorboard/events.mine",
            "transformer/diffusion_pytorch_model-good.safetensors")  # fmt: skip
    for name in (*written, *mine):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"versions": {"kontext_min": "1"}}))
    with pytest.raises(ValueError, match="holds a run already"):
        runs.open_run(tmp_path, {}, resume=False, accept=False, overwrite=False, write=True)
    runs.close_run()
    runs.delete_run(tmp_path)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*"))
    assert left == sorted([".lock", "checkpoints/.git", "checkpoints/.git/x.y", *set(mine) - {"checkpoints/.git/x.y"}])
    assert runs.open_run(tmp_path, {}, resume=False, accept=False, overwrite=False, write=True) is None
    runs.close_run()


def test_a_broken_checkpoint_and_one_of_another_model_are_named(whole, flags, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")

    def refused(*more):
        assert train.main([str(f) for f in [*flags, "--output-dir", folder, *more]]) == 2
        return capsys.readouterr().err

    assert "may be deleted" in refused("--init-lora", folder / "lora.safetensors", "--overwrite")
    assert "step-000006: holds other parameters; --full, --rank and --lora-targets can't change" in refused(
        "--rank", 4, "--accept-changes"
    )
    assert json.loads((folder / "settings.json").read_text())["rank"] == 16  # a refused run changes nothing
    file = runs.latest_checkpoint(folder) / "state.json"
    state = json.loads(file.read_text())
    bad = (
        {},
        [],
        None,
        state | {"step": 5},
        state | {"step": 6.0},
        state | {"step": "x"},
        *(state | {"skipped": n} for n in ("x", 1.5, -1, 7, True, None)),
        *(state | {"best_step": n} for n in (1.5, -1, 7)),
        state | {"best_psnr": "x"},
        *(state | {"unreadable": lines} for lines in (3, [3], None)),
        {"step": 6},
    )
    for text in (*map(json.dumps, bad), "[" * 200_000, file.read_text()[:20]):
        file.write_text(text)
        assert "step-000006: broken" in refused(), text[:100]
    file.write_text(json.dumps(state))
    known = (folder / "settings.json").read_text()
    for text in ("[]", '"x"', "{}", "null", "[" * 200_000, known[:100]):
        (folder / "settings.json").write_text(text)
        assert "settings.json: missing or broken" in refused(), text[:100]
    (folder / "settings.json").write_text(known)
    for name in ("trained", "optimizer"):
        file = runs.latest_checkpoint(folder) / f"{name}.safetensors"
        content, tensors = file.read_bytes(), {key: x.clone() for key, x in load_file(file).items()}
        file.write_bytes(content[:-1000])
        assert "step-000006: broken" in refused()
        for value in (math.nan, math.inf):
            save_file({key: x * value for key, x in tensors.items()}, file)
            assert f"step-000006: broken ({name}.safetensors holds values that are no finite" in refused()
        save_file({key: x.to(torch.int8) for key, x in tensors.items()}, file)
        assert "step-000006: broken" in refused()
        save_file({"0.exp_avg": torch.zeros(1)}, file)
        assert f"step-000006: {'holds other' if name == 'trained' else 'its optimizer.safetensors has'}" in refused()
        file.unlink()
        assert "step-000006: broken" in refused()
        file.mkdir()
        assert "step-000006: broken" in refused()
        file.rmdir()
        file.write_bytes(content)


def test_only_what_is_whole_counts_as_a_checkpoint(tmp_path):
    """A copy under another name is neither continued from nor deleted; a folder without state.json is replaced."""
    folder = tmp_path / "checkpoints"
    for name in ("step-000500", "step-001000", "step-10000", ".step-020000.77", "step-040000-good"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
    (folder / "step-030000").mkdir()
    (folder / "step-030000" / "trained.safetensors").write_text("cut off")
    assert runs.latest_checkpoint(tmp_path).name == "step-10000"
    for step in (30000, 30001):
        runs.save_checkpoint(tmp_path, {}, {"step": step, "best_step": 500}, lambda where: None)
    assert runs.latest_checkpoint(tmp_path).name == "step-030001"
    assert {p.name for p in folder.glob("step-*")} == {
        "step-000500", "step-10000", "step-030000", "step-030001", "step-040000-good",
    }  # fmt: skip
    assert not (folder / "step-030000" / "trained.safetensors").exists()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1] + "/.lock", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path, flags, capsys):
    (tmp_path / "run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert train.main([str(f) for f in [*flags, "--output-dir", tmp_path / "run"]]) == 2
        assert "another run is using it" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert train.main([str(f) for f in [*flags, "--steps", 1, "--warmup", 0, "--output-dir", tmp_path / "run"]]) == 0


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EAGAIN, "--output {folder}: another run is using it"),
        (errno.EIO, "--output {folder}/.lock: can't be made or written: Input/output error."),
        (errno.ENOLCK, ""),
        (errno.ENOTSUP, ""),
    ],
)
def test_a_disk_without_locks_is_no_other_run(tmp_path, capsys, monkeypatch, number, message):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises((OSError, ValueError)) if message else nullcontext() as raised:
        runs.lock("--output", tmp_path / "new")
    runs.close_run()
    said = str(raised.value) if message else capsys.readouterr().out
    assert said.startswith(
        message.format(folder=tmp_path / "new") or f"note: {tmp_path / 'new'}: its disk has no locks"
    )


@pytest.mark.parametrize("place", [".lock", "inside", "."])
def test_what_is_in_the_way_of_a_lock_is_named_with_its_flag(tmp_path, place):
    """A folder where the lock goes, a file where a folder goes, a link that leads nowhere."""
    folder = tmp_path / "run"
    if place == ".":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (folder / ".lock" if place == ".lock" else folder).mkdir(parents=True)
        (folder / "inside").touch()
    with pytest.raises(OSError, match=re.escape(f"--flag {folder / place}: can't be made or written: ")):
        runs.lock("--flag", folder, *[folder / "inside"] * (place == "inside"))
    runs.close_run()


def test_a_model_that_was_merged_into_the_run_folder_is_not_deleted(whole, flags, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    model = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    model.parent.mkdir()
    save_file({"x": torch.ones(1)}, model, {"kontext_min": json.dumps({"objective": "bridge", "merged": ["a"]})})
    assert train.main([str(f) for f in [*flags, "--output-dir", folder, "--overwrite"]]) == 2
    assert f"holds transformer/{model.name}, which no run wrote; move it" in capsys.readouterr().err
    assert model.exists()


def test_a_run_that_goes_on_with_other_batches_goes_on_in_its_epoch(whole, flags, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = [row for row in runs.read_metrics(folder) if "epoch" in row][-1]
    more = ["--steps", before["step"] + 2, "--accumulate", 1, "--accept-changes"]
    assert train.main([str(f) for f in [*flags, "--output-dir", folder, *more]]) == 0
    after = [row for row in runs.read_metrics(folder) if row["step"] > before["step"] and "epoch" in row]
    assert after and all(row["epoch"] >= before["epoch"] for row in after), (before, after)


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--accept-changes",)])
@pytest.mark.parametrize("name", ["transformer/config.json", "settings.json", "validation/step-000000.png",
                                  "checkpoints/step-1000/state.json"])  # fmt: skip
def test_a_folder_that_no_run_wrote_is_left_alone(flags, tmp_path, capsys, name, more):
    """Such as the base model, another program's settings and checkpoints, or your own pictures."""
    file, mine = tmp_path / "mine" / name, '{"mine": 1, "hr_root": "x", "lr": 1, "steps": 1, "step": 1000}'
    file.parent.mkdir(parents=True)
    file.write_text(mine)
    assert train.main([str(f) for f in [*flags, "--output-dir", tmp_path / "mine", *more]]) == 2
    shown = name.removesuffix("/state.json")
    assert f"holds {shown}, which no run wrote; choose another folder" in capsys.readouterr().err
    assert file.read_text() == mine and [p for p in tmp_path.rglob("*.*") if p.is_file()] == [file]


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--accept-changes",)])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints/step-001000/model.safetensors", "holds checkpoints/step-001000/model.safetensors, which no run"),
        ("checkpoints/step-000006/notes.txt", "holds checkpoints/step-000006/notes.txt, which no run wrote"),
        ("report.html", "report.html is not that of a run; move it"),
    ],
)
def test_a_file_of_yours_among_those_of_a_run_is_left_alone(whole, flags, tmp_path, capsys, name, message, more):
    """A run would replace it, or delete it with a checkpoint."""
    file = shutil.copytree(whole, tmp_path / "run") / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert train.main([str(f) for f in [*flags, "--output-dir", tmp_path / "run", *more]]) == 2
    assert message in capsys.readouterr().err
    assert file.read_text() == "mine" and (tmp_path / "run" / "lora.safetensors").exists()


def test_a_lora_of_yours_in_a_stopped_run_is_not_replaced(whole, flags, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    for content in (b"mine", save({"mine": torch.ones(1)})):
        (folder / "lora.safetensors").write_bytes(content)
        assert train.main([str(f) for f in [*flags, "--output-dir", folder]]) == 2
        assert "holds lora.safetensors, which no run wrote" in capsys.readouterr().err
        assert (folder / "lora.safetensors").read_bytes() == content
    assert train.main([str(f) for f in [*flags, "--output-dir", folder, "--overwrite"]]) == 2
    assert "holds lora.safetensors, which no run wrote; move it" in capsys.readouterr().err
    assert (folder / "lora.safetensors").read_bytes() == content


def test_the_checkpoint_of_another_run_is_refused(whole, flags, tmp_path, capsys):
    """Its shapes fit, so it would be continued, and the result would be that of neither run."""
    other, folder = tmp_path / "other", shutil.copytree(whole, tmp_path / "run")
    assert train.main([str(f) for f in [*flags, "--output-dir", other, "--sigma", "shift"]]) == 0
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    shutil.copytree(other / "checkpoints" / "step-000006", folder / "checkpoints" / "step-000006")
    assert train.main([str(f) for f in [*flags, "--output-dir", folder]]) == 2
    assert "step-000006: is of a run with other settings than settings.json; delete it" in capsys.readouterr().err
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    assert train.main([str(f) for f in [*flags, "--output-dir", folder]]) == 0


@pytest.mark.parametrize("name", ["trained", "ema", "optimizer"])
def test_a_file_of_another_checkpoint_is_refused(flags, tmp_path, capsys, name):
    """As is a bit that flipped on the disk, or an average that is gone: the result would be that of no run."""
    argv = [str(f) for f in [*flags, "--output-dir", tmp_path, "--ema", 0.9, "--checkpoint-every", 2]]
    assert train.main(argv) == 0
    last = tmp_path / "checkpoints" / "step-000006" / f"{name}.safetensors"
    whole, flipped = last.read_bytes(), bytearray(last.read_bytes())
    flipped[-3] ^= 1
    for content in ((tmp_path / "checkpoints" / "step-000004" / last.name).read_bytes(), bytes(flipped), None):
        last.unlink() if content is None else last.write_bytes(content)
        assert train.main(argv) == 2
        lost = "or optimizer.safetensors is missing"
        expected = lost if content is None and name != "ema" else f"{name}.safetensors is not the one that was written"
        assert expected in capsys.readouterr().err
        last.write_bytes(whole)
    assert train.main(argv) == 0


def test_photographs_in_a_run_folder_are_not_overwritten(whole, flags, pictures, tmp_path, capsys):
    """--overwrite deletes validation/step-N.png, which may be what is to be trained on."""
    folder = shutil.copytree(whole, tmp_path / "run")
    for flag in ("--hr-root", "--lr-root", "--val-root"):
        argv = [*flags, "--output-dir", folder, "--overwrite", flag, folder / "validation"]
        assert train.main([str(f) for f in argv]) == 2
        assert f"{folder / 'validation'} lies in --output-dir" in capsys.readouterr().err


def test_a_checkpoint_that_is_a_link_goes_and_what_it_leads_to_stays(whole, flags, tmp_path):
    """One moved to another disk: under --overwrite, and where it is one of too many."""
    folder, kept = shutil.copytree(whole, tmp_path / "run"), tmp_path / "kept"
    first = min((folder / "checkpoints").iterdir())
    first.rename(kept)
    first.symlink_to(kept)
    before = sorted(p.name for p in kept.iterdir())
    files = {"trained": {}, "optimizer": {}}
    for step in (7, 8):
        runs.save_checkpoint(folder, files, {"step": step, "best_step": None}, lambda where: None)
    assert not first.is_symlink() and sorted(p.name for p in kept.iterdir()) == before
    first.symlink_to(kept)
    (folder / "checkpoints" / "step-000009").symlink_to(tmp_path / "nowhere")
    runs.save_checkpoint(folder, files, {"step": 9, "best_step": None}, lambda where: None)
    assert runs.latest_checkpoint(folder).name == "step-000009"
    first.symlink_to(kept)
    runs.delete_run(folder)
    assert not list((folder / "checkpoints").iterdir()) and sorted(p.name for p in kept.iterdir()) == before


def test_a_link_to_the_base_in_a_run_folder_is_refused(whole, flags, small_bundle, tmp_path, capsys):
    folder, base = shutil.copytree(whole, tmp_path / "run"), shutil.copytree(small_bundle, tmp_path / "base")
    (folder / "transformer").symlink_to(base / "transformer")
    before = {p.name: p.read_bytes() for p in (base / "transformer").iterdir()}
    assert train.main([str(f) for f in [*flags, "--output-dir", folder, "--overwrite"]]) == 2
    assert "its transformer/ is a link" in capsys.readouterr().err
    (folder / "checkpoints").rename(tmp_path / "other")
    (folder / "checkpoints").symlink_to(tmp_path / "other")
    (folder / "transformer").unlink()
    assert train.main([str(f) for f in [*flags, "--output-dir", folder, "--overwrite"]]) == 2
    assert "its checkpoints/ is a link" in capsys.readouterr().err
    (folder / "transformer").symlink_to(base / "transformer")
    (folder / "transformer").unlink()
    full = shutil.copytree(base / "transformer", tmp_path / "full" / "transformer")  # and the other way round
    shutil.rmtree(base / "transformer")
    (base / "transformer").symlink_to(full)
    argv = [*flags, "--weights", base, "--output-dir", full.parent, "--overwrite"]
    assert train.main([str(f) for f in argv]) == 2
    assert "transformer lies in --output-dir" in capsys.readouterr().err
    (base / "transformer").unlink()
    shutil.copytree(full, base / "transformer")
    assert before == {p.name: p.read_bytes() for p in (base / "transformer").iterdir()}


def test_moments_of_other_parameters_are_refused():
    def optimizer():
        p = torch.nn.Parameter(torch.ones(3, 2))
        p.grad = torch.ones(3, 2)
        return torch.optim.AdamW([p])

    first = optimizer()
    first.step()
    good = runs.optimizer_tensors(first)
    runs.load_optimizer(second := optimizer(), good)
    assert torch.equal(second.state_dict()["state"][0]["exp_avg"], good["0.exp_avg"])
    runs.load_optimizer(optimizer(), {})  # every step was skipped
    moved = {f"1.{name[2:]}": x for name, x in good.items()}
    less = {name: x for name, x in good.items() if name != "0.exp_avg_sq"}
    for bad in (moved, less, good | {"0.exp_avg": torch.ones(2, 3)}, good | {"x.step": good["0.step"]}):
        with pytest.raises(ValueError, match="not the moments of these parameters"):
            runs.load_optimizer(optimizer(), bad)


@pytest.mark.parametrize("lost", ["checkpoints", "settings.json"])
def test_results_are_not_replaced_without_overwrite(whole, flags, tmp_path, capsys, lost):
    """Neither a run whose checkpoints were deleted to save disk, nor files of these names that no run wrote."""
    message = {"checkpoints": "but no checkpoint to continue from", "settings.json": "which no run wrote"}[lost]
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    if lost == "settings.json":
        for name in ("settings.json", "lora.safetensors"):
            (folder / name).unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}
    for seed in (42, 43):
        assert train.main([str(f) for f in [*flags, "--seed", seed, "--output-dir", folder]]) == 2
        assert message in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def test_fewer_steps_than_the_checkpoint_has_is_one_line(whole, flags, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert train.main([str(f) for f in [*flags, "--output-dir", folder, "--steps", 4, "--accept-changes"]]) == 2
    assert "--steps: got 4, but " in (error := capsys.readouterr().err) and "is at step 6" in error
    assert json.loads((folder / "settings.json").read_text())["steps"] == 6


def test_a_finished_run_is_not_given_other_settings(whole, flags, tmp_path, capsys):
    """Its LoRA was a bridge's to the last step; the header would call it one of kontext."""
    folder = shutil.copytree(whole, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}
    changed = [*flags, "--output-dir", folder, "--objective", "kontext", "--accept-changes"]
    assert train.main([str(f) for f in changed]) == 2
    assert "is at step 6; give more steps" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def test_rows_of_metrics_behind_the_checkpoint_are_dropped(tmp_path, capsys):
    """Those before it that are lost are counted."""
    for step in (1, 2, 3):
        runs.append_metrics(tmp_path, {"step": step, "loss": float("nan"), "sigma_loss": [None, float("inf"), 1.0]})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')  # a kill in the middle of a line
    runs.rewind_metrics(tmp_path, 2)
    assert runs.read_metrics(tmp_path) == [{"step": s, "loss": None, "sigma_loss": [None, None, 1.0]} for s in (1, 2)]
    assert capsys.readouterr().out == ""
    (tmp_path / "validation").mkdir()
    for step in (0, 2, 3):  # the rows of these pictures are gone
        runs.save_picture(tmp_path, step, Image.new("RGB", (8, 8)))
    runs.rewind_metrics(tmp_path, 2)
    assert "metrics.jsonl is broken; it has lost the rows of 2 steps" in capsys.readouterr().out
    # The run may validate at other steps from here on.
    assert sorted(p.name for p in (tmp_path / "validation").iterdir()) == ["step-000000.png", "step-000002.png"]


def test_an_emptied_report_is_written_again(whole, flags, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "report.html").write_text("")
    assert train.main([str(f) for f in [*flags, "--output-dir", folder]]) == 0
    assert report.is_report(folder / "report.html") and (folder / "report.html").stat().st_size > 1000


def test_a_report_of_lost_rows_says_how_many(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    (folder / "metrics.jsonl").write_text("")
    for _ in range(2):
        assert report.main([str(folder)]) == 0
        assert re.search(r"metrics\.jsonl is broken; it has lost the rows of [1-9]\d* steps\n", capsys.readouterr().out)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # to save disk; pictures of validations are left


# ----------------------------------------------------------------------------------------------- what the loop computes


def test_the_average_is_what_is_used(whole):
    """lora.safetensors holds the EMA, and the checkpoint the weights themselves besides."""
    checkpoint = runs.latest_checkpoint(whole)
    average, own = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "trained"))
    used = load_file(whole / "lora.safetensors")
    name = "double_blocks.0.img_attn.qkv.lora_B"
    assert (checkpoint / "lora.safetensors").read_bytes() == (whole / "lora.safetensors").read_bytes()
    assert torch.equal(used["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], average[name])
    assert not torch.equal(average[name], own[name])


def test_an_average_of_one_value_is_that_value():
    params, ema = [torch.ones(3)], [torch.full((3,), 5.0)]
    with validation.averaged(params, ema):
        assert params[0].tolist() == [5, 5, 5]
    assert params[0].tolist() == [1, 1, 1]
    with validation.averaged(params, []):
        assert params[0].tolist() == [1, 1, 1]


def test_the_average_of_a_short_run_has_forgotten_its_start(flags, tmp_path):
    """The decay rises with the steps: with 0.999 from the first on, B would be a twentieth of what was learned."""
    short = ["--steps", 30, "--accumulate", 1, "--ema", 0.999, "--validate-every-epochs", 0, "--workers", 0]
    assert train.main([str(f) for f in [*flags, *short, "--output-dir", tmp_path / "run"]]) == 0
    average, own = (
        load_file(runs.latest_checkpoint(tmp_path / "run") / f"{n}.safetensors") for n in ("ema", "trained")
    )
    norms = [torch.stack([v.norm() for k, v in x.items() if k.endswith("lora_B")]).norm() for x in (average, own)]
    assert norms[0] > 0.5 * norms[1]


@pytest.fixture
def gradients(flags, tmp_path, monkeypatch):
    """gradients(batches, batch_size): those of one step of the whole model on the given batches, and its row."""

    def call(batches, batch_size):
        monkeypatch.setattr(data.BucketSampler, "__iter__", lambda self: iter(batches))
        kept = []

        def step(self):
            kept.append([p.grad.clone() for g in self.param_groups for p in g["params"]])

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        numbers = ["--steps", 1, "--accumulate", len(batches), "--batch-size", batch_size, "--workers", 0]
        monkeypatch.setattr(train, "CLIP_NORM", math.inf)
        plain = ["--full", "--ema", 0, "--warmup", 0, "--validate-every-epochs", 0, "--overwrite"]
        assert train.main([str(f) for f in [*flags, *numbers, *plain, "--output-dir", tmp_path / "run"]]) == 0
        return kept[0], runs.read_metrics(tmp_path / "run")[0]

    return call


def test_accumulation_is_the_large_batch_also_across_buckets(gradients, pictures):
    """Equal to 1e-5 of the largest component: sums of float32 in another order, through the whole network."""
    shapes = [(p.width, p.height) for p in data.scan(pictures)[0]]
    a, b = [i for i, shape in enumerate(shapes) if shape == (72, 72)][:2]
    c, d = [i for i, shape in enumerate(shapes) if shape == (104, 72)][:2]

    def batch(*indices):
        return [(0, i) for i in indices]

    def assert_equal(one, other):
        (grads, row), (others, other_row) = one, other
        scale = max(g.abs().max() for g in grads)
        assert max((g - o).abs().max() for g, o in zip(grads, others, strict=True)) < 1e-5 * scale
        assert row["loss"] == pytest.approx(other_row["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other_row["grad_norm"], rel=1e-5)

    large = gradients([batch(a, b)], 2)
    assert_equal(large, gradients([batch(a), batch(b)], 1))
    assert_equal(gradients([batch(a, b), batch(c, d)], 2), gradients([batch(k) for k in (a, b, c, d)], 1))
    alone = [gradients([batch(a)], 1)[0], gradients([batch(b)], 1)[0]]
    assert not torch.allclose(alone[0][0], large[0][0])  # or all of this would prove nothing
    assert not torch.allclose(alone[1][0], large[0][0])


def test_pictures_held_out_are_never_trained_on_and_stay_the_same(tmp_path):
    many = [Picture(tmp_path / f"{k}.png", f"{k}.png", 64, 64) for k in range(100)]
    for k, one in enumerate(many):
        one.path.write_text(str(k))
    settings = train.Settings(hr_root=Path())
    training, held, said = held_out.split(settings, many, [(64, 64)])
    assert said == []
    assert len(held) == 8 and len(training) == 92 and not {p.name for p in held} & {p.name for p in training}
    _, later, _ = held_out.split(settings, many[:50] + many[51:], [(64, 64)])
    assert len({p.name for p in held} & {p.name for p in later}) >= 7  # another folder holds out nearly the same
    training, held, said = held_out.split(settings, many[:7], [(64, 64)])
    assert (len(training), len(held)) == (7, 0)  # seven are too few to give one away
    assert said == ["note: no validation; it takes --val-root, or 8 pictures in --hr-root to hold out one"]
    training, held, said = held_out.split(train.Settings(hr_root=Path(), validate_every_epochs=0), many, [(64, 64)])
    assert (len(training), len(held), said) == (100, 0, [])
    copies = [dataclasses.replace(one, name=f"copy of {one.name}") for one in many[:10]]
    _, held, said = held_out.split(settings, many[:10] + copies, [(64, 64)])
    assert said == [f"note: 2 of 2 to validate on are to train on too, such as {held[0].name}"]
    told = [dataclasses.replace(one, caption=one.path) for one in many]
    assert held_out.split(settings, told, [(64, 64)])[2] == [
        "note: every picture to train on has a caption; none trains with --prompt, sample.py's default",
        "note: 8 of 8 to validate on have captions, which are not used; --validation-prompt is for all, by default "
        "--prompt",
    ]
    none = dataclasses.replace(settings, validate_every_epochs=0)
    assert "every picture to train on has a caption" in held_out.split(none, told, [(64, 64)])[2][0]
    for prompts in ("", '"prompts": ["restore"]'):  # a transformer of --full, or one that a LoRA was merged into
        base = tmp_path / "base.safetensors"
        save_file({"x": torch.zeros(1)}, base, {"kontext_min": f"{{{prompts}}}"})
        said = held_out.split(dataclasses.replace(settings, transformer=base), many, [(64, 64)])[2]
        assert (
            said
            == [f"note: {base} may have trained on pictures to validate on, which score too high then"][: len(prompts)]
        )
    two = dataclasses.replace(settings, degrade=("denoise", "deblur"))
    assert held_out.split(two, many, [(64, 64)])[2] == ["note: only the first --degrade is validated, denoise"]


def test_validation_pictures_of_their_own_folder(pictures, tmp_path):
    settings = train.Settings(hr_root=Path(), val_root=pictures)
    training, held, said = held_out.split(settings, [], data.buckets(64, 8))
    assert training == [] and len(held) == 8 and said[0].startswith(f"--val-root {pictures}: 12 pictures in 3 of 9")
    more = shutil.copytree(pictures, tmp_path / "more")  # what is not used is named
    (more / "a.heic").touch()
    shutil.copy(more / "00.png", more / "more.png")
    training, held, said = held_out.split(train.Settings(hr_root=Path(), val_root=more), [], data.buckets(64, 8))
    assert len(held) == 8 and "  a.heic: .heic files are not read" in said[0]
    assert said[1:] == ["note: 8 of its 13 pictures are used"]
    settings = train.Settings(hr_root=Path(), val_root=more)
    _, _, said = held_out.split(settings, data.scan(more)[0][2:5], data.buckets(64, 8))
    assert said[-1] == "note: 3 of 8 to validate on are to train on too, such as 03.png"
    with pytest.raises(ValueError, match=r"no usable picture; 00\.png: 72 x 72, smaller"):
        held_out.split(settings, [], data.buckets(512, 8))


def test_validation_on_pairs_of_their_own(flags, pictures, tmp_path, capsys):
    """With --lr-root the partners of --val-root come from there too."""
    roots = {name: shutil.copytree(pictures, tmp_path / name) for name in ("lr", "val")}
    for k in range(5, 12):  # all that are left are used
        (roots["val"] / f"{k:02d}.png").unlink()
    (roots["val"] / "00.png").rename(roots["val"] / "only.png")
    with Image.open(roots["lr"] / "11.png") as picture:
        picture.reduce(2).save(roots["lr"] / "11.png")
    own = ["--lr-root", roots["lr"], "--val-root", roots["val"], "--steps", 1, "--warmup", 0, "--workers", 0]
    own += ["--output-dir", tmp_path / "run"]
    assert train.main([str(f) for f in [*flags, *own]]) == 2
    assert "only.png (missing)" in capsys.readouterr().err
    (roots["val"] / "only.png").rename(roots["val"] / "001.png")
    assert train.main([str(f) for f in [*flags, *own]]) == 2
    assert "001.png (missing; is it '01.png'?)" in capsys.readouterr().err
    (roots["val"] / "001.png").unlink()
    assert train.main([str(f) for f in [*flags, *own]]) == 0
    said = capsys.readouterr().out
    assert "4 to validate on" in said and f"{tmp_path / 'run'}: a new run\n" in said
    partner = roots["lr"] / "07.png"
    partner.write_bytes(partner.read_bytes() + b" ")
    assert train.main([str(f) for f in [*flags, *own, "--steps", 2]]) == 2
    assert "degraded pictures or those to validate on were added, removed or" in capsys.readouterr().err
    partner.write_bytes(partner.read_bytes()[:-1])
    (roots["val"] / "04.png").unlink()
    assert train.main([str(f) for f in [*flags, *own, "--steps", 1]]) == 2
    assert "those to validate on were added, removed or changed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loop_takes_under_five_percent_for_itself():
    total, spent, _ = loop_overhead.measure(
        ["--hr-root", str(loop_overhead.ROOT / "tests/photos"), *loop_overhead.FLAGS.split()]
    )
    assert (total - spent.total()) / total < 0.05


def test_help_shows_every_default(capsys):
    for program, settings in ((train, train.Settings), (sample, sample.Settings)):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(settings):
            if field.default not in (dataclasses.MISSING, None, ()) and not isinstance(field.default, bool):
                assert f"(default {field.default})" in shown, field.name


# ----------------------------------------------------------------------------------------------------------- sample.py


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "{here}/nowhere.jpg"], "nowhere.jpg"),
        (["--input", "{here}/text.jpg"], "text.jpg: not a picture"),
        (["--input", "{here}/cut.jpg"], "cut.jpg"),
        (["--weights", "{here}/nowhere"], "no such file or folder"),
        (["--vae", "{flux}"], "It looks like the Flux transformer"),
        (["--vae", "{here}/text.jpg"], "not a safetensors file"),
        (["--lora", "{here}/nowhere.safetensors"], "no such LoRA file"),
        (["--lora", "{here}/text.jpg"], "text.jpg"),
        (["--lora", "{flux}"], "it is no LoRA"),
        (["--output", "{here}/nowhere/out.png"], "no such folder"),
        (["--output", "{here}/text.jpg/out.png"], "text.jpg"),
        (["--output", "{here}/out.xyz"], "unknown picture format"),
        (["--steps", "0"], "steps"),
        (["--degrade", "blurr=2"], "blurr"),
        (["--device", "gpu"], "gpu"),
    ],
)
def test_bad_input_of_sample_is_one_clear_line(small_bundle, pictures, tmp_path, capsys, flags, message):
    (tmp_path / "text.jpg").write_text("this is no picture")
    photo = (Path(__file__).parent / "photos" / "bowl.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(photo[: len(photo) // 3])
    flux = small_bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    argv = ["--input", str(pictures / "00.png"), "--output", str(tmp_path / "out.png"), "--weights", str(small_bundle)]
    code = sample.main([*argv, *(f.format(here=tmp_path, flux=flux) for f in flags)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("sample.py: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("program", [train, sample])
def test_unknown_flags_and_bad_values_are_named(program, capsys):
    cases = [(["--colour"], "--colour"), (["--seed", "many"], "invalid int value: 'many'")]
    for argv, message in [*cases, (["--seed", "x" * 10**5], "xxx ... xxx")]:
        required = ["--hr-root", "x"] if program is train else ["--input", "x", "--output", "y"]
        with pytest.raises(SystemExit) as stopped:
            program.main([*required, *argv])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error and len(error) < 1000
