"""The scores of a sweep beside the paper's: means and spreads over seeds, differences seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from eve_ds.demo import FIRST_VALUES
from eve_ds.sweep.stages import Settings, read_json, run_folder, scores_file
from eve_ds.sweep.tables import MEASURES, Measure, Row, Table

# The 97.5 % quantile of Student's t distribution with 1, 2, ... degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
MOST_SEEDS = len(T_975) + 1
DASH = "–"  # noqa: RUF001
Figures = dict[str, Any]


def spread(values: Sequence[float]) -> Figures:
    """Mean and sample standard deviation; of one value that is None."""
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None}


def difference(values: Sequence[float], reference: Sequence[float]) -> Figures:
    """Mean of the differences seed by seed, and half of its 95 % interval (Student's t); of one seed that is None."""
    found = [value - base for value, base in zip(values, reference, strict=True)]
    half = T_975[len(found) - 2] * stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return {"mean": fmean(found), "half": half}


def table_of(settings: Settings, table: Table, rows: Sequence[str], seeds: int) -> list[Figures]:
    """The figures of each row, from the files of its runs, all of which are done.

    Args:
        settings: the sweep's.
        table: which sweep it is.
        rows: names of its rows, in order.
        seeds: number of seeds.
    Raises:
        UserError: a file of scores is damaged.
    """
    known = {row.name: row for row in (Row(FIRST_VALUES, ""), *table.rows)}
    figures = []
    for row in rows:
        scores = []
        for task, measure in ((name, each) for name in settings.tasks for each in MEASURES[name]):
            own = _scores(settings, row, seeds, task, measure)
            cell = {"task": task, "measure": measure.key, "seeds": own, **spread(own)}
            paper, base = (_paper(known[name], measure) for name in (row, table.reference))
            cell["paper"] = paper
            if row != table.reference and table.reference in rows:
                cell["difference"] = difference(own, _scores(settings, table.reference, seeds, task, measure))
            if row != table.reference and paper is not None and base is not None:
                cell["paper_difference"] = paper - base
            scores.append(cell)
        taken = [
            read_json(run_folder(settings.out, row, seed, "pretrain").with_suffix(".json")) for seed in range(seeds)
        ]
        seconds = [each["seconds"] for each in taken if "seconds" in each]
        minutes = fmean(seconds) / 60 if seconds else None
        figures.append({"row": row, "options": known[row].options, "minutes": minutes, "scores": scores})
    return figures


def _scores(settings: Settings, row: str, seeds: int, task: str, measure: Measure) -> list[float]:
    files = [scores_file(run_folder(settings.out, row, seed, task)) for seed in range(seeds)]
    return [measure.to_percent * read_json(file)[measure.key] for file in files]


def _paper(row: Row, measure: Measure) -> float | None:
    return getattr(row.paper, measure.key) if row.paper else None


def markdown(name: str, table: Table, figures: Sequence[Figures]) -> str:
    """The figures of ``table_of`` as a Markdown table with aligned columns, and what they mean."""
    cells = [cell for row in figures for cell in row["scores"]]
    told = {(cell["task"], cell["measure"]) for cell in cells if cell["paper"] is not None}
    head, against = [name], f"- {table.reference}"
    for cell in figures[0]["scores"]:
        measure = next(each for each in MEASURES[cell["task"]] if each.key == cell["measure"])
        head += [measure.title, against]
        head += [f"paper: {measure.paper_title}", against] if (cell["task"], cell["measure"]) in told else []
    lines = [[*head, "minutes"]]
    for row in figures:
        line = [row["row"]]
        for cell in row["scores"]:
            gap = cell.get("difference", {})
            line += [_shown(cell["mean"], cell["deviation"]), _shown(gap.get("mean"), gap.get("half"), "+")]
            if (cell["task"], cell["measure"]) in told:
                line += [_shown(cell["paper"]), _shown(cell.get("paper_difference"), sign="+")]
        lines.append([*line, _shown(row["minutes"])])
    seeds = len(cells[0]["seeds"])
    meaning = (
        f"Percent, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}; {against}: mean of the differences "
        f"seed by seed ± half of its 95 % interval (Student's t). {FIRST_VALUES}: fine-tuning alone. Minutes: of a "
        "pre-training."
    )
    return "\n".join([lined_up(lines), "", meaning, *([table.note] if table.note else [])]) + "\n"


def lined_up(lines: list[list[str]]) -> str:
    """A Markdown table, the first line its head, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)


def _shown(value: float | None, half: float | None = None, sign: str = "") -> str:
    if value is None:
        return DASH
    return f"{value:{sign}.1f}" + (f" ± {half:.1f}" if half is not None else "")
