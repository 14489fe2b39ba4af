"""LoRA: what trains, what it computes, and that files carry it exactly; peft is the oracle."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kontext_min.extras.lora_files import load_lora, read_lora, save_lora, strength_of
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import LoRALinear, add_lora, lora_layers
from test_checkpoints import TINY, random_flux
from test_flux import random_pair

torch.manual_seed(0)
ARGS = (
    torch.randn(2, 12, 16), torch.rand(2, 12, 3).round(), torch.randn(2, 5, 20), torch.zeros(2, 5, 3),
    torch.tensor([0.2, 0.9]), torch.randn(2, 12), torch.tensor([1.0, 3.0]),
)  # fmt: skip


def randomise(params):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in params:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@torch.no_grad()
def merge_lora(model) -> None:
    """W <- W + (alpha / rank) B A, in float32, rounded once to the dtype of W; the plain Linears return in place."""
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        weight.copy_((weight.float() + layer.scale * layer.lora_B @ layer.lora_A).to(weight.dtype))
        model.set_submodule(name, layer.base)


def test_nothing_changes_at_the_start_and_only_the_lora_trains():
    flux = random_flux()
    before = flux(*ARGS)
    params = add_lora(flux, rank=4)
    assert (flux(*ARGS) - before).abs().max() <= 1e-5  # kernels may round another way for the other memory layout
    assert all(torch.count_nonzero(layer.lora_B) == 0 for layer in lora_layers(flux).values())
    trainable = {id(p) for p in flux.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in params}
    assert all(p.dtype == torch.float32 for p in params)
    names = list(lora_layers(flux))
    expected = [f"double_blocks.0.{s}_{m}" for s in ("img", "txt") for m in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    expected += [f"single_blocks.{i}.linear{j}" for i in range(TINY.depth_single_blocks) for j in (1, 2)]
    assert sorted(names) == sorted(expected)


def test_targets():
    assert not any("mlp" in n for n in lora_layers_of("attention"))
    everything = lora_layers_of("all")
    assert "img_in" in everything
    assert "double_blocks.0.img_mod.lin" in everything
    assert lora_layers_of(r"double_blocks\.0\.img_attn\.qkv") == ["double_blocks.0.img_attn.qkv"]
    with pytest.raises(ValueError, match="matches no Linear"):
        lora_layers_of("nothing")
    with pytest.raises(ValueError, match="'\\(' is no regular expression"):
        lora_layers_of("(")


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, None, "--rank: got 0, expected 1 to 144"),
        (145, None, "--rank: got 145, expected 1 to 144"),  # linear2 reads 48 + 2 * 48 numbers
        (4, 0.0, "LoRA alpha: got 0.0, expected a finite number that is not 0: nothing would be learned"),
        (4, float("nan"), "LoRA alpha: got nan"),
        (4, float("inf"), "LoRA alpha: got inf"),
    ],
)
def test_numbers_that_cannot_be_meant(rank, alpha, message):
    flux = random_flux()
    with pytest.raises(ValueError, match=message):
        add_lora(flux, rank, alpha, targets=r"single_blocks\.0\.linear2")
    assert not lora_layers(flux) and all(p.requires_grad for p in flux.parameters())  # refused before any change
    add_lora(flux, 144, -1.0, targets=r"single_blocks\.0\.linear2")


def lora_layers_of(targets: str) -> list[str]:
    flux = random_flux()
    add_lora(flux, 2, targets=targets)
    return list(lora_layers(flux))


def test_formula_and_base_dtype():
    base = torch.nn.Linear(6, 5).bfloat16()
    layer = LoRALinear(base, rank=3, alpha=6)
    randomise([layer.lora_A, layer.lora_B])
    x = torch.randn(4, 6).bfloat16()
    expected = base(x).float() + 2.0 * (x.float() @ layer.lora_A.T @ layer.lora_B.T)
    assert layer(x).dtype == torch.bfloat16
    assert torch.allclose(layer(x).float(), expected, atol=2e-2)  # one rounding to bfloat16


def test_gradient_under_a_bfloat16_base():
    """Against float64: 0.0127. With every product of the LoRA in float32 it is 0.0125: the base's rounding rules."""
    params = FluxParams(
        in_channels=16, out_channels=16, hidden_size=192, num_heads=6, depth=2, depth_single_blocks=4,
        context_in_dim=96, vec_in_dim=64, axes_dim=(4, 14, 14),
    )  # fmt: skip

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(0)
        flux = Flux(params).requires_grad_(False)
        for p in flux.parameters():
            if p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
        flux.bfloat16().to(dtype)
        trained = add_lora(flux, 16)
        torch.manual_seed(2)
        for layer in lora_layers(flux).values():
            torch.nn.init.normal_(layer.lora_B, std=0.02)
        if dtype == torch.float64:
            flux.double()
        g = torch.Generator().manual_seed(1)
        img, target, txt, y = (
            torch.randn(1, *shape, generator=g).bfloat16().to(dtype)
            for shape in ((256, 16), (256, 16), (64, 96), (64,))
        )
        ids = torch.tensor([[[0.0, r, c] for r in range(16) for c in range(16)]])
        out = flux(img, ids, txt, torch.zeros(1, 64, 3), torch.tensor([0.6]), y, torch.tensor([1.5]))
        assert out.dtype == dtype and all(p.dtype == torch.float32 or dtype == torch.float64 for p in trained)
        loss = (out.double() - target.double()).square().mean()
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, trained)])

    exact = gradient(torch.float64)
    error = ((gradient(torch.bfloat16) - exact).norm() / exact.norm()).item()
    print(f"relative error {error:.4f}")
    assert error <= 0.014


def test_merging_is_the_same_network():
    flux = random_flux()
    randomise(add_lora(flux, rank=4, alpha=8))
    expected = flux(*ARGS)
    merge_lora(flux)
    assert not lora_layers(flux)
    assert (flux(*ARGS) - expected).abs().max() <= 1e-4
    assert set(flux.state_dict()) == set(random_flux().state_dict())


def test_gradients_equal_pefts():
    """On layers that both have unsplit: same A and B, same loss, same gradients."""
    from peft import LoraConfig

    ours, theirs = random_pair(48, 2, (4, 10, 10), 1, 2, 20, 12, True)
    rank, alpha = 3, 6.0
    add_lora(ours, rank, alpha, targets=r"double_blocks\.\d+\.img_mlp\.[02]|single_blocks\.\d+\.linear2")
    theirs.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=r".*(\.ff\.net\.0\.proj|\.ff\.net\.2|single_transformer_blocks\.\d+\.proj_out)",
        )
    )
    names = {"img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "linear2": "proj_out"}
    pairs = []
    for name, layer in lora_layers(ours).items():
        block, _, rest = name.split(".", 1)[0], None, name.split(".", 2)[2]
        prefix = "transformer_blocks" if block == "double_blocks" else "single_transformer_blocks"
        module = theirs.get_submodule(f"{prefix}.{name.split('.')[1]}.{names[rest]}")
        randomise([layer.lora_A, layer.lora_B])
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(layer.lora_A)
            module.lora_B["default"].weight.copy_(layer.lora_B)
        pairs += [(layer.lora_A, module.lora_A["default"].weight), (layer.lora_B, module.lora_B["default"].weight)]
    assert len(pairs) == 8
    img, ids, txt, txt_ids, t, y, g = ARGS
    ids = ids[:1].expand(2, -1, -1)
    ours(img, ids, txt, txt_ids, t, y, g).square().mean().backward()
    theirs(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, img_ids=ids[0],
        txt_ids=txt_ids[0], guidance=g, return_dict=False,
    )[0].square().mean().backward()  # fmt: skip
    for mine, their in pairs:
        assert mine.grad.abs().max() > 0
        assert (mine.grad - their.grad).abs().max() <= 1e-5 * max(1.0, their.grad.abs().max().item())


def test_gradients_of_fused_layers_equal_pefts():
    """q, k, v (and the MLP's first half) are one matrix here and several there: there they share A, and their B's are
    the blocks of rows of ours; so the gradient of our A is the sum of theirs.
    """
    from peft import LoraConfig

    ours, theirs = random_pair(48, 2, (4, 10, 10), 1, 2, 20, 12, True)
    rank, alpha, hidden = 3, 6.0, 48
    add_lora(ours, rank, alpha, targets=r"double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1")
    parts = {"img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
             "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
             "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]}  # fmt: skip
    names = r".*\.(attn\.(to_[qkv]|add_[qkv]_proj)|proj_mlp)"
    theirs.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    randomise(p for layer in lora_layers(ours).values() for p in (layer.lora_A, layer.lora_B))
    pairs = []
    for name, layer in lora_layers(ours).items():
        kind, index, rest = name.split(".", 2)
        prefix = "transformer_blocks" if kind == "double_blocks" else "single_transformer_blocks"
        modules = [theirs.get_submodule(f"{prefix}.{index}.{part}") for part in parts[rest]]
        rows = layer.lora_B.split([hidden] * 3 + [4 * hidden] * (rest == "linear1"))
        with torch.no_grad():
            for module, block in zip(modules, rows, strict=True):
                module.lora_A["default"].weight.copy_(layer.lora_A)
                module.lora_B["default"].weight.copy_(block)
        pairs.append((layer, modules))
    assert len(pairs) == 4
    img, ids, txt, txt_ids, t, y, g = ARGS
    ids = ids[:1].expand(2, -1, -1)
    out = ours(img, ids, txt, txt_ids, t, y, g)
    expected = theirs(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, img_ids=ids[0],
        txt_ids=txt_ids[0], guidance=g, return_dict=False,
    )[0]  # fmt: skip
    assert (out - expected).abs().max() <= 2e-5
    out.square().mean().backward()
    expected.square().mean().backward()
    for layer, modules in pairs:
        grad_a = sum(m.lora_A["default"].weight.grad for m in modules)
        grad_b = torch.cat([m.lora_B["default"].weight.grad for m in modules])
        for mine, their in ((layer.lora_A.grad, grad_a), (layer.lora_B.grad, grad_b)):
            assert their.abs().max() > 1e-4
            assert (mine - their).abs().max() <= 1e-5 * max(1.0, their.abs().max().item())


# --------------------------------------------------------------------------------------------------------------- files


def test_round_trip_is_exact_and_keeps_metadata(tmp_path):
    flux = random_flux()
    randomise(add_lora(flux, rank=4, alpha=2))
    save_lora(flux, tmp_path / "a.safetensors", metadata={"kontext_min": "{}"})
    again = random_flux()
    metadata = load_lora(again, tmp_path / "a.safetensors")
    assert metadata["kontext_min"] == "{}"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2.0"
    assert torch.equal(again(*ARGS), flux(*ARGS))
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        key = "lora_unet_double_blocks_0_img_attn_qkv"
        assert f.get_tensor(f"{key}.lora_down.weight").shape == (4, 48)
        assert f.get_tensor(f"{key}.lora_up.weight").shape == (144, 4)
        assert f.get_tensor(f"{key}.alpha") == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]  # nothing left aside


def test_strength_scales_the_correction(tmp_path):
    flux = random_flux()
    randomise(add_lora(flux, rank=4))
    save_lora(flux, tmp_path / "a.safetensors")
    half = random_flux()
    load_lora(half, tmp_path / "a.safetensors", strength=0.5)
    for name, layer in lora_layers(half).items():
        assert layer.scale == 0.5 * lora_layers(flux)[name].scale
    assert strength_of("x/y.safetensors=0.8") == (strength_of("x/y.safetensors")[0], 0.8)
    assert strength_of("x/y.safetensors")[1] == 1.0


def test_diffusers_reads_our_file_at_the_same_strength(tmp_path):
    from diffusers import FluxPipeline

    ours, theirs = random_pair(48, 2, (4, 10, 10), 1, 2, 20, 12, True)
    # diffusers' kohya reader has the full size's rows of linear1 written into it, so that one is left out here
    targets = r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear2"
    randomise(add_lora(ours, rank=4, alpha=2, targets=targets))
    save_lora(ours, tmp_path / "a.safetensors")
    state, alphas = FluxPipeline.lora_state_dict(str(tmp_path / "a.safetensors"), return_alphas=True)
    theirs.load_lora_adapter(state, network_alphas=alphas, prefix="transformer")
    img, ids, txt, txt_ids, t, y, g = ARGS
    ids = ids[:1].expand(2, -1, -1)
    expected = theirs(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, img_ids=ids[0],
        txt_ids=txt_ids[0], guidance=g, return_dict=False,
    )[0]  # fmt: skip
    assert (ours(img, ids, txt, txt_ids, t, y, g) - expected).abs().max() <= 2e-5


def test_files_that_do_not_fit_are_refused_whole(tmp_path):
    flux = random_flux()
    randomise(add_lora(flux, rank=4))
    save_lora(flux, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    key = "lora_unet_double_blocks_0_img_attn_qkv"

    def refused(change: dict, match: str) -> None:
        save_file({**tensors, **change}, tmp_path / "b.safetensors")
        target = random_flux()
        with pytest.raises(ValueError, match=match):
            load_lora(target, tmp_path / "b.safetensors")
        assert not lora_layers(target)

    refused(
        {"lora_unet_input_blocks_1.lora_down.weight": torch.zeros(4, 4)},
        "1 of 37 tensors belong to no Linear of this model",
    )
    refused({f"{key}.lora_up.weight": torch.zeros(7, 4)}, "trained on another model")
    refused({f"{key}.diff": torch.zeros(7, 4)}, "differences of whole weights")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated"):
        read_lora(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no such LoRA file"):
        read_lora(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="expected one of kohya, peft"):
        save_lora(flux, tmp_path / "c.safetensors", format="lokr")
