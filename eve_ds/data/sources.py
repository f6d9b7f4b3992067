"""Where samples come from: a prepared split, Arrow files as ViLT and EVE write them, or several of these as one.

ViLT's `vilt/utils/write_*.py` and EVE's `data_utils/dataset_*.py` leave one folder of Arrow files for all splits and no
manifest: `coco_caption_karpathy_restval.arrow`, `nlvr2_dev.arrow`, `sbu_3.arrow`. They are taken as they are; there is
then no hash to check them by. A file belongs to the split that its name says, or to train where the name says none;
where the rows of such a file say another one, its name may be mistyped, and it is refused.

Of ViLT's questions `vqav2_val` is the whole of val2014, and `trainable_val` and `rest_val` are its two parts: train is
train and trainable_val, val is rest_val where there is one. `nlvr2_balanced_dev`, `unbalanced_dev` and their like
repeat pairs of dev and test1: they are read by their own names alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from eve_ds.data.shards import OPEN_SHARDS, Row, Shard, Split, shard_kind, split_inside
from preprocessing.errors import DataError
from preprocessing.shards.schema import MANIFEST

# The first of these words in a file's name says its split, together with a word of _PARTS before it. Of these splits
# a run's train, val and test are made: Karpathy's restval is what COCO trains on, too.
_MEANING = {
    "train": "train",
    "restval": "train",
    "trainable_val": "train",
    "val": "val",
    "rest_val": "val",
    "dev": "val",
    "test": "test",
    "test1": "test",
}
_SPLIT_WORDS = ("train", "restval", "val", "dev", "test", "test1")
_PARTS = ("trainable", "rest", "balanced", "unbalanced")
_NAMED = 12  # of a folder's files in a message
_OURS = re.compile(r"shard-\d+\.arrow")


def open_split(
    root: str | os.PathLike[str], split: str, kind: str | None = None, open_shards: int = OPEN_SHARDS
) -> Split:
    """A split of a data set: `root/split` with its manifest, or Arrow files without one in there or in `root`.

    Files that bear our converters' names are never taken without their manifest: they may be the rest of a run that
    was killed.

    Args:
        root: the data set's folder.
        split: train, val, test or another split's name; of files without a manifest also a file's, without its ending.
        kind: of files without a manifest, take those that hold this kind of data alone: ViLT keeps all in one folder.
        open_shards: so many stay mapped.
    Raises:
        DataError: there is no such split, or it is broken (see Split).
    """
    folder = Path(root) / split
    if (folder / MANIFEST).is_file():
        return Split(folder, open_shards=open_shards)
    inside = folder.is_dir()
    there = _natural(folder.glob("*.arrow") if inside else Path(root).glob("*.arrow"))
    files = there if inside else _files_of(there, split)
    if there and not files and not any(_OURS.fullmatch(path.name) for path in there):
        raise DataError(
            f"{folder / MANIFEST}: no such file, and no Arrow file in {root} is of split {split}: it holds "
            f"{_listed(path.name for path in there)}; to read one of these, give its name without .arrow as the split"
        )
    if not files or any(_OURS.fullmatch(path.name) for path in files):
        if hint := _where_it_is(Path(root), split):
            raise DataError(f"{folder / MANIFEST}: no such file; {hint}")
        return Split(folder, open_shards=open_shards)  # which says what is missing
    files = [path for path in files if kind is None or shard_kind(path) == kind] or files
    if split == "train" and not inside:
        _check_untold(files)
    return Split(folder if inside else root, files, open_shards)


def _where_it_is(root: Path, split: str) -> str:
    """What to give in the place of a folder without that split: its parent, a folder below it, another split; or ""."""
    for place, what in ((root, "is one split"), (root.parent, "is a file of a split")):
        if (place / MANIFEST).is_file() and (place == root or root.is_file()):
            home = place.parent if place.name else place.resolve().parent
            return f"{root} {what}; give the folder of the data set, {home}"
    if root.is_file():
        return f"{root} is a file; give its folder, {root.parent}" if root.suffix == ".arrow" else f"{root} is a file"
    if not root.is_dir():
        return f"there is no folder {root}"
    if splits := sorted(manifest.parent.name for manifest in root.glob(f"*/{MANIFEST}")):
        return f"{root} holds no split {split} but {_listed(splits)}; name one of these, or run a converter for {split}"
    if below := sorted({manifest.parent.parent for manifest in root.glob(f"*/*/{MANIFEST}")}):
        return f"{root} is no data set; did you mean {_listed(map(str, below))}?"
    return ""


def _natural(paths: Iterable[Path]) -> list[Path]:
    """By name, numbers in it by their value: sbu_2 before sbu_10."""

    def parts(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(paths, key=parts)


def _files_of(files: Sequence[Path], split: str) -> list[Path]:
    """Those whose names say that they belong to the split."""
    named = [(path, *_data_and_split(path.stem)) for path in files]
    parted = {data for _, data, name in named if name == "rest_val"}
    return [
        path
        for path, data, name in named
        if split in (name, path.stem) or _MEANING.get(name) == split or _is_word(split, path.stem)
        if not (split == name == "val" and data in parted and path.stem != split)  # it holds the trainable part as well
    ]


def _data_and_split(stem: str) -> tuple[str, str]:
    """What a file's name says of its data set and of its split: coco_caption_karpathy and restval, vqav2 and rest_val.

    The split is train where no word says one, and none of ours where it is a variant, such as test-dev.
    """
    words = stem.split("_")
    at = next((i for i, word in enumerate(words) if word.split("-")[0] in _SPLIT_WORDS), None)
    if at is None:
        return stem, "train"
    start = at - 1 if at and words[at - 1] in _PARTS else at
    return "_".join(words[:start]), "_".join(words[start : at + 1])


def _check_untold(files: Sequence[Path]) -> None:
    """Raise DataError where a name says no split, so that it would be trained on, but its rows are of another one."""
    for path in files:
        told = split_inside(path) if _data_and_split(path.stem)[0] == path.stem else None
        if _MEANING.get(told or "train", "train") != "train":
            raise DataError(
                f"{path}: its name says no split, so it would be trained on, but its rows are of split {told}; call it "
                f"{path.stem}_{told}.arrow, or move it away"
            )


def _is_word(split: str, stem: str) -> bool:
    """Whether a split that is none of the usual ones, such as minival, stands in a file's name."""
    return split not in _MEANING and split in stem.split("_")


def _listed(names: Iterable[str]) -> str:
    """The first few of many names."""
    first = list(itertools.islice(names, _NAMED + 1))
    return ", ".join(first[:_NAMED]) + (", …" if len(first) > _NAMED else "")


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

    @property
    def hashed_shards(self) -> list[Shard]:
        """As Split's."""
        return [shard for split in self.splits for shard in split.hashed_shards]

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
