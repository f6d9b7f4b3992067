"""An empty value, as of a shell variable that is not set, is told: as a path it would be the current folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from evaluation.vqa import main as vqa
from eve_ds.predict.__main__ import main as predict
from eve_ds.report.__main__ import main as report

OTHERS = ("--checkpoint", "x")
EMPTY: list[tuple[Callable[[list[str]], object], tuple[str, ...], str]] = [
    (vqa, ("--predictions", "", "--annotations", "a", "--out", "o"), "--predictions"),
    (vqa, ("--predictions", "p", "--annotations", "a", "--out="), "--out"),
    (report, ("",), "DIR"),  # type Path
    (predict, ("index", "", "--out", "x", *OTHERS), "FOLDER"),
    (predict, ("index", "photos", "--out", "", *OTHERS), "--out"),
    (predict, ("answer", "--input", "", *OTHERS), "--input"),
    (predict, ("answer", "", "what", *OTHERS), "IMAGE"),
    (predict, ("answer", *OTHERS, "--", "", "what"), "IMAGE"),
    (predict, ("features", "a.png", "", "--out", "f.npz", *OTHERS), "IMAGE"),
    (predict, ("search", "a", "--index", "", *OTHERS), "--index"),
    (predict, ("serve", "--checkpoint", "x", "--checkpoint", ""), "--checkpoint"),
]


@pytest.mark.parametrize(("command", "arguments", "name"), EMPTY)
def test_an_empty_value_is_refused_by_name(
    command: Callable[[list[str]], object],
    arguments: tuple[str, ...],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(list(arguments))
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.count("\n") == 1
    assert f"error: argument {name}: is empty; give a value, or see that a shell variable is set" in told
