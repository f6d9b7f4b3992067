"""The scores of fine-tuned runs side by side, each tested against the first run that has it."""

from __future__ import annotations

import re
from typing import Any

from eve_ds.report.compared import Compared
from eve_ds.report.html import Html, key, missing, section, tag
from eve_ds.report.paired import NotTested, Tests, paired_tests
from eve_ds.report.run_files import number, optional, task_of
from eve_ds.report.scores import DASH, measured, of_group
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
        "number of tests. The interval is the difference's, 95 %, by bootstrap over images (retrieval, VQA) or "
        "sentences (NLVR). VQA and NLVR also have the exact test on those examples where one run scores higher "
        "(McNemar's, where answers are right or wrong), which takes examples for independent."
    )
    return section("scores", "Scores", tag("p", note, class_="note"), parts)


def _table(runs: list[Compared], split: str, scored: list[tuple[Compared, FinetuneSpec, dict[str, Any]]]) -> Html:
    (first, spec, _), *others = scored
    tests: dict[str, Tests] = {}
    notes = []
    for run, _, _ in others:
        try:
            tests[run.name] = paired_tests(spec.name, first, run, split)
        except NotTested as reason:
            notes.append(tag("p", f"{run.name} is not tested against {first.name}: {reason}.", class_="missing"))
    rows = []
    for measure, group, label in measured(spec, [scores for _, _, scores in scored]):
        told = {name: found.get(f"{group}/{measure}" if group else measure) for name, found in tests.items()}
        values = [number(of_group(scores, group).get(measure)) for _, _, scores in scored]
        cells = [
            _cell(value, None if place == 0 else values[0], spec.to_percent, told.get(run.name))
            for place, (value, (run, _, _)) in enumerate(zip(values, scored, strict=True))
        ]
        rows.append(tag("tr", tag("th", label), cells))
    columns = [tag("th", key(runs.index(run)), run.name) for run, _, _ in scored]
    head = tag("thead", tag("tr", tag("th", "Measure"), columns))
    table = tag("table", head, tag("tbody", rows), class_="sides")
    return Html(tag("h3", f"{spec.title}, split {split}") + tag("div", table, class_="wide") + "".join(notes))


def _cell(value: float | None, before: float | None, factor: float, test: str | None) -> Html:
    if value is None:
        return tag("td", DASH)
    difference = None
    if before is not None:
        difference = tag("span", f" {(value - before) * factor:+.1f}", class_="last")
    return tag("td", f"{value * factor:.1f}", difference, tag("div", test, class_="fine") if test else None)
