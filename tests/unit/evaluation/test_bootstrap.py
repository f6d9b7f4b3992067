"""Confidence intervals: equal to plain resampling, by clusters, and beside the metrics of each command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import bootstrap, nlvr, retrieval, vqa
from evaluation.bootstrap import Parts, confidence, nlvr_parts, paired, retrieval_parts, vqa_parts
from evaluation.common import run
from tests.support.differences import difference

RNG = np.random.default_rng(7)
INDEX = RNG.permutation(np.concatenate([np.arange(30), RNG.integers(30, size=50)]))  # 30 images with 1 to 7 texts
TEXT_RANKS, IMAGE_RANKS = RNG.integers(15, size=30), RNG.integers(15, size=80)


def of_values(values: np.ndarray, cluster: np.ndarray) -> Parts:
    return Parts({"mean": (values, cluster)}, int(cluster.max()) + 1)


def test_recalls_are_resampled_by_image_as_plain_code_does_it() -> None:
    found = confidence(retrieval_parts(TEXT_RANKS, IMAGE_RANKS, INDEX, retrieval.CUTOFFS), draws=200, seed=5)
    generator, drawn = np.random.default_rng(5), []
    for _ in range(200):
        images = generator.integers(30, size=30)
        texts = np.concatenate([IMAGE_RANKS[image == INDEX] for image in images])
        drawn.append(retrieval.summary(TEXT_RANKS[images], texts))
    assert found.keys() == drawn[0].keys()
    for name, interval in found.items():
        expected = np.quantile([scores[name] for scores in drawn], [0.025, 0.975])
        np.testing.assert_allclose(interval, expected, atol=1e-6)


def test_of_many_examples_the_interval_is_that_of_the_normal_distribution() -> None:
    low, high = confidence(of_values(np.arange(2000) % 10 < 7, np.arange(2000)))["mean"]
    half = 1.96 * (0.7 * 0.3 / 2000) ** 0.5
    assert (low, high) == (pytest.approx(0.7 - half, abs=0.002), pytest.approx(0.7 + half, abs=0.002))


def test_copies_within_a_cluster_tell_nothing_new() -> None:
    values, alone = RNG.random(40), np.arange(40)
    once = confidence(of_values(values, alone))["mean"]
    assert confidence(of_values(np.repeat(values, 5), np.repeat(alone, 5)))["mean"] == pytest.approx(once)
    low, high = confidence(of_values(np.repeat(values, 5), np.arange(200)))["mean"]
    assert high - low < 0.6 * (once[1] - once[0])


def test_the_same_seed_gives_the_same_however_little_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = retrieval_parts(TEXT_RANKS, IMAGE_RANKS, INDEX, retrieval.CUTOFFS)
    found = confidence(parts, draws=50)
    assert found == confidence(parts, draws=50) != confidence(parts, draws=50, seed=1)
    for cells in (7 * 30, 29):
        monkeypatch.setattr(bootstrap, "_CELLS", cells)
        assert confidence(parts, draws=50) == found


def test_two_models_are_compared_over_the_same_resamples() -> None:
    first, second = RNG.integers(15, size=80), IMAGE_RANKS
    ours, theirs = (retrieval_parts(TEXT_RANKS, ranks, INDEX, retrieval.CUTOFFS) for ranks in (first, second))
    found = paired(ours, theirs, draws=300, seed=2)
    expected = difference(100.0 * (first < 5), 100.0 * (second < 5), INDEX, draws=300, seed=2)
    for name in ("difference", "low", "high", "p"):
        assert getattr(found["img_r5"], name) == pytest.approx(getattr(expected, name))
    assert found["txt_r1"].difference == 0 and found["txt_r1"].p == 1
    mean = np.mean([found[f"img_r{k}"].difference for k in retrieval.CUTOFFS])
    assert found["r_mean"].difference == pytest.approx(mean / 2)


def annotation(question: int, kind: str, **more: Any) -> dict[str, Any]:
    answers = [{"answer": "yes"}] * 10
    return {"question_id": question, "answers": answers, "answer_type": kind, "question_type": f"is the/{kind}", **more}


def test_questions_of_one_image_are_a_cluster_where_images_are_named() -> None:
    rows = [annotation(i, "ab"[i % 2], image_id=i // 4) for i in range(40)]
    by_question: Any = {i: 100.0 * (i // 4 % 2) for i in range(40)}  # all of an image alike
    wide = confidence(vqa_parts(by_question, rows))
    assert wide.keys() == {"overall", *(f"per_{t}/{v}" for t, v in NAMES)}
    alone = confidence(vqa_parts(by_question, [{**row, "image_id": None} for row in rows]))
    gaps = [high - low for low, high in (wide["overall"], alone["overall"])]
    assert gaps[0] > 1.5 * gaps[1] > 0
    assert bootstrap.nested(wide)["per_answer_type"].keys() == {"a", "b"}


NAMES = [("answer_type", "a"), ("answer_type", "b"), ("question_type", "is the/a"), ("question_type", "is the/b")]


def test_statements_are_resampled_by_sentence() -> None:
    parts = nlvr_parts([True, False, True, True, True], ["a", "a", "b", "c", "c"])
    assert parts.scores() == {"accuracy": 0.8, "consistency": pytest.approx(2 / 3)}
    assert parts.clusters == 3 and confidence(parts)["consistency"] == [0, 1]


def test_a_kind_of_example_that_a_resample_lacks_is_left_out_there() -> None:
    parts = Parts({"all": (np.arange(9.0), np.arange(9)), "rare": (np.array([3.0]), np.array([4]))}, 9)
    assert confidence(parts)["rare"] == [3, 3]
    assert paired(parts, parts)["rare"].p == 1


def command(name: str, folder: Path) -> tuple[Any, list[str]]:
    paths = {kind: folder / f"{kind}" for kind in ("s.npz", "p.json", "a.json", "p.csv", "n.json")}
    scores = RNG.random((6, 12))
    np.savez(paths["s.npz"], image_to_text=scores, text_to_image=scores.T, text_image_index=np.arange(12) // 2)
    rows = [annotation(i, "ab"[i % 2], image_id=i // 2) for i in range(12)]
    paths["a.json"].write_text(json.dumps({"annotations": rows}))
    answers = [{"question_id": i, "answer": ["yes", "no"][i % 3 == 0]} for i in range(12)]
    paths["p.json"].write_text(json.dumps(answers))
    statements = [{"identifier": f"dev-{i // 2}-{i}-0", "label": "True"} for i in range(12)]
    paths["n.json"].write_text(json.dumps(statements))
    paths["p.csv"].write_text("".join(f"{row['identifier']},{i % 5 > 0}\n" for i, row in enumerate(statements)))
    return {
        "retrieval": (retrieval.main, ["--scores", str(paths["s.npz"])]),
        "vqa": (vqa.main, ["--predictions", str(paths["p.json"]), "--annotations", str(paths["a.json"])]),
        "nlvr": (nlvr.main, ["--predictions", str(paths["p.csv"]), "--annotations", str(paths["n.json"])]),
    }[name]


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{key}/{inner}": leaf
        for key, value in tree.items()
        for inner, leaf in (leaves(value) if isinstance(value, dict) else {"": value}).items()
    }


@pytest.mark.parametrize("name", ["retrieval", "vqa", "nlvr"])
def test_each_command_writes_an_interval_beside_each_metric_when_asked(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, given = command(name, tmp_path)
    out = tmp_path / "out.json"
    assert run(main, [*given, "--out", str(out)]) == 0
    plain, line = json.loads(out.read_text()), capsys.readouterr().out
    assert "intervals" not in plain and "[" not in line
    assert run(main, [*given, "--out", str(out), "--intervals"]) == 0
    asked = json.loads(out.read_text())
    found = leaves(asked.pop("intervals"))
    assert asked == plain and found.keys() == leaves(plain).keys()
    for key, value in leaves(plain).items():
        low, high = found[key]
        assert low - 1e-9 <= value <= high + 1e-9, key
    value, (low, high) = next(iter(leaves(plain).values())), next(iter(found.values()))
    form = "{:.4f} [{:.4f}, {:.4f}]" if name == "nlvr" else "{:.2f} [{:.2f}, {:.2f}]"
    assert form.format(value, low, high) in capsys.readouterr().out
