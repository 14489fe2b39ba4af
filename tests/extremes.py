"""Every flag of both programs, alone, at the ends of its range: no effect without a word, no traceback.

    python tests/extremes.py                     all of them, about 20 minutes on two cores
    python tests/extremes.py train.lr sample.    those that start so

The ends come from the flags themselves: the lowest and the highest value, the first ones outside, every choice, both
states of a switch, and for --degrade every operator. For texts and paths there are lists below. Each call is one of

    effect     exit code 0, and the result differs from that of the plain call
    same       the same result, as it must be: the flag changes only how or where the program works (SAME)
    default    the same result, as the value is the default, or is read as it
    said       the same result, and a line that the plain call has not
    refused    exit code 2 and one line
    long       not done after a minute: --steps 10000000 is what you ask for, and --plan tells its time before

and all else is a fault: a traceback, more lines than one, the same result without a word. Exit code 1 if there is one.
"""

import dataclasses
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # each call is a process of its own
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from conftest import make_bundle, make_pictures
from kontext_min import degrade
from kontext_min.extras.flags import name_of

PROGRAMS = {"train": train, "sample": sample}
SAME = {  # flags that change how, where or how often something is done or written, and no result
    "train": {
        *("output_dir", "cache_dir", "workers", "resume", "accept_changes", "overwrite", "checkpoint_every", "device"),
        *("tensorboard", "stream", "gradient_checkpointing", "compile", "dtype", "validation_prompt", "plan"),
        "validate_every_epochs",
    },
    "sample": {"output", "overwrite", "json", "compare", "report", "device", "stream", "compile", "plan"},
}
DEFAULTS = {  # what a program takes where the default is None, or what the plain call has under another name
    "train": {"degrade": "guide", "sigma": "uniform", "warmup": "0"},
    "sample": {"objective": "bridge", "lora": "lora.safetensors=1"}
    | dict.fromkeys(("transformer", "vae", "clip", "t5"), "base"),
}
LIMIT = 60  # seconds of a call
WORDS = ("", " ", "x", "\U0001f600", "a" * 100_000, "word " * 2000, "a\nb", "a\r", "\u202e", "-", "--", "%s", "None")
WORDS += ("\udcff", "a\0b")
PATTERNS = (*train.TARGETS, "x", "(", "*", ".*", "^$", "double_blocks", "img_mod", "final_layer", "txt_in", "a" * 9999)
PLACES = (
    "absent",
    "empty",
    "file.txt",
    "pipe",
    "loop",
    "nowhere",
    "picture.png",
    "hr",
    "base",
    "n" * 300,
    "",
    ".",
    "/",
)
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "x", "", "1,5", "1_0", "0x10", "1e3", "9" * 30, " 1")


def ends(field, hint):
    """The values of a flag that are worth a call, as words on a command line."""
    least, most = field.metadata["least"], field.metadata["most"]
    kinds = typing.get_args(hint) or (hint,)
    if bool in kinds:
        return [True, False]
    if field.metadata["choices"]:
        return [*field.metadata["choices"], "", "x"]
    if int in kinds or float in kinds:
        step = 1 if int in kinds else 1e-3
        near = [] if least is None else [least, least + step, least - step]
        near += [10**9] if most is None else [most, most - step, most + step]
        return [*map(str, near), *NUMBERS]
    if Path in kinds:
        return [*PLACES, "/dev/null"]
    if field.name == "degrade":
        return [
            *degrade.PRESETS,
            *specifications(),
            "(",
            ")",
            "@",
            "|",
            ",",
            "blur=1,",
            "blur=1@0",
            "blur=1@0.001",
            *WORDS,
        ]
    if field.name == "start_time":
        return ["auto", "1", "0.001", "0.0009", "1.0001", "0.999", *NUMBERS]
    if field.name == "device":
        return ["auto", "cpu", "cpu:0", "cpu:1", "cuda", "cuda:99", "mps", "meta", *WORDS]
    if field.name == "lora":
        return [f"lora.safetensors={x}" for x in ("0", "1", "0.5", "1e-3", "1e-9", "1e3", "1e20", *NUMBERS)] + [*PLACES]
    return PATTERNS if field.name == "lora_targets" else WORDS


def specifications():
    """Every operator, each of its values in turn at both ends and outside, the others in the middle, at most 3."""
    for name in degrade.OPERATORS:
        allowed = [typing.get_args(value.annotation) for value in degrade._values(name).values()]
        middle = [a[0] if isinstance(a[0], str) else a[0](max(a[1], min((a[1] + a[2]) / 2, 3))) for a in allowed]
        for k, a in enumerate(allowed):
            for x in a if isinstance(a[0], str) else (a[1], a[2], a[1] - 1, a[2] + 1):
                yield f"{name}=" + "/".join(str(x if i == k else y) for i, y in enumerate(middle))


def make_place(folder):
    """What is behind the names in PLACES, but the first; pictures, a model and a LoRA."""
    make_pictures(folder / "hr")
    make_bundle(folder / "base")
    (folder / "file.txt").write_text("text")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("gone")
    Image.open(folder / "hr/00.png").save(folder / "picture.png")


def link(place, folder):
    """All that is in a folder of make_place into another one, by links; and an empty folder, as a call may fill it."""
    (folder / "empty").mkdir()
    for there in place.iterdir():
        (folder / there.name).symlink_to(there.readlink() if there.is_symlink() else there)


def plain(program):
    """The call that each flag is added to, in a folder as of make_place."""
    if program == "train":
        sizes = "--resolution 64 --steps 8 --batch-size 2 --accumulate 1 --lr 1e-2 --workers 0 --output-dir run"
        return f"--hr-root hr --weights base --cache-dir cache {sizes}".split()
    return ["--input", "picture.png", "--output", "out.png", "--weights", "base", "--lora", "lora.safetensors"]


def call(program, words, folder):
    """Exit code, or None if it takes too long, and all that is printed. A copy of this process makes the call."""
    said = folder / "said.txt"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.argv = [f"{program}.py", *words]
            sample.CACHE = Path("cache")
            code = PROGRAMS[program].main(words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    began, status = time.monotonic(), (0, 0)
    while status == (0, 0):
        status = os.waitpid(child, os.WNOHANG)
        if time.monotonic() - began > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, said.read_text(errors="replace")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1]), said.read_text(errors="replace")


def result(program, folder):
    """What the call has made, to compare: the numbers of a LoRA or of a picture; None if there is none."""
    if program == "sample":
        return {"": np.asarray(Image.open(folder / "out.png"))} if (folder / "out.png").exists() else None
    files = [*folder.glob("run/lora.safetensors"), *folder.glob("run/transformer/*.safetensors")]
    return {name: x.numpy() for name, x in load_file(files[0]).items()} if files else None


def equal(a, b):
    """Whether two results are the same, to the bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def lines(text):
    """What is printed, without what differs from call to call: times, and the bar that runs."""
    text = re.sub(r"\d+(\.\d+)?( ?(ms|s|min|h|pictures/s|megapixels?)\b)", "#", text.replace("\r", "\n"))
    return {
        line.strip() for line in text.splitlines() if line.strip() and not re.match(r".*(step|images/s|left)", line)
    }


def judge(program, name, value, place, before):
    """One call with a flag: the kind of its end, and the words that show it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        link(place, folder)
        flag, words = name_of(name), plain(program)
        given = [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [f"{flag}={value}"]
        usual = {str(PROGRAMS[program].Settings.__dataclass_fields__[name].default), DEFAULTS[program].get(name)}
        if flag in words:  # the value takes the place of the one there
            at = words.index(flag)
            usual.add(words[at + 1])
            del words[at : at + 2]
        began = time.monotonic()
        code, text = call(program, [*words, *given], folder)
        seconds = time.monotonic() - began
        new = sorted(lines(text) - before["lines"])
        about = " / ".join(new)[:300]
        if "Traceback" in text or "this is a bug" in text:
            return "FAULT traceback", text[-600:], seconds
        if code is None:
            return "long", about, seconds
        if code == 2:
            *_, last = text.splitlines()
            one = last.startswith(f"{program}.py: ") and text.count(f"{program}.py: ") == 1
            return ("refused" if one else "FAULT lines"), last[:400], seconds
        if code != 0:
            return f"FAULT exit {code}", text[-300:], seconds
        found = result(program, folder)
        if found is not None and not equal(found, before["result"]):
            return "effect", about, seconds
        if name in SAME[program]:
            return "same", about, seconds
        if _number(value) in map(_number, usual):
            return "default", about, seconds
        return ("said" if new else "FAULT silent"), about, seconds


def _number(value):
    """A value as the programs read it: 1e-400 is 0, and blanks do not count."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).replace("= ", "=")


def main():
    """Make all the calls, print a line for each, count."""
    wanted = tuple(sys.argv[1:]) or ("",)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make_place(place)
        before = {}
        for program in PROGRAMS:
            with tempfile.TemporaryDirectory() as first:
                folder = Path(first)
                link(place, folder)
                code, text = call(program, plain(program), folder)
                assert code == 0, text
                if program == "train":
                    (place / "lora.safetensors").write_bytes((folder / "run/lora.safetensors").read_bytes())
                before[program] = {"lines": lines(text), "result": result(program, folder)}
        cases = []
        for program, module in PROGRAMS.items():
            hints = typing.get_type_hints(module.Settings)
            for field in dataclasses.fields(module.Settings):
                if f"{program}.{field.name}".startswith(wanted):
                    cases += [(program, field.name, v) for v in dict.fromkeys(ends(field, hints[field.name]))]
        counts = Counter()
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            jobs = {pool.submit(judge, p, n, v, place, before[p]): (p, n, v) for p, n, v in cases}
            for job in as_completed(jobs):
                (program, name, value), (kind, about, seconds) = jobs[job], job.result()
                counts[kind] += 1
                print(f"{kind:8} {program}.{name} {str(value)[:60]!r} {seconds:.1f} s: {about!r}", flush=True)
        print(dict(counts))
    return any(kind.startswith("FAULT") for kind in counts)


if __name__ == "__main__":
    sys.exit(main())
