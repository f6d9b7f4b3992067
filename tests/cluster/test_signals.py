"""docs/signals.md says what each signal does through each launcher: a slice of its table here, all in the long test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.runs import TinyRun
from tests.cluster.signal_table import Line, launched_from, observe, table

SLICE = {(Line("deepspeed", "launcher", "steps"), "KILL")}
CELLS = [pytest.param(*cell, marks=[] if cell in SLICE else pytest.mark.long) for cell in table()]


@pytest.mark.parametrize(
    ("line", "name"), CELLS, ids=lambda each: each if isinstance(each, str) else str(each.launcher)
)
def test_a_cell_of_the_table(
    line: Line, name: str, tiny_run: TinyRun, environment: Mapping[str, str], tmp_path: Path
) -> None:
    with launched_from(line, environment) as ours:
        assert observe(line, name, tiny_run, ours, tmp_path) == table()[line, name]


def test_no_launcher_leaves_ranks_that_train_on() -> None:
    assert {cell for cell, _ in table()} and not [cell for cell, what in table().items() if "left" in what]
