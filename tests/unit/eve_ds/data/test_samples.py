"""The three kinds of data set: what a sample holds, what the look-ups give, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve_ds.data.samples import CaptionImages, CaptionSamples, CaptionTexts, NlvrSamples, VqaSamples, read_answer_list
from eve_ds.data.transforms import build_transform
from preprocessing.shards.schema import DataError
from tests.support.shards import (
    ANSWERS,
    image_of,
    make_caption_set,
    make_nlvr_set,
    make_vqa_set,
    tiny_tokenizer,
    write_split,
)

TOKENIZER = tiny_tokenizer()
EVAL = build_transform(32, train=False)
FLIP = build_transform(32, train=True, crop_scale=None)


def _pixels(index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image_of(index, 32))))


def test_caption_samples(tmp_path: Path) -> None:
    data = CaptionSamples(make_caption_set(tmp_path, rows=10, captions=3), TOKENIZER, EVAL, 16)
    assert (len(data), data.rows) == (30, 10)
    sample = data[16, 2]
    assert sample["sample_id"] == 2 * 30 + 16 and sample["image_index"] == 5
    assert np.array_equal(sample["images"], _pixels(5))
    text = "image 5 caption 1 shows a green square"
    assert data.text(16) == text
    assert sample["text_ids"].tolist() == TOKENIZER.encode(text, 16) and sample["text_ids"].dtype == np.int64
    assert data.image_bytes(16) == data.row_image_bytes(5) == image_of(5, 32)
    assert data.row_captions(5)[1] == text
    assert data.text_image_index().tolist() == [i // 3 for i in range(30)]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    data = CaptionSamples(make_caption_set(tmp_path, rows=2), TOKENIZER, EVAL, 5)
    ids = data[0, 0]["text_ids"]
    assert len(ids) == 5 and ids[0] == TOKENIZER.cls_id and ids[-1] == TOKENIZER.sep_id


def test_images_and_texts_apart(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path, rows=10, captions=3)
    images, texts = CaptionImages(folder, TOKENIZER, EVAL, 16), CaptionTexts(folder, TOKENIZER, EVAL, 16)
    assert (len(images), len(texts)) == (10, 30)
    assert set(images[7, 0]) == {"images", "sample_id", "image_index"}
    assert images[7, 0]["image_index"] == images[7, 0]["sample_id"] == 7
    assert np.array_equal(images[7, 0]["images"], _pixels(7))
    assert set(texts[22, 0]) == {"text_ids", "sample_id", "image_index"} and texts[22, 0]["image_index"] == 7


def test_vqa_samples(tmp_path: Path) -> None:
    folder = make_vqa_set(tmp_path, rows=6)
    answers = read_answer_list(tmp_path)
    assert answers == list(ANSWERS)
    data = VqaSamples(folder, TOKENIZER, EVAL, 16, num_answers=len(answers))
    sample = data[7, 1]
    assert sample["sample_id"] == 12 + 7 and sample["question_id"] == data.question_id(7) == 31
    expected = np.zeros(6, dtype=np.float32)
    expected[answers.index("yellow")], expected[0] = 0.9, 0.3
    assert sample["answer_targets"].dtype == np.float32 and np.array_equal(sample["answer_targets"], expected)
    assert data.text(7) == "what color has the square of image 3"
    assert data.answers(7) == pytest.approx({"yellow": 0.9, "yes": 0.3})
    assert np.array_equal(sample["images"], _pixels(3))


def test_vqa_without_known_answers(tmp_path: Path) -> None:
    row = {"image": image_of(0), "questions": ["what is it"], "answers": [[]], "question_id": [5], "split": "test"}
    row |= {"answer_labels": [[]], "answer_scores": [[]], "image_id": "0"}
    data = VqaSamples(write_split(tmp_path / "test", "vqa", [row]), TOKENIZER, EVAL, 16, num_answers=4)
    assert data[0, 0]["answer_targets"].tolist() == [0, 0, 0, 0] and data.answers(0) == {}


def test_nlvr_samples(tmp_path: Path) -> None:
    data = NlvrSamples(make_nlvr_set(tmp_path, rows=5), TOKENIZER, EVAL, 16)
    sample = data[5, 1]
    assert (sample["sample_id"], sample["label"], sample["question_index"]) == (15, 0, 5)
    assert data[4, 0]["label"] == data.label(4) == 1
    assert np.array_equal(sample["images_0"], _pixels(2)) and np.array_equal(sample["images_1"], _pixels(6))
    assert data.identifier(5) == "train-2-0-1"
    assert data.image_bytes(5, image_number=1) == image_of(6, 32)


def test_nlvr_unknown_label(tmp_path: Path) -> None:
    row = {"image_0": image_of(0), "image_1": image_of(1), "questions": ["x"], "answers": [""], "identifier": ["i"]}
    data = NlvrSamples(write_split(tmp_path / "test", "nlvr", [row | {"split": "test"}]), TOKENIZER, EVAL, 16)
    assert data[0, 0]["label"] == -1


def test_images_with_left_or_right_in_the_text_are_not_mirrored(tmp_path: Path) -> None:
    texts = ["a red square on the left", "a red square"]
    rows = [{"image": image_of(0, 32), "caption": texts, "image_id": "0", "split": "train"}]
    data = CaptionSamples(write_split(tmp_path / "train", "caption", rows), TOKENIZER, FLIP, 16)
    assert all(np.array_equal(data[0, epoch]["images"], _pixels(0)) for epoch in range(20))
    assert any(np.array_equal(data[1, epoch]["images"], _pixels(0)[:, ::-1]) for epoch in range(20))


def test_vqa_answers_with_left_or_right_prevent_mirroring(tmp_path: Path) -> None:
    row = {"image": image_of(0, 32), "questions": ["which way", "which color"], "answers": [["Left"], ["red"]]}
    row |= {"answer_labels": [[0], [1]], "answer_scores": [[1.0], [1.0]], "question_id": [1, 2], "image_id": "0"}
    folder = write_split(tmp_path / "train", "vqa", [row | {"split": "train"}])
    data = VqaSamples(folder, TOKENIZER, FLIP, 16, num_answers=2)
    assert all(np.array_equal(data[0, epoch]["images"], _pixels(0)) for epoch in range(20))
    assert any(np.array_equal(data[1, epoch]["images"], _pixels(0)[:, ::-1]) for epoch in range(20))


def test_nlvr_statements_with_left_or_right(tmp_path: Path) -> None:
    row = {"image_0": image_of(0, 32), "image_1": image_of(1, 32), "questions": ["right has red", "both have red"]}
    row |= {"answers": ["True", "True"], "identifier": ["a", "b"], "split": "train"}
    data = NlvrSamples(write_split(tmp_path / "train", "nlvr", [row]), TOKENIZER, FLIP, 16)
    for epoch in range(20):
        sample = data[0, epoch]
        assert np.array_equal(sample["images_0"], _pixels(0)) and np.array_equal(sample["images_1"], _pixels(1))
    flips = {tuple(bool((data[1, e][f"images_{k}"] != _pixels(k)).any()) for k in (0, 1)) for e in range(40)}
    assert len(flips) == 4  # the two images are drawn for apart


def test_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path, rows=2)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError) as error:
        CaptionSamples(folder, tokenizer, EVAL, 16, vocab_size=tokenizer.vocab_size - 1)
    text = str(error.value)
    assert "tokenizer.json" in text and f"model.vocab_size to {tokenizer.vocab_size}" in text and "\n" not in text
    CaptionSamples(folder, tokenizer, EVAL, 16, vocab_size=tokenizer.vocab_size)


def test_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds caption data, vqa data is needed"):
        VqaSamples(make_caption_set(tmp_path, rows=2), TOKENIZER, EVAL, 16, num_answers=2)


def test_label_beyond_the_answer_list(tmp_path: Path) -> None:
    data = VqaSamples(make_vqa_set(tmp_path, rows=4), TOKENIZER, EVAL, 16, num_answers=2)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: row 0: answer label 2 .*answer_list\.json"):
        data[1, 0]


def test_corrupt_image_names_shard_and_row(tmp_path: Path) -> None:
    rows = [
        {"image": image_of(i)[: 50 if i == 4 else None], "caption": ["a"], "image_id": str(i), "split": "train"}
        for i in range(6)
    ]
    data = CaptionSamples(write_split(tmp_path / "train", "caption", rows, shard_rows=3), TOKENIZER, EVAL, 16)
    data[3, 0]
    with pytest.raises(DataError, match=r"shard-00001\.arrow: row 1: the image cannot be decoded") as error:
        data[4, 0]
    assert "\n" not in str(error.value)


def test_answer_list_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"answer_list\.json"):
        read_answer_list(tmp_path)
    for content in ("[", json.dumps({"a": 1}), "[]", "[1]"):
        (tmp_path / "answer_list.json").write_text(content)
        with pytest.raises(DataError, match=r"answer_list\.json"):
            read_answer_list(tmp_path)
