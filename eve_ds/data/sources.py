"""Where samples come from: a prepared split, Arrow files as ViLT and EVE write them, or several of these as one.

ViLT's `vilt/utils/write_*.py` and EVE's `data_utils/dataset_*.py` leave one folder of Arrow files for all splits and no
manifest: `coco_caption_karpathy_restval.arrow`, `nlvr2_dev.arrow`, `sbu_3.arrow`. They are taken as they are; there is
then no hash to check them by. A file belongs to the split that its name says, or to train where the name says none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from eve_ds.data.shards import OPEN_SHARDS, Row, Split, shard_kind
from preprocessing.schema import MANIFEST, DataError

# The first of these words in a file's name says its split; Karpathy's restval is what COCO trains on, too.
_SPLIT_WORDS = {
    "train": "train",
    "restval": "train",
    "trainable": "train",
    "val": "val",
    "dev": "val",
    "test": "test",
    "test1": "test",
}
_OURS = re.compile(r"shard-\d+\.arrow")


def open_split(
    root: str | os.PathLike[str], split: str, kind: str | None = None, open_shards: int = OPEN_SHARDS
) -> Split:
    """A split of a data set: `root/split` with its manifest, or Arrow files without one in there or in `root`.

    Files that bear our converters' names are never taken without their manifest: they may be the rest of a run that
    was killed.

    Args:
        root: the data set's folder.
        split: train, val, test or another split's name.
        kind: of files without a manifest, take those that hold this kind of data alone: ViLT keeps all in one folder.
        open_shards: so many stay mapped.
    Raises:
        DataError: there is no such split, or it is broken (see Split).
    """
    folder = Path(root) / split
    if (folder / MANIFEST).is_file():
        return Split(folder, open_shards=open_shards)
    inside = folder.is_dir()
    files = _natural(folder.glob("*.arrow") if inside else Path(root).glob("*.arrow"))
    if not inside:
        files = [path for path in files if _is_of(path.stem, split)]
    if not files or any(_OURS.fullmatch(path.name) for path in files):
        return Split(folder, open_shards=open_shards)  # which says what is missing
    files = [path for path in files if kind is None or shard_kind(path) == kind] or files
    return Split(folder if inside else root, files, open_shards)


def _natural(paths: Iterable[Path]) -> list[Path]:
    """By name, numbers in it by their value: sbu_2 before sbu_10."""

    def parts(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(paths, key=parts)


def _is_of(stem: str, split: str) -> bool:
    words = stem.split("_")
    first = next((word for word in words if word == split or word in _SPLIT_WORDS), None)
    if first is None:
        return split == "train" and not any(word.split("-")[0] in _SPLIT_WORDS for word in words)  # test-dev
    return split in (first, _SPLIT_WORDS.get(first))


@functools.lru_cache(maxsize=4)
def answers_in_shards(root: Path) -> list[str]:
    """The answers that Arrow files in `root` without a manifest name, by label; [] where there are no such files.

    A label that no question has gets a name that no answer can have.
    """
    answers: dict[int, str] = {}
    for path in _natural(root.glob("*.arrow")):
        if shard_kind(path) == "vqa":
            for question in Split(root, [path]).answers():
                answers.update(question)
    return [answers.get(label, f"<{label}>") for label in range(max(answers, default=-1) + 1)]


class JoinedSplit:
    """Several splits of one kind as one: the rows and samples of the first, then those of the second, and so on.

    Args:
        splits: at least one.
    Attributes: as Split's; `parts` tells the sources apart.
    Raises:
        DataError: they are of different kinds.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = list(splits)
        self.kind = self.splits[0].kind
        for other in self.splits[1:]:
            if other.kind != self.kind:
                raise DataError(f"{other.name}: holds {other.kind} data, {self.splits[0].name} {self.kind} data")
        self.name = " + ".join(split.name for split in self.splits)
        self._first_row = np.cumsum([0] + [split.rows for split in self.splits])
        self._first_sample = np.cumsum([0] + [split.samples for split in self.splits])
        self.rows = int(self._first_row[-1])
        self.samples = int(self._first_sample[-1])

    @property
    def parts(self) -> list[tuple[str, int]]:
        return [(split.name, split.samples) for split in self.splits]

    @property
    def fingerprint(self) -> str:
        """As Split's."""
        return hashlib.sha256(json.dumps([split.fingerprint for split in self.splits]).encode()).hexdigest()

    def row(self, index: int) -> Row:
        """As Split.row."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        source = self._source(self._first_row, index)
        return self.splits[source].row(index - int(self._first_row[source]))

    def sample(self, index: int) -> tuple[int, Row, int]:
        """As Split.sample."""
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        source = self._source(self._first_sample, index)
        number, row, item = self.splits[source].sample(index - int(self._first_sample[source]))
        return int(self._first_row[source]) + number, row, item

    def sample_rows(self) -> np.ndarray:
        """As Split.sample_rows."""
        pairs = zip(self._first_row, self.splits, strict=False)
        return np.concatenate([first + split.sample_rows() for first, split in pairs])

    def read_ahead(self, samples: Iterable[int]) -> None:
        """As Split.read_ahead."""
        ordered = np.fromiter(samples, dtype=np.int64)
        for source, split in enumerate(self.splits):
            low, high = np.searchsorted(ordered, self._first_sample[source : source + 2])
            split.read_ahead((ordered[low:high] - self._first_sample[source]).tolist())

    @staticmethod
    def _source(starts: np.ndarray, index: int) -> int:
        return int(np.searchsorted(starts, index, side="right")) - 1


AnySplit = Split | JoinedSplit
