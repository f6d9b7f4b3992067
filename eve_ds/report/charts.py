"""Line charts as inline SVG, drawn by matplotlib and colored by CSS variables of the page.

Matplotlib draws with placeholder colors, which are then replaced by CSS variables, so one chart fits light and dark
themes. Text stays text (``svg.fonttype: none``): it has the font of the page, and can be searched and copied.
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
    "#0a0b05": "var(--c5)",
    "#0a0b06": "var(--c6)",
}
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
WIDTH, HEIGHT = 4.1, 2.25  # inches of 72 points
POINTS = 240  # maximum number drawn; longer curves are averaged over equal intervals
SMOOTHED_FROM = 40  # minimum number of points for a running mean
WINDOW = 0.05  # width of the running mean, as a fraction of the curve


@dataclass
class Line:
    """A curve in a chart.

    Args:
        label: for the text description of the chart.
        curve: its values.
        color: index in the page's colors.
        dots: mark each point, as for the few evaluations of a run.
        smooth: draw a running mean on top of a long curve.
        raw: draw the long curve itself beneath its running mean.
    """

    label: str
    curve: Curve
    color: int = 0
    dots: bool = False
    smooth: bool = True
    raw: bool = True


def line_chart(name: str, lines: list[Line], zero: bool = False, whole: bool = True) -> Html:
    """A chart of values over steps: a long curve is thin, with its running mean on top.

    Args:
        name: unique in the page; also read by screen readers.
        lines: at least one.
        zero: start the value axis at zero.
        whole: the horizontal axis has whole numbers alone, such as steps; false for hours.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "path.simplify": True}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        drawn = [_draw(axes, line) for line in lines]
        _style_axes(axes, drawn, zero, whole)
        figure.subplots_adjust(left=0.13, right=0.985, top=0.96, bottom=0.13)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), f"{name}: " + ", ".join(line.label for line in lines))


def _draw(axes: Any, line: Line) -> NDArray[np.float64]:
    """Draw a curve; return the values that the axis must show."""
    steps, values = condense(line.curve)
    color = SERIES[line.color]
    if line.dots or not line.smooth or len(values) < SMOOTHED_FROM:
        marker = "o" if line.dots or len(values) < 3 else None
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.5)
        return values
    smooth = running_mean(values)
    if line.raw:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth, color=color, linewidth=1.7)
    if not line.raw:
        return smooth
    finite = values[np.isfinite(values)]
    return np.concatenate([smooth, np.percentile(finite, [1, 98])]) if len(finite) else smooth


def _style_axes(axes: Any, drawn: list[NDArray[np.float64]], zero: bool, whole: bool) -> None:
    """Set limits, grid and ticks."""
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
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, min_n_ticks=1 if whole else 2))
    axes.xaxis.set_major_formatter(lambda value, _: short(value, 6))
    axes.yaxis.set_major_formatter(lambda value, _: short(value, 4))
    axes.margins(x=0.02)


def short(value: float, digits: int) -> str:
    """``0.0018``, ``863``, ``9500``, ``52.5k`` or ``1.25M``; of so many digits, but four at least above 1,000."""
    more = max(digits, 4)
    rounded = float(f"{value:.{more}g}")
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= max(factor, 10_000):
            return f"{rounded / factor:.{more}g}{unit}"
    text = f"{value:.{digits}g}"
    return f"{rounded:.{more}g}" if "e+" in text else text


def condense(curve: Curve, points: int = POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of steps and finite values over at most ``points`` equal intervals; NaN if no value of one is finite."""
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    if len(steps) <= points:
        return steps, values
    interval = np.arange(len(steps)) * points // len(steps)
    finite = np.isfinite(values)
    counts = np.bincount(interval, weights=finite, minlength=points)
    sums = np.bincount(interval, weights=np.where(finite, values, 0), minlength=points)
    means = np.divide(sums, counts, out=np.full(points, np.nan), where=counts > 0)
    return np.bincount(interval, weights=steps) / np.bincount(interval), means


def running_mean(values: NDArray[np.float64], window: float = WINDOW) -> NDArray[np.float64]:
    """Centered running mean; ``window`` is a fraction of the length, truncated at the ends. Ignores NaN."""
    half = max(1, round(len(values) * window / 2))
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], number, out=np.full(len(values), np.nan), where=number > 0)


def _inline(svg: str, description: str) -> Html:
    """Strip matplotlib's SVG to an inline element: no prologue, metadata, style sheet, fixed size or group names."""
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
