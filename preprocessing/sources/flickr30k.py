"""`python -m preprocessing flickr30k`: Flickr30k -> caption shards.

The input is Karpathy's dataset_flickr30k.json, which has the splits (29,000 + 1,014 + 1,000 images), or a file of
captions without splits; then `--only` names the images of the split. Such files are

results_20130124.token   1000092795.jpg#0<tab>caption
results.csv              a header image_name| comment_number| comment, and lines of that form (Kaggle)
captions.txt             a header image,caption or image,comment_number,comment, and CSV (Kaggle; Flickr8k's, too); a
                         quoted caption may run over ten lines, and is one line of words then
"""

import argparse
import csv
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from preprocessing.errors import UserError, printable, shortened
from preprocessing.formats.annotations import BadRecord, read_json, text_lines
from preprocessing.images.exclusion import (
    EXCLUDED,
    ImageList,
    add_exclude_argument,
    excluded_images,
    read_image_names,
)
from preprocessing.images.image_folder import ImageFolder
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.karpathy import is_karpathy, read_karpathy
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.sources.split_names import SPLIT_FIELD, RecordSplits
from preprocessing.text.cleaning import MAX_CHARACTERS, TextCleaning, add_text_argument, text_cleaning

_FOLDERS = (
    *("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images"),
    *("Images", "images", "image", "Flicker8k_Dataset"),
)
_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "comment")
_MAX_LINES = 10  # of a quoted caption
Captioned = tuple[str, str, str | None]  # image, caption, value of its split field
_NUMBERED = re.compile(r"\s*\d+\s+(\S.*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flickr30k`."""
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="FILE",
        help="dataset_flickr30k.json, results_20130124.token, results.csv, captions.txt",
    )
    parser.add_argument(
        "--only", metavar="FILE", help="of a file of captions alone, keep the images that this file names, one a line"
    )
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "caption")
    path = storage_path(args.annotations)
    cleaning, excluded, images = text_cleaning(args), excluded_images(args), ImageFolder(args.images, _FOLDERS)
    if not path.name.endswith(".json"):
        only = None if args.only is None else ImageList(read_image_names(storage_path(args.only)), args.only)
        source = read_tokens(path, images, cleaning, excluded, only, RecordSplits(args.split))
        for file, names, found in only.counts() if only is not None else ():
            print(printable(f"--only {file}: {found} of {names} images found"))
        write_split(source, args)
        return
    content = read_json(path)
    if not is_karpathy(content):
        raise UserError(f"{path}: is not Karpathy's JSON; give dataset_flickr30k.json or results_20130124.token")
    if args.only is not None:
        raise UserError(f"--only {args.only}: {path} names the images of each split itself; leave out --only")
    write_split(read_karpathy(content, path, images, args.split, cleaning, excluded), args)


def read_tokens(
    path: StoragePath,
    images: ImageFolder,
    cleaning: TextCleaning,
    excluded: ImageList,
    only: ImageList | None,
    splits: RecordSplits,
) -> Source:
    """One row an image, in the order of the file. Raises UserError when an image id is that of two files."""
    captions: dict[str, list[str]] = {}
    source = Source("caption", [], [path], {"images": 0, "captions": 0})
    for where, (name, text, split) in _captions_in(path, source.faults):
        with source.faults:
            if splits.is_other_split(where, split):
                for listed in (excluded, only or excluded):
                    listed.match(name)  # a list of another split is one of this set
                continue
            captions.setdefault(name, []).append(text)
            source.counts["captions"] += 1
    rows: list[Row] = []
    owner: dict[str, str] = {}
    source.counts["images"] = len(captions)
    for name, texts in captions.items():
        image_id = posixpath.splitext(name)[0]
        if owner.setdefault(image_id, name) != name:
            raise UserError(f"{path}: image id {image_id} stands for {owner[image_id]} and for {name}; rename one")
        out = excluded.match(name)
        if only is not None and not only.match(name):
            source.left_out["image is not listed in --only"] += 1
        elif out:
            source.left_out[EXCLUDED] += 1
        elif kept := cleaning.captions(texts, source.left_out):
            rows.append(Row(name, (images.find(name),), {"caption": kept, "image_id": image_id}))
        else:
            source.left_out["image without caption"] += 1
    source.rows = rows
    splits.report(source)
    return source


def _captions_in(path: StoragePath, faults: Faults) -> Iterator[tuple[str, Captioned]]:
    """(where, record) of each valid record: a line, or a few lines with one quoted caption."""
    lines: list[tuple[int, str]] = []
    for number, line in text_lines(path):
        if isinstance(line, BadRecord):
            faults.add(line)
        elif lines or line.strip():
            lines.append((number, line))
    table = _table(lines[0][1]) if lines else None
    what = (
        "'image.jpg#0<tab>caption'"
        if table is None
        else f"of the form of its header, {shortened(repr(lines[0][1].strip()))}"
    )
    index = 0 if table is None else 1
    while index < len(lines):
        number, line = lines[index]
        found, used = (_token(line), 1) if table is None else table.record(lines[index : index + _MAX_LINES])
        if found is not None:
            yield f"{path}: line {number}", found
        elif line.strip():
            problem = f"is not {what}; is this the right file?"
            faults.add(BadRecord(f"{path}: line {number}", problem, "line is of another form"))
        index += used


def _token(line: str) -> Captioned | None:
    label, tab, text = line.partition("\t")
    name, mark, place = label.rpartition("#")
    return (name, text, None) if tab and mark and place.isdigit() else None


def _table(header: str) -> "_Table | None":
    """The table below a header; None if the line is no header."""
    for separator in "|,\t":
        names = [name.strip().strip('"').lower() for name in header.split(separator)]
        image = next((names.index(name) for name in _IMAGE_COLUMNS if name in names), None)
        caption = next((names.index(name) for name in _CAPTION_COLUMNS if name in names), None)
        if image is not None and caption is not None:
            split = names.index(SPLIT_FIELD) if SPLIT_FIELD in names else None
            return _Table(separator, image, caption, split, len(names))
    return None


@dataclass(frozen=True)
class _Table:
    """The form of the lines below a header."""

    separator: str
    image: int  # columns
    caption: int
    split: int | None
    columns: int

    def record(self, lines: Sequence[tuple[int, str]]) -> tuple[Captioned | None, int]:
        """(record, number of lines used) of the record that begins in the first of these (number, text) lines.

        The record is None, and one line used, when the first line is invalid: it has an open quotation that does not
        end in these lines, or not before the next record.
        """
        (number, text), *following = lines
        found = self._cells([text])
        if found is not None or self.separator == "|" or not text.count('"') % 2:  # Kaggle's results.csv does not quote
            return found, 1
        record = [text]
        name = self._name(text)
        for next_number, line in following:
            record.append(line)
            lost = next_number != number + len(record) - 1  # a line between them is invalid
            if lost or self._begins_record(line, name) or sum(map(len, record)) > MAX_CHARACTERS:
                break
            if sum(one.count('"') for one in record) % 2 == 0:
                found = self._cells(record)
                return found, 1 if found is None else len(record)
        return None, 1

    def _name(self, line: str) -> str:
        """The value in the image column of a line."""
        return (line.split(self.separator) + [""] * self.columns)[self.image].strip().strip('"')

    def _begins_record(self, line: str, name: str) -> bool:
        """Whether a line has an image name in its image column, as the record with `name` has: a new record begins."""
        own = self._name(line)
        return bool(own) and " " not in own and posixpath.splitext(own)[1] == posixpath.splitext(name)[1]

    def _cells(self, lines: Sequence[str]) -> Captioned | None:
        """(image, caption, split) of a record in one line or several; None if it is invalid."""
        cells = self._split(lines)
        if len(cells) == self.columns - 1 == self.caption and (numbered := _NUMBERED.fullmatch(cells[-1])):
            cells[-1:] = ["", numbered[1]]  # Kaggle's results.csv has a line without its second mark
        if len(cells) != self.columns or not cells[self.image].strip():
            return None
        caption = cells[self.caption]
        if len(lines) > 1:
            caption = " ".join(filter(None, map(str.strip, caption.split("\n"))))
        return cells[self.image].strip(), caption, None if self.split is None else cells[self.split].strip()

    def _split(self, lines: Sequence[str]) -> list[str]:
        """The cells of a record; none for an open quotation and for several lines that are no record.

        In a single line without quotation, the last cell takes the rest of the line.
        """
        if self.separator != "|" and '"' in lines[0]:
            try:
                read = csv.reader(
                    [f"{line.rstrip(chr(13))}\n" for line in lines], delimiter=self.separator, strict=True
                )
                cells = next(read)
            except csv.Error:
                cells = []
            if len(cells) == self.columns or lines[0].count('"') % 2:
                return cells
        return lines[0].split(self.separator, self.columns - 1)
