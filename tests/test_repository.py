"""What the project promises of itself: six packages, a small core, comments, few flags, a README that is current."""

import ast
import io
import re
import runpy
import shlex
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

import sample
import train
from kontext_min.extras import checks
from kontext_min.extras.flags import parse_flags

ROOT = Path(__file__).parent.parent
PACKAGES = {"torch", "safetensors", "sentencepiece", "PIL", "numpy", "einops"}
FILES = [*sorted((ROOT / "kontext_min").rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]
TABLES = runpy.run_path(str(ROOT / "docs" / "files.py"))
CORE = TABLES["CORE"]  # in reading order
LONGEST = (
    85  # lines of a function: more would not stand on two screens. The loop of train.py is read from top to bottom.
)
MOST_LINES = {"core": 2900, "train.py": 480, "sample.py": 190}
MOST_FLAGS = {train: 50, sample: 30}


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


def test_six_packages_and_the_standard_library():
    for file in FILES:
        outside = {n.split(".")[0] for n in imported(file)} - PACKAGES - set(sys.stdlib_module_names) - {"kontext_min"}
        assert not outside, f"{file.name} imports {outside}"
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [")[1].split("]")[0]
    assert {n.lower() for n in re.findall(r'"([a-zA-Z]+)', declared)} == {
        "torch", "safetensors", "sentencepiece", "pillow", "numpy", "einops",
    }  # fmt: skip


def siblings(file: Path) -> set[str]:
    """The files of the project that a file imports: `flux`, `extras.runs`."""
    names = {n.removeprefix("kontext_min.") for n in imported(file) if n.startswith("kontext_min.")}
    stems = {f.stem for f in FILES}
    return {".".join(part for part in n.split(".") if part in stems or part == "extras") for n in names} - {""}


def test_the_core_knows_no_extra_and_imports_go_one_way():
    """In the order of docs/files.py: a file of the core imports only files before it."""
    there = {f.stem for f in (ROOT / "kontext_min").glob("*.py")} - {"__init__"}
    assert there == set(CORE)
    for file in (ROOT / "kontext_min").glob("*.py"):
        for name in siblings(file):
            assert name in CORE, f"{file.name} is core and imports {name}"
            assert CORE.index(name) < CORE.index(file.stem), f"{file.name} imports {name}, which is read later"


def test_extras_import_each_other_one_way():
    """At the top of a file; there is an order in which every extra comes after what it imports."""
    left = {f.stem: f for f in (ROOT / "kontext_min" / "extras").glob("*.py") if f.stem != "__init__"}
    needs = {}
    for stem, file in left.items():
        top = ast.Module(
            [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        text = ast.unparse(top)
        needs[stem] = {other for other in left if re.search(rf"extras\.{other}\b|extras import .*\b{other}\b", text)}
    while left:
        free = [stem for stem in left if not needs[stem] & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for stem in free:
            del left[stem]


def test_sizes_only_go_down():
    """Docstrings, comments and blank lines count."""
    lines = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    sums = {"core": sum(n for f, n in lines.items() if f.parent == ROOT / "kontext_min")}
    sums |= {name: lines[ROOT / name] for name in ("train.py", "sample.py")}
    for name, most in MOST_LINES.items():
        assert sums[name] <= most, f"{name}: {sums[name]} lines, at most {most}"
    assert lines[ROOT / "kontext_min" / "flow.py"] <= 280


@pytest.mark.parametrize("program", [train, sample])
def test_few_flags_in_groups(program):
    found = fields(program.Settings)
    assert len(found) <= MOST_FLAGS[program]
    assert all(field.metadata["group"] and field.metadata["help"] for field in found)


def comments_per_100(source: str, start: int = 0, stop: int = 10**9) -> float:
    """Comments, those that only tell a shape left out, per 100 lines of code."""
    comments, code = 0, set()
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if not start <= token.start[0] <= stop:
            continue
        if token.type == tokenize.COMMENT:
            rule = re.fullmatch(r"# -{4,}.*", token.string)
            shape = re.fullmatch(r"# \([^()]*\)[^a-z]*", token.string)
            comments += not (rule or shape or "fmt:" in token.string)
        elif token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1)) - docstrings
    return 100 * comments / len(code)


@pytest.mark.parametrize("name", ["flux", "autoencoder", "flow", "lora", "data", "loop"])
def test_comments_stand_where_a_reader_would_stop(name):
    """At least ten for 100 lines of code."""
    if name == "loop":
        source = (ROOT / "train.py").read_text(encoding="utf-8")
        lines = source.splitlines()
        start = next(i for i, line in enumerate(lines, 1) if "THE LOOP" in line)
        stop = next(i for i, line in enumerate(lines, 1) if "---- the end" in line)
        assert comments_per_100(source, start, stop) >= 10
    else:
        assert comments_per_100((ROOT / "kontext_min" / f"{name}.py").read_text(encoding="utf-8")) >= 10


def test_the_tables_of_files_are_current():
    assert TABLES["main"](["--check"]) == 0, "README's tables are stale: python docs/files.py"


def test_no_function_is_longer_than_two_screens():
    for file in [*FILES, *(ROOT / "weights").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (file.name, node.name) != ("train.py", "train"):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST, f"{file.name}: {node.name} has {lines} lines; split it"


SHAPE = re.compile(r"\([\w .+*/]+,[^()]*\)|[Ss]hape|scalar")
TEACHING = (*CORE, "quantize", "shared_norms", "stream", "pictures", "prompts", "latents", "lora_files", "metrics")


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
        if file.stem in CORE and file.parent.name == "kontext_min":
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
    extras = (ROOT / "kontext_min" / "extras" / f"{n}.py" for n in ("base", "held_out", "method", "plan", "scores"))
    read = "".join(file.read_text(encoding="utf-8") for file in (ROOT / f"{program.__name__}.py", *extras))
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
def test_command_lines_in_the_texts_are_understood(name, monkeypatch, tmp_path):
    """Unknown flags and values fail; `...` stands for flags that are left out, and those needed are then put in."""
    for variable, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):  # as under torchrun
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    calls = commands(name)
    mentions = len(re.findall(r"(?:python|torchrun)3? [^\n`]*?(?:train|sample)\.py", (ROOT / name).read_text()))
    assert len(calls) >= mentions > 0
    needed = {"train": ["--hr-root", "DIR"], "sample": ["--input", "a.jpg", "--output", "b.jpg"]}
    for program, *argv in calls:
        module = {"train": train, "sample": sample}[program]
        short = any(a in ("...", "--help") for a in argv)
        argv = [a for a in argv if a not in ("...", "--help")]
        settings = parse_flags(module.Settings, needed[program] + argv if short else argv, "")
        for field in fields(settings):  # no files here: an empty folder stands for each
            if field.metadata["there"] and getattr(settings, field.name):
                (tmp_path / field.name).mkdir(exist_ok=True)
                settings = replace(settings, **{field.name: tmp_path / field.name})
        if program == "sample":
            monkeypatch.setenv("WORLD_SIZE", "1")
            checks.check_sampling(replace(settings, reference=None, json=None, report=False))
        else:
            monkeypatch.setenv("WORLD_SIZE", "2")
            checks.check_training(settings)


def test_a_wrong_command_line_would_be_seen(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for line in ("python train.py --hr-root x --lr-rate 1", "`sample.py --input a --output b --solver rk4`"):
        (tmp_path / "README.md").write_text(f"```\n{line}\n```\nor `python train.py ...`\n")
        with pytest.raises(SystemExit):
            test_command_lines_in_the_texts_are_understood("README.md", monkeypatch, tmp_path)
    error = capsys.readouterr().err
    assert "--lr-rate" in error and "rk4" in error
