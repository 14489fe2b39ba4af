"""Three lists with an end, on which nothing is silently wrong: flags, kinds of files, cut files.

    python tests/extremes.py flags [train.lr sample. ...]    every flag alone, at the ends of its range; 20 minutes
    python tests/extremes.py files Pillow/Tests/images       every file as --input, --reference and in the folders
    python tests/extremes.py cuts                            every cached file and checkpoint, cut at random bytes

The ends come from the flags themselves: the lowest and the highest value, the first ones outside, every choice, both
states of a switch, and for --degrade every operator. For texts and paths there are lists below. Each call is one of

    effect     exit code 0, and the result differs from that of the plain call
    same       the same result, as it must be: the flag changes only how or where the program works (SAME)
    default    the same result, as the value is the default, or is read as it
    said       the same result, and a line that the plain call has not
    refused    exit code 2 and one line, after those on what was found so far
    long       not done after a minute: --steps 10000000 is what you ask for, and --plan tells its time before

and all else is a FAULT: a traceback, a second line, the same result without a word, a file that no line counts. The
exit code is 1 if there is one.
"""

import dataclasses
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
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
        *("tensorboard", "stream", "gradient_checkpointing", "compile", "dtype", "plan"),
        *("validation_prompt", "validate_every_epochs"),
    },
    "sample": {"output", "overwrite", "json", "compare", "report", "device", "stream", "compile", "plan"},
}
DEFAULTS = {  # what a program takes where the default is None, or what the plain call has under another name
    "train": {"degrade": ("guide",), "sigma": ("uniform",), "warmup": ("0",)},
    "sample": {"objective": ("bridge",), "solver": ("midpoint",), "lora": ("lora.safetensors=1", ".")}
    | dict.fromkeys(("transformer", "vae", "clip", "t5"), ("base",)),
}
LIMIT = 60  # seconds of a call
WORDS = ("", " ", "x", "\U0001f600", "a" * 100_000, "word " * 2000, "a\nb", "a\r", "\u202e", "-", "--", "%s", "None")
WORDS += ("\udcff", "a\0b")
SPECS = (*"()@|,", "blur=1,", "blur=1@0", "blur=1@0.001")
PATTERNS = (*train.TARGETS, "x", "(", "*", ".*", "^$", "double_blocks", "img_mod", "final_layer", "txt_in", "a" * 9999)
PLACES = ("absent", "empty", "file.txt", "pipe", "loop", "nowhere", "picture.png", "hr", "base", "n" * 300, "", ".")
PLACES += ("/", "/dev/null")
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
        return PLACES
    if field.name == "degrade":
        return [*degrade.PRESETS, *specifications(), *SPECS, *WORDS]
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
        if not there.name.startswith("whole"):  # see `cuts`
            (folder / there.name).symlink_to(there.readlink() if there.is_symlink() else there)
    return folder


def plain(program):
    """The call that each flag is added to, in a folder as of make_place."""
    if program == "train":
        sizes = "--resolution 64 --steps 8 --batch-size 2 --accumulate 1 --lr 1e-2 --workers 0 --output-dir run"
        return f"--hr-root hr --weights base --cache-dir cache {sizes}".split()
    return ["--input", "picture.png", "--output", "out.png", "--weights", "base", "--lora", "lora.safetensors"]


def call(program, words, folder, limit=LIMIT):
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
        if time.monotonic() - began > limit:
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


def ended(program, code, text, about):
    """The kind of an end that does not depend on the result, and the words that show it; None for exit code 0."""
    if "Traceback" in text or "this is a bug" in text:
        return "FAULT traceback", text[-600:]
    if code is None:
        return "long", about
    if code == 2:
        *_, last = text.splitlines()
        one = last.startswith(f"{program}.py: ") and text.count(f"{program}.py: ") == 1
        return "refused" if one else "FAULT lines", last[:400]
    return (f"FAULT exit {code}", text[-300:]) if code else None


# ------------------------------------------------------------------------------------------------------------- 1. flags


def a_flag(place, before, program, name, value):
    """One call with a flag."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = link(place, Path(temporary))
        flag, words = name_of(name), plain(program)
        given = [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [f"{flag}={value}"]
        usual = {str(PROGRAMS[program].Settings.__dataclass_fields__[name].default), *DEFAULTS[program].get(name, ())}
        if flag in words:  # the value takes the place of the one there
            at = words.index(flag)
            usual.add(words[at + 1])
            del words[at : at + 2]
        code, text = call(program, [*words, *given], folder)
        new = sorted(lines(text) - before[program]["lines"])
        about = " / ".join(new)[:300]
        if end := ended(program, code, text, about):
            return end
        found = result(program, folder)
        if found is not None and not equal(found, before[program]["result"]):
            return "effect", about
        if name in SAME[program]:
            return "same", about
        if _number(str(value)) in map(_number, usual):
            return "default", about
        return "said" if new else "FAULT silent", about


def _number(value):
    """A value as the programs read it: 1e-400 is 0, and blanks do not count."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).replace("= ", "=")


def flags(wanted):
    """Every flag with every value of `ends`."""
    for program, module in PROGRAMS.items():
        hints = typing.get_type_hints(module.Settings)
        for field in dataclasses.fields(module.Settings):
            if f"{program}.{field.name}".startswith(tuple(wanted) or ""):
                for value in dict.fromkeys(ends(field, hints[field.name])):
                    yield a_flag, program, field.name, value


# ------------------------------------------------------------------------------------------------------------- 2. files


def a_file(place, before, flag, file):
    """A file alone, as the picture to restore or to compare with: a picture of its size, or one line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, words = link(place, Path(temporary)), [*plain("sample"), "--steps", "1"]
        if flag == "--input":
            words[1] = str(file)
        code, text = call("sample", words + [flag, str(file)] * (flag == "--reference"), folder, limit=600)
        if end := ended("sample", code, text, ""):
            return end
        if flag == "--input":
            with Image.open(file) as picture:
                sizes = {picture.size, picture.size[::-1]}  # it may be turned
            good = Image.open(folder / "out.png").size in sizes
        else:
            good = "PSNR" in text
        return "effect" if good else "FAULT silent", " / ".join(x for x in text.splitlines() if "note" in x)[:300]


def a_folder(place, before, flag, root, count):
    """All files in one of the folders of train.py: each is used, left out with a reason, or counted as another."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, words = link(place, Path(temporary)), plain("train")
        more = [flag, str(root), "--cache-latents", "1", "--steps", "1"]  # caching reads every picture
        code, text = call("train", words[2 * (flag == "--hr-root") :] + more, folder, limit=1800)
        if flag == "--lr-root" and code == 2 and f"{root}: 11 of 11 pictures have no degraded partner" in text:
            return "refused", text.splitlines()[-1][:300]
        if end := ended("train", code, text, ""):
            return end
        part = text if flag == "--hr-root" else text[text.index(f"{flag} {root}: ") :]
        found = [re.search(rf"(\d+) {what}", part) for what in ("pictures in", "files? left out", "other files?")]
        found = [int(match[1]) if match else 0 for match in found]
        return "said" if sum(found) == count else "FAULT silent", f"{found} of {count}"


def files(folders):
    """Every file below a folder, alone and with the others."""
    for root in map(Path, folders):
        there = sorted(path.resolve() for path in root.rglob("*") if path.is_file() and path.name[0] != ".")
        yield from ((a_folder, flag, root.resolve(), len(there)) for flag in ("--hr-root", "--val-root", "--lr-root"))
        yield from ((a_file, flag, path) for path in there for flag in ("--input", "--reference"))


# -------------------------------------------------------------------------------------------------------------- 3. cuts

KEPT = {
    "train": "--cache-latents 2 --stream --quantize int8 --checkpoint-every 4",
    "sample": "--stream --quantize int8",
}
CUTS = 4  # of each file, the first at its start


def a_cut(place, before, program, name, cut):
    """A call that finds one cut file among those of an earlier call: its result is the same, or a line names it."""
    whole = place / f"whole-{program}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = link(place, Path(temporary))
        for part in ("cache", "run"):
            if (whole / part).exists():
                shutil.copytree(whole / part, folder / part)
        if name.startswith("run"):  # stopped after its first checkpoint
            shutil.rmtree(folder / "run/checkpoints/step-000008")
            (folder / "run/lora.safetensors").unlink()
        else:
            shutil.rmtree(folder / "run", ignore_errors=True)
        os.truncate(folder / name, int(cut * (folder / name).stat().st_size))
        code, text = call(program, plain(program) + KEPT[program].split(), folder)
        if end := ended(program, code, text, ""):
            return end
        good = equal(result(program, folder), result(program, whole))
        return "same" if good else "FAULT silent", " / ".join(x for x in text.splitlines() if "note" in x)[:300]


def cuts(place):
    """Every file that a run leaves for the next one."""
    rng = random.Random(0)
    for program in PROGRAMS:
        whole = place / f"whole-{program}"
        whole.mkdir()
        code, text = call(program, plain(program) + KEPT[program].split(), link(place, whole))
        assert code == 0, text
        left = [*(whole / "cache").rglob("*"), *(whole / "run").glob("*.*"), *whole.glob("run/checkpoints/*04/*")]
        for path in sorted(path for path in left if path.is_file() and path.name != "lora.safetensors"):
            for cut in (0, *(rng.random() for _ in range(CUTS - 1))):
                yield a_cut, program, path.relative_to(whole).as_posix(), cut


def main():
    """Make all the calls of a list, print a line for each, count."""
    which, *wanted = sys.argv[1:] or [""]
    if which not in ("flags", "files", "cuts") or ((which == "files") != bool(wanted) and which != "flags"):
        sys.exit(__doc__)
    torch.set_num_threads(1)  # each call is a process of its own
    with tempfile.TemporaryDirectory() as temporary:
        place, before, counts = Path(temporary), {}, Counter()
        make_place(place)
        for program in PROGRAMS:
            with tempfile.TemporaryDirectory() as first:
                folder = link(place, Path(first))
                code, text = call(program, plain(program), folder)
                assert code == 0, text
                if program == "train":
                    shutil.copy(folder / "run/lora.safetensors", place)
                before[program] = {"lines": lines(text), "result": result(program, folder)}
        calls = list({"flags": flags, "files": files}[which](wanted) if which != "cuts" else cuts(place))
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            jobs = {pool.submit(function, place, before, *given): given for function, *given in calls}
            for job in as_completed(jobs):
                kind, about = job.result()
                counts[kind] += 1
                print(f"{kind:8} {' '.join(map(str, jobs[job]))[:120]!r}: {about!r}", flush=True)
        print(dict(counts))
    return any(kind.startswith("FAULT") for kind in counts)


if __name__ == "__main__":
    sys.exit(main())
