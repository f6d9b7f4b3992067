"""Files of captions with image names, addresses or base64 -> rows: what SBU, CC3M and CC12M share."""

import codecs
import hashlib
import io
import posixpath
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import IO, Any, cast
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from preprocessing.files import read_json, read_text
from preprocessing.image_names import EXCLUDED, ImageList
from preprocessing.image_refs import Base64Cell, FileImage, ImageRef, image_in
from preprocessing.line_records import BadLine, Form, Record, caption_texts, find_form, parse_line, record_of
from preprocessing.places import exists, open_input, place
from preprocessing.rows import LazyRows
from preprocessing.schema import DataError
from preprocessing.source import Row, Source
from preprocessing.text import TextCleaning

NAME_FIELDS: dict[str, Callable[[int, str], object]] = {
    "row": lambda row, url: row,
    "url_name": lambda row, url: url_name(url),
    "crc32": lambda row, url: zlib.crc32(url.encode()),
    "md5": lambda row, url: hashlib.md5(url.encode(), usedforsecurity=False).hexdigest(),
    "sha1": lambda row, url: hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest(),
}
_SLICE = 1024  # entries
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif")


def url_name(url: str) -> str:
    """The file name at the end of an address."""
    return unquote(posixpath.basename(urlsplit(url).path))


class ImageFinder:
    """Finds the image of a record: in its line, at the file it names, or at the file that its address stands for."""

    def __init__(self, images: str | None, template: str | None) -> None:
        self._images = images
        self._template = template

    def check(self, record: Record) -> None:
        """Raise BadLine when no image could be found for records of this kind."""
        if record.cell is not None:
            return
        if self._images is None:
            raise BadLine("holds no image itself; name the folder of the downloaded ones with --images")
        if record.file is None and record.url is None:
            raise BadLine("names neither an image file nor an address")
        if record.file is None and self._template is None:
            raise BadLine("names no image file; say with --image-name how the files are called, such as '{row:07d}'")

    def find(self, record: Record, path: str, offset: int, row: int) -> ImageRef:
        """The image of the record that stands in row `row`, from 0, of `path`, where its line starts at `offset`."""
        if record.cell is not None:
            first, length = record.cell
            return Base64Cell(path, offset + first, length, f"{posixpath.basename(path)} row {row}")
        assert self._images is not None  # check() saw to it
        if record.file is not None:
            return image_in(self._images, record.file)
        assert self._template is not None and record.url is not None
        name = self._template.format(**{field: make(row, record.url) for field, make in NAME_FIELDS.items()})
        image = image_in(self._images, name)
        if not isinstance(image, FileImage):
            return image
        there = (image.path + ending for ending in ("", *_ENDINGS) if exists(image.path + ending))
        return FileImage(next(there, image.path))


def read_captions(
    files: Sequence[str],
    columns: Sequence[str] | None,
    finder: ImageFinder,
    cleaning: TextCleaning,
    excluded: ImageList,
) -> Source:
    """A row for each line or entry that has a caption and is not excluded. Raises DataError naming what is at fault."""
    stems = [_stem(name) for name in files]
    if len(set(stems)) < len(stems):
        raise DataError(f"--annotations: two files are called {stems[0]}, which image ids begin with; rename one")
    source = Source("caption", [], [place(name) for name in files], {})
    keeper = _Keeper(source, cleaning, excluded)
    entries = _entries(files)
    if entries is None:
        source.rows = LineRows(files, columns, finder, cleaning, keeper)
    else:
        source.rows = EntryRows(files[0], entries, finder, cleaning, keeper)
    return source


class _Keeper:
    """Decides which records become rows, and counts the others."""

    def __init__(self, source: Source, cleaning: TextCleaning, excluded: ImageList) -> None:
        self._source = source
        self._cleaning = cleaning
        self._excluded = excluded
        source.counts["captions"] = 0

    def keeps(self, record: Record, image_id: str) -> bool:
        self._source.counts["captions"] += len(record.captions)
        if self._excluded.holds(record.file or url_name(record.url or ""), image_id):
            self._source.left_out[EXCLUDED] += 1
            return False
        if not self._cleaning.captions(record.captions, self._source.left_out):
            if len(record.captions) != 1:
                self._source.left_out["image without caption"] += 1
            return False
        return True


class LineRows(LazyRows):
    """The lines of TSV or JSON-lines files. Of each are kept its file, place and number: 28 bytes."""

    def __init__(
        self,
        files: Sequence[str],
        columns: Sequence[str] | None,
        finder: ImageFinder,
        cleaning: TextCleaning,
        keeper: _Keeper,
    ) -> None:
        """Read all lines once to find those that `keeper` keeps. Raises DataError naming file and line at fault."""
        self._files = list(files)
        self._finder = finder
        self._cleaning = cleaning
        self._forms: list[Form] = []
        parts = [self._index(number, columns, keeper) for number in range(len(files))]
        self._file = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        self._offset, self._length, self._number = np.concatenate(parts).T.copy()

    def _index(self, file: int, columns: Sequence[str] | None, keeper: _Keeper) -> np.ndarray:
        """[lines kept, 3] int64: first byte, bytes, number from 0."""
        path = self._files[file]
        found = array("q")
        number, where = 0, f"{path}: line 1"
        for line_number, (offset, line) in enumerate(_lines(path), 1):
            where = f"{path}: line {line_number}"
            try:
                if line_number == 1:
                    self._forms.append(find_form(line, columns))
                    if self._forms[file].header:
                        continue
                if not line.strip():
                    continue
                record = parse_line(line, self._forms[file])
                self._finder.check(record)
            except BadLine as error:
                raise DataError(f"{where}: {error}") from None
            if keeper.keeps(record, self._id(file, number)):
                found.extend((offset, len(line), number))
            number += 1
        if not self._forms[file:]:
            raise DataError(f"{path}: is empty; fetch it again")
        return np.frombuffer(found, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._offset)

    def _id(self, file: int, number: int) -> str:
        return f"{_stem(self._files[file])}-{number}"

    def __iter__(self) -> Iterator[Row]:
        for file, rows in groupby(range(len(self)), key=lambda index: int(self._file[index])):
            with open_input(self._files[file]) as stream:
                yield from (self._read(stream, index) for index in rows)

    def row(self, index: int) -> Row:
        """See LazyRows."""
        with open_input(self._files[int(self._file[index])]) as stream:
            return self._read(stream, index)

    def _read(self, stream: IO[bytes], index: int) -> Row:
        file, offset, number = int(self._file[index]), int(self._offset[index]), int(self._number[index])
        path = self._files[file]
        stream.seek(offset)
        line = bytes(stream.read(int(self._length[index])))
        try:
            record = parse_line(line, self._forms[file])
        except BadLine as error:
            raise DataError(f"{path}: row {number}: {error}; it changed since the run began, start again") from None
        image = self._finder.find(record, path, offset, number)
        columns = {"caption": self._cleaning.captions(record.captions), "image_id": self._id(file, number)}
        return Row(image.name, (image,), columns)


class EntryRows(LazyRows):
    """The entries of one JSON file, or of two text files, held as Arrow strings."""

    def __init__(
        self, path: str, entries: Iterator[Record], finder: ImageFinder, cleaning: TextCleaning, keeper: _Keeper
    ) -> None:
        """Raises DataError naming the entry at fault."""
        self._path = path
        self._stem = _stem(path)
        self._finder = finder
        self._cleaning = cleaning
        kept: list[tuple[int, tuple[str, ...], str | None, str | None]] = []
        number = -1
        try:
            for number, record in enumerate(entries):
                finder.check(record)
                if keeper.keeps(record, self._id(number)):
                    kept.append((number, record.captions, record.file, record.url))
        except BadLine as error:
            raise DataError(f"{path}: entry {number + 1}: {error}") from None
        numbers, captions, names, urls = zip(*kept, strict=True) if kept else ((), (), (), ())
        self._number = np.array(numbers, dtype=np.int64)
        text = pa.large_string()
        columns = ((captions, pa.large_list(text)), (names, text), (urls, text))
        self._text = [pa.array(values, kind) for values, kind in columns]

    def __len__(self) -> int:
        return len(self._number)

    def _id(self, number: int) -> str:
        return f"{self._stem}-{number}"

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _SLICE):  # Python values one by one take three times as long
            columns = (
                self._number[start : start + _SLICE].tolist(),
                *(column[start : start + _SLICE].to_pylist() for column in self._text),
            )
            yield from map(self._row, *columns)

    def row(self, index: int) -> Row:
        """See LazyRows."""
        return self._row(int(self._number[index]), *(column[index].as_py() for column in self._text))

    def _row(self, number: int, captions: Sequence[str], name: str | None, url: str | None) -> Row:
        image = self._finder.find(Record((), name, url), self._path, 0, number)
        columns = {"caption": self._cleaning.captions(captions), "image_id": self._id(number)}
        return Row(image.name, (image,), columns)


def _stem(path: str) -> str:
    return posixpath.basename(path).split(".")[0]


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(first byte, line without its end) of each line. Raises DataError when there is no such file."""
    try:
        with open_input(path) as file:
            head = bytes(file.read(3))
            if head.startswith(b"\x1f\x8b"):
                raise DataError(f"{path}: is compressed, and rows are read by their place in it; unpack it")
            offset = len(head) if head == codecs.BOM_UTF8 else 0
            file.seek(offset)
            for line in cast(IO[bytes], io.BufferedReader(cast(Any, file), 1 << 20)):
                yield offset, line.rstrip(b"\r\n")
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


_SBU_JSON = re.compile(rb'\s*\{\s*"(image_urls|captions|user_ids)"\s*:\s*\[')


def _entries(files: Sequence[str]) -> Iterator[Record] | None:
    """The records of files that are one JSON value, or SBU's two text files; None for files of lines."""
    _, first = next(_lines(files[0]), (0, b""))
    if len(files) == 2 and first.startswith((b"http://", b"https://")) and b"\t" not in first:
        return _aligned(*files)
    if first.lstrip().startswith(b"["):
        return _listed(files)
    if _SBU_JSON.match(first[:4096]) or first.strip() == b"{":
        content = read_json(files[0])
        urls, captions = (content.get(name) for name in ("image_urls", "captions"))
        if not (isinstance(urls, list) and isinstance(captions, list) and len(urls) == len(captions)):
            raise DataError(f"{files[0]}: has no lists image_urls and captions of one length; is this the right file?")
        pairs = zip(urls, captions, strict=True)
        return (Record(caption_texts(caption, "its caption"), url=str(url)) for url, caption in pairs)
    return None


def _aligned(urls: str, captions: str) -> Iterator[Record]:
    addresses, texts = (read_text(path).removesuffix("\n").split("\n") for path in (urls, captions))
    if len(addresses) != len(texts):
        raise DataError(f"{captions}: has {len(texts)} lines, {urls} has {len(addresses)}; give the files of one set")
    return (Record((text,), url=address.strip()) for address, text in zip(addresses, texts, strict=True))


def _listed(files: Sequence[str]) -> Iterator[Record]:
    if len(files) > 1:
        raise DataError(f"{files[1]}: a JSON list stands alone in --annotations; convert the files one by one")
    yield from (record_of(entry) for entry in read_json(files[0]))
