"""`python -m preprocessing sbu | cc3m | cc12m`: captions with image URLs, and the downloaded images -> shards.

`--annotations` accepts TSV, JSON lines with or without the images as base64, a JSON list of {"image", "caption"} or
[file, caption], SBU's own JSON {"image_urls", "captions"}, and its two text files, URLs and captions line by line.
Without `--annotations`, `--images` is a folder that img2dataset wrote. Only captions with an image become rows;
URLs are never downloaded.
"""

import argparse
from string import Formatter

from preprocessing.errors import UserError
from preprocessing.formats.caption_columns import add_caption_column_argument
from preprocessing.formats.caption_files import NAME_FIELDS, ImageFinder, read_captions
from preprocessing.formats.line_records import IGNORED, ROLES
from preprocessing.images.exclusion import add_exclude_argument, excluded_images
from preprocessing.sources import img2dataset
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.split_names import RecordSplits
from preprocessing.text.cleaning import add_text_argument, text_cleaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the three commands."""
    add = parser.add_argument
    add("--annotations", nargs="+", metavar="FILE", help="TSV, JSON lines or JSON; without: --images is img2dataset's")
    add(
        "--columns",
        nargs="+",
        metavar="NAME",
        help=f"what the columns of a TSV without header are: {', '.join(ROLES)}, or {IGNORED}",
    )
    add(
        "--image-name",
        metavar="TEMPLATE",
        help="file of a URL's image below --images, such as '{row:07d}' or 'training/{row}_{crc32}'; fields: "
        f"{', '.join(NAME_FIELDS)}; the extension may be omitted (default for SBU: '{{url_name}}')",
    )
    add_caption_column_argument(parser)
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser, images=None)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "caption")
    if args.annotations is None:
        if args.images is None:
            raise UserError("--annotations or --images: give the captions' files, or the folder that img2dataset wrote")
        write_split(img2dataset.read_folder(args.images, "auto", img2dataset.wanted_rows(args)), args)
        return
    if args.caption_column:
        raise UserError("--caption-column: is for img2dataset's folder; of --annotations, name columns with --columns")
    excluded, cleaning = excluded_images(args), text_cleaning(args)
    template = args.image_name or ("{url_name}" if args.command == "sbu" else None)
    _check_template(template)
    finder = ImageFinder(args.images, template)
    splits = RecordSplits(args.split)
    write_split(read_captions(args.annotations, args.columns, finder, cleaning, excluded, splits), args)


def _check_template(template: str | None) -> None:
    if template is None:
        return
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        if not fields or fields - NAME_FIELDS.keys():
            raise KeyError
        template.format(**{name: make(0, "http://a/b") for name, make in NAME_FIELDS.items()})
    except (KeyError, ValueError, IndexError):
        raise UserError(f"--image-name {template}: must use the fields {{{'}, {'.join(NAME_FIELDS)}}}") from None
