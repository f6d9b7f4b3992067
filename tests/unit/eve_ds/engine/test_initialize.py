"""What is set while DeepSpeed's Muon is imported is set for that import alone."""

from __future__ import annotations

import os
from typing import Any

import pytest

from eve_ds.engine import initialize


@pytest.mark.parametrize("before", [None, "0", "1"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_compiler_is_off_while_muon_is_imported(
    before: str | None, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> None:
        seen.append((name, os.environ[initialize._NO_COMPILER]))
        if fails:
            raise ImportError(name)

    seen: list[Any] = []
    monkeypatch.setattr(initialize.importlib, "import_module", import_module)
    if before is None:
        monkeypatch.delenv(initialize._NO_COMPILER, raising=False)
    else:
        monkeypatch.setenv(initialize._NO_COMPILER, before)
    if fails:
        with pytest.raises(ImportError):
            initialize._import_muon()
    else:
        initialize._import_muon()
    assert seen == [(initialize._MUON, "1")]
    assert os.environ.get(initialize._NO_COMPILER) == before
