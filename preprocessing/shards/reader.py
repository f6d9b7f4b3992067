"""Reads prepared shards back: for `verify`, `inspect`, `tokenizer` and `duplicates`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.errors import UserError, id_without_secrets
from preprocessing.images.decoding import BadImage, open_image
from preprocessing.images.fingerprints import HashList, content_key, perceptual_hashes
from preprocessing.local_files import check_regular
from preprocessing.running.pool import run_tasks
from preprocessing.running.storage import StoragePath, open_input
from preprocessing.shards.schema import (
    CODES,
    IMAGE_COLUMNS,
    KINDS,
    MANIFEST,
    PILLOW_PIXELS,
    SAMPLE_COLUMN,
    SPLITS,
    CodeGrid,
    read_manifest,
)

_UNREADABLE = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)  # what a damaged file may raise
_START = 8  # an Arrow file is a magic word of 8 bytes, a stream, and a footer


def split_folders(directory: StoragePath) -> list[StoragePath]:
    """The split folders of a data set folder, or a split folder alone. Raises UserError when there is none."""
    if (directory / MANIFEST).exists():
        return [directory]
    folders: list[StoragePath] = [directory / split for split in SPLITS if (directory / split).is_dir()]
    if not folders:
        raise UserError(
            f"{directory}: holds neither {MANIFEST} nor a folder {', '.join(SPLITS)}; name a prepared data set"
        )
    return folders


def batches_of(path: StoragePath, schema: pa.Schema, faults: list[str]) -> Iterator[pa.RecordBatch]:
    """The valid record batches of a file. What is wrong with the others is appended to `faults`.

    A file without its end, which holds the index, is read from its start up to the first damaged batch.
    """
    if isinstance(path, Path):
        check_regular(path)
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)) if isinstance(path, Path) else open_input(path))
        fault = _schema_fault(reader.schema, schema)  # reads the columns' names, which may be no UTF-8
    except FileNotFoundError:
        faults.append("is missing; prepare it again")
        return
    except _UNREADABLE as error:
        faults.append(f"is no Arrow file ({_error_text(error)}); prepare it again")
        yield from _read_stream(path, schema)
        return
    if fault:
        faults.append(fault)
        return
    for index in range(reader.num_record_batches):
        try:
            batch = reader.get_batch(index)
            batch.validate(full=True)  # a wrong offset would be followed beyond the buffer
        except _UNREADABLE as error:
            faults.append(f"record batch {index} cannot be read ({_error_text(error)}); prepare it again")
            continue
        yield batch


def _read_stream(path: StoragePath, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The batches of a truncated file, up to the first incomplete one."""
    try:
        with open_input(path) as file:
            file.seek(_START)
            stream = pa.ipc.open_stream(file)
            if not _schema_fault(stream.schema, schema):
                for batch in stream:
                    batch.validate(full=True)
                    yield batch
    except _UNREADABLE:
        return  # the caller has reported the truncated file


def _schema_fault(found: pa.Schema, schema: pa.Schema) -> str:
    """What is wrong with the columns of a file; "" if they are those of `schema`, or caption's with codes as well."""
    if schema is KINDS["caption"] and CODES in found.names:
        try:
            CodeGrid.of(found)
        except ValueError as error:
            return f"{error}; add its codes again"
        schema = schema.append(found.field(CODES))
    return "" if found.equals(schema) else "its columns are not those that its kind has; prepare it again"


def _error_text(error: Exception) -> str:
    """The message of the system or of Arrow, in one line."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return (str(error).splitlines() or [type(error).__name__])[0]


def sound_batches(path: StoragePath, kind: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first row, record batch) of each batch of a shard. Raises UserError at the first invalid batch.

    Null values are not checked.
    """
    faults: list[str] = []
    row = 0
    for batch in batches_of(path, KINDS[kind], faults):
        if faults:
            break
        yield row, batch
        row += batch.num_rows
    if faults:
        raise UserError(f"{path}: {faults[0]}, or see `python -m preprocessing verify {path.parent}`")


def _bad_row(path: StoragePath, row: int, what: str) -> UserError:
    """The error for a row that cannot be used."""
    return UserError(f"{path} row {row}: {what}; see `python -m preprocessing verify {path.parent}`")


def read_rows(path: StoragePath, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of one shard as Python values (None for null). Raises UserError when the shard is damaged."""
    for _, batch in sound_batches(path, kind):
        yield from batch.to_pylist()


def code_grid(folder: StoragePath, manifest: dict[str, Any]) -> CodeGrid | None:
    """That of the codes in a split's first shard; None without. Raises UserError when the shard is damaged."""
    for shard in manifest["shards"]:
        for _, batch in sound_batches(folder / shard["file"], manifest["kind"]):
            return CodeGrid.of(batch.schema)
    return None


def read_texts(directory: StoragePath) -> Iterator[str]:
    """All captions or questions of a split folder, or of a data set folder's training split. Raises UserError."""
    folder = directory if (directory / MANIFEST).exists() else directory / "train"
    manifest = read_manifest(folder)
    column = SAMPLE_COLUMN[manifest["kind"]]
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        for first, batch in sound_batches(path, manifest["kind"]):
            for row, texts in enumerate(batch.column(column).to_pylist(), first):
                if texts is None or None in texts:
                    raise _bad_row(path, row, f"{column} is null, or a text in it is")
                yield from texts


def read_images(directory: StoragePath) -> Iterator[tuple[str, bytes]]:
    """(name, file) of every image of a prepared data set folder, or of one of its splits.

    The name is the image's id; for NLVR the first identifier of the pair, with :left or :right.
    """
    for shard, kind in _shards_of(directory):
        yield from _shard_images(shard, kind)


def _shards_of(directory: StoragePath) -> Iterator[tuple[StoragePath, str]]:
    """(file, kind of data) of every shard."""
    for folder in split_folders(directory):
        manifest = read_manifest(folder)
        if manifest.get("modality") == "text":
            raise UserError(f"{folder}: holds texts without images; name a data set of images")
        yield from ((folder / shard["file"], manifest["kind"]) for shard in manifest["shards"])


def _shard_images(shard: StoragePath, kind: str) -> Iterator[tuple[str, bytes]]:
    columns = IMAGE_COLUMNS[kind]
    sides = ("",) if len(columns) == 1 else (":left", ":right")
    for first, batch in sound_batches(shard, kind):
        for row, ids in enumerate(batch.column("identifier" if kind == "nlvr" else "image_id").to_pylist()):
            name = next(iter(ids or ()), None) if kind == "nlvr" else ids
            for column, side in zip(columns, sides, strict=True):
                data = batch.column(column)[row].as_py()
                if name is None or data is None:
                    raise _bad_row(shard, first + row, f"{column} or its id is null")
                yield id_without_secrets(name) + side, data


def hashes_of(path: StoragePath, perceptual: bool = True, workers: int = 1) -> HashList:
    """The fingerprints of a prepared data set's images, or those that a .npz file holds.

    Without `perceptual` no image is decoded, and the two perceptual hashes are 0. Raises UserError naming the folder or
    file, and the image that does not decode.
    """
    if path.name.endswith(".npz"):
        return HashList.load(path)
    tasks = ((number, *shard, perceptual) for number, shard in enumerate(_shards_of(path)))
    parts = sorted(run_tasks(workers, _hash_shard, tasks), key=lambda part: part[0])
    return HashList.joined(hashes for _, hashes in parts)


def _hash_shard(number: int, shard: StoragePath, kind: str, perceptual: bool) -> tuple[int, HashList]:
    """`number`, by which the caller sorts the shards, and the fingerprints. Runs in a worker."""
    entries = []
    for name, data in _shard_images(shard, kind):
        dhash = phash = 0
        if perceptual:
            try:
                dhash, phash = perceptual_hashes(open_image(data, PILLOW_PIXELS))
            except (BadImage, OSError, SyntaxError, ValueError):  # Pillow's message may name an object in memory
                raise UserError(f"{shard}: image {name} does not decode; run verify on it") from None
        entries.append((content_key(data), dhash, phash, name))
    return number, HashList.of(entries)
