"""Rows of parquet files with images and captions in their columns."""

import posixpath
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord
from preprocessing.formats.caption_columns import (
    CAPTION_COLUMNS,
    NAME_COLUMNS,
    caption_columns,
    captions_in,
    image_names,
)
from preprocessing.formats.shard_rows import FoundImage, Shard, ShardRows, Wanted
from preprocessing.images.image_refs import ImageRef, ParquetCell
from preprocessing.running.storage import open_input
from preprocessing.sources.source import Source
from preprocessing.sources.split_names import split_field

_IMAGE_COLUMNS = ("jpg", "png", "webp", "image", "image_bytes", "bytes", "jpeg", "img")


class ParquetRows(ShardRows):
    """Layout "parquet". Kept of each image: its row group and the row in it. Workers decode each group once.

    If there is a column `split` (in any case), only the rows of the wanted split are used.
    """

    fields = np.dtype([("group", "i4"), ("row", "i4")])

    def __init__(self, shards: Sequence[Shard], wanted: Wanted, source: Source) -> None:
        """See ShardRows. Also raises UserError when one file has a column `split` and another one has not."""
        self._with: str | None = None  # a file with a column `split`
        self._without: str | None = None
        super().__init__(shards, wanted, source)
        if self._with and self._without:
            raise UserError(
                f"{self._with} has a column of splits, {self._without} has none; give them one by one, or move one away"
            )

    def scan_shard(self, shard: str) -> Iterator[FoundImage]:
        try:
            with open_input(shard) as file:
                table = pq.ParquetFile(file)
                image, captions = _columns(shard, table.schema_arrow, self._wanted.columns, self._wanted.images_only)
                there = table.schema_arrow.names
                split = split_field(there)
                if split is not None:
                    self._with = self._with or shard
                else:
                    self._without = self._without or shard
                more = [name for name in ("key", split) if name in there]
                if self._wanted.excluded:
                    more += [name for name in NAME_COLUMNS if name in there]
                first = 0
                for group in range(table.num_row_groups):
                    columns = dict.fromkeys([image, *captions, *more])
                    data = table.read_row_group(group, columns=list(columns))
                    yield from self._group(shard, data, group, first, image, captions)
                    first += len(data)
        except (
            OSError,
            pa.ArrowException,
            MemoryError,
            UnicodeDecodeError,
        ) as error:  # UnicodeDecodeError: of a column's name
            raise UserError(
                f"{shard}: is no whole parquet file ({(str(error) or 'no memory').splitlines()[0]}); fetch it again"
            ) from None

    def _group(
        self, shard: str, data: pa.Table, group: int, first: int, image: str, captions: Sequence[str]
    ) -> Iterator[FoundImage]:
        """The images of a row group whose first row is row `first` of the file."""
        stem = posixpath.basename(shard).removesuffix(".parquet")
        there = data.column(image).is_valid().to_pylist()
        paths = _paths(data.column(image)) if self._wanted.excluded else None
        lists = {name: _values(data.column(name)) for name in data.column_names if name != image or image in captions}
        for index in range(len(data)):
            record = {name: values[index] for name, values in lists.items()}
            bad = next((name for name, value in record.items() if value is _BROKEN), None)
            if not there[index]:
                self.count_left_out("image is null")
                continue
            key = record.get("key")
            found = FoundImage(f"{stem}-{first + index}" if key is None else str(key), (), (group, index))
            if bad is not None:
                what = f"column {bad} is not UTF-8 text; fix the file"
                found.fault = BadRecord(f"{shard}: row {first + index}", what, "text is not UTF-8")
            else:
                found.captions = captions_in(record, captions)
                self._note_split(found, record, f"{shard}: row {first + index}")
            if paths is not None:
                found.names = (*image_names(record), *filter(None, [paths[index]]))
            yield found

    def _note_split(self, found: FoundImage, record: dict[str, Any], where: str) -> None:
        name = split_field(record.keys())
        try:
            found.other_split = name is not None and self.splits.is_other_split(where, record[name])
        except BadRecord as error:
            found.fault = error

    def read_entry(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        group, row = int(entry["group"]), int(entry["row"])
        try:
            image, names, columns = _captions(shard, group, tuple(self._wanted.columns), self._wanted.images_only)
            captions = captions_in({name: columns.column(name)[row].as_py() for name in names}, names)
        except (OSError, pa.ArrowException, MemoryError, UnicodeDecodeError, IndexError) as error:
            raise UserError(f"{shard}: changed since the run began ({error}); start again") from None
        return captions, ParquetCell(shard, group, row, image, key)


@lru_cache(maxsize=2)
def _captions(shard: str, group: int, wanted: tuple[str, ...], images_only: bool) -> tuple[str, list[str], pa.Table]:
    """The name of the image column, those of the caption columns, and the caption columns of a row group."""
    with open_input(shard) as file:
        table = pq.ParquetFile(file)
        image, captions = _columns(shard, table.schema_arrow, wanted, images_only)
        return image, captions, table.read_row_group(group, columns=captions)


def _is_image(kind: pa.DataType) -> bool:
    """Whether ParquetCell can read values of this type."""
    if pa.types.is_dictionary(kind):
        return _is_image(kind.value_type)
    if pa.types.is_struct(kind):  # Hugging Face's image feature: {bytes, path}
        index = kind.get_field_index("bytes")
        return index < 0 or _is_image(kind.field(index).type)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return _is_text(kind) or pa.types.is_null(kind) or any(is_of(kind) for is_of in binary)


_BROKEN = object()


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The column's values, with _BROKEN for texts that are not UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _BROKEN


def _paths(column: pa.ChunkedArray) -> list[Any]:
    """The file names in Hugging Face's image feature {bytes, path}; None for other types."""
    kind = column.type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return [None] * len(column)
    return [value if isinstance(value, str) else None for value in _values(pc.struct_field(column, "path"))]


def _columns(shard: str, schema: pa.Schema, wanted: Sequence[str], images_only: bool) -> tuple[str, list[str]]:
    """The image column and the caption columns, with `images_only` none. Raises UserError when one is missing or of
    another type."""
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        known = ", ".join(_IMAGE_COLUMNS)
        raise UserError(f"{shard}: has no column of images ({known}); is this img2dataset's parquet output?")
    if not _is_image(schema.field(image).type):
        raise UserError(
            f"{shard}: column {image} is of type {schema.field(image).type}, neither bytes, base64 nor a struct of it; "
            "fix the file"
        )
    missing = next((name for name in wanted if name not in schema.names), None)
    captions = [] if images_only else caption_columns(schema.names, wanted)
    there = ", ".join(schema.names)
    if missing is not None:
        raise UserError(f"{shard}: has no column {missing}, which --caption-column names; it has {there}")
    if not captions and not images_only:
        known = ", ".join(CAPTION_COLUMNS)
        raise UserError(f"{shard}: has no column of captions ({known}), but {there}; name it with --caption-column")
    split = split_field(schema.names)
    for name in (*captions, *filter(None, [split])):
        kind = schema.field(name).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if name == split and not _is_text(kind):
            raise UserError(f"{shard}: column {name} is of type {kind}, not text; fix the file or call it otherwise")
        if not _is_text(kind.value_type if listed else kind) and not _is_sentence(kind.value_type if listed else kind):
            raise UserError(
                f"{shard}: column {name} is of type {kind}, neither text nor lists of texts; name another with "
                "--caption-column"
            )
    return image, captions


def _is_sentence(kind: pa.DataType) -> bool:
    """Whether it is the type of Karpathy's sentences, {raw, …}."""
    return bool(pa.types.is_struct(kind)) and kind.get_field_index("raw") >= 0 and _is_text(kind.field("raw").type)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))
