"""The plan against what the allocator saw in real runs, and against the memory that the full model is promised to take.

Measured is the highest sum of all that torch's CPU allocator gave out and took back during a run, from the profiler:
another account than the plan's, and of real kernels. Tolerance 10 percent of the plan's whole peak, weights included.
"""

import dataclasses
import gc
import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sample
import train
from conftest import TINY
from kontext_min import checkpoints, flow
from kontext_min.autoencoder import Autoencoder, AutoencoderParams
from kontext_min.extras import plan
from kontext_min.extras.base import NOTE, Weights
from kontext_min.extras.checkpointing import checkpoint_blocks
from kontext_min.extras.plan import GB, Setting, Sizes
from kontext_min.extras.quantize import quantize_
from kontext_min.extras.saving import save_file
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import add_lora

SMALL = FluxParams(
    hidden_size=192, num_heads=6, depth=3, depth_single_blocks=5, context_in_dim=96, vec_in_dim=64, axes_dim=(4, 14, 14)
)
BENCH = FluxParams(hidden_size=768, num_heads=6, depth=2, depth_single_blocks=4, context_in_dim=512, vec_in_dim=256)
SETTINGS = {
    "lora": {},
    "checkpointed": {"checkpointing": "all"},
    "every second block checkpointed": {"checkpointing": "half"},
    "int8, checkpointed, with context": {"checkpointing": "all", "kind": "int8", "reference": True},
    "all weights": {"full": True},
    "restoring with context": {"train": False, "rank": 0, "reference": True},
}


def allocated(f) -> float:
    """The most that was alive at once of what the allocator gave out while f ran."""
    gc.collect()  # else what earlier tests left is freed in between, and counts as memory that f gave back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    now = peak = 0
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def real(setting: Setting, params: FluxParams, text: int) -> float:
    """The same pass as plan.network's, with weights and numbers in it."""
    flux = Flux(params).requires_grad_(setting.full)
    if not setting.full:
        if setting.kind:
            quantize_(flux, setting.kind)
        if setting.rank:
            add_lora(flux, setting.rank)
    checkpoint_blocks(flux, setting.checkpointing)
    side = setting.size[0] // 8
    z, sigma = torch.zeros(1, 16, side, side), torch.full((1,), 0.5)
    prompt = flow.Prompt(
        torch.zeros(1, text, params.context_in_dim), torch.zeros(1, params.vec_in_dim), torch.ones(1)
    )  # fmt: skip
    objective = flow.Objective(context=setting.reference)

    def run():
        with torch.set_grad_enabled(setting.train):
            if setting.train:
                flow.loss(flux, z, z, z, sigma, prompt, objective).mean().backward()
            else:
                flow.velocity(flux, z, sigma, z, prompt, objective)

    run()
    flux.zero_grad(set_to_none=True)
    return allocated(run)


def compare(name: str, params: FluxParams, text: int, side: int) -> None:
    setting = Setting(size=(side, side), dtype=torch.float32, cuda=False, **SETTINGS[name])
    sizes = Sizes(flux=params, text_tokens=text, stored=torch.float32)
    parts, alive, _ = plan.network(setting, sizes)
    measured = real(setting, params, text)
    weights = parts["weights"] if not setting.full else parts["optimizer"] / 3
    print(f"{name}: planned {(weights + alive) / 1e6:.0f} MB, measured {(weights + measured) / 1e6:.0f} MB")
    assert abs(alive - measured) <= 0.1 * (weights + measured)


@pytest.mark.parametrize("name", SETTINGS)
def test_plan_agrees_with_the_allocator(name):
    compare(name, SMALL, text=64, side=256)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_plan_agrees_with_the_allocator_82m(name):
    compare(name, BENCH, text=512, side=512)


def test_pictures_agree_with_the_allocator():
    """And the arithmetic is counted exactly for a size that the plan has not run."""
    params = AutoencoderParams(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=1)
    weights, *rooms = plan.coder(params, cuda=False)
    autoencoder = Autoencoder(params).requires_grad_(False)
    image, z = torch.zeros(1, 3, 384, 256), torch.zeros(1, 16, 48, 32)
    for room, run in zip(rooms, (lambda: autoencoder.encode(image), lambda: autoencoder.decode(z)), strict=True):
        assert abs(48 * 32 * room.alive - allocated(run)) <= 0.1 * (weights + allocated(run))
        with plan.Tally() as tally, torch.no_grad():
            run()
        assert room.flops(48, 32, 48) == pytest.approx(tally.segment.flops, rel=1e-9)


def test_blocks_that_were_not_run_are_counted_exactly():
    """What multiplication adds for blocks between is what they take when they are run."""
    for changes in ({}, {"checkpointing": "all"}, {"train": False, "rank": 0}):
        setting = Setting(size=(128, 128), dtype=torch.float32, cuda=False, **changes)
        few, many = (
            Sizes(flux=dataclasses.replace(SMALL, depth=d, depth_single_blocks=s), stored=torch.float32)
            for d, s in ((2, 2), (3, 5))
        )
        flux = Flux(many.flux)
        total = sum(p.numel() for p in flux.parameters())
        tally = plan.Tally(flux.parameters())
        z, prompt = torch.zeros(1, 16, 16, 16), flow.Prompt(torch.zeros(1, 512, 96), torch.zeros(1, 64), torch.ones(1))
        with tally, torch.no_grad():
            flow.velocity(flux, z, torch.zeros(1), z, prompt, flow.Objective())
        parts, peak, flops = plan.network(setting, many)
        assert parts["weights"] == 4 * total
        assert peak >= plan.network(setting, few)[1]
        if not setting.train:
            assert flops == sum(s.flops for s in tally.segments.values())


FULL = {  # 1024x1024, batch 1, rank 16, every block checkpointed: most GB of a bridge, and with context tokens
    "int8": ({"kind": "int8"}, (15.2, 17.2), (1024, 1024)),
    "fp8": ({"kind": "fp8"}, (15.2, 17.2), (1024, 1024)),
    "nf4": ({"kind": "nf4"}, (11.5, 13.5), (1024, 1024)),
    "bf16 streamed": ({"stream": True}, (8, 8), (1024, 1024)),
    "512 streamed": ({"stream": True}, (6, 6), (512, 512)),
}


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", FULL)
def test_the_full_model_fits(name, reference):
    changes, most, size = FULL[name]
    setting = Setting(size=size, reference=reference, checkpointing="all", **changes)
    assert plan.measure(setting, Sizes()).device <= most[reference] * GB


def test_full_size_weights_and_arithmetic():
    """11.9 billion parameters in bfloat16; the arithmetic of a pass, written down by hand."""
    parts, _, flops = plan.network(Setting(train=False, rank=0), Sizes())
    assert parts["weights"] == 2 * 11_901_408_320
    d, text, image = 3072, 512, 4096
    tokens = text + image
    linear = 57 * 2 * tokens * 12 * d * d  # double blocks: qkv 3, proj 1, MLP 8 for each stream; single: 7 and 5
    attention = 57 * 4 * tokens**2 * d
    assert flops == pytest.approx(linear + attention, rel=0.005)  # the rest is modulation and embedders


def test_both_scripts_print_the_plan(capsys, tmp_path):
    assert train.main(["--hr-root", str(tmp_path), "--plan", "--weights", str(TINY)]) == 0
    text = capsys.readouterr().out
    assert "peak, network" in text and "TFLOP" in text
    assert re.search(r"--gradient-checkpointing half +\d+\.\d\d  8 GB\n", text)
    photo = TINY.parent.parent / "tests" / "photos" / "bowl.jpg"
    output = tmp_path / "out.png"
    assert sample.main(["--input", str(photo), "--output", str(output), "--plan", "--weights", str(TINY)]) == 0
    assert re.search(r"everything resident +\d+\.\d\d  8 GB\n", capsys.readouterr().out)
    assert not output.exists()


def test_a_large_picture_is_counted_with_its_tiles_and_refused_where_it_does_not_fit(monkeypatch, capsys, tmp_path):
    photo = TINY.parent.parent / "tests" / "photos" / "bowl.jpg"
    argv = ["--input", str(photo), "--output", str(tmp_path / "out.png"), "--weights", str(TINY), "--tile", "256"]
    argv += ["--resolution", "16384", "--steps", "2"]
    monkeypatch.setattr(plan, "free_bytes", lambda _: 20e9)
    assert sample.main([*argv, "--plan"]) == 0
    text = capsys.readouterr().out
    tiles = math.prod(math.ceil((side - 256) / 192) + 1 for side in (19936, 13488))
    assert f"19923x13474 pixels in {2 * tiles} passes of 256x256 pixels" in text
    picture = float(re.search(r"  picture +([\d.]+)", text)[1])
    assert picture > 3 * 2 * 16384**2 / GB  # at least its bytes, in and out
    assert float(re.search(r"memory, peak +([\d.]+)", text)[1]) > picture
    assert re.search(r"for one picture: about \S+ s at", text)
    monkeypatch.setattr(plan, "free_bytes", lambda _: 5e9)
    assert sample.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(r"268 megapixels needs \d+\.\d GB .* 4\.7 GB are free", error)
    smaller = re.search(r"give --resolution (\d+) or less", error)[1]

    def load(*_, **__):
        raise ValueError("loading.")

    monkeypatch.setattr(sample, "load_autoencoder", load)  # what it advises is not refused
    assert sample.main([*argv, "--resolution", smaller]) == 2 and "loading." in capsys.readouterr().err


def test_the_fastest_setting_that_fits_is_named(monkeypatch, capsys, tmp_path):
    argv = ["--hr-root", str(tmp_path), "--plan", "--weights", str(TINY), "--batch-size", "4"]
    train.main(argv)
    text = capsys.readouterr().out
    peaks = {m[1].strip(): m[2] for m in re.finditer(r"^  (\S.*?) {2,}(\d+\.\d\d)  8 GB$", text, re.M)}
    assert len(peaks) == 6 and "that fits into" in text
    assert "--resolution 512" not in text  # which is more than the 128 of weights/tiny
    train.main([*argv, "--resolution", "1024"])
    assert len(re.findall("--resolution 512 ", capsys.readouterr().out)) == 3
    sizes = plan.Sizes.of(Weights(TINY))
    asked = plan.Setting(size=(128, 128), batch=4, dtype=torch.float32, cuda=False)
    peaks = {f: plan.measure(s, sizes).device for f, s in plan.choices(asked, (128, 128)).items()}
    monkeypatch.setattr(plan.speed, "measure", lambda *_: (1e9, 1e9))
    for flags in ("everything resident", "--gradient-checkpointing half"):
        monkeypatch.setattr(plan, "free_bytes", lambda _, free=peaks[flags]: free)
        text = plan.show(asked, sizes, (128, 128), torch.device("cpu"))
        assert text.endswith(f"GB free here: {flags}")
    monkeypatch.setattr(plan, "free_bytes", lambda _: 0)
    assert plan.show(asked, sizes, (128, 128), torch.device("cpu")).endswith("GB free here: none")
    monkeypatch.setattr(plan, "free_bytes", lambda device: math.inf)  # neither Linux nor CUDA
    said = plan.show(asked, sizes, (128, 128), torch.device("cpu"))
    assert said.endswith("is not told: this system does not say how much memory is free")
    sharded = plan.show(dataclasses.replace(asked, shard=True), sizes, (128, 128), torch.device("cpu"))
    assert "one process alone; with --shard each of N has about 1/N of all weights" in sharded
    assert "one process alone" not in said and "--stream" in said
    assert "--quantize" not in sharded and "--stream" not in sharded  # which --shard excludes


def test_the_seconds_of_the_plan_are_those_of_a_step():
    """The arithmetic is counted exactly; the speed, measured side by side on a busy machine, within a factor of 1.5."""
    sizes = Sizes(flux=SMALL, autoencoder=AutoencoderParams(ch=32, ch_mult=(1, 2), num_res_blocks=1), text_tokens=64)
    setting = Setting(size=(128, 128), dtype=torch.float32, cuda=False, text=False, rank=16, passes=2)
    planned = plan.measure(setting, sizes)
    flux, coder = Flux(SMALL), Autoencoder(sizes.autoencoder).requires_grad_(False)
    add_lora(flux, 16)
    z, prompt = torch.zeros(1, 16, 64, 64), flow.Prompt(torch.zeros(1, 64, 96), torch.zeros(1, 64), torch.ones(1))

    def step():
        for _ in range(2):
            for _ in range(2):
                coder.encode(torch.zeros(1, 3, 128, 128))
            flow.loss(flux, z, z, z, torch.full((1,), 0.5), prompt, flow.Objective()).mean().backward()

    with plan.Tally() as tally:
        step()
    assert tally.segment.flops == pytest.approx(2 * planned.flops + planned.coding, rel=1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken, planned_seconds = [], []  # turn by turn, and the best of each: other work on the machine only adds
        for turn in range(9):  # more than 3 where other work on the machine has stood in the way
            network, coding = plan.speed.measure(SMALL, sizes.autoencoder, torch.float32, torch.device("cpu"), (32, 32))
            planned_seconds.append(2 * planned.flops / network + planned.coding / coding)
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
            if turn >= 2 and 1 / 1.5 < min(taken) / min(planned_seconds) < 1.5:
                break
    finally:
        torch.set_num_threads(threads)
    ratio = min(taken) / min(planned_seconds)
    print(f"measured / planned: {ratio:.2f}")
    assert 1 / 1.5 < ratio < 1.5


def test_what_a_file_without_its_config_does_not_tell_is_said(tmp_path, capsys):
    sizes = plan.Sizes.of(Weights(TINY))
    assert not capsys.readouterr().err
    alone = {}
    for part, keys in checkpoints.NOT_IN_SHAPES.items():
        alone[part] = Path(shutil.copy(checkpoints.find(TINY, part)[0], tmp_path / f"{part}.safetensors"))
        assumed = plan.Sizes.of(Weights(TINY, **{part: alone[part]}))
        said = f"note: {alone[part]}: not of FLUX's size, and no config.json beside it gives its {' and '.join(keys)}; "
        assert capsys.readouterr().err == said + "as in FLUX is assumed\n", part
        assert (assumed.autoencoder == sizes.autoencoder) == (part != "vae")


def test_a_tokenizer_that_tells_no_length_is_named(tmp_path, capsys):
    weights = shutil.copytree(TINY, tmp_path / "w")
    config = weights / "tokenizer_2" / "tokenizer_config.json"
    for content, said in (({"model_max_length": 1e30}, ""), ({}, "no model_max_length"), (None, "no such file")):
        config.unlink()
        if content is not None:
            config.write_text(json.dumps(content))
        Sizes.of(Weights(weights))
        line = f"note: {config}: {said}, which gives the length of prompts; FLUX's 512\n"
        assert capsys.readouterr().err == line * bool(said)
        config.touch()


def test_the_config_of_another_autoencoder_is_said(monkeypatch, capsys):
    """That of SD3 names the sizes of FLUX's; it may lie beside ae.safetensors in a folder of several."""
    tiny = Sizes.of(Weights(TINY)).autoencoder
    flux_s = dataclasses.replace(tiny, scale_factor=0.3611, shift_factor=0.1159)
    for sizes, said in ((tiny, 0), (dataclasses.replace(flux_s, ch=64), 0), (flux_s, 1)):  # taken for FLUX's
        monkeypatch.setattr(plan, "AutoencoderParams", lambda sizes=sizes: sizes)
        Sizes.of(Weights(TINY))
        line = (
            f"note: {TINY}: scaling_factor and shift_factor are 1.0264 and 0.0024 as its config.json says; FLUX's are"
        )
        assert capsys.readouterr().err.count(f"{line} 0.3611 and 0.1159; is it the config.json of another") == said


def test_a_plan_for_streamed_weights_needs_no_sysconf(monkeypatch):
    """Windows has none."""
    setting = Setting(train=False, stream=True, cuda=True, size=(64, 64))
    before = plan.network(setting, sizes := Sizes.of(Weights(TINY)))[0]["host"]
    monkeypatch.delattr("os.sysconf")
    assert 0 < plan.network(setting, sizes)[0]["host"] < before


@pytest.mark.parametrize(
    ("part", "key"), [("vae", "norm_num_groups"), ("clip", "hidden_act"), ("t5", "feed_forward_proj")]
)
def test_networks_of_another_kind_are_refused(tmp_path, part, key):
    """Their tensors have the same names and shapes, such as those of a CLIP with the exact GELU."""
    weights = shutil.copytree(TINY, tmp_path / "w")
    file = weights / checkpoints.FOLDERS[part] / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: "gelu"}))
    with pytest.raises(ValueError, match=rf"config\.json: {key} is 'gelu', expected .*: no .* of FLUX"):
        plan.Sizes.of(Weights(weights))


@pytest.mark.parametrize(
    ("note", "is_read"),
    [
        ({"format": "float8_e4m3fn"}, True),
        ({"format": "int8_tensorwise", "full_precision_matrix_mult": True, "convrot": False}, True),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}, False),
        ({"format": "float8_e4m3fn_rowwise", "per_row": True, "orig_dtype": "bfloat16"}, True),
        ({"format": "another"}, False),
        ([1], False),
    ],
)
@pytest.mark.parametrize("of_header", [False, True])
def test_weights_that_comfyui_has_packed_in_another_way_are_refused(tmp_path, note, is_read, of_header):
    """Their tensors have the same names, types and shapes, such as weights that are rotated before they are rounded."""
    state = checkpoints.load_flux(TINY).state_dict()
    name = "double_blocks.0.img_attn.qkv"
    told = {"_quantization_metadata": json.dumps({"layers": {name: note}})} if of_header else {}
    if not of_header:
        state[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    save_file(state, tmp_path / "flux.safetensors", told)
    weights = Weights(TINY, transformer=tmp_path / "flux.safetensors")
    names = {"model.diffusion_model.": state, "text_encoders.t5xxl.transformer.": {f"x{NOTE}": torch.zeros(9).byte()}}
    whole = {prefix + key: value for prefix, tensors in names.items() for key, value in tensors.items()}
    save_file(whole, tmp_path / "all.safetensors")
    if is_read or of_header:  # of another network
        plan.Sizes.of(Weights(TINY, transformer=tmp_path / "all.safetensors"))
    if is_read:
        plan.Sizes.of(weights)
    else:
        with pytest.raises(ValueError, match=r"flux.safetensors: packed as .*, which is not read; take"):
            plan.Sizes.of(weights)


def test_weights_beside_an_index_are_named(tmp_path, capsys):
    """diffusers reads the shards of the index too; the other file may be the one that you copied there."""
    weights = shutil.copytree(TINY, tmp_path / "w")
    folder = weights / "transformer"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "shard.safetensors")
    names = dict.fromkeys(checkpoints.read_headers([folder / "shard.safetensors"]), "shard.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plan.Sizes.of(Weights(weights))
    assert capsys.readouterr().err.splitlines() == [
        f"note: {folder}: its index names the weights; not read: diffusion_pytorch_model.safetensors"
    ]
    hidden = folder / "._diffusion_pytorch_model.safetensors.index.json"  # as a Mac leaves it on other disks
    hidden.write_bytes(b"\xb0")
    plan.Sizes.of(Weights(weights))
    assert len(capsys.readouterr().err.splitlines()) == 1
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "shard.safetensors").rename(folder / "flux1-mine.safetensors")
    plan.Sizes.of(Weights(weights))
    said = f"note: {folder}: read is flux1-mine.safetensors; not read: diffusion_pytorch_model.safetensors\n"
    assert capsys.readouterr().err == said


def test_smallest_card_with_a_tenth_to_spare():
    named = {1: "8 GB", 7.2: "8 GB", 7.21: "12 GB", 14.4: "16 GB", 14.5: "24 GB", 43: "48 GB", 72.1: "more than 80 GB"}
    assert {peak: plan.card(peak * GB) for peak in named} == named


def test_free_memory_is_that_of_the_container(monkeypatch, tmp_path):
    """cgroup 2, then cgroup 1, the formats of the kernel's documentation; the smallest number counts."""
    monkeypatch.setattr(plan, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(plan, "CGROUP", tmp_path)
    device = torch.device("cpu")
    assert plan.free_bytes(device) == math.inf  # no Linux
    (tmp_path / "meminfo").write_text("MemTotal:       32000000 kB\nMemAvailable:   24000000 kB\n")
    assert plan.free_bytes(device) == 24e6 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1500000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000000\ninactive_file 300000000\nactive_file 200000000\n")
    assert plan.free_bytes(device) == 24e6 * 1024
    (tmp_path / "memory.max").write_text("2000000000\n")
    assert plan.free_bytes(device) == 2_000_000_000 - 1_500_000_000 + 300_000_000
    for name in ("memory.max", "memory.current", "memory.stat"):
        (tmp_path / name).unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000000000\n")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 100000000\n")
    for limit, free in ((2**63 - 4096, 24e6 * 1024), (2_000_000_000, 1.1e9), (500_000_000, 0)):
        (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{limit}\n")
        assert plan.free_bytes(device) == free


def test_a_run_fits_if_its_peak_is_free(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 0)
    sizes = Sizes(flux=SMALL, stored=torch.float32)
    asked = Setting(size=(128, 128), dtype=torch.float32, cuda=False, text=False, pictures=False)
    need = {w: plan.measure(dataclasses.replace(asked, checkpointing=w), sizes).device for w in ("all", "half", "none")}
    assert need["all"] < 0.9 * need["half"] < 0.9 * 0.9 * need["none"]
    for which, most in need.items():
        setting = dataclasses.replace(asked, checkpointing=which)
        monkeypatch.setattr(plan, "free_bytes", lambda _, free=most: free)
        plan.fit(setting, sizes, torch.device("cpu"))
        monkeypatch.setattr(plan, "free_bytes", lambda _, free=most: free - 1)
        with pytest.raises(ValueError, match="--plan shows the flags"):
            plan.fit(setting, sizes, torch.device("cpu"))


def test_a_run_that_does_not_fit_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "free_bytes", lambda _: 50e6)
    assert train.main(["--hr-root", str(tmp_path), "--weights", str(TINY)]) == 2
    error = capsys.readouterr().err
    assert "0.0 GB are free" in error and "--plan" in error
