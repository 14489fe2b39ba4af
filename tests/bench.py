"""Time and memory of each part, as a ratio to the library that does the same: the table of docs/bench.md.

    python tests/bench.py                    the whole table, in markdown; `make bench` runs it
    python tests/bench.py transformer vae    only these parts

"Theirs" is diffusers with peft and transformers, "ours" is this project. Both run in one process with the same weights
and inputs, turn by turn; figures are medians of 5. Each part first compares the outputs (and gradients) of both sides.
With one thread the clock is the processor time of this process, so other work on the machine hardly counts. With
several threads it is the wall clock. Memory comes from one process per side: its highest resident size (VmHWM) minus
its resident size after the imports. It contains weights, activations and gradients that are alive at the same time.

The 82M network has width 768, 6 heads, 2 double and 4 single blocks, 512 text, 1024 picture and 1024 reference tokens.
Outputs are compared at the picture tokens.
"""

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

from kontext_min.flux import Flux, FluxParams  # noqa: E402

SIZES = {  # sizes of the network; number of text, picture and reference tokens
    "82M": (
        FluxParams(hidden_size=768, num_heads=6, depth=2, depth_single_blocks=4, context_in_dim=512, vec_in_dim=256),
        (512, 1024, 1024),
    ),
    "tiny": (
        FluxParams(
            hidden_size=192, num_heads=6, depth=1, depth_single_blocks=6, context_in_dim=96, vec_in_dim=64,
            axes_dim=(4, 14, 14),
        ),
        (64, 256, 256),
    ),
}  # fmt: skip


REPEATS = 5


def report(name: str, theirs: float | None, ours: float, unit: str, note: str = "") -> None:
    """One row of the table."""
    shown = f"{theirs:.4g} {unit} | {ours:.4g} {unit} | {ours / theirs:.2f}" if theirs else f" | {ours:.4g} {unit} | "
    print(f"| {name} | {shown} | {note} |", flush=True)


def heading(title: str) -> None:
    print(f"\n### {title}\n\n| what | theirs | ours | ratio | |\n|---|--:|--:|--:|---|", flush=True)


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def turns(*functions: Callable[[], object], repeats: int | None = None, least: float = 0.2) -> list[float]:
    """Median seconds of each function. They take turns; a fast one runs several times a turn."""
    began = clock()
    for f in functions:
        f()
    loops = max(1, round(least * len(functions) / max(clock() - began, 1e-6)))
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats or REPEATS):
        for f, taken in zip(functions, seconds, strict=True):
            gc.collect()
            began = clock()
            for _ in range(loops):
                f()
            taken.append((clock() - began) / loops)
    return [statistics.median(taken) for taken in seconds]


def same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Assert that both sides give the same numbers, to 1e-4 of the largest."""
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"the two sides differ by {error:.1e} of the largest number"


# --------------------------------------------------------------------------------------------------- the transformer


def inputs(size: str) -> tuple:
    """The seven inputs of Flux.forward, then the number of picture tokens."""
    from kontext_min.flow import token_ids

    (params, (text, image, reference)), generator = SIZES[size], torch.Generator().manual_seed(1)
    side = 2 * int(image**0.5)
    ids = torch.cat([token_ids(side, side), token_ids(side, side, 1)[:, :reference]], 1)
    return (
        torch.randn(1, image + reference, 64, generator=generator),
        ids,
        torch.randn(1, text, params.context_in_dim, generator=generator),
        torch.zeros(1, text, 3),
        torch.tensor([0.6]),
        torch.randn(1, params.vec_in_dim, generator=generator),
        torch.tensor([1.5]),
        image,
    )


def our_flux(size: str):
    from kontext_min.extras.last_block import skip_unread

    torch.manual_seed(0)
    flux = Flux(SIZES[size][0]).requires_grad_(False)
    for p in flux.parameters():
        if p.ndim == 2:
            p.normal_(std=p.shape[1] ** -0.5)
    skip_unread(flux)  # as both programs do
    return flux


def their_flux(size: str):
    from diffusers import FluxTransformer2DModel

    p = SIZES[size][0]
    return FluxTransformer2DModel(
        in_channels=64, num_layers=p.depth, num_single_layers=p.depth_single_blocks, num_attention_heads=p.num_heads,
        attention_head_dim=p.hidden_size // p.num_heads, joint_attention_dim=p.context_in_dim,
        pooled_projection_dim=p.vec_in_dim, guidance_embeds=True, axes_dims_rope=p.axes_dim,
    ).requires_grad_(False)  # fmt: skip


def our_lora(flux) -> None:
    from kontext_min.lora import add_lora, lora_layers

    add_lora(flux, rank=16)
    torch.manual_seed(2)
    for layer in lora_layers(flux).values():  # B starts at zero, and then no comparison sees A
        torch.nn.init.normal_(layer.lora_B, std=0.02)


def their_lora(theirs, names: list[str]) -> None:
    from peft import LoraConfig

    theirs.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=names))


def target_names(size: str) -> dict[str, list[str]]:
    """For each target of the LoRA: our module name -> the names of the diffusers modules that hold its rows."""
    from kontext_min.checkpoints import flux_modules
    from kontext_min.lora import TARGETS

    pattern = re.compile(TARGETS["attention-mlp"])
    return {ours: theirs for ours, theirs in flux_modules(SIZES[size][0]).items() if pattern.fullmatch(ours)}


def same_loras(size: str, ours, theirs) -> tuple[dict[str, list[str]], dict[str, torch.nn.Module]]:
    """Add LoRAs with the same numbers to both sides. Returns `target_names` and their modules by name."""
    names = target_names(size)
    our_lora(ours)
    their_lora(theirs, [n for them in names.values() for n in them])
    modules = dict(theirs.named_modules())
    for name, them in names.items():
        layer = ours.get_submodule(name)
        sizes = [modules[n].out_features for n in them]
        for n, b in zip(them, layer.lora_B.detach().split(sizes), strict=True):
            modules[n].lora_A["default"].weight.data.copy_(layer.lora_A)
            modules[n].lora_B["default"].weight.data.copy_(b)
    return names, modules


def their_call(model, x: tuple) -> torch.Tensor:
    img, ids, txt, txt_ids, t, y, guidance, generated = x
    return model(
        hidden_states=img, img_ids=ids[0], encoder_hidden_states=txt, txt_ids=txt_ids[0], timestep=t,
        pooled_projections=y, guidance=guidance, return_dict=False,
    )[0][:, :generated]  # fmt: skip


def our_call(model, x: tuple) -> torch.Tensor:
    return model(*x[:7])[:, : x[7]]


def forward(call, model, x: tuple) -> torch.Tensor:
    with torch.no_grad():
        return call(model, x)


def step(call, model, x: tuple) -> None:
    """Forward and backward pass, which fills the gradients of the LoRA."""
    model.zero_grad(set_to_none=True)
    F.mse_loss(call(model, x), x[0][:, : x[7]]).backward()


def memory(size: str, side: str, what: str) -> float:
    """Peak memory of one side in MB, measured in a new process."""
    # A freed buffer of over 100 kB goes back to the system, so the peak is what was alive, and repeats to 1 percent.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    out = subprocess.run(
        [sys.executable, __file__, "--child", size, side, what], capture_output=True, text=True, check=True, env=env
    )
    return float(out.stdout.splitlines()[-1])


def status(key: str) -> float:
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def child(size: str, side: str, what: str) -> None:
    """The process that `memory` starts."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    from kontext_min.extras.checkpointing import checkpoint_blocks

    (their_flux if side == "theirs" else our_flux)("tiny")  # imports everything that loads lazily
    gc.collect()
    before = status("VmRSS")
    if side == "theirs":
        call, model = their_call, their_flux(size)
        if what != "forward":
            their_lora(model, [n for names in target_names(size).values() for n in names])
        if what == "checkpointed":
            model.train().enable_gradient_checkpointing()
    else:
        call, model = our_call, our_flux(size)
        if what != "forward":
            our_lora(model)
        if what == "checkpointed":
            checkpoint_blocks(model, "all")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    (forward if what == "forward" else step)(call, model, inputs(size))
    print(status("VmHWM") - before)


def transformer(size: str) -> None:
    from kontext_min.extras.checkpointing import checkpoint_blocks
    from test_checkpoints import to_diffusers

    heading(f"transformer, {size}")
    ours, theirs, x = our_flux(size), their_flux(size), inputs(size)
    theirs.load_state_dict(to_diffusers(ours))
    same(forward(our_call, ours, x), forward(their_call, theirs, x))
    flops, taken = flop_count(lambda: forward(our_call, ours, x)), None
    taken = turns(lambda: forward(their_call, theirs, x), lambda: forward(our_call, ours, x))
    report("forward", *taken, "s", f"{flops / 1e9:.0f} GFLOP, {share(flops, taken[1])}")

    names, modules = same_loras(size, ours, theirs)
    for what in ("LoRA step", "LoRA step, checkpointed"):
        if what != "LoRA step":
            checkpoint_blocks(ours, "all")
            theirs.train().enable_gradient_checkpointing()
        flops = flop_count(lambda: step(our_call, ours, x))
        taken = turns(lambda: step(their_call, theirs, x), lambda: step(our_call, ours, x))
        for name, them in names.items():
            gradients = [modules[n].lora_B["default"].weight.grad for n in them]
            if gradients[0] is not None and any(g is not None and g.abs().max() > 0 for g in gradients):
                same(ours.get_submodule(name).lora_B.grad, torch.cat(gradients), 1e-3)
        report(what, *taken, "s", f"{flops / 1e9:.0f} GFLOP, {share(flops, taken[1])}")
    for what in ("forward", "step", "checkpointed"):
        report(f"peak memory, {what}", *(memory(size, side, what) for side in ("theirs", "ours")), "MB")


def flop_count(f: Callable[[], object]) -> int:
    from kontext_min.extras.plan import Tally

    with Tally() as tally:
        f()
    return round(sum(s.flops for s in tally.segments.values()))


PEAK: list[float] = []


def share(flops: int, seconds: float) -> str:
    """Speed beside the matmul peak of this machine."""
    if not PEAK:
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        PEAK.append(2 * 2048**3 / turns(lambda: a @ b)[0])
    return f"{flops / seconds / 1e9:.0f} of {PEAK[0] / 1e9:.0f} GFLOP/s"


def copy_autoencoder(ours, theirs) -> None:
    from kontext_min.checkpoints import autoencoder_name

    for name, p in theirs.state_dict().items():
        mine = ours.get_parameter(autoencoder_name(name, len(ours.params.ch_mult)))
        mine.copy_(p.reshape(mine.shape))


@torch.no_grad()
def autoencoder() -> None:
    """The official autoencoder, 84 million parameters, on 256x256 pixels."""
    from diffusers import AutoencoderKL

    from kontext_min.autoencoder import Autoencoder, AutoencoderParams

    heading("autoencoder, 256x256")
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2,
        block_out_channels=[128, 256, 512, 512], latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
    ).requires_grad_(False)  # fmt: skip
    ours = Autoencoder(AutoencoderParams(scale_factor=1.0, shift_factor=0.0)).requires_grad_(False)
    copy_autoencoder(ours, theirs)
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    z = ours.encode(image)
    same(z, theirs.encode(image).latent_dist.mode())
    same(ours.decode(z), theirs.decode(z).sample)
    for name, pair in (
        ("encode", (lambda: theirs.encode(image), lambda: ours.encode(image))),
        ("decode", (lambda: theirs.decode(z), lambda: ours.decode(z))),
    ):
        flops, taken = flop_count(pair[1]), turns(*pair)
        report(name, *taken, "s", f"{flops / 1e9:.0f} GFLOP, {share(flops, taken[1])}")


@torch.no_grad()
def text() -> None:
    """CLIP-L in full size, and a T5 of width 1024 with 4 layers on 512 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from kontext_min.clip import ClipParams, ClipTextEncoder
    from kontext_min.t5 import T5Encoder, T5Params

    heading("text encoders")
    torch.manual_seed(0)
    theirs = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)).eval()
    ours = ClipTextEncoder(ClipParams())
    ours.load_state_dict({k.removeprefix("text_model."): v for k, v in theirs.state_dict().items()}, strict=False)
    ids = torch.randint(3, 49000, (1, 77))
    ids[0, 60:] = 49407
    same(ours(ids)[0], theirs(ids).last_hidden_state)
    report("CLIP-L, 77 tokens", *turns(lambda: theirs(ids), lambda: ours(ids)), "s")
    sizes = {"vocab_size": 1000, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 4, "num_heads": 16}
    theirs = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    ours = T5Encoder(T5Params(**sizes))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    ids = torch.randint(0, 1000, (1, 512))
    same(ours(ids), theirs(ids).last_hidden_state)
    report("T5, 4 layers of 1024, 512 tokens", *turns(lambda: theirs(ids), lambda: ours(ids)), "s")


def loading() -> None:
    """Load the 82M network in float32 from the hub layout, without and with reading every weight once."""
    import tempfile

    from diffusers import FluxTransformer2DModel

    from kontext_min.checkpoints import load_flux
    from kontext_min.extras.saving import save_flux

    heading("loading, 82M in float32")
    with tempfile.TemporaryDirectory() as folder:
        save_flux(our_flux("82M"), folder)

        def read(model) -> float:
            with torch.no_grad():
                return sum(p.sum().item() for p in model.parameters())

        pair = lambda: FluxTransformer2DModel.from_pretrained(folder), lambda: load_flux(folder)
        report("load", *turns(*pair), "s")
        report("load and read", *turns(lambda: read(pair[0]()), lambda: read(pair[1]())), "s")


@torch.no_grad()
def restoration() -> None:
    """A whole Kontext edit on weights/tiny, text encoders included: 4 steps on 256x256 pixels."""
    from diffusers import FluxKontextPipeline
    from PIL import Image

    from kontext_min import checkpoints, flow
    from kontext_min.data import to_float, to_tensor
    from kontext_min.extras import base, prompts
    from kontext_min.restore import restore, to_image

    heading("a whole restoration on weights/tiny, 256x256, 4 steps")
    folder, prompt = ROOT / "weights" / "tiny", "Restore this photo."
    pipe = FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    weights = base.Weights(folder)
    ae, flux = (load(folder, dtype=torch.float32) for load in (checkpoints.load_autoencoder, checkpoints.load_flux))
    image = Image.open(TESTS / "photos" / "bowl.jpg").convert("RGB").resize((256, 256))
    noise = torch.randn(1, ae.params.z_channels, 256 // ae.factor, 256 // ae.factor)

    def theirs():
        return pipe(
            image=image, prompt=prompt, height=256, width=256, max_area=256 * 256, _auto_resize=False,
            num_inference_steps=4, guidance_scale=2.5, latents=flow.pack(noise),
            max_sequence_length=prompts.max_length(weights),
        ).images[0]  # fmt: skip

    def ours():
        encoded = prompts.encode([prompt], weights, None, torch.float32, "cpu")
        p = prompts.batch(encoded, [prompt], 2.5, torch.float32, "cpu")
        return to_image(restore(to_tensor(image)[None], flux, ae, p, flow.Objective("kontext"), 4, noise=noise)[0])

    same(to_float(to_tensor(ours())), to_float(to_tensor(theirs())), 0.01)  # one level of 255
    report("prompt, encode, 4 steps, decode", *turns(theirs, ours), "s", "ours loads both text encoders each time")


def compiled() -> None:
    """The tiny network, compiled block by block on both sides. One graph of ours serves any number of tokens."""
    from kontext_min.extras.compiling import compile_blocks
    from test_checkpoints import to_diffusers

    heading("compiled, tiny")
    ours, theirs, x = our_flux("tiny"), their_flux("tiny"), inputs("tiny")
    theirs.load_state_dict(to_diffusers(ours))
    plain = turns(lambda: forward(their_call, theirs, x), lambda: forward(our_call, ours, x))
    theirs.compile_repeated_blocks(fullgraph=True)
    compile_blocks(ours)
    same(forward(our_call, ours, x), forward(their_call, theirs, x))
    taken = turns(lambda: forward(their_call, theirs, x), lambda: forward(our_call, ours, x))
    gains = " and ".join(f"{c / p:.2f}" for c, p in zip(taken, plain, strict=True))
    report("forward", *taken, "s", f"of their time without: {gains}")


def growth() -> None:
    """Time of our forward pass for several numbers of tokens, beside its arithmetic."""
    heading("tokens and time, 82M, ours")
    ours, (img, ids, *rest) = our_flux("82M"), inputs("82M")
    for tokens in (256, 1024, 2048):
        x = (img[:, :tokens], ids[:, :tokens], *rest[:-1], tokens)
        flops = flop_count(lambda x=x: forward(our_call, ours, x))
        taken = turns(lambda x=x: forward(our_call, ours, x))[0]
        report(f"512 + {tokens} tokens", None, taken, "s", f"{flops / 1e9:.0f} GFLOP, {share(flops, taken)}")


PARTS: dict[str, Callable[[], None]] = {
    "transformer": lambda: transformer("82M"),
    "tiny": lambda: transformer("tiny"),
    "vae": autoencoder,
    "text": text,
    "loading": loading,
    "restoration": restoration,
    "compiled": compiled,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"parts to run: {', '.join(PARTS)}; default: all")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each side (default: %(default)s)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    globals()["REPEATS"] = arguments.repeats
    if arguments.child:
        child(*arguments.child)
        return
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load} before the start")
    for part in arguments.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
