"""Make a command line from a dataclass: you declare each setting once, with its default, range, help and group.

    @dataclass(frozen=True)
    class Settings:
        lr: float = flag("training", 1e-4, "peak learning rate", least=1e-9, most=1)

becomes `--lr LR`. Bad input ends with exit code 2 and one line: the flag, what was given, what is expected.
"""

import argparse
import dataclasses
import difflib
import math
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
TINY = 1e-3  # a positive number below it has no effect


def flag(
    group: str,
    default: Any,
    help: str,
    choices: Iterable[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    bare: str | None = None,
    there: str | None = None,
) -> Any:
    """A field of a settings dataclass with the values it allows.

    `default=...` (Ellipsis) makes it required; `bare` is its value where the flag is given without one; `there` is what
    its path must lead to: "folder" or "file or folder".
    """
    metadata = {"help": help, "group": group, "choices": tuple(choices) if choices else None}
    metadata |= {"least": least, "most": most, "bare": bare, "there": there}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def name_of(field: str) -> str:
    """hr_root -> --hr-root."""
    return "--" + field.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """Without the usage of fifty flags before the line that counts."""

    def error(self, message: str) -> NoReturn:
        message = message if len(message) < 400 else f"{message[:200]} ... {message[-100:]}"
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        self.exit(2, f"{self.prog}: {message}. --help shows all flags.\n")


def _not_empty(kind: type) -> Callable[[str], Any]:
    """Read one value. Path("") would be the working directory, and an empty prompt would mean the default."""

    def read(text: str) -> Any:
        if not text.strip():
            raise argparse.ArgumentTypeError("got an empty value; give one, or leave the flag out")
        if text[-1] in "\r\n":
            raise argparse.ArgumentTypeError(f"got {text!r:.99}, with a line end; save the script with Unix line ends")
        return Path(os.path.expanduser(text)) if kind is Path else kind(text)  # the shell leaves ~ in --flag=~/folder

    read.__name__ = kind.__name__  # argparse names it: invalid int value
    return read


def parse_flags(settings: type[T], argv: Sequence[str] | None, description: str, epilog: str = "") -> T:
    """Fill a settings dataclass from the command line, or end the program with exit code 2 and one line.

    Args:
        settings: a dataclass whose fields were made by `flag`; `tuple[str, ...]` fields are flags that may be repeated.
        argv: the arguments, or None for those of the process.
        description: first lines of --help.
        epilog: last lines of --help.
    """
    parser = _Parser(
        prog=f"{Path(sys.modules[settings.__module__].__file__ or '').stem}.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.usage = f"{parser.prog} [flags]"
    hints, groups, fields = typing.get_type_hints(settings), {}, dataclasses.fields(settings)
    required = [name_of(field.name) for field in fields if field.default is dataclasses.MISSING]
    for field in fields:
        group = field.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        name, kind = name_of(field.name), hints[field.name]
        default = None if name in required else field.default
        options: dict[str, Any] = {"default": default, "help": field.metadata["help"].replace("%", "%%")}
        if isinstance(kind, types.UnionType):  # Path | None and the like: None is only ever the default
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"action": "append", "type": _not_empty(typing.get_args(kind)[0]), "metavar": field.name.upper()}
            options["default"] = list(default or ())  # argparse appends to a copy of it
        else:
            options |= {"type": _not_empty(kind), "choices": field.metadata["choices"]}
            options["metavar"] = None if options["choices"] else field.name.upper()
            if field.metadata["bare"]:
                options |= {"nargs": "?", "const": field.metadata["bare"]}
        if name in required:
            options["help"] += " (required)"
        elif default is not None and default is not False and default != ():
            options["help"] += f" (default {default})"
        groups[group].add_argument(name, **options)
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        if word.endswith("=--"):  # argparse reads it as no value at all
            parser.error(f"{word}: -- is no value; give one, or leave the flag out")
    values, unknown = parser.parse_known_args(argv)
    if unknown and unknown[0].startswith(("\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2212")):
        parser.error(f"{unknown[0]}: starts with another dash than -; type it again")
    if unknown and unknown[0][:1] != "-":
        rule = "each flag takes one value, in quotes if it has blanks; for many pictures, name their folder"
        parser.error(f"{unknown[0]}: belongs to no flag; {rule}")
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.75)
        parser.error(f"{unknown[0]}: no such flag" + "".join(f"; did you mean {name}" for name in near))
    names = [word.partition("=")[0].replace("--no-", "--") for word in words]
    for field in fields if os.environ.get("RANK", "0") == "0" else ():  # the first of several processes speaks
        name = name_of(field.name)
        if names.count(name) > 1 and typing.get_origin(hints[field.name]) is not tuple:
            print(f"note: {name} is given {names.count(name)} times; only the last one counts")
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items()}
    missing = [name for name in required if found[name[2:].replace("-", "_")] is None]
    if missing:
        parser.error(f"{', '.join(missing)}: missing, but required")
    return settings(**found)


def check_values(settings: Any) -> None:
    """Check the range of every number, and that the files and folders to read are there.

    Raises:
        ValueError: a number is not finite or outside its range, or a file is not there or not yours; it names the flag.
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), name_of(field.name)
        if isinstance(value, Path):
            try:
                allowed = not value.is_dir() or os.access(value, os.R_OK | os.X_OK)
            except OSError as error:  # a name that is too long, or a folder above that may not be entered
                raise ValueError(f"{name} {str(value)[:200]}: {error.strerror}; check the path.") from None
            if not allowed:
                raise ValueError(f"{name} {value}: Permission denied; name another folder.")
        least, most, there = (field.metadata[key] for key in ("least", "most", "there"))
        if there and value and not (value.is_dir() or (there != "folder" and value.exists())):
            raise ValueError(f"{name} {value}: no such {there}; check the path.")
        if there and value and not (value.is_dir() or value.is_file()):
            raise ValueError(f"{name} {value}: a pipe or device; save what comes from it to a file first.")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        bounds = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        inside = (least is None or value >= least) and (most is None or value <= most)
        if not least and 0 < value < TINY:
            raise ValueError(f"{name}: got {value}, expected 0 or at least {TINY}.")
        if not (math.isfinite(value) and inside):
            raise ValueError(f"{name}: got {value}, expected {' and '.join(bounds) or 'a finite number'}.")


def changed(settings: Any) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return {f.name: v for f in dataclasses.fields(settings) if (v := getattr(settings, f.name)) != f.default}


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Settings by name as words of a command line; None is left out.

    A value that starts with a dash is joined to its flag, else it would be read as another flag.
    """
    words = []
    for name, value in values.items():
        flag = name_of(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            for word in map(str, value if isinstance(value, list | tuple) else [value]):
                words += [f"{flag}={word}"] if word.startswith("-") else [flag, word]
    return words


def given(settings: Any) -> str:
    """The settings that differ from their defaults, as they stand on a command line."""
    return shlex.join(as_words(changed(settings)))


def defaults(settings: Any, settled: dict[str, Any]) -> dict[str, Any]:
    """The default of every flag as plain JSON values; null where the flag is required.

    A flag of `settings` that was left at its default has the value that the program has put in its place in `settled`.
    """
    fields = dataclasses.fields(settings)
    found = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
    found |= {f.name: settled[f.name] for f in fields if getattr(settings, f.name) == f.default}
    return {k: _plain(v) for k, v in found.items()}


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values, paths as strings."""
    return {k: _plain(v) for k, v in vars(settings).items()}


def _plain(value: Any) -> Any:
    """A value as JSON has it: paths are strings, tuples lists."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
