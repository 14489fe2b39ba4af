"""The report: one file that asks for nothing, holds pictures and curves, and bears what a run can leave behind."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_min.extras import report
from kontext_min.extras.report import evenly, slices, smooth, thin, ticks, write_report
from kontext_min.extras.validation import grid

PHOTOS = Path(__file__).parent / "photos"
VOID = {"meta", "img", "input", "path", "circle", "polyline", "option"}  # no end tag in HTML, or self-closed in our SVG
SIZES = [(48, 32), (32, 64)]  # pictures of a sheet differ in size
COLOURS = ("#c04020", "#20c040", "#2040c0")  # degraded, restored, clean


class Page(HTMLParser):
    """Elements by name, text, and whether every element was closed in its turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [], "never closed"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID - {"option", "path"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def training_row(step, **changes):
    row = {"step": step, "epoch": 0, "loss": 0.5 / step, "sigma_loss": [0.1, None, 0.3, None, 0.2], "lr": 1e-4}
    return row | {"grad_norm": 0.5, "images_per_second": 3.2, "seconds": 2.0, "skipped": 0} | changes


def validation_row(step, psnr=30.0, **changes):
    pictures = [{"width": w, "height": h, "psnr_degraded": 27.5, "psnr": psnr} for w, h in SIZES]
    row = {"step": step, "validation": True, "psnr": psnr, "ssim": 0.9, "psnr_degraded": 27.5, "ssim_degraded": 0.8}
    return row | {"loss": 0.2, "loss_at": [k / 10 for k in range(1, 10)], "seconds": 60, "pictures": pictures} | changes


def make_run(folder, rows, settings=None):
    (folder / "validation").mkdir(parents=True)
    (folder / "settings.json").write_text(
        json.dumps(settings or {"rank": 16, "steps": 3000, "versions": {"torch": "2"}})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        if row.get("validation"):
            sheet = grid([[Image.new("RGB", size, c) for c in COLOURS] for size in SIZES])
            sheet.save(folder / "validation" / f"step-{row['step']:06d}.png")
    return folder


def read(folder):
    file = write_report(folder)
    assert file == folder / "report.html"
    assert not list(folder.glob(".*")), "something was left aside"
    return file.read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    rows = [training_row(s) for s in range(1, 101)]
    rows[50:50] = [validation_row(50, psnr=31.0)]
    return make_run(tmp_path / "run", [*rows, validation_row(100, psnr=29.0)])


def test_page_is_whole_and_asks_for_nothing(run):
    text = read(run)
    page = Page(text)
    assert not re.search(r"https?://|//[a-z]|@import|<link|url\(", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text))
    policies = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")
    assert all(i["src"].startswith("data:image/jpeg;base64,") and i["alt"] for i in page.all("img"))
    charts = [s for s in page.all("svg") if s.get("role") == "img"]
    assert len(charts) == 9 and all(" over " in s["aria-label"] for s in charts)
    # PSNR 2, SSIM 2, loss 1, path 2; loss 2, the three intervals with values, norm 2, rate 1, speed 2
    assert len(page.all("polyline")) == 7 + 10


def test_headline_names_the_best_validation(run):
    text = Page(read(run)).text
    assert "+3.50 dB" in text["dd"] and "27.50 → 31.00 dB" in text["small"]
    assert "4m20" not in text["dd"] and "5m20s" in text["dd"]  # 100 steps of 2 s and 2 validations of 60 s


def test_slider_shows_the_last_validation_and_offers_the_best(run):
    page = Page(read(run))
    assert [(o["value"], "selected" in o) for o in page.all("option")[:2]] == [("50", False), ("100", True)]
    assert "50, best" in page.text["option"]
    assert len(page.all("img")) == 3 * len(SIZES)
    ranges = [i for i in page.all("input") if i["type"] == "range"]
    assert len(ranges) == len(SIZES) and all(i["aria-label"] for i in ranges)
    views = json.loads(re.search(r'id="views">(.*?)</script>', (run / "report.html").read_text())[1])
    assert {step: [score for _, score in view] for step, view in views.items()} == {
        "50": ["27.50 → 31.00 dB"] * 2,
        "100": ["27.50 → 29.00 dB"] * 2,
    }


def test_sheets_are_cut_where_grid_put_the_pictures(tmp_path):
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for _ in range(3)] for w, h in (*SIZES, (7, 5))]
    grid([[Image.fromarray(p) for p in row] for row in rows]).save(tmp_path / "sheet.png")
    cut = slices(tmp_path / "sheet.png", [{"width": row[0].shape[1], "height": row[0].shape[0]} for row in rows])
    assert len(cut) == len(rows)
    for pictures, row in zip(cut, rows, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(pictures, row, strict=True))


def test_the_most_pictures_of_one_megapixel_stay_under_ten_megabytes():
    photos = [Image.open(p).convert("RGB") for p in sorted(PHOTOS.glob("*.jpg"))[: report.PICTURES]]
    rng, total = np.random.default_rng(0), 0
    for photo in photos:
        size = photo.size
        noisy = np.asarray(photo) + rng.normal(0, 20, (photo.height, photo.width, 3))  # noise costs JPEG the most
        total += len(report.embed(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
        total += len(report.embed(photo)) * (1 + report.STEPS + 1)  # clean; restored, at the chosen steps and the best
        assert photo.size == size, "the caller's picture was shrunk"
    assert len(photos) == report.PICTURES and 1e6 < total < 10e6


def test_few_validations_are_chosen_and_the_best_is_among_them(tmp_path):
    rows = [validation_row(s, psnr=35.0 if s == 30 else 30.0) for s in range(10, 210, 10)]
    steps = [int(o["value"]) for o in Page(read(make_run(tmp_path / "run", rows))).all("option") if "value" in o]
    assert steps == [10, 30, 70, 140, 200]


def test_a_hundred_thousand_rows(tmp_path):
    rows = [training_row(s, loss=50.0 if s == 77_777 else 0.5 + 0.1 * math.sin(s)) for s in range(1, 100_001)]
    text = read(make_run(tmp_path / "run", rows))
    lines = [line["points"].split() for line in Page(text).all("polyline")]
    assert max(map(len, lines)) == report.LIMIT and len(text) < 500_000
    highest = min(float(point.split(",")[1]) for point in lines[0])
    assert highest < 30, (
        "the spike at step 77,777 was thinned away"
    )  # 50 is near the top of the plot, 0.5 at its bottom


def test_thinning_keeps_extremes_order_and_short_curves():
    curve = [(x, math.sin(x / 50)) for x in range(10_001)]
    curve[5000] = (5000, 9.0)
    curve[6001] = (6001, -9.0)
    few = thin(curve, 100)
    assert len(few) <= 100 and few == sorted(few)
    assert {(5000, 9.0), (6001, -9.0)} < set(few) <= set(curve)
    assert thin(curve[:100], 100) == curve[:100]


def test_smoothing_is_a_weighted_mean():
    assert [y for _, y in smooth([(x, 3.0) for x in range(500)])] == pytest.approx([3.0] * 500)  # no pull towards zero
    noise = np.random.default_rng(0).normal(size=5000)
    means = np.array([y for _, y in smooth(list(enumerate(noise)))])
    decay = 1 - 2 / 101  # window of 5000 / 50 steps
    weights = decay ** np.arange(5000)[::-1]
    assert means[-1] == pytest.approx((weights * noise).sum() / weights.sum())
    assert smooth([(1, 2.0), (2, 5.0)]) == [(1, 2.0), (2, 5.0)]  # too few to smooth


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1.06e-4, False), (26, 33, False), (-1, 1, False), (3e-7, 5e2, True), (0.02, 0.5, True)]
)
def test_ticks_are_few_round_and_inside(low, high, log):
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 7 and found == sorted(found)
    for value in found:
        assert low <= value <= high and len(f"{abs(value):.12e}".split("e")[0].rstrip("0").rstrip(".")) <= 3


def test_evenly_has_both_ends():
    assert evenly(range(100), 4) == [0, 33, 66, 99]
    assert evenly([1, 2], 4) == [1, 2] and evenly([1], 4) == [1] and evenly([], 4) == []


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        "",
        "\n\n",
        '{"step": 1, "lo',
        "17\n[]\nnull\n{}\n",
        json.dumps(training_row(1))[:-9],
        json.dumps(training_row(1, loss=None, grad_norm=None, sigma_loss=[None] * 5)) + "\n",
        json.dumps(training_row(1, loss=math.nan, grad_norm=math.inf, lr=0.0)) + '\n{"st',
        json.dumps(training_row(1))
        + "\n"
        + json.dumps({"step": 1, "validation": True, "psnr": math.nan, "ssim": None}),
        json.dumps(validation_row(1)) + "\n",  # its sheet is missing
    ],
)
def test_bears_what_a_stopped_run_leaves(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    text = read(tmp_path)
    Page(text)
    assert not re.search(
        r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.S)
    )


def test_a_sheet_cut_short_is_left_out(run):
    sheet = run / "validation" / "step-000100.png"
    sheet.write_bytes(sheet.read_bytes()[:60])
    page = Page(read(run))
    assert [o["value"] for o in page.all("option") if "value" in o] == ["50"]


def test_text_of_others_stays_text(tmp_path):
    evil = '</script><b onclick="x">&amp;\'{name}'
    folder = make_run(
        tmp_path / "<i>run&", [training_row(1)], {"prompt": evil, "versions": {evil: evil}, "steps": evil}
    )
    page = Page(read(folder))
    assert not page.all("b") and not page.all("i")
    assert page.text["td"].count(evil) == 2 + 1 and page.text["h1"] == "<i>run&"


def test_writes_again_over_the_old_one(run):
    first = read(run)
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(validation_row(200, psnr=40.0)) + "\n")
    assert "+12.50 dB" not in first and "+12.50 dB" in read(run)
