"""The keys of ids: eight bytes in the place of an id of any length. A leaf that anyone may import.

`ids.bin` holds a split's keys (see preprocessing/shards/ids.py), so that two splits are compared without their shards.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.shards.schema import ID_COLUMNS, IDS_VERSION

_MARK_BYTES = 256  # of an image, from its end


def id_key(value: str | int | bytes, mark: bytes = b"") -> bytes:
    """The key of an id. Among 12 million ids two share a key once in 250,000 data sets.

    `mark` is the `image_mark` of the images that a numbered id (see shards/ids.py) belongs to. The key of a numbered
    image is made of its mark alone.
    """
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(raw + mark, digest_size=8).digest()


def image_mark(images: Iterable[Any]) -> bytes:
    """A few bytes that are equal for equal image files: the length and the end of each image (a buffer)."""
    return b"".join([b"\0%d:%b" % (len(image), image[-_MARK_BYTES:]) for image in images])


def is_leak(column: str, numbered: bool, both: int, fewer: int) -> bool:
    """Whether it is a fault that two splits share `both` ids; the smaller split has `fewer`.

    Images of the web are compared by their files (`numbered` in both splits), and some files are in any two splits by
    chance: for these it is a fault when half of the smaller split is shared.
    """
    return not (numbered and column == "image_id") or 2 * both >= fewer


def distinct(keys: np.ndarray) -> np.ndarray:
    """The distinct values of `keys` [n], ascending. np.unique takes many times as long (NumPy 2.4 hashes them)."""
    ascending = np.sort(keys)
    return ascending[np.append(True, ascending[1:] != ascending[:-1])[: len(ascending)]]


def ids_of_batch(batch: pa.RecordBatch, column: str, numbered: bool = False) -> tuple[list[bytes], list[bytes]]:
    """The ids of a column as text, and the key of each. List cells are flattened; nulls are skipped.

    Both are empty where the batch lacks the column.
    """
    if column not in batch.schema.names:
        return [], []
    cells = batch.column(column)
    is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    flat = cells.flatten() if is_list else cells
    texts = flat if pa.types.is_binary(flat.type) else flat.cast(pa.large_string()).cast(pa.large_binary())
    if not numbered:
        ids = texts.drop_null().to_pylist()
        return ids, list(map(id_key, ids))
    images = [batch.column(name) for name in ("image", "image_0", "image_1") if name in batch.schema.names]
    rows = pc.list_parent_indices(cells).to_pylist() if is_list else range(len(cells))
    pairs = [(one, row) for one, row in zip(texts.to_pylist(), rows, strict=True) if one is not None]
    marks = {row: image_mark(image[row].as_buffer() or b"" for image in images) for row in {row for _, row in pairs}}
    by_image = column == "image_id"
    return [one for one, _ in pairs], [id_key(b"" if by_image else one, marks[row]) for one, row in pairs]


def parse_ids(manifest: Mapping[str, Any], content: bytes) -> dict[str, bytes] | None:
    """The ascending keys of each id column in `content`, the bytes of ids.bin; None if these are not the manifest's."""
    record = manifest.get("ids")
    counts = record.get("distinct") if isinstance(record, dict) else None
    columns = ID_COLUMNS[manifest["kind"]]
    if not isinstance(record, dict) or not isinstance(counts, dict) or set(counts) != set(columns):
        return None
    if (
        record.get("version") != IDS_VERSION
        or record.get("sha256") != hashlib.sha256(content).hexdigest()
        or not all(isinstance(counts[column], int) for column in columns)
    ):
        return None
    parts, start = {}, 0
    for column in columns:
        parts[column] = content[start : start + 8 * counts[column]]
        start += 8 * counts[column]
    return parts if start == len(content) else None
