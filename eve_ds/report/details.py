"""Reads ``details_SPLIT.parquet``: the predictions of a split, one row each, which may be of a user's own task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evaluation.common import InputError
from eve_ds.data.shards import Split

COLUMNS = ("sample", "prediction", "confidence", "score")
SEARCH = ("query", "rank")  # further ones of retrieval, where ``prediction`` is the number of an image or a text
QUERIES = ("text", "image")


class Details:
    """The predictions of a split.

    Args:
        path: of the file.
        kind: of the split's data.
    Attributes:
        confidence: [N] float64.
        score: [N] float64; NaN where the answer is not known.
        search: whether they are of retrieval.
        scored: fingerprint of the split.
    Raises:
        InputError: no such file, no Parquet file, or a column that is missing or holds something else.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        table = _read(path)
        self.scored = (table.schema.metadata or {}).get(b"data", b"").decode(errors="replace")
        names = set(table.column_names)
        if missing := [name for name in COLUMNS if name not in names]:
            raise InputError(f"{path}: has no column {missing[0]!r}; score the split again")
        self.search = kind == "caption" and names.issuperset(SEARCH)
        self._table = table.select([*COLUMNS, *(SEARCH if self.search else ())])
        whole = ["sample", *(("prediction", "rank") if self.search else ())]
        for name in whole:
            self._check(name, pa.types.is_integer, "whole numbers")
        self._check("confidence", _is_number, "numbers")
        self._check("score", lambda kind: _is_number(kind) or pa.types.is_null(kind), "numbers or nulls", null=True)
        self.confidence, self.score = (self._floats(name) for name in ("confidence", "score"))
        if (odd := np.flatnonzero(~np.isfinite(self.confidence))).size:
            self._refuse(int(odd[0]), "confidence")

    def row(self, place: int) -> dict[str, Any]:
        """One prediction: its columns COLUMNS, of retrieval also SEARCH."""
        return {name: self._table[name][place].as_py() for name in self._table.column_names}

    def check_split(self, split: Split) -> None:
        """Raise InputError for a row that names what the split does not have."""
        if not self.search:
            self._check_range("sample", slice(None), split.samples)
            return
        query = np.array(self._table["query"].to_pylist(), dtype=object)
        if (odd := np.flatnonzero(~np.isin(query, QUERIES))).size:
            self._refuse(int(odd[0]), "query")
        text = query == "text"
        for name, asks in (("sample", text), ("prediction", ~text)):
            self._check_range(name, np.flatnonzero(asks), split.samples)
            self._check_range(name, np.flatnonzero(~asks), split.rows)

    def _check(self, name: str, fits: Callable[[pa.DataType], bool], what: str, null: bool = False) -> None:
        column = self._table[name]
        if not fits(column.type):
            raise InputError(f"{self._path}: column {name!r} holds {column.type}, not {what}; score the split again")
        if not null and column.null_count:
            self._refuse(column.is_null().to_pylist().index(True), name)

    def _floats(self, name: str) -> NDArray[np.float64]:
        return np.array(self._table[name].to_pylist(), dtype=np.float64)  # None is NaN

    def _check_range(self, name: str, rows: slice | NDArray[np.intp], end: int) -> None:
        values = np.array(self._table[name].to_pylist(), dtype=object)
        places = np.arange(len(values))[rows]
        if (odd := np.flatnonzero([not 0 <= value < end for value in values[rows]])).size:
            self._refuse(int(places[odd[0]]), name, f", but the split has 0 to {end - 1}")

    def _refuse(self, row: int, name: str, more: str = "") -> NoReturn:
        value = self._table[name][row].as_py()
        raise InputError(f"{self._path}: row {row}: {name} is {value!r}{more}; score the split again")


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        found = [each.stem.removeprefix("details_") for each in sorted(path.parent.glob("details_*.parquet"))]
        have = (
            f"it has {', '.join(found)}; choose one with --split"
            if found
            else "score it again, with --evaluate (a task of one's own needs a method details)"
        )
        raise InputError(f"{path}: no such file; {have}")
    try:
        return pq.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        raise InputError(f"{path}: is no Parquet file that can be read; score the split again") from error


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))
