"""Reads prepared shards back: for `verify`, `inspect`, `tokenizer` and `duplicates`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.hashes import HashList, content_key, perceptual_hashes
from preprocessing.images import PILLOW_PIXELS, BadImage
from preprocessing.pixels import open_image
from preprocessing.places import Place, open_input
from preprocessing.pool import run_tasks
from preprocessing.schema import IMAGE_COLUMNS, MANIFEST, SAMPLE_COLUMN, SPLITS, DataError, read_manifest


def split_folders(directory: Place) -> list[Place]:
    """The split folders of a data set folder, or a split folder alone. Raises DataError when there is none."""
    if (directory / MANIFEST).exists():
        return [directory]
    folders: list[Place] = [directory / split for split in SPLITS if (directory / split).is_dir()]
    if not folders:
        raise DataError(
            f"{directory}: holds neither {MANIFEST} nor a folder {', '.join(SPLITS)}; name a prepared data set"
        )
    return folders


def open_shard(path: Place) -> pa.ipc.RecordBatchFileReader:
    """Open one shard. Raises DataError when the file is missing or no Arrow IPC file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)) if isinstance(path, Path) else open_input(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; prepare the split again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is no Arrow file ({str(error).splitlines()[0]}); prepare the split again") from None


def read_rows(path: Place) -> Iterator[dict[str, Any]]:
    """The rows of one shard as plain Python values. Raises DataError when its records cannot be read."""
    reader = open_shard(path)
    for index in range(reader.num_record_batches):
        try:
            rows = reader.get_batch(index).to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            message = str(error).splitlines()[0]
            raise DataError(f"{path}: record batch {index} cannot be read ({message}); prepare it again") from None
        yield from rows


def read_texts(directory: Place) -> Iterator[str]:
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


def read_images(directory: Place) -> Iterator[tuple[str, bytes]]:
    """(name, file) of every image of a prepared data set folder, or of one of its splits.

    The name is the image's id; for NLVR the first identifier of the pair, with :left or :right.
    """
    for shard, kind in _shards_of(directory):
        yield from _shard_images(shard, kind)


def _shards_of(directory: Place) -> Iterator[tuple[Place, str]]:
    """(file, kind of data) of every shard."""
    for folder in split_folders(directory):
        manifest = read_manifest(folder)
        yield from ((folder / shard["file"], manifest["kind"]) for shard in manifest["shards"])


def _shard_images(shard: Place, kind: str) -> Iterator[tuple[str, bytes]]:
    columns = IMAGE_COLUMNS[kind]
    sides = ("",) if len(columns) == 1 else (":left", ":right")
    reader = open_shard(shard)
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        for row, name in enumerate(batch.column("identifier" if kind == "nlvr" else "image_id").to_pylist()):
            for column, side in zip(columns, sides, strict=True):
                yield (name if isinstance(name, str) else name[0]) + side, batch.column(column)[row].as_py()


def hashes_of(path: Place, perceptual: bool = True, workers: int = 1) -> HashList:
    """The fingerprints of a prepared data set's images, or those that a .npz file holds.

    Without `perceptual` no image is decoded, and the two perceptual hashes are 0. Raises DataError naming the folder or
    file, and the image that does not decode.
    """
    if path.name.endswith(".npz"):
        return HashList.load(path)
    tasks = ((number, *shard, perceptual) for number, shard in enumerate(_shards_of(path)))
    parts = sorted(run_tasks(workers, _hash_shard, tasks), key=lambda part: part[0])
    return HashList.joined(hashes for _, hashes in parts)


def _hash_shard(number: int, shard: Place, kind: str, perceptual: bool) -> tuple[int, HashList]:
    """`number`, which tells in what order the shards are, and the fingerprints. Runs in a worker."""
    entries = []
    for name, data in _shard_images(shard, kind):
        dhash = phash = 0
        if perceptual:
            try:
                dhash, phash = perceptual_hashes(open_image(data, PILLOW_PIXELS))
            except (BadImage, OSError, SyntaxError, ValueError):  # Pillow's words may name an object in memory
                raise DataError(f"{shard}: image {name} does not decode; run verify on it") from None
        entries.append((content_key(data), dhash, phash, name))
    return number, HashList.of(entries)
