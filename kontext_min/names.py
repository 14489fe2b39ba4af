"""What diffusers calls the modules of the Flux transformer and of the autoencoder.

Our attribute names are those of BFL's files, which need no map. The hub folders have diffusers' names: q, k, v (and the
first MLP matrix of single blocks) apart instead of in one matrix, the halves of the last modulation swapped, the levels
of the decoder counted the other way round, 1x1 convolutions stored as matrices. Nothing else differs.

Sources: black-forest-labs/flux 802fb47, src/flux/modules/layers.py and autoencoder.py; diffusers 0.42.1,
transformer_flux.py, normalization.py (AdaLayerNormContinuous), autoencoder_kl.py.
"""

from torch import Tensor

from kontext_min.autoencoder import AutoencoderParams
from kontext_min.flux import FluxParams

# Ours (BFL's) on the left; on the right diffusers', joined along the rows where there are several. `.weight` and
# `.bias` follow the module; the q/k norms are `.scale` here and `.weight` there.
FLUX_MODULES = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],  # and its halves swapped: see SWAPPED
}
DOUBLE_BLOCK_MODULES = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE_BLOCK_MODULES = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}
SWAPPED = "final_layer.adaLN_modulation.1"  # rows [shift, scale] in BFL's file, [scale, shift] in diffusers'


def flux_modules(params: FluxParams) -> dict[str, list[str]]:
    """Module names of a whole Flux: ours -> diffusers'."""
    table = dict(FLUX_MODULES)
    for prefix, theirs, count, modules in (
        ("double_blocks", "transformer_blocks", params.depth, DOUBLE_BLOCK_MODULES),
        ("single_blocks", "single_transformer_blocks", params.depth_single_blocks, SINGLE_BLOCK_MODULES),
    ):
        for i in range(count):
            table |= {f"{prefix}.{i}.{k}": [f"{theirs}.{i}.{name}" for name in v] for k, v in modules.items()}
    return table


def autoencoder_modules(params: AutoencoderParams) -> dict[str, list[str]]:
    """Module names of an autoencoder: ours -> diffusers'. Their decoder counts its levels the other way round."""
    table = {}
    levels = len(params.ch_mult)
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{n}": f"{half}.{n}" for n in ("conv_in", "conv_out")}
        table |= {
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.mid.attn_1.norm": f"{half}.mid_block.attentions.0.group_norm",
        }
        theirs = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        table |= {f"{half}.mid.attn_1.{k}": f"{half}.mid_block.attentions.0.{v}" for k, v in theirs.items()}
    blocks = {
        f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for half in ("encoder", "decoder") for i in (0, 1)
    }
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        blocks |= {f"encoder.down.{level}.block.{b}": f"{down}.resnets.{b}" for b in range(params.num_res_blocks)}
        blocks |= {f"decoder.up.{level}.block.{b}": f"{up}.resnets.{b}" for b in range(params.num_res_blocks + 1)}
        table[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    for ours, theirs in blocks.items():
        table |= {f"{ours}.{n}": f"{theirs}.{n}" for n in ("norm1", "conv1", "norm2", "conv2")}
        table[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"
    return {ours: [theirs] for ours, theirs in table.items()}


def split_rows(tensor: Tensor, parts: int, hidden: int) -> tuple[Tensor, ...]:
    """Rows of a fused weight or bias as diffusers' 1, 3 (q, k, v) or 4 (q, k, v, mlp) modules have them."""
    return tensor.split([hidden, hidden, hidden, len(tensor) - 3 * hidden][:parts] if parts > 1 else len(tensor))
