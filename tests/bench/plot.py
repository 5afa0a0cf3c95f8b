"""`python -m tests.bench.plot`: what scaling and latency measured, as two pictures (SVG) in docs/."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

MEASURED, DOCS = Path("build/bench"), Path("docs")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 240, 66, 100, 40, 52
"""Pixels of a plot, and around it."""
APART = 14
"""Pixels between the names of two lines."""
SHADES = ("#6aa5d4", "#3f86c2", "#1d5f9f", "#0b2f5c")
GRID, LEVEL, INK = "#e3e3e3", "#c0392b", "#333333"
STEPS: list[float] = [digit * 10**zeros for zeros in range(7) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Axis:
    """A name, and the values marked on it, the first and the last at its ends; logarithmic where there is no 0."""

    name: str
    marks: list[float]

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        low, high = self.marks[0], self.marks[-1]
        return math.log(value / low) / math.log(high / low) if low else value / high


@dataclass(frozen=True)
class Plot:
    """A line for each name, the first the lightest, and a level to compare them with."""

    x: Axis
    y: Axis
    lines: dict[str, list[tuple[float, float]]]
    level: tuple[str, float]

    def svg(self, left: float) -> str:
        """Draw it."""
        parts = [_text(0, -14, self.y.name), _text(WIDTH / 2, HEIGHT + 38, self.x.name, "middle")]
        parts += [_text(self._x(mark), HEIGHT + 18, f"{mark:,.0f}", "middle") for mark in self.x.marks]
        parts += [_text(-8, self._y(mark) + 4, f"{mark:,.0f}", "end") for mark in self.y.marks]
        name, value = self.level
        parts += [self._across(mark, GRID) for mark in self.y.marks] + [self._across(value, LEVEL)]
        names = [(self._y(value), name, LEVEL)]
        for (name, points), shade in zip(self.lines.items(), SHADES, strict=False):
            corners = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
            parts += [f'<polyline points="{corners}" fill="none" stroke="{shade}" stroke-width="2"/>']
            names += [(self._y(points[-1][1]), name, shade)]
        below = -math.inf
        for at, name, colour in sorted(names):
            below = max(at + 4, below + APART)
            parts += [_text(WIDTH + 8, below, name, colour=colour)]
        return "\n".join([f'<g transform="translate({left} {TOP})">', *parts, "</g>"])

    def _across(self, value: float, colour: str) -> str:
        return f'<path d="M 0 {self._y(value):.1f} h {WIDTH}" stroke="{colour}"/>'

    def _x(self, value: float) -> float:
        return self.x.share(value) * WIDTH

    def _y(self, value: float) -> float:
        return (1 - self.y.share(value)) * HEIGHT


def _text(x: float, y: float, text: str, anchor: str = "start", *, colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def draw(path: Path, plots: list[Plot]) -> None:
    """Write a picture of plots side by side."""
    wide = LEFT + WIDTH + RIGHT
    size = f'width="{wide * len(plots)}" height="{TOP + HEIGHT + BOTTOM}" font-family="sans-serif" font-size="12"'
    body = "\n".join(plot.svg(number * wide + LEFT) for number, plot in enumerate(plots))
    white = '<rect width="100%" height="100%" fill="white"/>'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{white}\n{body}\n</svg>\n', encoding="utf-8")


def speed() -> list[Plot]:
    """Return rows/s by batch size, a line for each number of connections."""
    points = measured("scaling")["batch x connections"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        lines.setdefault(f"connections: {point['connections']}", []).append((point["batch"], point["rate"]))
    raw = statistics.median(point["rate"] / point["ratio"] for point in points)
    top = max(raw, *(point["rate"] for point in points))
    step = next(step for step in STEPS if top / step <= 6)
    batches = Axis("messages of a batch, at most", sorted({point["batch"] for point in points}))
    rows = Axis("rows/s, append", [step * number for number in range(math.ceil(top / step) + 1)])
    return [Plot(batches, rows, lines, ("one raw COPY", raw))]


def measured(name: str) -> Any:  # noqa: ANN401 - JSON
    """Read what a benchmark kept."""
    path = MEASURED / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: python -m tests.bench.{name} makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def latency() -> list[Plot]:
    """Return milliseconds from produce to commit by rate, a plot for each `max_age`."""
    runs = measured("latency")
    names = {"p50": "p50", "p99": "p99", "p999": "p99.9"}
    times = [time * 1000 for run in runs for time in (run["max_age"], *(run[key] for key in names))]
    rates = Axis("messages/s", sorted({run["asked"] for run in runs}))
    marks = [step for step in STEPS if min(times) / 2.5 < step < max(times) * 2.5]
    plots: list[Plot] = []
    for age in sorted({run["max_age"] * 1000 for run in runs}):
        mine = [run for run in runs if run["max_age"] * 1000 == age]
        lines = {name: [(run["asked"], run[key] * 1000) for run in mine] for key, name in names.items()}
        plots.append(
            Plot(rates, Axis(f"ms from produce to commit, max_age {age:g} ms", marks), lines, ("max_age", age))
        )
    return plots


if __name__ == "__main__":
    draw(DOCS / "speed.svg", speed())
    draw(DOCS / "latency.svg", latency())
