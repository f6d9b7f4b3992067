"""prepare_environment and late_imports."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from eve_ds import environment


def test_extensions_go_into_the_checkout(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    environment.prepare_environment()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.parent == repository / ".torch_extensions"


def test_a_set_folder_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    environment.prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_pickles_are_refused_whatever_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    environment.prepare_environment()
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


def test_pickles_are_refused_where_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With both variables set torch reads nothing, and a sound checkpoint would look damaged."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    environment.prepare_environment()
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored" in caplog.text
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=False)["a"] == 1


def test_own_programs_come_first_on_path_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{sys.prefix}/bin"
    monkeypatch.setenv("PATH", f"/usr/bin:{own}:/bin")
    environment.prepare_environment()
    environment.prepare_environment()
    assert os.environ["PATH"] == f"{own}:/usr/bin:/bin"


def test_what_is_imported_late_is_left_out_of_collections() -> None:
    with pytest.raises(KeyboardInterrupt), environment.late_imports():
        assert not gc.isenabled()
        raise KeyboardInterrupt
    try:
        assert gc.isenabled() and gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()
