"""`python -m preprocessing img2dataset`: what img2dataset wrote (github.com/rom1504/img2dataset) -> caption shards.

webdataset   00000.tar with KEY.jpg, KEY.txt and KEY.json; any webdataset tar of images with texts will do
parquet      00000.parquet with the columns key, jpg, txt and what is known of the address; Hugging Face's with
             image {bytes, path} too
files        00000/KEY.jpg, KEY.txt and KEY.json
00000_stats.json beside each shard tells how many addresses gave no image.
"""

import argparse
import os
import posixpath
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.convert import add_common_arguments, check_common_arguments, write_split
from preprocessing.files import read_json
from preprocessing.image_names import EXCLUDED, ImageList, add_exclude_argument, excluded_images
from preprocessing.image_refs import FileImage, ImageRef, ParquetCell, TarMember, join
from preprocessing.json_text import parse_json, whole_characters
from preprocessing.places import names_in, open_input, place
from preprocessing.rows import LazyRows
from preprocessing.schema import DataError
from preprocessing.source import Row, Source
from preprocessing.text import TextCleaning, add_text_argument, text_cleaning

FORMATS = ("auto", "webdataset", "parquet", "files")
_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_DOTTED = tuple(f".{ending}" for ending in _ENDINGS)
_IMAGE_COLUMNS = ("jpg", "png", "webp", "image", "image_bytes", "bytes")
_CHUNK = 1 << 20
_CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `img2dataset`."""
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the folder (default: as it looks)")
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises DataError on bad input."""
    check_common_arguments(args, "caption")
    write_split(read_folder(args.images, args.format, text_cleaning(args), excluded_images(args)), args)


def read_folder(folder: str, layout: str, cleaning: TextCleaning, excluded: ImageList) -> Source:
    """A row an image that has a caption and is not excluded, in the order of shards and of the images in them.

    Raises DataError when the folder holds no such files, and naming the file at fault.
    """
    names = names_in(place(folder))
    statistics = [join(folder, name) for name in names if name.endswith("_stats.json")]
    source = Source("caption", [], statistics, {"images": 0})
    kinds: dict[str, tuple[type[_ShardRows], list[str]]] = {
        "webdataset": (TarRows, [name for name in names if name.endswith(".tar")]),
        "parquet": (ParquetRows, [name for name in names if name.endswith(".parquet")]),
        "files": (FolderRows, [name for name in names if "." not in name]),
    }
    wanted = [layout] if layout != "auto" else list(kinds)
    if layout == "auto" and kinds["files"][1] and not kinds["webdataset"][1]:
        wanted = ["files"]  # the parquet files beside folders of images hold no images
    for kind in wanted:
        rows, shards = kinds[kind]
        if shards:
            source.rows = rows([join(folder, name) for name in shards], cleaning, excluded, source)
            _add_statistics(statistics, source)
            _compare(statistics, source.rows)
            return source
    raise DataError(f"{folder}: holds no .tar or .parquet files and no folders of images; name img2dataset's output")


def _add_statistics(files: Sequence[str], source: Source) -> None:
    """Count the addresses, and those of them that gave no image. Raises DataError naming the file at fault."""
    lost = 0
    for path in files:
        if whole_characters(path) != path:  # the provenance, which is UTF-8, names it
            raise DataError(f"{path!r}: has no UTF-8 name; rename it and its shard")
        record = read_json(path)
        count, got = (record.get(name) if isinstance(record, dict) else None for name in ("count", "successes"))
        if not (isinstance(count, int) and isinstance(got, int)):
            what = "successes" if isinstance(count, int) else "count"
            raise DataError(f"{path}: has no number '{what}'; fetch img2dataset's file again, or move it away")
        source.counts["addresses"] = source.counts.get("addresses", 0) + count
        lost += count - got
    if lost:
        source.counts["addresses without an image"] = lost


def _compare(files: Sequence[str], rows: "_ShardRows") -> None:
    """Raise DataError where a shard has other images than its statistics say."""
    for path in files:
        shard = path.removesuffix("_stats.json")
        said, found = read_json(path)["successes"], rows.images.get(posixpath.basename(shard))
        if found is not None and said != found:
            raise DataError(
                f"{path}: says {said} successes, the shard holds {found} images; fetch the shard again, or move that "
                "file away"
            )


class _ShardRows(LazyRows):
    """What the three layouts share: shards with images in them, of which a number and some fields are kept."""

    fields: ClassVar[np.dtype[Any]]

    def __init__(self, shards: Sequence[str], cleaning: TextCleaning, excluded: ImageList, source: Source) -> None:
        """Look through all shards for images with captions. Raises DataError naming the shard at fault."""
        self._shards = list(shards)
        self._cleaning = cleaning
        self._left_out = source.left_out
        parts, counts = [], []
        self.images: dict[str, int] = {}  # of each shard, captions or not
        for shard in self._shards:
            entries = []
            name = posixpath.basename(shard).partition(".")[0]
            self.images[name] = 0
            for key, captions, entry in self._look_through(shard):
                source.counts["images"] += 1
                self.images[name] += 1
                texts = self._cleaned(captions)
                if not texts:
                    source.left_out["image without caption"] += 1
                elif excluded.holds(key):
                    source.left_out[EXCLUDED] += 1
                else:
                    entries.append((key, *entry))
                    if len(texts) < len(captions):
                        source.left_out["caption is empty"] += len(captions) - len(texts)
            width = max((len(os.fsencode(entry[0])) for entry in entries), default=1)
            kept = np.empty(len(entries), dtype=[("key", f"S{width}"), *self.fields.descr])
            for index, (key, *values) in enumerate(entries):
                kept[index] = (os.fsencode(key), *values)  # names of files need not be UTF-8
            parts.append(kept)
            counts.append(len(entries))
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._unique = self._is_unique()

    def _is_unique(self) -> bool:
        """Whether no key stands in two shards: img2dataset's do not. Raises DataError when one stands twice in one."""
        for shard, part in zip(self._shards, self._parts, strict=True):
            keys, counts = np.unique(part["key"], return_counts=True)
            if len(keys) < len(part):
                raise DataError(
                    f"{shard}: key {whole_characters(os.fsdecode(keys[counts > 1][0]))} stands twice; make keys unique"
                )
        keys = np.concatenate([part["key"] for part in self._parts])
        keys.sort()
        return not bool((keys[1:] == keys[:-1]).any())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """See LazyRows."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        entry = self._parts[number][index - int(self._starts[number])]
        key = os.fsdecode(entry["key"])
        captions, image = self._at(self._shards[number], key, entry)
        name = posixpath.basename(self._shards[number]).partition(".")[0]
        image_id = whole_characters(key if self._unique else f"{name}/{key}")
        kept = self._cleaned(captions)
        if not kept:
            where = f"{self._shards[number]}: image {image_id}"
            raise DataError(f"{where}: has no caption any more; it changed since the run began, start again")
        return Row(image_id, (image,), {"caption": kept, "image_id": image_id})

    def _cleaned(self, captions: Sequence[str]) -> list[str]:
        """The captions of which something is left."""
        return [text for text in map(self._cleaning.caption, captions) if text]

    @abstractmethod
    def _look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        """(key, captions, values of `fields`) of each image of a shard."""

    @abstractmethod
    def _at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        """Captions and image of an entry."""


class TarRows(_ShardRows):
    """webdataset: the places of image and text in the tar. A key ends at the first dot of a name."""

    fields = np.dtype(
        [("image", "i8"), ("image_bytes", "i8"), ("text", "i8"), ("text_bytes", "i4"), ("json", "?"), ("ending", "i1")]
    )

    def _look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        try:
            with open_input(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                group: dict[str, tarfile.TarInfo] = {}
                key = None
                for member in tar:
                    cast(Any, tar).members = []  # tarfile keeps all that it has seen
                    if not member.isfile():
                        continue
                    stem, _, ending = posixpath.basename(member.name).partition(".")
                    stem = posixpath.join(posixpath.dirname(member.name), stem)
                    if stem != key:
                        if key is not None:
                            yield from self._entry(file, key, group)
                        key, group = stem, {}
                    ending = ending.lower()
                    if ending in group:
                        raise DataError(f"{shard}: key {whole_characters(key)} stands twice; make keys unique")
                    if "." in ending and ending.endswith(_DOTTED):
                        self._left_out["image name has a second dot"] += 1
                    group[ending] = member
                if key is not None:
                    yield from self._entry(file, key, group)
                _check_end(file, tar.offset)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{shard}: is no whole tar ({error}); fetch it again") from None

    def _entry(
        self, file: Any, key: str, group: dict[str, tarfile.TarInfo]
    ) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        ending = next((ending for ending in _ENDINGS if ending in group), None)
        if ending is None:
            return
        image, text = group[ending], group.get("txt") or group.get("json")
        if text is None:
            yield key, (), (image.offset_data, image.size, 0, 0, False, 0)
            return
        as_json = "txt" not in group
        back = file.tell()
        file.seek(text.offset_data)
        captions = _decode(bytes(file.read(text.size)), as_json)
        file.seek(back)
        where = (image.offset_data, image.size, text.offset_data, text.size, as_json, _ENDINGS.index(ending))
        yield key, captions, where

    def _at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        with open_input(shard) as file:
            file.seek(int(entry["text"]))
            captions = _decode(bytes(file.read(int(entry["text_bytes"]))), bool(entry["json"]))
        name = f"{key}.{_ENDINGS[int(entry['ending'])]}"
        return captions, TarMember(shard, int(entry["image"]), int(entry["image_bytes"]), name)


def _check_end(file: Any, end: int) -> None:
    """Raise TarError unless at byte `end`, where tarfile stopped, there is a block of zeros, and nothing else follows.

    It takes for an archive's end what is no header, the end of the file, and a header that a disk has lost to zeros.
    """
    file.seek(end)
    zeros = 0
    while data := bytes(file.read(_CHUNK)):
        if data.count(0) < len(data):
            raise tarfile.TarError(f"no header and no end at byte {end}, behind which more follows")
        zeros += len(data)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.TarError(f"no end at byte {end}")


def _decode(text: bytes, as_json: bool) -> Sequence[str]:
    """The captions of a .txt or of a .json file; none where it has none."""
    if not as_json:
        return (text.decode("utf-8", "replace"),)
    try:
        record = parse_json(text)
    except ValueError:
        return ()
    found = (_texts(record.get(name)) for name in _CAPTION_COLUMNS) if isinstance(record, dict) else ()
    return next((texts for texts in found if texts), ())


def _texts(value: Any) -> Sequence[str]:
    """The captions in a value: it is one, or a list of them, of which those that are null are empty."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        return [text or "" for text in value]
    return ()


class FolderRows(_ShardRows):
    """files: the ending of each image as it is spelled, and whether its text is JSON."""

    fields = np.dtype([("ending", "S4"), ("json", "?")])

    def _look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        names = names_in(place(shard))
        known = set(names)
        for name in names:
            stem, _, ending = name.rpartition(".")
            if ending.lower() not in _ENDINGS:
                continue
            text = next((f"{stem}.{kind}" for kind in ("txt", "json") if f"{stem}.{kind}" in known), None)
            as_json = text is not None and text.endswith(".json")
            captions = () if text is None else _read_captions(join(shard, text), as_json)
            yield stem, captions, (ending.encode(), as_json)

    def _at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        as_json = bool(entry["json"])
        captions = _read_captions(join(shard, f"{key}.{'json' if as_json else 'txt'}"), as_json)
        return captions, FileImage(join(shard, f"{key}.{entry['ending'].decode()}"))


def _read_captions(path: str, as_json: bool) -> Sequence[str]:
    """The captions in a file; none where a link leads nowhere. Raises DataError when it cannot be read."""
    try:
        with open_input(path) as file:
            return _decode(bytes(file.read()), as_json)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); mend it, or move it away") from None


class ParquetRows(_ShardRows):
    """parquet: the row group and the row in it; workers take rows in order, so each group is decoded once."""

    fields = np.dtype([("group", "i4"), ("row", "i4")])

    def _look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
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
                            yield str(key), _texts(text), (group, index)
                        else:
                            self._left_out["image is null"] += 1
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{shard}: is no whole parquet file ({str(error).splitlines()[0]}); fetch it again"
            ) from None

    def _at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        group, row = int(entry["group"]), int(entry["row"])
        image, captions = _captions(shard, group)
        return _texts(captions[row].as_py()), ParquetCell(shard, group, row, image, key)


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
    caption = next((name for name in _CAPTION_COLUMNS if name in schema.names), None)
    if image is None or caption is None:
        what, known = ("images", _IMAGE_COLUMNS) if image is None else ("captions", _CAPTION_COLUMNS)
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
