"""Two prepared sets and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shards import make_caption_set, make_vqa_set, tiny_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """captions/ vqa/ tokenizer/"""
    make_caption_set(tmp_path / "captions", rows=6, split="train")
    make_vqa_set(tmp_path / "vqa", rows=4, split="train")
    tiny_tokenizer(tmp_path / "tokenizer")
    return tmp_path
