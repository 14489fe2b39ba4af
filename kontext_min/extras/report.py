"""report.html: how a run went, or what sample.py made of a folder, in one file that needs neither network nor others.

    settings.json, metrics.jsonl, validation/step-000500.png  ->  report.html in the run folder
    python -m kontext_min.extras.report runs/NAME                        writes it again
    before and after of some pictures                         ->  report.html beside the restored ones

Curves are inline SVG, pictures embedded JPEGs, the before/after slider is a range input over stacked images. The page's
own content security policy forbids every request.

    smoothed   m_n = sum_i d^(n-i) y_i / sum_i d^(n-i),  d = 1 - 2 / (window + 1): an exponential mean whose start is
               not pulled towards zero (Kingma and Ba 2015, section 3)
    thinned    the lowest and the highest point of each stretch of steps, so that no spike is lost
"""

import base64
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kontext_min.extras.runs import read_metrics, write_text
from kontext_min.utils import clock

GAP = 4  # white pixels between the pictures of a sheet, as validation.grid leaves them
SIDE, QUALITY = 768, 85  # embedded pictures: longest side in pixels, JPEG quality
PICTURES, STEPS = 6, 4  # pictures shown; validations to choose from, besides the best one: under 10 MB together
LIMIT = 600  # points of a curve
RESTORED, RESTORED_SIDE = 24, 1280  # of a report on restored pictures: how many, and SIDE: under 25 MB together

Row = dict[str, Any]
Points = list[tuple[float, float]]
Line = tuple[str, Points, str]  # name, (x, y) pairs, CSS of the stroke
ACCENT, PALE = "stroke:var(--accent)", "stroke:var(--pale);stroke-width:1"
DASHED = "stroke:var(--quiet);stroke-dasharray:5 4"


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder, aside and renamed, from what is there; returns its path.

    Raises:
        OSError: the folder can't be written.
    """
    rows = [row for row in read_metrics(folder) if isinstance(row, dict) and isinstance(row.get("step"), int)]
    training = [row for row in rows if not row.get("validation")]
    validations = [row for row in rows if row.get("validation")]
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    sections = {
        "Before and after": before_after(folder, validations),
        "Validation": validation_charts(validations),
        "Training": training_charts(training),
        "Settings": settings_table(settings),
    }
    return save_page(folder, headline(training, validations, settings), sections)


def write_restored_report(folder: Path, figures: dict[str, str], count: int, mean: Row | None) -> Path:
    """Write report.html on restored pictures into a folder, aside and renamed; returns its path.

    Args:
        folder: of the restored pictures; must be there.
        figures: from `slider`, by name; best at most RESTORED of them.
        count: pictures that were restored.
        mean: metrics.mean_row, if there are clean pictures to compare with.

    Raises:
        OSError: the folder can't be written.
    """
    facts = [("Restored", f"{count:,}", "picture" + "s" * (count != 1))]
    if mean:
        before, after = mean["input"], mean["restored"]
        gain = f"{after['psnr'] - before['psnr']:+.2f} dB".replace("-", "−")
        facts.insert(0, ("Gain in PSNR", gain, "mean " + from_to(before["psnr"], after["psnr"])))
        facts.insert(1, ("SSIM", f"{after['ssim']:.3f}", f"before {before['ssim']:.3f}"))
        facts.insert(2, ("Texture, clean = 1", f"{after['texture']:.2f}", f"before {before['texture']:.2f}"))
    note = "" if len(figures) == count else f"{len(figures)} of {count:,} pictures are shown. "
    note += "Larger pictures are shrunk; whole ones are in the folder."
    left = LEFT if mean else ""
    body = BEFORE_AFTER.format(
        choices=left, figures="".join(figures[k] for k in sorted(figures)), note=note, views="{}"
    )
    return save_page(folder, fact_list(facts), {"Before and after": body})


def save_page(folder: Path, headline: str, sections: dict[str, str]) -> Path:
    """report.html in a folder, titled with the folder's name: written aside and renamed."""
    page = PAGE.format(
        name=html.escape(folder.resolve().name),
        css=CSS,
        headline=headline,
        sections="".join(f"<section><h2>{name}</h2>{body}</section>\n" for name, body in sections.items() if body),
        script=SCRIPT,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def headline(training: Sequence[Row], validations: Sequence[Row], settings: Row) -> str:
    """The gain of the best validation over the degraded pictures, and what it took."""
    facts = []
    if top := best(validations):
        before, after = top["psnr_degraded"], top["psnr"]
        facts.append(("Gain in PSNR", f"{after - before:+.2f} dB".replace("-", "−"), from_to(before, after)))
        facts.append(("SSIM", f"{top['ssim']:.3f}", f"degraded {top['ssim_degraded']:.3f}"))
        facts.append(("Best step", f"{top['step']:,}", "by PSNR"))
    if training:
        goal, skipped = settings.get("steps"), training[-1].get("skipped")
        note = (f"of {goal:,}" if isinstance(goal, int) else "") + (f", {skipped} skipped" if skipped else "")
        facts.append(("Steps", f"{training[-1]['step']:,}", note))
    if spent := series(training, "seconds"):
        seconds = sum(y for _, y in spent + series(validations, "seconds"))
        facts.append(("Time", clock(seconds), "validation included"))
    return fact_list(facts) if facts else "<p>Nothing has been measured yet.</p>"


def from_to(before: float | None, after: float | None) -> str:
    """PSNR of a picture before and after; None is infinite, the same as the clean one."""
    return " → ".join("∞" if x is None else f"{x:.2f}" for x in (before, after)) + " dB"


def fact_list(facts: Sequence[tuple[str, str, str]]) -> str:
    """(what, value, note) side by side, in large type."""
    cells = "".join(f"<div><dt>{what}</dt><dd>{value}<small>{note}</small></dd></div>" for what, value, note in facts)
    return f'<dl class="facts">{cells}</dl>'


def before_after(folder: Path, validations: Sequence[Row]) -> str:
    """A slider for each picture; to choose from are the last validation, the best one and a few others."""
    rows = {r["step"]: r for r in validations if r.get("pictures")}
    top, views, triples = best(list(rows.values())), {}, []
    for step in sorted({*evenly(list(rows), STEPS), *([top["step"]] if top else [])}):
        infos = rows[step]["pictures"][:PICTURES]
        try:
            triples = slices(folder / "validation" / f"step-{step:06d}.png", infos)
        except (OSError, Image.DecompressionBombError):  # not there, cut short, or too large to be opened
            continue
        scores = [from_to(p["psnr_degraded"], p["psnr"]) for p in infos]
        views[step] = [(embed(restored), score) for (_, restored, _), score in zip(triples, scores, strict=True)]
    if not views:
        return ""
    figures = ""
    for n, (triple, (_, score)) in enumerate(zip(triples, views[max(views)], strict=True), 1):
        figures += slider(str(n), *triple, score)
    options = ""
    for step in views:
        marks = (" selected" if step == max(views) else "", ", best" if top and step == top["step"] else "")
        options += f'<option value="{step}"{marks[0]}>{step:,}{marks[1]}</option>'
    note = "PSNR from degraded to restored. Larger pictures are shrunk; all of them are in validation/."
    return BEFORE_AFTER.format(choices=STEP.format(options) + LEFT, figures=figures, note=note, views=json.dumps(views))


def slider(
    name: str,
    degraded: Image.Image,
    restored: Image.Image,
    clean: Image.Image | None = None,
    score: str = "",
    side: int = SIDE,
) -> str:
    """A picture before and after, one over the other; pictures of one shape.

    Args:
        name: of the picture, plain text.
        degraded: at the left of the handle.
        restored: at its right.
        clean: may be chosen for the left, if there is one.
        score: plain text behind the name.
        side: what pictures are shrunk to, in pixels.
    """
    name, score = html.escape(name), html.escape(score)
    return SLIDER.format(
        n=name,
        width=degraded.width,
        height=degraded.height,
        most=3 * degraded.width,
        degraded=embed(degraded, side),
        restored=embed(restored, side),
        clean=CLEAN.format(n=name, clean=embed(clean, side)) if clean else "",
        score=score,
    )


def validation_charts(rows: Sequence[Row]) -> str:
    """PSNR, SSIM and loss over the steps, and the loss along the path from degraded to clean."""
    some = evenly([r for r in rows if isinstance(r.get("loss_at"), list)], 5)
    along = [(f"step {r['step']:,}", numbers((k / 10, y) for k, y in enumerate(r["loss_at"], 1))) for r in some]
    psnr, ssim = (
        [("restored", series(rows, key), ACCENT), ("degraded", series(rows, key + "_degraded"), DASHED)]
        for key in ("psnr", "ssim")
    )
    return charts(
        chart("PSNR", "dB", "step", psnr),
        chart("SSIM", "1 = identical", "step", ssim),
        chart("Loss, mean over sigma", "squared error", "step", [("loss", series(rows, "loss"), ACCENT)]),
        chart("Loss along the path", "squared error", "sigma, from degraded (0) to clean (1)", shades(along)),
    )


def training_charts(rows: Sequence[Row]) -> str:
    """Loss, loss by interval of sigma, gradient norm, learning rate and speed over the steps."""
    by_sigma = [(r["step"], r["sigma_loss"]) for r in rows if isinstance(r.get("sigma_loss"), list)]
    n = min((len(losses) for _, losses in by_sigma), default=0)
    intervals = [(f"{k / n:g} to {(k + 1) / n:g}", smooth(numbers((s, v[k]) for s, v in by_sigma))) for k in range(n)]
    return charts(
        chart("Loss", "squared error", "step", with_mean(series(rows, "loss"))),
        chart("Loss by sigma, smoothed", "squared error", "step", shades(intervals)),
        chart("Gradient norm", "before clipping", "step", with_mean(series(rows, "grad_norm"))),
        chart("Learning rate", "per step", "step", [("learning rate", series(rows, "lr"), ACCENT)], zero=True),
        chart("Speed", "images per second", "step", with_mean(series(rows, "images_per_second")), zero=True),
    )


def settings_table(settings: Row) -> str:
    """Every setting in a row; one that holds others, such as the versions, in a row for each of them."""
    flat: Row = {}
    for key, value in settings.items():
        flat |= {f"{key}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    texts = ((k.replace("_", " "), v if isinstance(v, str) else json.dumps(v)) for k, v in flat.items())
    cells = "".join(f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in texts)
    return f'<div class="columns"><table>{cells}</table></div>' if cells else ""


# ----------------------------------------------------------------------------------------------- numbers and pictures


def numbers(points: Iterable[tuple[float, Any]]) -> Points:
    """The points whose y is a finite number."""
    return [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]


def series(rows: Iterable[Row], key: str) -> Points:
    """One number of the rows over the step."""
    return numbers((row["step"], row.get(key)) for row in rows)


def best(validations: Sequence[Row]) -> Row | None:
    """The validation with the highest PSNR."""
    keys = ("psnr", "psnr_degraded", "ssim", "ssim_degraded")
    return max((r for r in validations if all(series([r], k) for k in keys)), key=lambda r: r["psnr"], default=None)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, the first and the last among them."""
    places = {round(k * (len(items) - 1) / (count - 1)) for k in range(count)} if items else set()
    return [items[i] for i in sorted(places)]


def smooth(points: Points) -> Points:
    """The exponential mean of the file's docstring, over a fiftieth of the points."""
    decay, total, weight, means = 1 - 2 / (max(len(points) // 50, 1) + 1), 0.0, 0.0, []
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1
        means.append((x, total / weight))
    return means


def thin(points: Points, limit: int = LIMIT) -> Points:
    """At most `limit` points: the lowest and the highest of each stretch."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [p for s in stretches for p in sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])})]


def slices(file: Path, infos: Sequence[Row]) -> list[list[Image.Image]]:
    """Cut a sheet that validation.grid wrote into [degraded, restored, clean] of each picture."""
    with Image.open(file) as opened:
        sheet, top, cut = opened.convert("RGB"), 0, []
    for w, h in ((info["width"], info["height"]) for info in infos):
        cut.append([sheet.crop((left, top, left + w, top + h)) for left in (0, w + GAP, 2 * (w + GAP))])
        top += h + GAP
    return cut


def embed(picture: Image.Image, side: int = SIDE) -> str:
    """A picture, shrunk if it is large, as a data URI."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# -------------------------------------------------------------------------------------------------------------- charts


def with_mean(points: Points) -> list[Line]:
    """A noisy curve, pale, with its smoothed form on it."""
    return [("each step", points, PALE), ("smoothed", smooth(points), ACCENT)]


def shades(curves: Sequence[tuple[str, Points]]) -> list[Line]:
    """Curves that have an order, from pale to the accent."""
    share = 65 / max(len(curves) - 1, 1)
    mix = "stroke:color-mix(in oklab,var(--accent) {:.0f}%,var(--ground))"
    return [(*curve, mix.format(100 - share * k)) for k, curve in enumerate(reversed(curves))][::-1]


def charts(*drawn: str) -> str:
    """Charts side by side; nothing if there is none."""
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Two to six round numbers between two bounds."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
        return found[:: math.ceil(len(found) / 6)]
    unit = 10.0 ** math.floor(math.log10(high - low))
    step = next(m * unit for m in (0.2, 0.5, 1, 2) if (high - low) / (m * unit) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, unit: str, x_name: str, lines: Sequence[Line], zero: bool = False) -> str:
    """Curves over a common axis, as a figure; nothing if they hold no point.

    The y axis starts at 0 if `zero`; else it is logarithmic where the values are positive and span a factor over 20.
    """
    lines = [line for line in lines if line[1]]
    if not lines:
        return ""
    xs, ys = ([p[axis] for line in lines for p in line[1]] for axis in (0, 1))
    log = not zero and min(ys) > 0 and max(ys) > 20 * min(ys)
    scale = math.log10 if log else float
    x0, x1, y0, y1 = min(xs), max(xs), 0.0 if zero else scale(min(ys)), scale(max(ys))
    x1 = x1 if x1 > x0 else x0 + 1  # a single step
    margin = 0.06 * (y1 - y0) or 0.1 * abs(y1) or 1.0
    y0, y1 = y0 if zero else y0 - margin, y1 + margin

    def across(x: float) -> str:
        return f"{52 + 372 * (x - x0) / (x1 - x0):.1f}"

    def down(y: float) -> str:
        return f"{188 - 180 * (scale(y) - y0) / (y1 - y0):.1f}"

    rules, curves, keys = "", "", ""
    for y in ticks(10**y0 if log else y0, 10**y1 if log else y1, log):
        rules += f'<path class="rule" d="M52 {down(y)}H424"/>'
        rules += f'<text class="end" x="46" y="{down(y)}" dy="4">{y:,.6g}</text>'
    for x in ticks(x0, x1):
        if x_name != "step" or x == round(x):
            rules += f'<text class="mid" x="{across(x)}" y="208">{x:,.10g}</text>'
    for name, points, style in lines:
        at = [(across(x), down(y)) for x, y in thin(points)]
        curves += f'<polyline style="{style}" points="{" ".join(f"{x},{y}" for x, y in at)}"/>'
        if len(at) <= 30:  # few enough to be marked; one alone would be invisible
            curves += "".join(f'<circle style="{style}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in at)
        keys += f'<span><svg viewBox="0 0 20 8"><path style="{style}" d="M0 4H20"/></svg>{name}</span>'
    said = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points, _ in lines)
    unit += ", log scale" if log else ""
    return CHART.format(title=title, unit=unit, x_name=x_name, said=said, rules=rules, curves=curves, keys=keys)


# -------------------------------------------------------------------------------------------------------------- markup

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{name}</title>
<style>{css}</style>
</head>
<body>
<h1>{name}</h1>
{headline}
{sections}<script>{script}</script>
</body>
</html>
"""

CHART = """<figure class="chart"><figcaption>{title} <small>{unit}</small></figcaption>
<svg viewBox="0 0 440 232" role="img" aria-label="{title}, {unit}, over {x_name}: {said}">{rules}{curves}
<text class="end" x="424" y="228">{x_name}</text></svg>
<p class="keys">{keys}</p></figure>
"""

BEFORE_AFTER = """<div class="views"><p class="choices">{choices}</p>
<div class="columns">{figures}</div>
<p class="note">{note}</p>
<script type="application/json" id="views">{views}</script></div>"""

STEP = """<label>Step <select name="step" autocomplete="off">{}</select></label>
"""
LEFT = """<label>Left <select name="left" autocomplete="off"><option>degraded</option><option>clean</option></select>
</label>"""

SLIDER = """<figure style="max-width:{most}px"><div class="stage" style="aspect-ratio:{width}/{height}">
<img src="{restored}" alt="picture {n}, restored">
<img class="left" src="{degraded}" alt="picture {n}, degraded">
<span class="left">degraded</span>{clean}<span>restored</span>
<input type="range" value="50" autocomplete="off" aria-label="picture {n}: percent of it shown as before">
</div><figcaption>{n}. <span>{score}</span></figcaption></figure>
"""
CLEAN = """<img class="left clean" src="{clean}" alt="picture {n}, clean"><span class="left clean">clean</span>"""

CSS = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1d2327; --quiet: #5f6a72; --rule: #e3e7e9;
  --accent: #0b6b74; --pale: #a9ccd0; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181a; --ink: #e6eaec; --quiet: #9aa5ab; --rule: #2b3236;
  --accent: #5fc4cd; --pale: #2f5f66; } }
@media print { :root { color-scheme: light; --ground: #fff; --ink: #000; --quiet: #444; --rule: #ccc;
  --accent: #0b6b74; --pale: #a9ccd0; } .choices { display: none; } }
* { box-sizing: border-box; }
body { max-width: 70rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; margin: 0 0 2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3.5rem 0 1.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h1, h2, .chart figcaption { font-weight: 600; }
small, dt, th, label, figcaption, .note, .keys { font-size: .875rem; font-weight: 400; color: var(--quiet); }
.facts { display: flex; flex-wrap: wrap; gap: 1.5rem 3.5rem; margin: 0; }
dd { margin: 0; font-size: 1.75rem; line-height: 1.3; }
dd small { display: block; }
.facts div:first-child dd { color: var(--accent); font-weight: 600; }
figure { margin: 0 0 1.5rem; break-inside: avoid; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: .5rem 3rem; }
.columns { columns: 2 26rem; column-gap: 3rem; }
.chart > svg { display: block; width: 100%; margin-top: .5rem; overflow: visible; }
.chart figcaption { font-size: 1rem; color: var(--ink); }
text { font-size: 12px; fill: var(--quiet); }
.end { text-anchor: end; }
.mid { text-anchor: middle; }
path, polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.rule { stroke: var(--rule); stroke-width: 1; }
circle { fill: var(--ground); stroke-width: 2; stroke-dasharray: none !important; }
.keys { display: flex; flex-wrap: wrap; gap: 0 1.25rem; margin: .25rem 0 0; }
.keys svg { width: 20px; height: 8px; margin-right: .4rem; }
.keys span:only-child { display: none; }
label { margin-right: 1.5rem; white-space: nowrap; }
select { font: inherit; padding: .25rem .5rem; margin-left: .35rem; }
.stage { position: relative; overflow: hidden; border-radius: 4px; --x: 50%; }
.stage:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
.stage img, .stage input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; }
.stage input { opacity: 0; cursor: ew-resize; touch-action: pan-y; }
.stage img.left { clip-path: inset(0 calc(100% - var(--x)) 0 0); }
.stage::after { content: ""; position: absolute; inset: 0 auto 0 var(--x); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #0008; pointer-events: none; }
.stage span { position: absolute; bottom: .5rem; right: .5rem; padding: 0 .5rem; border-radius: 3px;
  background: #000a; color: #fff; font-size: .8125rem; }
.stage span.left { right: auto; left: .5rem; }
.views:not([data-left=clean]) .clean, .views[data-left=clean] .left:not(.clean) { display: none; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
tr { break-inside: avoid; }
th, td { text-align: left; vertical-align: top; padding: .3rem 0; border-bottom: 1px solid var(--rule); }
th { width: 45%; padding-right: 1rem; }
td { overflow-wrap: anywhere; }
@media print { body { padding: 0; font-size: 12px; } h2 { break-after: avoid; } .columns { columns: 2 auto; }
  .charts { grid-template-columns: 1fr 1fr; gap: 0 2rem; } }
@media screen and (max-width: 30rem) { body { padding-top: 1.5rem; } .facts { gap: 1.25rem 2rem; }
  text { font-size: 15px; } }
"""

SCRIPT = """
const views = document.querySelector(".views");
const pictures = views && JSON.parse(document.getElementById("views").textContent);
views?.addEventListener("input", ({target}) => {
  if (target.type === "range") target.parentElement.style.setProperty("--x", target.value + "%");
  if (target.name === "left") views.dataset.left = target.value;
  if (target.name === "step") views.querySelectorAll("figure").forEach((view, i) => {
    [view.querySelector("img").src, view.querySelector("figcaption span").textContent] = pictures[target.value][i];
  });
});
"""

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kontext_min.extras.report RUN_FOLDER")
    print(write_report(Path(sys.argv[1])))
