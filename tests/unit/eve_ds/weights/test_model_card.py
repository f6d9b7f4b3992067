"""The card of an exported model: what the Hub reads, what its owner edits, and that loading ignores it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from huggingface_hub import ModelCard

from eve_ds.config import FinetuneConfig
from eve_ds.engine.whole_weights import export_model
from eve_ds.predict import EVE
from eve_ds.weights.model_card import card, renew_card
from eve_ds.weights.model_folder import CARD, HASHED, HASHES
from eve_ds.weights.save import check_out
from preprocessing.local_files import write_json
from preprocessing.shards.schema import ANSWER_LIST
from tests.support.predicting import ANSWERS, image_files
from tests.support.shards import tiny_tokenizer
from tests.support.tiny import model_config
from tests.support.tiny_tasks import TASKS, Backbone


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder before its export."""
    folder = tmp_path / "my_vqa"
    write_json(
        folder / "identity.json",
        {
            "inputs": {
                "training data": {"place": "/home/me/secret/vqa", "hash": "ab" * 32, "size": "400 rows"},
                "x": None,
            }
        },
    )
    return folder


def export(run: Path, step: int = 40) -> Path:
    """As a run exports its model."""
    config = FinetuneConfig(task="vqa", model=model_config(vocab_size=400))
    config.data.path = "/home/me/secret/vqa"
    task = TASKS["vqa"](Backbone(config.model))
    dist.init_process_group("gloo", init_method=f"file://{run}/store_{step}", rank=0, world_size=1)
    try:
        export_model(task, config, tiny_tokenizer(), run / "model", step, {ANSWER_LIST: ANSWERS})
    finally:
        dist.destroy_process_group()
    return run / "model"


def front_matter(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def test_an_export_has_a_card_that_the_hub_reads(run: Path) -> None:
    folder = export(run)
    assert ModelCard.load(folder / CARD).data.eval_results is None
    scores = {"overall": 78.25, "other": math.nan, "reranked": {"txt_r1": 60.5}}
    renew_card(folder, 39, {"test": scores})  # of other weights
    assert ModelCard.load(folder / CARD).data.eval_results is None
    renew_card(folder, 40, {"test": scores})
    found = ModelCard.load(folder / CARD)
    data = found.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "eve-ds", "visual-question-answering", "unknown",
    )  # fmt: skip
    result, reranked = found.data.eval_results
    assert (reranked.metric_type, reranked.metric_value) == ("reranked/txt_r1", 60.5)
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("overall", 78.25, "test")
    assert result.dataset_name == "vqa"
    for part in (
        "# my_vqa",
        "- steps: 40 of 256 samples",
        "SHA-256 `abababababababab`, 400 rows",
        "| test | overall | 78.25 |",
    ):
        assert part in found.text
    assert "secret" not in found.content


def test_the_example_of_the_card_runs_in_the_folder(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(run)
    monkeypatch.chdir(folder)
    (image,) = image_files(folder, 1)
    Path(image).rename(folder / "photo.jpg")
    code = (folder / CARD).read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    exec(compile(code, "card", "exec"), {})
    printed = capsys.readouterr().out
    assert any(answer in printed for answer in ANSWERS)


def test_the_card_may_be_edited(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = export(run)
    check_out(folder, overwrite=True, folder=True)  # the card is no foreign file
    before = (folder / CARD).read_text()
    (folder / HASHES).unlink()  # as a kill in an export leaves it
    export(run, step=50)
    text, other = ((card.rpartition("\n<!--")[0]) for card in ((folder / CARD).read_text(), before))
    assert text == other.replace("steps: 40", "steps: 50")

    edited = before.replace("license: unknown", "license: cc-by-4.0")
    (folder / CARD).write_text(edited)
    assert EVE.from_pretrained(folder).tasks == ("vqa",)
    with caplog.at_level(logging.WARNING, "eve_ds"):
        export(run, step=60)
    assert (folder / CARD).read_text() == edited and "was edited and stays as it is" in caplog.text
    assert set(json.loads((folder / HASHES).read_text())) == set(HASHED)


def test_a_card_without_a_record_of_the_run_says_what_it_knows() -> None:
    text = card({"task": "itr_coco", "model": {"depth": 3}}, 7, {}, {}, "m")
    assert "model-index" not in front_matter(text) and "- data: `unknown`" in text and "eve.match(" in text
    assert "eve.predict" not in card({"task": "pretrain"}, 7, {}, {}, "m")
    hostile = card({"task": "vqa"}, 7, {}, {"test": {"overall": 1.0}}, "a: [b --- 'c")
    assert front_matter(hostile)["model-index"][0]["name"] == "a: [b --- 'c"
