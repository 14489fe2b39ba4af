"""The names in LoRA files: those of every trainer to one correction a Linear, and back to the two that others read.

Inside, a LoRA is a table: module of ours (BFL's name) -> Factors, the correction (alpha / rank) * up @ down. Files
differ in three things alone: a prefix, BFL's or diffusers' module names, and what the two matrices are called.

| written by | module names | example for the picture's q in the first block |
|---|---|---|
| kohya (sd-scripts, musubi) | BFL, underscores | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` |
| ComfyUI, SimpleTuner | BFL | `diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`, or `.lora_A.weight` |
| fal; bare | BFL | `base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight`; without prefix |
| xlabs | its own | `double_blocks.0.processor.qkv_lora1.down.weight` (no alpha; no MLP rows in single blocks) |
| peft, diffusers, ai-toolkit | diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`; without prefix |
| peft's save_pretrained | diffusers | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` |
| OneTrainer | diffusers, underscores | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |

BFL's qkv (rows q, k, v) and linear1 (rows q, k, v, mlp) are several modules in diffusers' names. To split, each part
takes its rows of up and the whole of down. To join parts that share one down, their rows are stacked; if they do not,

    down = [down_q; down_k; down_v]        up = diag(up_q, up_k, up_v)        rank = sum of the ranks

which is the same correction exactly. The last modulation's halves are swapped between the two (names.py).

alpha is a tensor `.alpha` beside the matrices, or stands in the header (`lora_adapter_metadata`: peft's LoraConfig), or
is the rank.

Sources: kohya-ss/sd-scripts 48d368f, networks/lora_flux.py and convert_flux_lora.py; ComfyUI (October 2025),
comfy/lora.py `model_lora_keys_unet`, comfy/utils.py `flux_to_diffusers`; diffusers 0.42.1, loaders/lora_pipeline.py and
lora_conversion_utils.py; peft 0.21.2, tuners/lora/config.py; XLabs-AI/x-flux 4749542.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kontext_min.names import SWAPPED, split_rows

FORMATS = ("kohya", "peft")  # that are written
Sizes = Mapping[str, tuple[int, int]]  # module -> (out, in)


class Factors(NamedTuple):
    """The correction of one Linear: scale * up @ down."""

    down: Tensor  # A (rank, in)
    up: Tensor  # B (out, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """Of the correction."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What up @ down counts."""
        return self.alpha / self.rank


class Place(NamedTuple):
    """Where an entry of a file belongs: parts first..last-1 of a module of ours."""

    module: str
    first: int
    last: int
    parts: int  # that the module has in diffusers' names: 1, 3 (q, k, v) or 4 (q, k, v, mlp)
    path: str  # the name by which patterns in the file's header speak of it


XLABS = {  # suffix in xlabs' names: (ours, parts that it covers)
    "double_blocks": {
        "qkv_lora1": ("img_attn.qkv", 3), "qkv_lora2": ("txt_attn.qkv", 3),
        "proj_lora1": ("img_attn.proj", 1), "proj_lora2": ("txt_attn.proj", 1),
    },
    "single_blocks": {"qkv_lora": ("linear1", 3), "proj_lora": ("linear2", 1)},
}  # fmt: skip
LEAVES = {
    "down": ("lora_A.weight", "lora_down.weight", "lora_A.default.weight", "lora.down.weight", "down.weight"),
    "up": ("lora_B.weight", "lora_up.weight", "lora_B.default.weight", "lora.up.weight", "up.weight"),
    "alpha": ("alpha",),
}
LEAF_OF = {leaf: kind for kind, leaves in LEAVES.items() for leaf in leaves}
SPLIT = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, LEAF_OF))})")  # (.+?): the longest leaf that fits

KINDS = (  # what else there is, by a pattern of its tensors' names
    (r"\.lokr_", "a LoKr (Kronecker products)"),
    (r"\.hada_", "a LoHa (Hadamard products)"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA (directions and magnitudes)"),
    (r"\.oft_|\.boft_", "an OFT (rotations)"),
    (r"\.lora_mid\.", "a LoRA with a core tensor (Tucker)"),
    (r"\.lora_B\.bias$|\.(diff|diff_b|set_weight|reshape_weight)$", "differences of whole weights or biases"),
    (r"^lora_te|^text_encoder|\.text_model\.|^text_model\.", "a LoRA on a text encoder"),
)
OTHERS = (  # what else a LoRA may be of
    (r"norm_(q|k|added_q|added_k)\.weight$|(query|key)_norm\.scale$", "a control LoRA, which has norms of its own"),
    (r"(input|output|down|up|mid|middle)_block|^unet\.", "a LoRA of Stable Diffusion"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)", "a LoRA of Wan"),
    (r"layers\.\d+\.", "a LoRA of a language model or another transformer"),
    (r"(double|single)(_transformer)?_(stream|block)|transformer_blocks", "a LoRA of a larger Flux or of a relative"),
)


def places(modules: Mapping[str, list[str]]) -> dict[str, Place]:
    """Everything that files call a Linear of Flux: name without its leaf -> where it belongs."""
    table = {}
    for ours, theirs in modules.items():
        if ours.endswith("_norm"):
            continue
        whole = Place(ours, 0, len(theirs), len(theirs), ours)
        names = [f"lora_unet_{ours.replace('.', '_')}", f"diffusion_model.{ours}", f"base_model.model.{ours}", ours]
        table |= dict.fromkeys(names, whole)
        for i, their in enumerate(theirs):
            names = [f"transformer.{their}", f"base_model.model.{their}", their]
            names += [f"lora_transformer_{their.replace('.', '_')}"]
            table |= dict.fromkeys(names, Place(ours, i, i + 1, len(theirs), their))
        kind, number, module = (*ours.split(".", 2), "", "")[:3]
        for suffix, (target, covered) in XLABS.get(kind, {}).items():
            if target == module:
                table[f"{kind}.{number}.processor.{suffix}"] = Place(ours, 0, covered, len(theirs), ours)
    return table


def parse(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: Mapping[str, list[str]],
    where: object,
    sizes: Sizes | None = None,
) -> dict[str, Factors]:
    """A file's tensors to one correction a module; nothing is dropped: each tensor is used or named in the error.

    Args:
        tensors: by name, of any format of the table above.
        metadata: of the file's header, for alpha where it stands there.
        modules: ours -> diffusers', of the model (names.flux_modules).
        where: the file, for messages.
        sizes: (out, in) of the model's Linears, to check against; without, the file's own have to fit each other.

    Raises:
        ValueError: not a LoRA of this model, not a plain LoRA, not whole, or not finite, with names of tensors.
    """
    if not tensors:
        raise ValueError(f"{where}: no tensors in it; expected a LoRA.")
    for pattern, kind in KINDS:
        found = [name for name in tensors if re.search(pattern, name)]
        if found:
            help = "only plain LoRAs (A, B, alpha) are"
            if kind.endswith("text encoder"):
                help = "`python -m kontext_min.extras.lora_files convert IN OUT --drop PREFIX` leaves such tensors out"
            raise ValueError(f"{where}: {kind}, which is not read here ({_some(found)}); {help}.")

    table = places(modules)
    groups: dict[Place, dict[str, Tensor]] = {}
    names: dict[tuple[Place, str], str] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = SPLIT.fullmatch(name)
        place = table.get(match[1]) if match else None
        if place is None or (sizes is not None and place.module not in sizes):
            unknown.append(name)
            continue
        kind = LEAF_OF[match[2]]
        if (place, kind) in names:
            raise ValueError(f"{where}: {name} and {names[place, kind]} are the same; expected one of them.")
        names[place, kind] = name
        groups.setdefault(place, {})[kind] = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 can't add
    if unknown:
        others = [model for pattern, model in OTHERS if any(re.search(pattern, name) for name in unknown)]
        is_lora = any(SPLIT.fullmatch(name) for name in tensors)
        guess = f"it looks like {others[0] if others else 'a LoRA of another model'}" if is_lora else "it is no LoRA"
        raise ValueError(
            f"{where}: {len(unknown)} of {len(tensors)} tensors belong to no Linear of this model "
            f"({_some(unknown)}); {guess}."
        )

    alphas = _alphas_of_header(metadata, where)
    pieces: dict[str, dict[Place, Factors]] = {}
    for place, group in groups.items():
        name = names[place, next(iter(group))]
        missing = [kind for kind in ("down", "up") if kind not in group]
        if missing:
            raise ValueError(f"{where}: {name} has no {' and no '.join(missing)} matrix beside it; it is not whole.")
        down, up = group["down"], group["up"]
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or not len(down):
            raise ValueError(
                f"{where}: {name} and its partner have shapes {list(down.shape)} and {list(up.shape)}, expected "
                "[rank, in] and [out, rank] of one rank."
            )
        if "alpha" in group and group["alpha"].numel() != 1:
            raise ValueError(f"{where}: {names[place, 'alpha']} has {group['alpha'].numel()} values, expected one.")
        bad = [names[place, kind] for kind, x in group.items() if not torch.isfinite(x).all()]
        if bad:
            raise ValueError(f"{where}: values that are not finite in {_some(bad)}; the training that wrote it failed.")
        stated = alphas(place.path, down.shape[0])
        alpha = float(group["alpha"]) if "alpha" in group else stated
        if stated is not None and not math.isclose(alpha, stated, rel_tol=1e-6):
            raise ValueError(
                f"{where}: {names[place, 'alpha']} is {alpha:g}, but the header says {stated:g}; other programs "
                "would disagree on the strength, so remove one of them."
            )
        pieces.setdefault(place.module, {})[place] = Factors(down, up, float(down.shape[0]) if alpha is None else alpha)
    return {
        module: _join(pieces[module], modules[module], where, sizes[module] if sizes else None)
        for module in modules
        if module in pieces
    }


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _alphas_of_header(metadata: Mapping[str, str], where: object) -> Callable[[str, int], float | None]:
    """peft's LoraConfig in the header -> the function (module, rank) -> alpha; None where it does not say.

    As peft has it: a pattern stands for the end of a module's name; rsLoRA counts alpha / sqrt(rank).
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        patterns = {re.compile(rf"(.*\.)?({p})$"): float(a) for p, a in (config.get("alpha_pattern") or {}).items()}
        stated = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
    except (ValueError, AttributeError, TypeError, re.error):
        raise ValueError(f"{where}: its header's lora_adapter_metadata is not that of peft; write it again.") from None

    def alpha(path: str, rank: int) -> float | None:
        value = next((a for pattern, a in patterns.items() if pattern.match(path)), stated)
        return None if value is None else value * (math.sqrt(rank) if config.get("use_rslora") else 1)

    return alpha


def _join(pieces: Mapping[Place, Factors], theirs: list[str], where: object, size: tuple[int, int] | None) -> Factors:
    """The parts of one module to one correction, checked against its size where that is known."""
    order = sorted(pieces)
    module, parts = order[0].module, order[0].parts
    columns = pieces[order[0]].down.shape[1]
    if any(a.last > b.first for a, b in pairwise(order)):
        raise ValueError(f"{where}: {module} is there as a whole and in parts; expected one of them.")
    out, width = size or (None, columns)
    if out is None and parts == 1:
        out = len(pieces[order[0]].up)
    if out is None:  # q, k and v have as many rows as they read columns; the MLP four times as many, unless it says so
        last = len(pieces[order[-1]].up) - (3 * columns if order[-1].first == 0 else 0)
        out = 3 * columns + (0 if parts == 3 else last if order[-1].last == 4 else 4 * columns)
    rows = [width, width, width, out - 3 * width][:parts] if parts > 1 else [out]
    for place in order:
        down, up = pieces[place].down, pieces[place].up
        expected = sum(rows[place.first : place.last])
        if down.shape[1] != width or len(up) != expected:
            raise ValueError(
                f"{where}: {' '.join(theirs[place.first : place.last])} ({module}) has shapes {list(down.shape)} and "
                f"{list(up.shape)}, expected [rank, {width}] and [{expected}, rank]: it was trained on another model."
            )
    if len(order) == 1 and order[0].last - order[0].first == parts:
        return _swapped(pieces[order[0]]) if module == SWAPPED and theirs[0] == order[0].path else pieces[order[0]]

    if len({x.dtype for f in pieces.values() for x in (f.down, f.up)}) > 1:
        pieces = {place: f._replace(down=f.down.float(), up=f.up.float()) for place, f in pieces.items()}
    scales = {place: pieces[place].scale for place in order}
    first = pieces[order[0]].down
    shared = all(pieces[p].down.shape == first.shape and torch.equal(pieces[p].down, first) for p in order)
    down = first if shared else torch.cat([pieces[p].down for p in order])
    same = len(set(scales.values())) == 1
    up = torch.zeros(out, len(down), dtype=pieces[order[0]].up.dtype if same else torch.float32)
    column = 0
    for place in order:
        part = pieces[place].up if same else scales[place] * pieces[place].up.float()
        row = sum(rows[: place.first])
        up[row : row + len(part), column : column + part.shape[1]] = part
        column += 0 if shared else part.shape[1]
    return Factors(down, up, scales[order[0]] * len(down) if same else float(len(down)))


def _swapped(factors: Factors) -> Factors:
    """Rows [shift, scale] to [scale, shift], or back."""
    return factors._replace(up=torch.cat(factors.up.chunk(2)[::-1]))


def emit(lora: Mapping[str, Factors], modules: Mapping[str, list[str]], format: str) -> dict[str, Tensor]:
    """One correction a module to the tensors of a file: down (rank, in), up (out, rank), alpha a scalar.

    kohya: as trained, with alpha. peft: q, k, v and mlp apart, alpha / rank multiplied into up, so that alpha = rank
    and no reader can take it for another. Exact if alpha / rank is a power of two, else rounded once, in float32.

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
        for their, (down, up) in zip(modules[module], _split(module, factors, len(modules[module])), strict=True):
            if down is not None:
                tensors[f"transformer.{their}.lora_A.weight"] = down
                tensors[f"transformer.{their}.lora_B.weight"] = up
    return {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def _split(module: str, factors: Factors, parts: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """(down, up) of each part with the scale in up; (None, None) for parts that the LoRA leaves as they are."""
    if module == SWAPPED:
        factors = _swapped(factors)
    down, up = factors.down, factors.up
    if factors.scale != 1:
        scaled = factors.scale * up.float()
        narrow = scaled.to(up.dtype)
        up = narrow if torch.equal(narrow.float(), scaled) else scaled
    used = up.ne(0).any(0)  # (rank,)
    split = []
    for part in split_rows(up, parts, down.shape[1]):
        if used.any() and not part.any():
            split.append((None, None))
            continue
        mine = part.ne(0).any(0) | ~used  # of a block diagonal, each part gets back its own block
        split.append((down, part) if mine.all() else (down[mine], part[:, mine]))
    return split
