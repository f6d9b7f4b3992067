"""Power is lost at random moments of a run: what its disk holds at that instant goes on bit for bit.

The run writes to a file system in a file. A copy of that file is what the disk would hold: not what the system still
has in memory. The ranks stand still while it is copied.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import interrupted, ranks

STEPS, LOSSES = 80, 10


@contextmanager
def mounted(image: Path, point: Path) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    found = subprocess.run(["mount", "-o", "loop", str(image), str(point)], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"mounting a file system in a file needs root and loop devices: {found.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def images(options: list[str], folder: Path, draw: random.Random) -> list[tuple[Path, int]]:
    """(image, a step that is surely on its disk) of each power loss."""
    disk, found = folder / "disk.img", []
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)
    with mounted(disk, folder / "disk") as point:
        run = point / "run"
        started = interrupted.start(options, run, STEPS, keep=1)
        for number in range(LOSSES):
            target = 2 + number * (STEPS - 16) // LOSSES + draw.randint(0, 5)
            interrupted.until(started, lambda target=target: max(interrupted.records(run), default=0) >= target)
            time.sleep(draw.uniform(0, 0.3))
            for rank in started:
                rank.send_signal(signal.SIGSTOP)
            whole = interrupted.saved(run)
            image = folder / f"loss{number}.img"
            subprocess.run(["cp", "--sparse=always", str(disk), str(image)], check=True)
            for rank in started:
                rank.send_signal(signal.SIGCONT)
            # Of two, the older one is about to go: that is decided when the newer one is on disk.
            found.append((image, min(whole, default=0)))
        codes, text = ranks.finish(started)
        assert codes == [0, 0], text
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_the_disk_holds_goes_on_bit_for_bit(tiny_run: list[str], tmp_path: Path) -> None:
    found = images(tiny_run, tmp_path, random.Random(0))
    whole = interrupted.undisturbed(tiny_run, tmp_path / "whole", STEPS)
    expected = interrupted.saved(whole)
    for image, surely in found:
        with mounted(image, tmp_path / "disk") as point:
            run = shutil.copytree(point / "run", tmp_path / image.stem)
        newest = max(interrupted.saved(run), default=0)
        assert newest >= surely, f"{image.name}: step {surely} was saved"
        codes, text = ranks.finish(interrupted.start(tiny_run, run, STEPS, keep=2))
        assert codes == [0, 0] and "damaged" not in text, text
        assert newest == 0 or f"training from step {newest} to step {STEPS}" in text, text
        assert interrupted.records(run) == interrupted.records(whole)
        assert interrupted.saved(run)[STEPS] == expected[STEPS]
        image.unlink()
