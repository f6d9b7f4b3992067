"""Which split a word means; the files of a folder, and the records of a raw set, that are of one split."""

import re
from collections import Counter
from collections.abc import Sequence

from preprocessing.files import BadRecord
from preprocessing.json_text import shown, whole_characters
from preprocessing.line_records import BadLine
from preprocessing.schema import DataError
from preprocessing.source import Source

_SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT = "split"  # the field or column in which records name theirs
_SHOWN = 5
_NAMES, _LONGEST = 100, 40  # names that are counted apart, and characters of one
_WORD = re.compile(rf"(?:^|[-_./])({'|'.join(_SPLITS)})(?=[-_./]|\d|$)", re.IGNORECASE)


def split_named(word: str) -> str | None:
    """The split that a word means; restval is of train, as Karpathy's splits are used."""
    return _SPLITS.get(word.strip().lower())


def of_split(folder: str, names: Sequence[str], split: str) -> list[str]:
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


class RecordSplits:
    """Records of a raw set that name their split themselves: those of another one are no rows, whatever --split says.

    Where no record names one, all are of the wanted split.
    """

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self._named = Counter[str]()
        self._unnamed = 0  # before the first that names one

    def is_other(self, name: object) -> bool:
        """Whether a record with `name` for its split (None or "": it has none) is of another split.

        Raises BadLine where it has none, and those before it have.
        """
        if name is None or name == "":
            if self._named:
                raise BadLine("names no split, as others do; mend the file", "record names no split, others do")
            self._unnamed += 1
            return False
        text = name if isinstance(name, str) else shown(name)
        key = text[:_LONGEST]
        self._named[key if key in self._named or len(self._named) < _NAMES else "…"] += 1
        return split_named(text) != self._wanted

    def is_other_at(self, where: str, name: object) -> bool:
        """`is_other`; raises BadRecord in place of BadLine."""
        try:
            return self.is_other(name)
        except BadLine as error:
            raise BadRecord(where, str(error), error.reason) from None

    def tell(self, source: Source, where: str = "") -> None:
        """Note in `source` which records are of the split, once all are read; `where` is what holds them.

        Raises DataError when none is, or when the first ones name no split and later ones do.
        """
        where = where or source.where
        total = self._named.total()
        if total and self._unnamed:
            raise DataError(f"{where}: {self._unnamed} records name no split, {total} after them do; mend the file")
        chosen = sum(count for name, count in self._named.items() if split_named(name) == self._wanted)
        if chosen == total:
            return
        names = (f"{name} ({count})" for name, count in self._named.most_common(_SHOWN))
        said = whole_characters(", ".join(names))
        if not chosen:
            raise DataError(
                f"{where}: no record's {SPLIT} says {self._wanted}, but {said}; give another --split, or a file of "
                "that one"
            )
        source.notes.append(
            f"{where}: {chosen} of {total} records are of split {self._wanted} by their {SPLIT}: {said}"
        )
