"""Files of weights are whole or not there, and nothing is lost that a user did not offer."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from eve_ds.weights.load import load_weights
from eve_ds.weights.save import check_out, replacing, write_weights
from preprocessing.errors import UserError

WHOLE = torch.arange(1000.0)
STATE = {
    "view": WHOLE[:4],
    "matrix": torch.ones(2, 3).t(),
    "scalar": torch.tensor(2.0),
    "half": torch.ones(2).bfloat16(),
}


@pytest.mark.parametrize("suffix", ["safetensors", "th", "pt"])
def test_tensors_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"new.{suffix}"
    write_weights(path, STATE, {"format": "pt"})
    back = load_weights(path)
    assert back.keys() == STATE.keys()
    for name, value in STATE.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value)
    assert path.stat().st_size < WHOLE.nbytes  # a view does not take its whole storage along
    assert path.stat().st_mode & 0o777 == 0o644


@contextmanager
def full_disk() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 8 KiB, as it would for want of room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["safetensors", "th"])
def test_a_full_disk_leaves_the_old_files(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"old.{suffix}"
    out.write_text("old")
    with pytest.raises(UserError, match="cannot be written"), full_disk(), replacing(out) as new:
        write_weights(new, {"large": torch.zeros(10_000)}, {})
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and out.read_text() == "old"


def test_a_folder_is_replaced_atomically(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    for content in ("first", "second"):
        with replacing(out) as new:
            new.mkdir()
            (new / "config.yaml").write_text(content)
        assert (out / "config.yaml").read_text() == content
    with pytest.raises(RuntimeError, match="killed"), replacing(out) as new:
        new.mkdir()
        raise RuntimeError("killed")
    assert (out / "config.yaml").read_text() == "second"
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--out .*file/model: cannot be written"),
        replacing(tmp_path / "file" / "model"),
    ):
        raise AssertionError("the block must not run")


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    model, other, file = tmp_path / "m.th", tmp_path / "thesis", tmp_path / "a.th"
    for folder, name in ((model, "model.safetensors"), (other, "thesis.tex")):
        folder.mkdir()
        (folder / name).write_text("")
    file.write_text("")
    check_out(tmp_path / "new", overwrite=False, folder=True)
    check_out(model, overwrite=True, folder=True)
    check_out(file, overwrite=True, folder=False)
    for out, overwrite, folder, message in (
        (model, False, True, "already exists; choose another place, or add --overwrite"),
        (file, False, False, "already exists"),
        (other, True, True, r"holds other files than a model's \(thesis.tex\)"),
        (file, True, True, "is not a folder"),
        (model, True, False, "is not a file"),
        (tmp_path / "new.npz", False, False, "ends in .safetensors or .pt"),
    ):
        with pytest.raises(UserError, match=rf"--out {out}: .*{message}"):
            check_out(out, overwrite, folder)
