"""Files have the permissions that the umask says: a group's, or nobody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evaluation.common import write_text
from eve_ds.doctor import __main__ as doctor
from eve_ds.engine.run_folder import _lock
from eve_ds.weights.save import write_weights
from preprocessing.local_files import write_atomic


@pytest.fixture(params=[(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)], ids=["private", "group", "usual"])
def permissions(request: pytest.FixtureRequest) -> Iterator[int]:
    """What a file is to have under the umask that is set meanwhile."""
    mask, expected = request.param
    before = os.umask(mask)
    yield expected
    os.umask(before)


def test_every_way_to_write_a_file(permissions: int, tmp_path: Path) -> None:
    write_atomic(tmp_path / "shard", b"")
    write_text(tmp_path / "scores", "")
    doctor.write(tmp_path / "facts", "")
    write_weights(tmp_path / "model.safetensors", {"w": torch.zeros(1)}, {})
    write_weights(tmp_path / "model.pt", {"w": torch.zeros(1)}, {})
    _lock(tmp_path)
    found = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(
        ["shard", "scores", "facts", "model.safetensors", "model.pt", ".lock"], oct(permissions)
    )
