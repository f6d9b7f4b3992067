"""Writes a source as a finished split: all parts, in any number of processes, and then the manifest."""

import argparse
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import PIL
import pyarrow as pa

from preprocessing.errors import UserError
from preprocessing.local_files import dump_json
from preprocessing.running.parts import (
    MAX_EXAMPLES,
    PartJob,
    PartResult,
    begin_part,
    default_part_rows,
    parts_of,
    write_part,
)
from preprocessing.running.pool import process_count, run_tasks
from preprocessing.running.progress import Progress
from preprocessing.running.storage import storage_path, write_whole
from preprocessing.running.work_folder import Work, open_work
from preprocessing.shards.hashed_file import HashedFile
from preprocessing.shards.ids import join_keys, write_ids
from preprocessing.shards.schema import ANSWER_LIST, ANSWER_LIST_HASH, ID_COLUMNS, answers_sha256
from preprocessing.shards.writer import DROPPED, write_manifest, write_provenance
from preprocessing.sources.source import LISTED, Source


def build_split(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """Write `source` to `args.out/args.split`. Continues an interrupted run. Returns the manifest.

    A part of an earlier run is reused if its source rows, the image options and the versions of pyarrow and Pillow are
    the same; changed image files are not noticed. Raises UserError when more than `args.max_dropped` of the rows must
    be dropped, when the output cannot be written, and when another process writes it.
    """
    target = storage_path(args.out) / args.split
    part_rows = args.shard_rows or default_part_rows(len(source.rows))
    job = {
        "kind of data": source.kind,
        "rows to a part": part_rows,
        "columns of ids": [*ID_COLUMNS[source.kind], *source.numbered],
        "image options": _fingerprint(args.policy),
        "versions of pyarrow and Pillow": [pa.__version__, PIL.__version__],
    }
    with open_work(target, job, args.overwrite) as work:
        parts = _write_parts(source, args, work, part_rows)
        return _finish(source, args, work, parts)


def _write_parts(source: Source, args: argparse.Namespace, work: Work, part_rows: int) -> int:
    """Write the parts that are not done. Returns how many parts there are."""
    total = len(source.rows)
    allowed = max(0.0, args.max_dropped * source.total - source.faults.count)
    job = PartJob(source.kind, args.split, work.shards, work.records, args.policy, allowed, numbered=source.numbered)
    done = set(work.done())
    count = -(-total // part_rows)
    losses = _Losses(source, args.max_dropped, allowed)
    with Progress(f"{source.kind} {args.split}", total) as progress:
        if work.restarted:
            progress.say(f"starts over, since the run that was stopped: {work.restarted}")
        elif done:
            progress.say(f"continues where the last run stopped: {len(done)} of {count} parts are done")

        def tasks() -> Iterator[tuple[Any, ...]]:
            for index, rows, digest in parts_of(iter(source.rows), part_rows):
                record = work.record(index) if index in done else None
                if record is not None and record["digest"] == digest:
                    losses.add(PartResult(index, len(rows), record["faults"], record["dropped"][:MAX_EXAMPLES]))
                    progress.skip(len(rows))
                else:
                    yield job, index, rows, digest

        try:
            with closing(run_tasks(args.workers, write_part, tasks(), begin_part)) as results:
                for result in results:
                    losses.add(result)
                    progress.add(result.rows)
        except _TooManyDropped:
            for index in work.done():  # so that the next run looks at repaired images again
                record = work.record(index)
                if record is not None and record["faults"]:
                    work.forget(index)
            raise
    for index in done - set(range(count)):
        work.forget(index)
    return count


class _TooManyDropped(UserError):
    pass


class _Losses:
    """Counts dropped rows; raises as soon as there are too many."""

    def __init__(self, source: Source, share: float, allowed: float) -> None:
        self._source, self._share, self._allowed = source, share, allowed
        self._count = 0
        self._shown: list[dict[str, str]] = []

    def add(self, part: PartResult) -> None:
        if not part.faults:
            return
        self._count += part.faults
        self._shown += part.examples
        if self._count > self._allowed:
            shown = ", ".join(f"{item['item']} ({item['reason']})" for item in self._shown[:MAX_EXAMPLES])
            more = ", …" if self._count > MAX_EXAMPLES else ""
            raise _TooManyDropped(
                f"{self._source.where}: more than --max-dropped {self._share:g} of {self._source.total} rows must be "
                f"dropped: {shown}{more}{self._faults()}; fix the images or raise --max-dropped"
            )

    def _faults(self) -> str:
        faults = self._source.faults
        return f"; and {faults.count} records are at fault, the first: {faults.first}" if faults.count else ""


def _finish(source: Source, args: argparse.Namespace, work: Work, parts: int) -> dict[str, Any]:
    """Write the manifest from the records of the parts, in the order of the source, and publish the split."""
    shards: list[dict[str, Any]] = []
    dropped = Counter(source.left_out)
    dropped.update(source.faults.reasons)
    keys: list[dict[str, str]] = []
    for record in _records(work, parts):
        shards += record["shards"]
        keys.append(record["ids"])
        dropped.update(item["reason"] for item in record["dropped"])
    if not shards:
        for index in range(parts):  # so that the next run looks at repaired images again
            work.forget(index)
        most = dropped.most_common(1)
        why = f": {most[0][1]} times, {most[0][0]}" if most else ""
        raise UserError(f"{work.target}: no row is left of {len(source.rows)}{why}; fix the input")
    listed = dropped.total() - source.left_out.total()
    items = list(islice(_dropped_items(source, work, parts), LISTED)) if listed else []
    work.check_only_writer()
    work.clean([shard["file"] for shard in shards])
    fields: dict[str, Any] = {"dropped": dict(dropped), "dropped_items": items, "source": source.counts}
    if source.modality != "pairs":
        fields["modality"] = source.modality
    if listed > LISTED:
        fields["dropped_list"] = _write_dropped(source, work, parts)
    fields["ids"] = write_ids(work.shards, join_keys(source.kind, keys), source.numbered)
    write_provenance(work.shards, source.inputs, process_count(args.workers))
    if source.answer_list is not None:
        write_whole(storage_path(args.out) / ANSWER_LIST, dump_json(source.answer_list))
        fields[ANSWER_LIST_HASH] = answers_sha256(source.answer_list)
    manifest = write_manifest(work.shards, source.kind, args.split, shards, **fields)
    work.publish()
    return manifest


def _records(work: Work, parts: int) -> Iterator[dict[str, Any]]:
    for index in range(parts):
        record = work.record(index)
        if record is None:
            raise UserError(f"{work.target}: part {index} has vanished while the run went on; run it again")
        yield record


def _dropped_items(source: Source, work: Work, parts: int) -> Iterator[dict[str, str]]:
    yield from source.faults.items
    for record in _records(work, parts):
        yield from record["dropped"]


def _write_dropped(source: Source, work: Work, parts: int) -> dict[str, Any]:
    """Write all dropped rows, and the first LISTED records at fault, as JSON lines. Returns the file's record."""
    with HashedFile(work.shards / DROPPED) as file:
        for item in _dropped_items(source, work, parts):
            file.write((json.dumps(item, sort_keys=True, ensure_ascii=False) + "\n").encode())
        sha256, size = file.finish()
    return {"file": DROPPED, "bytes": size, "sha256": sha256}


def _fingerprint(value: Any) -> Any:
    """A small JSON value that is equal for equal options."""
    if dataclasses.is_dataclass(value):
        return {one.name: _fingerprint(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape} ".encode() + value.tobytes()).hexdigest()
    return value
