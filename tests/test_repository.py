"""What the project promises of itself: six packages, one-way imports, short functions, no dead flag, a README table."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import sample
import train
from kontext_min import degrade
from kontext_min.extras.flags import parse

ROOT = Path(__file__).parent.parent
PACKAGES = {"torch", "safetensors", "sentencepiece", "PIL", "numpy", "einops"}
FILES = [*sorted((ROOT / "kontext_min").rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]
CORE = ("flux", "autoencoder", "t5", "clip", "flow", "lora", "degrade", "metrics", "data")  # need no sibling, no extra
LONGEST = 85  # lines of a function: more would not stand on two screens


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
        siblings = {part for n in imported(file) if n.startswith("kontext_min.") for part in n.split(".")[1:]}
        siblings &= {f.stem for f in FILES}
        if file.stem in CORE:
            siblings -= {"utils"}
            assert not siblings, f"{file.name} is core and must not need {siblings}"
        for sibling in siblings:
            assert order.index(sibling) < order.index(file.stem), f"{file.name} imports {sibling}, which is read later"


def test_no_function_is_longer_than_two_screens():
    for file in [*FILES, *(ROOT / "weights").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST, f"{file.name}: {node.name} has {lines} lines; split it"


SHAPE = re.compile(r"\([\w .+*/]+,[^()]*\)|[Ss]hape|scalar")
TEACHING = (*CORE, "quantize", "tiles", "restore", "stream", "colour", "prompts", "latents", "lora_formats")


def public(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public(child, f"{child.name}.")
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield inside + child.name, child


def test_docstrings_tell_shapes_errors_and_sources():
    """Of every public function of the package that raises, and that takes or gives tensors where these are taught."""
    seen = 0
    for file in (f for f in FILES if f.parent != ROOT and f.stem != "__init__"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if file.stem in CORE:
            assert re.search(r"Sources?:|et al\.", ast.get_docstring(tree)), f"{file.name} names no source"
        for name, function in public(tree):
            text, signature = ast.get_docstring(function) or "", ast.unparse(function.args)
            result = ast.unparse(function.returns) if function.returns else ""
            takes = re.search(r": Tensor\b", signature) or "Tensor" in result
            if file.stem in TEACHING and takes and not result.startswith("Iterator"):
                assert SHAPE.search(text), f"{file.name}: {name} tells no shapes"
                seen += 1
            raised = (n.exc for n in ast.walk(function) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call))
            if any(getattr(call.func, "id", "") in ("ValueError", "OSError") for call in raised):
                assert "Raises:" in text, f"{file.name}: {name} does not tell what it raises"
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("program", [train, sample])
def test_every_flag_is_read(program):
    read = (ROOT / f"{program.__name__}.py").read_text() + (ROOT / "kontext_min" / "extras" / "plan.py").read_text()
    for name in program.Settings.__dataclass_fields__:
        assert re.search(rf"settings\.{name}\b", read) or f'"{name}"' in read, f"--{name} does nothing"


def test_no_pickle():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\b|torch\.(save|load)\(", text), file


# ------------------------------------------------------------------------------------------- command lines in the texts

TEXTS = ("README.md", "weights/README.md", "weights/tiny/README.md", "Makefile")


def commands(name: str) -> list[list[str]]:
    """Every call of train.py and sample.py in a text: [program, argument, ...], between backticks with `...` behind."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    pieces = [line for line in text.splitlines() if "`" not in line]
    pieces += [f"{piece} ..." for piece in re.findall(r"`([^`\n]+)`", text)]
    found = []
    for piece in pieces:
        match = re.search(r"(?:^|[\s/])(train|sample)\.py((?:\s+.*)?)$", piece)
        if match and re.search(r"python|torchrun|^\S*(train|sample)\.py\s+-", piece):
            found.append([match[1], *shlex.split(match[2].split("#")[0])])
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_command_lines_in_the_texts_are_understood(name):
    """Unknown flags and values fail; `...` stands for flags that are left out, and those needed are then put in."""
    calls = commands(name)
    mentions = len(re.findall(r"(?:python|torchrun)3? [^\n`]*?(?:train|sample)\.py", (ROOT / name).read_text()))
    assert len(calls) >= mentions > 0
    needed = {"train": ["--hr-root", "DIR"], "sample": ["--input", "a.jpg", "--output", "b.jpg"]}
    for program, *argv in calls:
        module = {"train": train, "sample": sample}[program]
        short = any(a in ("...", "--help") for a in argv)
        argv = [a for a in argv if a not in ("...", "--help")]
        settings = parse(module.Settings, needed[program] + argv if short else argv, "")
        module.check(replace(settings, reference=None, json=None) if program == "sample" else settings)  # no files here
        if settings.degrade:
            degrade.parse(settings.degrade)


def test_a_wrong_command_line_would_be_seen(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for line in ("python train.py --hr-root x --lr-rate 1", "`sample.py --input a --output b --solver rk4`"):
        (tmp_path / "README.md").write_text(f"```\n{line}\n```\nor `python train.py ...`\n")
        with pytest.raises(SystemExit):
            test_command_lines_in_the_texts_are_understood("README.md")
    error = capsys.readouterr().err
    assert "--lr-rate" in error and "rk4" in error
