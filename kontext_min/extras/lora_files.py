"""LoRA files: saved, loaded, several at once, converted, merged into the base.

    python -m kontext_min.extras.lora_files convert IN OUT --format peft      any format that is read, to kohya or peft
    python -m kontext_min.extras.lora_files merge OUT --weights BASE --lora a.safetensors=0.8 --lora b.safetensors

Two formats are written, the two that ComfyUI and diffusers both read at the strength that was trained (lora_formats.py
has the names, and reads seven more):

* `kohya`, the default: A, B and alpha as they were trained, and the smaller one, since q, k, v and mlp share one A.
  Alpha is a tensor of its own: kept in a header alone, ComfyUI would ignore it. diffusers takes the modules of the
  blocks from it and drops what lies outside of them (`--lora-targets all`: img_in, txt_in, time_in, vector_in,
  guidance_in, final_layer), and knows linear1 at the official width only.
* `peft`: q, k, v and mlp apart, alpha / rank multiplied into B. For LoRAs with modules outside of the blocks, and for
  models of another width in diffusers.

The header holds what the LoRA was trained for (`kontext_min`, JSON) and the fields that model managers show (ss_*,
modelspec). A `bridge` LoRA says there, and when it is used, that only sample.py follows its path: it starts from the
degraded picture, where every other program starts from noise. A `kontext` LoRA is an ordinary Kontext LoRA.

Merging is done in float32 and rounded once, to the dtype of the weight or to int8 or fp8 codes, and says what was lost:
a correction smaller than half a step of its weight leaves it as it was (figures are in docs/lora.md). Beside the base,
with `--lora`, a LoRA is never rounded.

Sources: kohya-ss/sd-scripts 48d368f, library/sai_model_spec.py and train_network.py (metadata).
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kontext_min.checkpoints import WIDENED, find, load_flux, read_headers, save_file, save_flux
from kontext_min.extras.lora_formats import FORMATS, Factors, Sizes, emit, parse
from kontext_min.extras.quantize import QuantizedLinear, dequantize, storage
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import LoRALinear, linears, lora_layers
from kontext_min.names import flux_modules

BRIDGE_ONLY = "made for a bridge: only sample.py follows its path; other programs start from noise, where it is lost"

# -------------------------------------------------------------------------------------------------- files and headers


def write_lora(path: str | Path, lora: Mapping[str, Factors], format: str, metadata: Mapping[str, str]) -> None:
    """Write one correction a module; arguments as for save_lora and lora_formats.emit."""
    tensors = emit(lora, flux_modules(FluxParams()), format)
    shown = _shown(lora, format, metadata)
    header = {"format": "pt", **shown, **metadata}
    header |= {key: shown[key] for key in ("ss_network_dim", "ss_network_alpha")}  # of this file, not of one it is from
    header.pop("lora_adapter_metadata", None)  # likewise: alpha stands in the tensors now
    save_file(tensors, Path(path), header)


def _shown(lora: Mapping[str, Factors], format: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The fields that model managers show, from the LoRA and from what `kontext_min` says of its training."""
    about = trained_with(metadata)
    ranks = {f.rank for f in lora.values()}
    alphas = {f.rank if format == "peft" else round(f.alpha, 6) for f in lora.values()}
    shown = {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(alphas.pop())) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": "flux1",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": f"FLUX.1-Kontext, {about.get('degrade', 'LoRA')}",
    }
    if about.get("objective") == "bridge":
        shown["modelspec.usage_hint"] = BRIDGE_ONLY
    elif "objective" in about:
        shown["modelspec.usage_hint"] = "with the degraded picture as FLUX.1-Kontext's reference, and this prompt"
    names = {"lr": "ss_learning_rate", "steps": "ss_steps", "seed": "ss_seed", "guidance": "ss_guidance_scale",
             "pictures_a_batch": "ss_total_batch_size", "prompt": "modelspec.trigger_phrase"}  # fmt: skip
    shown |= {theirs: str(about[ours]) for ours, theirs in names.items() if ours in about}
    if "resolution" in about:
        size = f"{about['resolution']}x{about['resolution']}"
        shown |= {"ss_resolution": size, "modelspec.resolution": size}
    return shown


def trained_with(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What train.py wrote into a LoRA's header; empty for LoRAs of other trainers."""
    try:
        known = json.loads(metadata.get("kontext_min", "{}"))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file; of peft's save_pretrained, adapter_config.json beside it is metadata too.

    Raises:
        FileNotFoundError: no such file. ValueError: not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file; train one with train.py or check the path.")
    read_headers([path])  # says what is wrong with a file that is cut or none
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, this is no dict
            metadata = f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); write or download it again.") from None
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        metadata["lora_adapter_metadata"] = config.read_text(encoding="utf-8")
    return tensors, metadata


def strength_of(text: str) -> tuple[Path, float]:
    """`file.safetensors=0.8` -> (file.safetensors, 0.8); the strength is 1 where none is given."""
    match = re.fullmatch(r"(.+)=([-+]?(\d+\.?\d*|\.\d+))", text)
    return (Path(match[1]), float(match[2])) if match else (Path(text), 1.0)


def purpose(loras: Sequence[str]) -> dict[str, Any]:
    """What several LoRAs (FILE or FILE=STRENGTH) were trained for: each setting from the first that has it.

    Raises:
        FileNotFoundError, ValueError: as for read_lora; or they follow different paths, which no sampler can at once.
    """
    known: dict[str, Any] = {}
    for lora in loras:
        about = trained_with(read_lora(strength_of(lora)[0])[1])
        for key in ("objective", "context", "source_noise", "start_time"):
            if key in about and known.get(key, about[key]) != about[key]:
                raise ValueError(
                    f"--lora {lora}: was trained with {key} {about[key]}, the one before it with {known[key]}; "
                    "LoRAs of one picture must follow one path."
                )
        known = about | known
    return known


# ------------------------------------------------------------------------------------------------ models and their LoRA


def save_lora(
    model: Flux,
    path: str | Path,
    format: str = "kohya",
    metadata: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA of a model, aside first and then renamed, so that the file is whole or absent.

    Args:
        model: with LoRALinear layers.
        path: of the safetensors file.
        format: one of FORMATS.
        metadata: text by name, kept in the header, where rank, alpha and what managers show are added.
        tensors: values by parameter name instead of the model's own: gathered from several processes, or averaged.

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
    write_lora(path, lora, format, metadata or {})


def outside_of_blocks(model: Flux) -> list[str]:
    """Modules with a LoRA that diffusers drops when it reads them from a kohya file."""
    return [name for name in lora_layers(model) if not name.startswith(("double_blocks.", "single_blocks."))]


def _sizes(model: Flux) -> Sizes:
    """(out, in) of every Linear by its official name, whatever it is stored as and whether a LoRA is on it."""
    return {name.removesuffix(".base"): (m.out_features, m.in_features) for name, m in linears(model).items()}


@torch.no_grad()
def load_lora(model: Flux, path: str | Path, strength: float = 1.0) -> dict[str, str]:
    """Put the LoRA of a file on a model; nothing is dropped: each tensor is used or named in the error.

    Several calls add up. On a Linear that has a LoRA already the ranks are joined, which is exact:
    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].

    Args:
        model: a Flux; changed in place, if the file fits.
        path: of the file, in any format of lora_formats.py.
        strength: multiplies the correction; 1 is what was trained.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError, ValueError: no such file; not a plain, whole LoRA of this model.
    """
    tensors, metadata = read_lora(path)
    device = next(model.parameters()).device
    for name, (down, up, alpha) in parse(tensors, metadata, flux_modules(model.params), path, _sizes(model)).items():
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


@torch.no_grad()
def init_lora(model: Flux, path: str | Path) -> None:
    """Start the LoRA that add_lora put on a model from that of a file.

    Where the model's rank is higher, the rows of A that the file has not keep their random start and their columns of B
    are zero, as at any start; modules that the file has not start at zero. So the first step runs what the file holds.

    Raises:
        FileNotFoundError, ValueError: as for load_lora; a module without a LoRA on the model; a lower rank.
    """
    tensors, metadata = read_lora(path)
    lora, layers = parse(tensors, metadata, flux_modules(model.params), path, _sizes(model)), lora_layers(model)
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


# ----------------------------------------------------------------------------------------------- merging and converting


@dataclass
class Rounding:
    """What was lost when corrections were rounded into weights."""

    entries: int = 0  # of the weights, those whose correction is not 0
    lost: int = 0  # of them, those that are stored as if there were no correction
    correction: float = 0.0  # sum of squares
    error: float = 0.0  # of the merged weights as stored, sum of squares
    error_of_base: float = 0.0  # the same without any correction: what storing the base costs anyway

    def __str__(self) -> str:
        share = 100 * self.lost / max(self.entries, 1)
        merged, base = (100 * (e / max(self.correction, 1e-30)) ** 0.5 for e in (self.error, self.error_of_base))
        return (
            f"{share:.2f} % of {self.entries:,} corrected weights are stored as if there were no correction; rounding "
            f"errors are {merged:.3g} % of the correction (RMS), and {base:.3g} % where the base is stored without it"
        )


def _weight(linear: nn.Module) -> Tensor:
    """(out, in) float32, whatever it is stored as."""
    return linear.dequantize() if isinstance(linear, QuantizedLinear) else linear.weight.float()


def _codes(linear: nn.Module) -> Tensor:
    """(out, in) float32: the value that each weight is stored as, before the scale, which follows a correction."""
    if isinstance(linear, QuantizedLinear) and linear.scales is not None:
        shape = linear.out_features, linear.in_features
        return dequantize(linear.codes, torch.ones_like(linear.scales), shape, torch.float32)
    return _weight(linear)


def _stored(base: nn.Module, weight: Tensor, kind: str | None, dtype: torch.dtype | None) -> nn.Module:
    """A layer like `base` with another weight, (out, in) float32, rounded once: to codes, a dtype, or as base is."""
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    linear.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
    if isinstance(base, QuantizedLinear) and not kind and not dtype:
        of_codes = {torch.int8: "int8", torch.uint8: "nf4"}.get(base.codes.dtype, "fp8")
        kind = "stored" if base.scales is None else of_codes
        dtype = base.codes.dtype if base.scales is None else None
    stored = torch.float32 if kind not in (None, "stored") else dtype or base.weight.dtype
    linear.weight = nn.Parameter(weight.to(stored), requires_grad=False)
    return QuantizedLinear.from_linear(linear, kind) if kind else linear


@torch.no_grad()
def merge(model: nn.Module, quantize: str | None = None, dtype: torch.dtype | None = None) -> Rounding:
    """Merge every LoRA of a model into its weights, in place: float32 arithmetic, one rounding, and what that took.

    Args:
        model: with LoRAs on plain or quantised Linears. Each stays what it is unless the other arguments say so; codes
            are made anew, with scales that follow the sum.
        quantize: int8, fp8 or nf4: store the blocks so. The sum goes straight to codes; merging into bfloat16 and
            quantising after would round it twice: more squared error, by 7 % in int8 and 0.5 % in fp8 on weights/tiny
            (`pytest -s -k straight tests/test_lora_files.py`).
        dtype: of all that `quantize` does not store as codes; else each weight keeps its own.
    """
    rounding = Rounding()
    for name, layer in lora_layers(model).items():
        kind = storage(name, quantize) if quantize else None
        before, correction = _weight(layer.base), layer.scale * (layer.lora_B @ layer.lora_A)
        exact = before + correction
        plain, merged = (_stored(layer.base, weight, kind, dtype) for weight in (before, exact))
        rounding.entries += int(correction.count_nonzero())
        rounding.lost += int(((_codes(merged) == _codes(plain)) & (correction != 0)).sum())
        rounding.correction += float(correction.square().sum())
        rounding.error += float((_weight(merged) - exact).square().sum())
        rounding.error_of_base += float((_weight(plain) - before).square().sum())
        model.set_submodule(name, merged)
    for name, linear in linears(model).items():  # those without a LoRA
        kind = storage(name, quantize) if quantize else None
        if (kind and isinstance(linear, nn.Linear)) or (dtype and not kind and isinstance(linear, QuantizedLinear)):
            model.set_submodule(name, _stored(linear, _weight(linear), kind, dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return rounding


def convert(source: str | Path, target: str | Path, format: str, drop: Sequence[str] = ()) -> str:
    """Write a LoRA file of any format in another; what it says in its header stays.

    Args:
        source: the file.
        target: where to write.
        format: one of FORMATS.
        drop: beginnings of the names of tensors to leave out, such as those of text encoders.

    Returns:
        One line about it.
    """
    tensors, metadata = read_lora(source)
    kept = {name: x for name, x in tensors.items() if not name.startswith(tuple(drop))}
    lora = parse(kept, metadata, flux_modules(FluxParams()), source)
    write_lora(target, lora, format, metadata)
    left_out = f", {len(tensors) - len(kept)} tensors left out" if len(kept) < len(tensors) else ""
    ranks = ", ".join(map(str, sorted({f.rank for f in lora.values()})))
    return f"{target}: {format}, {len(lora)} modules, rank {ranks}{left_out}"


def save_bfl(model: Flux, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a transformer as BFL's single file has it, its sizes in the header's `config`.

    Quantised Linears are stored as `weight` (codes) and `scale_weight` (one float32 a row), as ComfyUI's scaled fp8 has
    them but for the rows: load_flux reads them, with `kind` as codes; ComfyUI knows one scale a matrix only.
    """
    state = {}
    for name, x in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        leaf = {"codes": "weight", "scales": "scale_weight"}.get(leaf, leaf)
        state[f"{module}.{leaf}"] = x.detach().cpu().contiguous()
    header = {"format": "pt", "config": json.dumps(asdict(model.params)), **(metadata or {})}
    save_file(state, Path(path), header)


def merge_files(
    base: Path, loras: Sequence[str], output: Path, layout: str, dtype: torch.dtype | None, quantize: str | None
) -> Rounding:
    """Merge LoRA files into a base model and write the whole transformer; takes the memory of the model.

    Args:
        base: file or folder of the transformer, as for load_flux.
        loras: FILE or FILE=STRENGTH.
        output: a folder for `hub`, a file for `bfl`.
        layout: hub or bfl.
        dtype: of the weights; else as they are stored.
        quantize: int8 or fp8: the weights of the blocks as codes.

    Raises:
        ValueError: codes in the hub layout, which has no place for scales; or as for load_flux and load_lora.
    """
    narrow = any(stored.dtype in WIDENED for stored in read_headers(find(base, "transformer")).values())
    if layout == "hub" and (quantize or (narrow and not dtype)):
        raise ValueError(f"{output}: the hub layout has no 8-bit weights; use --layout bfl, or --dtype bfloat16.")
    flux = load_flux(base, dtype=torch.bfloat16 if narrow else None, kind="stored")
    for lora in loras:
        load_lora(flux, *strength_of(lora))
    rounding = merge(flux, quantize, dtype)
    metadata = {"kontext_min": json.dumps(purpose(loras) | {"merged": [Path(lora).name for lora in loras]})}
    if layout == "hub":
        save_flux(flux, output, metadata)
    else:
        save_bfl(flux, output, metadata)
    return rounding


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="lora_files", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert", help="write a LoRA file in another format", allow_abbrev=False)
    one.add_argument("source", metavar="IN", type=Path, help="a LoRA file of any format that is read")
    one.add_argument("target", metavar="OUT", type=Path, help="where to write")
    one.add_argument("--format", choices=FORMATS, default="kohya", help="of OUT (default kohya)")
    help = "leave out tensors whose names begin so, e.g. lora_te1_ (text encoder); may be repeated"
    one.add_argument("--drop", action="append", default=[], metavar="PREFIX", help=help)
    two = commands.add_parser("merge", help="merge LoRAs into the base, write a whole transformer", allow_abbrev=False)
    two.add_argument("output", metavar="OUT", type=Path, help="a folder (hub) or a file (bfl)")
    two.add_argument("--weights", type=Path, required=True, help="folder of the base model, or its transformer's file")
    help = "LoRA file, =0.8 behind it sets its strength; may be repeated"
    two.add_argument("--lora", action="append", required=True, metavar="FILE[=STRENGTH]", help=help)
    two.add_argument("--layout", choices=("hub", "bfl"), default="hub", help="of OUT (default hub)")
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    two.add_argument("--dtype", choices=dtypes, help="of the weights; else as they are stored")
    help = "keep the blocks as codes, with layout bfl: half the size, read by this project only"
    two.add_argument("--quantize", choices=("int8", "fp8"), help=help)
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            print(convert(args.source, args.target, args.format, args.drop))
        else:
            dtype = dtypes.get(args.dtype)
            rounding = merge_files(args.weights, args.lora, args.output, args.layout, dtype, args.quantize)
            print(f"{args.output}: {args.layout}, {' + '.join(args.lora)} merged; {rounding}")
            if purpose(args.lora).get("objective") == "bridge":
                print(f"{args.output}: {BRIDGE_ONLY}")
    except (ValueError, OSError) as error:
        print(f"lora_files: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
