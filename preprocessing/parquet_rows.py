"""Parquet files with images and captions in their columns -> rows."""

import posixpath
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.image_refs import ImageRef, ParquetCell
from preprocessing.places import open_input
from preprocessing.schema import DataError
from preprocessing.shard_rows import CAPTION_COLUMNS, ShardRows, texts_in

_IMAGE_COLUMNS = ("jpg", "png", "webp", "image", "image_bytes", "bytes")


class ParquetRows(ShardRows):
    """parquet: the row group and the row in it; workers take rows in order, so each group is decoded once."""

    fields = np.dtype([("group", "i4"), ("row", "i4")])

    def look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        try:
            with open_input(shard) as file:
                table = pq.ParquetFile(file)
                image, caption = _columns(shard, table.schema_arrow)
                keyed = "key" in table.schema_arrow.names
                row = 0
                for group in range(table.num_row_groups):
                    data = table.read_row_group(group, columns=[image, caption, *(["key"] if keyed else [])])
                    there = data.column(image).is_valid().to_pylist()
                    texts = data.column(caption).to_pylist()
                    stem = posixpath.basename(shard).removesuffix(".parquet")
                    keys = data.column("key").to_pylist() if keyed else [f"{stem}-{row + i}" for i in range(len(data))]
                    row += len(data)
                    for index, (key, text) in enumerate(zip(keys, texts, strict=True)):
                        if there[index]:
                            yield str(key), texts_in(text), (group, index)
                        else:
                            self.left_out["image is null"] += 1
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{shard}: is no whole parquet file ({str(error).splitlines()[0]}); fetch it again"
            ) from None

    def at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        group, row = int(entry["group"]), int(entry["row"])
        image, captions = _captions(shard, group)
        return texts_in(captions[row].as_py()), ParquetCell(shard, group, row, image, key)


@lru_cache(maxsize=2)
def _captions(shard: str, group: int) -> tuple[str, pa.ChunkedArray]:
    """The name of the image column, and the captions of a row group."""
    with open_input(shard) as file:
        table = pq.ParquetFile(file)
        image, caption = _columns(shard, table.schema_arrow)
        return image, table.read_row_group(group, columns=[caption]).column(caption)


def _columns(shard: str, schema: pa.Schema) -> tuple[str, str]:
    """The columns of images and of captions. Raises DataError when one is missing, or captions are no texts."""
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in schema.names), None)
    if image is None or caption is None:
        what, known = ("images", _IMAGE_COLUMNS) if image is None else ("captions", CAPTION_COLUMNS)
        raise DataError(f"{shard}: has no column of {what} ({', '.join(known)}); is this img2dataset's parquet output?")
    kind = schema.field(caption).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not _is_text(kind.value_type if listed else kind):
        raise DataError(f"{shard}: column {caption} is of type {kind}, neither text nor lists of texts; mend the file")
    return image, caption


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))
