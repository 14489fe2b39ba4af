"""How both programs end: with an exit code and one line; an error that you can fix shows no traceback.

0 done      1 stopped for a reason outside the program, or a bug      2 bad input      130 stopped by you
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from kontext_min.extras import parallel, runs
from kontext_min.extras.flags import as_words

# Here, and not in a function: where loader workers do not fork, they import this file.
if limit := os.environ.get("KONTEXT_MAX_PIXELS"):
    if not re.fullmatch(r"[1-9]\d{0,17}(e\d{1,2})?", limit):
        what = f"KONTEXT_MAX_PIXELS: got {limit!r}, expected a number of pixels, such as 5e8."
        print(f"{Path(sys.argv[0]).name}: {what}", file=sys.stderr)
        sys.exit(2)
    Image.MAX_IMAGE_PIXELS = int(float(limit)) // 2  # Pillow refuses twice as many

MEMORY = "out of memory; --plan shows what it takes, docs/troubles.md what to do; what is written is whole"
FATAL = {  # what an error's text has, and what is said
    "OutOfMemoryError": MEMORY,
    "MemoryError": MEMORY,
    "can't allocate memory": MEMORY,
    "is killed by signal": "a loader worker was killed, perhaps for want of memory; the same command continues from "
    "the last checkpoint, and a smaller --workers takes less",
}


def beside_the_programs(path: str) -> Path:
    """A path below the working directory, or where there is none, below the folder of train.py and sample.py."""
    return Path(path) if Path(path).exists() else Path(__file__).parents[2] / path


def done(settings: Any, folder: Path) -> str:
    """What the end of a run of train.py says: where to look, and how to restore with it."""
    return f"done; curves and pictures: {folder}/report.html; restore with\n    {restore_command(settings, folder)}"


def restore_command(settings: Any, folder: Path) -> str:
    """The command that restores a picture with what train.py has trained, for the shell of this system.

    Args:
        settings: of train.py, as given; flags that load the base model are repeated.
        folder: of the run.
    """
    words = [_near(Path(sys.executable)), _near(Path(__file__).parents[2] / "sample.py")]
    words += ["--input", "PICTURE", "--output", "restored.png"]
    values = {}
    for name in ("weights", "transformer", "vae", "clip", "t5", "quantize", "device", "stream"):
        value = folder / "transformer" if settings.full and name == "transformer" else getattr(settings, name)
        if value != type(settings).__dataclass_fields__[name].default:
            values[name] = value
    words += as_words(values | ({} if settings.full else {"lora": folder / "lora.safetensors"}))
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _near(path: Path) -> str:
    """A path from the working directory, if it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run(name: str, program: Callable[[Any], int], settings: Any) -> int:
    """The exit code of a program."""
    code = _attempt(name, program, settings)
    runs.close_run()
    return parallel.finish(code)


def _more(error: BaseException) -> str:
    """What a part of the program has to add to an error on its way."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _one_line(text: str) -> str:
    """A text without the middle of a very long value, and with the control characters of a file's name spelled out."""
    text = text if len(text) < 2000 else f"{text[:1000]} ... {text[-500:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _attempt(name: str, program: Callable[[Any], int], settings: Any) -> int:
    for stream in ("stdout", "stderr"):  # None if they were closed before the start: `sample.py >&-`
        setattr(sys, stream, getattr(sys, stream) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if hasattr(getattr(sys, stream), "reconfigure"):  # a name that the terminal lacks letters for is no error
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    runs.on_stop(signal.default_int_handler)  # `kill` and a closed terminal end a program as Ctrl-C does
    try:
        return program(settings)
    except runs.Stopped as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        try:
            if getattr(error, "errno", None) and error.filename is None:
                print(flush=True)  # fails again if that was the cause: `sample.py ... | head`, `> /dev/full`
        except OSError as reason:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            print(f"{name}: stopped, its output can't be printed: {reason.strerror}{_more(error)}", file=sys.stderr)
            return 1
        print(_one_line(f"{name}: {runs.in_words(error)}{_more(error)}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{name}: stopped{_more(error)}", file=sys.stderr)
        return 130
    except Exception as error:
        if str(error).startswith("Symlink loop"):  # of Path.resolve
            print(f"{name}: {error}: a link that leads to itself; name another path", file=sys.stderr)
            return 2
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            many = "RecompileLimit" in type(error).__name__  # such as a LoRA whose modules have many ranks
            then = "" if many else "install a C++ compiler, or "
            print(f"{name}: --compile: {str(error).splitlines()[0]}; {then}leave --compile out", file=sys.stderr)
            return 2
        if reason := next((line for sign, line in FATAL.items() if sign in f"{type(error).__name__}: {error}"), None):
            print(f"{name}: {reason}{_more(error)}", file=sys.stderr)
            return 1
        if parallel.lost_another(error):
            print(f"{name}: another process of this run ended, so this one stops; the same command continues from "
                  "the last checkpoint", file=sys.stderr)  # fmt: skip
            return 1
        # Shown here and not by the interpreter, which would keep the loader's processes alive for it
        traceback.print_exc()
        return 1
