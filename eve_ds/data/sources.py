"""Open splits: a prepared split, Arrow files as ViLT and EVE write them, or several splits joined into one.

ViLT's ``vilt/utils/write_*.py`` and EVE's ``data_utils/dataset_*.py`` write one folder of Arrow files for all splits,
without a manifest: ``coco_caption_karpathy_restval.arrow``, ``nlvr2_dev.arrow``, ``sbu_3.arrow``. These are read as
they are, without hashes to check them. A file belongs to the split in its name, or to train if the name has none. If
the rows of such a file name another split, its name may be mistyped, and it is refused.

For VQA, ViLT's ``vqav2_val`` is the whole of val2014, and ``trainable_val`` and ``rest_val`` are its two parts: train
consists of train and trainable_val, and val is rest_val if there is one. ``nlvr2_balanced_dev``, ``unbalanced_dev`` and
similar files repeat pairs of dev and test1: they are read only if a split has exactly that name.
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

from eve_ds.data.shards import OPEN_SHARDS, Row, Shard, Split, first_row_split, shard_kind
from preprocessing.errors import UserError
from preprocessing.shards.schema import MANIFEST

# Split in a file's name -> split of a run. The name of a split is the first of _SPLIT_WORDS in the file's name,
# together with a word of _PARTS before it. Karpathy's restval belongs to the training data of COCO.
_RUN_SPLIT = {
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
_MAX_NAMES = 12  # in a message
_OURS = re.compile(r"shard-\d+\.arrow")


def open_split(
    root: str | os.PathLike[str],
    split: str,
    kind: str | None = None,
    open_shards: int = OPEN_SHARDS,
    made_as: type[Split] = Split,
) -> Split:
    """Open a split of a dataset: ``root/split`` with its manifest, or Arrow files without one, there or in ``root``.

    Files named like those of our converters are never read without their manifest: they may be left over from a
    conversion that was killed.

    Args:
        root: folder of the dataset.
        split: train, val, test or another split. Without a manifest also the name of a file, without .arrow.
        kind: without a manifest, read only files of this kind: ViLT keeps all kinds in one folder.
        open_shards: maximum number of mapped shards.
        made_as: class of the result, one of modalities.py.
    Raises:
        UserError: there is no such split, or it is broken (see Split).
    """
    folder = Path(root) / split
    if (folder / MANIFEST).is_file():
        return made_as(folder, open_shards=open_shards)
    inside = folder.is_dir()
    found = _natural(folder.glob("*.arrow") if inside else Path(root).glob("*.arrow"))
    files = found if inside else _files_of(found, split)
    if found and not files and not any(_OURS.fullmatch(path.name) for path in found):
        raise UserError(
            f"{folder / MANIFEST}: no such file, and no Arrow file in {root} belongs to split {split}: it holds "
            f"{_listed(path.name for path in found)}; to read one of these, give its name without .arrow as the split"
        )
    if not files or any(_OURS.fullmatch(path.name) for path in files):
        if hint := _suggest_folder(Path(root), split):
            raise UserError(f"{folder / MANIFEST}: no such file; {hint}")
        return made_as(folder, open_shards=open_shards)  # raises the error for the missing manifest
    files = [path for path in files if kind is None or shard_kind(path) == kind] or files
    if split == "train" and not inside:
        _check_train_files(files)
    return made_as(folder if inside else root, files, open_shards)


def _suggest_folder(root: Path, split: str) -> str:
    """A hint for a folder without that split: name its parent, a folder below it, or another split; "" for none."""
    for place, what in ((root, "is one split"), (root.parent, "is a file of a split")):
        if (place / MANIFEST).is_file() and (place == root or root.is_file()):
            home = place.parent if place.name else place.resolve().parent
            return f"{root} {what}; give the folder of the dataset, {home}"
    if root.is_file():
        return f"{root} is a file; give its folder, {root.parent}" if root.suffix == ".arrow" else f"{root} is a file"
    if not root.is_dir():
        return f"there is no folder {root}"
    if splits := sorted(manifest.parent.name for manifest in root.glob(f"*/{MANIFEST}")):
        return f"{root} holds no split {split} but {_listed(splits)}; name one of these, or run a converter for {split}"
    if below := sorted({manifest.parent.parent for manifest in root.glob(f"*/*/{MANIFEST}")}):
        return f"{root} is not a dataset; did you mean {_listed(map(str, below))}?"
    return ""


def _natural(paths: Iterable[Path]) -> list[Path]:
    """Sort by name, with numbers by value: sbu_2 before sbu_10."""

    def parts(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(paths, key=parts)


def _files_of(files: Sequence[Path], split: str) -> list[Path]:
    """The files that belong to the split by their names."""
    named = [(path, *_data_and_split(path.stem)) for path in files]
    parted = {data for _, data, name in named if name == "rest_val"}
    return [
        path
        for path, data, name in named
        if split in (name, path.stem) or _RUN_SPLIT.get(name) == split or _is_word(split, path.stem)
        if not (split == name == "val" and data in parted and path.stem != split)  # it contains the trainable part, too
    ]


def _data_and_split(stem: str) -> tuple[str, str]:
    """(dataset, split) in a file's name, such as (coco_caption_karpathy, restval) or (vqav2, rest_val).

    The split is train if no word names one; a variant, such as test-dev, is a split of its own.
    """
    words = stem.split("_")
    at = next((i for i, word in enumerate(words) if word.split("-")[0] in _SPLIT_WORDS), None)
    if at is None:
        return stem, "train"
    start = at - 1 if at and words[at - 1] in _PARTS else at
    return "_".join(words[:start]), "_".join(words[start : at + 1])


def _check_train_files(files: Sequence[Path]) -> None:
    """Raise UserError for a file without a split in its name, so in train, whose rows name another split."""
    for path in files:
        stored = first_row_split(path) if _data_and_split(path.stem)[0] == path.stem else None
        if _RUN_SPLIT.get(stored or "train", "train") != "train":
            raise UserError(
                f"{path}: its name has no split, so it would be trained on, but its rows are of split {stored}; rename "
                f"it to {path.stem}_{stored}.arrow, or move it away"
            )


def _is_word(split: str, stem: str) -> bool:
    """Whether a split other than the usual ones, such as minival, is a word of a file's name."""
    return split not in _RUN_SPLIT and split in stem.split("_")


def _listed(names: Iterable[str]) -> str:
    """The first names, separated by commas."""
    first = list(itertools.islice(names, _MAX_NAMES + 1))
    return ", ".join(first[:_MAX_NAMES]) + (", …" if len(first) > _MAX_NAMES else "")


@functools.lru_cache(maxsize=4)
def answers_in_shards(root: Path) -> list[str]:
    """The answers in the Arrow files of ``root`` without a manifest, in label order; [] without such files.

    A label that no question uses gets a placeholder, "<label>", that is not a possible answer.
    """
    answers: dict[int, str] = {}
    for path in _natural(root.glob("*.arrow")):
        if shard_kind(path) == "vqa":
            for question in Split(root, [path]).answers():
                answers.update(question)
    return [answers.get(label, f"<{label}>") for label in range(max(answers, default=-1) + 1)]


class JoinedSplit:
    """Concatenation of several splits of one kind: rows and samples of the first, then of the second, and so on.

    Args:
        splits: at least one.
    Attributes: as in Split; ``parts`` has an entry per source.
    Raises:
        UserError: they are of different kinds.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = list(splits)
        self.kind = self.splits[0].kind
        for other in self.splits[1:]:
            if other.kind != self.kind:
                raise UserError(f"{other.name}: holds {other.kind} data, {self.splits[0].name} {self.kind} data")
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
        """As in Split."""
        return hashlib.sha256(json.dumps([split.fingerprint for split in self.splits]).encode()).hexdigest()

    @property
    def hashed_shards(self) -> list[Shard]:
        """As in Split."""
        return [shard for split in self.splits for shard in split.hashed_shards]

    def row(self, index: int) -> Row:
        """As in Split."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        source = self._source(self._first_row, index)
        return self.splits[source].row(index - int(self._first_row[source]))

    def sample(self, index: int) -> tuple[int, Row, int]:
        """As in Split."""
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        source = self._source(self._first_sample, index)
        number, row, item = self.splits[source].sample(index - int(self._first_sample[source]))
        return int(self._first_row[source]) + number, row, item

    def sample_rows(self) -> np.ndarray:
        """As in Split."""
        pairs = zip(self._first_row, self.splits, strict=False)
        return np.concatenate([first + split.sample_rows() for first, split in pairs])

    def read_ahead(self, samples: Iterable[int]) -> None:
        """As in Split."""
        ordered = np.fromiter(samples, dtype=np.int64)
        for source, split in enumerate(self.splits):
            low, high = np.searchsorted(ordered, self._first_sample[source : source + 2])
            split.read_ahead((ordered[low:high] - self._first_sample[source]).tolist())

    @staticmethod
    def _source(starts: np.ndarray, index: int) -> int:
        return int(np.searchsorted(starts, index, side="right")) - 1


AnySplit = Split | JoinedSplit
