"""Which split a word means; the files of a folder, and the records of a raw set, that are of one split."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from preprocessing.errors import DataError
from preprocessing.formats.annotations import BadRecord
from preprocessing.formats.line_records import BadLine
from preprocessing.json_text import json_excerpt
from preprocessing.sources.source import Source

_SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_FIELD = "split"  # the field or column in which records name theirs
_WORD = re.compile(rf"(?:^|[-_./])({'|'.join(_SPLITS)})(?=[-_./]|\d|$)", re.IGNORECASE)


def split_named(word: str) -> str | None:
    """The split that a word means, such as Validation or train2014; restval is of train, as Karpathy's is used."""
    return _SPLITS.get(word.strip().lower().rstrip("0123456789"))


def names_of_split(folder: str, names: Sequence[str], split: str) -> list[str]:
    """Of the files or folders `names` in `folder`, those of the split, where their names tell two splits apart.

    Where they do not, all: a set of one split may be called anything. Says on stdout what it chose. Raises DataError
    when none is of the split, and when there is one whose name says nothing beside others whose names do.
    """
    said = {name: {_SPLITS[word.lower()] for word in _WORD.findall(name)} for name in names}
    splits = sorted({split for found in said.values() for split in found})
    if len(splits) < 2 and (all(said.values()) or not any(said.values())):
        return list(names)
    unclear = next((name for name, found in said.items() if len(found) != 1), None)
    if unclear is not None:
        raise DataError(
            f"{folder}: holds {', '.join(splits)} by the names of its files, but {unclear} could be of any; "
            "call it by its split, or move it away"
        )
    chosen = [name for name, found in said.items() if found == {split}]
    if not chosen:
        raise DataError(f"{folder}: holds {', '.join(splits)} by the names of its files, not {split}; give another")
    print(f"{folder}: {len(chosen)} of {len(names)} files or folders are of split {split} by their names")
    return chosen


def split_field(names: Collection[str]) -> str | None:
    """Which of these fields or columns names splits: `split`, in any case."""
    return SPLIT_FIELD if SPLIT_FIELD in names else next((name for name in names if name.lower() == SPLIT_FIELD), None)


def split_of(record: Mapping[str, Any]) -> Any:
    """What a record of a raw set names as its split; None for nothing."""
    name = split_field(record.keys())
    return None if name is None else record[name]


class RecordSplits:
    """Records of a raw set that name their split themselves: those of another one are no rows, whatever --split says.

    Where no record names one, all are of the wanted split.

    Attributes:
        named: records that name a split, by split.
        unnamed: records before the first of these.
    """

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self.named = Counter[str]()
        self.unnamed = 0
        self._first = ""  # where the first of those is

    def skip(self, name: object, where: str = "") -> bool:
        """Count a record that names `name` as its split (None or "": nothing). Returns whether it is of another split.

        Raises BadLine where it names none, and those before it do, or what is no split.
        """
        if name is None or (isinstance(name, str) and not name.strip()):
            if self.named:
                raise BadLine("names no split, as others do; mend the file", "record names no split, others do")
            self.unnamed += 1
            self._first = self._first or where
            return False
        split = split_named(name) if isinstance(name, str) else None
        if split is None:
            raise BadLine(
                f"its {SPLIT_FIELD} is {json_excerpt(name)}, none of train, restval, val, dev and test; mend the file, "
                "or call the field otherwise if it means something else",
                f"{SPLIT_FIELD} of the record is none",
            )
        self.named[split] += 1
        return split != self._wanted

    def skip_at(self, where: str, name: object) -> bool:
        """`skip`; raises BadRecord in place of BadLine."""
        try:
            return self.skip(name, where)
        except BadLine as error:
            raise BadRecord(where, str(error), error.reason) from None

    def tell(self, source: Source, where: str = "") -> None:
        """Note in `source` which records are of the split, once all are read; `where` is what holds them.

        Raises DataError when none is, or when the first ones name no split and later ones do.
        """
        where = where or source.where
        total, chosen = self.named.total(), self.named[self._wanted]
        if total and self.unnamed:
            raise DataError(
                f"{self._first or where}: names no split, as {total} records behind it do; mend it, or take it out"
            )
        others = ", ".join(f"{count} of {name}" for name, count in sorted(self.named.items()) if name != self._wanted)
        if others and not chosen:
            raise DataError(
                f"{where}: holds no record of split {self._wanted} by their {SPLIT_FIELD}, but {others}; give another"
            )
        if others:
            source.notes.append(
                f"{where}: {chosen} records are of {self._wanted} by their {SPLIT_FIELD}, passed over are {others}"
            )
