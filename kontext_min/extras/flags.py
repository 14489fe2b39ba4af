"""Command lines made from a dataclass: each setting is written once, with its default, its help and its group.

    @dataclass(frozen=True)
    class Settings:
        lr: float = flag(1e-4, "learning rate at its peak", "training")

becomes `--lr LR`. `--help` shows groups, units and defaults; unknown flags and bad values end with exit code 2.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def flag(default: Any, help: str, group: str, choices: Sequence[str] | None = None, least: float | None = None) -> Any:
    """A field of a settings dataclass, with the least number allowed. `default=...` (Ellipsis) makes it required."""
    metadata = {"help": help, "group": group, "choices": choices, "least": least}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(settings: type[T], argv: Sequence[str] | None, description: str, epilog: str = "") -> T:
    """Fill a settings dataclass from the command line.

    Args:
        settings: a dataclass whose fields were made by `flag`; `tuple[str, ...]` fields are flags that may be repeated.
        argv: the arguments, or None for those of the process.
        description: first lines of --help.
        epilog: last lines of --help.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    hints, groups = typing.get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        group = field.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"default": None if required else field.default, "required": required}
        options["help"] = field.metadata["help"].replace("%", "%%")
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # Path | None and the like: None is only ever the default
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"action": "append", "type": typing.get_args(kind)[0], "metavar": field.name.upper()}
            options["default"] = list(options["default"] or ())  # argparse appends to a copy of it
        else:
            options |= {"type": kind, "choices": field.metadata["choices"]}
            options["metavar"] = None if options["choices"] else field.name.upper()
        if not required and field.default is not None and field.default is not False and field.default != ():
            options["help"] += f" (default {field.default})"
        groups[group].add_argument("--" + field.name.replace("_", "-"), **options)
    values = vars(parser.parse_args(argv))
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_numbers(settings: Any) -> None:
    """Look at every number of the settings.

    Raises:
        ValueError: one is not finite or less than the least allowed; it names the flag.
    """
    for field in dataclasses.fields(settings):
        value, least = getattr(settings, field.name), field.metadata["least"]
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: got {value}, expected a finite number.")
        if None not in (value, least) and value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}.")


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values, paths as strings."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
