"""The page that compares runs: axes, differences, scores and their tests; bad folders are a one-line error."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from evaluation import nlvr
from evaluation.bootstrap import nlvr_parts, numbered, paired
from evaluation.common import run
from evaluation.significance import sign_test
from eve_ds.data.sources import open_split
from eve_ds.report import compare
from eve_ds.report.__main__ import main
from eve_ds.report.charts import Line
from eve_ds.report.compare import build_comparison, common_curves, over_hours, over_samples
from eve_ds.report.compare_scores import compared_scores
from eve_ds.report.compared import flat, read_compared
from eve_ds.report.html import Html
from eve_ds.report.run_files import Curve
from tests.support.differences import difference
from tests.support.made_run import curves
from tests.support.page import Page
from tests.support.shards import make_nlvr_set, make_vqa_set
from tests.support.tables import table

HOSTILE = "<script>alert('x')</script>"


def made(folder: Path, seed: int = 0, task: str = "pretrain", **config: object) -> Path:
    names = ["mim_loss", "mlm_loss"] if task == "pretrain" else ["itm_loss"]
    curves(folder / "metrics.jsonl", 20, names, ["mlm_accuracy"], random.Random(seed))
    tree = {"task": task, "output_dir": str(folder), "optimizer": {"lr": 0.001 + seed, "betas": [0.9, 0.98]}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def started(folder: Path, number: int, **record: object) -> None:
    (folder / "provenance").mkdir(exist_ok=True)
    (folder / "provenance" / f"start_{number:04d}.json").write_text(json.dumps(record))


def test_hours_are_the_summed_steps_and_samples_those_seen_until_then(tmp_path: Path) -> None:
    lines = [{"step": step, "samples": 8 * step, "loss": 5.0 - step, "step_seconds": 36.0 * step} for step in (1, 2, 3)]
    lines.insert(2, {"step": 2, "val/loss": 3.5})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, _ = read_compared([tmp_path / "a", tmp_path / "b"])
    assert over_hours(run, run.stage.curves["loss"]) == Curve(pytest.approx([0.01, 0.03, 0.06]), [4.0, 3.0, 2.0])
    assert over_samples(run, run.stage.curves["val/loss"]) == Curve([16.0], [3.5])
    assert over_hours(run, run.stage.curves["val/loss"]) == Curve(pytest.approx([0.03]), [3.5])
    run.stage.curves["step_seconds"] = Curve([3.0, 1.0, 2.0], [108.0, 36.0, math.nan])  # a resumed run's
    assert over_hours(run, run.stage.curves["loss"]).steps == pytest.approx([0.01, 0.01, 0.04])
    del run.stage.curves["step_seconds"]
    assert over_hours(run, run.stage.curves["loss"]).steps == []


def test_the_page_shows_what_differs_and_only_that(tmp_path: Path) -> None:
    a, b = made(tmp_path / "x" / "run", 0), made(tmp_path / "y" / "run", 1, model={"note": HOSTILE})
    same = {"torch": "2.13.0", "numpy": "2.1"}
    started(a, 1, step=0, versions={"torch": "1"}, code={})
    started(a, 2, step=9, code={"commit": "c" * 40, "branch": "main"}, versions=same, topology={"world_size": 2},
            ranks=[{"host": "n1"}, {"host": "n2"}, {"host": "n1"}], time="2026-11-28T07:00:00+00:00")  # fmt: skip
    started(b, 1, step=0, code={"commit": "c" * 40, "branch": "main", "diff": "+x"}, versions=same | {"numpy": "2.2"},
            topology={"world_size": 4}, ranks=[{"host": "n1"}])  # fmt: skip
    for folder, digest in ((a, "e" * 64), (b, "f" * 64)):
        inputs = {"training data": {"place": "/d", "hash": digest, "size": "24 rows"}, "init_from": None}
        (folder / "identity.json").write_text(json.dumps({"settings": {}, "inputs": inputs}))
    content = build_comparison([a, b])
    page = Page(content)
    assert page.count("script") == 0 and "http" not in content and "x/run" in page.text and "y/run" in page.text
    config = table(content, "config")
    dash = "\N{EN DASH}"
    assert config == {"": ["x/run", "y/run"], "optimizer.lr": ["0.001", "1.001"], "model.note": [dash, HOSTILE]}
    assert table(content, "record") == {
        "": ["x/run", "y/run"],
        "code.uncommitted changes": ["no", table(content, "record")["code.uncommitted changes"][1]],
        "hosts": ["n1, n2", "n1"],
        "topology.world_size": ["2", "4"],
        "versions.numpy": ["2.1", "2.2"],
        "starts": ["2", "1"],
        "input: training data": ["SHA-256 eeeeeeeeeeee, 24 rows", "SHA-256 ffffffffffff, 24 rows"],
    }
    assert "4 other values are the same in all runs" in page.text  # commit, branch, torch, no init_from
    assert page.count("svg") == 3 * len(common_curves(read_compared([a, b]))[0])
    assert table(content, "held-out")["step"] == ["20", "20"]


def test_a_start_outside_of_a_checkout_has_no_code(tmp_path: Path) -> None:
    runs = made(tmp_path / "a"), made(tmp_path / "b")
    started(runs[0], 1, code={}, topology={"world_size": 2})
    recorded = read_compared(runs)[0].recorded
    assert "topology.world_size" in recorded and not [key for key in recorded if key.startswith("code.")]


def test_held_out_metrics_have_their_difference_from_the_first_run(tmp_path: Path) -> None:
    for name, values in (("a", [3.0, 2.0]), ("b", [2.5, 1.5]), ("c", [2.0, None])):
        made(tmp_path / name)
        records = [{"step": n + 1, "val/loss": value} for n, value in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    found = table(build_comparison([tmp_path / name for name in "abc"]), "held-out")
    assert found["loss"] == ["2", "1.5 -0.5", "2 +0"]
    (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 1, "val/loss": null}\n')
    found = table(compare._held_out(read_compared([tmp_path / name for name in "cab"])), "held-out")
    assert found["loss"] == ["\N{EN DASH}", "2", "1.5"]


def test_losses_come_first_and_counts_have_no_chart() -> None:
    def recorded(*names: str) -> Any:
        return SimpleNamespace(stage=SimpleNamespace(curves={name: Curve([1.0], [2.0]) for name in names}))

    names = ["lr", "odd", "a/loss", "loss", "samples", "data/samples/coco", "data/wait_fraction", "mlm_loss", "gone"]
    runs = [recorded(*names, "only"), recorded(*names)]
    for made_up in runs:
        made_up.stage.curves["gone"].values[0] = math.nan
    charts = ["loss", "a/loss", "mlm_loss", "odd", "lr", "data/wait_fraction"]
    assert common_curves(runs) == (charts, ["only"])


def test_evaluations_are_dots_and_rates_are_not_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[Line, bool, bool]] = {}

    def line_chart(name: str, lines: list[Line], zero: bool, whole: bool) -> Html:
        drawn[name] = lines[0], zero, whole
        return Html("")

    monkeypatch.setattr(compare, "line_chart", line_chart)
    build_comparison([made(tmp_path / "a"), made(tmp_path / "b")])
    assert [name for name, (line, _, _) in drawn.items() if line.dots] == [
        f"{name} over {axis}"
        for name in ("val/loss", "val/mim_loss", "val/mlm_loss", "val/mlm_accuracy")
        for axis in ("steps", "samples", "hours")
    ]
    assert {name.split()[0] for name, (line, _, _) in drawn.items() if not line.smooth} == {"lr"}
    assert {name.split()[0] for name, (_, zero, _) in drawn.items() if zero} == {
        "lr",
        "samples_per_second",
        "val/mlm_accuracy",
    }
    assert all(whole == (not name.endswith("hours")) for name, (_, _, whole) in drawn.items())
    assert all(line.raw for line, _, _ in drawn.values())


def test_a_single_run_that_recorded_something_cannot_be_compared(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    for folder in (a, b):
        (folder / "metrics.jsonl").unlink()
    started(a, 1, code={}, ranks=[])
    text = Page(build_comparison([a, b])).text
    assert "Nothing can be compared." in text and "Missing: provenance/ of b" in text
    started(b, 1, code={}, ranks=[])
    text = Page(build_comparison([a, b])).text
    assert "Nothing differs." in text and "Nothing can be compared." not in text


def test_an_empty_section_is_a_value() -> None:
    assert flat({"a": {"b": {}, "c": [{"d": 1}]}, "e": None}) == {"a.b": {}, "a.c": [{"d": 1}], "e": None}
    assert flat([1]) == {}


def test_scores_that_a_run_lacks(tmp_path: Path) -> None:
    """Of a measure that the first run lacks there is no difference; one that a single run has is left out. Runs whose
    config is gone are of the task that has such scores."""
    for name, scores in (
        ("a", {"accuracy": 0.5}),
        ("b", {"accuracy": 0.75, "consistency": 0.25}),
        ("c", {"accuracy": 0.25, "consistency": 0.125}),
    ):
        folder = made(tmp_path / name, task="nlvr")
        (folder / "scores_val.json").write_text(json.dumps(scores))
        (folder / "config.yaml").unlink()
    cells = table(compared_scores(read_compared([tmp_path / name for name in "abc"])), "scores")
    assert cells == {
        "Measure": ["a", "b", "c"],
        "accuracy": ["50.0", "75.0 +25.0", "25.0 -25.0"],
        "consistency": ["\N{EN DASH}", "25.0", "12.5"],
    }
    (tmp_path / "c" / "scores_val.json").write_text(json.dumps({"accuracy": 0.25}))
    cells = table(compared_scores(read_compared([tmp_path / name for name in "abc"])), "scores")
    assert cells.keys() == {"Measure", "accuracy"}


def test_runs_of_different_tasks_are_compared_in_what_they_share(tmp_path: Path) -> None:
    text = Page(build_comparison([made(tmp_path / "a"), made(tmp_path / "b", task="nlvr")])).text
    assert "These are runs of different tasks (a: pretrain, b: nlvr): what they have in common is compared." in text
    assert "Recorded by one run alone: " in text and "itm_loss" in text and "Loss (held out)" in text
    assert "Missing: scores_*.json of a task and split that two of the runs share" in text


def test_six_runs_have_six_colors(tmp_path: Path) -> None:
    folders = [made(tmp_path / f"run{n}") for n in range(6)]
    for number, folder in enumerate(folders):
        lines = [{"step": step + 1, "loss": float(number)} for step in range(60)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = build_comparison(folders)
    charts = content[content.index('<section id="curves">') :]
    assert "Lines: running means." in charts and "opacity: 0.35" not in charts
    assert all(f"stroke: var(--c{n})" in charts for n in range(1, 7))


def test_nlvr_runs_are_tested_on_their_statements(tmp_path: Path) -> None:
    make_nlvr_set(tmp_path / "data", rows=10, split="test")
    split = open_split(tmp_path / "data", "test", "nlvr")
    samples = [split.sample(number) for number in range(split.samples)]
    truth = {row.item("identifier", item): row.item("answers", item).lower() == "true" for _, row, item in samples}
    right = {"a": np.arange(len(truth)) % 3 > 0, "b": np.arange(len(truth)) % 7 > 0}
    for name, correct in right.items():
        folder = made(tmp_path / name, task="nlvr", data={"path": str(tmp_path / "data")})
        with open(folder / "predictions_test.csv", "w") as file:
            given = [(key, value == good) for (key, value), good in zip(truth.items(), correct, strict=True)]
            csv.writer(file).writerows(given)
        scores = {"accuracy": float(correct.mean()), "consistency": 0.5}
        (folder / "scores_test.json").write_text(json.dumps(scores))
    found = sign_test(right["a"], right["b"])
    assert 0 < found.first < found.second
    cells = table(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"])), "scores")
    more = 100 * (right["b"].mean() - right["a"].mean())
    words = f"better on {found.second} statements, worse on {found.first}, p = {found.p:.2g}"
    sentences = [nlvr.sentence_of(key) for key in truth]
    drawn = paired(*(nlvr_parts(right[name].tolist(), sentences) for name in "ab"))
    within = {
        name: f"{100 * each.low:+.1f} to {100 * each.high:+.1f}, p = {each.p:.2g}" for name, each in drawn.items()
    }
    assert cells["accuracy"][1] == f"{100 * right['b'].mean():.1f} {more:+.1f}{within['accuracy']}; {words}"
    assert cells["consistency"] == ["50.0", f"50.0 +0.0{within['consistency']}"]
    shutil.rmtree(tmp_path / "data")
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: the right answers cannot be read: " in text and f"{more:+.1f}" in text
    (tmp_path / "b" / "predictions_test.csv").unlink()
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: there is no predictions_test.csv of b." in text


def test_vqa_runs_are_tested_on_their_questions(tmp_path: Path) -> None:
    make_vqa_set(tmp_path / "data", rows=12, split="test")
    split = open_split(tmp_path / "data", "test", "vqa")
    samples = [split.sample(number) for number in range(split.samples)]
    scored: dict[str, list[float]] = {"a": [], "b": []}
    given: dict[str, list[dict[str, object]]] = {"a": [], "b": []}
    for number, (_, row, item) in enumerate(samples):
        answers, scores = row.item("answers", item), row.item("answer_scores", item)
        for name, every in (("a", 2), ("b", 3)):
            known = number % every == 0
            scored[name].append(scores[0] if known else 0.0)
            answer = answers[0] if known else "nothing"
            given[name].append({"question_id": row.item("question_id", item), "answer": answer})
    for name in given:
        folder = made(tmp_path / name, task="vqa", data={"path": "data"})
        started(folder, 1, directory=str(tmp_path))  # the path in the config is relative to where the run started
        (folder / "predictions_test.json").write_text(json.dumps(given[name]))
        (folder / "scores_test.json").write_text(json.dumps({"soft_accuracy": 100 * float(np.mean(scored[name]))}))
    found = sign_test(np.array(scored["a"]), np.array(scored["b"]))
    assert 0 < found.second < found.first
    words = f"better on {found.second} questions, worse on {found.first}, p = {found.p:.2g}"
    cell = table(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"])), "scores")[
        "accuracy over the answer list"
    ][1]
    image = numbered([number for number, _, _ in samples])
    assert image.max() + 1 < len(image)
    drawn = difference(np.array(scored["a"]), np.array(scored["b"]), image)
    assert cell.endswith(f"{100 * drawn.low:+.1f} to {100 * drawn.high:+.1f}, p = {drawn.p:.2g}; {words}")
    odd = [row | {"answer": ["no", "text"]} for row in given["b"]]
    (tmp_path / "b" / "predictions_test.json").write_text(json.dumps(odd))
    assert "better on 0 questions" in Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    (tmp_path / "b" / "predictions_test.json").write_text(json.dumps(given["b"][1:]))
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: their predictions are of other examples." in text
    for name in given:
        (tmp_path / name / "predictions_test.json").write_text("[]")
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: there are no predictions." in text
    for name in given:  # of a question that the data set does not have
        more = [*given[name], {"question_id": 10**9, "answer": "yes"}]
        (tmp_path / name / "predictions_test.json").write_text(json.dumps(more))
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: their predictions are of other examples." in text


def test_retrieval_runs_are_tested_by_resampling_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(30), 5)
    truth = (index[None] == np.arange(30)[:, None]).astype(float)
    hits = {}
    for name, strength in (("a", 1.5), ("b", 3.0)):
        folder = made(tmp_path / name, task="retrieval")
        scores = strength * truth + rng.normal(size=truth.shape)
        np.savez(folder / "predictions_test.npz", image_to_text=scores, text_to_image=scores.T, text_image_index=index)
        hits[name] = scores.T.argmax(axis=1) == index
        (folder / "scores_test.json").write_text(json.dumps({"img_r1": 100 * float(hits[name].mean())}))
    found = difference(hits["a"], hits["b"], index)
    cell = table(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"])), "scores")["image R@1"][1]
    assert f"{100 * found.low:+.1f} to {100 * found.high:+.1f}, p < 0.0005" in cell
    with np.load(tmp_path / "b" / "predictions_test.npz") as arrays:
        np.savez(tmp_path / "b" / "predictions_test.npz", **dict(arrays) | {"text_image_index": index[::-1]})
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: their predictions are of other images and texts." in text
    with np.load(tmp_path / "a" / "predictions_test.npz") as arrays:
        np.savez(tmp_path / "b" / "predictions_test.npz", **dict(arrays) | {"image_to_text": truth[:, :-1]})
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert "b is not tested against a: " in text and "cannot be read" not in text
    (tmp_path / "b" / "predictions_test.npz").write_bytes(b"PK")
    text = Page(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"]))).text
    assert f"b is not tested against a: {tmp_path / 'b' / 'predictions_test.npz'}: not a NumPy .npz file" in text


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["a"], "{}/a: one run alone cannot be compared; for its report: --run {}/a"),
        (["a", "gone"], "{}/gone: no such folder"),
        (["a", "x"], "{}/x: holds no run: neither metrics.jsonl nor config.yaml"),
        (["a", "demo"], "{}/demo: holds several runs, pretrain, vqa; name one of them, as {}/demo/pretrain"),
        (["a", "b", "x/../a"], "{}/a and {}/x/../a are the same folder; name each run once"),
        (["a"] * 7, "7 runs are too many for one page; name at most 6"),
        (["a", "bad"], "{}/bad/config.yaml: is no YAML that can be read (ParserError)"),
        (["a", "date"], "{}/date/config.yaml: is no YAML that can be read (ValueError)"),
    ],
)
def test_bad_folders_exit_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[str], words: str
) -> None:
    for name in ("a", "b", "bad", "date"):
        made(tmp_path / name)
    (tmp_path / "date" / "config.yaml").write_text("note: 2026-13-45\n")
    (tmp_path / "bad" / "config.yaml").write_text("model: [\n")
    for name in ("x", "demo/vqa", "demo/pretrain"):
        (tmp_path / name).mkdir(parents=True)
    assert run(main, [*(str(tmp_path / name) for name in runs), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == f"error: {words.replace('{}', str(tmp_path))}\n"
    assert not (tmp_path / "page.html").exists()


def test_what_no_run_writes_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record of other kinds, half a character of UTF-16, a path that is a number: the page is written."""
    a, b = (made(tmp_path / name, task="vqa", data={"path": 5}, note="\ud800") for name in ("a", "b"))
    started(b, 1, ranks=5, code=7, versions=[1], topology="x", time=None)
    for folder in (a, b):
        (folder / "scores_test.json").write_text(json.dumps({"soft_accuracy": 50.0}))
        (folder / "predictions_test.json").write_text("[]")
    assert run(main, [str(a), str(b), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "b is not tested against a: the right answers cannot be read: " in text


@pytest.mark.parametrize(("options", "words"), [
    ([], "give --run DIR for the report of one run, or the folders"),
    (["a", "--run", "b"], "give --run DIR for the report of one run, or the folders"),
    (["a", "b", "--watch"], "--watch goes with --run DIR"),
    (["--run", "a", "--watch", "0"], "'0' is not a whole number of seconds from 1 to 86400"),
    (["--run", "a", "--watch", "soon"], "'soon' is not a whole number of seconds"),
])  # fmt: skip
def test_bad_options_exit_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*options, "--out", "page.html"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and words in told
