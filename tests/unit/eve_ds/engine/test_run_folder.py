"""What a run's folder holds of an earlier start, and where a run has none of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from eve_ds.engine import run_folder
from preprocessing.errors import UserError
from tests.unit.eve_ds.engine.test_identity import begun, of, pretraining


def test_signs_of_life_of_an_earlier_start_are_gone(data: Path) -> None:
    """Or a rank that never came this time is named as another host's."""
    config = pretraining(data)
    begun(data / "run", config)
    ranks = data / "run" / "ranks"
    ranks.mkdir()
    (ranks / "rank_1.json").write_text("{}")
    (ranks / "rank_1.stacks").write_text("")
    run_folder.claim(dataclasses.replace(config, dry_run=True), of(config))
    assert (ranks / "rank_1.json").exists()
    run_folder._held.clear()
    run_folder.claim(config, of(config))
    assert [path.name for path in ranks.iterdir()] == ["rank_1.stacks"]


def test_averages_of_an_earlier_part_are_no_part_of_the_run(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    (data / "run" / "model_ema").mkdir()
    for ema, warnings in ((0.5, 0), (0.0, 1)):
        config.optimizer.ema = ema
        run_folder.claim(config, of(config))
        run_folder._held.clear()
        assert sum("model_ema stays as it is" in message for message in caplog.messages) == warnings


def test_a_run_among_another_ones_checkpoints_is_refused(data: Path) -> None:
    begun(data / "run", pretraining(data))
    config = pretraining(data, data / "run" / "checkpoints" / "step_00000010")
    with pytest.raises(UserError, match=r"step_00000010: is among the checkpoints of a run, .*; take one"):
        run_folder.claim(config, of(config))
    free = pretraining(data, data / "checkpoints" / "mine")
    run_folder.claim(free, of(free))


def test_a_config_that_cannot_be_read_is_no_fault_of_the_user(tmp_path: Path) -> None:
    """A disk that fails for a moment: the command says so, and does not ask for another folder."""
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        run_folder.stored_identity(tmp_path)
    (tmp_path / "config.yaml").rmdir()
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match="not the readable config of a run; choose another --output_dir"):
        run_folder.stored_identity(tmp_path)
