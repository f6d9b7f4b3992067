"""Recalls after re-ranking stand beside those of the plain ranking, in the report and in the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from evaluation import retrieval
from evaluation.bootstrap import confidence, paired, retrieval_parts
from eve_ds.report.__main__ import build
from eve_ds.report.compare_scores import compared_scores
from eve_ds.report.compared import read_compared
from tests.support.tables import table

INDEX = np.repeat(np.arange(30), 5)
TRUTH = (INDEX[None] == np.arange(30)[:, None]).astype(float)


def scored(folder: Path, seed: int) -> list[retrieval.Ranks]:
    """A run with scores and predictions; gives the ranks of the plain ranking and those after re-ranking."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": "retrieval"}))
    rng, found = np.random.default_rng(seed), []
    for ending, strength in (("", 1.0), ("_reranked", 2.5)):
        scores = strength * TRUTH + rng.normal(size=TRUTH.shape)
        path = folder / f"predictions_test{ending}.npz"
        np.savez(path, image_to_text=scores, text_to_image=scores.T, text_image_index=INDEX)
        found.append(retrieval.file_ranks(str(path)))
    plain, again = (retrieval.summary(*ranks[:2]) for ranks in found)
    within, later = (confidence(retrieval_parts(*ranks, retrieval.CUTOFFS)) for ranks in found)
    content = {**plain, "reranked": again, "intervals": {**within, "reranked": later}}
    (folder / "scores_test.json").write_text(json.dumps(content))
    return found


def test_the_report_has_both_kinds_of_recalls(tmp_path: Path) -> None:
    _, again = scored(tmp_path / "a", 0)
    expected = retrieval.summary(*again[:2])
    low, high = confidence(retrieval_parts(*again, retrieval.CUTOFFS))["img_r1"]
    rows = table(build(tmp_path / "a"), "scores", first=1)
    assert rows["image R@1, re-ranked"][0] == f"{expected['img_r1']:.1f} %{low:.1f} to {high:.1f}"
    assert rows["image R@1"][0] != rows["image R@1, re-ranked"][0]
    assert sum(name.endswith(", re-ranked") for name in rows) == 6


def test_the_comparison_tests_both_kinds_of_recalls(tmp_path: Path) -> None:
    ours, theirs = scored(tmp_path / "a", 0)[1], scored(tmp_path / "b", 1)[1]
    drawn = paired(*(retrieval_parts(*ranks, retrieval.CUTOFFS) for ranks in (ours, theirs)))["img_r1"]
    first, second = (retrieval.summary(*ranks[:2])["img_r1"] for ranks in (ours, theirs))

    def shown() -> dict[str, list[str]]:
        return table(compared_scores(read_compared([tmp_path / "a", tmp_path / "b"])), "scores")

    told = f"{second:.1f} {second - first:+.1f}"
    test = f"{drawn.low:+.1f} to {drawn.high:+.1f}, p = {drawn.p:.2g}"
    assert shown()["image R@1, re-ranked"] == [f"{first:.1f}", told + test]
    assert shown()["image R@1"][1] != told + test
    (tmp_path / "b" / "predictions_test_reranked.npz").unlink()
    assert shown()["image R@1, re-ranked"] == [f"{first:.1f}", told] and "p = " in shown()["image R@1"][1]
    scores = json.loads((tmp_path / "b" / "scores_test.json").read_text())
    (tmp_path / "b" / "scores_test.json").write_text(json.dumps({**scores, "reranked": 5}))
    assert "image R@1, re-ranked" not in shown() and "image R@1" in shown()
