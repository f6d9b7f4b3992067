from __future__ import annotations

import collections
from pathlib import Path

import pytest

from eve_ds.options import import_object
from preprocessing.errors import UserError


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/mine.py").write_text("class Outer:\n    class Inner:\n        pass\n")
    (tmp_path / "own_package/needs.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "own_package/broken.py").write_text("x = 1\ny = 1 / 0\n")
    (tmp_path / "own_package/typo.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_an_object_is_found_by_its_path() -> None:
    assert import_object("collections:OrderedDict") is collections.OrderedDict
    assert import_object("own_package.mine:Outer.Inner").__name__ == "Inner"


@pytest.mark.parametrize("path", ["", "own_package", "own_package.mine.Outer", ":Outer", "own_package.mine:", "a b:c"])
def test_a_malformed_path(path: str) -> None:
    with pytest.raises(UserError, match=r"^--task.*: not an import path; write module:name"):
        import_object(path, "--task")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent_package.mine:Outer", "there is no module absent_package; start in the folder that holds it"),
        ("own_package.absent:Outer", "there is no module own_package.absent; start in"),
        ("own_package.mine:Absent", "own_package.mine has no Absent; check the spelling"),
        ("own_package.mine:Outer.Absent", "own_package.mine has no Outer.Absent; check the spelling"),
        ("own_package.needs:Outer", "No module named 'a_module_that_nobody_has', at "),
        ("own_package.broken:Outer", r"cannot be imported \(ZeroDivisionError: division by zero, at .*broken.py:2\)"),
        ("own_package.typo:Outer", r"cannot be imported \(SyntaxError: .*typo.py, line 1"),
    ],
)
def test_what_cannot_be_imported_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^--logging.callbacks {path}: .*{message}"):
        import_object(path, "--logging.callbacks")
