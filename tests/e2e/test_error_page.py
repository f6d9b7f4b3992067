"""The page of ``report errors`` in a real browser: its filters and its order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from playwright.sync_api import Page, expect

from evaluation.common import run
from eve_ds.report.__main__ import main
from tests.support.browser import Visit, chromium, visit
from tests.support.scored import prepare, records, score

__all__ = ["chromium", "visit"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that answered 12 questions, some of them rightly, with its page."""
    folder = tmp_path_factory.mktemp("errors")
    made = records("vqa")
    for number, answer in enumerate(("no", "7", "red", "no", "yes", "no")):
        made[number]["answer"] = answer
    (folder / "raw.json").write_text(json.dumps(made))
    assert prepare(folder, "vqa", lost=None) == 0
    torch.manual_seed(0)
    score(folder, "vqa", folder / "run")
    (folder / "run/config.yaml").write_text(yaml.safe_dump({"task": "vqa", "data": {"path": str(folder / "data")}}))
    assert run(main, ["errors", "--run", str(folder / "run"), "--html", str(folder / "run/errors.html")]) == 0
    return folder / "run"


def shown(page: Page, what: str) -> list[str]:
    """``data-*`` of the cards that are to be seen, from top to bottom."""
    return page.eval_on_selector_all(
        ".card", "(cards, what) => cards.filter((card) => card.offsetHeight).map((card) => card.dataset[what])", what
    )


def test_predictions_are_filtered_searched_and_sorted(scored: Path, visit: Visit) -> None:
    details = pq.read_table(scored / "details_test.parquet").to_pylist()
    counts = Counter({None: "unknown", 0: "wrong"}.get(row["score"], "right") for row in details)
    assert counts.total() == 12 and len(counts) == 3
    page = visit((scored / "errors.html").as_uri())
    confidence = list(map(float, shown(page, "confidence")))
    assert confidence == sorted(confidence, reverse=True) and len(set(confidence)) > 3
    expect(page.locator("#shown")).to_have_text("12 of 12 shown")

    page.select_option("[name=order]", "rising")
    assert list(map(float, shown(page, "confidence"))) == sorted(confidence)
    for result, count in counts.items():
        page.select_option("[name=result]", result)
        assert shown(page, "result") == [result] * count
        rising = list(map(float, shown(page, "confidence")))
        assert rising == sorted(rising)
    page.select_option("[name=result]", "")
    page.select_option("[name=kind]", "unknown")
    assert shown(page, "kind") == ["unknown"] * 2
    page.select_option("[name=kind]", "")

    page.fill("[name=words]", " Image 3 ")
    words = shown(page, "words")
    assert len(words) == 2 and all("image 3" in each for each in words)
    expect(page.locator("#shown")).to_have_text("2 of 12 shown")
    page.press("[name=words]", "Enter")  # which would load the page anew
    expect(page.locator("#shown")).to_have_text("2 of 12 shown")
    page.fill("[name=words]", "nothing of the kind")
    assert shown(page, "words") == []
