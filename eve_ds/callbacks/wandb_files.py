"""What the offline files of a wandb run hold: wandb 0.31 writes them, but has no reader of them in Python.

A file is a log of protobuf records, framed as LevelDB's (https://github.com/google/leveldb, doc/log_format.md): a
header of 7 bytes, then blocks of 32 KiB (the first one counts the header), in which each fragment has a CRC of 4
bytes, a length of 2 and a type. The CRC is not checked.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER, MAGIC = struct.Struct("<4sHB"), b":W&B"
FRAGMENT = struct.Struct("<IHB")  # checksum, length, type
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def raw_records(path: Path) -> Iterator[bytes]:
    """The records of a file, in order. It ends before a record that a killed process left incomplete."""
    return (record for record, _ in _placed_records(path))


def _placed_records(path: Path) -> Iterator[tuple[bytes, int]]:
    """The records as in `raw_records`, each with the position of its end."""
    with open(path, "rb") as file:
        if file.read(HEADER.size)[:4] != MAGIC:
            return
        whole = b""
        while True:
            left = BLOCK - file.tell() % BLOCK
            if left < FRAGMENT.size:  # too short for a fragment: zeros
                file.seek(left, 1)
            head = file.read(FRAGMENT.size)
            if len(head) < FRAGMENT.size:
                return
            _, length, kind = FRAGMENT.unpack(head)
            part = file.read(length)
            if len(part) < length or not FULL <= kind <= LAST:
                return
            whole = part if kind in (FULL, FIRST) else whole + part
            if kind in (FULL, LAST):
                yield whole, file.tell()


def _parsed(raw: bytes) -> Any:
    """The protobuf message; None of a damaged one."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made when it is imported: no type checker knows what it holds
    record = messages.Record()
    try:
        record.ParseFromString(raw)
    except DecodeError:
        return None
    return record


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged, in order: {key: value}, with "_step"; of a nested key the first part.

    It ends before a damaged record.
    """
    for raw in raw_records(path):
        if (record := _parsed(raw)) is None:
            return
        if record.HasField("history"):
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def mend(path: Path) -> None:
    """Make a file that a killed process left one that ``wandb sync`` takes: cut off an incomplete record.

    wandb 0.31 would upload no later file of the run. A file that does not even name its run, which keeps it from
    uploading anything, is set aside as ``.wandb.empty``. The process that wrote it must have ended.
    """
    end, named = 0, False
    for raw, place in _placed_records(path):
        end = place
        named = named or ((record := _parsed(raw)) is not None and record.HasField("run"))
    if not named:
        path.rename(path.with_name(f"{path.name}.empty"))
    elif end < path.stat().st_size:
        os.truncate(path, end)


@dataclass(frozen=True)
class Logged:
    """What the earlier offline files of a run hold.

    Attributes:
        last: the last step; -1 if there are files without one, None if there are no files.
        keys: by step, of the steps that were asked for.
    """

    last: int | None
    keys: dict[int, set[str]]


def mend_and_read(folder: Path, run_id: str, first_step: int) -> Logged:
    """Mend the earlier offline files of a run, see `mend`. What they hold, with the keys from ``first_step`` on.

    Args:
        folder: ``RUN/wandb``.
        run_id: of the run.
        first_step: optimizer step.
    """
    last: int | None = None
    found: dict[int, set[str]] = {}
    # A folder's name may go on after the id: of two that begin in one second the later one has a suffix.
    for path in sorted(folder.glob(f"offline-run-*/run-{run_id}.wandb")):
        last = -1 if last is None else last
        for row in history(path):
            step = int(row.get("_step", -1))
            last = max(last, step)
            if step >= first_step:
                found.setdefault(step, set()).update(row)
        mend(path)
    return Logged(last, found)
