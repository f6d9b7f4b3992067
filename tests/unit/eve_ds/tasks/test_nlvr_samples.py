"""The dataset of NLVR: what a sample holds, what the look-ups give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eve_ds.tasks.nlvr import SPEC, NlvrSamples
from preprocessing.errors import UserError
from tests.support.shards import (
    EVAL,
    FLIP,
    image_of,
    make_nlvr_set,
    pixels_of,
    tiny_tokenizer,
    write_split,
)

TOKENIZER = tiny_tokenizer()


def test_nlvr_samples(tmp_path: Path) -> None:
    data = NlvrSamples(make_nlvr_set(tmp_path, rows=5), TOKENIZER, EVAL, 16)
    sample = data[5, 1]
    assert (sample["sample_id"], sample["label"], sample["question_index"]) == (15, 0, 5)
    assert data[4, 0]["label"] == data.label(4) == 1
    assert np.array_equal(sample["images_0"], pixels_of(2)) and np.array_equal(sample["images_1"], pixels_of(6))
    assert data.identifier(5) == "train-2-0-1"
    assert data.image_bytes(5, image_number=1) == image_of(6, 32)


def test_nlvr_unknown_label(tmp_path: Path) -> None:
    row = {"image_0": image_of(0), "image_1": image_of(1), "questions": ["x"], "answers": [""], "identifier": ["i"]}
    data = NlvrSamples(write_split(tmp_path / "test", "nlvr", [row | {"split": "test"}]), TOKENIZER, EVAL, 16)
    assert data[0, 0]["label"] == -1


def test_an_identifier_that_stands_at_two_statements_is_named(tmp_path: Path) -> None:
    row = {"image_0": image_of(0), "image_1": image_of(1), "questions": ["x", "y"], "answers": ["True", "False"]}
    row |= {"identifier": ["test1-1-0-0", "test1-1-0-0"], "split": "test"}
    data = NlvrSamples(write_split(tmp_path / "test", "nlvr", [row]), TOKENIZER, EVAL, 16)
    arrays = {"question_index": np.arange(2), "prediction": np.ones(2), "label": np.array([1, 0])}
    with pytest.raises(UserError, match=r"shard-00000.arrow: row 0: identifier test1-1-0-0 occurs twice in the split"):
        SPEC.metrics(arrays, data)


def test_nlvr_statement_that_says_a_side(tmp_path: Path) -> None:
    row = {"image_0": image_of(0, 32), "image_1": image_of(1, 32), "questions": ["right has red", "both have red"]}
    row |= {"answers": ["True", "True"], "identifier": ["a", "b"], "split": "train"}
    data = NlvrSamples(write_split(tmp_path / "train", "nlvr", [row]), TOKENIZER, FLIP, 16)
    for epoch in range(20):
        sample = data[0, epoch]
        assert np.array_equal(sample["images_0"], pixels_of(0)) and np.array_equal(sample["images_1"], pixels_of(1))
    flips = {tuple(bool((data[1, e][f"images_{k}"] != pixels_of(k)).any()) for k in (0, 1)) for e in range(40)}
    assert len(flips) == 4  # the two images are drawn for apart
