from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_missing_package_is_named(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install easy-vqa" in refuse("easy-vqa", "--split", "train", "--out", tmp_path)
