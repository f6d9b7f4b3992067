"""The unit of work: a part, a fixed number of consecutive source rows, is written as shards and a JSON record.

The bytes of a part depend on its rows, the job and its number alone, so any process on any machine may write it, even
twice. A part is done when its record exists, which is written last.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from preprocessing.errors import UserError, without_secrets
from preprocessing.images.decoding import BadImage, read_image
from preprocessing.images.policy import ExcludedImage, ImagePolicy
from preprocessing.local_files import dump_json
from preprocessing.running.storage import StoragePath, write_whole
from preprocessing.shards.ids import IdKeys, ids_without_secrets
from preprocessing.shards.schema import IMAGE_COLUMNS
from preprocessing.shards.writer import SHARD_BYTES, ShardWriter
from preprocessing.sources.source import Row

_MOST_ROWS, _LEAST_ROWS = 4096, 256
_PARTS = 64  # about so many in a smaller data set, to keep as many workers busy
MAX_EXAMPLES = 3  # of dropped rows, in a message


@dataclass(frozen=True)
class PartJob:
    """What a worker needs to write any part of a split. Can be pickled."""

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
    """The outcome of a part."""

    index: int
    rows: int  # of the source
    faults: int  # dropped rows, except those left out on request
    examples: list[dict[str, str]] = field(default_factory=list)  # the first few faults
    recorded: bool = True  # False if more rows were dropped than the whole run may drop


def default_part_rows(rows: int) -> int:
    """The default number of source rows in a part: 64 parts, but 256 to 4,096 rows in each."""
    batches = -(-rows // (_PARTS * _LEAST_ROWS))
    return min(_MOST_ROWS, _LEAST_ROWS * max(1, batches))


def parts_of(rows: Iterator[Row], part_rows: int) -> Iterator[tuple[int, list[Row], str]]:
    """(number, rows, digest) of each part. The digest covers the rows, but not the images' bytes."""
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

    The record holds rows, digest, shards (file, rows, samples, bytes, sha256), dropped (item, reason), the number of
    dropped rows that are faults (not left out on request), and the keys of the ids. Raises UserError when the output
    cannot be written.
    """
    return begin_part(job, index, rows, digest)()


def begin_part(job: PartJob, index: int, rows: Sequence[Row], digest: str) -> Callable[[], PartResult]:
    """Read a part's images. Returns the rest of `write_part`, which waits for the disk.

    The rest may run in any thread.
    """
    columns = IMAGE_COLUMNS[job.kind]
    dropped: list[dict[str, str]] = []
    faults: list[dict[str, str]] = []
    ids = IdKeys(job.kind, job.numbered)
    with ExitStack() as stack, _wrap_write_errors(job):
        writer = stack.enter_context(
            ShardWriter(job.shards, job.kind, job.split, job.shard_bytes, partial(_shard_name, index))
        )
        for row in rows:
            try:
                images = [
                    job.policy.apply(read_image(image, writer.image_buffer(column)))
                    for column, image in (zip(columns, row.images, strict=True) if row.images else ())
                ] or [b""] * len(columns)
            except BadImage as error:
                dropped.append({"item": without_secrets(row.name), "reason": f"image {error}"})
                if not isinstance(error, ExcludedImage):
                    faults.append(dropped[-1])
                if len(faults) > job.allowed:
                    too_many = PartResult(index, len(rows), len(faults), faults[:MAX_EXAMPLES], recorded=False)
                    return lambda: too_many
                continue
            named = ids_without_secrets(job.kind, row.columns)
            ids.add(named, images)
            writer.add(row.columns | named | dict(zip(columns, images, strict=True)))
        unfinished = stack.pop_all()

    def finish() -> PartResult:
        with unfinished, _wrap_write_errors(job):
            shards = writer.close()
        record = {"rows": len(rows), "digest": digest, "shards": shards, "dropped": dropped, "faults": len(faults)}
        record["ids"] = ids.record()
        # Without sync: a record truncated by a power failure counts as missing, and the part is written again.
        write_whole(job.records / record_name(index), dump_json(record), sync=False)
        return PartResult(index, len(rows), len(faults), faults[:MAX_EXAMPLES])

    return finish


@contextmanager
def _wrap_write_errors(job: PartJob) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # from writing; reading an image raises no OSError
        raise UserError(
            f"{job.shards}: cannot be written ({error.strerror or error}); make room or choose another --out, and run "
            "the same command again: it continues"
        ) from error


def _shard_name(part: int, number: int) -> str:
    """shard-00007.arrow; a large part continues in shard-00007_01.arrow, …, which sort after it."""
    return f"shard-{part:05d}.arrow" if number == 0 else f"shard-{part:05d}_{number:02d}.arrow"
