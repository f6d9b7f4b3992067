"""Rows of caption files with image names, addresses or base64: what SBU, CC3M and CC12M share."""

import hashlib
import posixpath
import re
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, find_copies, read_json, text_lines
from preprocessing.formats.line_records import BadLine, Form, Record, caption_texts, find_form, parse_line, record_of
from preprocessing.formats.lines import TOO_LONG, CutFile, first_bytes, is_compressed, open_text, read_lines
from preprocessing.images.exclusion import EXCLUDED, ImageList
from preprocessing.images.image_refs import Base64Cell, FileImage, ImageRef, image_in
from preprocessing.local_files import json_excerpt
from preprocessing.running.storage import exists, storage_path
from preprocessing.sources.lazy_rows import LazyRows
from preprocessing.sources.source import Row, Source
from preprocessing.sources.split_names import RecordSplits
from preprocessing.text.cleaning import TextCleaning

NAME_FIELDS: dict[str, Callable[[int, str], object]] = {
    "row": lambda row, url: row,
    "url_name": lambda row, url: url_name(url),
    "crc32": lambda row, url: zlib.crc32(url.encode()),
    "md5": lambda row, url: hashlib.md5(url.encode(), usedforsecurity=False).hexdigest(),
    "sha1": lambda row, url: hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest(),
}
_SLICE = 1024  # entries
_SNIFFED = 4096  # bytes from the start of a file that decide whether it is one of lines
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif")


def url_name(url: str) -> str:
    """The file name at the end of a URL."""
    return unquote(posixpath.basename(urlsplit(url).path))


class ImageFinder:
    """Finds the image of a record: base64 in its line, the file it names, or the file that its URL was saved as."""

    def __init__(self, images: str | None, template: str | None) -> None:
        self._images = images
        self._template = template

    def check(self, record: Record) -> None:
        """Raise BadLine when the record has nothing by which its image could be found."""
        if record.cell is not None:
            return
        if self._images is None:
            what = "holds no image itself; name the folder of the downloaded ones with --images"
            raise BadLine(what, "record holds no image")
        if record.file is None and record.url is None:
            what = "names neither an image file nor an address; fix the file"
            raise BadLine(what, "record names no image")
        if record.file is None and self._template is None:
            what = "names no image file; say with --image-name how the files are called, such as '{row:07d}'"
            raise BadLine(what, "record names no image file")

    def find(self, record: Record, path: str, offset: int, row: int) -> ImageRef:
        """The image of the record in row `row` (from 0) of `path`, whose line starts at byte `offset`."""
        if record.cell is not None:
            first, length = record.cell
            return Base64Cell(path, offset + first, length, f"{posixpath.basename(path)} row {row}")
        assert self._images is not None  # by check()
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
    splits: RecordSplits,
) -> Source:
    """A row for each line or entry that has a caption, is not excluded, and does not name another split.

    Raises UserError naming the file and the record at fault.
    """
    for first, other in find_copies(files):
        raise UserError(f"{first} and {other}: are one file under two names; give it once")
    stems = [_stem(name) for name in files]
    if again := [stem for stem, count in Counter(stems).items() if count > 1]:
        raise UserError(f"--annotations: two files are called {again[0]}, which image ids begin with; rename one")
    source = Source("caption", [], [storage_path(name) for name in files], {}, numbered=("image_id",))
    keeper = _RowFilter(source, finder, cleaning, excluded, splits)
    listed = _entries(files)
    if listed is None:
        source.rows = LineRows(files, columns, finder, cleaning, keeper)
    else:
        source.rows = EntryRows(files[0], *listed, finder, keeper)
    splits.report(source)
    return source


class _RowFilter:
    """Decides which records become rows, and counts those that do not."""

    def __init__(
        self, source: Source, finder: ImageFinder, cleaning: TextCleaning, excluded: ImageList, splits: RecordSplits
    ) -> None:
        self._source = source
        self._cleaning = cleaning
        self._excluded = excluded if excluded else None
        self._splits = splits
        self._finder = finder
        source.counts["captions"] = 0

    def fault(self, where: str, what: object, reason: str) -> None:
        """Count a bad record."""
        self._source.faults.add(BadRecord(where, str(what), reason))

    def captions(self, record: Record, image_id: str) -> list[str]:
        """The cleaned captions of a record that becomes a row; an empty list if it does not become one.

        Raises BadLine when the record has no image, or names no known split.
        """
        out = self._excluded is not None and self._excluded.match(record.file or url_name(record.url or ""), image_id)
        if record.split is None and not self._splits.named and self._splits.unnamed:  # the usual case, without a call
            self._splits.unnamed += 1
        else:
            try:
                if self._splits.is_other_split(image_id, record.split):
                    return []
            except BadRecord as error:
                raise BadLine(error.what, error.reason) from None
        self._finder.check(record)
        self._source.counts["captions"] += len(record.captions)
        if out:
            self._source.left_out[EXCLUDED] += 1
            return []
        kept = self._cleaning.captions(record.captions, self._source.left_out)
        if not kept and len(record.captions) != 1:
            self._source.left_out["image without caption"] += 1
        return kept


class LineRows(LazyRows):
    """The lines of TSV or JSON-lines files. Offset, length and number of each line are in memory: 20 bytes a line."""

    def __init__(
        self,
        files: Sequence[str],
        columns: Sequence[str] | None,
        finder: ImageFinder,
        cleaning: TextCleaning,
        keeper: _RowFilter,
    ) -> None:
        """Read all lines once to find those that become rows. Raises UserError naming the file at fault."""
        self._files = list(files)
        self._finder = finder
        self._cleaning = cleaning
        self._forms = [_form(path, columns) for path in files]
        # Arrays that grow in place: concatenating parts would need two copies of twelve million rows at once.
        self._offset, self._length, self._number = array("q"), array("i"), array("q")
        self._ends: list[int] = []  # of each file, in these
        for number in range(len(files)):
            self._index(number, keeper)
            self._ends.append(len(self._offset))

    def _index(self, file: int, keeper: _RowFilter) -> None:
        """Add the lines of a file that become rows. Lines are numbered from 0."""
        path, form = self._files[file], self._forms[file]
        packed = is_compressed(path)
        number = 0
        try:
            for line_number, (offset, line) in enumerate(_lines(path), 1):
                if (line_number == 1 and form.header) or (line is not None and not line.strip()):
                    continue
                try:
                    if line is None:
                        raise BadLine(TOO_LONG, "line is too long")
                    record = parse_line(line, form)
                    if keeper.captions(record, self._id(file, number)):
                        self._offset.append(offset)
                        self._length.append(len(line))
                        self._number.append(number)
                    if packed and record.cell is not None:
                        raise UserError(f"{path}: is compressed, and images in it are read by their place; unpack it")
                except BadLine as error:
                    keeper.fault(f"{path}: line {line_number}", error, error.reason)
                number += 1
        except CutFile as error:
            keeper.fault(f"{path}: line {error.line}", error, "lines are lost: a file is cut")

    def __len__(self) -> int:
        return len(self._offset)

    def _id(self, file: int, number: int) -> str:
        return f"{_stem(self._files[file])}-{number}"

    def __iter__(self) -> Iterator[Row]:
        for file, (start, end) in enumerate(pairwise([0, *self._ends])):
            with open_text(self._files[file]) as stream:
                yield from (self._read(stream, file, index) for index in range(start, end))

    def row(self, index: int) -> Row:
        """See LazyRows."""
        file = bisect_right(self._ends, index)
        with open_text(self._files[file]) as stream:
            return self._read(stream, file, index)

    def _read(self, stream: IO[bytes], file: int, index: int) -> Row:
        offset, number = self._offset[index], self._number[index]
        path = self._files[file]
        try:
            stream.seek(offset)
            record = parse_line(bytes(stream.read(self._length[index])), self._forms[file])
        except (BadLine, EOFError, zlib.error) as error:
            raise UserError(f"{path}: row {number}: {error}; it changed since the run began, start again") from None
        except OSError as error:
            raise UserError(f"{path}: row {number} cannot be read ({error.strerror or error}); start again") from None
        image = self._finder.find(record, path, offset, number)
        columns = {"caption": self._cleaning.captions(record.captions), "image_id": self._id(file, number)}
        return Row(image.name, (image,), columns)


class EntryRows(LazyRows):
    """The entries of one JSON file, or of two text files, in memory as Arrow strings."""

    def __init__(
        self,
        path: str,
        entries: Iterable[Any],
        record_of: Callable[[Any], Record],
        finder: ImageFinder,
        keeper: _RowFilter,
    ) -> None:
        """Store the entries that become rows. `record_of` makes a record of an entry, or raises BadLine."""
        self._path = path
        self._stem = _stem(path)
        self._finder = finder
        kept: list[tuple[int, list[str], str | None, str | None]] = []
        for number, entry in enumerate(entries):
            try:
                record = record_of(entry)
                if found := keeper.captions(record, self._id(number)):
                    kept.append((number, found, record.file, record.url))
            except BadLine as error:
                keeper.fault(f"{path}: entry {number}", error, error.reason)
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
        for start in range(0, len(self), _SLICE):  # converting values one by one takes three times as long
            columns = (
                self._number[start : start + _SLICE].tolist(),
                *(column[start : start + _SLICE].to_pylist() for column in self._text),
            )
            yield from map(self._row, *columns)

    def row(self, index: int) -> Row:
        """See LazyRows."""
        return self._row(int(self._number[index]), *(column[index].as_py() for column in self._text))

    def _row(self, number: int, captions: list[str], name: str | None, url: str | None) -> Row:
        image = self._finder.find(Record((), name, url), self._path, 0, number)
        columns = {"caption": captions, "image_id": self._id(number)}
        return Row(image.name, (image,), columns)


def _stem(path: str) -> str:
    return posixpath.basename(path).split(".")[0]


def _form(path: str, columns: Sequence[str] | None) -> Form:
    """The form of a file, by its first two lines. Raises UserError when it has no known form."""
    first: list[bytes | None] = []
    try:
        for _, line in islice(_lines(path), 2):
            first.append(line)
    except CutFile as error:
        if not first:
            raise UserError(f"{path}: line 1: {error}") from None
    if not first:
        raise UserError(f"{path}: is empty; fetch it again")
    if first[0] is None:
        raise UserError(f"{path}: line 1: {TOO_LONG}")
    try:
        return find_form(first[0], (*first, b"")[1] or b"", columns)
    except BadLine as error:
        raise UserError(f"{path}: line 1: {error}") from None


def _lines(path: str) -> Iterator[tuple[int, bytes | None]]:
    """What `read_lines` yields. Raises UserError when there is no such file, and CutFile."""
    try:
        with open_text(path) as file:
            yield from read_lines(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


_SBU_JSON = re.compile(rb'\s*\{\s*"(image_urls|captions|user_ids)"\s*:\s*\[')
Listed = tuple[Iterable[Any], Callable[[Any], Record]]  # entries, and what makes a record of one


def _entries(files: Sequence[str]) -> Listed | None:
    """The entries of a JSON file, or of SBU's two text files; None for files of lines."""
    try:
        first = first_bytes(files[0], _SNIFFED)
    except OSError as error:
        raise UserError(f"{files[0]}: cannot be read ({error.strerror or error}); check the path") from None
    if len(files) == 2 and first.startswith((b"http://", b"https://")) and b"\t" not in first:
        return _aligned(*files), _paired
    if first.lstrip().startswith(b"["):
        return _listed(files), record_of
    if _SBU_JSON.match(first) or first.strip() == b"{":
        content = read_json(files[0])
        urls, captions = (content.get(name) for name in ("image_urls", "captions"))
        if not (isinstance(urls, list) and isinstance(captions, list) and len(urls) == len(captions)):
            raise UserError(f"{files[0]}: has no lists image_urls and captions of one length; is this the right file?")
        return zip(urls, captions, strict=True), _paired
    return None


def _paired(entry: tuple[Any, Any]) -> Record:
    """The record of a URL and its caption. Raises BadLine."""
    url, caption = entry
    bad = next((one for one in entry if isinstance(one, BadRecord)), None)
    if bad is not None:
        raise BadLine(str(bad), bad.reason)
    if not isinstance(url, str):
        raise BadLine(f"its address is {json_excerpt(url)}, not text; fix the file", "address is no text")
    return Record(caption_texts(caption, "its caption"), url=url.strip())


def _aligned(urls: str, captions: str) -> Iterable[tuple[str | BadRecord, str | BadRecord]]:
    addresses, texts = ([line for _, line in text_lines(path)] for path in (urls, captions))
    if len(addresses) != len(texts):
        raise UserError(f"{captions}: has {len(texts)} lines, {urls} has {len(addresses)}; give the files of one set")
    return zip(addresses, texts, strict=True)


def _listed(files: Sequence[str]) -> list[Any]:
    if len(files) > 1:
        raise UserError(f"{files[1]}: a JSON list must be the only file in --annotations; convert the files one by one")
    entries = read_json(files[0])
    if not isinstance(entries, list):
        raise UserError(f"{files[0]}: is no JSON list; is this the right file?")
    return entries
