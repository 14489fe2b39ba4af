"""The report: one file that asks for nothing, holds pictures and curves, and bears what a run can leave behind."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import browser
from kontext_min.extras import report
from kontext_min.extras.flags import flag, to_json
from kontext_min.extras.flags import parse_flags as parse
from kontext_min.extras.report import evenly, figure, slices, smooth, thin, write_report, write_restored_report
from kontext_min.extras.validation import grid

PHOTOS = Path(__file__).parent / "photos"
VOID = {"meta", "img", "input", "option"}  # no end tag
SIZES = [(48, 32), (32, 64)]  # pictures of a sheet differ in size
COLOURS = ("#c04020", "#20c040", "#2040c0")  # degraded, restored, clean
EVIL = '</script><b onclick="x">&amp;\'{name}{data}<!-- \ud800\x00'


class Page(HTMLParser):
    """Elements by name, and whether every element was closed in its turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.found = [], []
        self.feed(text)
        self.close()
        assert self.open == [], "never closed"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def data_of(file):
    """What the page's script draws. NaN is no JSON for a browser."""
    slots = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(encoding="utf-8"))
    assert len(slots) == 1 and "<" not in slots[0] and slots[0].isascii()
    return json.loads(slots[0], parse_constant=pytest.fail)


def training_row(step, **changes):
    row = {"step": step, "epoch": 0, "loss": 0.5 / step, "sigma_loss": [0.1, None, 0.3, None, 0.2], "lr": 1e-4}
    return row | {"grad_norm": 0.5, "images_per_second": 3.2, "seconds": 2.0, "skipped": 0} | changes


def validation_row(step, psnr=30.0, **changes):
    pictures = [{"width": w, "height": h, "psnr_degraded": 27.5, "psnr": psnr} for w, h in SIZES]
    row = {"step": step, "validation": True, "psnr": psnr, "ssim": 0.9, "psnr_degraded": 27.5, "ssim_degraded": 0.8}
    return (
        row
        | {
            "loss": 0.2,
            "loss_unchanged": 0.3,
            "loss_at": [k / 10 for k in range(1, 10)],
            "seconds": 60,
            "pictures": pictures,
        }
        | changes
    )


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
    return data_of(file)


@pytest.fixture
def run(tmp_path):
    rows = [training_row(s) for s in range(1, 101)]
    rows[50:50] = [validation_row(50, psnr=31.0)]
    return make_run(tmp_path / "run", [*rows, validation_row(100, psnr=29.0)])


# ------------------------------------------------------------------------------------------------------------- the file


def test_page_is_whole_and_asks_for_nothing(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|//[a-z]|@import|<link|url\(", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert not [a for _, attributes in page.found for a in attributes if a.startswith("on") or a == "style"]
    assert len(page.all("style")) == 1 and page.all("script") == [{"type": "application/json", "id": "data"}, {}]


def test_policy_allows_one_style_and_one_script_by_their_hashes(run):
    text = write_report(run).read_text(encoding="utf-8")
    policies = [m["content"] for m in Page(text).all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and "unsafe" not in policies[0]
    rules = dict(rule.split(maxsplit=1) for rule in policies[0].split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:"
    for tag in ("style", "script"):
        inside = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert not rules


def test_an_installed_package_carries_its_data():
    """Every file of the package that is no Python file is declared."""
    root = Path(report.__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert declared == {"kontext_min": ["presets.toml"], "kontext_min.extras": ["report.html"]}
    found = [p for p in (root / "kontext_min").rglob("*.*") if p.suffix not in (".py", ".pyc")]
    assert sorted(p.name for p in found) == sorted(name for names in declared.values() for name in names)


# ---------------------------------------------------------------------------------------------------- the data of a run


def test_headline_names_the_best_validation(run):
    facts = {name: (value, note) for name, value, note in read(run)["facts"]}
    assert facts["Gain in PSNR"] == ("+3.50 dB", "27.50 → 31.00 dB")
    assert facts["SSIM"] == ("0.900", "before 0.800")
    assert facts["Best step"] == ("50", "by PSNR; the last: 29.00 dB")
    assert facts["Steps"] == ("100", "of 3,000")
    assert facts["Time"][0] == "5m20s"  # 100 steps of 2 s and 2 validations of 60 s


def test_headline_tells_what_the_base_gains_without_training(tmp_path):
    rows = [validation_row(0, psnr=28.0), *(training_row(s) for s in range(1, 5)), validation_row(4, psnr=29.0)]
    facts = {name: (value, note) for name, value, note in read(make_run(tmp_path / "run", rows))["facts"]}
    assert facts["Before training"] == ("28.00 dB", "the base alone")
    folder = make_run(tmp_path / "more", rows, {"init_lora": "a.safetensors", "steps": 4})
    facts = {name: (value, note) for name, value, note in read(folder)["facts"]}
    assert facts["Before training"] == ("28.00 dB", "the base with --init-lora")


def test_validations_of_easier_pictures_are_not_compared(tmp_path):
    """As after --accept-changes with another --degrade: the degraded pictures have another PSNR."""
    rows = [validation_row(0, psnr=30.0), validation_row(2, psnr=33.0)]
    rows += [row | {"psnr_degraded": 11.7} for row in (validation_row(4, psnr=14.0), validation_row(6, psnr=21.7))]
    facts = {name: (value, note) for name, value, note in read(make_run(tmp_path / "run", rows))["facts"]}
    assert facts["Gain in PSNR"] == ("+10.00 dB", "11.70 → 21.70 dB")
    assert facts["Best step"] == ("6", "by PSNR; the last: 21.70 dB") and "Before training" not in facts
    rows = [validation_row(0, psnr=30.0) | {"how": "one prompt"}, validation_row(2, psnr=20.0) | {"how": "another"}]
    facts = {name: (value, note) for name, value, note in read(make_run(tmp_path / "other", rows))["facts"]}
    assert facts["Best step"] == ("2", "by PSNR; the last: 20.00 dB")


def test_slider_shows_the_last_validation_and_offers_the_best(run):
    data = read(run)
    assert data["steps"] == ["50, best", "100"]
    assert [tuple(f["size"]) for f in data["figures"]] == SIZES
    for one in data["figures"]:
        assert [after["score"] for after in one["after"]] == ["27.50 → 31.00 dB", "27.50 → 29.00 dB"]
        assert [after["file"] for after in one["after"]] == [f"validation/step-000{n}.png" for n in ("050", "100")]
        for picture in (one["before"], one["clean"], *(after["picture"] for after in one["after"])):
            assert picture.startswith("data:image/jpeg;base64,")


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
    assert read(make_run(tmp_path / "run", rows))["steps"] == ["10", "30, best", "110", "200"]


def test_curves_hold_the_numbers_of_the_rows(run):
    data = read(run)
    assert data["training"]["loss"]["each"] == [[s, float(f"{0.5 / s:.5g}")] for s in range(1, 101)]
    assert data["training"]["sigma_loss2"]["each"] == [[s, 0.3] for s in range(1, 101)]
    assert data["training"]["sigma_loss1"] == {"each": [], "mean": []}, "an interval without a picture"
    assert data["validation"]["psnr"]["each"] == [[50, 31.0], [100, 29.0]]
    assert data["along"] == [[s, [k / 10 for k in range(1, 10)]] for s in (50, 100)]


def test_a_hundred_thousand_rows(tmp_path):
    rows = [training_row(s, loss=50.0 if s == 77_777 else 0.5 + 0.1 * math.sin(s)) for s in range(1, 100_001)]
    data = read(make_run(tmp_path / "run", rows))
    lengths = [len(points) for curve in data["training"].values() for points in curve.values()]
    assert max(lengths) == report.LIMIT and (tmp_path / "run" / "report.html").stat().st_size < 500_000
    assert [77_777, 50.0] in data["training"]["loss"]["each"], "the spike was thinned away"


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


def test_evenly_has_both_ends():
    assert evenly(range(100), 4) == [0, 33, 66, 99]
    assert evenly([1, 2], 4) == [1, 2] and evenly([1], 4) == [1] and evenly([], 4) == []


def test_writes_again_over_the_old_one(run):
    first = read(run)["facts"][0]
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(validation_row(200, psnr=40.0)) + "\n")
    assert first[1] == "+3.50 dB" and read(run)["facts"][0][1] == "+12.50 dB"


def test_a_run_is_unfinished_until_its_last_step(tmp_path):
    for name, rows, unfinished in (("none", [], True), ("some", [2, 3], True), ("all", [3, 4], False)):
        folder = make_run(tmp_path / name, [training_row(s) for s in rows], {"steps": 4})
        assert read(folder)["unfinished"] is unfinished
    assert read(make_run(tmp_path / "unknown", [training_row(1)], {"rank": 1}))["unfinished"] is False


@dataclasses.dataclass(frozen=True)
class Flags:
    hr_root: str = flag("", ..., "")
    prompt: str | None = flag("", None, "")
    lr: float = flag("", 1e-4, "")
    rank: int = flag("", 16, "")
    resume: bool = flag("", True, "")
    full: bool = flag("", False, "")
    lora: tuple[str, ...] = flag("", (), "")


def test_command_line_gives_the_same_settings():
    argv = ["--hr-root", "my photos", "--prompt=-'\n$x\"", "--lr", "1e-05", "--no-resume", "--full"]
    settings = parse(Flags, [*argv, "--lora", "a", "--lora", "b=0.5"], "")
    defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(Flags)}
    stored = json.loads(json.dumps(to_json(settings) | {"versions": {"torch": "2"}, "defaults": defaults}))
    table = report.settings_table(stored)
    words = shlex.split(table["command"])
    assert words[:2] == ["python", "train.py"] and parse(Flags, words[2:], "") == settings
    assert [name for name, _ in table["changed"]] == ["hr_root", "prompt", "lr", "resume", "full", "lora"]
    assert table["others"] == [["rank", "16"], ["versions torch", "2"]]
    assert ["torch", "2"] in table["about"] and table["about"][0][0] == "device"


def test_without_defaults_all_settings_are_shown(run):
    settings = read(run)["settings"]
    assert settings["changed"] == [] and settings["command"] == ""
    assert settings["others"] == [["rank", "16"], ["steps", "3000"], ["versions torch", "2"]]


# ------------------------------------------------------------------------------------------------ what may be in a file

DEEP = "[" * 100_000
ODD = [None, True, -1, 10**400, "x", EVIL, math.nan, math.inf, [], [None, "x", {}, math.nan, 1], {}, {"width": 3}]
METRICS = [
    None,
    "",
    "\n\n",
    '{"step": 1, "lo',
    "17\n[]\nnull\n{}\n",
    DEEP + "\n" + json.dumps(training_row(1)),
    json.dumps(training_row(1))[:-9],
    json.dumps(training_row(1, loss=None, grad_norm=None, sigma_loss=[None] * 5)) + "\n",
    json.dumps(training_row(1, loss=math.nan, grad_norm=math.inf, lr=0.0)) + '\n{"st',
    json.dumps(training_row(1)) + "\n" + json.dumps({"step": 1, "validation": True, "psnr": math.nan, "ssim": None}),
    json.dumps(validation_row(1)) + "\n",  # its sheet is missing
    "".join(json.dumps(training_row(1) | {key: odd}) + "\n" for key in training_row(1) for odd in ODD),
    "".join(json.dumps(validation_row(1) | {key: odd}) + "\n" for key in validation_row(1) for odd in ODD),
    "".join(json.dumps({key: odd, "step": 3}) + "\n" for key in ("loss", "psnr", "pictures") for odd in ODD),
]


@pytest.mark.parametrize("metrics", METRICS)
def test_bears_what_a_stopped_run_leaves(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    read(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    for name in ("metrics.jsonl", "settings.json"):
        (tmp_path / name).write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\x00')
    assert read(tmp_path)["training"]["loss"]["each"] == [[1, 2]]


@pytest.mark.parametrize(
    "settings", ["", "[]", "17", '{"steps": "x", "versions": 3, "defaults": []}', '{"steps": NaN}', DEEP]
)
def test_odd_settings(run, settings, capsys):
    (run / "settings.json").write_text(settings)
    data = read(run)
    assert len(data["figures"]) == 2 and data["unfinished"] is False
    assert ("settings.json is missing or broken" in capsys.readouterr().out) == (settings[:1] != "{")


@pytest.mark.parametrize("width", [0, -3, 10**9, 2.5e9, "48", None, [48]])
def test_sizes_that_do_not_fit_the_sheet(run, width):
    row = validation_row(100)
    row["pictures"][1]["width"] = width
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(row) + "\n")
    assert read(run)["steps"] == ["50, best"]


def test_a_sheet_cut_short_is_left_out(run):
    sheet = run / "validation" / "step-000100.png"
    assert "can't be read" not in read(run)["note"]
    sheet.write_bytes(sheet.read_bytes()[:60])
    assert read(run)["steps"] == ["50, best"]
    assert "Not shown, as they can't be read: validation/step-000100.png." in read(run)["note"]
    (run / "validation" / "step-000050.png").unlink()
    assert not (data := read(run))["figures"]  # the note stands outside of their section, which is hidden
    assert data["note"].startswith("Not shown, as they can't be read: validation/step-000100.png, ")
    page = (run / "report.html").read_text()
    assert page.index('id="pictures"') < page.index("</section>") < page.index('id="note"')


def test_pictures_that_changed_during_the_run(run):
    row = validation_row(200)
    row["pictures"] = row["pictures"][:1]
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(row) + "\n")
    grid([[Image.new("RGB", SIZES[0], c) for c in COLOURS]]).save(run / "validation" / "step-000200.png")
    data = read(run)
    assert data["steps"] == ["200"] and len(data["figures"]) == len(data["figures"][0]["after"]) == 1


def test_text_of_others_stays_text(tmp_path):
    rows = [training_row(1, skipped=EVIL), validation_row(1)]
    folder = make_run(tmp_path / "<i>run&", rows, {"prompt": EVIL, "versions": {EVIL: EVIL}, "steps": EVIL})
    data = read(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.all("b") and not page.all("i")[1:], "the slider's line is the only <i>"
    assert data["title"] == "<i>run&" and EVIL in data["facts"][3][2]
    assert data["settings"]["others"] == [["prompt", EVIL], [f"versions {EVIL}", EVIL], ["steps", EVIL]]


# ---------------------------------------------------------------------------------------------------- restored pictures


def scores(psnr, ssim=0.5, texture=0.25):
    return {"psnr": psnr, "ssim": ssim, "texture": texture}


def test_restored_pictures(tmp_path):
    pictures = [Image.new("RGB", SIZES[0], c) for c in COLOURS]
    figures = [figure("b.png", *pictures[:2], file="sub/b #1.png"), figure("a.png", *pictures, "20.00 → ∞ dB", "a.png")]
    mean = {"name": "mean", "input": scores(20.0), "restored": scores(math.inf, 0.75, 1.5)}
    settings = {"input": "my scans", "lora": ("a", "b=0.5"), "overwrite": True, "versions": {"torch": "2"}}
    settings["defaults"] = {"input": None, "lora": (), "overwrite": False}
    assert write_restored_report(tmp_path, figures, 3, mean, settings) == str(tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    assert "Scored" not in str(data["facts"])
    write_restored_report(tmp_path, figures, 3, mean, settings, 2)
    assert ["Scored", "2", "with a clean picture that differs"] in data_of(tmp_path / "report.html")["facts"]
    assert data["facts"] == [
        ["Gain in PSNR", "+∞ dB", "20.00 → ∞ dB"],
        ["SSIM", "0.750", "before 0.500"],
        ["Texture, clean = 1", "1.50", "before 0.25"],
        ["Restored", "3", "pictures"],
    ]
    assert [one["title"] for one in data["figures"]] == ["a.png", "b.png"] and "2 of 3 pictures" in data["note"]
    assert [bool(one["clean"]) for one in data["figures"]] == [True, False]
    assert [one["after"][0]["file"] for one in data["figures"]] == ["a.png", "sub/b%20%231.png"]
    assert data["settings"]["command"] == "python sample.py --input 'my scans' --lora a --lora b=0.5"
    assert ["torch", "2"] in data["settings"]["about"] and ["overwrite", "true"] in data["settings"]["others"]


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if not browser.CHROMIUM:
        pytest.skip("Chromium is not installed")
    tab = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield tab
    tab.close()


def test_the_command_writes_the_page_of_a_run_only(run, tmp_path, capsys):
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other: is no run; expected a folder with a metrics\.jsonl"):
        report.main([str(tmp_path / "other")])
    (run / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html: is not that of a run; move it"):
        report.main([str(run)])
    assert (run / "report.html").read_text() == "mine"


@pytest.fixture
def opened(tab, run):
    """The run's page; whatever a test does with it, no error may come up."""
    tab.errors.clear()
    tab.open(write_report(run))
    yield tab
    assert not tab.errors


def box(tab, selector, n=0):
    """x, y, width and height of an element, in the window, after scrolling to it."""
    return tab.js(
        f"(node => (node.scrollIntoView({{block: 'center'}}), (b => [b.x, b.y, b.width, b.height])"
        f"(node.getBoundingClientRect())))(document.querySelectorAll('{selector}')[{n}])"
    )


def choose(tab, name, value):
    tab.js(
        f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change', {{bubbles: true}})) }})"
        f"(document.querySelector('select[name={name}]'))"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1300])
def test_page_fits_the_window_in_light_and_dark(opened, run, width, dark):
    opened.open(run / "report.html", width, dark)
    assert opened.js("document.documentElement.scrollWidth") <= width
    red, green, blue = opened.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue < 150) is dark
    assert opened.js("document.querySelector('h1').textContent") == opened.js("document.title") == "run"


def test_charts_have_points_and_five_colours(opened):
    # PSNR 2, SSIM 2, loss 2, path 2; loss 2, the three intervals with values, norm 2, rate 1, speed 2
    lines = opened.js("[...document.querySelectorAll('polyline')].map(l => l.getAttribute('points').split(' ').length)")
    assert len(lines) == 8 + 10 and sorted(set(lines)) == [2, 9, 100]
    assert "NaN" not in opened.js("[...document.querySelectorAll('.charts svg')].map(s => s.outerHTML).join()")
    labels = opened.js("[...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label'))")
    assert len(labels) == 9 and all(" over " in label and " to " in label for label in labels)
    opened.js("find('svg').append(...[0, 1, 2, 3, 4].map(k => element('path', {class: `test c${k}`})))")
    strokes = opened.js("[...document.querySelectorAll('.test')].map(p => getComputedStyle(p).stroke)")
    assert len(set(strokes)) == 5
    keys = "[...document.querySelectorAll('#training figure:nth-child(2) .keys > span')]"
    assert opened.js(f"{keys}.map(k => k.textContent)") == ["0 to 0.2", "0.4 to 0.6", "0.8 to 1"]
    opened.js(f"{keys}[1].dispatchEvent(new Event('pointerenter'))")
    lines = "[...document.querySelectorAll('#training figure:nth-child(2) polyline')]"
    assert opened.js(f"{lines}.map(line => line.classList.contains('faint'))") == [True, False, True]


def test_numbers_on_hover(opened):
    x, y, w, h = box(opened, "#validation .charts svg[role=img]")
    opened.mouse("Moved", x + w * 424 / 440, y + h / 2)
    shown = "[...document.querySelectorAll('#validation figure:first-child output')].map(o => o.textContent)"
    assert opened.js(shown) == ["step 100", "29", "27.5"]
    opened.mouse("Moved", x + w * 52 / 440, y + h / 2)
    assert opened.js(shown) == ["step 50", "31", "27.5"]
    opened.mouse("Moved", 2, 2)
    assert opened.js(shown) == ["", "", ""]
    opened.js("document.querySelector('#validation svg[role=img]').focus()")
    for key, step in (("ArrowRight", 50), ("ArrowRight", 100), ("ArrowRight", 100), ("ArrowLeft", 50)):
        opened.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert opened.js(shown)[0] == f"step {step}"


CUT = "document.querySelectorAll('.layers img:last-child')[{}].style.clipPath.match(/100% - ([\\d.]+)/)[1] * 1"


def test_handle_moves_the_cut(opened):
    x, y, w, h = box(opened, ".stage")
    assert opened.js(CUT.format(0)) == pytest.approx(w / 2, abs=1)
    opened.drag(x + w / 2, y + h / 2, x + w / 4, y + h / 2)  # the handle itself
    assert opened.js(CUT.format(0)) == pytest.approx(w / 4, abs=w / 50)
    opened.drag(x + w * 0.7, y + h * 0.9, x + w * 0.9, y + h * 0.9)  # anywhere
    assert opened.js(CUT.format(0)) == pytest.approx(w * 0.9, abs=w / 50)
    opened.js("document.querySelector('input[type=range]').focus()")
    for _ in range(2):
        opened.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", windowsVirtualKeyCode=37)
    assert opened.js(CUT.format(0)) == pytest.approx(w * 0.89, abs=w / 50)
    assert opened.js("document.querySelector('input[type=range]').ariaLabel").startswith("Picture 1")


def test_choices_change_the_pictures(opened, run):
    sources = "[...document.querySelectorAll('.layers img')].map(image => image.src)"
    data = data_of(run / "report.html")
    one, two = data["figures"]
    right = [one["after"][1]["picture"], two["after"][1]["picture"]]
    assert opened.js(sources) == [right[0], one["before"], right[1], two["before"]]
    choose(opened, "left", "clean")
    assert opened.js(sources) == [right[0], one["clean"], right[1], two["clean"]]
    assert opened.js("document.querySelector('.stage .left').textContent") == "clean"
    choose(opened, "step", 0)
    assert opened.js(sources)[::2] == [f["after"][0]["picture"] for f in data["figures"]]
    assert "27.50 → 31.00 dB · 48 × 32" in opened.js("document.querySelector('.stage + figcaption').textContent")
    assert opened.js("document.querySelector('figcaption a').href").endswith("/run/validation/step-000050.png")


def test_zoom_pans_and_a_reload_keeps_what_was_chosen(tab, tmp_path):
    tab.errors.clear()
    photo = Image.open(PHOTOS / "picosdeeuropa.jpg").convert("RGB")
    write_restored_report(tmp_path, [figure("own.jpg", photo, photo)], 1, None, {})
    tab.open(tmp_path / "report.html", 700)
    assert tab.js("document.querySelector('.stage .left').textContent") == "original"
    assert tab.js("getComputedStyle(document.querySelector('[name=left]').parentNode).display") == "none"
    layers, view = "document.querySelector('.layers')", "document.querySelector('.view')"
    assert tab.js(f"{layers}.clientWidth") == tab.js(f"{view}.clientWidth") < 700
    x, y, w, h = box(tab, ".view")
    for count in (1, 2):
        for kind in ("Pressed", "Released"):
            place = {"x": x + w * 0.6, "y": y + h / 2, "button": "left", "clickCount": count}
            tab.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **place)
    assert tab.js(f"[{layers}.clientWidth, {layers}.clientHeight]") == list(photo.size)  # a pixel is a pixel
    left, (x, y, w, h) = tab.js(f"{view}.scrollLeft"), box(tab, ".view")
    assert left == pytest.approx(0.6 * photo.width - w / 2, abs=20), "what was pressed is in the middle"
    tab.drag(x + w * 0.3, y + h * 0.8, x + w * 0.3 + 60, y + h * 0.8)
    assert tab.js(f"{view}.scrollLeft") == pytest.approx(left - 60, abs=2)
    percent = tab.js("document.querySelector('input[type=range]').value * 1")
    assert tab.js(CUT.format(0)) == pytest.approx(left - 60 + percent / 100 * tab.js(f"{view}.clientWidth"), abs=3)
    choose(tab, "zoom", 4)
    tab.load("Page.reload")
    assert tab.js("document.querySelector('select[name=zoom]').value") == "4"
    assert tab.js(f"{layers}.clientWidth") == 4 * photo.width
    assert not tab.errors


def test_reloads_only_while_the_run_goes_on(tab, tmp_path):
    for name, steps, hidden in (("running", 10, False), ("done", 1, True)):
        tab.open(write_report(make_run(tmp_path / name, [training_row(1)], {"steps": steps})))
        assert tab.js("document.getElementById('reload').hidden") is hidden
    text = (tmp_path / "running" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "running" / "report.html").write_text(re.sub(r'"written": \d+', '"written": 1e12', text))
    tab.open(tmp_path / "running" / "report.html")  # of 2001: it has been stopped
    assert tab.js("document.getElementById('reload').hidden")


def test_command_line_is_copied(opened, tmp_path):
    settings = {"hr_root": "my  photos", "rank": 16, "defaults": {"hr_root": None, "rank": 16}}
    opened.open(write_report(make_run(tmp_path / "r", [training_row(1)], settings)))
    assert opened.js("document.querySelector('code').textContent") == "python train.py --hr-root 'my  photos'"
    assert opened.js("document.querySelector('#settings details').open") is False
    opened.js("document.querySelector('#command button').click()")
    assert opened.js("getSelection().toString()") == "python train.py --hr-root 'my  photos'"


def test_text_of_others_is_shown_as_text(tab, tmp_path):
    tab.errors.clear()
    settings = {"prompt": EVIL, "versions": {EVIL: EVIL}, "steps": EVIL, "defaults": {"prompt": None}}
    tab.open(write_report(make_run(tmp_path / "<i>run&", [training_row(1, skipped=EVIL), validation_row(1)], settings)))
    assert tab.js("document.querySelector('h1').textContent") == "<i>run&"
    assert tab.js("document.querySelectorAll('b, h1 *, td *').length") == 0
    shown = tab.js("[...document.querySelectorAll('td, th, code, small')].map(n => n.textContent).join(' ')")
    assert shown.count(EVIL) >= 5
    assert not tab.errors


@pytest.mark.parametrize("metrics", METRICS)
def test_odd_rows_end_in_no_script_error(tab, tmp_path, metrics):
    tab.errors.clear()
    (tmp_path / "metrics.jsonl").write_text(metrics or "")
    tab.open(write_report(tmp_path))
    assert "NaN" not in tab.js("[...document.querySelectorAll('.charts')].map(c => c.outerHTML).join()")
    assert not tab.errors


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1.06e-4, False), (26, 33, False), (-1, 1, False), (3e-7, 5e2, True), (0.02, 0.5, True)]
)
def test_ticks_are_few_round_and_inside(opened, low, high, log):
    found = opened.js(f"ticks({low}, {high}, {json.dumps(log)})")
    assert 2 <= len(found) <= 7 and found == sorted(found)
    for value in found:
        assert low <= value <= high and len(f"{abs(value):.12e}".split("e")[0].rstrip("0").rstrip(".")) <= 3


@pytest.mark.parametrize(
    ("ys", "options", "labels"),
    [
        ([0.9, 1.0, 0.95], "", ["0", "0.2", "0.4", "0.6", "0.8", "1"]),  # from zero: noise stays small
        ([0.001, 1.0], "", ["0.001", "0.005", "0.02", "0.1", "0.5"]),  # a factor of 1000: logarithmic
        ([0.001, 1.0], "linear: true", ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([30.0, 30.1], "least: 4", ["29", "30", "31", "32"]),  # decibels
        ([0.0, 0.0], "", ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([-2.0, -1.0], "", ["-2", "-1.5", "-1", "-0.5", "0"]),
    ],
)
def test_axes_start_at_zero_or_are_logarithmic(opened, ys, options, labels):
    points = json.dumps([[k, y] for k, y in enumerate(ys)])
    code = f"chart('t', 'u', 'step', [['n', {points}, 'main']], {{{options}}})[0].querySelectorAll('text.end')"
    found = opened.js(f"[...{code}].map(t => t.textContent).slice(0, -1)")
    assert found == labels
