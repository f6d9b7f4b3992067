"""The dataset of VQA: what a sample holds, what the look-ups give, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eve_ds.tasks.vqa import VqaSamples, read_answer_list
from preprocessing.errors import UserError
from tests.support.shards import (
    ANSWERS,
    EVAL,
    FLIP,
    image_of,
    make_caption_set,
    make_vqa_set,
    pixels_of,
    tiny_tokenizer,
    write_split,
)

TOKENIZER = tiny_tokenizer()


def test_vqa_samples(tmp_path: Path) -> None:
    folder = make_vqa_set(tmp_path, rows=6)
    answers = read_answer_list(tmp_path)
    assert answers == list(ANSWERS)
    data = VqaSamples(folder, TOKENIZER, EVAL, 16, answer_list=answers)
    sample = data[7, 1]
    assert sample["sample_id"] == 12 + 7 and sample["question_id"] == data.question_id(7) == 31
    expected = np.zeros(6, dtype=np.float32)
    expected[answers.index("yellow")], expected[0] = 0.9, 0.3
    assert sample["answer_targets"].dtype == np.float32 and np.array_equal(sample["answer_targets"], expected)
    assert data.text(7) == "what color has the square of image 3"
    assert data.answers(7) == pytest.approx({"yellow": 0.9, "yes": 0.3})
    assert np.array_equal(sample["images"], pixels_of(3))


def test_vqa_without_known_answers(tmp_path: Path) -> None:
    row = {"image": image_of(0), "questions": ["what is it"], "answers": [[]], "question_id": [5], "split": "test"}
    row |= {"answer_labels": [[]], "answer_scores": [[]], "image_id": "0"}
    data = VqaSamples(write_split(tmp_path / "test", "vqa", [row]), TOKENIZER, EVAL, 16, answer_list=ANSWERS[:4])
    assert data[0, 0]["answer_targets"].tolist() == [0, 0, 0, 0] and data.answers(0) == {}


def test_vqa_answers_that_say_a_side_count_too(tmp_path: Path) -> None:
    row = {"image": image_of(0, 32), "questions": ["which way", "which color"], "answers": [["Left"], ["red"]]}
    row |= {"answer_labels": [[0], [1]], "answer_scores": [[1.0], [1.0]], "question_id": [1, 2], "image_id": "0"}
    folder = write_split(tmp_path / "train", "vqa", [row | {"split": "train"}])
    data = VqaSamples(folder, TOKENIZER, FLIP, 16, answer_list=ANSWERS[:2])
    assert all(np.array_equal(data[0, epoch]["images"], pixels_of(0)) for epoch in range(20))
    assert any(np.array_equal(data[1, epoch]["images"], pixels_of(0)[:, ::-1]) for epoch in range(20))


def test_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds caption data, vqa data is needed"):
        VqaSamples(make_caption_set(tmp_path, rows=2), TOKENIZER, EVAL, 16, answer_list=ANSWERS[:2])


def test_label_beyond_the_answer_list(tmp_path: Path) -> None:
    data = VqaSamples(make_vqa_set(tmp_path, rows=4), TOKENIZER, EVAL, 16, answer_list=ANSWERS[:2])
    with pytest.raises(UserError, match=r"shard-00000\.arrow: row 0: answer label 2 .*answer_list\.json"):
        data[1, 0]


def test_answer_list_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answer_list\.json"):
        read_answer_list(tmp_path)
    for content in ("[", json.dumps({"a": 1}), "[]", "[1]"):
        (tmp_path / "answer_list.json").write_text(content)
        with pytest.raises(UserError, match=r"answer_list\.json"):
            read_answer_list(tmp_path)
