"""A catalog of photos -> caption shards: the worked example of docs/extending.md.

CATALOG holds one JSON object per line: {"number": 17, "photo": "17.jpg", "titles": ["a red ring", "a ring"]}.
"""

import argparse

from preprocessing.formats.annotations import field, read_json_lines
from preprocessing.images.exclusion import EXCLUDED, add_exclude_argument, excluded_images
from preprocessing.images.image_folder import ImageFolder
from preprocessing.running.storage import storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Row, Source
from preprocessing.text.cleaning import add_text_argument, text_cleaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: one of our own, and those that all converters have."""
    parser.add_argument("--catalog", required=True, metavar="FILE", help="JSON lines: number, photo, titles")
    add_exclude_argument(parser)  # --exclude, --allow-unmatched
    add_text_argument(parser)  # --text-cleaning
    add_common_arguments(parser)  # --images, --split, --out, --workers, --max-dropped ...


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input; main() prints it and ends with exit code 2."""
    check_common_arguments(args, "caption")
    catalog = storage_path(args.catalog)  # a local path or a URI
    images, excluded, cleaning = ImageFolder(args.images), excluded_images(args), text_cleaning(args)
    rows: list[Row] = []
    source = Source("caption", rows, [catalog], {"images": 0, "captions": 0})
    for line, record in read_json_lines(catalog, source.faults.add):
        where = f"{catalog}: line {line}"
        with source.faults:  # a record at fault is counted under --max-dropped, with its line
            photo = field(record, "photo", str, where)
            number = str(field(record, "number", int, where))
            titles = field(record, "titles", list, where)
            source.counts["images"] += 1
            source.counts["captions"] += len(titles)
            captions = cleaning.captions(titles, source.left_out)
            if excluded.match(photo, number):
                source.left_out[EXCLUDED] += 1
            elif not captions:
                source.left_out["image without caption"] += 1
            else:
                rows.append(Row(photo, (images.find(photo),), {"caption": captions, "image_id": number}))
    write_split(source, args)
