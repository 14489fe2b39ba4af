"""What must be right before a program imports the rest: the packages and presets.toml. What is wrong is one line.

Older versions of Python can read this file.
"""

import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "safetensors", "sentencepiece", "PIL", "numpy", "einops")
PRESETS = Path(__file__).parents[1] / "presets.toml"


def problem(presets: Path = PRESETS) -> "str | None":
    """What is wrong, and what to do, or None."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"{sys.executable} is Python {sys.version.split()[0]}; expected 3.11 or later"
    import tomllib

    missing = [name for name in PACKAGES if not find_spec(name)]
    if missing:
        what = f"{sys.executable} lacks {', '.join(missing)}"
        return f"{what}; activate the environment (source .venv/bin/activate), or set it up as README says"
    try:
        for name, preset in tomllib.loads(presets.read_text(encoding="utf-8-sig")).items():
            texts = [preset.get(key) for key in ("spec", "prompt")] if isinstance(preset, dict) else []
            if not (re.fullmatch(r"[\w-]+", name) and texts and all(isinstance(text, str) for text in texts)):
                return f"{presets}: [{name}]: expected a name without blanks, and spec and prompt as texts in quotes"
    except (OSError, ValueError) as error:
        return f"{presets}: {error}; mend it, or take it back: git checkout {presets.name}"
    return None


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the packages load shows no traceback
found = problem()
if found:
    print(f"{Path(sys.argv[0]).name.replace('-m', 'kontext_min')}: {found}.", file=sys.stderr)
    sys.exit(2)
