"""DeepSpeed's Muon is imported without torch's compiler; what is changed for that import is changed back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from deepspeed.runtime import compiler

from eve_ds.engine import initialize

IMPORT = """
import sys
from eve_ds.engine import initialize
initialize._import_muon()
assert initialize._MUON in sys.modules
print("torch._dynamo" in sys.modules)
"""


def test_muon_is_imported_without_the_compiler() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("fails", [False, True])
def test_other_functions_are_compiled_as_before(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        assert name == initialize._MUON and compiler.compile()(len) is len
        if fails:
            raise ImportError(name)

    before = compiler.compile
    monkeypatch.setattr(initialize.importlib, "import_module", import_module)
    if fails:
        with pytest.raises(ImportError):
            initialize._import_muon()
    else:
        initialize._import_muon()
    assert compiler.compile is before
