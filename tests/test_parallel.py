"""Several processes: the same losses and LoRA as one, sharded or not, resumed, stopped, or with one of them dead.

They run with gloo on the CPU, in float32: in bfloat16 each process rounds the gradient of its own pictures. Sums come
in another order than in one process, so equality is to rounding: 1e-6 where every process holds the model, 1e-5 for
FSDP2, which also sums the squares of the gradient norm in parts.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import processes
import train
from conftest import make_pictures
from kontext_min.extras import lora_files, parallel, runs

FLAGS = (
    "--dtype float32 --resolution 64 --steps 8 --accumulate 2 --checkpoint-every 4 --warmup 3 --ema 0.9 "
    "--validate-every-epochs 1 --workers 0"
)


@pytest.fixture(scope="module")
def launch(small_bundle, pictures, tmp_path_factory):
    """launch(world, flags, folder=None, setup=None): the run folder; the batch of all processes is 2 in every case."""
    cache = tmp_path_factory.mktemp("cache")

    def run(world, *flags, folder=None, setup=None, silent=True, code=0):
        folder = folder or tmp_path_factory.mktemp("run")
        argv = ["--hr-root", pictures, "--weights", small_bundle, "--cache-dir", cache, *FLAGS.split()]
        argv += ["--output-dir", folder, "--batch-size", 2 // world, *flags]
        log = folder.with_suffix(".log")
        got = processes.together(argv, log, world, setup)
        said = [Path(f"{log}.{rank}").read_text() for rank in range(world)]
        assert got == [code] * world, "\n".join(said)
        assert not (silent and any(said[1:]))  # only the first process speaks
        return folder

    return run


@pytest.fixture(scope="module")
def alone(launch):
    return launch(1)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b, tolerance, file="lora.safetensors"):
    ours, theirs = load_file(a / file), load_file(b / file)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name
    rows = list(zip(metrics(a), metrics(b), strict=True))
    assert len(rows) == 12
    for x, y in rows:
        assert x["step"] == y["step"]
        for key in {"loss", "loss_at", "sigma_loss", "grad_norm"} & x.keys():
            x_values, y_values = (v if isinstance(v, list) else [v] for v in (x[key], y[key]))
            assert [v is None for v in x_values] == [v is None for v in y_values]  # intervals that no sigma fell into
            both = [(a, b) for a, b in zip(x_values, y_values, strict=True) if a is not None]
            assert max(abs(a - b) / max(1, abs(a)) for a, b in both) <= tolerance, (x["step"], key)


def only_the_first_writes(folder):
    """Processes other than the first are ended if they open a file of the run folder for writing, rename or delete."""
    if os.environ["RANK"] == "0":
        return

    def refuse(event, args):
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(args[0]).startswith(folder):
            os.write(2, f"{event} {args}\n".encode())
            os._exit(71)

    sys.addaudithook(refuse)
    runs.save_file = lora_files.save_file = None  # they write without Python's knowledge


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    return launch(2, folder=folder, setup=partial(only_the_first_writes, str(folder)))


def test_two_processes_are_one_with_twice_the_batch(alone, two):
    assert_same(alone, two, 1e-6)
    settings = [json.loads((f / "settings.json").read_text()) for f in (alone, two)]
    assert [s["pictures_a_batch"] for s in settings] == [2, 2]
    assert [s["batch_size"] for s in settings] == [2, 1]


def test_pictures_that_any_process_can_not_read_are_counted_and_named_once(launch, tmp_path):
    """Those of the second process were in no row and in no checkpoint, and each resume named them again."""
    hr = make_pictures(tmp_path / "hr")
    for file in sorted(hr.glob("*.png"))[::4]:  # one of each shape; the header is whole, and so is the end
        whole = file.read_bytes()
        half = len(whole) // 2
        file.write_bytes(whole[:half] + bytes(1000) + whole[half + 1000 :])
    flags = "--hr-root", hr, "--seed", 3
    alone, two = launch(1, *flags), launch(2, *flags)
    counts = [[row.get("unreadable") for row in metrics(folder)] for folder in (alone, two)]
    assert counts[0] == counts[1] and max(n for n in counts[0] if n is not None) >= 2
    states = [json.loads((f / "checkpoints/step-000008/state.json").read_text())["unreadable"] for f in (alone, two)]
    assert sorted(states[0]) == sorted(states[1])
    said = Path(f"{two.with_suffix('.log')}.0").read_text()
    assert said.count("left out: ") == len(states[0])


def sees_other_pictures():
    """As on a machine with its own copy of them, which lacks some."""
    if os.environ["RANK"] == "1":
        runs.hash_of_pictures = lambda pairs: "others"


def is_given_other_flags():
    """torchrun is typed once on each machine."""
    if os.environ["RANK"] == "1":
        real = runs.flags_of_all
        runs.flags_of_all = lambda settings: real(settings | {"lr": 0.5})


def test_processes_with_other_flags_are_refused(launch, tmp_path):
    launch(2, folder=tmp_path / "run", setup=is_given_other_flags, silent=False, code=2)
    assert "run: not all processes see the same flags; " in (tmp_path / "run.log.0").read_text()


def test_what_all_processes_are_given_knows_the_lora_to_start_from(tmp_path):
    lora, settings = tmp_path / "a.safetensors", {"lr": 1e-3, "batch_size": 2, "output_dir": "a", "lr_root": "b"}
    lora.write_bytes(bytes(20_000))
    settings["init_lora"] = str(lora)
    before = runs.flags_of_all(settings)
    assert before == runs.flags_of_all(settings | {"output_dir": "c", "lr_root": "d", "device": "cuda:1"})
    assert before != runs.flags_of_all(settings | {"validate_every_epochs": 2})  # they wait for each other there
    assert before != runs.flags_of_all(settings | {"batch_size": 1}) and before != runs.flags_of_all(
        settings | {"lr": 1}
    )
    lora.write_bytes(bytes(10_000) + b"x" + bytes(9_999))
    assert before != runs.flags_of_all(settings)


def test_processes_that_see_other_pictures_are_refused(launch, tmp_path):
    launch(2, folder=tmp_path / "run", setup=sees_other_pictures, silent=False, code=2)
    for rank in range(2):
        said = (tmp_path / f"run.log.{rank}").read_text()
        assert "run: not all processes see the same pictures; they need one disk that they share" in said
        assert "Traceback" not in said


def test_shards_are_one_process_too(launch, alone, tmp_path):
    setup = partial(only_the_first_writes, str(tmp_path / "run"))
    assert_same(alone, launch(2, "--shard", folder=tmp_path / "run", setup=setup), 1e-5)


def test_all_weights_train_in_shards(launch):
    """Here the outermost module has weights that train, and the average must not stay behind in it."""
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert_same(launch(1, "--full"), launch(2, "--full", "--shard"), 1e-5, file)


def test_cached_latents_are_made_by_all(launch, tmp_path):
    one, two = (launch(w, "--cache-latents", "2", "--cache-dir", tmp_path / f"cache-{w}") for w in (1, 2))
    assert_same(one, two, 1e-6)
    names = [sorted(f.name for f in (tmp_path / f"cache-{w}" / "latents").rglob("*.safetensors")) for w in (1, 2)]
    assert names[0] == names[1] and len(names[0]) == 22


@pytest.mark.parametrize(("before", "after", "flags"), [(1, 2, []), (2, 1, []), (1, 2, ["--shard"])])
def test_goes_on_with_another_number_of_processes(launch, alone, two, tmp_path, before, after, flags):
    folder = shutil.copytree(alone if before == 1 else two, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    (folder / "lora.safetensors").unlink()
    assert_same(alone, launch(after, *flags, folder=folder), 1e-5 if flags else 1e-6)


def in_bfloat16():
    """A run whose frozen weights are bfloat16, as on a GPU."""

    def load(*args, original=train.load_base):
        flux, stream = original(*args)
        return flux.bfloat16(), stream

    def batch(encoded, texts, guidance, dtype, device, original=train.prompts.batch):
        return original(encoded, texts, guidance, torch.bfloat16, device)

    train.load_base, train.prompts.batch = load, batch


def test_shards_of_a_bfloat16_base_keep_the_lora_in_float32(launch):
    one, shards = (launch(w, *f, setup=in_bfloat16) for w, f in ((1, []), (2, ["--shard"])))
    for file in ("trained", "optimizer", "ema", "lora"):
        tensors = load_file(shards / "checkpoints" / "step-000004" / f"{file}.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}, file
    for x, y in zip(metrics(one), metrics(shards), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-2)  # bfloat16 has 8 bits: sums in another order show


def stop_one_of_them():
    """SIGTERM reaches the second process alone, in its third step."""
    if os.environ["RANK"] != "1":
        return
    original = train.learning_rate

    def learning_rate(settings, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(settings, step)

    train.learning_rate = learning_rate


def test_all_stop_after_the_same_step(launch, alone, tmp_path):
    folder = launch(2, "--shard", folder=tmp_path / "run", setup=stop_one_of_them, silent=False, code=130)
    assert "stopping after this step" in folder.with_suffix(".log.1").read_text()
    assert runs.latest_checkpoint(folder).name == "step-000003"
    assert not (folder / "lora.safetensors").exists()
    assert_same(alone, launch(2, "--shard", folder=folder, silent=False), 1e-5)


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
original = train.learning_rate

def learning_rate(settings, step):
    if step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(settings, step)

train.learning_rate = learning_rate
sys.exit(train.main())
"""


def test_a_dead_process_ends_the_others_with_a_message(small_bundle, pictures, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(Path(train.__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += ["--hr-root", pictures, "--weights", small_bundle, "--cache-dir", tmp_path, *FLAGS.split()]
    command += ["--output-dir", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 1
    assert "SIGKILL" in done.stderr  # torchrun names who died and of what
    assert "another process of this run ended" in done.stderr
    assert f'{train.__file__}", line' not in done.stderr  # the only traceback is that of torchrun
    assert runs.latest_checkpoint(tmp_path / "run").name == "step-000004"
    runs.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000004")
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] >= 4


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "5"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": "2", "RANK": "0"},
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_one_line(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^RANK=.* WORLD_SIZE=.* in the environment: unset them, or start with torch"):
        parallel.start("cpu")


def test_one_process_needs_no_group():
    one = parallel.start("cpu")
    assert (one.rank, one.world, one.device.type) == (0, 1, "cpu")
    assert parallel.add_up(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert parallel.any_of(True) and not parallel.any_of(False)
    assert parallel.from_first(0.1) == 0.1
    parallel.wait()
    with parallel.first_goes_ahead(one):
        pass
    for device in ("gpu", "mps"):
        with pytest.raises(ValueError, match="no such device here"):
            parallel.start(device)


@pytest.mark.parametrize(("flag", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_gpu_is_chosen_by_its_number(monkeypatch, flag, number):
    """torch.cuda.set_device refuses `cuda` without a number."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert parallel.start(flag).device == torch.device("cuda", number)
    assert chosen == [torch.device("cuda", number)]
    with pytest.raises(ValueError, match="has 2 CUDA GPUs"):
        parallel.start("cuda:2")
