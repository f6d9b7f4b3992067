"""Files of predictions compared in pairs: the tests are right, the table says so, other examples are refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import compare, retrieval, vqa
from evaluation.common import run
from evaluation.significance import sign_test
from tests.support.differences import difference

RNG = np.random.default_rng(3)
RIGHT = {"a": RNG.random(120) < 0.5, "b": RNG.random(120) < 0.7}


def nlvr_files(folder: Path) -> list[str]:
    """120 examples of 40 sentences."""
    names = [f"test1-{i // 3}-{i % 3}-0" for i in range(120)]
    (folder / "truth.json").write_text("\n".join(json.dumps({"identifier": n, "label": "True"}) for n in names))
    for file, right in RIGHT.items():
        lines = [f"{name},{bool(each)}\n" for name, each in zip(names, right, strict=True)]
        (folder / f"{file}.csv").write_text("".join(lines))
    return [str(folder / "a.csv"), str(folder / "b.csv"), "--annotations", str(folder / "truth.json")]


def vqa_files(folder: Path) -> list[str]:
    """120 questions about 30 images; of ten people two say "so", which gives 60 %."""
    said = [{"answer": text} for text in ["yes"] * 8 + ["so"] * 2]
    rows = [
        {"question_id": i, "image_id": i // 4, "answers": said, "answer_type": "ab"[i % 2], "question_type": "is"}
        for i in range(120)
    ]
    (folder / "truth.json").write_text(json.dumps({"annotations": rows}))
    for file, right in RIGHT.items():
        answers = [{"question_id": i, "answer": "yes" if each else "so"} for i, each in enumerate(right)]
        (folder / f"{file}.json").write_text(json.dumps(answers))
    return [str(folder / "a.json"), str(folder / "b.json"), "--annotations", str(folder / "truth.json")]


def retrieval_files(folder: Path, texts: int = 40, names: Sequence[str] = "ab") -> list[str]:
    index = np.arange(texts) // 2
    for name in names:
        scores = np.random.default_rng(ord(name)).random((texts, texts // 2))
        scores[np.arange(texts), index] += {"a": 0.2, "b": 0.6}.get(name, 0)
        np.savez(folder / f"{name}.npz", image_to_text=scores.T, text_to_image=scores, text_image_index=index)
    return [str(folder / f"{name}.npz") for name in names]


def compared(given: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    assert run(compare.main, [*given, "--out", str(folder / "out.json")]) == 0
    return json.loads((folder / "out.json").read_text()), capsys.readouterr().out


def test_statements_have_mcnemars_exact_test_and_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, text = compared(nlvr_files(tmp_path), tmp_path, capsys)
    assert (found["task"], found["examples"]) == ("nlvr", {"statements": 120, "sentences": 40})
    (result,) = found["comparisons"]
    test = sign_test(RIGHT["a"], RIGHT["b"])
    assert result["mcnemar"] == {"better": test.second, "worse": test.first, "p": test.p}
    row = result["metrics"]["accuracy"]
    assert (row["first"], row["second"]) == (RIGHT["a"].mean(), RIGHT["b"].mean())
    assert row["difference"] == pytest.approx(row["second"] - row["first"])
    assert row["low"] < row["difference"] < row["high"] and 0 < row["p"] < 0.05
    whole = [RIGHT[name].reshape(40, 3).all(axis=1).mean() for name in "ab"]
    assert [result["metrics"]["consistency"][key] for key in ("first", "second")] == whole
    assert f"better on {test.second} examples, worse on {test.first}" in text
    assert f"{row['difference']:+.4f}  [{row['low']:+.4f}, {row['high']:+.4f}]" in text


def test_questions_are_compared_by_their_scores_and_by_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, text = compared(vqa_files(tmp_path), tmp_path, capsys)
    (result,) = found["comparisons"]
    scores = [np.where(RIGHT[name], 100.0, 60.0) for name in "ab"]
    expected = difference(*scores, np.arange(120) // 4)
    row = result["metrics"]["overall"]
    for key in ("difference", "low", "high", "p"):
        assert row[key] == pytest.approx(getattr(expected, key))
    assert result["metrics"].keys() == {"overall", "per_answer_type/a", "per_answer_type/b"}
    assert result["mcnemar"]["p"] == sign_test(*scores).p
    assert "120 questions, 30 clusters" in text and f"{row['first']:.2f}" in text


def test_recalls_are_compared_by_image_and_each_file_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = retrieval_files(tmp_path, names="abc")
    found, text = compared(files, tmp_path, capsys)
    assert [each["second"] for each in found["comparisons"]] == files[1:] and "mcnemar" not in found["comparisons"][0]
    scores = [retrieval.summary(*retrieval.file_ranks(path)[:2]) for path in files]
    for number, each in enumerate(found["comparisons"], 1):
        for name, row in each["metrics"].items():
            assert (row["first"], row["second"]) == (
                pytest.approx(scores[0][name]),
                pytest.approx(scores[number][name]),
            )
    assert found["comparisons"][0]["metrics"]["img_r1"]["p"] < 0.05
    assert text.count("r_mean") == 2 * 3 and "McNemar" not in text


def test_a_file_against_its_copy_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = nlvr_files(tmp_path)
    Path(given[1]).write_bytes(Path(given[0]).read_bytes())
    (result,) = compared(given, tmp_path, capsys)[0]["comparisons"]
    assert result["mcnemar"] == {"better": 0, "worse": 0, "p": 1}
    assert all(row["p"] == 1 and row["low"] == row["high"] == 0 for row in result["metrics"].values())


def edit(path: Path, old: str, new: str, count: int = 1) -> None:
    path.write_text(path.read_text().replace(old, new, count))


def test_other_examples_are_counted_listed_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = vqa_files(tmp_path)
    rows = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps([*rows[5:], {"question_id": 999, "answer": "yes"}]))
    assert run(compare.main, given) == 2
    error = capsys.readouterr().err
    assert (
        f"{given[1]}: does not have the questions of {given[0]}: 5 missing (0, 1, 2 and 2 more), 1 extra (999)" in error
    )
    nlvr = nlvr_files(tmp_path)
    edit(tmp_path / "b.csv", "test1-7-", "test1-77-")
    assert run(compare.main, nlvr) == 2
    assert "1 missing ('test1-7-0-0'), 1 extra ('test1-77-0-0')" in capsys.readouterr().err
    files = [retrieval_files(tmp_path)[0], retrieval_files(tmp_path, 20, "c")[0]]
    assert run(compare.main, files) == 2
    assert "c.npz: has 10 images and 20 texts, but " in capsys.readouterr().err
    with np.load(files[0]) as arrays:
        np.savez(tmp_path / "c.npz", **{**arrays, "text_image_index": np.arange(40)[::-1] // 2})
    assert run(compare.main, files) == 2
    assert "40 texts are of other images than in " in capsys.readouterr().err


BAD: list[tuple[str, str]] = [
    ("nlvr a.csv", "one file of predictions"),
    ("nlvr a.csv a.csv --annotations truth.json", "a.csv is named twice"),
    ("nlvr a.csv b.csv", "files of nlvr need --annotations"),
    ("retrieval a.npz b.npz --annotations a.npz", "leave --annotations out"),
    ("nlvr a.csv b.csv --annotations truth.json --questions truth.json", "--questions is for VQA"),
    ("retrieval a.npz gone.npz", "gone.npz: No such file"),
    ("nlvr a.csv b.csv --annotations truth.json --out b.csv", "--out and files 2 are one file"),
    ("nlvr a.csv empty --annotations truth.json", "empty: holds no predictions"),
    ("nlvr a.csv truth.json --annotations truth.json", "truth.json: holds predictions of vqa, but"),
    ("vqa a.json b.json --annotations truth.json --task nlvr", "a.json: line 1:"),
    ("vqa a.json b.json --annotations a.json", "must be a JSON object with a list 'annotations'"),
    (
        "retrieval a.npz b.npz --task nlvr --annotations a.npz",
        "holds predictions of retrieval, but --task is of nlvr",
    ),
    ("nlvr a.csv b.csv --task retrieval", "a.csv: not a NumPy .npz file"),
    ("nlvr a.csv a\0.csv --annotations truth.json", "a\\x00.csv: embedded null byte"),
    ("nlvr a.csv b.csv --annotations tru\0th", "tru\\x00th: embedded null byte"),
    ("retrieval a.npz b.npz --allow_extra", "--allow_extra is for VQA and NLVR2"),
    ("nlvr a.csv b.csv --annotations /dev/zero", "/dev/zero: is a pipe, a socket or a device"),
]


@pytest.mark.parametrize(("words", "error"), BAD)
def test_bad_use_is_one_line(
    words: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, *given = words.split()
    {"nlvr": nlvr_files, "vqa": vqa_files, "retrieval": retrieval_files}[kind](tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    try:
        code = run(compare.main, given)
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().err
    assert code == 2 and error in told and told.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_predictions_beside_the_statements_are_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = nlvr_files(tmp_path)
    expected = compared(given, tmp_path, capsys)[0]["comparisons"]
    for name in given[:2]:
        Path(name).write_text(Path(name).read_text() + "test1-99-0-0,True\n")
    assert run(compare.main, given) == 2
    error = capsys.readouterr().err
    assert "1 of 121 predictions are for no example: 'test1-99-0-0'; --allow_extra leaves them out" in error
    assert compared([*given, "--allow_extra"], tmp_path, capsys)[0]["comparisons"] == expected
    Path(given[1]).write_text(Path(given[1]).read_text() + "test1-98-0-0,True\n")  # of one of them alone
    assert compared([*given, "--allow_extra"], tmp_path, capsys)[0]["comparisons"] == expected


def test_some_questions_of_predictions_of_the_whole_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = vqa_files(tmp_path)
    some = tmp_path / "some.json"
    some.write_text(json.dumps({"questions": [{"question_id": number} for number in range(40, 60)]}))
    found, text = compared([*given, "--questions", str(some)], tmp_path, capsys)
    scores = [float(np.where(RIGHT[name][40:60], 100.0, 60.0).mean()) for name in "ab"]
    row = found["comparisons"][0]["metrics"]["overall"]
    assert (row["first"], row["second"]) == (pytest.approx(scores[0]), pytest.approx(scores[1]))
    assert "20 questions, 5 clusters" in text
    rows = json.loads(Path(given[1]).read_text())
    Path(given[1]).write_text(json.dumps(rows[:50]))
    assert run(compare.main, [*given, "--questions", str(some)]) == 2
    assert f"restricted to {some}: 10 of 20 questions have no prediction" in capsys.readouterr().err
    Path(given[1]).write_text(json.dumps([*rows, {"question_id": 999, "answer": "yes"}]))
    assert compared([*given, "--allow_extra"], tmp_path, capsys)[0]["examples"]["questions"] == 120


def test_types_that_are_no_plain_text_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = vqa_files(tmp_path)
    edit(tmp_path / "truth.json", '"answer_type": "a"', '"answer_type": "\\ud800\\u001b[31m"', count=-1)
    _, text = compared(given, tmp_path, capsys)
    assert r"per_answer_type/\ud800\x1b[31m" in text and "\x1b" not in text
    out = ["--out", str(tmp_path / "scores.json"), "--intervals"]
    assert run(vqa.main, ["--predictions", given[0], *given[2:], *out]) == 0
    assert r" \ud800\x1b[31m " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["nlvr", "vqa"])
def test_files_may_be_pipes_and_are_read_once(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"nlvr": nlvr_files, "vqa": vqa_files}[kind](tmp_path)
    expected = compared(given, tmp_path, capsys)[0]["comparisons"][0]["metrics"]
    names = " ".join(f"<(cat {shlex.quote(path)})" for path in (given[0], given[1]))
    command = f"{sys.executable} -m evaluation.compare {names} --annotations <(cat {given[3]}) --out {tmp_path}/o.json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["comparisons"][0]["metrics"] == expected


def test_score_arrays_in_a_pipe_are_one_line(tmp_path: Path) -> None:
    """Their parts are read out of order."""
    first, second = retrieval_files(tmp_path)
    command = f"{sys.executable} -m evaluation.compare {first} <(cat {second})"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is a pipe, a socket or a device; write its content to a file" in done.stderr
