"""What is trained on is not scored: a run compares the ids of its splits when it opens them.

Where no manifest counts the rows of a split, two of its files must not hold the same ones, either.

A prepared split has them in a file, eight bytes each (preprocessing/shards/ids.py), so that no shard is read; of other
shards the columns of ids are read, a second for two million. Where two are equal, the ids are looked for and named.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from eve_ds.data.shards import Split
from preprocessing.errors import DataError
from preprocessing.local_files import check_regular
from preprocessing.shards.id_keys import distinct, ids_of_batch, is_leak, parse_ids
from preprocessing.shards.schema import ID_COLUMNS, IDS, IMAGE_COLUMNS, SAMPLE_COLUMN

_THINGS = {"image_id": "images", "question_id": "questions", "identifier": "statements"}
_NAMED = 3  # ids that a message names
_LOOKED_AT = 16  # ids of two files, of all that stand in both, whose rows are compared
_PAIRS = 10_000  # of files with ids in common that are compared
_COMPARED = 8  # rows of one id that are compared: the captions of an image, not all of a column that is empty

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

    def shared(self, other: SplitIds) -> tuple[str, bool]:
        """What stands in this split and in the other.

        Returns:
            the start of a message with files and ids; "" for nothing. Whether it is a fault (``is_leak``).
        """
        few = ""
        for column in ID_COLUMNS[self.split.kind] if self.split.kind == other.split.kind else ():
            ours, theirs = self._keys(column), other._keys(column)
            both = _common(ours, theirs)
            if len(both):
                told = self._told(other, column, both)
                by_file = column in self._numbered and column in other._numbered
                if is_leak(column, by_file, len(both), min(len(ours), len(theirs))):
                    return told, True
                few = few or told
        return few, False

    def _told(self, other: SplitIds, column: str, both: np.ndarray) -> str:
        """Of keys that stand in both splits: how many there are, in which files, and some of their ids."""
        count = f"{len(both)} {_THINGS[column]} stand in both"
        theirs = list(other._find(column, both))
        ours = next(self._find(column, np.frombuffer(theirs[0][2], "<u8")), None) if theirs else None
        if ours is None:  # by the lists alone
            lists = " and ".join(str(each.split.directory / IDS) for each in (self, other))
            return f"{lists}: {count}, and a shard lacks what its list has (preprocessing verify tells which)"
        return f"{ours[0]} and {theirs[0][0]}: {count}, {_named(column, theirs)}"

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

    def doubled(self) -> tuple[str, bool]:
        """Of a split of files without a manifest, what stands in two of them, as a copy under another name does.

        Ids alone do not tell: they may be those of two data sets, and an image's captions may go on in the next file.
        So of some ids that stand in two files, the first rows of each are compared, images, texts and all.

        Returns:
            the start of a message with the two files that have most in common, and ids; "" for nothing. Whether that
            is half of one of them or more.
        """
        column = ID_COLUMNS[self.split.kind][-1]
        keys = np.empty(0, "<u8") if self.split.manifest else self._read[column]
        if len(distinct(keys)) == len(keys):
            return "", False
        paths, counts = zip(*self._counts[column].items(), strict=True)
        of_file = [distinct(part) for part in np.split(keys, np.cumsum(counts)[:-1])]
        common = {pair: _common(of_file[pair[0]], of_file[pair[1]]) for pair in _pairs_in_common(of_file)}
        looked_at: dict[tuple[int, int], set[bytes]] = {}
        for pair, both in common.items():
            some = both[np.linspace(0, len(both) - 1, min(len(both), _LOOKED_AT)).astype(int)]
            looked_at[pair] = {key.tobytes() for key in some}
        equal = self._equal(column, set().union(*looked_at.values()))
        worst, found = 0.0, ""
        for (one, other), looked in looked_at.items():
            if same := looked & equal.get((paths[one], paths[other]), set()):
                both = common[one, other]
                number = round(len(both) * len(same) / len(looked))
                share = number / min(len(of_file[one]), len(of_file[other]))
                if share > worst:
                    worst = share
                    named = _named(column, list(self._find(column, np.frombuffer(b"".join(sorted(same)), "<u8"))))
                    about = "" if len(looked) == len(both) else "about "
                    where = f"{paths[one]} and {paths[other]}"
                    found = f"{where}: {about}{number} {_THINGS[column]} stand in both, {named}"
        return found, worst >= 0.5

    def _equal(self, column: str, keys: set[bytes]) -> dict[tuple[Path, Path], set[bytes]]:
        """Of two shards each: which of these keys have a row in both, the same in image and texts."""
        seen: dict[bytes, list[tuple[Path, object]]] = defaultdict(list)
        equal: dict[tuple[Path, Path], set[bytes]] = defaultdict(set)
        for path, key, content in self._first_rows(column, keys) if keys else ():
            for other in (other for other, theirs in seen[key] if other != path and theirs == content):
                equal[other, path].add(key)
            seen[key].append((path, content))
        return equal

    def _first_rows(self, column: str, keys: set[bytes]) -> Iterator[tuple[Path, bytes, object]]:
        """(shard, key, images and texts) of the first rows of each shard with each of these keys."""
        columns = (*IMAGE_COLUMNS[self.split.kind], SAMPLE_COLUMN[self.split.kind])
        wanted: dict[Path, set[bytes]] = defaultdict(lambda: set(keys))
        taken: Counter[tuple[Path, bytes]] = Counter()
        for path, batch in self.split.batches():
            for row in _rows_with(batch, column, wanted[path]):
                for key in wanted[path].intersection(ids_of_batch(row, column)[1]):
                    yield path, key, row.select(columns).to_pylist()
                    taken[path, key] += 1
                    if taken[path, key] == _COMPARED:
                        wanted[path].remove(key)

    def _keys(self, column: str) -> np.ndarray:
        """[n] uint64, distinct and rising."""
        return self._listed[column] if self._listed is not None else distinct(self._read[column])

    @functools.cached_property
    def _listed(self) -> dict[str, np.ndarray] | None:
        """By the split's file; None where it has none, or another one than the manifest says."""
        check_regular(self.split.directory / IDS)
        try:
            parts = parse_ids(self.split.manifest, (self.split.directory / IDS).read_bytes())
        except (OSError, KeyError):
            return None
        return None if parts is None else {column: np.frombuffer(part, "<u8") for column, part in parts.items()}

    @functools.cached_property
    def _read(self) -> dict[str, np.ndarray]:
        """By the shards, in the order of their rows; empty where they lack the column."""
        keys: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[self.split.kind]}
        self._counts: dict[str, dict[Path, int]] = {column: defaultdict(int) for column in keys}  # ids of each shard
        for path, batch in self.split.batches():
            for column, found in keys.items():
                ids = ids_of_batch(batch, column, column in self._numbered)[1]
                found += ids
                self._counts[column][path] += len(ids)
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


def _rows_with(batch: pa.RecordBatch, column: str, keys: set[bytes]) -> Iterator[pa.RecordBatch]:
    """The rows of a batch with one of these keys, a batch each; found by halves, as there are few.

    Whoever takes a row may remove from ``keys`` what it wants no more of.
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
    """The pairs of ``parts``, each distinct and rising, in which an element stands in both; at most ``_PAIRS``."""
    keys, owners = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    found: set[int] = set()
    for apart in range(1, len(parts)):
        same = np.flatnonzero(keys[apart:] == keys[:-apart])
        if not len(same) or len(found) >= _PAIRS:
            break
        found.update(distinct(owners[same] * len(parts) + owners[same + apart]).tolist())
    return [divmod(pair, len(parts)) for pair in sorted(found)[:_PAIRS]]


def _common(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What stands in both of two rising arrays: of one much smaller than the other in less time than intersect1d."""
    small, large = sorted((some, others), key=len)
    places = np.minimum(np.searchsorted(large, small), len(large) - 1)  # beyond the last one: which is not equal, then
    return small[large[places] == small]


def _named(column: str, found: Found) -> str:
    ids = dict.fromkeys(value.decode("utf-8", "replace") for _, value, _ in found)
    return f"such as {column} {', '.join(list(ids)[:_NAMED])}"
