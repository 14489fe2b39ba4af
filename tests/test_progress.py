"""What a program says while it works: phases, a line that is renewed, and the time left."""

from pathlib import Path

import pytest

import train
from kontext_min.extras import plan, progress
from kontext_min.extras.progress import Progress, Ticker, clock, shorter
from train import Settings


@pytest.fixture
def time(monkeypatch):
    """time.now is what the clock shows, in seconds."""

    class Clock:
        now = 1000.0

        @staticmethod
        def monotonic():
            return Clock.now

    monkeypatch.setattr(progress, "time", Clock)
    return Clock


def test_a_log_has_a_line_at_once_and_then_every_ten_seconds(time, capsys):
    said = Progress()
    for seconds in range(25):
        time.now = 1000.0 + seconds
        said.show(f"after {seconds}")
        said.show("inside a long step", every=15)  # never: the other line is newer
    assert capsys.readouterr().out.split("\n") == ["after 0", "after 10", "after 20", ""]
    time.now += 15
    said.show("inside a long step", every=15)
    said.show("end", last=True)
    time.now += 65
    said.phase("done")
    assert capsys.readouterr().out.split("\n") == ["inside a long step", "end", "1m44s: done", ""]
    Progress(shown=False).phase("in another process")
    Progress(shown=False).show("in another process", last=True)
    assert capsys.readouterr().out == ""


def test_a_terminal_renews_the_line_and_other_lines_stand_alone(time, capsys):
    said = Progress()
    said.terminal = True
    said.show("1/9")
    said.say("step 1: PSNR")
    assert capsys.readouterr().out == "\r\033[K1/9\r\033[Kstep 1: PSNR\n"


def test_the_time_left_of_a_folder_follows_the_area(time, capsys):
    tick = Ticker(Progress(every=0), [(1000, 1000), (1000, 500), (1000, 500)])
    tick.begin("a.jpg", (1000, 1000), passes=2)
    time.now += 10
    tick("decoding")
    time.now += 10
    tick("decoding")
    tick.end()
    tick.begin("b.jpg", (1000, 500), passes=3)
    time.now += 4
    tick("decoding")
    tick.begin("c.jpg", (1000, 500), passes=3)  # b.jpg has failed
    tick("decoding")
    assert capsys.readouterr().out.splitlines() == [
        "picture 1 of 3, a.jpg: decoding, 50 %",
        "picture 1 of 3, a.jpg: decoding, 100 %",
        "picture 2 of 3, b.jpg: decoding, 33 %  left 16s",
        "picture 3 of 3, c.jpg: decoding, 33 %  left 10s",
    ]
    assert tick.pace() == "24s, 20 s a megapixel"
    tick.of = "of the work size"  # with --resolution
    assert tick.pace() == "24s, 20 s a megapixel of the work size"


def test_clock():
    assert [clock(s) for s in (0.4, 59.6, 3725, 100_000)] == ["0s", "1m00s", "1h02m05s", "1d03h46m"]


def row_after(step, seconds):
    return {"step": step, "seconds": seconds, "loss": 0.5, "lr": 1e-4, "images_per_second": 4 / seconds}


def test_the_time_left_leaves_out_the_first_step_and_counts_validations(capsys):
    s = train.settled(Settings(hr_root=Path(), steps=104), plan.Sizes())
    progress = Progress(every=0)
    progress.validation = 30.0
    for step, seconds in ((1, 100.0), (2, 2.0), (3, 4.0), (4, 3.0)):
        progress.step(row_after(step, seconds), s, 2, "cpu")
    ends = [line.split("left ")[1] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["2h52m40s", "4m24s", "6m03s", "6m00s"]  # 103 * 100 s, 102 * 2 s, 101 * 3 s, 100 * 3 s, and 60 s


def test_a_run_of_days_says_what_would_make_it_shorter(capsys):
    sizes = plan.Sizes()
    s = train.settled(Settings(hr_root=Path(), cache_latents=4, steps=3000, resolution=1024), sizes)
    for seconds, said in ((20.0, 0), (40.0, 1)):  # of 3000 steps
        progress = Progress(every=0)
        for step in range(1, 6):
            progress.step(row_after(step, seconds), s, 0, "cpu")
        out = capsys.readouterr().out
        assert out.count("Shorter: --resolution 512") == said and "--cache-latents" not in out
    assert "about 1d09h18m left" in out and "a GPU" in out
    s = train.settled(
        Settings(hr_root=Path(), degrade=("blur=1", "noise=0.1"), prompt=("a", "b"), resolution=32), sizes
    )
    assert "Shorter: fewer --steps," in (line := shorter(s, 1e5, "cpu")) and "--cache-latents" not in line
