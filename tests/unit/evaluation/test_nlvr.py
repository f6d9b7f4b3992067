"""NLVR2: the official numbers, the groups of consistency, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import nlvr
from evaluation.common import InputError, read_json_rows, run

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "tests" / "assets"


def official() -> dict[str, float]:
    lines = json.loads((ASSETS / "nlvr2_official_scores.json").read_text())["official_output"].split()
    return {line.split("=")[0]: float(line.split("=")[1]) for line in lines}


def example(identifier: str, label: object = "True") -> dict[str, object]:
    return {"identifier": identifier, "label": label, "sentence": "s"}


def test_official_scores() -> None:
    predictions = nlvr.read_predictions(str(ASSETS / "nlvr2_predictions.csv"))
    assert nlvr.score(predictions, read_json_rows(ASSETS / "nlvr2_split.json")) == official()


def test_command_takes_json_lines_and_a_json_list(tmp_path: Path) -> None:
    rows = read_json_rows(ASSETS / "nlvr2_split.json")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for path in (ASSETS / "nlvr2_split.json", tmp_path / "list.json"):
        out = tmp_path / "m.json"
        command = [sys.executable, "-m", "evaluation.nlvr", "--predictions", str(ASSETS / "nlvr2_predictions.csv")]
        done = subprocess.run(
            [*command, "--annotations", str(path), "--out", str(out)], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(out.read_text()) == official()


def test_consistency_groups_pairs_of_one_sentence() -> None:
    examples = [example(f"dev-7-{pair}-{sentence}") for sentence in (0, 1) for pair in range(4)]
    predictions = {str(e["identifier"]): "true" for e in examples}
    assert nlvr.score(predictions, examples) == {"accuracy": 1, "consistency": 1}
    assert nlvr.score(predictions | {"dev-7-3-1": "FALSE"}, examples) == {"accuracy": 7 / 8, "consistency": 1 / 2}


@pytest.mark.parametrize(
    ("predictions", "examples", "words"),
    [
        ({}, [], "no examples"),
        ({}, [example("dev-1-0-0")], "1 of 1 examples have no prediction: 'dev-1-0-0'"),
        ({"dev-1-0-0": "maybe"}, [example("dev-1-0-0")], "'maybe', neither True nor False"),
        ({}, [example("dev-1-0")], "example 1: identifier 'dev-1-0' does not read split-set-pair-sentence"),
        ({}, [example("dev-1-0-0", None)], "label of 'dev-1-0-0' is None"),
        ({"dev-1-0-0": "True"}, [example("dev-1-0-0")] * 2, "example 2: identifier 'dev-1-0-0' occurs twice"),
        ({}, ["x"], "example 1: no JSON object"),
    ],
)
def test_bad_rows_name_the_fault(predictions, examples, words: str) -> None:
    with pytest.raises(InputError) as caught:
        nlvr.score(predictions, examples)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("csv", "annotations", "words"),
    [
        ("", None, "p.csv: holds no predictions"),
        ("dev-1-0-0;True\n", None, "p.csv: line 1: 'dev-1-0-0;True' is not"),
        ("dev-1-0-0,True\n\ndev-1-1-0,Yes\n", None, "p.csv: line 3"),
        ("dev-1-0-0,True\ndev-1-0-0,True\n", None, "line 2: identifier 'dev-1-0-0' occurs twice"),
        (
            "dev-1-0-0,True\n",
            '{"identifier": "dev-1-0-0", "label": "True"}\n{"identifier"\n',
            "a.json: invalid JSON at line 2 column 14",
        ),
        ("dev-1-0-0,True\n", '[{"identifier":\n"dev-1-0-0" "label"}]', "a.json: invalid JSON at line 2 column 13"),
        ("dev-1-0-0,True\n", "\n", "a.json: holds no rows"),
        ("dev-9-0-0,True\n", None, "1 of 1 examples have no prediction"),
        ("\udcff", None, "p.csv: not UTF-8"),
    ],
)
def test_bad_files_exit_with_2_and_one_line(
    tmp_path: Path, capsys, csv: str, annotations: str | None, words: str
) -> None:
    (tmp_path / "p.csv").write_text(csv, errors="surrogateescape")
    (tmp_path / "a.json").write_text(annotations if annotations is not None else json.dumps(example("dev-1-0-0")))
    arguments = ["--predictions", str(tmp_path / "p.csv"), "--annotations", str(tmp_path / "a.json")]
    assert run(nlvr.main, [*arguments, "--out", str(tmp_path / "m.json")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_predictions_beyond_the_examples_are_refused_or_left_out_on_request(tmp_path: Path, capsys) -> None:
    (tmp_path / "p.csv").write_text("identifier,prediction\r\ndev-1-0-0, False \r\ndev-1-1-0,True\r\n")
    (tmp_path / "a.json").write_text(json.dumps(example("dev-1-0-0", "false")))
    arguments = ["--predictions", str(tmp_path / "p.csv"), "--annotations", str(tmp_path / "a.json")]
    arguments += ["--out", str(tmp_path / "m.json")]
    assert run(nlvr.main, arguments) == 2
    error = capsys.readouterr().err
    assert "1 of 2 predictions are for no example: 'dev-1-1-0'; --allow_extra leaves them out" in error
    assert error.count("\n") == 1 and not (tmp_path / "m.json").exists()
    assert run(nlvr.main, [*arguments, "--allow_extra"]) == 0
    assert json.loads((tmp_path / "m.json").read_text()) == {"accuracy": 1, "consistency": 1}
    assert "1 predictions belong to no example" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("identifiers", "name"),
    [
        (["dev-1-0-0", "dev-2-1-0"], "dev"),
        (["test1-1-0-0"], "test-P"),
        (["test2-1-0-0"], "test-U"),
        (["train-1-0-0"], "train"),
        (["test1-1-0-0", "dev-1-0-0"], "dev + test-P"),
        (["mine-1-0-0", "dev-1-0-0"], ""),
    ],
)
def test_the_split_is_named_as_in_papers(tmp_path: Path, capsys, identifiers: list[str], name: str) -> None:
    assert nlvr.official_split(identifiers) == name
    (tmp_path / "p.csv").write_text("".join(f"{identifier},True\n" for identifier in identifiers))
    (tmp_path / "a.json").write_text("\n".join(json.dumps(example(identifier)) for identifier in identifiers))
    arguments = ["--predictions", str(tmp_path / "p.csv"), "--annotations", str(tmp_path / "a.json")]
    assert run(nlvr.main, [*arguments, "--out", str(tmp_path / "m.json")]) == 0
    named = f"{name}, " if name else ""
    said = f"accuracy 1.0000 consistency 1.0000 ({named}{len(identifiers)} examples)\n"
    assert capsys.readouterr().out == said


def test_output_that_cannot_be_written_is_a_users_mistake(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    arguments = [
        "--predictions",
        str(ASSETS / "nlvr2_predictions.csv"),
        "--annotations",
        str(ASSETS / "nlvr2_split.json"),
    ]
    assert run(nlvr.main, [*arguments, "--out", str(tmp_path / "file" / "m.json")]) == 2
    assert "file/m.json: cannot be written" in capsys.readouterr().err
    assert run(nlvr.main, [*arguments, "--out", str(tmp_path)]) == 2  # a folder; and nothing is left beside it
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
