"""What the offline files of a wandb run hold: wandb 0.31 writes them, but has no reader of them in Python.

A file is a log of protobuf records, framed as LevelDB's (https://github.com/google/leveldb, doc/log_format.md): a
header of 7 bytes, then blocks of 32 KiB (the first one counts the header), in which each fragment has a CRC of 4
bytes, a length of 2 and a type.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, MAGIC = struct.Struct("<4sHB"), b":W&B"
FRAGMENT = struct.Struct("<IHB")  # checksum, length, type
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def raw_records(path: Path) -> Iterator[bytes]:
    """The records of a file, in order. It ends before a record that a killed process left incomplete."""
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
                yield whole


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged, in order: {key: value}, with "_step". Of an image some part of its description.

    It ends before a damaged record.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made when it is imported: no type checker knows what it holds
    for raw in raw_records(path):
        record = messages.Record()
        try:
            record.ParseFromString(raw)
        except DecodeError:
            return
        if record.HasField("history"):
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def logged_since(folder: Path, run_id: str, first_step: int) -> dict[int, set[str]]:
    """{step: keys} that the earlier offline files of a run hold from ``first_step`` on.

    Args:
        folder: ``RUN/wandb``.
        run_id: of the run.
        first_step: optimizer step.
    """
    found: dict[int, set[str]] = {}
    # A folder's name may go on after the id: of two that begin in one second the later one has a suffix.
    for path in sorted(folder.glob(f"offline-run-*/run-{run_id}.wandb")):
        for row in history(path):
            if (step := int(row.get("_step", -1))) >= first_step:
                found.setdefault(step, set()).update(row)
    return found
