"""Export a LoRA for other programs: convert its file to another format, or merge it into the base model.

    python -m kontext_min.extras.export convert IN OUT --format peft          from any known format to kohya or peft
    python -m kontext_min.extras.export merge OUT --weights BASE --lora a.safetensors=0.8 --lora b.safetensors

Merging adds each correction to its weight in float32 and rounds the sum once, W' = round(W + scale * B A), to the dtype
of the weight, to bfloat16 where the base is stored in 8 bits, or to fp8:

    codes = e4m3(W' / s)      s = max|W'| / 448, one float32 per matrix; 448 is the largest e4m3 number

A correction smaller than half a rounding step of its weight is lost. The command prints how many are (docs/lora.md has
figures). `--lora` keeps the LoRA apart from the base, so nothing is rounded.

fp8 files have the layout that ComfyUI reads as scaled fp8: each matrix as `weight` (e4m3) and `scale_weight`, the rest
in bfloat16, and a marker `scaled_fp8`. Its two elements tell ComfyUI to widen the weights before it multiplies. An
empty marker lets it multiply in fp8, which needs a `scale_input` measured on the inputs of each Linear.

Sources: ComfyUI (October 2025), comfy/model_detection.py `model_config_from_unet`, comfy/ops.py `scaled_fp8_ops`, and
Comfy-Org/flux1-kontext-dev_ComfyUI, flux1-dev-kontext_fp8_scaled.safetensors.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kontext_min.checkpoints import flux_modules, load_flux
from kontext_min.extras import program
from kontext_min.extras.base import check_files, dtypes, training_of
from kontext_min.extras.fingerprint import fingerprint
from kontext_min.extras.lora_files import (
    BRIDGE,
    FILES,
    FORMATS,
    load_lora,
    lora_file,
    note_doubts,
    note_other_base,
    parse,
    purpose,
    read_lora,
    strength_of,
    write_lora,
)
from kontext_min.extras.saving import save_file, save_flux
from kontext_min.flux import Flux, FluxParams
from kontext_min.lora import linears, lora_layers

FP8 = torch.float8_e4m3fn


def convert(source: str | Path, target: str | Path, format: str, drop: Sequence[str] = ()) -> str:
    """Write a LoRA file of any format in another one; what its header says of the training stays.

    Args:
        source: the file, or a folder that holds it.
        target: where to write; must not exist.
        format: one of FORMATS.
        drop: prefixes of tensors to leave out, such as those of text encoders.

    Returns:
        One line about the new file.

    Raises:
        OSError, ValueError: as for read_lora and parse; a target that exists, or a folder that can't be written to.
    """
    _prepare(Path(target))
    tensors, metadata = read_lora(source)
    note_doubts(source, tensors, metadata)
    for prefix in drop:
        if not any(name.startswith(prefix) for name in tensors):
            raise ValueError(f"--drop {prefix}: no tensor of {source} starts so; leave it out.")
    kept = {name: x for name, x in tensors.items() if not name.startswith(tuple(drop))}
    if not kept:
        raise ValueError(f"--drop {' '.join(drop)}: leaves no tensor of {source}.")
    lora = parse(kept, metadata, flux_modules(FluxParams()), lora_file(source))
    _prepare(Path(target))  # again: a file may have come since
    write_lora(target, lora, format, metadata)
    left_out = f", {len(tensors) - len(kept)} tensors left out" if len(kept) < len(tensors) else ""
    ranks = ", ".join(map(str, sorted({f.rank for f in lora.values()})))
    return f"{target}: {format}, {len(lora)} modules, rank {ranks}{left_out}"


def _prepare(output: Path, folder: bool = False) -> None:
    """Before the work: replace nothing, which may be an input or a base model, and have a place to write to."""
    if output.exists() and not (folder and output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists already; name another place, or remove it first.")
    if folder and output.suffix == ".safetensors":
        raise ValueError(f"{output}: the hub layout is a folder; name one, or add --layout bfl for a file.")
    if output.name in FILES[1:] and output.with_name("adapter_config.json").is_file():
        raise ValueError(f"{output}: adapter_config.json beside it would count its alpha again; choose another folder.")
    parent = output.absolute().parent
    with suppress(OSError):
        parent.mkdir(parents=True, exist_ok=True)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{output}: can't write into {parent}; name another place.")


@dataclass
class Rounding:
    """What was lost when corrections were rounded into weights."""

    entries: int = 0  # weights whose correction is not 0
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


def narrow(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, in) float32 -> the same as stored, and the float32 scalar that multiplies it: 1 but for fp8."""
    scale = weight.abs().amax().clamp(min=1e-30) / torch.finfo(FP8).max if dtype == FP8 else torch.ones(())
    return (weight / scale).to(dtype), scale


@torch.no_grad()
def merge(model: Flux, dtype: torch.dtype | None = None) -> Rounding:
    """Merge every LoRA of a model into its weights, in place: float32 arithmetic, one rounding.

    Args:
        model: a Flux with LoRAs on plain Linears, which return to their places.
        dtype: of all weights; None keeps each weight's own. float8_e4m3fn makes the model one to save, not to run:
            every Linear holds codes and gets a buffer `scale_weight`.

    Returns:
        What the rounding took.
    """
    rounding, layers = Rounding(), lora_layers(model)
    for name, linear in linears(model).items():
        name = name.removesuffix(".base")
        before, to = linear.weight, dtype or linear.weight.dtype
        if name in layers:
            layer, linear = layers[name], layers[name].base
            before, to = linear.weight.float(), dtype or linear.weight.dtype
            correction = layer.scale * (layer.lora_B @ layer.lora_A)
            exact = before + correction
            (plain, plain_scale), (codes, scale) = narrow(before, to), narrow(exact, to)
            rounding.entries += int(correction.count_nonzero())
            rounding.lost += int(((codes.float() == plain.float()) & (correction != 0)).sum())
            rounding.correction += float(correction.square().sum())
            rounding.error += float((codes.float() * scale - exact).square().sum())
            rounding.error_of_base += float((plain.float() * plain_scale - before).square().sum())
            model.set_submodule(name, linear)
        elif to == before.dtype:
            continue  # stays mapped to its file
        else:
            codes, scale = narrow(before.float(), to)
        linear.weight = nn.Parameter(codes, requires_grad=False)
        if to == FP8:
            linear.register_buffer("scale_weight", scale)
    rest = torch.bfloat16 if dtype == FP8 else dtype
    for parameter in (p for p in model.parameters() if rest and p.ndim == 1):
        parameter.data = parameter.data.to(rest)
    return rounding


def save_bfl(model: Flux, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a transformer as BFL's single file has it, or, after a merge to fp8, as ComfyUI's scaled fp8 has it."""
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if any(x.dtype == FP8 for x in state.values()):
        state["scaled_fp8"] = torch.zeros(2, dtype=FP8)  # two elements: see the top of this file
    axes = model.params.axes_dim
    if axes != FluxParams().axes_dim:  # no shape tells them, and this layout has no config.json: see checkpoints.told
        metadata = {**(metadata or {}), "config": json.dumps({"axes_dims_rope": axes})}
    save_file(state, Path(path), {"format": "pt", **(metadata or {})})


def merge_files(
    base: Path, loras: Sequence[str], output: Path, layout: str, dtype: torch.dtype | None = None
) -> Rounding:
    """Merge LoRA files into a base model and write the whole transformer.

    Takes the memory of the output; an 8-bit base is widened to float32 first, 48 GB for the official size.

    Args:
        base: file or folder of the transformer, as for load_flux.
        loras: FILE or FILE=STRENGTH.
        output: a folder for `hub`, a file for `bfl`; must not exist.
        layout: hub or bfl.
        dtype: of the weights; None keeps that of the base, or bfloat16 if the base is stored in 8 bits.

    Raises:
        ValueError: fp8 in the hub layout, which has no place for scales; or as for load_flux and load_lora.
    """
    if layout == "hub" and dtype == FP8:
        raise ValueError(f"{output}: the hub layout has no 8-bit weights; add --layout bfl.")
    _prepare(output, folder=layout == "hub")
    about = purpose(loras)
    check_files(base, "transformer")
    note_other_base(" + ".join(loras), about, {"base": fingerprint(base, "transformer")})
    about = training_of(base)[1] | about  # as sample.py takes them
    is_narrow = any(stored.endswith("8") or stored.startswith("F8") for stored in dtypes(base))
    flux = load_flux(base, dtype=torch.float32 if is_narrow else None)
    for lora in loras:
        load_lora(flux, *strength_of(lora))
    rounding = merge(flux, dtype or (torch.bfloat16 if is_narrow else None))
    merged = [*about.get("merged", ()), *(Path(lora).name for lora in loras)]
    header = {"kontext_min": json.dumps(about | {"merged": merged})}
    _prepare(output, folder=layout == "hub")  # again: a file may have come since
    (save_flux if layout == "hub" else save_bfl)(flux, output, header)
    return rounding


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert", help="write a LoRA file in another format", allow_abbrev=False)
    one.add_argument("source", metavar="IN", type=Path, help="a LoRA file of any format that is read")
    one.add_argument("target", metavar="OUT", type=Path, help="where to write")
    one.add_argument("--format", choices=FORMATS, default="kohya", help="of OUT (default kohya)")
    help = "leave out tensors whose names start with this, e.g. lora_te1_ (text encoder); may be repeated"
    one.add_argument("--drop", action="append", default=[], metavar="PREFIX", help=help)
    two = commands.add_parser("merge", help="merge LoRAs into the base, write a whole transformer", allow_abbrev=False)
    two.add_argument("output", metavar="OUT", type=Path, help="a folder (hub) or a file (bfl)")
    two.add_argument("--weights", type=Path, required=True, help="folder of the base model, or its transformer's file")
    help = "LoRA file, with =0.8 after it for its strength; may be repeated"
    two.add_argument("--lora", action="append", required=True, metavar="FILE[=STRENGTH]", help=help)
    two.add_argument("--layout", choices=("hub", "bfl"), default="hub", help="of OUT (default hub)")
    narrowed = two.add_mutually_exclusive_group()
    narrowed.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: the base's)")
    help = "half the size of bfloat16, with --layout bfl: ComfyUI's scaled fp8"
    narrowed.add_argument("--quantize", choices=("fp8",), help=help)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": FP8}

    def export(args: argparse.Namespace) -> int:
        if args.command == "convert":
            target, about = args.target, purpose([str(args.source)])
            print(convert(args.source, target, args.format, args.drop))
        else:
            target, dtype = args.output, dtypes.get(args.dtype or args.quantize)
            rounding = merge_files(args.weights, args.lora, target, args.layout, dtype)
            print(f"{target}: {args.layout}, {' + '.join(args.lora)} merged; {rounding}")
            about = training_of(target)[1]
        if target.suffix != ".safetensors" and target.is_file():
            print(f"note: {target}: is a file; other programs look for names that end with .safetensors")
        if about.get("objective") == "bridge":
            print(f"{target}: {BRIDGE}")
            if args.command == "merge":
                print(f"{target}: holds the LoRA already; sample.py --transformer {target} restores without --lora")
        return 0

    return program.run("export", export, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
