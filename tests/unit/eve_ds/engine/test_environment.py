"""prepare_environment and the stamp of the compiled operation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from eve_ds.engine import environment


def test_extensions_go_into_the_checkout(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    environment.prepare_environment()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.parent == repository / ".torch_extensions"
    assert environment.operation_folder() == folder / "deepspeed_shm_comm"


def test_each_python_environment_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    before = environment.extensions_folder()
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert environment.extensions_folder() != before


def test_a_set_folder_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    environment.prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
    assert environment.extensions_folder() == tmp_path


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
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is not heeded" in caplog.text
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=False)["a"] == 1


def test_own_programs_come_first_on_path_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{sys.prefix}/bin"
    monkeypatch.setenv("PATH", f"/usr/bin:{own}:/bin")
    environment.prepare_environment()
    environment.prepare_environment()
    assert os.environ["PATH"] == f"{own}:/usr/bin:/bin"


def test_the_stamp_counts_only_for_this_environment_and_with_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = environment.operation_folder()
    folder.mkdir()
    assert not environment.operation_is_built()
    (folder / environment.STAMP).write_text(environment.environment_identity())
    assert not environment.operation_is_built()
    (folder / "deepspeed_shm_comm.so").touch()
    assert environment.operation_is_built()
    (folder / environment.STAMP).write_text(environment.environment_identity().replace("torch 2", "torch 1"))
    assert not environment.operation_is_built()
