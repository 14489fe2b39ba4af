"""Streaming: the numbers of the plain run, bit for bit; two blocks at a time; the files as the only copy."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from kontext_min.checkpoints import load_flux, load_t5
from kontext_min.extras import checkpointing, prompts, stream
from kontext_min.extras.base import Weights
from kontext_min.extras.checkpointing import checkpoint_blocks
from kontext_min.extras.quantize import QUANTIZED, QuantizedLinear, load_quantized
from kontext_min.extras.saving import save_flux
from kontext_min.extras.stream import load_streamed
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import add_lora
from test_checkpoints import TINY as TINY_FLUX
from test_checkpoints import random_flux, to_diffusers
from test_lora import ARGS, randomise

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"


def write(folder: Path, layout: str) -> Path:
    """A random Flux of three blocks in one of the layouts that are read."""
    flux = random_flux()
    with torch.no_grad():  # scales of the norms near 1, so that the sums are not all rounding
        for name, p in flux.named_parameters():
            p.copy_(p + 1 if name.endswith("scale") else p * 0.5)
    state = to_diffusers(flux) if layout.startswith("diffusers") else flux.state_dict()
    if layout == "fp8 scaled":
        state, plain = {}, state
        for name, tensor in plain.items():
            state[name] = tensor.bfloat16()
            if tensor.ndim == 2:
                scale = tensor.abs().max() / 448
                state[name] = (tensor / scale).to(torch.float8_e4m3fn)
                state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    dtype = {"fp8": torch.float8_e4m3fn, "fp8 scaled": None, "float32": None}.get(layout, torch.bfloat16)
    state = {n: t.contiguous() if dtype is None else t.to(dtype).contiguous() for n, t in state.items()}
    if layout == "diffusers in shards":
        names = sorted(state)
        for shard in (0, 1):
            save_file({n: state[n] for n in names[shard::2]}, folder / f"{shard}.safetensors")
        index = {"weight_map": {n: f"{k % 2}.safetensors" for k, n in enumerate(names)}}
        (folder / "x.safetensors.index.json").write_text(json.dumps(index))
        return folder
    save_file(state, folder / "f.safetensors")
    return folder / "f.safetensors"


def learn(flux, steps=3):
    """Losses, last gradients and last weights of a LoRA over a few steps, with a pass without gradients in between."""
    params = [p for p in flux.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    results = []
    for _ in range(steps):
        loss = flux(*ARGS).square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in params]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            results += [loss.detach(), flux(*ARGS)]
    return [*results, *gradients, *params]


def with_lora(flux):
    randomise(add_lora(flux, 4))
    return flux


def equal(a, b):
    return len(a) == len(b) > 10 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


LAYOUTS = ["bfl", "diffusers", "diffusers in shards", "fp8", "fp8 scaled", "float32"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_runs_give_the_numbers_of_the_plain_run(tmp_path, layout):
    """The plain run has the weights as streaming has them; of a float32 file ordinary Linears, which sum otherwise."""
    file = write(tmp_path, layout)
    plain = load_flux(file, dtype=torch.float32)
    if layout != "float32":
        for name, m in list(plain.named_modules()):
            if name.partition(".")[0] in ("double_blocks", "single_blocks") and isinstance(m, torch.nn.Linear):
                plain.set_submodule(name, QuantizedLinear(m, m.weight.detach(), None))
    plain = learn(with_lora(plain))
    flux, stream = load_streamed("transformer", file, torch.float32)
    with_lora(flux)
    stream.wrap()
    checkpoint_blocks(flux, "all")
    got = learn(flux)
    if layout == "float32":
        assert all((x - y).abs().max() <= 1e-5 for x, y in zip(got, plain, strict=True))
    else:
        assert equal(got, plain)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("layout", ["diffusers", "fp8 scaled"])
def test_quantized_then_streamed(tmp_path, layout, kind):
    file = write(tmp_path, layout)
    plain = learn(with_lora(load_quantized(file, kind, torch.float32)))
    for _ in range(2):  # made, then found in the cache
        flux, stream = load_streamed("transformer", file, torch.float32, kind=kind, cache=tmp_path / "cache")
        with_lora(flux)
        stream.wrap()
        checkpoint_blocks(flux, "all")
        assert equal(learn(flux), plain)


@pytest.mark.parametrize(("which", "blocks"), [("all", 3), ("half", 2), ("none", 0)])
def test_checkpointed_runs_give_the_numbers_of_the_plain_run(tmp_path, which, blocks, monkeypatch):
    file = write(tmp_path, "bfl")
    plain = learn(with_lora(load_quantized(file, "nf4", torch.float32)))
    flux = with_lora(load_quantized(file, "nf4", torch.float32))
    seen, real = [], checkpointing.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *args, **kwargs: seen.append(1) or real(*args, **kwargs))
    checkpoint_blocks(flux, which)
    assert equal(learn(flux), plain)
    assert len(seen) == 3 * 2 * blocks  # steps, passes, blocks


@pytest.mark.slow
def test_works_with_compiled_blocks(tmp_path):
    file = write(tmp_path, "bfl")
    plain = learn(with_lora(load_flux(file, dtype=torch.float32)))
    flux, stream = load_streamed("transformer", file, torch.float32)
    with_lora(flux)
    torch._dynamo.reset()
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend="eager")
    stream.wrap()
    checkpoint_blocks(flux, "all")
    assert equal(learn(flux), plain)


def test_two_blocks_at_a_time(tmp_path):
    """Each pass brings every block once but for the two that are there already; the next one comes in good time."""
    flux, stream = load_streamed("transformer", write(tmp_path, "bfl"), torch.float32)
    with_lora(flux)
    seen = []
    for i, block in enumerate((*flux.double_blocks, *flux.single_blocks)):

        def forward(*args, i=i, forward=block.forward):
            real = {
                n.split(".")[1] + n[0]
                for n, m in flux.named_modules()
                if isinstance(m, QuantizedLinear) and m.codes is not None
            }
            seen.append((i, set(stream.holds), real))
            return forward(*args)

        block.forward = forward
    stream.wrap()
    checkpoint_blocks(flux, "all")
    assert len(stream.slots) == 2
    assert all(slot.nbytes == max(stream.sizes) for slot in stream.slots)

    with torch.no_grad():
        flux(*ARGS)
    assert [s[:2] for s in seen] == [(0, {0, 1}), (1, {1, 2}), (2, {2, 0})]  # after the last comes the first
    assert [s[2] for s in seen] == [{"0d"}, {"0s"}, {"1s"}]  # only the block that runs has weights
    seen.clear()
    flux(*ARGS).sum().backward()
    order = [(0, {0, 1}), (1, {1, 2}), (2, {1, 2})]  # with gradients, after the last comes the last but one
    assert [s[:2] for s in seen] == [*order, (2, {1, 2}), (1, {0, 1}), (0, {0, 1})]
    stream.worker.shutdown(wait=True)
    assert stream.fetched == 3 + 1 + 1 + 1 + 1
    every = sum(stream.sizes)
    assert every <= stream.bytes_read < 3 * every
    assert "7 blocks" in stream.report()


def test_without_checkpointing_an_error_and_no_wrong_gradients(tmp_path):
    flux, stream = load_streamed("transformer", write(tmp_path, "bfl"), torch.float32)
    with_lora(flux)
    stream.wrap()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        flux(*ARGS).sum().backward()


def test_nothing_runs_without_its_weights(tmp_path):
    """Between passes, and before `wrap`, the layers have no codes: a sum with them is an error."""
    flux, stream = load_streamed("transformer", write(tmp_path, "bfl"), torch.float32)
    narrow = [m for m in flux.modules() if isinstance(m, QuantizedLinear)]
    assert len(narrow) == 10 + 2 * 3
    with pytest.raises(AttributeError, match="NoneType"), torch.no_grad():
        flux(*ARGS)
    stream.wrap()
    with torch.no_grad():
        flux(*ARGS)
    assert all(m.codes is None for m in narrow)


def test_cache_of_quantized_blocks(tmp_path, monkeypatch):
    """One file a block; what is missing is made, what is there is left, other weights get a folder of their own."""
    file, cache = write(tmp_path, "bfl"), tmp_path / "cache"
    load = lambda: load_streamed("transformer", file, torch.float32, kind="int8", cache=cache)  # noqa: E731
    load()
    (folder,) = cache.iterdir()
    names = {"double_blocks.0", "single_blocks.0", "single_blocks.1"}
    assert {f.name for f in folder.iterdir()} == {f"{n}.safetensors" for n in names}
    times = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    (folder / "single_blocks.0.safetensors").unlink()
    load()
    changed = {f.name for f in folder.iterdir() if f.stat().st_mtime_ns != times[f]}
    assert changed == {"single_blocks.0.safetensors"}
    whole, block = next(iter(times)).read_bytes(), next(iter(times))
    monkeypatch.setattr(stream, "CODE", "edited")
    load()
    assert block.read_bytes() != whole
    monkeypatch.undo()
    load()
    assert block.read_bytes() == whole
    save_file({n: t.bfloat16() for n, t in random_flux(seed=1).state_dict().items()}, file)
    load()
    assert len(list(cache.iterdir())) == 2
    (second,) = set(cache.iterdir()) - {folder}
    own = {f.name: f.read_bytes() for f in second.iterdir()}
    shutil.copytree(folder, second, dirs_exist_ok=True)  # those of the other weights
    load()
    assert {f.name: f.read_bytes() for f in second.iterdir()} == own


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_block_in_the_cache_that_is_not_whole_is_made_again(tmp_path, kind):
    file, cache = write(tmp_path, "bfl"), tmp_path / "cache"
    load = lambda: load_streamed("transformer", file, torch.float32, kind=kind, cache=cache)  # noqa: E731
    load()
    block = next(cache.glob("*/single_blocks.0.safetensors"))
    whole = block.read_bytes()
    other = next(cache.glob("*/double_blocks.0.safetensors")).read_bytes()
    cuts = [whole[:n] for n in (0, 7, 9, 500, len(whole) // 2, len(whole) - 1)]
    for broken in (*cuts, b"x" * 2000, other):
        block.write_bytes(broken)
        flux, stream = load()
        assert block.read_bytes() == whole
        stream.wrap()
        with torch.no_grad():
            assert flux(*ARGS).isfinite().all()


def test_blocks_that_other_code_replaces_are_not_read(tmp_path):
    """Codes of one with scales of the other would give other weights."""
    file, cache = write(tmp_path, "bfl"), tmp_path / "cache"
    shown = []
    for replaced in (False, True):
        flux, stream = load_streamed("transformer", file, torch.float32, kind="int8", cache=cache)
        for block in cache.glob("*/*.safetensors") if replaced else ():
            save_file({name: torch.zeros_like(x) for name, x in load_file(block).items()}, tmp_path / "new")
            (tmp_path / "new").replace(block)
        stream.wrap()
        with torch.no_grad():
            shown.append(flux(*ARGS))
    assert torch.equal(*shown)


def test_two_merged_loras_do_not_share_a_cache(tmp_path):
    """Bases that differ in one small weight get folders of their own."""
    save_flux(Flux(replace(TINY_FLUX, mlp_ratio=4.0)), tmp_path / "a" / "transformer")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["single_transformer_blocks.0.attn.to_k.weight"] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    for name in "ab":
        load_streamed("transformer", tmp_path / name, torch.float32, kind="int8", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_bad_files(tmp_path):
    file = write(tmp_path, "bfl")
    flux, stream = load_streamed("transformer", file, torch.float32)
    stream.wrap()
    os.truncate(file, 2000)  # after its header was found good
    with pytest.raises(ValueError, match=r"f\.safetensors: ends too early"), torch.no_grad():
        flux(*ARGS)
    state = {n: t.bfloat16().contiguous() for n, t in to_diffusers(random_flux()).items()}
    name = "transformer_blocks.0.attn.to_q.weight"
    save_file(state | {name: state[name].float()}, file)
    with pytest.raises(ValueError, match=r"img_attn\.qkv is stored in several dtypes"):
        load_streamed("transformer", file, torch.float32)


def test_t5(tmp_path):
    ids = torch.arange(3, 43)[None]
    t5, stream = load_streamed("t5", TINY, torch.float32)
    stream.wrap()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(t5(ids), load_t5(TINY, dtype=torch.float32)(ids))
    encoded = [
        prompts.encode(["a photo"], Weights(TINY), None, torch.float32, "cpu", streamed)["a photo"]
        for streamed in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*encoded, strict=True))


PEAK = """
import gc, re, sys, torch
from kontext_min.extras.stream import load_streamed
from kontext_min.lora import add_lora
from kontext_min.extras.checkpointing import checkpoint_blocks
ids, one = lambda n: torch.zeros(1, n, 3), torch.ones(1)
for file in sys.argv[1:]:
    flux, stream = load_streamed("transformer", file, torch.float32)
    add_lora(flux, 1), stream.wrap(), checkpoint_blocks(flux, "all")
    flux(torch.randn(1, 16, 16), ids(16), torch.randn(1, 8, 20), ids(8), one, torch.randn(1, 12), one).sum().backward()
    del flux, stream
    gc.collect()
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_does_not_grow_with_the_number_of_blocks(tmp_path):
    """Between steps through 8 and through 24 blocks of 17.7 MB, the peaks differ by less than two of them."""
    files = []
    for count in (8, 24):
        params = FluxParams(
            in_channels=16, out_channels=16, vec_in_dim=12, context_in_dim=20, hidden_size=768, num_heads=8, depth=0,
            depth_single_blocks=count, axes_dim=(12, 42, 42),
        )  # fmt: skip
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in Flux(params).state_dict().items()}
        state = {n: torch.full(s, 1e-3, dtype=torch.bfloat16) for n, s in shapes.items()}
        files.append(tmp_path / f"{count}.safetensors")
        save_file(state, files[-1])
    out = subprocess.run(
        [sys.executable, "-c", PEAK, *files], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    few, many = map(float, out.split())
    assert many - few < 2 * 17.7


# ------------------------------------------------------------------------------------------------------------ train.py

FLAGS = "--resolution 64 --steps 2 --accumulate 1 --workers 0"


@pytest.fixture
def run(small_bundle, pictures, tmp_path):
    def call(*flags):
        flags = [*f"{FLAGS} --overwrite".split(), *flags]
        argv = ["--hr-root", pictures, "--weights", small_bundle, "--cache-dir", tmp_path / "cache", *flags]
        code = train.main([str(a) for a in (*argv, "--output-dir", tmp_path / "run")])
        return (tmp_path / "run" / "lora.safetensors").read_bytes() if code == 0 else code

    return call


def test_the_loop_writes_the_same_file(run, capsys):
    plain, narrow = run(), run("--quantize", "int8")
    assert plain != narrow
    assert run("--stream") == plain
    assert "read, " in capsys.readouterr().out
    assert run("--gradient-checkpointing") == plain
    assert run("--stream", "--quantize", "int8") == narrow


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--full --quantize int8", "--full trains all weights, so it excludes --quantize"),
        ("--full --stream", "--full trains all weights, so it excludes --stream; leave one of the two out"),
        ("--full --stream --quantize nf4", "so it excludes --quantize and --stream"),
        ("--shard --stream", "--shard spreads the weights themselves, so it excludes --stream"),
        ("--shard --quantize nf4", "--shard spreads the weights themselves, so it excludes --quantize"),
    ],
)
def test_flags_that_do_not_go_together(run, flags, message, capsys):
    assert run(*flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------- GPU


def test_page_locked_memory_has_pages_of_its_own_and_is_unlocked(monkeypatch):
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda start, size, flags: calls.append((start, size)) or 2 * (size == 13),
        cudaHostUnregister=lambda start: calls.append(start),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    a, b = stream._page_locked(1000), stream._page_locked(1000)
    assert a.fill_(1).sum() + b.fill_(2).sum() == 3000
    assert calls == [(a.data_ptr(), 1000), (b.data_ptr(), 1000)]
    assert a.data_ptr() % os.sysconf("SC_PAGE_SIZE") == b.data_ptr() % os.sysconf("SC_PAGE_SIZE") == 0
    del a
    assert calls[-1] == calls[0][0]
    with pytest.raises(ValueError, match="can't be locked for the GPU"):
        stream._page_locked(13)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", [None, *QUANTIZED])
def test_on_a_gpu_as_without_streaming(tmp_path, kind, kept):
    """Copies on a stream of their own, from page-locked memory or from the file: the numbers of the resident model."""
    file, args = write(tmp_path, "bfl"), [a.cuda() for a in ARGS]
    args = [a.bfloat16() if i in (0, 2, 5) else a for i, a in enumerate(args)]

    def losses(flux):
        params = [p for p in flux.parameters() if p.requires_grad]
        found = []
        for _ in range(3):
            loss = flux(*args).float().square().mean()
            found += [loss.detach(), *torch.autograd.grad(loss, params)]
        return found

    load = partial(load_quantized, kind=kind) if kind else load_flux
    flux = with_lora(load(file, dtype=torch.bfloat16, device="cuda"))
    checkpoint_blocks(flux, "all")
    plain = losses(flux)
    flux, stream = load_streamed("transformer", file, torch.bfloat16, "cuda", kind, tmp_path / "cache")
    if not kept:
        stream.kept, stream.staging = None, torch.empty(max(stream.sizes), dtype=torch.uint8).pin_memory()
    with_lora(flux)
    stream.wrap()
    checkpoint_blocks(flux, "all")
    for a, b in zip(losses(flux), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)  # kernels may add in another order


@pytest.mark.gpu
def test_copies_run_beside_the_computation(tmp_path):
    """With blocks that compute longer than they travel, a streamed pass takes less than both one after the other."""
    params = FluxParams(depth=0, depth_single_blocks=6, hidden_size=3072)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Flux(params).state_dict().items()}
    file = tmp_path / "f.safetensors"
    save_file({n: torch.full(s, 1e-3, dtype=torch.bfloat16) for n, s in shapes.items()}, file)
    b, device = torch.bfloat16, "cuda"
    img, txt, y = torch.randn(1, 8192, 64), torch.randn(1, 512, 4096), torch.randn(1, 768)
    ids, one = torch.zeros(1, 8192, 3), torch.ones(1)
    args = (img.to(device, b), ids.cuda(), txt.to(device, b), ids[:, :512].cuda(), one.cuda(), y.cuda(), one.cuda())

    def seconds(model):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.no_grad():
            model(*args)
            torch.cuda.synchronize()
            start.record()
            for _ in range(3):
                model(*args)
            end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 3000

    resident = seconds(load_flux(file, params=params, dtype=b, device=device))
    flux, stream = load_streamed("transformer", file, b, device, params=params)
    stream.wrap()
    streamed = seconds(flux)
    host, there = torch.empty(sum(stream.sizes), dtype=torch.uint8).pin_memory(), torch.empty(1)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    there = host.cuda()
    end.record()
    torch.cuda.synchronize()
    copying = start.elapsed_time(end) / 1000
    assert there.numel() == host.numel()
    assert streamed < 0.9 * (resident + copying)
