"""`python -m preprocessing flickr30k`: Flickr30k -> caption shards.

From Karpathy's dataset_flickr30k.json, which holds the splits (29,000 + 1,014 + 1,000 images), or from a file of
captions alone, which holds none: then `--only` names the images of the split. Such files are

results_20130124.token   1000092795.jpg#0<tab>caption
results.csv              a header image_name| comment_number| comment, and lines of that form (Kaggle)
captions.txt             a header image,caption or image,comment_number,comment, and CSV (Kaggle; Flickr8k's, too)
"""

import argparse
import csv
import posixpath
import re
from collections.abc import Callable, Iterator

from preprocessing.convert import add_common_arguments, check_common_arguments, write_split
from preprocessing.files import BadRecord, read_json, text_lines
from preprocessing.image_names import (
    EXCLUDED,
    ImageFolder,
    ImageList,
    add_exclude_argument,
    excluded_images,
    read_image_names,
)
from preprocessing.karpathy import is_karpathy, read_karpathy
from preprocessing.places import Place, place
from preprocessing.schema import DataError, printable
from preprocessing.source import Faults, Row, Source
from preprocessing.text import TextCleaning, add_text_argument, text_cleaning

_FOLDERS = (
    *("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images"),
    *("Images", "images", "image", "Flicker8k_Dataset"),
)
_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "comment")
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
    """Convert one split. Raises DataError on bad input."""
    check_common_arguments(args, "caption")
    path = place(args.annotations)
    cleaning, excluded, images = text_cleaning(args), excluded_images(args), ImageFolder(args.images, _FOLDERS)
    if not path.name.endswith(".json"):
        only = None if args.only is None else ImageList(read_image_names(place(args.only)), args.only)
        source = read_tokens(path, images, cleaning, excluded, only)
        for file, names, found in only.found() if only is not None else ():
            print(printable(f"--only {file}: {found} of {names} images found"))
        write_split(source, args)
        return
    content = read_json(path)
    if not is_karpathy(content):
        raise DataError(f"{path}: is not Karpathy's JSON; give dataset_flickr30k.json or results_20130124.token")
    if args.only is not None:
        raise DataError(f"--only {args.only}: {path} names the images of each split itself; leave --only away")
    write_split(read_karpathy(content, path, images, args.split, cleaning, excluded), args)


def read_tokens(
    path: Place, images: ImageFolder, cleaning: TextCleaning, excluded: ImageList, only: ImageList | None
) -> Source:
    """One row an image, in the order of the file. Raises DataError where an image id stands for two files."""
    captions: dict[str, list[str]] = {}
    source = Source("caption", [], [path], {"images": 0, "captions": 0})
    for name, text in _captions_in(path, source.faults):
        captions.setdefault(name, []).append(text)
        source.counts["captions"] += 1
    rows: list[Row] = []
    owner: dict[str, str] = {}
    source.counts["images"] = len(captions)
    for name, texts in captions.items():
        image_id = posixpath.splitext(name)[0]
        if owner.setdefault(image_id, name) != name:
            raise DataError(f"{path}: image id {image_id} stands for {owner[image_id]} and for {name}; rename one")
        out = excluded.holds(name)
        if only is not None and not only.holds(name):
            source.left_out["image is not listed in --only"] += 1
        elif out:
            source.left_out[EXCLUDED] += 1
        elif kept := cleaning.captions(texts, source.left_out):
            rows.append(Row(name, (images.find(name),), {"caption": kept, "image_id": image_id}))
        else:
            source.left_out["image without caption"] += 1
    source.rows = rows
    return source


def _captions_in(path: Place, faults: Faults) -> Iterator[tuple[str, str]]:
    """(image, caption) of each line that is not blank and not at fault."""
    lines: list[tuple[int, str]] = []
    for number, line in text_lines(path):
        if isinstance(line, BadRecord):
            faults.add(line)
        elif line.strip():
            lines.append((number, line))
    parse = _table(lines[0][1]) if lines else None
    what = "'image.jpg#0<tab>caption'" if parse is None else f"of the form of its header, {lines[0][1].strip()[:60]!r}"
    for number, line in lines if parse is None else lines[1:]:
        found = (parse or _token)(line)
        if found is not None:
            yield found
        else:
            told = f"is not {what}; is this the right file?"
            faults.add(BadRecord(f"{path}: line {number}", told, "line is of another form"))


def _token(line: str) -> tuple[str, str] | None:
    label, tab, text = line.partition("\t")
    name, mark, place = label.rpartition("#")
    return (name, text) if tab and mark and place.isdigit() else None


def _table(header: str) -> Callable[[str], tuple[str, str] | None] | None:
    """What parses the lines below a header; None for a line that is none."""
    for separator in "|,\t":
        names = [name.strip().strip('"').lower() for name in header.split(separator)]
        image = next((names.index(name) for name in _IMAGE_COLUMNS if name in names), None)
        caption = next((names.index(name) for name in _CAPTION_COLUMNS if name in names), None)
        if image is not None and caption is not None:
            return lambda line: _cells(line, separator, image, caption, len(names))
    return None


def _cells(line: str, separator: str, image: int, caption: int, columns: int) -> tuple[str, str] | None:
    """(image, caption) of a line of a table; None where it is none."""
    cells = _split(line, separator, columns)
    if len(cells) == columns - 1 == caption and (numbered := _NUMBERED.fullmatch(cells[-1])):
        cells[-1:] = ["", numbered[1]]  # Kaggle's results.csv has a line without its second mark
    return (cells[image].strip(), cells[caption]) if len(cells) == columns and cells[image].strip() else None


def _split(line: str, separator: str, columns: int) -> list[str]:
    """The cells of a line, the last of which takes the rest where it is not quoted; none where a quotation is open."""
    if separator != "|" and '"' in line:  # Kaggle's results.csv does not quote
        try:
            cells = next(csv.reader([line.rstrip("\r")], delimiter=separator, strict=True))
        except csv.Error:
            cells = []
        if len(cells) == columns or line.count('"') % 2:
            return cells
    return line.split(separator, columns - 1)
