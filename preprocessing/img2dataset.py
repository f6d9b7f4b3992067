"""`python -m preprocessing img2dataset`: what img2dataset wrote (github.com/rom1504/img2dataset) -> caption shards.

webdataset   00000.tar with KEY.jpg, KEY.txt and KEY.json; any webdataset tar of images with texts will do
parquet      00000.parquet with the columns key, jpg, txt and what is known of the address; Hugging Face's with
             image {bytes, path} too
files        00000/KEY.jpg, KEY.txt and KEY.json
00000_stats.json beside each shard tells how many addresses gave no image.
"""

import argparse
import posixpath
from collections.abc import Sequence

from preprocessing.convert import add_common_arguments, check_common_arguments, write_split
from preprocessing.files import read_json
from preprocessing.folder_rows import FolderRows
from preprocessing.image_names import ImageList, add_exclude_argument, excluded_images
from preprocessing.image_refs import join
from preprocessing.json_text import whole_characters
from preprocessing.parquet_rows import ParquetRows
from preprocessing.places import names_in, place
from preprocessing.schema import DataError
from preprocessing.shard_rows import ShardRows
from preprocessing.source import Source
from preprocessing.tar_rows import TarRows
from preprocessing.text import TextCleaning, add_text_argument, text_cleaning

FORMATS = ("auto", "webdataset", "parquet", "files")


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
    kinds: dict[str, tuple[type[ShardRows], list[str]]] = {
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


def _compare(files: Sequence[str], rows: ShardRows) -> None:
    """Raise DataError where a shard has other images than its statistics say."""
    for path in files:
        shard = path.removesuffix("_stats.json")
        said, found = read_json(path)["successes"], rows.images.get(posixpath.basename(shard))
        if found is not None and said != found:
            raise DataError(
                f"{path}: says {said} successes, the shard holds {found} images; fetch the shard again, or move that "
                "file away"
            )
