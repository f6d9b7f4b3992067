"""What is trained on is not scored: a run compares the ids of its splits when it opens them.

What is compared are hashes of 64 bits: where two are equal, the ids are looked for and named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eve_ds.data.shards import Split
from preprocessing.schema import ID_COLUMNS, DataError, id_key

_THINGS = {"image_id": "images", "question_id": "questions", "identifier": "statements"}
_NAMED = 3  # ids that a message names


def overlap(training: Split, held_out: Split) -> str:
    """What stands in both splits, as the start of a message that names files and ids; "" where nothing does."""
    for column in ID_COLUMNS[training.kind] if training.kind == held_out.kind else ():
        both = np.intersect1d(_keys(training, column), _keys(held_out, column))
        if len(both):
            found = list(_find(held_out, column, both))
            own = next((path for path, _ in _find(training, column, _as_keys([value for _, value in found]))), None)
            return f"{own} and {found[0][0]}: {len(both)} {_THINGS[column]} stand in both, {_named(column, found)}"
    return ""


def check_once(split: Split) -> None:
    """Raise DataError where a question or a statement stands twice in a split: a score would count it twice."""
    for column in ID_COLUMNS[split.kind]:
        if column == "image_id":  # a caption or a question a row, as EVE's scripts write: an image may come again
            continue
        keys, counts = np.unique(_all_keys(split, column), return_counts=True)
        twice = keys[counts > 1]
        if len(twice):
            found = list(_find(split, column, twice))
            files = " and ".join(dict.fromkeys(str(path) for path, _ in found))
            raise DataError(
                f"{files}: {len(twice)} {_THINGS[column]} stand twice in this split, {_named(column, found)}; move one "
                "of the files away, or prepare the split again"
            )


def _named(column: str, found: list[tuple[Path, bytes]]) -> str:
    ids = dict.fromkeys(value.decode("utf-8", "replace") for _, value in found)
    return f"such as {column} {', '.join(list(ids)[:_NAMED])}"


def _keys(split: Split, column: str) -> np.ndarray:
    """[n] uint64, sorted: the distinct keys of a column of ids; none where the shards lack it."""
    return np.unique(_all_keys(split, column))


def _all_keys(split: Split, column: str) -> np.ndarray:
    parts = [_as_keys(_values(batch, column)) for _, batch in split.batches()]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _as_keys(values: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(map(id_key, values)), "<u8")


def _values(batch: pa.RecordBatch, column: str) -> list[bytes]:
    """The ids of a column, of list cells too, as text; those that are null are left away."""
    if column not in batch.schema.names:
        return []
    cells: Any = batch.column(column)
    while pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        cells = cells.flatten()
    text = cells if pa.types.is_binary(cells.type) else cells.cast(pa.large_string()).cast(pa.large_binary())
    return [value for value in text.to_pylist() if value is not None]


def _find(split: Split, column: str, keys: np.ndarray) -> Iterator[tuple[Path, bytes]]:
    """(shard, id) of the first rows with one of these keys: so many of each shard that a message can name them."""
    named: dict[Path, int] = defaultdict(int)
    for path, batch in split.batches():
        values = _values(batch, column)
        for place in np.flatnonzero(np.isin(_as_keys(values), keys)).tolist()[: _NAMED - named[path]]:
            named[path] += 1
            yield path, values[place]
