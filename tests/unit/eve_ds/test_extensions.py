"""The folder of compiled operations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eve_ds.environment import extensions_folder


def test_each_python_environment_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    before = extensions_folder()
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert extensions_folder() != before


def test_a_set_folder_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
