"""The ids of a split as keys of eight bytes, by which splits are checked for common images, questions and statements.

    DIR/SPLIT/ids.bin    for each column of ID_COLUMNS, in that order: its distinct keys (`id_key`), ascending, as <u8
    manifest.json        "ids": {"file", "bytes", "sha256", "distinct": {column: n}, "numbered": [column, …], "version"}

A column is "numbered" if its ids are numbers that a converter made up, such as line numbers: the same number in another
split means nothing. Then an image's key is made from the image file, and a question's from its id and image.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from preprocessing.errors import id_without_secrets
from preprocessing.running.storage import StoragePath, open_input
from preprocessing.shards.hashed_file import HashedFile
from preprocessing.shards.reader import sound_batches
from preprocessing.shards.schema import (
    ID_COLUMNS,
    IDS,
    IDS_VERSION,
    distinct,
    id_key,
    ids_of_batch,
    image_mark,
    is_leak,
    read_manifest,
)
from preprocessing.shards.schema import parse_ids as parse_ids

_THINGS = {"image_id": "images", "question_id": "questions", "identifier": "statements"}
_MAX_EXAMPLES = 3  # of ids, in a message

Keys = dict[str, np.ndarray]  # column -> [n] uint64


def ids_without_secrets(kind: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of a row without secrets, as shards store them: an id may be an address with a password."""
    ids = {}
    for column in ID_COLUMNS[kind]:
        one = columns[column]
        if isinstance(one, str):
            one = id_without_secrets(one)
        elif isinstance(one, list):
            one = [id_without_secrets(part) if isinstance(part, str) else part for part in one]
        ids[column] = one
    return ids


class IdKeys:
    """Collects the keys of the rows of one part, in the order of the rows."""

    def __init__(self, kind: str, numbered: Sequence[str]) -> None:
        self._numbered = numbered
        self._ids: dict[str, list[Any]] = {column: [] for column in ID_COLUMNS[kind]}
        self._marks: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[kind]}

    def add(self, columns: Mapping[str, Any], images: Iterable[bytes | memoryview]) -> None:
        """Add the ids of a row that is written."""
        mark = image_mark(images) if self._numbered else b""
        for column, listed in self._ids.items():
            one = columns[column]
            ids = one if isinstance(one, list) else (one,)
            listed += ids
            if column in self._numbered:
                self._marks[column] += [mark] * len(ids)

    def record(self) -> dict[str, str]:
        """The keys for the part's JSON record, column -> base64; `join_keys` reads them."""
        keys = {}
        for column, ids in self._ids.items():
            marks = self._marks[column]
            by_image = column == "image_id" and marks
            keys[column] = map(id_key, [b""] * len(ids) if by_image else ids, marks or repeat(b""))
        return {column: base64.b64encode(b"".join(made)).decode() for column, made in keys.items()}


def join_keys(kind: str, records: Iterable[dict[str, str]]) -> Keys:
    """The distinct keys of many parts, ascending."""
    parts: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[kind]}
    for record in records:
        for column, found in parts.items():
            found.append(base64.b64decode(record[column]))
    return {column: distinct(np.frombuffer(b"".join(found), "<u8")) for column, found in parts.items()}


def write_ids(folder: StoragePath, keys: Keys, numbered: Sequence[str]) -> dict[str, Any]:
    """Write `folder/ids.bin`. Returns the manifest's record of it."""
    with HashedFile(folder / IDS) as file:
        for column in keys:
            if len(keys[column]):
                file.write(keys[column].astype("<u8"))
        sha256, size = file.finish()
    counts = {column: len(found) for column, found in keys.items()}
    record = {"file": IDS, "bytes": size, "sha256": sha256, "distinct": counts, "numbered": list(numbered)}
    return record | {"version": IDS_VERSION}


def numbered_columns(manifest: Mapping[str, Any]) -> list[str]:
    """The id columns that are numbered."""
    record = manifest.get("ids")
    found = record.get("numbered", []) if isinstance(record, dict) else []
    return [column for column in ID_COLUMNS[manifest["kind"]] if column in found]


def read_ids(folder: StoragePath, manifest: Mapping[str, Any]) -> Keys | None:
    """The keys in `folder/ids.bin`; None if there is no such file or it does not match the manifest."""
    try:
        with open_input(folder / IDS) as file:
            content = bytes(file.read())
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return None
    parts = parse_ids(manifest, content)
    return None if parts is None else {column: np.frombuffer(part, "<u8") for column, part in parts.items()}


def shard_ids(
    folder: StoragePath, manifest: Mapping[str, Any]
) -> Iterator[tuple[StoragePath, str, tuple[list[bytes], list[bytes]]]]:
    """(shard, column, (ids, keys)) of every record batch. Raises UserError when a shard is damaged."""
    numbered = numbered_columns(manifest)
    for shard in manifest["shards"]:
        for _, batch in sound_batches(folder / shard["file"], manifest["kind"]):
            for column in ID_COLUMNS[manifest["kind"]]:
                yield folder / shard["file"], column, ids_of_batch(batch, column, column in numbered)


def keys_of_shards(folder: StoragePath, manifest: Mapping[str, Any]) -> Keys:
    """The keys of a split, read from its shards."""
    found: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[manifest["kind"]]}
    for _, column, (_, keys) in shard_ids(folder, manifest):
        found[column] += keys
    return {column: distinct(np.frombuffer(b"".join(one), "<u8")) for column, one in found.items()}


def shared_ids(
    folders: Sequence[StoragePath], by_shards: bool = True
) -> Iterator[tuple[StoragePath, StoragePath, str, bool]]:
    """(split, other split, what both have, whether that is a fault) of each two splits with common ids.

    For a split without ids.bin, the shards are read, or with `by_shards=False` the split is skipped. Raises UserError.
    """
    known: list[tuple[StoragePath, Keys, list[str]]] = []
    for folder in folders:
        manifest = read_manifest(folder)
        keys = read_ids(folder, manifest)
        if keys is None and by_shards:
            keys = keys_of_shards(folder, manifest)
        if keys is None:
            continue
        numbered = numbered_columns(manifest)
        for earlier, theirs, theirs_numbered in known:
            for column in [name for name in keys if name in theirs]:
                both = np.intersect1d(theirs[column], keys[column], assume_unique=True)
                if len(both):
                    by_file = column in numbered and column in theirs_numbered
                    is_fault = is_leak(column, by_file, len(both), min(len(theirs[column]), len(keys[column])))
                    yield earlier, folder, f"{len(both)} {_THINGS[column]}, {_named(folder, column, both)}", is_fault
        known.append((folder, keys, numbered))


def _named(folder: StoragePath, column: str, keys: np.ndarray) -> str:
    """A few ids of a split that have one of these keys, for a message."""
    wanted = {key.tobytes() for key in keys.astype("<u8")}
    found: dict[str, None] = {}
    for _, own, (ids, found_keys) in shard_ids(folder, read_manifest(folder)):
        if own == column:
            pairs = zip(ids, found_keys, strict=True)
            found |= dict.fromkeys(one.decode("utf-8", "replace") for one, key in pairs if key in wanted)
        if len(found) >= _MAX_EXAMPLES:
            break
    return f"such as {column} {', '.join(list(found)[:_MAX_EXAMPLES])}"
