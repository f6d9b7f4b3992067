"""Pipes and devices among the inputs: refused, not waited at; what the shell has opened is read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.common import InputError, read_json_rows, read_text
from evaluation.retrieval import file_ranks


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    signal.alarm(60)
    yield
    signal.alarm(0)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (read_text, read_json_rows, file_ranks):
            with pytest.raises(InputError, match=f"{path}: is a pipe, a socket or a device; write its content to a"):
                read(str(path))


def test_what_the_shell_has_opened_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"a": 1}\n')
    os.close(writer)
    try:
        assert read_json_rows(f"/dev/fd/{reader}") == [{"a": 1}]
    finally:
        os.close(reader)
