"""Write the tables of files from the files themselves: name, lines, first line of the docstring.

python docs/files.py            rewrites them in README.md (core, programs) and docs/extras.md, between two marks
python docs/files.py --check    exit code 1 if a table is stale
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- files: made by docs/files.py -->", "<!-- end of files -->")
CORE = ["utils", "flux", "autoencoder", "t5", "clip", "flow", "lora", "degrade", "data", "checkpoints", "restore"]
SCRIPTS = ["train.py", "sample.py"]


def row(path: str) -> tuple[str, int, str]:
    """(name, lines, what its docstring says first)."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return path, len(text.splitlines()), (ast.get_docstring(ast.parse(text)) or "").splitlines()[0].rstrip(".:")


def extras() -> list[str]:
    """The files of extras/, by name."""
    folder = ROOT / "kontext_min" / "extras"
    return [f"kontext_min/extras/{p.name}" for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]


def table(paths: list[str]) -> str:
    """Rows of markdown, with the total of the lines."""
    rows = [row(path) for path in paths]
    lines = ["| file | lines | what it is |", "|---|--:|---|", *(f"| `{p}` | {n} | {what} |" for p, n, what in rows)]
    return "\n".join([*lines, f"| | {sum(n for _, n, _ in rows):,} | |"])


def core_and_scripts() -> str:
    """Core in reading order, then the two scripts."""
    return table([f"kontext_min/{name}.py" for name in CORE]) + "\n\n" + table(SCRIPTS)


def main(argv: list[str]) -> int:
    """Exit code 0, or 1 if --check finds a table stale."""
    stale = False
    for page, tables in (("README.md", core_and_scripts()), ("docs/extras.md", table(extras()))):
        text = (ROOT / page).read_text(encoding="utf-8")
        before, rest = text.split(MARKS[0])
        new = f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
        stale = stale or new != text
        if "--check" not in argv:
            (ROOT / page).write_text(new, encoding="utf-8")
    return int(stale and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
