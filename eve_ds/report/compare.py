"""The page that compares runs: curves, held-out metrics, scores with tests, and what differs in config and record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eve_ds.report.charts import Line, line_chart
from eve_ds.report.compare_scores import compared_scores
from eve_ds.report.compared import Compared, read_compared, shown
from eve_ds.report.curves import FROM_ZERO, NO_CHART, ORDER, ORDER_LAST, TITLES
from eve_ds.report.html import Html, key, missing, page, section, tag
from eve_ds.report.run_files import Curve
from eve_ds.report.scores import DASH

IGNORED = {"output_dir"}  # differs always and says nothing
CLEAR = 3  # runs whose noise can be told apart in one chart; of more, the running means alone are drawn
Axis = tuple[str, Callable[[Compared, Curve], Curve], bool]  # title, what it makes of a curve, whole numbers alone


def build_comparison(folders: Sequence[Path]) -> Html:
    """Build the page about the training runs in ``folders``, two to six.

    Raises:
        InputError: as ``read_compared``.
    """
    runs = read_compared(folders)
    sections = [
        compared_scores(runs),
        _held_out(runs),
        _curves(runs),
        _differences("config", "Configuration: what differs", "config.yaml", runs, [run.config for run in runs]),
        _differences(
            "record", "Code, machines and data: what differs", "provenance/", runs, [run.recorded for run in runs]
        ),
    ]
    return page(f"EVE-DS: {' and '.join(run.name for run in runs)}", _head(runs), sections)


def _legend(runs: Sequence[Compared]) -> Html:
    """The color of each run."""
    return tag("div", [tag("span", key(number), run.name) for number, run in enumerate(runs)], class_="legend")


def _heads(runs: Sequence[Compared], kind: str | None = None) -> list[Html]:
    """Column heads of a table with one column a run; ``kind``: class of its cells."""
    return [tag("th", key(number), run.name, class_=kind) for number, run in enumerate(runs)]


def _head(runs: list[Compared]) -> Html:
    tasks = [run.task for run in runs]
    notes = []
    if len(set(tasks)) > 1:
        which = ", ".join(f"{run.name}: {run.task}" for run in runs)
        notes.append(tag("p", f"These are runs of different tasks ({which}): what they have in common is compared."))
    for run in runs:
        if run.stage.damaged:
            notes.append(tag("p", f"{run.name}: {run.stage.damaged} line(s) of metrics.jsonl could not be read."))
    rows = [
        tag("tr", tag("th", key(n), run.name), tag("td", run.task), tag("td", _length(run), class_="n"),
            tag("td", _hours_text(run), class_="n"), tag("td", _started(run), class_="when"))
        for n, run in enumerate(runs)
    ]  # fmt: skip
    titles = (
        ("Run", None),
        ("Task", None),
        ("Steps", "n"),
        ("Hours", "n"),
        ("Newest start (UTC)", None),
    )
    head = tag("tr", [tag("th", title, class_=kind) for title, kind in titles])
    table = tag("table", tag("thead", head), tag("tbody", rows))
    links = (("scores", "Scores"), ("held-out", "Held-out"), ("curves", "Curves"), ("config", "Config"),
             ("record", "Code, machines, data"))  # fmt: skip
    return tag(
        "header",
        tag("p", "EVE-DS · comparison of runs", class_="kicker"),
        tag("h1", f"{len(runs)} runs compared"),
        notes,
        tag("div", table, class_="wide"),
        tag("nav", [tag("a", title, href=f"#{anchor}") for anchor, title in links], aria_label="Contents"),
    )


def _length(run: Compared) -> str:
    curve = run.stage.curves.get("lr") or run.stage.curves.get("loss")
    return f"{curve.steps[-1]:,.0f}" if curve else DASH


def _hours_text(run: Compared) -> str:
    curve = run.stage.curves.get("step_seconds")
    return f"{np.nansum(curve.values) / 3600:.3g}" if curve else DASH


def _started(run: Compared) -> str:
    return str(run.start.get("time", DASH))[:16].replace("T", " ")


def over_steps(run: Compared, curve: Curve) -> Curve:
    """The curve as it is."""
    return curve


def over_samples(run: Compared, curve: Curve) -> Curve:
    """The curve over the number of samples that the run had seen."""
    return _over(curve, run.stage.curves.get("samples"), total=False)


def over_hours(run: Compared, curve: Curve) -> Curve:
    """The curve over the hours that the run's steps had taken until then: evaluations, checkpoints and pauses between
    starts do not count."""
    found = _over(curve, run.stage.curves.get("step_seconds"), total=True)
    return Curve([seconds / 3600 for seconds in found.steps], found.values)


def _over(curve: Curve, clock: Curve | None, total: bool) -> Curve:
    """``curve`` over the value, or the sum of the values, of ``clock`` at its steps. Empty without a clock."""
    if clock is None:
        return Curve()
    order = np.argsort(clock.steps, kind="stable")
    steps, values = np.asarray(clock.steps)[order], np.nan_to_num(np.asarray(clock.values)[order])
    reached = np.concatenate([[0.0], np.cumsum(values) if total else values])
    places = np.searchsorted(steps, curve.steps, side="right")
    return Curve(reached[places].tolist(), curve.values)


AXES: tuple[Axis, ...] = (
    ("steps", over_steps, True),
    ("samples", over_samples, True),
    ("hours", over_hours, False),
)


def _curves(runs: list[Compared]) -> Html:
    common, alone = common_curves(runs)
    note = (
        "Each metric that two or more of the runs recorded, over steps, over samples and over hours. Hours are the "
        "time that the training steps took: evaluations, checkpoints and pauses between starts do not count. "
        f"Dots: held out. {'Thin: recorded, thick: running mean.' if len(runs) <= CLEAR else 'Lines: running means.'}"
    )
    rows = [_row(runs, name) for name in common]
    only = [tag("p", f"Recorded by one run alone: {', '.join(alone)}.", class_="note")] if alone else []
    body = rows or [missing("a metric that two of the runs have in common")]
    return section("curves", "Curves", tag("p", note, class_="note"), _legend(runs), body, only)


def common_curves(runs: list[Compared]) -> tuple[list[str], list[str]]:
    """Keys of metrics.jsonl for a chart that two or more runs have, losses first; and those that one run has."""
    found: dict[str, int] = {}
    for run in runs:
        for name, curve in run.stage.curves.items():
            split, _, metric = name.rpartition("/")
            chart = split != "data/samples" and not NO_CHART.fullmatch(metric)
            if chart and any(math.isfinite(value) for value in curve.values):
                found[name] = found.get(name, 0) + 1

    def rank(name: str) -> tuple[int, int, str]:
        split, _, metric = name.rpartition("/")
        if metric in ORDER:
            return 0, 2 * ORDER.index(metric) + bool(split), name
        return (2, ORDER_LAST.index(metric), name) if metric in ORDER_LAST else (1, 0, name)

    names = sorted(found, key=rank)
    return [name for name in names if found[name] > 1], [name for name in names if found[name] == 1]


def _row(runs: list[Compared], name: str) -> Html:
    split, _, metric = name.rpartition("/")
    title = TITLES.get(metric, metric.replace("_", " ").capitalize())
    if split and split != "data":
        title = f"{title} ({'held out' if split == 'val' else split})"
    charts = []
    for axis, along, whole in AXES:
        lines = [
            Line(
                run.name,
                along(run, run.stage.curves[name]),
                number,
                dots=split == "val",
                smooth=metric != "lr",
                raw=len(runs) <= CLEAR,
            )
            for number, run in enumerate(runs)
            if name in run.stage.curves
        ]
        lines = [line for line in lines if line.curve.steps]
        if lines:
            chart = line_chart(f"{name} over {axis}", lines, zero=metric in FROM_ZERO, whole=whole)
            charts.append(tag("figure", tag("figcaption", f"over {axis}"), chart))
    return Html(tag("h3", title) + tag("div", charts, class_="charts"))


def _held_out(runs: list[Compared]) -> Html:
    names = sorted({name for run in runs for name in run.stage.curves if name.startswith("val/")})
    rows = []
    for name in names:
        last = [_last(run.stage.curves.get(name)) for run in runs]
        if sum(value is not None for value in last) > 1:
            rows.append(
                tag("tr", tag("th", name.removeprefix("val/")), [_value(v, last[0], n) for n, v in enumerate(last)])
            )
    if not rows:
        return section("held-out", "Held-out metrics", missing("held-out metrics that two of the runs have in common"))
    note = "The last evaluation of each run, and its difference from that of the first run."
    reached = [tag("td", _reached(run), class_="n") for run in runs]
    head = tag("thead", tag("tr", tag("th", "Metric"), _heads(runs, "n")))
    table = tag(
        "table", head, tag("tbody", tag("tr", tag("th", "step"), reached, class_="minor"), rows), class_="sides"
    )
    return section("held-out", "Held-out metrics", tag("p", note, class_="note"), tag("div", table, class_="wide"))


def _last(curve: Curve | None) -> float | None:
    finite = [value for value in curve.values if math.isfinite(value)] if curve else []
    return finite[-1] if finite else None


def _reached(run: Compared) -> str:
    steps = [curve.steps[-1] for name, curve in run.stage.curves.items() if name.startswith("val/")]
    return f"{max(steps):,.0f}" if steps else DASH


def _value(value: float | None, first: float | None, number: int) -> Html:
    if value is None:
        return tag("td", DASH, class_="n")
    beside = tag("span", f" {value - first:+.3g}", class_="last") if number and first is not None else None
    return tag("td", f"{value:.4g}", beside, class_="n")


def _differences(anchor: str, title: str, file: str, runs: list[Compared], found: list[dict[str, Any]]) -> Html:
    """A table of those keys whose values differ, of runs that recorded any."""
    gaps = [missing(f"{file} of {run.name}") for run, values in zip(runs, found, strict=True) if not values]
    known = [values for values in found if values]
    keys = list(dict.fromkeys(name for values in known for name in values if name not in IGNORED))
    absent = object()
    differing = [
        name for name in keys if any(values.get(name, absent) != known[0].get(name, absent) for values in known)
    ]
    cells = [[shown(values[name]) if name in values else DASH for values in found] for name in differing]
    rows = [tag("tr", tag("th", name), [tag("td", text) for text in row])
            for name, row in zip(differing, cells, strict=True)]  # fmt: skip
    note = f"{len(keys) - len(differing)} other values are the same in all runs that recorded them."
    if not rows:
        nothing = "Nothing differs." if len(known) > 1 else "Nothing can be compared."
        return section(anchor, title, tag("p", nothing), gaps)
    table = tag("table", tag("thead", tag("tr", tag("th", ""), _heads(runs))), tag("tbody", rows), class_="sides")
    return section(anchor, title, tag("div", table, class_="wide"), tag("p", note, class_="note"), gaps)
