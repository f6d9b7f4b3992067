"""Training data must not be scored: a run compares the ids of its splits when it opens them.

In a split without a manifest, no two files may hold the same rows, either.

A prepared split has its ids in a file, eight bytes each (preprocessing/shards/ids.py), so no shard is read. Of other
shards the id columns are read, a second per two million ids. If ids are equal, they are looked up and named.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from eve_ds.data.shards import Split
from preprocessing.errors import UserError
from preprocessing.local_files import check_regular
from preprocessing.shards.schema import (
    ID_COLUMNS,
    IDS,
    IMAGE_COLUMNS,
    SAMPLE_COLUMN,
    distinct,
    ids_of_batch,
    is_leak,
    parse_ids,
)

_NOUNS = {"image_id": "images", "question_id": "questions", "identifier": "statements"}
_MAX_NAMES = 3  # ids in a message
_SAMPLED = 16  # ids in both of two files whose rows are compared
_MAX_PAIRS = 10_000  # pairs of files with common ids that are compared
_MAX_ROWS = 8  # rows compared per id: enough for the captions of an image, but not for a column of equal ids

Found = list[tuple[Path, bytes, bytes]]  # shard, id, key


class SplitIds:
    """The ids of a split, as 64-bit keys; read on first use and cached.

    Args:
        split: with or without a manifest.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        record = split.manifest.get("ids")
        self._numbered = record.get("numbered", []) if isinstance(record, dict) else []

    def shared(self, other: SplitIds) -> tuple[str, bool]:
        """Ids in both this split and another.

        Returns:
            the start of a message with files and ids, "" if there are none; and whether it is an error (``is_leak``).
        """
        found = ""
        for column in ID_COLUMNS[self.split.kind] if self.split.kind == other.split.kind else ():
            ours, theirs = self._keys(column), other._keys(column)
            both = _common(ours, theirs)
            if len(both):
                message = self._describe(other, column, both)
                by_file = column in self._numbered and column in other._numbered
                if is_leak(column, by_file, len(both), min(len(ours), len(theirs))):
                    return message, True
                found = found or message
        return found, False

    def _describe(self, other: SplitIds, column: str, both: np.ndarray) -> str:
        """Message for keys in both splits: how many, in which files, and some of their ids."""
        count = f"{len(both)} {_NOUNS[column]} stand in both"
        theirs = list(other._find(column, both))
        ours = next(self._find(column, np.frombuffer(theirs[0][2], "<u8")), None) if theirs else None
        if ours is None:  # only the lists of ids agree, not the shards
            lists = " and ".join(str(each.split.directory / IDS) for each in (self, other))
            return f"{lists}: {count}, and a shard lacks what its list has (preprocessing verify tells which)"
        return f"{ours[0]} and {theirs[0][0]}: {count}, {_named(column, theirs)}"

    def check_once(self) -> None:
        """Raise UserError if a question or a statement occurs twice: a score would count it twice."""
        for column in ID_COLUMNS[self.split.kind]:
            if column == "image_id":  # an image may occur again: EVE's scripts write a row per caption or question
                continue
            if self._listed is not None and len(self._listed[column]) == self.split.samples:
                continue
            keys, counts = np.unique(self._read[column], return_counts=True)
            twice = keys[counts > 1]
            if len(twice):
                found = list(self._find(column, twice))
                files = " and ".join(dict.fromkeys(str(path) for path, _, _ in found))
                raise UserError(
                    f"{files}: {len(twice)} {_NOUNS[column]} stand twice in this split, {_named(column, found)}; move "
                    "one of the files away, or prepare the split again"
                )

    def doubled(self) -> tuple[str, bool]:
        """Rows that are in two files of a split without a manifest, as in a copy under another name.

        Ids are not sufficient: they may come from two datasets, and the captions of an image may continue in the next
        file. So for some ids in two files, the first rows of each file are compared with their images and texts.

        Returns:
            the start of a message with the two files that have most rows in common, and ids, "" if there are none; and
            whether these are at least half of one of the files.
        """
        column = ID_COLUMNS[self.split.kind][-1]
        keys = np.empty(0, "<u8") if self.split.manifest else self._read[column]
        if len(distinct(keys)) == len(keys):
            return "", False
        paths, counts = zip(*self._counts[column].items(), strict=True)
        of_file = [distinct(part) for part in np.split(keys, np.cumsum(counts)[:-1])]
        common = {pair: _common(of_file[pair[0]], of_file[pair[1]]) for pair in _pairs_in_common(of_file)}
        sampled: dict[tuple[int, int], set[bytes]] = {}
        for pair, both in common.items():
            some = both[np.linspace(0, len(both) - 1, min(len(both), _SAMPLED)).astype(int)]
            sampled[pair] = {key.tobytes() for key in some}
        equal = self._equal(column, set().union(*sampled.values()))
        worst, found = 0.0, ""
        for (one, other), keys_of_pair in sampled.items():
            if same := keys_of_pair & equal.get((paths[one], paths[other]), set()):
                both = common[one, other]
                number = round(len(both) * len(same) / len(keys_of_pair))
                share = number / min(len(of_file[one]), len(of_file[other]))
                if share > worst:
                    worst = share
                    named = _named(column, list(self._find(column, np.frombuffer(b"".join(sorted(same)), "<u8"))))
                    about = "" if len(keys_of_pair) == len(both) else "about "
                    where = f"{paths[one]} and {paths[other]}"
                    found = f"{where}: {about}{number} {_NOUNS[column]} stand in both, {named}"
        return found, worst >= 0.5

    def _equal(self, column: str, keys: set[bytes]) -> dict[tuple[Path, Path], set[bytes]]:
        """{(shard, shard): keys that have a row with the same images and texts in both}."""
        seen: dict[bytes, list[tuple[Path, object]]] = defaultdict(list)
        equal: dict[tuple[Path, Path], set[bytes]] = defaultdict(set)
        for path, key, content in self._first_rows(column, keys) if keys else ():
            for other in (other for other, theirs in seen[key] if other != path and theirs == content):
                equal[other, path].add(key)
            seen[key].append((path, content))
        return equal

    def _first_rows(self, column: str, keys: set[bytes]) -> Iterator[tuple[Path, bytes, object]]:
        """(shard, key, images and texts) of the first rows of each shard with each of ``keys``."""
        columns = (*IMAGE_COLUMNS[self.split.kind], SAMPLE_COLUMN[self.split.kind])
        wanted: dict[Path, set[bytes]] = defaultdict(lambda: set(keys))
        taken: Counter[tuple[Path, bytes]] = Counter()
        for path, batch in self.split.batches():
            for row in _rows_with(batch, column, wanted[path]):
                for key in wanted[path].intersection(ids_of_batch(row, column)[1]):
                    yield path, key, row.select(columns).to_pylist()
                    taken[path, key] += 1
                    if taken[path, key] == _MAX_ROWS:
                        wanted[path].remove(key)

    def _keys(self, column: str) -> np.ndarray:
        """[n] uint64, unique and sorted."""
        return self._listed[column] if self._listed is not None else distinct(self._read[column])

    @functools.cached_property
    def _listed(self) -> dict[str, np.ndarray] | None:
        """Keys from the split's file of ids; None if there is none, or it is not the one in the manifest."""
        check_regular(self.split.directory / IDS)
        try:
            parts = parse_ids(self.split.manifest, (self.split.directory / IDS).read_bytes())
        except (OSError, KeyError):
            return None
        return None if parts is None else {column: np.frombuffer(part, "<u8") for column, part in parts.items()}

    @functools.cached_property
    def _read(self) -> dict[str, np.ndarray]:
        """Keys from the shards, in the order of their rows; empty if they lack the column."""
        keys: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[self.split.kind]}
        self._counts: dict[str, dict[Path, int]] = {column: defaultdict(int) for column in keys}  # ids of each shard
        for path, batch in self.split.batches():
            for column, found in keys.items():
                ids = ids_of_batch(batch, column, column in self._numbered)[1]
                found += ids
                self._counts[column][path] += len(ids)
        return {column: np.frombuffer(b"".join(found), "<u8") for column, found in keys.items()}

    def _find(self, column: str, keys: np.ndarray) -> Iterator[tuple[Path, bytes, bytes]]:
        """(shard, id, key) of the first rows of each shard with one of ``keys``, as many as a message names."""
        wanted = {key.tobytes() for key in keys}
        named: dict[Path, int] = defaultdict(int)
        for path, batch in self.split.batches():
            for value, key in zip(*ids_of_batch(batch, column, column in self._numbered), strict=True):
                if key in wanted and named[path] < _MAX_NAMES:
                    named[path] += 1
                    yield path, value, key


def _rows_with(batch: pa.RecordBatch, column: str, keys: set[bytes]) -> Iterator[pa.RecordBatch]:
    """The rows of a batch with one of ``keys``, a batch each; found by bisection, since they are few.

    The consumer may remove keys from ``keys`` between rows.
    """
    if not keys or keys.isdisjoint(ids_of_batch(batch, column)[1]):
        return
    if batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _rows_with(batch.slice(0, half), column, keys)
    yield from _rows_with(batch.slice(half), column, keys)


def _pairs_in_common(parts: list[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of ``parts`` (each unique and sorted) with a common element; at most ``_MAX_PAIRS``."""
    keys, owners = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    found: set[int] = set()
    for apart in range(1, len(parts)):
        same = np.flatnonzero(keys[apart:] == keys[:-apart])
        if not len(same) or len(found) >= _MAX_PAIRS:
            break
        found.update(distinct(owners[same] * len(parts) + owners[same + apart]).tolist())
    return [divmod(pair, len(parts)) for pair in sorted(found)[:_MAX_PAIRS]]


def _common(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection of two sorted arrays; faster than intersect1d if one is much smaller."""
    small, large = sorted((some, others), key=len)
    places = np.minimum(np.searchsorted(large, small), len(large) - 1)  # clamped: the last one, which is not equal
    return small[large[places] == small]


def _named(column: str, found: Found) -> str:
    ids = dict.fromkeys(value.decode("utf-8", "replace") for _, value, _ in found)
    return f"such as {column} {', '.join(list(ids)[:_MAX_NAMES])}"
