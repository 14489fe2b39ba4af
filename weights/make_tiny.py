"""Makes weights/tiny: the official architectures in the official files, small enough for a repository and a CPU.

    python weights/make_tiny.py --stage vocabulary                        two tokenizers, 1024 and 640 entries
    python weights/make_tiny.py --stage text                              CLIP and T5: fixed random weights
    python weights/make_tiny.py --stage photographs --photos DIR          DIR -> WORK/training and WORK/kept-out
    python weights/make_tiny.py --stage autoencoder                       computed from WORK/training
    python weights/make_tiny.py --stage measure                           its PSNR on WORK/kept-out
    python weights/make_tiny.py --stage transformer                       random start, which train.py --full trains
    python weights/make_tiny.py --stage pairs                             WORK/pairs: crops, degraded, their prompts
    python weights/make_tiny.py --stage base --trained RUN/transformer    what train.py --full made of them, in bfloat16

Every random number is a function of --seed, its purpose and a count. make_tiny_autoencoder.py explains the autoencoder;
results and credits are in tiny/README.md.
"""

import argparse
import json
import re
from collections import Counter
from io import BytesIO
from pathlib import Path

import make_tiny_autoencoder as ae
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from safetensors.torch import save
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from kontext_min import degrade
from kontext_min.checkpoints import AUTOENCODER_NAMES, find, load_autoencoder, load_flux, metadata
from kontext_min.clip import ClipParams, ClipTextEncoder, byte_characters, merge
from kontext_min.extras.saving import save_flux
from kontext_min.flux import Flux, FluxParams
from kontext_min.t5 import SENTINELS, T5Encoder, T5Params

TINY = Path(__file__).parent / "tiny"
CLIP_ENTRIES, T5_PIECES, T5_LENGTH = 1024, 540, 32
CLIP = ClipParams(CLIP_ENTRIES, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
T5 = T5Params(vocab_size=T5_PIECES + SENTINELS, d_model=96, d_kv=32, d_ff=192, num_layers=2, num_heads=3)
FLUX = FluxParams(
    in_channels=4 * ae.PARAMS.z_channels,
    out_channels=4 * ae.PARAMS.z_channels,
    vec_in_dim=64,
    context_in_dim=96,
    hidden_size=192,
    num_heads=6,
    depth=1,
    depth_single_blocks=6,
    axes_dim=(4, 14, 14),
)


# ------------------------------------------------------------------------------------------------------- the vocabulary

SLOTS = {
    "verb": (
        "restore remove repair fix clean sharpen deblur denoise dehaze brighten recover reduce enhance improve "
        "correct undo colorize upscale"
    ),
    "fault": (
        "noise blur grain haze fog rain snow dust scratches stains cracks creases tears artifacts blocks banding "
        "fading damage softness darkness compression jpeg motion defocus glare spots holes tint cast sepia pixels"
    ),
    "thing": (
        "photo photograph picture image portrait landscape scan print snapshot film negative postcard face scene sky"
    ),
    "kind": (
        "old low light high quality resolution clean sharp clear blurred blurry noisy dark bright faded damaged "
        "scratched torn compressed detailed natural vivid black white color colour original degraded small large "
        "real fine"
    ),
}
GENERAL = (
    "the a an of and to in is it this that with from for on at by as be are was not make made more less very all any "
    "no please keep change turn into out up down over under same new good bad best better add take give show look "
    "like but or if so than then also only without while after again always around back because before between both "
    "can could day each every find first form get hand home just know last leave life line little live long many may "
    "most move much must name never next number off often once one open order other our own page part people place "
    "play point right say see set should side some sound still story such tell thing think three through time "
    "together too try two until use want way well went what when where which who why will word work world would year "
    "you man woman child person animal dog cat bird horse tree flower grass leaf water sea lake river mountain hill "
    "house building garden forest beach city street road car boat bridge wall window door table food fruit glass wood "
    "stone metal paper cloth hair eye skin red green blue yellow orange purple brown grey pink sun moon star cloud "
    "night morning evening summer winter spring autumn text detail details texture edges contrast exposure balance "
    "tone tones colors colours shadows highlights focus resize crop background foreground camera lens grainy soft "
    "softer smooth sharper clearer brighter darker warmer cooler vintage historic ancient modern"
)
PATTERNS = (
    "restore this photograph",
    "restore the photo: remove {fault} and {fault}",
    "{verb} the {kind} {thing}",
    "remove the {fault} from the {thing}",
    "a {kind}, {kind} {thing}",
    "{verb} {fault}, {fault} and {fault}",
    "make the {thing} {kind} and {kind}",
    "turn this {kind} {thing} into a {kind} {thing} with {kind} details",
    "upscale this low resolution image and recover fine details",
    "{verb} this {thing}",
    "please {verb} the {kind} {thing}, keep the details",
)


def sentences(seed: int, count: int = 4000) -> list[str]:
    """The text that both tokenizers learn from: prompts of restoration, and lists of words in all their forms."""
    rng = np.random.default_rng([seed, 0])
    slots = {slot: words.split() for slot, words in SLOTS.items()}
    stems = [verb.removesuffix("e") for verb in slots["verb"]]
    forms = [f"{stem}{end}" for stem in stems for end in ("es", "ed", "ing")]
    forms += [f"{thing}s" for thing in slots["thing"]]
    words = [*forms, *GENERAL.split(), *(word for known in slots.values() for word in known)]
    text = []
    for i in range(count):
        prompt = PATTERNS[i % len(PATTERNS)]
        for slot, known in slots.items():
            while f"{{{slot}}}" in prompt:
                prompt = prompt.replace(f"{{{slot}}}", str(rng.choice(known)), 1)
        text += [prompt, f"{prompt.capitalize()}.", f"{', '.join(rng.choice(words, 5))}."]
    return text


def byte_pairs(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): `count` times, merge the most frequent pair of neighbours."""
    table = byte_characters()
    spelt = {word: [table[byte] for byte in word.encode()] for word in words}
    spelt = {word: [*tokens[:-1], f"{tokens[-1]}</w>"] for word, tokens in spelt.items()}
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, tokens in spelt.items():
            for pair in zip(tokens, tokens[1:], strict=False):
                pairs[pair] += words[word]
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        spelt = {word: merge(tokens, merges[-1]) for word, tokens in spelt.items()}
    return merges


def make_vocabulary(seed: int) -> None:
    """tokenizer/ and tokenizer_2/, in the official file formats."""
    text = sentences(seed)
    words = Counter(word.strip(",.:") for line in text for word in line.lower().split())
    letters = list(byte_characters().values())
    merges = byte_pairs(words, CLIP_ENTRIES - 2 * len(letters) - 2)
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges), start, end]
    folder = TINY / "tokenizer"
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    plain = {"lstrip": False, "rstrip": False, "single_word": False}
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    write_json(folder / "special_tokens_map.json", special)
    added = {
        str(len(tokens) - 2): plain | {"content": start, "normalized": True, "special": True},
        str(len(tokens) - 1): plain | {"content": end, "normalized": False, "special": True},
    }
    config = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    config |= special | {"added_tokens_decoder": added, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", config)

    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_PIECES,
        normalization_rule_name="nmt_nfkc",
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    folder = TINY / "tokenizer_2"
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special |= {"additional_special_tokens": [f"<extra_id_{k}>" for k in range(SENTINELS)]}
    write_json(folder / "special_tokens_map.json", special)
    config = {"extra_ids": SENTINELS, "legacy": True, "model_max_length": T5_LENGTH, "tokenizer_class": "T5Tokenizer"}
    write_json(folder / "tokenizer_config.json", config | special)
    (folder / "spiece.model").write_bytes(model.getvalue())


# ---------------------------------------------------------------------------------------------------- the text encoders


@torch.no_grad()
def make_text(seed: int) -> None:
    """CLIP and T5 with fixed random weights: a hash of the prompt, in which the words and their order count.

    Embeddings have deviation 1, matrices 1/sqrt(fan in), and the last norm of each network gives unit deviation. The
    gains below keep prompts apart: two that differ in one word of two ("remove noise", "remove blur") by about half a
    deviation in CLIP's vector, most others by 0.6 to 1.2.
    """
    gains = {
        "q_proj.weight": 2.0,  # attention that prefers some words
        "v_proj.weight": 3.0,  # and outweighs the embedding of the end token, which all prompts share
        "out_proj.weight": 3.0,
        "position_embedding.weight": 0.4,  # must not drown the words
        "SelfAttention.q.weight": 2 * T5.d_kv**-0.5,  # T5's attention does not divide by sqrt(d_kv)
    }
    random = torch.Generator().manual_seed(seed)
    clip, t5 = ClipTextEncoder(CLIP), T5Encoder(T5)
    for name, p in [*clip.named_parameters(), *t5.named_parameters()]:
        if p.ndim == 2:
            embedding = any(part in name for part in ("embedding", "shared", "attention_bias"))
            gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
            p.copy_(gain * (1.0 if embedding else p.shape[1] ** -0.5) * torch.randn(p.shape, generator=random))
        elif name.endswith("bias"):
            p.zero_()
    state = {f"text_model.{name}": p for name, p in clip.state_dict().items()}
    write_weights(TINY / "text_encoder" / "model.safetensors", state, torch.bfloat16)
    write_weights(TINY / "text_encoder_2" / "model.safetensors", t5.state_dict(), torch.bfloat16)

    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "bfloat16"}
    # As on the hub, bos 0, eos 2 and pad 1 are not this vocabulary's: on eos 2 transformers searches the highest id.
    config |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "attention_dropout": 0.0}
    config |= {"hidden_act": "quick_gelu", "projection_dim": CLIP.hidden_size, **vars(CLIP)}
    write_json(TINY / "text_encoder" / "config.json", config)
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "torch_dtype": "bfloat16", "dropout_rate": 0.0}
    config |= {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True, "use_cache": True}
    config |= {"is_encoder_decoder": True, "tie_word_embeddings": False, "decoder_start_token_id": 0}
    config |= {"eos_token_id": 1, "pad_token_id": 0, **vars(T5)}
    write_json(TINY / "text_encoder_2" / "config.json", config)


# ------------------------------------------------------------------------------------------------------ the autoencoder


def make_autoencoder(work: Path, seed: int) -> None:
    """vae/, with the two numbers that give the 16 strongest channels of a latent zero mean and unit deviation."""
    batches = list(ae.statistics_batches(work, seed))
    patches = [rearrange(x, "b c (h y) (w x) -> (b h w) (y x c)", y=4, x=4) for x in batches]
    model = ae.make(torch.cat(patches))
    with torch.no_grad():
        z = torch.cat([model.encode(batch)[:, :16].flatten() for batch in batches])
    shift, scale = round(z.mean().item(), 4), round(1 / z.std().item(), 4)
    state, levels = {}, len(ae.PARAMS.ch_mult)
    for name, p in model.state_dict().items():
        matrix = ".attn_1." in name and p.ndim == 4  # 1x1 convolutions here, linear layers in diffusers
        for theirs, ours in AUTOENCODER_NAMES.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"(?<=decoder\.up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)
        state[name] = p[..., 0, 0] if matrix else p
    # float32, as BFL's ae.safetensors: the pairs (a, -a) cancel, which does not forgive the rounding to bfloat16.
    write_weights(TINY / "vae" / "diffusion_pytorch_model.safetensors", state, torch.float32)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [ae.PARAMS.ch * multiple for multiple in ae.PARAMS.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": ae.PARAMS.in_channels,
        "latent_channels": ae.PARAMS.z_channels,
        "layers_per_block": ae.PARAMS.num_res_blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": ae.PARAMS.out_ch,
        "sample_size": 256,
        "scaling_factor": scale,
        "shift_factor": shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    write_json(TINY / "vae" / "config.json", config)


# ------------------------------------------------------------------------------------------------------ the transformer


@torch.no_grad()
def make_transformer(seed: int) -> None:
    """transformer/, scheduler/ and model_index.json. A start to train from, as DiT's adaLN-zero.

    Xavier, and zero where a zero makes each block the identity and the output zero.
    """
    random, model = torch.Generator().manual_seed(seed), Flux(FLUX)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            zero = any(part in name for part in ("_mod.", "modulation", "final_layer"))
            bound = 0.0 if zero else (6 / (p.shape[0] + p.shape[1])) ** 0.5
            p.copy_(bound * (2 * torch.rand(p.shape, generator=random) - 1))
        elif name.endswith("bias"):
            p.zero_()
    save_flux(model.to(torch.bfloat16), TINY / "transformer")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    scheduler |= {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    scheduler |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    write_json(TINY / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(TINY / "model_index.json", {"_class_name": "FluxKontextPipeline"} | parts)


# What the base learns: share of the pairs, degradation, its prompts, and what these prompts leave in the picture.
# Most pairs are blind: the prompt says little or too much about the damage. Light and absent damage is among them.
# Darkness and faded colors stay whatever the prompt says: light and color are what a LoRA may learn.
MIXTURE = (
    (22, "noise=0:0.15", "any", None),
    (2, "noise=0:0.15/grey", "any", None),
    (20, "noise=0.02:0.15,jpeg=25:95", "any", None),
    (14, "jpeg=15:95", "any", None),
    (8, "jpeg=75:98", "any", None),
    (12, "blur=0.3:2,noise=0:0.05@0.8,jpeg=50:95@0.7", "any", None),
    (6, "noise=0:0.02@0.5,jpeg=85:100@0.5", "any", None),
    (3, "blur=1.5,downsample=2,noise=0.05,jpeg=50", "guide", None),
    (6, "guide", "guide", None),
    (5, "denoise", "denoise", None),
    (4, "deblur", "deblur", None),
    (3, "super-resolution", "super-resolution", None),
    (3, "real-esrgan", "real-esrgan", None),
    (3, "noise=0.02:0.1,jpeg=70:95", "any", "underexpose=2:4/1000000/0"),
    (2, "blur=0.5:1.5,noise=0.02:0.08,jpeg=60:95", "any", "fade=0.5:0.75/0.15:0.3/0:0.6,sepia=0.3:1@0.8"),
)
ANY = {"guide": 0.35, "denoise": 0.25, "deblur": 0.1, "super-resolution": 0.08, "real-esrgan": 0.08}
ANY |= {"low-light": 0.1, "old-photo": 0.04}


def make_pairs(work: Path, seed: int, count: int, side: int, only: str | None) -> None:
    """WORK/pairs/clean, degraded: crops with a prompt beside them, for train.py --lr-root.

    A photograph is drawn by the root of its area, the place in it anywhere, the scale between 1/2 and 1, mirrored or
    not. `only`: one degradation with its own prompt instead of MIXTURE.
    """
    photos = [Image.fromarray(photo) for photo in ae.load_photos(work)]
    weights = np.sqrt([photo.width * photo.height for photo in photos])
    folder = work / (f"pairs-{only}" if only else "pairs")
    clean, degraded = folder / "clean", folder / "degraded"
    for where in (clean, degraded):
        where.mkdir(parents=True, exist_ok=True)
    mixture = ((1, only, only if only in degrade.PROMPTS else "guide", None),) if only else MIXTURE
    shares = np.array([row[0] for row in mixture]) / sum(row[0] for row in mixture)
    for k in range(count):
        rng = np.random.default_rng([seed, 2, k])
        photo = photos[rng.choice(len(photos), p=weights / weights.sum())]
        length = side * rng.uniform(1, min(2, photo.width / side, photo.height / side))
        x, y = (rng.uniform(0, whole - length) for whole in photo.size)
        crop = photo.resize((side, side), Image.Resampling.LANCZOS, box=(x, y, x + length, y + length))
        crop = ImageOps.mirror(crop) if rng.random() < 0.5 else crop
        _, damage, prompt, kept = mixture[rng.choice(len(mixture), p=shares)]
        if prompt == "any":
            prompt = rng.choice(list(ANY), p=list(ANY.values()))
        crop = degrade.parse(kept)(crop, rng) if kept else crop
        degrade.parse(damage)(crop, rng).save(degraded / f"{k:06d}.png", compress_level=1)
        crop.save(clean / f"{k:06d}.png", compress_level=1)
        (clean / f"{k:06d}.txt").write_text(degrade.PROMPTS[prompt], encoding="utf-8")


def take_base(trained: Path) -> None:
    """transformer/ from the folder that train.py --full wrote, with what it was trained for in the header."""
    save_flux(load_flux(trained, dtype=torch.bfloat16), TINY / "transformer", metadata(find(trained, "transformer")[0]))


# ------------------------------------------------------------------------------------------------------ files and flags


def write_json(path: Path, content: dict) -> None:
    """As the hub writes it: two spaces, sorted keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """One safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to(dtype).contiguous() for name, p in state.items()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("vocabulary", "text", "photographs", "autoencoder", "measure", "transformer", "pairs", "base")
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--photos", type=Path, help="folder of photographs, for the stage of that name")
    parser.add_argument("--trained", type=Path, help="folder of the trained transformer, for the stage base")
    parser.add_argument("--work", type=Path, default=Path("runs/make-tiny"), help="prepared photographs and states")
    parser.add_argument("--pairs", type=int, default=12_000, help="how many pairs the stage of that name makes")
    parser.add_argument("--side", type=int, default=96, help="of a pair's crops, in pixels")
    parser.add_argument("--degrade", help="pairs of this degradation alone, in WORK/pairs-DEGRADE, for a LoRA")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    match args.stage:
        case "vocabulary":
            make_vocabulary(args.seed)
        case "text":
            make_text(args.seed)
        case "photographs":
            ae.prepare(args.photos, args.work)
        case "autoencoder":
            make_autoencoder(args.work, args.seed)
        case "measure":
            ae.measure(load_autoencoder(TINY / "vae", dtype=torch.float32), args.work)
        case "transformer":
            make_transformer(args.seed)
        case "pairs":
            make_pairs(args.work, args.seed, args.pairs, args.side, args.degrade)
        case "base":
            take_base(args.trained)


if __name__ == "__main__":
    main()
