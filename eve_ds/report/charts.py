"""Line charts as SVG inside the page, drawn by matplotlib and colored by the page's own variables.

Matplotlib is given placeholder colors, which are replaced by CSS variables afterwards: one chart suits light and dark.
Text stays text (``svg.fonttype: none``), so it takes the font of the page and can be found and copied.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from eve_ds.report.html import Html
from eve_ds.report.run_files import Curve

INK, GRID = "#010203", "#040506"
COLORS = {
    INK: "var(--muted)",
    GRID: "var(--grid)",
    "#0a0b01": "var(--c1)",
    "#0a0b02": "var(--c2)",
    "#0a0b03": "var(--c3)",
    "#0a0b04": "var(--c4)",
}
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
WIDTH, HEIGHT = 4.1, 2.25  # inches of 72 points
POINTS = 240  # drawn at most; longer curves are averaged over equal stretches
SMOOTHED_FROM = 40  # points, from which a running mean is drawn
WINDOW = 0.05  # its width, as a share of the curve


@dataclass
class Line:
    """A curve in a chart.

    Args:
        label: for readers who cannot see colors.
        curve: what is drawn.
        color: index in the page's colors.
        dots: show each point, as for the few evaluations of a run.
        smooth: draw a running mean on top if it is long.
    """

    label: str
    curve: Curve
    color: int = 0
    dots: bool = False
    smooth: bool = True


def line_chart(name: str, lines: list[Line], zero: bool = False) -> Html:
    """A chart of numbers over steps; each curve thin, and its running mean on top where it is long.

    Args:
        name: unique in the page; also what a screen reader says.
        lines: at least one.
        zero: the axis starts at zero.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "path.simplify": True}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        drawn = [_draw(axes, line) for line in lines]
        _dress(axes, drawn, zero)
        figure.subplots_adjust(left=0.13, right=0.985, top=0.96, bottom=0.13)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), f"{name}: " + ", ".join(line.label for line in lines))


def _draw(axes: Any, line: Line) -> NDArray[np.float64]:
    """Draws a curve; returns the values that must be in view."""
    steps, values = condense(line.curve)
    color = SERIES[line.color]
    if line.dots or not line.smooth or len(values) < SMOOTHED_FROM:
        marker = "o" if line.dots or len(values) < 3 else None
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.5)
        return values
    smooth = running_mean(values)
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth, color=color, linewidth=1.7)
    finite = values[np.isfinite(values)]
    return np.concatenate([smooth, np.percentile(finite, [1, 98])]) if len(finite) else smooth


def _dress(axes: Any, drawn: list[NDArray[np.float64]], zero: bool) -> None:
    """Limits, grid and ticks, quiet ones."""
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if len(values):
        low, high = (0.0 if zero else float(values.min())), float(values.max())
        space = (high - low) * 0.07 or abs(high) * 0.1 or 1.0
        axes.set_ylim(low if zero else low - space, high + space)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, pad=4)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: _thousands(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.margins(x=0.02)


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def condense(curve: Curve, points: int = POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over at most ``points`` equal stretches of steps and values; NaN where none of a stretch is finite."""
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    if len(steps) <= points:
        return steps, values
    stretch = np.arange(len(steps)) * points // len(steps)
    finite = np.isfinite(values)
    counts = np.bincount(stretch, weights=finite, minlength=points)
    sums = np.bincount(stretch, weights=np.where(finite, values, 0), minlength=points)
    means = np.divide(sums, counts, out=np.full(points, np.nan), where=counts > 0)
    return np.bincount(stretch, weights=steps) / np.bincount(stretch), means


def running_mean(values: NDArray[np.float64], window: float = WINDOW) -> NDArray[np.float64]:
    """Mean over a centered window, a share of the length wide and cut off at the ends; ignores NaN."""
    half = max(1, round(len(values) * window / 2))
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    number = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], number, out=np.full(len(values), np.nan), where=number > 0)


def _inline(svg: str, description: str) -> Html:
    """Matplotlib's file as an element of an HTML page: no prologue, metadata, style sheet, fixed size, group names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z.]+[\d.]*_\d+"', "", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {box.group() if box else ""} role="img" aria-label="{_attribute(description)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    for placeholder, color in COLORS.items():
        svg = svg.replace(placeholder, color)
    return Html(re.sub(r"\n\s*", "\n", svg).strip())


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
