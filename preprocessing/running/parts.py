"""The unit of preprocessing: a part, a fixed number of consecutive source rows, becomes shards and a record.

What a part holds depends on nothing but its rows, the job and its number, so any process on any machine may write it,
once or again, and the bytes are the same. A part is done when its record stands, which is written last.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from preprocessing.errors import DataError
from preprocessing.images.decoding import BadImage, read_image
from preprocessing.images.policy import ExcludedImage, ImagePolicy
from preprocessing.json_text import dump_json
from preprocessing.redaction import without_secrets
from preprocessing.running.storage import StoragePath, write_whole
from preprocessing.shards.ids import IdKeys, ids_without_secrets
from preprocessing.shards.schema import IMAGE_COLUMNS
from preprocessing.shards.writer import SHARD_BYTES, ShardWriter
from preprocessing.sources.source import Row

_MOST_ROWS, _LEAST_ROWS = 4096, 256
_PARTS = 64  # a smaller set is cut into about so many, for as many workers
SHOWN = 3  # dropped rows that a message names


@dataclass(frozen=True)
class PartJob:
    """What a worker must know to write any part of a split. It can be pickled."""

    kind: str
    split: str
    shards: StoragePath  # the folder for the shards
    records: StoragePath  # the folder for the records
    policy: ImagePolicy
    allowed: float  # rows of the whole run that may be dropped
    shard_bytes: int = SHARD_BYTES
    numbered: tuple[str, ...] = ()  # as Source has it


@dataclass
class PartResult:
    """What became of a part."""

    index: int
    rows: int  # of the source
    faults: int  # rows dropped, but for those kept out on request
    examples: list[dict[str, str]] = field(default_factory=list)  # the first few of them
    recorded: bool = True  # False: more was dropped than the whole run may drop


def default_part_rows(rows: int) -> int:
    """Source rows to a part where the user names no number: 64 parts, but of 256 to 4,096 rows each."""
    batches = -(-rows // (_PARTS * _LEAST_ROWS))
    return min(_MOST_ROWS, _LEAST_ROWS * max(1, batches))


def parts_of(rows: Iterator[Row], part_rows: int) -> Iterator[tuple[int, list[Row], str]]:
    """(number, rows, digest) of each part. The digest changes with anything in the rows but the images' bytes."""
    index = 0
    while part := list(islice(rows, part_rows)):
        yield index, part, _digest(part)
        index += 1


def _digest(rows: Sequence[Row]) -> str:
    content = [[row.name, [repr(image) for image in row.images], row.columns] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def record_name(index: int) -> str:
    """The file name of a part's record."""
    return f"part-{index:06d}.json"


def write_part(job: PartJob, index: int, rows: Sequence[Row], digest: str) -> PartResult:
    """Write the shards of a part and then its record. Runs in a worker.

    The record holds rows, digest, shards (file, rows, samples, bytes, sha256), dropped (item, reason), how many of the
    dropped are faults of the data, not kept out on request, and the ids' keys. Raises DataError when the output cannot
    be written.
    """
    return begin_part(job, index, rows, digest)()


def begin_part(job: PartJob, index: int, rows: Sequence[Row], digest: str) -> Callable[[], PartResult]:
    """Read a part's images. Gives what is left to do of `write_part`, for any thread: to wait for the disk."""
    columns = IMAGE_COLUMNS[job.kind]
    dropped: list[dict[str, str]] = []
    faults: list[dict[str, str]] = []
    ids = IdKeys(job.kind, job.numbered)
    with ExitStack() as stack, _told(job):
        writer = stack.enter_context(
            ShardWriter(job.shards, job.kind, job.split, job.shard_bytes, partial(_shard_name, index))
        )
        for row in rows:
            try:
                images = [
                    job.policy.apply(read_image(image, writer.room(column)))
                    for column, image in zip(columns, row.images, strict=True)
                ]
            except BadImage as error:
                dropped.append({"item": without_secrets(row.name), "reason": f"image {error}"})
                if not isinstance(error, ExcludedImage):
                    faults.append(dropped[-1])
                if len(faults) > job.allowed:
                    too_many = PartResult(index, len(rows), len(faults), faults[:SHOWN], recorded=False)
                    return lambda: too_many
                continue
            named = ids_without_secrets(job.kind, row.columns)
            ids.add(named, images)
            writer.add(row.columns | named | dict(zip(columns, images, strict=True)))
        unfinished = stack.pop_all()

    def finish() -> PartResult:
        with unfinished, _told(job):
            shards = writer.close()
        record = {"rows": len(rows), "digest": digest, "shards": shards, "dropped": dropped, "faults": len(faults)}
        record["ids"] = ids.record()
        # The shards are on disk; a record that a power failure cuts is read as none, and the part is written again.
        write_whole(job.records / record_name(index), dump_json(record), sync=False)
        return PartResult(index, len(rows), len(faults), faults[:SHOWN])

    return finish


@contextmanager
def _told(job: PartJob) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of writing: reading an image raises none
        raise DataError(
            f"{job.shards}: cannot be written ({error.strerror or error}); make room or choose another --out, and run "
            "the same command again: it goes on where it was"
        ) from error


def _shard_name(part: int, number: int) -> str:
    """shard-00007.arrow; a part of many bytes goes on in shard-00007_01.arrow, …, which sort after it."""
    return f"shard-{part:05d}.arrow" if number == 0 else f"shard-{part:05d}_{number:02d}.arrow"
