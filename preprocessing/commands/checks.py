"""The checks of shards and rows, for `verify` and `repair`."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocessing.images.decoding import BadImage, decode_image
from preprocessing.running.pool import run_tasks
from preprocessing.running.progress import Progress
from preprocessing.running.storage import StoragePath, file_sha256, names_in, open_input, size_of
from preprocessing.shards.ids import numbered_columns, read_ids
from preprocessing.shards.reader import batches_of
from preprocessing.shards.schema import (
    ANSWER_LIST,
    ANSWER_LIST_HASH,
    CODES,
    ID_COLUMNS,
    IDS,
    IMAGE_COLUMNS,
    KINDS,
    PILLOW_PIXELS,
    SAMPLE_COLUMN,
    CodeGrid,
    answers_sha256,
    distinct,
    id_key,
)
from preprocessing.text.answers import read_answer_list

_PER_SAMPLE = {  # list columns with an entry for each sample of a row, like SAMPLE_COLUMN
    "caption": (),
    "vqa": ("answers", "answer_labels", "answer_scores", "question_id"),
    "nlvr": ("answers", "identifier"),
}


@dataclass(frozen=True)
class SplitFacts:
    """What the rows of a split must conform to. Can be pickled."""

    kind: str
    split: str
    answers: Sequence[str] = ()  # VQA: the answers that labels index
    modality: str = "pairs"  # as the manifest has it


@dataclass
class ShardReport:
    """The faults of a shard. Row numbers count the readable rows, from 0."""

    path: StoragePath
    rows: int = 0
    samples: int = 0
    whole: bool = False  # the file exists and all of its record batches can be read
    faults: list[str] = field(default_factory=list)  # of the shard
    row_faults: dict[int, list[str]] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)  # rows with an id of an earlier row
    changed: bool = False  # the bytes differ from the manifest
    access_denied: bool = False  # the file exists, but cannot be read
    ids: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # column -> hashes, rows [n]
    grid: CodeGrid | None = None  # of its codes

    def lines(self) -> Iterator[str]:
        """Each fault as a line that names the shard and, if it is the fault of one, the row."""
        yield from (f"{self.path}: {fault}" for fault in self.faults)
        for row, faults in sorted(self.row_faults.items()):
            yield from (f"{self.path} row {row}: {fault}" for fault in faults)


def check_shard(path: StoragePath, record: dict[str, Any] | None, facts: SplitFacts) -> ShardReport:
    """Check one shard against its record in the manifest, and every row. Runs in a worker."""
    report = ShardReport(path)
    try:
        _compare_with_record(report, record)
    except FileNotFoundError:
        report.faults.append("is missing")
        return report
    except OSError as error:
        report.faults.append(f"cannot be read ({error.strerror}); make it a file that can be, or move it away")
        report.access_denied = True
        return report
    unreadable: list[str] = []
    keys: dict[str, list[bytes]] = {column: [] for column in ID_COLUMNS[facts.kind]}
    key_rows: dict[str, list[int]] = {column: [] for column in ID_COLUMNS[facts.kind]}
    for batch in batches_of(path, KINDS[facts.kind], unreadable):
        report.grid = CodeGrid.of(batch.schema)
        for row in batch.to_pylist():
            faults = list(row_faults(row, facts, report.grid))
            if faults:
                report.row_faults[report.rows] = faults
            for column, ids in ids_of(row, facts.kind):
                keys[column] += map(id_key, ids)
                key_rows[column] += [report.rows] * len(ids)
            report.rows += 1
            report.samples += len(row[SAMPLE_COLUMN[facts.kind]] or ())
    report.whole = not unreadable
    report.faults += unreadable
    for name, found in (("rows", report.rows), ("samples", report.samples)):
        if record is not None and report.whole and found != record[name]:
            report.faults.append(f"has {found} {name}, the manifest says {record[name]}")
    for column in keys:
        report.ids[column] = np.frombuffer(b"".join(keys[column]), "<u8"), np.array(key_rows[column], np.int64)
    return report


def _compare_with_record(report: ShardReport, record: dict[str, Any] | None) -> None:
    """Compare the size and hash of the file with its record. Raises OSError when the file cannot be read."""
    open_input(report.path).close()
    size = size_of(report.path)
    if record is not None and size != record["bytes"]:
        report.faults.append(f"has {size} bytes, the manifest says {record['bytes']}")
        report.changed = True
    elif record is not None and file_sha256(report.path) != record["sha256"]:
        report.faults.append("its SHA-256 is not the manifest's, its bytes have changed")
        report.changed = True


def row_faults(row: dict[str, Any], facts: SplitFacts, grid: CodeGrid | None = None) -> Iterator[str]:
    """The faults of a row, whose codes, if it has some, are of `grid`. Duplicate ids are not checked here."""
    kind = facts.kind
    empty = [name for name, value in row.items() if value is None]
    if empty:
        yield f"column {empty[0]} is null"
        return
    for column in IMAGE_COLUMNS[kind]:
        if facts.modality == "text":
            if row[column]:
                yield f"{column} is not empty, and the manifest says modality text"
            continue
        try:
            decode_image(row[column], PILLOW_PIXELS)
        except BadImage as error:
            yield f"{column} {error}"
    if grid is not None and (fault := grid.fault(row[CODES])):
        yield fault
    if row["split"] != facts.split:
        yield f"split is {row['split']!r}, the manifest says {facts.split!r}"
    lost = [name for name in ID_COLUMNS[kind] if isinstance(row[name], list) and None in row[name]]
    if lost:
        yield f"{lost[0]} holds a null"
    texts = row[SAMPLE_COLUMN[kind]]
    if facts.modality == "image":
        if texts:
            yield f"{SAMPLE_COLUMN[kind]} is not empty, and the manifest says modality image"
    elif not texts or not all(texts):
        yield f"{SAMPLE_COLUMN[kind]} is empty, or a text in it is"
    uneven = [name for name in _PER_SAMPLE[kind] if len(row[name]) != len(texts)]
    if uneven:
        yield f"{uneven[0]} has {len(row[uneven[0]])} entries for {len(texts)} questions"
        return
    if kind == "vqa":
        for index in range(len(texts)):
            yield from _answer_faults(row, index, facts.answers)
    if kind == "nlvr" and not set(row["answers"]) <= {"True", "False"}:
        yield "answers holds something that is neither True nor False"


def _answer_faults(row: dict[str, Any], index: int, listed: Sequence[str]) -> Iterator[str]:
    answers, labels, scores = (row[name][index] for name in ("answers", "answer_labels", "answer_scores"))
    if answers is None or labels is None or scores is None or not len(answers) == len(labels) == len(scores):
        yield f"question {index}: answers, labels and scores differ in number"
        return
    for answer, label, score in zip(answers, labels, scores, strict=True):
        if answer is None or label is None or score is None:
            yield f"question {index}: an answer, label or score is null"
        elif not 0 <= label < len(listed):
            yield f"question {index}: label {label} is beyond the {len(listed)} answers of {ANSWER_LIST}"
        elif listed[label] != answer:
            yield f"question {index}: label {label} is {listed[label]!r} in {ANSWER_LIST}, here {answer!r}"
        if score is not None and not 0 < score <= 1:
            yield f"question {index}: score {score:g} of {answer!r} is not in 0..1"


def ids_of(row: dict[str, Any], kind: str) -> Iterator[tuple[str, list[Any]]]:
    """(column, ids) of each id column, without nulls."""
    for column in ID_COLUMNS[kind]:
        value = row[column]
        ids = value if isinstance(value, list) else [value]
        yield column, [one for one in ids if one is not None]


def add_duplicates(reports: Sequence[ShardReport], kind: str) -> None:
    """Add a fault to `row_faults` for each row with an id that an earlier row, or the same row, has, too.

    Candidates are found by 64-bit keys, in 16 bytes of memory an id. The ids themselves are read for candidates only.
    """
    for column in ID_COLUMNS[kind] if reports else ():
        parts = [report.ids.get(column, (np.zeros(0, np.uint64), np.zeros(0, np.int64))) for report in reports]
        keys = np.concatenate([part[0] for part in parts])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        twice = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
        ends = np.cumsum([len(part[0]) for part in parts])
        rows = np.concatenate([part[1] for part in parts])[twice]
        shards = np.searchsorted(ends, twice, side="right")
        first: dict[Any, str] = {}
        for number in np.unique(shards):
            _note_duplicates(reports[number], kind, column, set(rows[shards == number].tolist()), first)


def _note_duplicates(report: ShardReport, kind: str, column: str, rows: set[int], first: dict[Any, str]) -> None:
    number = 0
    for batch in batches_of(report.path, KINDS[kind], []):
        for index in range(batch.num_rows):
            if number in rows:
                row = {name: batch.column(name)[index].as_py() for name in ID_COLUMNS[kind]}
                where = f"{report.path} row {number}"
                for value in dict(ids_of(row, kind))[column]:
                    if value in first:
                        fault = f"{column} {value} stands in {first[value]} too"
                        report.row_faults.setdefault(number, []).append(fault)
                        report.repeated.add(number)
                    first.setdefault(value, where)
            number += 1


def ids_fault(folder: StoragePath, manifest: dict[str, Any], reports: Sequence[ShardReport]) -> str:
    """The fault of the split's ids.bin; "" if there is none, and for splits of older versions without the file."""
    if "ids" not in manifest:
        return ""
    listed = read_ids(folder, manifest)
    if listed is None:
        return f"{folder / IDS}: is missing, or is not what the manifest says"
    if any(report.faults or report.row_faults for report in reports):
        return ""  # the ids differ because of these faults
    for column in set(listed) - set(numbered_columns(manifest)):
        found = [report.ids[column][0] for report in reports]
        if not np.array_equal(distinct(np.concatenate([np.zeros(0, np.uint64), *found])), listed[column]):
            return f"{folder / IDS}: has other values of {column} than the shards"
    return ""


def grid_faults(reports: Sequence[ShardReport]) -> Iterator[str]:
    """A fault for each shard whose codes are of another form than those of the first."""
    sound = [report for report in reports if report.rows]
    for report in sound[1:]:
        if report.grid != sound[0].grid:
            first, own = (one.grid or "no codes" for one in (sound[0], report))
            yield f"{report.path}: has {own}, {sound[0].path.name} has {first}; add them again to the whole split"


def answers_fault(folder: StoragePath, manifest: dict[str, Any], facts: SplitFacts) -> str:
    """The fault of the answer list beside a VQA split; "" if there is none, and for splits of older versions."""
    if manifest.get(ANSWER_LIST_HASH, answers_sha256(facts.answers)) == answers_sha256(facts.answers):
        return ""
    what = f"is not the list that {folder.name} was labeled by; put that one back, or convert it again"
    return f"{folder.parent / ANSWER_LIST}: {what}"


def split_facts(folder: StoragePath, manifest: dict[str, Any]) -> SplitFacts:
    """What the rows of the split in `folder` must conform to. Raises UserError when a VQA set has no answer list."""
    answers = read_answer_list(folder.parent / ANSWER_LIST) if manifest["kind"] == "vqa" else ()
    return SplitFacts(manifest["kind"], manifest["split"], answers, manifest.get("modality", "pairs"))


def shard_paths(folder: StoragePath) -> list[StoragePath]:
    """The shard files in `folder`, sorted by name."""
    return [folder / name for name in names_in(folder) if name.endswith(".arrow") and not name.startswith(".")]


def check_shards(
    folder: StoragePath, records: Sequence[dict[str, Any]], facts: SplitFacts, workers: int
) -> list[ShardReport]:
    """The reports of the shards that the manifest's `records` name, in their order, including duplicate ids.

    A shard whose record has only the file name is not compared with it.
    """
    found: dict[StoragePath, ShardReport] = {}
    tasks = [(folder / record["file"], record if len(record) > 1 else None, facts) for record in records]
    with Progress(f"verify {folder.name}", len(tasks), "shard") as progress:
        with closing(run_tasks(workers, check_shard, tasks)) as results:
            for report in results:
                found[report.path] = report
                progress.add(1)
    reports = [found[folder / record["file"]] for record in records]
    add_duplicates(reports, facts.kind)
    return reports
