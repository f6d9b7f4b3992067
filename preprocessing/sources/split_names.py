"""Names of splits: which split a word means, and which files and records of a raw data set are of one split."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord
from preprocessing.local_files import json_excerpt
from preprocessing.sources.source import Source

_SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_FIELD = "split"  # the field or column in which records name their split
_WORD = re.compile(rf"(?:^|[-_./])({'|'.join(_SPLITS)})(?=[-_./]|\d|$)", re.IGNORECASE)


def split_named(word: str) -> str | None:
    """The split that a word means, such as Validation or train2014; restval is of train, as Karpathy's is used."""
    return _SPLITS.get(word.strip().lower().rstrip("0123456789"))


def names_of_split(folder: str, names: Sequence[str], split: str) -> list[str]:
    """The files or folders `names` in `folder` that are of `split`, where their names name two splits or more.

    Otherwise all of them: a data set of one split may have any name. Prints the choice. Raises UserError when none is
    of the split, and when some names contain a split and others do not.
    """
    said = {name: {_SPLITS[word.lower()] for word in _WORD.findall(name)} for name in names}
    splits = sorted({split for found in said.values() for split in found})
    if len(splits) < 2 and (all(said.values()) or not any(said.values())):
        return list(names)
    unclear = next((name for name, found in said.items() if len(found) != 1), None)
    if unclear is not None:
        raise UserError(
            f"{folder}: holds {', '.join(splits)} by the names of its files, but {unclear} could be of any; "
            "call it by its split, or move it away"
        )
    chosen = [name for name, found in said.items() if found == {split}]
    if not chosen:
        raise UserError(f"{folder}: holds {', '.join(splits)} by the names of its files, not {split}; give another")
    print(f"{folder}: {len(chosen)} of {len(names)} files or folders are of split {split} by their names")
    return chosen


def split_field(names: Collection[str]) -> str | None:
    """The one of these fields or columns that names splits: `split`, in any case; None if there is none."""
    return SPLIT_FIELD if SPLIT_FIELD in names else next((name for name in names if name.lower() == SPLIT_FIELD), None)


def split_of(record: Mapping[str, Any]) -> Any:
    """The value of a record's split field; None where it has none."""
    name = split_field(record.keys())
    return None if name is None else record[name]


class RecordSplits:
    """Filters records that name their own split: those of another split do not become rows.

    If no record names a split, all are of the wanted one.

    Attributes:
        named: number of records that name a split, by split.
        unnamed: number of records before the first of these.
    """

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self.named = Counter[str]()
        self.unnamed = 0
        self._first = ""  # where the first unnamed record is

    def is_other_split(self, where: str, name: object) -> bool:
        """Count the record at `where`, whose split field is `name` (None or "": none). Whether it is of another split.

        Raises BadRecord when `name` is no split, and when it is missing although earlier records have one.
        """
        if name is None or (isinstance(name, str) and not name.strip()):
            if self.named:
                raise BadRecord(where, "names no split, as others do; fix the file", "record names no split, others do")
            self.unnamed += 1
            self._first = self._first or where
            return False
        split = split_named(name) if isinstance(name, str) else None
        if split is None:
            raise BadRecord(
                where,
                f"its {SPLIT_FIELD} is {json_excerpt(name)}, none of train, restval, val, dev and test; fix the file, "
                "or call the field otherwise if it means something else",
                f"{SPLIT_FIELD} of the record is none",
            )
        self.named[split] += 1
        return split != self._wanted

    def report(self, source: Source, where: str = "") -> None:
        """Add a note to `source` on the records of other splits, once all are read; `where` is the file or folder.

        Raises UserError when no record is of the wanted split, and when only later records name a split.
        """
        where = where or source.where
        total, chosen = self.named.total(), self.named[self._wanted]
        if total and self.unnamed:
            raise UserError(
                f"{self._first or where}: names no split, as {total} records behind it do; fix it, or take it out"
            )
        others = ", ".join(f"{count} of {name}" for name, count in sorted(self.named.items()) if name != self._wanted)
        if others and not chosen:
            raise UserError(
                f"{where}: holds no record of split {self._wanted} by their {SPLIT_FIELD}, but {others}; give another"
            )
        if others:
            source.notes.append(
                f"{where}: {chosen} records are of {self._wanted} by their {SPLIT_FIELD}, skipped: {others}"
            )
