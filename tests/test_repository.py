"""What the project promises of itself: six run-time packages, one-way imports, a README that lists every file."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"torch", "safetensors", "sentencepiece", "PIL", "numpy", "einops"}
FILES = [*sorted((ROOT / "kontext_min").glob("*.py")), ROOT / "train.py", ROOT / "sample.py"]
ALONE = ("flux", "autoencoder", "t5", "clip", "flow", "lora", "degrade", "metrics")


def imported(file: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            inside = node.module == "kontext_min"
            names |= {f"kontext_min.{alias.name}" for alias in node.names} if inside else {node.module}
    return names


def reading_order() -> list[str]:
    """The files of the README's table, in its order."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Reading order")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [Path(name).stem for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]


def test_six_packages_and_the_standard_library():
    for file in FILES:
        outside = {n.split(".")[0] for n in imported(file)} - PACKAGES - set(sys.stdlib_module_names) - {"kontext_min"}
        assert not outside, f"{file.name} imports {outside}"
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [")[1].split("]")[0]
    assert {n.lower() for n in re.findall(r'"([a-zA-Z]+)', declared)} == {
        "torch", "safetensors", "sentencepiece", "pillow", "numpy", "einops",
    }  # fmt: skip


def test_imports_go_one_way_in_the_order_of_the_readme():
    order = reading_order()
    assert sorted(order) == sorted(f.stem for f in FILES if f.stem != "__init__")
    for file in FILES:
        siblings = {n.split(".")[1] for n in imported(file) if n.startswith("kontext_min.") and "." in n}
        siblings &= {f.stem for f in FILES}
        if file.stem in ALONE:
            assert not siblings, f"{file.name} needs {siblings}, but is read before them"
        for sibling in siblings:
            assert order.index(sibling) < order.index(file.stem), f"{file.name} imports {sibling}, which is read later"


def test_no_pickle():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\b|torch\.(save|load)\(", text), file
