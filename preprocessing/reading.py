"""Reads prepared shards back: for `verify`, `inspect` and `tokenizer`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.schema import MANIFEST, SAMPLE_COLUMN, SPLITS, DataError, read_manifest


def split_folders(directory: Path) -> list[Path]:
    """The split folders of a data set folder, or a split folder alone. Raises DataError when there is none."""
    if (directory / MANIFEST).exists():
        return [directory]
    folders = [directory / split for split in SPLITS if (directory / split).is_dir()]
    if not folders:
        raise DataError(
            f"{directory}: holds neither {MANIFEST} nor a folder {', '.join(SPLITS)}; name a prepared data set"
        )
    return folders


def open_shard(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Open one shard. Raises DataError when the file is missing or no Arrow IPC file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; prepare the split again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is no Arrow file ({str(error).splitlines()[0]}); prepare the split again") from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one shard as plain Python values. Raises DataError when its records cannot be read."""
    reader = open_shard(path)
    for index in range(reader.num_record_batches):
        try:
            rows = reader.get_batch(index).to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            message = str(error).splitlines()[0]
            raise DataError(f"{path}: record batch {index} cannot be read ({message}); prepare it again") from None
        yield from rows


def read_texts(directory: Path) -> Iterator[str]:
    """All captions or questions of a split folder, or of a data set folder's training split."""
    folder = directory if (directory / MANIFEST).exists() else directory / "train"
    manifest = read_manifest(folder)
    column = SAMPLE_COLUMN[manifest["kind"]]
    for shard in manifest["shards"]:
        reader = open_shard(folder / shard["file"])
        for index in range(reader.num_record_batches):
            yield from _flat(reader.get_batch(index).column(column).to_pylist())


def _flat(lists: Sequence[Sequence[str]]) -> Iterator[str]:
    for texts in lists:
        yield from texts
