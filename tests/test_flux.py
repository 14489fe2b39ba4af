"""The transformer equals the official one: golden outputs of BFL's code, and diffusers live on random sizes.

Tolerance 2e-5: the two official implementations differ from each other by up to that much in float32. The golden files
were made on one CPU. On another kind exp() can give another last bit of a frequency of the time embedding, which moves
the embedding by up to angle * 2^-23; EXP says by how much it does here, 0 on CPUs like that one.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from safetensors.torch import load_file

from kontext_min.checkpoints import load_flux
from kontext_min.extras.last_block import skip_unread
from kontext_min.flow import token_ids
from kontext_min.flux import Flux, FluxParams, QKNorm, RMSNorm, apply_rope, rope, timestep_embedding
from test_checkpoints import to_diffusers

GOLDEN = Path(__file__).parent / "golden"


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance, f"{(a - b).abs().max():.2e}"


UNITS = load_file(GOLDEN / "units.safetensors")
EXP = (timestep_embedding(UNITS["time.t"]) - UNITS["time.emb"]).abs().max().item()
EXP = 0.0 if EXP <= 1e-6 else EXP
NETWORK = 2e-5 + 2 * EXP  # of golden outputs


@pytest.fixture(scope="module")
def golden():
    return load_flux(GOLDEN / "flux_tiny.bfl.safetensors"), load_file(GOLDEN / "flux_tiny.io.safetensors")


def inputs(io: dict, context: bool) -> tuple:
    img, ids = io["img"], io["img_ids"]
    if context:
        img, ids = torch.cat([img, io["ctx"]], 1), torch.cat([ids, io["ctx_ids"]], 1)
    return img, ids, io["txt"], io["txt_ids"], io["timesteps"], io["y"], io["guidance"]


def test_golden_output_and_every_intermediate(golden):
    flux, io = golden
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            if isinstance(output, tuple):
                seen[f"{name}.img"], seen[f"{name}.txt"] = output
            else:
                seen[name] = output

        return hook

    modules = {n: getattr(flux, n) for n in ("time_in", "guidance_in", "vector_in", "img_in", "txt_in")}
    modules |= {f"double{i}": b for i, b in enumerate(flux.double_blocks)}
    modules |= {f"single{i}": b for i, b in enumerate(flux.single_blocks)}
    hooks = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    hooks.append(flux.double_blocks[0].register_forward_hook(lambda m, args, out: seen.update(vec=args[2], pe=args[3])))
    out = flux(*inputs(io, context=True))
    for hook in hooks:
        hook.remove()
    close(out, io["out_img_ctx"], NETWORK)
    close(out[:, : io["img"].shape[1]], io["out_kontext_slice"], NETWORK)
    names = [k.removeprefix("mid.") for k in io if k.startswith("mid.")]
    assert len(names) == 13
    for name in names:
        close(seen[name], io[f"mid.{name}"], NETWORK)


def test_golden_without_context(golden):
    flux, io = golden
    close(flux(*inputs(io, context=False)), io["out_img_only"], NETWORK)


def test_golden_units():
    units = UNITS
    pe = rope(units["rope.ids"][None], (16, 56, 56), 10_000)
    assert pe[..., 0].is_contiguous()  # else apply_rope copies it, and autograd keeps the copies
    close(pe[0, 0], units["rope.bfl_pe"], 1e-5)  # BFL's angles are float32: off by up to 4.5e-6 below position 98
    close(pe[0, 0, ..., 0, 0].repeat_interleave(2, -1), units["rope.diffusers_cos"], 1e-7)  # float64 there, as here
    close(pe[0, 0, ..., 1, 0].repeat_interleave(2, -1), units["rope.diffusers_sin"], 1e-7)
    close(apply_rope(units["rope.q"], pe), units["rope.q_out"], 2e-5)
    for name, golden in (("time.t", "time.emb"), ("time.guidance", "time.guidance_emb")):
        tolerance = 1e-6 + (1000 * units[name] * 2**-23 if EXP else 0)  # a row
        assert ((timestep_embedding(units[name]) - units[golden]).abs().amax(1) <= tolerance).all(), name
        official = get_timestep_embedding(1000 * units[name], 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        close(timestep_embedding(units[name]), official, 1e-6)  # on the same CPU


SIZES = [  # hidden, heads, axes, double, single, txt dim, vec dim, guidance, mlp_ratio
    (48, 2, (4, 10, 10), 1, 2, 20, 12, True, 4.0),
    (64, 2, (4, 14, 14), 2, 1, 24, 16, False, 4.0),
    (192, 6, (4, 14, 14), 1, 1, 32, 16, True, 4.0),
    (128, 1, (16, 56, 56), 1, 1, 8, 8, True, 4.0),
    (48, 2, (4, 10, 10), 1, 2, 20, 12, True, 2.5),
]


def random_pair(hidden, heads, axes, double, single, txt_dim, vec_dim, guidance, mlp_ratio=4.0):
    torch.manual_seed(hidden + heads)
    params = FluxParams(
        in_channels=16, out_channels=16, vec_in_dim=vec_dim, context_in_dim=txt_dim, hidden_size=hidden,
        num_heads=heads, depth=double, depth_single_blocks=single, axes_dim=axes, guidance_embed=guidance,
        mlp_ratio=mlp_ratio,
    )  # fmt: skip
    ours = Flux(params).requires_grad_(False)
    for name, p in ours.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if name.endswith("scale"):
            p += 1
    theirs = FluxTransformer2DModel(
        in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=hidden // heads,
        num_attention_heads=heads, joint_attention_dim=txt_dim, pooled_projection_dim=vec_dim,
        guidance_embeds=guidance, axes_dims_rope=axes,
    )  # fmt: skip
    if mlp_ratio != 4:  # the model has no such argument, its blocks have
        for block in theirs.transformer_blocks:
            block.ff = FeedForward(hidden, hidden, mult=mlp_ratio, activation_fn="gelu-approximate")
            block.ff_context = FeedForward(hidden, hidden, mult=mlp_ratio, activation_fn="gelu-approximate")
        theirs.single_transformer_blocks = torch.nn.ModuleList(
            FluxSingleTransformerBlock(hidden, heads, hidden // heads, mlp_ratio=mlp_ratio) for _ in range(single)
        )
    theirs.load_state_dict(to_diffusers(ours), strict=True)
    return ours, theirs.requires_grad_(False)


@pytest.mark.parametrize("size", SIZES)
def test_live_parity_with_diffusers(size):
    """Batch 2 with two timesteps, picture and reference tokens of different shapes."""
    ours, theirs = random_pair(*size)
    b, rows, columns = 2, 3, 5
    txt_dim, vec_dim, guidance = size[5:8]
    img = torch.randn(b, rows * columns + 4, 16)
    ids = torch.tensor(
        [[0, r, c] for r in range(rows) for c in range(columns)] + [[1, r, c] for r in (0, 1) for c in (0, 1)]
    )
    txt, y, t, g = (
        torch.randn(b, 7, txt_dim),
        torch.randn(b, vec_dim),
        torch.tensor([0.13, 0.87]),
        torch.tensor([1.0, 3.5]),
    )
    txt_ids = torch.zeros(7, 3)
    expected = theirs(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, img_ids=ids.float(),
        txt_ids=txt_ids, guidance=g if guidance else None, return_dict=False,
    )[0]  # fmt: skip
    ids, txt_ids = ids.float().expand(b, -1, -1), txt_ids.expand(b, -1, -1)
    got = ours(img, ids, txt, txt_ids, t, y, g if guidance else None)
    close(got, expected)
    for i in range(b):  # a batch is its pictures one by one
        one = ours(*(x[i : i + 1] for x in (img, ids, txt, txt_ids, t, y)), g[i : i + 1] if guidance else None)
        close(one, got[i : i + 1])


def test_mlp_ratio_and_missing_guidance():
    params = FluxParams(
        in_channels=16, out_channels=8, vec_in_dim=4, context_in_dim=4, hidden_size=24, num_heads=1, depth=1,
        depth_single_blocks=1, axes_dim=(4, 10, 10), mlp_ratio=2.5,
    )  # fmt: skip
    flux = Flux(params)
    assert flux.double_blocks[0].img_mlp[0].out_features == 60
    assert flux.single_blocks[0].linear1.out_features == 3 * 24 + 60
    x = torch.randn(1, 4, 16)
    args = x, torch.zeros(1, 4, 3), torch.randn(1, 3, 4), torch.zeros(1, 3, 3), torch.tensor([0.5]), torch.randn(1, 4)
    assert flux(*args, torch.tensor([2.5])).shape == (1, 4, 8)
    with pytest.raises(ValueError, match="distilled with guidance"):
        flux(*args)
    with pytest.raises(ValueError, match="does not fit axes_dim"):
        FluxParams(hidden_size=100, num_heads=3)


@pytest.mark.parametrize("damage", ["halves", "qkv", "qk-norm"])
def test_wrong_orders_are_seen(golden, damage):
    """Swapped halves of the last layer and a wrong order of q, k, v give another output: parity would catch them."""
    _, io = golden
    flux = load_flux(GOLDEN / "flux_tiny.bfl.safetensors")
    d = flux.params.hidden_size
    if damage == "halves":
        weight = flux.final_layer.adaLN_modulation[1].weight
        weight.data = torch.cat([weight[d:], weight[:d]])
    elif damage == "qkv":
        weight = flux.double_blocks[0].img_attn.qkv.weight
        weight.data = torch.cat([weight[:d], weight[2 * d :], weight[d : 2 * d]])
    else:
        norm = flux.single_blocks[0].norm
        norm.query_norm, norm.key_norm = norm.key_norm, norm.query_norm
    out = flux(*inputs(io, context=True))
    assert (out - io["out_img_ctx"]).abs().max() > (1e-3 if damage != "qk-norm" else 1e-4)


def test_golden_config_is_the_one_of_the_file(golden):
    flux, _ = golden
    expected = json.loads((GOLDEN / "flux_tiny.json").read_text())["bfl"]
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in vars(flux.params).items()} == expected


# ------------------------------------------------------------------------------------------- where bfloat16 is rounded


def bfl_rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """layers.py RMSNorm, word for word."""
    x_dtype = x.dtype
    x = x.float()
    rrms = torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6)
    return (x * rrms).to(dtype=x_dtype) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])  # at 1e-3 the eps weighs as much as the squares
def test_norm_of_q_and_k_rounds_before_it_multiplies(dtype, size):
    """In bfloat16 bit for bit; in float32 to 1e-6, as the mean may be summed in another order."""
    units = load_file(GOLDEN / "units.safetensors")
    norm = RMSNorm(8)
    norm.scale.data = units["rms.scale"].clone()
    close(norm(units["rms.x"]), units["rms.out"], 1e-6)
    norm.to(dtype).requires_grad_(False)
    x = (size * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = bfl_rms_norm(x, norm.scale)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=0)
    late = (bfl_rms_norm(x.float(), norm.scale.float())).to(dtype)  # multiplied first: what a mistake would give
    assert torch.equal(late, expected) == (dtype == torch.float32)


def test_scales_in_float32_leave_q_and_k_in_the_dtype_of_v():
    x = torch.randn(1, 2, 5, 8).bfloat16()
    q, k = QKNorm(8)(x, x, x)
    assert q.dtype == k.dtype == torch.bfloat16


def test_rotation_is_float32_and_rounded_once():
    """All but a thousandth bit for bit: a product may be fused with a sum, which can tip a rounding by one bit."""
    units = load_file(GOLDEN / "units.safetensors")
    pe, q = rope(units["rope.ids"][None], (16, 56, 56), 10_000), units["rope.q"].bfloat16()
    assert pe.dtype == torch.float32
    pairs = q.float().reshape(*q.shape[:-1], -1, 1, 2)  # math.py apply_rope
    expected = (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(q.shape).bfloat16()
    got = apply_rope(q, pe)
    assert got.dtype == torch.bfloat16
    assert (got != expected).float().mean() <= 1e-3
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
    close(got.float(), units["rope.q_out"], 2**-6 * units["rope.q_out"].abs().max().item())
    ids = rope(torch.tensor([[[0.0, 301.0, 0.0]]]), (16, 56, 56), 10_000)  # 301 is not a number of bfloat16
    assert ids[0, 0, 0, 8, 0, 0] == pytest.approx(math.cos(301), abs=1e-6)


def test_sinusoid_in_bfloat16_is_the_official_one():
    """What BFL's code makes of bfloat16 times and guidances: bit for bit, or as far off as EXP says and a rounding."""
    for t, golden in (("time.t_bf16_in", "time.emb_bf16"), ("time.guidance", "time.guidance_emb_bf16")):
        t, golden = UNITS[t].bfloat16(), UNITS[golden]
        embedding = timestep_embedding(t)
        assert embedding.dtype == torch.bfloat16
        tolerance = (1000 * t.float() * 2**-23 + 2**-8 if EXP else 0 * t.float())[:, None]
        assert ((embedding.float() - golden.float()).abs() <= tolerance).all()


def test_time_and_guidance_stay_float32_until_after_the_sinusoid():
    """Under a bfloat16 network too: bfloat16 rounds 1000 t to steps of 4."""
    flux, _ = random_pair(48, 2, (4, 10, 10), 1, 1, 20, 12, True)
    flux.bfloat16()
    seen = {}
    for name in ("time_in", "guidance_in"):
        flux.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    t, guidance = torch.tensor([0.7031, 0.9999]), torch.tensor([2.5, 1.7])
    img, txt, y = torch.randn(2, 4, 16).bfloat16(), torch.randn(2, 3, 20).bfloat16(), torch.randn(2, 12).bfloat16()
    out = flux(img, torch.zeros(2, 4, 3), txt, torch.zeros(2, 3, 3), t, y, guidance)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert torch.equal(seen["time_in"], timestep_embedding(t).bfloat16())
    assert torch.equal(seen["guidance_in"], timestep_embedding(guidance).bfloat16())
    assert not torch.equal(seen["time_in"], timestep_embedding(t.bfloat16()))


def test_the_last_block_without_what_is_not_read_is_exact():
    """Velocities of the generated tokens and gradients are those of the plain model, with and without a reference."""
    flux, narrow = (load_flux(GOLDEN / "flux_tiny.bfl.safetensors", dtype=torch.float32) for _ in range(2))
    skip_unread(narrow)
    g = torch.Generator().manual_seed(0)
    ids = torch.cat([token_ids(4, 6), token_ids(4, 6, 1)], dim=1).expand(2, -1, -1)
    for count in (6, 12):
        img = torch.randn(2, count, flux.params.in_channels, generator=g, requires_grad=True)
        txt = torch.randn(2, 5, flux.params.context_in_dim, generator=g)
        y = torch.randn(2, flux.params.vec_in_dim, generator=g)
        args = (ids[:, :count], txt, torch.zeros(2, 5, 3), torch.tensor([0.3, 0.8]), y, torch.tensor([1.5, 2.5]))
        out, ours = (model(img, *args)[:, :6] for model in (flux, narrow))
        assert (out - ours).abs().max() <= 1e-6 * out.abs().max()
        grads = [torch.autograd.grad(x.square().sum(), img)[0] for x in (out, ours)]
        assert (grads[0] - grads[1]).abs().max() <= 1e-6 * grads[0].abs().max()
