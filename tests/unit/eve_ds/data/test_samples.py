"""Datasets of captions: what a sample holds, what the look-ups give, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eve_ds.data.samples import CaptionImages, CaptionSamples
from preprocessing.errors import UserError
from tests.support.shards import (
    EVAL,
    FLIP,
    image_of,
    make_caption_set,
    pixels_of,
    tiny_tokenizer,
    write_split,
)

TOKENIZER = tiny_tokenizer()


def test_caption_samples(tmp_path: Path) -> None:
    data = CaptionSamples(make_caption_set(tmp_path, rows=10, captions=3), TOKENIZER, EVAL, 16)
    assert (len(data), data.rows) == (30, 10)
    sample = data[16, 2]
    assert sample["sample_id"] == 2 * 30 + 16 and sample["image_index"] == 5
    assert np.array_equal(sample["images"], pixels_of(5))
    text = "image 5 caption 1 shows a green square"
    assert data.text(16) == text
    assert sample["text_ids"].tolist() == TOKENIZER.encode(text, 16) and sample["text_ids"].dtype == np.int64
    assert data.image_bytes(16) == data.row_image_bytes(5) == image_of(5, 32)
    assert data.text_image_index().tolist() == [i // 3 for i in range(30)]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    data = CaptionSamples(make_caption_set(tmp_path, rows=2), TOKENIZER, EVAL, 5)
    ids = data[0, 0]["text_ids"]
    assert len(ids) == 5 and ids[0] == TOKENIZER.cls_id and ids[-1] == TOKENIZER.sep_id


def test_images_alone(tmp_path: Path) -> None:
    images = CaptionImages(make_caption_set(tmp_path, rows=10, captions=3), TOKENIZER, EVAL, 16)
    assert len(images) == 10
    assert set(images[7, 0]) == {"images", "sample_id", "image_index"}
    assert images[7, 0]["image_index"] == images[7, 0]["sample_id"] == 7
    assert np.array_equal(images[7, 0]["images"], pixels_of(7))


def test_images_with_left_or_right_in_the_text_are_not_mirrored(tmp_path: Path) -> None:
    texts = ["a red square on the left", "a red square"]
    rows = [{"image": image_of(0, 32), "caption": texts, "image_id": "0", "split": "train"}]
    data = CaptionSamples(write_split(tmp_path / "train", "caption", rows), TOKENIZER, FLIP, 16)
    assert all(np.array_equal(data[0, epoch]["images"], pixels_of(0)) for epoch in range(20))
    assert any(np.array_equal(data[1, epoch]["images"], pixels_of(0)[:, ::-1]) for epoch in range(20))


def test_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path, rows=2)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError) as error:
        CaptionSamples(folder, tokenizer, EVAL, 16, vocab_size=tokenizer.vocab_size - 1)
    text = str(error.value)
    assert "tokenizer.json" in text and f"model.vocab_size to {tokenizer.vocab_size}" in text and "\n" not in text
    CaptionSamples(folder, tokenizer, EVAL, 16, vocab_size=tokenizer.vocab_size)


def test_corrupt_image_names_shard_and_row(tmp_path: Path) -> None:
    rows = [
        {"image": image_of(i)[: 50 if i == 4 else None], "caption": ["a"], "image_id": str(i), "split": "train"}
        for i in range(6)
    ]
    data = CaptionSamples(write_split(tmp_path / "train", "caption", rows, shard_rows=3), TOKENIZER, EVAL, 16)
    data[3, 0]
    with pytest.raises(UserError, match=r"shard-00001\.arrow: row 1: the image cannot be decoded") as error:
        data[4, 0]
    assert "\n" not in str(error.value)
