"""What a failed save says: a full disk is one rank's fault, and what was read wrongly is no full disk."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed.runtime.zero.config import ZeroStageEnum

from eve_ds.engine.checkpoint import disk_full_as_rank_error
from eve_ds.errors import RankError
from preprocessing.errors import UserError


def raise_write_error(path: Path) -> None:
    """As ``write_atomic`` does."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written") from error


def test_a_full_disk_is_this_ranks_error_and_the_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    target = tmp_path / "step_2"
    target.mkdir()
    with pytest.raises(RankError, match=r"rank 3: .*step_2 cannot be written, most often because the disk is full"):
        with disk_full_as_rank_error(target):
            raise_write_error(target / "a")
    assert not target.exists()


def test_a_checkpoint_that_was_read_wrongly_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a has 10 values of fp32, not 12$") as error:
        with disk_full_as_rank_error(tmp_path):
            raise UserError("a has 10 values of fp32, not 12")
    assert not isinstance(error.value, RankError) and tmp_path.exists()


def test_a_zero_stage_is_stored_without_getattr() -> None:
    """Which Python 3.11.0 to 3.11.3 would put into the file, and no careful reader allows."""
    stored = pickle.dumps(ZeroStageEnum.gradients, protocol=2)
    assert b"getattr" not in stored and pickle.loads(stored) is ZeroStageEnum.gradients  # noqa: S301 - our own bytes
