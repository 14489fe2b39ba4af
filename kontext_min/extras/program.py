"""How both programs end: with an exit code and one line; an error that you can fix shows no traceback.

0 done      1 stopped for a reason outside the program, or a bug      2 bad input      130 stopped by you
"""

import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kontext_min.extras import parallel, runs


def beside_the_programs(path: str) -> Path:
    """A path below the working directory, or where there is none, below the folder of train.py and sample.py."""
    return Path(path) if Path(path).exists() else Path(__file__).parents[2] / path


def restore_command(settings: Any, trained: dict[str, Path]) -> str:
    """The command that restores a picture with what train.py has trained, for the shell of this system.

    Args:
        settings: of train.py, as given; flags that load the base model are repeated.
        trained: the flag of the result and its path.
    """
    words = [_near(Path(sys.executable)), _near(Path(__file__).parents[2] / "sample.py")]
    words += ["--input", "PICTURE", "--output", "restored.png"]
    for name in ("weights", "transformer", "vae", "clip", "t5", "quantize", "device", "dtype", "stream"):
        value = trained.get(name, getattr(settings, name))
        if value == type(settings).__dataclass_fields__[name].default:
            continue
        words += [f"--{name}"] + [str(value)] * (value is not True)
    words += ["--lora", str(trained["lora"])] if "lora" in trained else []
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _near(path: Path) -> str:
    """A path from the working directory, if it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run(name: str, program: Callable[[Any], int], settings: Any, stopped: str = "stopped") -> int:
    """The exit code of a program; `stopped` is what to print after Ctrl-C."""
    for stream in ("stdout", "stderr"):  # None if they were closed before the start: `sample.py >&-`
        setattr(sys, stream, getattr(sys, stream) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        return program(settings)
    except runs.Stopped as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads the output any more: `sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: {stopped}", file=sys.stderr)
        return 130
    except Exception:  # shown here and not by the interpreter, which would keep the loader's processes alive for it
        traceback.print_exc()
        return 1
    finally:
        runs.close_run()
        parallel.finish()
