"""Batches: shapes, dtypes, padding."""

from __future__ import annotations

import numpy as np
import torch

from eve_ds.data.batch_reader import collate


def _sample(length: int, value: int) -> dict[str, object]:
    return {
        "images": np.full((4, 4, 3), value, dtype=np.uint8),
        "text_ids": np.arange(2, 2 + length),
        "sample_id": 2**40 + value,
        "answer_targets": np.array([0.3, 1.0], dtype=np.float32),
    }


def test_pads_to_the_longest() -> None:
    batch = collate([_sample(3, 0), _sample(5, 255)], pad_id=9, max_text_length=8)
    assert batch["text_ids"].tolist() == [[2, 3, 4, 9, 9], [2, 3, 4, 5, 6]]
    assert batch["text_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch["text_ids"].dtype == torch.int64 and batch["text_mask"].dtype == torch.bool
    assert batch["images"].shape == (2, 3, 4, 4) and batch["images"].dtype == torch.float32
    assert batch["images"].is_contiguous()
    assert (batch["images"][0] == -1).all() and (batch["images"][1] == 1).all()
    assert batch["sample_id"].tolist() == [2**40, 2**40 + 255] and batch["sample_id"].dtype == torch.int64
    assert batch["answer_targets"].shape == (2, 2) and batch["answer_targets"].dtype == torch.float32


def test_pads_to_a_multiple_but_not_beyond_the_model() -> None:
    for longest, width in [(40, 8), (6, 6)]:
        batch = collate([_sample(3, 0), _sample(5, 1)], pad_id=0, max_text_length=longest, pad_to_multiple=8)
        assert batch["text_ids"].shape == (2, width)
        assert batch["text_mask"].sum(dim=1).tolist() == [3, 5]


def test_images_without_text() -> None:
    batch = collate([{"images": np.zeros((2, 2, 3), np.uint8), "sample_id": 1}], pad_id=0, max_text_length=8)
    assert set(batch) == {"images", "sample_id"}
