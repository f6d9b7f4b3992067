"""The scores of fine-tuned runs side by side, each tested against the first run that has it."""

from __future__ import annotations

import re
from typing import Any

from eve_ds.report.compared import Compared
from eve_ds.report.html import Html, key, missing, section, tag
from eve_ds.report.paired import NotTested, Tests, paired_tests
from eve_ds.report.run_files import number, optional, task_of
from eve_ds.report.scores import DASH
from eve_ds.tasks.spec import FinetuneSpec


def compared_scores(runs: list[Compared]) -> Html:
    """Section with a table for each task and split that two or more of the runs are scored on."""
    found: dict[tuple[str, str], list[tuple[Compared, FinetuneSpec, dict[str, Any]]]] = {}
    for run in runs:
        for path in sorted(run.stage.folder.glob("scores_*.json")):
            scores = optional(path, dict)
            spec = None if run.pretrains and run.config else task_of(run.stage, scores)
            if spec is not None:
                split = re.sub("^scores_", "", path.stem)
                found.setdefault((spec.name, split), []).append((run, spec, scores))
    parts = [_table(runs, split, scored) for (_, split), scored in found.items() if len(scored) > 1]
    if not parts:
        return section("scores", "Scores", missing("scores_*.json of a task and split that two of the runs share"))
    note = (
        "In percent, with the difference from the first run that is scored. p is two-sided, and not corrected for the "
        "number of tests. Retrieval: 95 % interval of the difference, by bootstrap over images. VQA and NLVR: exact "
        "test on those examples where one run scores higher (McNemar's, where answers are right or wrong)."
    )
    return section("scores", "Scores", tag("p", note, class_="note"), parts)


def _table(runs: list[Compared], split: str, scored: list[tuple[Compared, FinetuneSpec, dict[str, Any]]]) -> Html:
    (first, spec, base), *others = scored
    tests: dict[str, Tests] = {}
    notes = []
    for run, _, _ in others:
        try:
            tests[run.name] = paired_tests(spec.name, first, run, split)
        except NotTested as reason:
            notes.append(tag("p", f"{run.name} is not tested against {first.name}: {reason}.", class_="missing"))
    rows = []
    for measure, label in spec.measures:
        if sum(number(scores.get(measure)) is not None for _, _, scores in scored) < 2:
            continue
        cells = [_cell(measure, spec.to_percent, base, run, scores, tests) for run, _, scores in scored]
        rows.append(tag("tr", tag("th", label), cells))
    columns = [tag("th", key(runs.index(run)), run.name) for run, _, _ in scored]
    head = tag("thead", tag("tr", tag("th", "Measure"), columns))
    table = tag("table", head, tag("tbody", rows), class_="sides")
    return Html(tag("h3", f"{spec.title}, split {split}") + tag("div", table, class_="wide") + "".join(notes))


def _cell(
    measure: str, factor: float, base: dict[str, Any], run: Compared, scores: dict[str, Any], tests: dict[str, Tests]
) -> Html:
    value, before = number(scores.get(measure)), number(base.get(measure))
    if value is None:
        return tag("td", DASH)
    difference = None
    if scores is not base and before is not None:
        difference = tag("span", f" {(value - before) * factor:+.1f}", class_="last")
    test = tests.get(run.name, {}).get(measure)
    return tag("td", f"{value * factor:.1f}", difference, tag("div", test, class_="fine") if test else None)
