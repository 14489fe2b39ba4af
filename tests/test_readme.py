"""Every command of README.md runs: it is taken from the fenced blocks as it stands and executed, in order.

The commands run in a folder that looks like that of a reader: ~ is that folder, with photos/ and pairs/ in it (crops of
tests/photos, 48 to 70 pixels), old.jpg, photo.jpg, scans/ and tests/photos; weights/tiny and weights/FLUX.1-Kontext-dev
are a bundle that takes milliseconds a step. Behind each command go flags that shorten it (SHORT). So a flag, a value or
a file that is wrong in the README fails here. What is checked in another way, and not executed:

* commands for the official weights run on the small bundle; that the official folder is understood by --plan is checked
  with the headers of its files (hollow files of full size), that the table of cards is what is planned with --slow
* torchrun starts two processes, whatever number is written
* make: the commands of the target (`make --dry-run`) are run in the same way as those of the README; pip, pytest and
  ruff in them are not
* venv, pip and hf need the network
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFilter
from torch.distributed.run import get_args_parser

import full_size
import sample
import train
from conftest import make_pictures
from kontext_min.extras import plan
from kontext_min.extras.base import Weights
from kontext_min.extras.flags import parse_flags
from kontext_min.flow import Objective
from kontext_min.flux import FluxParams

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy, of what is imported
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train.py": "--steps 1 --resolution 32 --batch-size 1 --accumulate 1 --workers 0 --device cpu",
    "sample.py": "--steps 1 --tile 64 --device cpu",
}
ELSEWHERE = ("pip", "hf", "touch", "echo", "ruff", "pytest")  # the network, or other tests


def commands(text):
    """The lines of all ```bash blocks as lists of words, comments dropped, lines that end in a backslash joined."""
    assert text.count("```bash\n") * 2 == text.count("```"), "a fenced block that is not ```bash is not executed"
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def recipe(target):
    """What make would run for a target of the Makefile, had the virtual environment been made."""
    make = ["make", "--dry-run", "--assume-old=.venv/run", "--assume-old=.venv/test", target]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("make")]


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_bundle):
    """The folder of a reader."""
    folder = tmp_path_factory.mktemp("home")
    make_pictures(folder / "photos", count=8, side=48)
    shots = sorted((folder / "photos").glob("*.png"))
    for copy in ("scans", "pairs/clean", "pairs/degraded", "tests/photos"):
        (folder / copy).mkdir(parents=True)
        for shot in shots:
            picture = Image.open(shot)
            (picture.filter(ImageFilter.BLUR) if "degraded" in copy else picture).save(folder / copy / shot.name)
    for name in ("old.jpg", "photo.jpg", "tests/photos/picosdeeuropa.jpg"):
        Image.open(shots[0]).save(folder / name)
    (folder / "weights").mkdir()
    for name in ("tiny", "FLUX.1-Kontext-dev"):
        (folder / "weights" / name).symlink_to(small_bundle)
    return folder


def execute(words, home):
    """One command, in this process where it is Python."""
    words = [str(home) + w[1:] if w.startswith("~/") else w for w in words]
    program = words[0].rpartition("/")[2]
    if program == "make":
        for command in recipe(words[1]):
            execute(command, home)
    elif program == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.training_script == "train.py" and launch.nproc_per_node == "4"
        argv = ["--standalone", "--nproc-per-node", "2", ROOT / "train.py", *launch.training_script_args]
        argv = [sys.executable, "-m", "torch.distributed.run", *argv, *SHORT["train.py"].split()]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    elif program.startswith("python") and words[1] == "-m" and words[2].startswith("kontext_min."):
        old, sys.argv = sys.argv, words[2:]
        try:
            runpy.run_module(words[2], run_name="__main__")
        except SystemExit as end:
            assert not end.code, words
        finally:
            sys.argv = old
    elif program.startswith("python") and words[1] in SHORT:
        main = {"train.py": train.main, "sample.py": sample.main}[words[1]]
        assert main([*words[2:], *SHORT[words[1]].split()]) == 0, words
    else:
        module = words[2] if words[1:2] == ["-m"] else ""
        assert program in ELSEWHERE or module in ("venv", "pip", "pytest"), f"how is {words} to be tested?"


@pytest.mark.parametrize("words", commands(README), ids=lambda words: " ".join(words)[:60])
def test_it_runs(words, home, monkeypatch):
    """In the order of the page: later commands read what earlier ones wrote."""
    monkeypatch.chdir(home)
    execute(words, home)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --hr-root ~/photos --lerning-rate 1",
        "python train.py --hr-root ~/photos --degrade bluur=1",
        "python sample.py --input old.jpg --output new.png --lora runs/nowhere/lora.safetensors",
        "python -m kontext_min.extras.export convert a b --fromat peft",
        "torchrun --nproc-per-node 4 train.py --hr-root ~/photos --sharded",
        "torchrun --nproc-per-node 4 --no-such-flag train.py --hr-root ~/photos",
        "python tests/quality_bench.py --degrade guide",
        "make demos",
        "pythn train.py --hr-root ~/photos",
    ],
)
def test_a_wrong_command_would_be_seen(line, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    [words] = commands(f"```bash\n{line}\n```")
    with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
        execute(words, home)


def test_the_demo_is_the_same_with_and_without_make():
    spelled = [words[1:] for words in commands(README) if "runs/demo" in " ".join(words) and words[1] in SHORT]
    made = [words[1:] for words in recipe("demo") if words[1:2] and words[1] in SHORT]
    assert len(made) == 2 and spelled[:2] == made


def test_a_minute_is_enough():
    """A photograph first, then the first recipe within 9 KB, and 14 KB in all."""
    first = README.index("python sample.py --input old.jpg")
    assert len(README.encode()) <= 14_000 and len(README[:first].encode()) <= 9_000
    assert README.index("![") < README.index("\n## ") and README.index("docs/demo.jpg") == README.index("](") + 2
    contents = set(re.findall(r"\]\(#([\w-]+)\)", README[: README.index("\n## ")]))
    heads = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"\n## (.+)", README)}
    assert contents == heads


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_toy_of_docs_flow():
    """One step lands on the posterior mean, many on a clean value; the figures are small files."""
    toy = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for kind, x in (("noisy", [0.5, -1.5]), ("lost", [0.4, -0.4])):
        x = torch.tensor(x, dtype=torch.float64)
        assert torch.allclose(toy["paths"](x, kind, 1)[1][-1], toy["expected"](x, torch.zeros(()), kind))
        assert torch.allclose(toy["paths"](x, kind, 25)[1][-1], x.sign(), atol=1e-3)
    assert all(p.stat().st_size < 150_000 for p in (ROOT / "docs").glob("*.png"))


# ------------------------------------------------------------------------------------- the official size, not executed


def test_the_official_folder_is_understood(tmp_path):
    """Headers as published, files of full size with nothing in them: what --plan reads of them."""
    full_size.write_weights(tmp_path, text_tokens=512, hollow=True)
    assert sum(os.stat(f).st_size for f in tmp_path.glob("transformer/*.safetensors")) > 23_800_000_000
    sizes = plan.Sizes.of(Weights(tmp_path, None, None, None, None))
    assert sizes.flux == FluxParams() and sizes == plan.Sizes()


def cards():
    """(program, flags, planned GB, card) of the table of cards."""
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in README.splitlines() if re.match(r"\| \d+ GB \|", line)]
    return [
        ("train.py" if k == 1 else "sample.py", row[k].strip("`"), row[k + 1], row[0]) for row in rows for k in (1, 3)
    ]


@pytest.mark.parametrize(("program", "flags", "said", "card"), dict.fromkeys(cards()))
def test_the_table_of_cards(program, flags, said, card, request):
    """The flags are understood and the peak is below the card; with --slow, the peak is what is planned on CUDA."""
    argv = {"train.py": ["--hr-root", "x"], "sample.py": ["--input", "x", "--output", "y"]}[program]
    settings = parse_flags(
        {"train.py": train.Settings, "sample.py": sample.Settings}[program], [*argv, *flags.split()], ""
    )
    assert float(said) < 0.9 * float(card.split()[0])
    if request.config.getoption("--slow"):
        cuda, sizes = torch.device("cuda"), plan.Sizes()
        if program == "train.py":
            setting, _ = plan.for_training(train.settled(settings, sizes), sizes, torch.bfloat16, cuda)
        else:
            method = SimpleNamespace(resolution=None, steps=4, solver="euler", objective=Objective())
            setting, _ = plan.for_sampling(settings, sizes, method, [(1024, 1024)], torch.bfloat16, cuda)
        assert plan.measure(setting, sizes).device / plan.GB == pytest.approx(float(said), abs=0.06)
