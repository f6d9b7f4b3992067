"""What is trained on is not scored: a run compares the ids of its splits when it opens them.

A prepared split has them in a file, eight bytes each (preprocessing/ids.py), so that no shard is read; of other shards
the columns of ids are read, a second for two million. Where two are equal, the ids are looked for and named.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eve_ds.data.shards import Split
from preprocessing.schema import ID_COLUMNS, IDS, DataError, check_regular, ids_of_batch, listed_ids

_THINGS = {"image_id": "images", "question_id": "questions", "identifier": "statements"}
_NAMED = 3  # ids that a message names

Found = list[tuple[Path, bytes, bytes]]  # shard, id, key


class SplitIds:
    """The ids of a split, as keys of 64 bits; read when they are asked for, and kept.

    Args:
        split: any, with a manifest or without.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        record = split.manifest.get("ids")
        self._numbered = record.get("numbered", []) if isinstance(record, dict) else []

    def shared(self, other: SplitIds) -> str:
        """What stands in this split and in the other, as the start of a message with files and ids; "" for nothing."""
        for column in ID_COLUMNS[self.split.kind] if self.split.kind == other.split.kind else ():
            both = _common(self._keys(column), other._keys(column))
            if len(both):
                theirs = list(other._find(column, both))
                ours = next(self._find(column, np.frombuffer(theirs[0][2], "<u8")))
                count = f"{len(both)} {_THINGS[column]} stand in both"
                return f"{ours[0]} and {theirs[0][0]}: {count}, {_named(column, theirs)}"
        return ""

    def check_once(self) -> None:
        """Raise DataError where a question or a statement stands twice: a score would count it twice."""
        for column in ID_COLUMNS[self.split.kind]:
            if column == "image_id":  # a caption or a question a row, as EVE's scripts write: an image may come again
                continue
            if self._listed is not None and len(self._listed[column]) == self.split.samples:
                continue
            keys, counts = np.unique(self._read[column], return_counts=True)
            twice = keys[counts > 1]
            if len(twice):
                found = list(self._find(column, twice))
                files = " and ".join(dict.fromkeys(str(path) for path, _, _ in found))
                raise DataError(
                    f"{files}: {len(twice)} {_THINGS[column]} stand twice in this split, {_named(column, found)}; move "
                    "one of the files away, or prepare the split again"
                )

    def _keys(self, column: str) -> np.ndarray:
        """[n] uint64, distinct and rising."""
        return self._listed[column] if self._listed is not None else np.unique(self._read[column])

    @functools.cached_property
    def _listed(self) -> dict[str, np.ndarray] | None:
        """By the split's file; None where it has none, or another one than the manifest says."""
        check_regular(self.split.directory / IDS)
        try:
            parts = listed_ids(self.split.manifest, (self.split.directory / IDS).read_bytes())
        except (OSError, KeyError):
            return None
        return None if parts is None else {column: np.frombuffer(part, "<u8") for column, part in parts.items()}

    @functools.cached_property
    def _read(self) -> dict[str, np.ndarray]:
        """By the shards, in the order of their rows; empty where they lack the column."""
        keys: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[self.split.kind]}
        for _, batch in self.split.batches():
            for column, found in keys.items():
                found += ids_of_batch(batch, column, column in self._numbered)[1]
        return {column: np.frombuffer(b"".join(found), "<u8") for column, found in keys.items()}

    def _find(self, column: str, keys: np.ndarray) -> Iterator[tuple[Path, bytes, bytes]]:
        """The first rows with one of these keys: so many of each shard that a message can name them."""
        wanted = {key.tobytes() for key in keys}
        named: dict[Path, int] = defaultdict(int)
        for path, batch in self.split.batches():
            for value, key in zip(*ids_of_batch(batch, column, column in self._numbered), strict=True):
                if key in wanted and named[path] < _NAMED:
                    named[path] += 1
                    yield path, value, key


def _common(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What stands in both of two rising arrays: of one much smaller than the other in less time than intersect1d."""
    small, large = sorted((some, others), key=len)
    places = np.minimum(np.searchsorted(large, small), len(large) - 1)  # beyond the last one: which is not equal, then
    return small[large[places] == small]


def _named(column: str, found: Found) -> str:
    ids = dict.fromkeys(value.decode("utf-8", "replace") for _, value, _ in found)
    return f"such as {column} {', '.join(list(ids)[:_NAMED])}"
