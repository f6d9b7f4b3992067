"""`python -m preprocessing verify DIR`: is a prepared data set whole, and is every row usable?"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocessing.answers import read_answer_list
from preprocessing.images import PILLOW_PIXELS, BadImage, decode_image
from preprocessing.reading import open_shard, read_rows, split_folders
from preprocessing.schema import ANSWER_LIST, IMAGE_COLUMNS, KINDS, SAMPLE_COLUMN, DataError, read_manifest
from preprocessing.writer import file_sha256

_SHOWN = 20
_PER_SAMPLE = {  # list columns that run over the samples of a row, as long as SAMPLE_COLUMN's
    "caption": (),
    "vqa": ("answers", "answer_labels", "answer_scores", "question_id"),
    "nlvr": ("answers", "identifier"),
}
_ID_COLUMNS = {"caption": ("image_id",), "vqa": ("image_id", "question_id"), "nlvr": ("identifier",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `verify`."""
    parser.add_argument("directory", metavar="DIR", help="a data set folder, or one split of it")


def run(args: argparse.Namespace) -> int:
    """Print every fault, the first twenty in full. Returns 1 if there is one, else 0. DataError: nothing to verify."""
    count = 0
    folders = split_folders(Path(args.directory))
    for folder in folders:
        for fault in find_faults(folder):
            count += 1
            if count <= _SHOWN:
                print(fault, file=sys.stderr)
    if count > _SHOWN:
        print(f"and {count - _SHOWN} faults more", file=sys.stderr)
    if not count:
        names = ", ".join(folder.name for folder in folders)
        print(f"{args.directory}: no fault in {names}")
    return 1 if count else 0


def find_faults(folder: Path) -> Iterator[str]:
    """Each fault of a split folder as one line that names the shard, and the row where one is to blame."""
    try:
        manifest = read_manifest(folder)
        checker = _RowChecker(manifest, folder)
    except DataError as error:
        yield str(error)
        return
    listed = {shard["file"] for shard in manifest["shards"]}
    for path in sorted(folder.glob("*.arrow")):
        if path.name not in listed:
            yield f"{path}: is not in the manifest"
    for total in ("rows", "samples"):
        if manifest[total] != sum(shard[total] for shard in manifest["shards"]):
            yield f"{folder}: the manifest's {total} are not the sum of its shards' {total}"
    for shard in manifest["shards"]:
        yield from _shard_faults(folder / shard["file"], shard, checker)


def _shard_faults(path: Path, shard: dict[str, Any], checker: "_RowChecker") -> Iterator[str]:
    if not path.exists():
        yield f"{path}: is missing"
        return
    if path.stat().st_size != shard["bytes"]:
        yield f"{path}: has {path.stat().st_size} bytes, the manifest says {shard['bytes']}"
    elif file_sha256(path) != shard["sha256"]:
        yield f"{path}: its SHA-256 is not the manifest's, its bytes have changed"
    rows = samples = 0
    try:
        if not open_shard(path).schema.equals(checker.schema):
            yield f"{path}: its columns are not those of kind {checker.kind}"
            return
        for row in read_rows(path):
            for fault in checker.faults(row, f"{path} row {rows}"):
                yield f"{path} row {rows}: {fault}"
            rows += 1
            samples += len(row[SAMPLE_COLUMN[checker.kind]] or ())
    except DataError as error:
        yield str(error)
        return
    for name, found in (("rows", rows), ("samples", samples)):
        if found != shard[name]:
            yield f"{path}: has {found} {name}, the manifest says {shard[name]}"


class _RowChecker:
    """Checks rows one by one, and that no id stands in two of them."""

    def __init__(self, manifest: dict[str, Any], folder: Path) -> None:
        self.kind: str = manifest["kind"]
        self.schema = KINDS[self.kind]
        self._split = manifest["split"]
        self._answers = read_answer_list(folder.parent / ANSWER_LIST) if self.kind == "vqa" else []
        self._seen: dict[str, dict[Any, str]] = {column: {} for column in _ID_COLUMNS[self.kind]}

    def faults(self, row: dict[str, Any], where: str) -> Iterator[str]:
        """What is wrong with `row`, which messages about other rows call `where`."""
        empty = [name for name, value in row.items() if value is None]
        if empty:
            yield f"column {empty[0]} is null"
            return
        for column in IMAGE_COLUMNS[self.kind]:
            try:
                decode_image(row[column], PILLOW_PIXELS)
            except BadImage as error:
                yield f"{column} {error}"
        if row["split"] != self._split:
            yield f"split is {row['split']!r}, the manifest says {self._split!r}"
        texts = row[SAMPLE_COLUMN[self.kind]]
        if not texts or not all(texts):
            yield f"{SAMPLE_COLUMN[self.kind]} is empty, or a text in it is"
        uneven = [name for name in _PER_SAMPLE[self.kind] if len(row[name]) != len(texts)]
        if uneven:
            yield f"{uneven[0]} has {len(row[uneven[0]])} entries for {len(texts)} questions"
            return
        yield from self._id_faults(row, where)
        if self.kind == "vqa":
            for index in range(len(texts)):
                yield from self._answer_faults(row, index)
        if self.kind == "nlvr" and not set(row["answers"]) <= {"True", "False"}:
            yield "answers holds something that is neither True nor False"

    def _id_faults(self, row: dict[str, Any], where: str) -> Iterator[str]:
        for column, seen in self._seen.items():
            for value in row[column] if isinstance(row[column], list) else [row[column]]:
                first = seen.setdefault(value, where)
                if first != where:
                    yield f"{column} {value} stands in {first} too"

    def _answer_faults(self, row: dict[str, Any], index: int) -> Iterator[str]:
        answers, labels, scores = (row[name][index] for name in ("answers", "answer_labels", "answer_scores"))
        if not len(answers) == len(labels) == len(scores):
            yield f"question {index}: answers, labels and scores differ in number"
            return
        for answer, label, score in zip(answers, labels, scores, strict=True):
            if not 0 <= label < len(self._answers):
                yield f"question {index}: label {label} is beyond the {len(self._answers)} answers of {ANSWER_LIST}"
            elif self._answers[label] != answer:
                yield f"question {index}: label {label} is {self._answers[label]!r} in {ANSWER_LIST}, here {answer!r}"
            if not 0 < score <= 1:
                yield f"question {index}: score {score:g} of {answer!r} is not in 0..1"
