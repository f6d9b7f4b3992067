"""Which split a word means, and the files of a folder that are of one split by their names."""

import re
from collections.abc import Sequence

from preprocessing.schema import DataError

_SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
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
