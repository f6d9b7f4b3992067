"""What end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shards import make_caption_set, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a tiny pre-training: recipe, 24 pairs to train on and 6 held out, tokenizer."""
    folder: Path = tmp_path_factory.mktemp("data")
    make_caption_set(folder / "captions", rows=24, split="train")
    make_caption_set(folder / "captions", rows=6, split="val")
    tiny_tokenizer(folder / "tokenizer")
    return [
        "--config=tests/e2e/tiny.yaml",
        f"--data.path={folder / 'captions'}",
        f"--data.tokenizer={folder / 'tokenizer'}",
    ]
