"""The figures of docs: `python docs/figures.py` makes them again and prints the table beside the first one.

docs/demo.jpg    what `make demo` left in runs/demo, at half its size (extras/contact_sheet.py makes degradations.jpg)
docs/flow.png    a value that is -1 or +1, and what is left of it; the exact velocity, followed in 1 to 25 steps

In both rows of flow.png x_sigma is normal around +-m with variance s^2, given the clean value +-1. So the clean value
that x_sigma leads one to expect is E = tanh(m x_sigma / s^2), and the velocity (E - x_sigma) / (1 - sigma).

    noisy   degraded = clean + tau eps, a bridge from it           m = 1,      s = (1 - sigma) tau
    lost    degraded = 0 whatever the clean value, source noise    m = sigma,  s = (1 - sigma) --source-noise
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kontext_min.flow import integrate, schedule

HERE = Path(__file__).parent
STEPS = (1, 2, 4, 8, 25)
TAU, SOURCE_NOISE = 0.8, 0.5
SCALE = 2  # drawn at twice the size, then reduced: smooth lines
INK, PALE, CLEAN = (40, 40, 40), (205, 205, 205), (0, 130, 80)
COLOURS = ((20, 90, 170), (200, 80, 20), (120, 60, 150), (0, 130, 80))

# ------------------------------------------------------------------------------------------------------- the toy


def expected(x: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """E[clean | x_sigma]."""
    m, deviation = (1.0, TAU) if kind == "noisy" else (sigma, SOURCE_NOISE)
    return torch.tanh(m * x / ((1 - sigma) * deviation) ** 2)


def velocity(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity that a perfect network would give: E[clean - source | x_sigma]."""
    return lambda x, sigma: (expected(x, sigma, kind) - x) / (1 - sigma)


def paths(x: Tensor, kind: str, steps: int) -> tuple[Tensor, Tensor]:
    """Places (steps + 1,) and the states there (steps + 1, N): integrate, one step of the schedule at a time."""
    sigmas, states = schedule(steps, image_tokens=1, shift=False), [x]
    for k in range(steps):
        states.append(integrate(velocity(kind), states[-1], sigmas[k : k + 2]))
    return sigmas, torch.stack(states)


def toy_table(count: int = 200_000) -> str:
    """Mean squared error and deviation of what comes out, for many clean values and degradations."""
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 2, (count,), generator=g).double() * 2 - 1
    eps = torch.randn(count, generator=g, dtype=torch.float64)
    lines = ["| steps | noisy: error | spread | lost: error | spread |", "|--:|--:|--:|--:|--:|"]
    for steps in STEPS:
        row = f"| {steps} |"
        for kind, source in (("noisy", clean + TAU * eps), ("lost", SOURCE_NOISE * eps)):
            end = integrate(velocity(kind), source, schedule(steps, image_tokens=1, shift=False))
            row += f" {(end - clean).square().mean():.2f} | {end.std():.2f} |"
        lines.append(row)
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- drawing


class Panel:
    """A rectangle of a picture with axes: data coordinates in, lines and dots out."""

    def __init__(self, draw: ImageDraw.ImageDraw, box: Sequence[float], x: Sequence[float], y: Sequence[float]) -> None:
        self.draw, self.box, self.x, self.y = draw, [SCALE * v for v in box], x, y
        draw.rectangle(self.box, outline=INK, width=SCALE)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to pixels."""
        left, top, right, bottom = self.box
        across, up = ((v - a) / (b - a) for v, (a, b) in ((x, self.x), (y, self.y)))
        return left + across * (right - left), bottom - up * (bottom - top)

    def line(self, xs: Sequence[float], ys: Sequence[float], color: tuple[int, ...], width: float = 1) -> None:
        """A line through points."""
        points = [self.at(x, y) for x, y in zip(xs, ys, strict=True)]
        self.draw.line(points, fill=color, width=round(SCALE * width), joint="curve")

    def dot(self, x: float, y: float, color: tuple[int, ...], radius: float = 3) -> None:
        """A disc."""
        (px, py), r = self.at(x, y), SCALE * radius
        self.draw.ellipse([px - r, py - r, px + r, py + r], fill=color)

    def ticks(self, xs: dict[float, str], ys: dict[float, str]) -> None:
        """Numbers beside the axes."""
        for x, text in xs.items():
            px, _ = self.at(x, self.y[0])
            write(self.draw, px, self.box[3] + 4 * SCALE, text, "ma")
        for y, text in ys.items():
            _, py = self.at(self.x[0], y)
            write(self.draw, self.box[0] - 5 * SCALE, py, text, "rm")


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str, size: int = 13) -> None:
    """Text at a pixel."""
    draw.text((x, y), text, fill=INK, font=ImageFont.load_default(size * SCALE), anchor=anchor)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture of SCALE times the size."""
    image = Image.new("RGB", (SCALE * width, SCALE * height), "white")
    return image, ImageDraw.Draw(image)


def save(image: Image.Image, name: str) -> None:
    """Reduced to its size."""
    image = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)
    image.save(HERE / name, optimize=True)
    print(f"docs/{name}: {(HERE / name).stat().st_size // 1000} kB")


def flow_figure() -> None:
    """A row for each kind of degradation, a column for each number of steps."""
    image, draw = canvas(1000, 520)
    starts = {"noisy": torch.linspace(-1.6, 1.6, 9), "lost": torch.linspace(-1.2, 1.2, 8)}
    titles = {
        "noisy": f"noisy: degraded = clean + {TAU} eps; a bridge without source noise",
        "lost": f"lost: degraded = 0, whatever the clean value; a bridge with source noise {SOURCE_NOISE}",
    }
    for row, (kind, x) in enumerate(starts.items()):
        top = 45 + 250 * row
        write(draw, 45 * SCALE, SCALE * (top - 40), titles[kind], "la", 14)
        for column, steps in enumerate(STEPS):
            left = 45 + 190 * column
            panel = Panel(draw, (left, top, left + 170, top + 180), (-0.08, 1.08), (-1.9, 1.9))
            for value in (-1, 1):
                panel.line((-0.08, 1.08), (value, value), CLEAN, 1.5)
            places, states = paths(x.double(), kind, steps)
            for path in states.T.tolist():
                panel.line(places.tolist(), path, COLOURS[0])
                panel.dot(0, path[0], PALE, 3)
                panel.dot(1, path[-1], COLOURS[0], 3)
            mean = expected(x.double(), torch.zeros(()), kind)
            for value in mean.tolist():
                panel.line((1.02, 1.07), (value, value), COLOURS[1], 2)
            write(draw, SCALE * (left + 85), SCALE * (top - 20), f"{steps} step{'s' * (steps > 1)}", "ma")
            panel.ticks({0: "0", 1: "1"}, {-1: "-1", 0: "0", 1: "1"} if not column else {})
    note = "across: sigma; up: the value. Green: the two clean values. Orange: E[clean | start]."
    write(draw, 45 * SCALE, 500 * SCALE, note, "la")
    save(image, "flow.png")


def main() -> int:
    """All figures; 0."""
    flow_figure()
    print(toy_table())
    if (demo := HERE.parent / "runs" / "demo" / "demo.png").exists():
        Image.open(demo).convert("RGB").reduce(2).save(HERE / "demo.jpg", quality=88)
    return 0


if __name__ == "__main__":
    sys.exit(main())
