"""Read and write LoRA files under the names that other trainers use, and put their LoRA on a model.

In memory, a LoRA is a table: our module name (BFL's) -> Factors, the correction (alpha / rank) * up @ down. Files
differ in three things: a prefix, BFL's or diffusers' module names, and the names of the two matrices.

| written by | module names | example: the image stream's q in the first block |
|---|---|---|
| kohya (sd-scripts, musubi) | BFL, underscores | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` |
| ComfyUI, SimpleTuner | BFL | `diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`, or `.lora_A.weight` |
| fal; bare | BFL | `base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight`; no prefix |
| xlabs | its own | `double_blocks.0.processor.qkv_lora1.down.weight` (no alpha; no MLP rows in single blocks) |
| peft, diffusers, ai-toolkit | diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`; no prefix |
| peft's save_pretrained | diffusers | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` |
| OneTrainer | diffusers, underscores | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
| mixed forms | diffusers | the same with `lora_unet_`; `diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight` |

BFL's qkv (rows q, k, v) and linear1 (rows q, k, v, mlp) are several modules in diffusers' names. To split one, each
part takes its rows of up and all of down. To join parts that share one down, stack their rows; if they do not share it,

    down = [down_q; down_k; down_v]        up = diag(up_q, up_k, up_v)        rank = sum of the ranks

which is exactly the same correction. The halves of the last modulation are swapped between the two namings (SWAPPED).

Two formats are written, because ComfyUI and diffusers read both at the strength that was trained:

* `kohya`: A, B and alpha as trained, and the smaller file, since q, k, v and mlp share one A. diffusers drops modules
  outside of the blocks from it (`--lora-targets all`), and knows linear1 at the official width only.
* `peft`: q, k, v and mlp apart, alpha / rank multiplied into B.

Sources: kohya-ss/sd-scripts 48d368f, networks/lora_flux.py, convert_flux_lora.py, library/sai_model_spec.py; ComfyUI
(October 2025), comfy/lora.py `model_lora_keys_unet`, comfy/utils.py `flux_to_diffusers`; diffusers 0.42.1,
loaders/lora_pipeline.py and lora_conversion_utils.py; peft 0.21.2, tuners/lora/config.py; XLabs-AI/x-flux 4749542.
"""

import filecmp
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext_min.checkpoints import SWAPPED, flux_modules, read_headers
from kontext_min.data import as_text
from kontext_min.extras.flags import TINY
from kontext_min.extras.saving import checksum, save_file, split_rows
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import LoRALinear, linears, lora_layers

FORMATS = ("kohya", "peft")  # that are written
BRIDGE = (
    "a bridge LoRA starts from the latent of the degraded picture, not from noise: sample.py of kontext_min does so; "
    "diffusers does with docs/diffusers_bridge.py, ComfyUI with the node in docs/comfyui"
)
Sizes = Mapping[str, tuple[int, int]]  # module -> (out, in)


class Factors(NamedTuple):
    """The correction of one Linear: scale * up @ down."""

    down: Tensor  # A (rank, in)
    up: Tensor  # B (out, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor of up @ down."""
        return self.alpha / self.rank


class Place(NamedTuple):
    """Where an entry of a file belongs: parts first..last-1 of a module of ours."""

    module: str
    first: int
    last: int
    parts: int  # of the module in diffusers' names: 1, 3 (q, k, v) or 4 (q, k, v, mlp)
    path: str  # the module's name in the file's own scheme, which peft's alpha patterns match


# --------------------------------------------------------------------------------------------------- names in the files

XLABS = {  # ours: (suffix in xlabs' names, parts that it covers)
    "img_attn.qkv": ("qkv_lora1", 3),
    "txt_attn.qkv": ("qkv_lora2", 3),
    "img_attn.proj": ("proj_lora1", 1),
    "txt_attn.proj": ("proj_lora2", 1),
    "linear1": ("qkv_lora", 3),
    "linear2": ("proj_lora", 1),
}
LEAVES = {
    "down": ("lora_A.weight", "lora_down.weight", "lora_A.default.weight", "lora.down.weight", "down.weight"),
    "up": ("lora_B.weight", "lora_up.weight", "lora_B.default.weight", "lora.up.weight", "up.weight"),
    "alpha": ("alpha",),
}
LEAF_OF = {leaf: kind for kind, leaves in LEAVES.items() for leaf in leaves}
# Lazy, so that the longest leaf wins; some files have an underscore before the dot.
SPLIT = re.compile(rf"(.+?)_?\.({'|'.join(map(re.escape, LEAF_OF))})")

ADAPTER = re.compile(r"lora|lokr|hada|oft_|dora|\.alpha$|\.diff")  # in a name of every adapter, in none of a base model
KINDS = (  # adapters that are refused, by a pattern of their tensors' names
    (r"\.lokr_", "a LoKr (Kronecker products)"),
    (r"\.hada_", "a LoHa (Hadamard products)"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA (directions and magnitudes)"),
    (r"\.oft_|\.boft_", "an OFT (rotations)"),
    (r"\.lora_mid\.", "a LoRA with a core tensor (Tucker)"),
    (r"\.lora_B\.bias$|\.(diff|diff_b|set_weight|reshape_weight)$", "differences of whole weights or biases"),
    (r"^lora_te|^text_encoder|\.text_model\.|^text_model\.", "a LoRA on a text encoder"),
)
# peft's init_lora_weights of these takes the start of B A from the base, which the file does not hold.
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
OTHERS = (  # LoRAs of other models
    (r"\.lora_[AB]$", "part of a checkpoint; lora.safetensors lies beside it"),
    (r"norm_(q|k|added_q|added_k)\.weight$|(query|key)_norm\.scale$", "a control LoRA, which has norms of its own"),
    (r"(input|output|down|up|mid|middle)_block|^unet\.", "a LoRA of Stable Diffusion"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)", "a LoRA of Wan"),
    (r"layers\.\d+\.", "a LoRA of a language model or another transformer"),
    (r"(double|single)(_transformer)?_(stream|block)|transformer_blocks", "a LoRA of a larger Flux or of a relative"),
)


def places(modules: Mapping[str, list[str]]) -> dict[str, Place]:
    """All names that files have for the Linears of Flux: name without its leaf -> where it belongs."""
    table = {}
    for ours, theirs in modules.items():
        if ours.endswith("_norm"):
            continue
        whole = Place(ours, 0, len(theirs), len(theirs), ours)
        prefixes = ("", "diffusion_model.", "base_model.model.")
        table |= {prefix + ours: whole for prefix in prefixes} | {f"lora_unet_{ours.replace('.', '_')}": whole}
        for i, their in enumerate(theirs):
            part = Place(ours, i, i + 1, len(theirs), their)
            table |= {prefix + their: part for prefix in (*prefixes, "transformer.")}
            table |= {prefix + their.replace(".", "_"): part for prefix in ("lora_transformer_", "lora_unet_")}
        *block, module = ours.split(".", 2)
        if module in XLABS:
            suffix, covered = XLABS[module]
            table[f"{'.'.join(block)}.processor.{suffix}"] = Place(ours, 0, covered, len(theirs), ours)
    return table


def parse(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: Mapping[str, list[str]],
    where: object,
    sizes: Sizes | None = None,
) -> dict[str, Factors]:
    """A file's tensors as one correction per module; each tensor is used or named in the error.

    Args:
        tensors: by name, in any format of the table above.
        metadata: of the file's header, for alpha.
        modules: ours -> diffusers', of the model (flux_modules).
        where: the file, for messages.
        sizes: (out, in) of the model's Linears to check against; without it the shapes must only fit each other.

    Raises:
        ValueError: not a plain, whole, finite LoRA of this model; names the tensors.
    """
    for pattern, kind in KINDS:
        if found := [name for name in tensors if re.search(pattern, name)]:
            help = "only plain LoRAs (A, B, alpha) are"
            if kind.endswith("text encoder"):
                help = "`python -m kontext_min.extras.export convert IN OUT --drop PREFIX` leaves such tensors out"
            raise ValueError(f"{where}: {kind}, which is not read here ({_some(found)}); {help}.")

    table, unknown = places(modules), []
    entries: dict[Place, dict[str, str]] = {}  # place -> {"down": name in the file, "up": ..., "alpha": ...}
    for name in tensors:
        match = SPLIT.fullmatch(name)
        place = table.get(match[1]) if match else None
        if place is None or (sizes is not None and place.module not in sizes):
            unknown.append(name)
            continue
        twin = entries.setdefault(place, {}).setdefault(LEAF_OF[match[2]], name)
        if twin != name:
            raise ValueError(f"{where}: {name} and {twin} are the same; expected one of them.")
    if unknown:
        likely = next((m for p, m in OTHERS if any(re.search(p, n) for n in unknown)), "a LoRA of another model")
        raise ValueError(
            f"{where}: {len(unknown)} of {len(tensors)} tensors belong to no Linear of this model "
            f"({_some(unknown)}); it looks like {likely}."
        )
    alpha_of = _header_alpha(metadata, where)
    pieces: dict[str, dict[Place, Factors]] = {}
    for place, names in entries.items():
        pieces.setdefault(place.module, {})[place] = _factors(place, names, tensors, alpha_of, where)
    if not any("alpha" in names for names in entries.values()):
        _say_if_ignored(metadata, [f for parts in pieces.values() for f in parts.values()], where)
    return {
        module: _join(pieces[module], modules[module], where, sizes[module] if sizes else None)
        for module in modules
        if module in pieces
    }


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


AlphaOf = Callable[[str, int, float | None], float]  # (module's path, rank, alpha of its tensor) -> alpha
HEADER_ALPHAS = ("lora_alpha", "transformer.lora_alpha", "network_alpha", "alpha")  # plain keys that trainers write


def _header_alpha(metadata: Mapping[str, str], where: object) -> AlphaOf:
    """A function that gives each module its alpha: from its tensor, peft's config, a key of the header, or its rank.

    Other readers disagree here. All take the tensor; diffusers and peft take peft's LoraConfig, ComfyUI does not; some
    take a plain key. A tensor and a config that differ are refused: the strength would depend on the program.
    In peft's config a pattern matches the end of a module's name, and rsLoRA counts alpha / sqrt(rank).
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        patterns, ranks = (
            {re.compile(rf"(.*\.)?({p})$"): n for p, n in (config.get(f"{key}_pattern") or {}).items()}
            for key in ("alpha", "rank")
        )
        patterns = {pattern: float(a) for pattern, a in patterns.items()}
        of_config = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
        if not all(map(math.isfinite, (*patterns.values(), of_config or 0))):
            raise ValueError
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError, re.error):
        raise ValueError(
            f"{where}: lora_adapter_metadata is not that of peft, in its header or in adapter_config.json beside it; "
            "write it again."
        ) from None
    if (init := str(config.get("init_lora_weights")).lower()).startswith(OTHER_BASES):
        raise ValueError(
            f"{where}: was trained with init_lora_weights {init}, which changes the base too; convert it by peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    plain = {key: metadata[key] for key in HEADER_ALPHAS if key in metadata}
    try:
        values = {float(text) for text in plain.values()}
    except ValueError:
        values = {math.nan}
    if len(values) > 1 or not all(map(math.isfinite, values)):
        got = ", ".join(f"{key} = {text[:40]!r}" for key, text in plain.items())
        raise ValueError(f"{where}: its header has {got}, expected one finite number.")

    said: list[str] = []

    def alpha(path: str, rank: int, of_tensor: float | None) -> float:
        stated = next((a for pattern, a in patterns.items() if pattern.match(path)), of_config)
        if stated is not None and config.get("use_rslora"):
            stated *= math.sqrt(rank)
        if None not in (stated, of_tensor) and not math.isclose(of_tensor, stated, rel_tol=1e-6):
            raise ValueError(
                f"{where}: {path}: alpha is {of_tensor:g}, but the header says {stated:g}; other programs would "
                "disagree on the strength, so remove one of them."
            )
        told = next((n for pattern, n in ranks.items() if pattern.match(path)), config.get("r"))
        if of_tensor is None and told not in (None, rank) and not said:
            said.append(path)
            text = f"its header says rank {told}, its tensors have {rank}; alpha is divided by the latter"
            print(f"note: {where}: {path}: {text}", file=sys.stderr)
        return next(a for a in (of_tensor, stated, *values, float(rank)) if a is not None)

    return alpha


def _say_if_ignored(metadata: Mapping[str, str], lora: Sequence[Factors], where: object) -> None:
    """A line about kohya's alpha in the header where nothing else states one.

    kohya's trainer writes tensors too. Without them the file was converted, which multiplies alpha into the weights and
    leaves the header as it was (sd-scripts, convert_flux_lora.py): read again, alpha would count twice.
    """
    text = metadata.get("ss_network_alpha", "None")
    if text in ("None", "Dynamic", metadata.get("ss_network_dim")) or any(f.scale != 1 for f in lora):
        return
    try:
        factor = float(text) / float(metadata.get("ss_network_dim", lora[0].rank))
    except (ValueError, ZeroDivisionError):
        return
    if factor != 1:
        print(
            f"note: {where}: ss_network_alpha {text[:40]} in its header is ignored, since a converted file has it in "
            f"its weights; if this one has not, use =STRENGTH with {factor:g} times the strength",
            file=sys.stderr,
        )


def _factors(
    place: Place, names: Mapping[str, str], tensors: Mapping[str, Tensor], alpha_of: AlphaOf, where: object
) -> Factors:
    """The matrices of one entry, checked."""
    if missing := [kind for kind in ("down", "up") if kind not in names]:
        name = next(iter(names.values()))
        raise ValueError(f"{where}: {name} has no {' and no '.join(missing)} matrix beside it; it is not whole.")
    values = {kind: tensors[name] for kind, name in names.items()}
    values = {kind: x.float() if x.dtype.itemsize == 1 else x for kind, x in values.items()}  # fp8 has no addition
    down, up = values["down"], values["up"]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or not len(down):
        raise ValueError(
            f"{where}: {names['down']} and its partner have shapes {list(down.shape)} and {list(up.shape)}, expected "
            "[rank, in] and [out, rank] of one rank."
        )
    if "alpha" in values and values["alpha"].numel() != 1:
        raise ValueError(f"{where}: {names['alpha']} has {values['alpha'].numel()} values, expected one.")
    if bad := [names[kind] for kind, x in values.items() if not torch.isfinite(x).all()]:
        raise ValueError(f"{where}: values that are not finite in {_some(bad)}; the training that wrote it failed.")
    of_tensor = float(values["alpha"]) if "alpha" in values else None
    return Factors(down, up, alpha_of(place.path, len(down), of_tensor))


def _join(pieces: Mapping[Place, Factors], theirs: list[str], where: object, size: tuple[int, int] | None) -> Factors:
    """The parts of one module as one correction, checked against the module's size where that is known."""
    order = sorted(pieces)
    module, parts = order[0].module, order[0].parts
    first, last = pieces[order[0]], pieces[order[-1]]
    if any(a.last > b.first for a, b in pairwise(order)):
        raise ValueError(f"{where}: {module} is there as a whole and in parts; expected one of them.")
    # Rows of each part: q, k and v have as many as they read columns. The MLP has the rest of what the model or the
    # file says, and four times as many where neither does.
    out, width = size or (None, first.down.shape[1])
    if out is None and parts == 1:
        out = len(first.up)
    if out is None:
        mlp = len(last.up) - (3 * width if order[-1].first == 0 else 0) if order[-1].last == 4 else 4 * width
        out = 3 * width + (mlp if parts == 4 else 0)
    rows = [width, width, width, out - 3 * width][:parts] if parts > 1 else [out]
    for place, (down, up, _) in pieces.items():
        expected = sum(rows[place.first : place.last])
        if down.shape[1] != width or len(up) != expected:
            raise ValueError(
                f"{where}: {' '.join(theirs[place.first : place.last])} ({module}) has shapes {list(down.shape)} and "
                f"{list(up.shape)}, expected [rank, {width}] and [{expected}, rank]: it was trained on another model."
            )
    if len(order) == 1 and order[0].last - order[0].first == parts:
        return _swapped(first) if module == SWAPPED and theirs[0] == order[0].path else first

    # Join the parts as at the top of this file, each scale in its rows of up. Only where all are 1 no value is rounded,
    # so the dtype of the file can stay.
    dtypes = {x.dtype for f in pieces.values() for x in (f.down, f.up)}
    exact = len(dtypes) == 1 and all(f.scale == 1 for f in pieces.values())
    dtype = dtypes.pop() if exact else torch.float32
    downs = [pieces[place].down.to(dtype) for place in order]
    shared = all(down.shape == downs[0].shape and torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else torch.cat(downs)
    up = torch.zeros(out, len(down), dtype=dtype)
    column = 0
    for place in order:
        part, row = pieces[place].scale * pieces[place].up.to(dtype), sum(rows[: place.first])
        up[row : row + len(part), column : column + part.shape[1]] = part
        column += 0 if shared else part.shape[1]
    return Factors(down, up, float(len(down)))


def _swapped(factors: Factors) -> Factors:
    """Rows [shift, scale] to [scale, shift], or back."""
    return factors._replace(up=torch.cat(factors.up.chunk(2)[::-1]))


def emit(lora: Mapping[str, Factors], modules: Mapping[str, list[str]], format: str) -> dict[str, Tensor]:
    """One correction per module as the tensors of a file: down (rank, in), up (out, rank), alpha a scalar.

    kohya: as trained, with alpha. peft: q, k, v and mlp apart, alpha / rank multiplied into up, so that alpha = rank
    and no reader can mistake it. Exact if alpha / rank is a power of two, else rounded once, in float32.

    Raises:
        ValueError: unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"LoRA format: got {format!r}, expected one of {', '.join(FORMATS)}.")
    tensors = {}
    for module, factors in lora.items():
        if format == "kohya":
            key = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = factors.down
            tensors[f"{key}.lora_up.weight"] = factors.up
            tensors[f"{key}.alpha"] = torch.tensor(float(factors.alpha))
            continue
        for their, part in zip(modules[module], _split(module, factors, len(modules[module])), strict=True):
            if part is not None:
                tensors[f"transformer.{their}.lora_A.weight"], tensors[f"transformer.{their}.lora_B.weight"] = part
    return {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def _split(module: str, factors: Factors, parts: int) -> list[tuple[Tensor, Tensor] | None]:
    """(down, up) of each part with the scale in up; None for parts that the LoRA does not change."""
    if module == SWAPPED:
        factors = _swapped(factors)
    down, up = factors.down, factors.up
    if factors.scale != 1:  # the dtype of the file stays if it holds the scaled values exactly
        scaled = factors.scale * up.float()
        narrow = scaled.to(up.dtype)
        up = narrow if torch.equal(narrow.float(), scaled) else scaled
    used = up.ne(0).any(0)  # (rank,)
    split = []
    for part in split_rows(up, parts, down.shape[1]):
        if used.any() and not part.any():
            split.append(None)
            continue
        mine = part.ne(0).any(0) | ~used  # of a block diagonal, each part gets its own block back
        split.append((down, part) if mine.all() else (down[mine], part[:, mine]))
    return split


# -------------------------------------------------------------------------------------------------- files and headers


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # halves of a character can't be encoded


SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # in the header: what is expected, and the check
    "objective": ("bridge or kontext", lambda v: v in ("bridge", "kontext")),
    "context": ("true or false", lambda v: isinstance(v, bool)),
    "source_noise": ("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1),
    "start_time": ("a number above 0, at most 1", lambda v: _number(v) and 0 < v <= 1),
    "guidance": ("a number from 0 to 100", lambda v: _number(v) and 0 <= v <= 100),
    "resolution": ("a whole number from 16 to 16384", lambda v: type(v) is int and 16 <= v <= 16384),
    "prompt": ("text", _text),
    "prompts": ("a list of texts", lambda v: isinstance(v, list) and all(map(_text, v))),
    "base": ("text", _text),
}


def trained_with(metadata: Mapping[str, str], file: object) -> dict[str, Any]:
    """What train.py wrote into a file's header; empty for files of other trainers.

    Raises:
        ValueError: a setting of the wrong type or outside its range; names file, key, got and expected.
    """
    try:
        known = json.loads(metadata.get("kontext_min", "{}"))
    except (ValueError, TypeError, RecursionError):
        known = None
    if not isinstance(known, dict):
        raise ValueError(f"{file}: kontext_min in its header is no JSON object; download it again, or remove the key.")
    for key, (expected, right) in SETTINGS.items():
        if key in known and not right(value := known[key]):
            got = f"a {type(value).__name__}" if isinstance(value, list | dict) else json.dumps(value)[:40]
            raise ValueError(f"{file}: {key} in its header: got {got}, expected {expected}.")
    return known


HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the tensors of the file before
FILES = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # in a folder


def lora_file(path: str | Path) -> Path:
    """The LoRA file itself, where a folder is named that holds one.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: a folder without {FILES[0]}; name the LoRA file{_unfinished(path)}.")
        return found[0]
    if not path.is_file():
        advice = f"train one with train.py or check the path{_unfinished(path.parent)}"
        raise FileNotFoundError(f"{path}: no such LoRA file; {advice}.")
    return path


def _unfinished(folder: Path) -> str:
    """Where the LoRA of a run that is not at its end lies."""
    found = sorted(file for where in ("checkpoints/step-*", "step-*") for file in folder.glob(f"{where}/{FILES[0]}"))
    return f", such as {found[-1]}" if found else ""


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in their stored shapes and metadata of a LoRA file, or of the one in a folder.

    An adapter_config.json beside a file of peft's or diffusers' name counts as `lora_adapter_metadata`.

    Raises:
        FileNotFoundError: no such file. ValueError: not a whole safetensors file, no LoRA, or settings that can't be.
    """
    path = lora_file(path)
    read_headers([path])  # names what is wrong with a file that is cut or of another kind
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, this is no dict
            metadata = f.metadata() or {}
    except SafetensorError as error:  # of a name that is not UTF-8
        raise ValueError(f"{as_text(path)}: {error}; rename it.") from None
    if not tensors:
        raise ValueError(f"{path}: no tensors in it; expected a LoRA.")
    if not any(map(ADAPTER.search, tensors)):
        raise ValueError(f"{path}: it is no LoRA ({_some(tensors)}); a base model belongs to --weights.")
    trained_with(metadata, path)
    if config := _config(path):
        metadata.setdefault("lora_adapter_metadata", config.read_text(encoding="utf-8", errors="replace"))
    return tensors, metadata


def _config(file: Path) -> Path | None:
    """The settings that peft keeps beside a file of this name."""
    config = file.with_name("adapter_config.json")
    return config if file.name in FILES[1:] and config.is_file() else None


def lora_bytes(file: Path) -> bytes:
    """All that decides what a LoRA does."""
    config = _config(file)
    return file.read_bytes() + (config.read_bytes() if config else b"")


def strength_of(text: str) -> tuple[Path, float]:
    """`file.safetensors=0.8` -> (file.safetensors, 0.8); the strength is 1 where none is given.

    Raises:
        ValueError: no name, or a strength that is no number from -100 to 100.
    """
    name, sign, strength = text.rpartition("=")
    if not text.strip() or (sign and not name):
        raise ValueError(f"--lora {text!r}: no file name; expected FILE or FILE=STRENGTH.")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(strength)
    except ValueError:
        if not name.endswith(".safetensors") and not Path(name).exists():
            return Path(text), 1.0  # a path with = in it
        value = math.nan
    if not -100 <= value <= 100 or 0 < abs(value) < TINY:
        raise ValueError(f"--lora {text}: got strength {strength!r}, expected a number from -100 to 100, or 0.")
    return Path(name), value


def note_other_base(whose: str, about: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """A line for each network that is not the one that a header names; `here` has the fingerprints of those in use."""
    for key, what in (
        ("base", "base model"),
        ("vae", "autoencoder"),
        ("clip", "CLIP"),
        ("t5", "T5"),
        ("words", "vocabulary"),
    ):
        if here.get(key) and about.get(key) not in (None, here[key]):
            print(f"note: {whose}: was trained on another {what}, or another file of it", file=sys.stderr)


def note_other_path(whose: str, about: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """A line if a header says that something was trained on another path, or otherwise asked, than `settings` say."""
    for key in ("objective", "context", "source_noise", "start_time"):
        then, now = about.get(key), settings.get(key)
        if None not in (then, now) and now != "auto" and then != (float(now) if key == "start_time" else now):
            what = then if key == "objective" else f"{key.replace('_', ' ')} {then}"
            print(f"note: {whose}: was trained for {what}, not for {now}", file=sys.stderr)
            if key == "objective":  # the others are parts of a bridge
                break
        elif then is not None and now == "auto":
            print(f"note: {whose}: was trained for start time {then}; auto may find another", file=sys.stderr)
    learned, asked = about.get("prompts") or [about.get("prompt")], settings.get("prompt")
    if learned[0] and asked and not {*learned} & {*asked}:
        print(f"note: {whose}: was trained with --prompt {learned[0]!r}, not with {asked[0]!r}", file=sys.stderr)
    then, now = about.get("guidance"), settings.get("guidance")
    if None not in (then, now) and then != now:
        print(f"note: {whose}: was trained with --guidance {then:g}, not with {now:g}", file=sys.stderr)


def note_which(whose: str, path: Path, file: Path, about: Mapping[str, Any]) -> None:
    """A line if there are other files than the one that is read: in the folder that was named, or later in its run.

    Args:
        whose: the flag and its value.
        path: what was named: the file or its folder.
        file: a LoRA, or the first file of a transformer of --full.
        about: what its header says of the training.
    """
    if file.name in FILES and (others := [n for n in FILES if n != file.name and (path / n).is_file()]):
        print(f"note: {whose}: is {file.name} there; not read is {' and '.join(others)}", file=sys.stderr)
    # At its top a run has what it ended with; one that went on and was stopped has something later.
    result = file if file.name == FILES[0] else file.parent
    found = {p.parent.name[5:]: p for p in result.parent.glob(f"checkpoints/step-*/{result.name}")}
    last = max(filter(str.isdecimal, found), key=int, default="0")
    if isinstance(steps := about.get("steps"), int) and int(last) > steps:
        text = f"is of step {steps}; its run went on to {found[last]}, and is not at its end"
        print(f"note: {whose}: {text}", file=sys.stderr)


def purpose(loras: Sequence[str]) -> dict[str, Any]:
    """What several LoRAs (FILE or FILE=STRENGTH) were trained for: each setting from the first that has it.

    Raises:
        FileNotFoundError, ValueError: as for read_lora; the same file twice; LoRAs that follow different paths.
    """
    known: dict[str, Any] = {}
    files: set[Path] = set()
    for lora in loras:
        file = lora_file(strength_of(lora)[0]).resolve()
        if file in files:
            raise ValueError(f"--lora {lora}: is given twice; give it once, and its strength as FILE=STRENGTH.")
        if any(filecmp.cmp(file, other, shallow=False) for other in files):
            print(f"note: --lora {lora}: is a copy of another; their strengths add up", file=sys.stderr)
        files.add(file)
        about = trained_with(read_lora(file)[1], file)
        note_which(f"--lora {lora}", strength_of(lora)[0], file, about)
        note_other_base(f"--lora {lora}", about, known)
        other = [k for k in ("prompt", "guidance", "resolution") if k in about and known.get(k, about[k]) != about[k]]
        for key in other:
            print(f"note: --lora {lora}: its {key} gives way to the first LoRA's, or to a flag", file=sys.stderr)
        for key in ("objective", "context", "source_noise", "start_time"):
            if key in about and known.get(key, about[key]) != about[key]:
                raise ValueError(
                    f"--lora {lora}: was trained with {key} {about[key]}, the one before it with {known[key]}; "
                    "LoRAs of one picture must follow one path."
                )
        known = about | known
    return known


def write_lora(path: str | Path, lora: Mapping[str, Factors], format: str, metadata: Mapping[str, str]) -> None:
    """Write one correction per module; arguments as for save_lora and emit."""
    tensors = emit(lora, flux_modules(FluxParams()), format)
    ranks = {len(x) for name, x in tensors.items() if name.endswith((".lora_down.weight", ".lora_A.weight"))}
    alphas = {round(float(f.alpha), 6) for f in lora.values()} if format == "kohya" else {float(r) for r in ranks}
    one = {  # of this file, not of one that it was converted from
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    # Alpha is in the tensors now. A second statement would contradict it, or count twice.
    gone = ("lora_adapter_metadata", *HEADER_ALPHAS, *HASHES)
    kept = {k: v for k, v in metadata.items() if k not in gone}
    shown = _shown(trained_with(metadata, path))
    one |= {k: v for k, v in shown.items() if k == "modelspec.usage_hint"}  # older files of this project have another
    one["checksum"] = checksum(tensors)
    save_file(tensors, Path(path), {"format": "pt", **shown, **kept, **one})


def _shown(about: Mapping[str, Any]) -> dict[str, str]:
    """The fields that model managers show, from what train.py says of the training."""
    shown = {
        "ss_network_module": "networks.lora_flux",
        "ss_base_model_version": "flux1",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": f"FLUX.1-Kontext, {about.get('degrade', 'LoRA')}",
    }
    if about.get("objective") == "bridge":
        noise, time = about.get("source_noise", 0), about.get("start_time", 1)
        shown["modelspec.usage_hint"] = (
            f"{BRIDGE}. In diffusers: Flux{'Kontext' if about.get('context') else ''}Pipeline, latents = packed latent "
            f"of the degraded picture{f' + {noise:g} * noise' if noise else ''}, sigmas = "
            f"{f'{time:g} * ' if time != 1 else ''}linspace(1, 1/steps, steps), "
            "FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)"
        )
    elif "objective" in about:
        shown["modelspec.usage_hint"] = "with the degraded picture as FLUX.1-Kontext's reference, and this prompt"
    names = {"lr": "ss_learning_rate", "steps": "ss_steps", "seed": "ss_seed", "guidance": "ss_guidance_scale",
             "pictures_a_batch": "ss_total_batch_size", "accumulate": "ss_gradient_accumulation_steps",
             "prompt": "modelspec.trigger_phrase"}  # fmt: skip
    shown |= {theirs: str(about[ours]) for ours, theirs in names.items() if ours in about}
    if "resolution" in about:
        size = f"{about['resolution']}x{about['resolution']}"
        shown |= {"ss_resolution": size, "modelspec.resolution": size}
    return shown


# ------------------------------------------------------------------------------------------------ models and their LoRA


def save_lora(
    model: Flux,
    path: str | Path,
    format: str | None = None,
    metadata: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA of a model, aside first and then renamed, so that the file is whole or absent.

    Args:
        model: with LoRALinear layers.
        path: of the safetensors file.
        format: one of FORMATS; None chooses kohya, or peft if a module lies outside of the blocks.
        metadata: text by name, kept in the header, where rank, alpha and what managers show are added.
        tensors: values by parameter name instead of the model's own, A (rank, in) and B (out, rank): gathered from
            several processes, or averaged.

    Raises:
        ValueError: unknown format, or no LoRA on the model.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("save_lora: the model has no LoRA on it; call add_lora first.")
    values = tensors or dict(model.named_parameters())
    lora = {}
    for name, layer in layers.items():
        down, up = values[f"{name}.lora_A"], values[f"{name}.lora_B"]
        lora[name] = Factors(down, up, layer.scale * down.shape[0])
    _note_if_idle(Path(path).name, lora, 1)  # its folder may be a checkpoint's, which is renamed
    write_lora(path, lora, format or ("peft" if outside_of_blocks(model) else "kohya"), metadata or {})


def outside_of_blocks(model: Flux) -> list[str]:
    """Modules with a LoRA that diffusers drops when it reads them from a kohya file."""
    return [name for name in lora_layers(model) if not name.startswith(("double_blocks.", "single_blocks."))]


def factors_for(model: Flux, path: str | Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """The LoRA of a file by module of this model, and the file's metadata; errors as for load_lora."""
    tensors, metadata = read_lora(path)
    note_doubts(path, tensors, metadata)
    sizes = {name.removesuffix(".base"): (m.out_features, m.in_features) for name, m in linears(model).items()}
    return parse(tensors, metadata, flux_modules(model.params), lora_file(path), sizes), metadata


def note_doubts(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Lines about a LoRA that was changed or cut since it was written, and about one of peft without its alpha."""
    if "checksum" in metadata:
        if metadata["checksum"] != checksum(tensors):
            print(f"note: {path}: its values are not those that train.py wrote", file=sys.stderr)
    else:
        zeros = [name for name, x in tensors.items() if name.endswith(LEAVES["down"]) and not x.any()]
        with lora_file(path).open("rb") as f:
            f.seek(-64, os.SEEK_END)
            cut = zeros and not any(f.read())  # else somebody left out blocks; B is zeros where nothing was learned
        if cut:
            more = f" and {len(zeros) - 1} more" * (len(zeros) > 1)
            print(f"note: {path}: {zeros[0]}{more}: all zeros; was the download or the copy cut?", file=sys.stderr)
    of_peft = next(iter(tensors)).startswith("base_model.model.")
    beside = lora_file(path).with_name("adapter_config.json").is_file() and lora_file(path).name != FILES[0]
    stated = any("alpha" in name for name in tensors) or "lora_adapter_metadata" in metadata or "checksum" in metadata
    if (of_peft or beside) and not stated:
        counts = f" that counts (only {' and '.join(FILES[1:])} may have one)" * beside
        text = f"no adapter_config.json beside it{counts}, so its alpha is taken for its rank"
        print(f"note: {path}: {text}", file=sys.stderr)


@torch.no_grad()
def load_lora(model: Flux, path: str | Path, strength: float = 1.0) -> dict[str, str]:
    """Put the LoRA of a file on a model.

    Several calls add up. On a Linear that has a LoRA already the ranks are joined, which is exact:
    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].

    Args:
        model: a Flux; changed in place, if the file fits.
        path: of the file, in any format of the table above, or of its folder.
        strength: multiplies the correction; 1 is what was trained.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError, ValueError: no such file; not a plain, whole LoRA of this model.
    """
    lora, metadata = factors_for(model, path)
    _note_if_idle(path, lora, strength)
    device = next(model.parameters()).device
    for name, (down, up, alpha) in lora.items():
        base, downs, ups, alpha = model.get_submodule(name), [down.to(device)], [up.to(device)], strength * alpha
        if isinstance(there := base, LoRALinear):
            base, downs = there.base, [there.lora_A, downs[0].float()]
            ups = [there.scale * there.lora_B, alpha / len(down) * ups[0].float()]
            alpha = sum(map(len, downs))
        layer = LoRALinear(base, sum(map(len, downs)), alpha, device)
        layer.lora_A.copy_(torch.cat(downs))
        layer.lora_B.copy_(torch.cat(ups, dim=1))
        model.set_submodule(name, layer.requires_grad_(False))
    return metadata


def _note_if_idle(path: str | Path, lora: Mapping[str, Factors], strength: float) -> None:
    """A line if a LoRA is so weak that no byte of a picture was seen to change."""
    sizes = [f.alpha / len(f.down) * f.up.abs().max().float() * f.down.abs().max().float() for f in lora.values()]
    if abs(strength) * max(map(abs, sizes)) < 1e-7:
        print(f"note: {path}: its strength, A or B is nearly 0, so its weights change nothing", file=sys.stderr)


@torch.no_grad()
def init_lora(
    model: Flux, path: str | Path, settings: Mapping[str, Any] | None = None, base: Mapping[str, str] | None = None
) -> None:
    """Start the LoRA that add_lora put on a model from that of a file.

    A note says so if the file was trained on another path than that of these `settings`, such as {"objective":
    "bridge"}, with another prompt or guidance, or on another `base` (prompts.fingerprints): it starts from far away.

    Where the model's rank is higher, the rows of A that the file lacks keep their random start and their columns of B
    are zero, as at any start; modules that the file lacks start at zero. So the first step runs what the file holds.

    Raises:
        FileNotFoundError, ValueError: as for load_lora; a module without a LoRA on the model; a lower rank.
    """
    (lora, metadata), layers = factors_for(model, path), lora_layers(model)
    _note_if_idle(path, lora, 1)
    about, whose = trained_with(metadata, path), f"--init-lora {path}"
    note_which(whose, Path(path), lora_file(path), about)
    note_other_path(whose, about, settings or {})
    base = base or {}
    note_other_base(whose, about, {**base, "base": base.get("transformer")})
    apart = [name for name in lora if name not in layers]
    if apart:
        raise ValueError(f"{path}: has {', '.join(apart[:3])}, which do not train here; choose other --lora-targets.")
    highest, rank = max(f.rank for f in lora.values()), len(next(iter(layers.values())).lora_A)
    if highest > rank:
        raise ValueError(f"{path}: its rank is {highest}, the one to train {rank}; expected --rank {highest} or more.")
    for name, factors in lora.items():
        layer = layers[name]
        layer.lora_A[: factors.rank] = factors.down.to(layer.lora_A)
        layer.lora_B[:, : factors.rank] = factors.scale / layer.scale * factors.up.to(layer.lora_B)
