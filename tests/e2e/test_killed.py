"""Runs killed at random moments, start-up and saves included, go on bit for bit from their last whole save."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.support import interrupted, ranks

LONG = [pytest.mark.long, pytest.mark.timeout(1200)]
FEW, MANY = 2, 5  # kills; of the latter ten times


@pytest.mark.parametrize(
    ("kills", "seed"), [(FEW, 0), *(pytest.param(MANY, seed, marks=LONG) for seed in range(1, 11))]
)
def test_a_killed_run_goes_on_bit_for_bit(tiny_run: list[str], tmp_path: Path, kills: int, seed: int) -> None:
    """At the end the newest checkpoint is damaged, too: the one before it is taken, and the run ends as it would."""
    steps = 6 * kills + 4
    whole = interrupted.undisturbed(tiny_run, tmp_path / "whole", steps)
    expected, run, draw = interrupted.saved(whole), tmp_path / "run", random.Random(seed)
    for _ in range(kills):
        newest = max(interrupted.saved(run), default=0)
        text = interrupted.kill_at_random(tiny_run, run, steps, draw)
        from_step = re.search(r"training from step (\d+)", text)
        assert from_step is None or int(from_step[1]) == newest, text
        assert all(files == expected[step] for step, files in interrupted.saved(run).items())
        assert max(interrupted.saved(run), default=0) >= newest, "a kill lost what was saved"
    while len(interrupted.saved(run)) < 2:
        interrupted.kill_at_random(tiny_run, run, steps, draw)
    path = interrupted.damage(run)
    codes, text = ranks.finish(interrupted.start(tiny_run, run, steps, keep=2))
    assert codes == [0, 0], text
    assert f"WARNING: {path} is damaged: zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged" in text
    assert path.with_name(f"{path.name}.damaged").is_dir()
    assert interrupted.records(run) == interrupted.records(whole)
    assert interrupted.saved(run)[steps] == expected[steps]
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()
