"""One rank sees another folder by the name of output_dir: a disk of its host's own, or an old view of the shared one.

The rank has mounts of its own (root alone can do that): a folder that only it sees lies over the run's.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from eve_ds.engine.run_folder import LOCK
from tests.support import interrupted, ranks

APART = """mount --bind "$0" "$1" || exit 1
(while [ ! -e "$2" ]; do sleep 0.1; done; umount -l "$1") &
shift 2; exec "$@" """
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def own_mounts() -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts of a process's own need root")


def start(options: list[str], run: Path, view: Path, seen: Path, steps: int) -> list[subprocess.Popen[str]]:
    """Two ranks; the second one sees ``view`` in the place of ``run`` until there is a file ``seen``."""
    own = [f"--output_dir={run}", f"--optimizer.total_steps={steps}", "--checkpoint.keep=9"]
    last = ["unshare", "-m", "bash", "-c", APART, str(view), str(run), str(seen)]
    return ranks.start("eve_ds.pretrain", [*options, *interrupted.OPTIONS, *own], 2, last)


def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    return tmp_path / "run", tmp_path / "view", tmp_path / "seen"


def test_a_disk_of_each_host_is_refused_before_the_first_step(tiny_run: list[str], tmp_path: Path) -> None:
    run, view, seen = folders(tmp_path)
    run.mkdir()
    view.mkdir()
    started = start(tiny_run, run, view, seen, 4)
    try:
        output = started[0].communicate(timeout=ranks.LIMIT)[0]
    finally:
        seen.touch()
        for rank in started:
            rank.terminate()
    assert started[0].returncode == 2 and started[1].wait(60) in (2, -signal.SIGTERM)
    assert f"error: --output_dir {run}: rank 1 on host" in output and "all ranks need one folder" in output
    assert [path.name for path in run.iterdir()] == [LOCK] and not list(view.iterdir())


def test_a_late_view_of_the_newest_checkpoint_is_waited_for(tiny_run: list[str], tmp_path: Path) -> None:
    run, view, seen = folders(tmp_path)
    whole = interrupted.undisturbed(tiny_run, tmp_path / "whole", 8)
    started = interrupted.start(tiny_run, run, 8, keep=9)
    interrupted.until(started, lambda: max(interrupted.saved(run), default=0) >= 4)
    interrupted.kill(started)
    newest = max(interrupted.saved(run))
    shutil.copytree(run, view)
    shutil.rmtree(view / "checkpoints" / f"step_{newest:08d}")
    started = start(tiny_run, run, view, seen, 8)
    try:
        interrupted.until(started, lambda: bool(list(run.glob(".seen-*"))))  # rank 0 has said where they are to meet
        time.sleep(1)
    finally:
        seen.touch()
    codes, text = ranks.finish(started)
    assert codes == [0, 0] and f"training from step {newest} to step 8" in text and "damaged" not in text, text
    assert interrupted.records(run) == interrupted.records(whole)
    assert interrupted.saved(run) == interrupted.saved(whole)
