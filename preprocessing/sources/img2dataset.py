"""`python -m preprocessing img2dataset`: what img2dataset wrote (github.com/rom1504/img2dataset) -> caption shards.

webdataset   00000.tar with KEY.jpg, KEY.txt and KEY.json, in any order; any webdataset tar of images with texts will do
parquet      00000.parquet with the columns key, jpg, txt and what is known of the address; Hugging Face's with
             image {bytes, path} too; of a column split the rows of --split
files        00000/KEY.jpg, KEY.txt and KEY.json
With --images-only each image becomes a row, whether it has a caption or not, and none is stored: for pre-training on
images alone, a source of `data.sources` with `modality: image`.

00000_stats.json beside each shard counts the URLs without an image. Shards may be in subfolders. If their names contain
splits (train-00000.tar, validation/00000.tar), those of --split are used.
"""

import argparse
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from preprocessing.errors import UserError
from preprocessing.formats.annotations import find_copies, read_json
from preprocessing.formats.caption_columns import add_caption_column_argument
from preprocessing.formats.folder_rows import FolderRows, is_image
from preprocessing.formats.parquet_rows import ParquetRows
from preprocessing.formats.shard_rows import Shard, ShardRows, Wanted
from preprocessing.formats.tar_rows import TarRows
from preprocessing.images.exclusion import add_exclude_argument, excluded_images
from preprocessing.images.image_refs import join
from preprocessing.local_files import replace_surrogates
from preprocessing.running.storage import storage_path, walk
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Source
from preprocessing.sources.split_names import names_of_split
from preprocessing.text.cleaning import add_text_argument, text_cleaning

FORMATS = ("auto", "webdataset", "parquet", "files")
_STATISTICS = "_stats.json"
_ENDINGS = {"webdataset": ".tar", "parquet": ".parquet"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ROWS: dict[str, type[ShardRows]] = {"webdataset": TarRows, "parquet": ParquetRows, "files": FolderRows}
_WHAT = {"webdataset": ".tar files", "parquet": ".parquet files", "files": "folders of images"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `img2dataset`."""
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the folder (default: detected)")
    add_caption_column_argument(parser)
    parser.add_argument("--images-only", action="store_true", help="images alone: captions are not needed nor stored")
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "caption")
    write_split(read_folder(args.images, args.format, wanted_rows(args)), args)


def wanted_rows(args: argparse.Namespace) -> Wanted:
    """The options that select rows. Raises UserError naming the list or option at fault."""
    images_only = getattr(args, "images_only", False)  # of img2dataset alone
    if images_only and args.caption_column:
        raise UserError("--images-only: stores no captions; leave it or --caption-column out")
    return Wanted(args.split, text_cleaning(args), excluded_images(args), tuple(args.caption_column), images_only)


def read_folder(folder: str, layout: str, wanted: Wanted) -> Source:
    """A row for each image that has a caption (or may lack one) and is not excluded, in the order of the shards.

    Shards may be in subfolders. Raises UserError when the folder holds no such files, and naming the file at fault.
    """
    found = _find(folder)
    kind = found.layout(folder) if layout == "auto" else layout
    names = found.shards[kind]
    if found.compressed and (kind == "webdataset" or not names):
        raise UserError(f"{folder}: {found.compressed[0]} is compressed, and images are read by their place; unpack it")
    if not names:
        raise UserError(f"{folder}: holds no {_WHAT[kind]}; give another --format, or the folder that holds them")
    ending = _ENDINGS.get(kind, "")
    shards = [
        Shard(join(folder, name) if name else folder, name.removesuffix(ending))
        for name in names_of_split(folder, names, wanted.split)
    ]
    others = {name.removesuffix(ending) for name in names} - {shard.name for shard in shards}  # of other splits
    counted = [name for name in found.statistics if name.removesuffix(_STATISTICS) not in others]
    statistics = [join(folder, name) for name in counted]
    modality = "image" if wanted.images_only else "pairs"
    source = Source("caption", [], statistics, {"images": 0}, numbered=("image_id",), modality=modality)
    rows = _ROWS[kind](shards, wanted, source)
    source.rows = rows
    rows.splits.report(source, folder)
    if kind != "files":
        _report_copies([shard.path for shard in shards if rows.images[shard.name]], source)
    _add_statistics(statistics, source)
    _check_statistics(folder, counted, rows)
    return source


@dataclass
class _Contents:
    """The contents of a folder and its subfolders: shards of each layout, statistics, compressed files."""

    shards: dict[str, list[str]]
    captioned: bool  # whether any image has a text beside it; otherwise the images are in parquet files
    statistics: list[str]
    compressed: list[str]

    def layout(self, folder: str) -> str:
        """The detected layout. Raises UserError when there are two, or none."""
        if self.shards["webdataset"] and self.captioned:
            raise UserError(f"{folder}: holds tars, and folders of images with texts; say with --format which to use")
        if self.captioned:
            return "files"  # the parquet files beside folders of images hold no images
        kind = next((kind for kind, names in self.shards.items() if names), None)
        if kind is None and not self.compressed:
            raise UserError(
                f"{folder}: holds no .tar or .parquet files and no folders of images; name img2dataset's output"
            )
        return kind or "webdataset"


def _find(folder: str) -> _Contents:
    found = _Contents({"webdataset": [], "parquet": [], "files": []}, False, [], [])
    for below, names in walk(storage_path(folder)):
        paths = [posixpath.join(below, name) for name in names]
        for kind, ending in _ENDINGS.items():
            found.shards[kind] += [path for path in paths if path.endswith(ending)]
        found.statistics += [path for path in paths if path.endswith(_STATISTICS)]
        found.compressed += [path for path in paths if path.endswith(_COMPRESSED)]
        images = {name.rpartition(".")[0] for name in names if is_image(name)}
        if images:
            found.shards["files"].append(below)
            texts = (name.rpartition(".") for name in names)
            found.captioned |= any(kind in ("txt", "json") and stem in images for stem, _, kind in texts)
    return found


def _report_copies(shards: Sequence[str], source: Source) -> None:
    """Count shards that exist under two names. Shards without images may be equal by chance."""
    if twice := list(find_copies(shards)):
        source.counts["shards that are there twice"] = len(twice)
        more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
        what = f"{twice[0][0]} and {twice[0][1]}{more}: are one file under two names; its images are there twice"
        source.notes.append(f"warning: {what}, so move one of them away")


def _add_statistics(files: Sequence[str], source: Source) -> None:
    """Count the URLs, and those without an image. Raises UserError naming the file at fault."""
    lost = 0
    for path in files:
        if replace_surrogates(path) != path:  # the provenance file, which is UTF-8, names it
            raise UserError(f"{path!r}: has no UTF-8 name; rename it and its shard")
        record = read_json(path)
        count, got = (record.get(name) if isinstance(record, dict) else None for name in ("count", "successes"))
        if not (isinstance(count, int) and isinstance(got, int)):
            what = "successes" if isinstance(count, int) else "count"
            raise UserError(f"{path}: has no number '{what}'; fetch img2dataset's file again, or move it away")
        source.counts["addresses"] = source.counts.get("addresses", 0) + count
        lost += count - got
    if lost:
        source.counts["addresses without an image"] = lost


def _check_statistics(folder: str, files: Sequence[str], rows: ShardRows) -> None:
    """Raise UserError when a shard and its statistics differ in the number of images."""
    for name in files:
        said, found = read_json(join(folder, name))["successes"], rows.images.get(name.removesuffix(_STATISTICS), 0)
        if said != found:
            raise UserError(
                f"{join(folder, name)}: says {said} successes, the shard holds {found} images; fetch the shard again, "
                "or move that file away"
            )
