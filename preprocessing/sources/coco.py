"""`python -m preprocessing coco`: COCO captions (captions_train2014.json and its like, or Karpathy's) -> shards.

Several annotation files become one split: EVE pre-trains on train2014 and val2014 without the images of its test list.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, field, read_json
from preprocessing.images.exclusion import EXCLUDED, ImageList, add_exclude_argument, excluded_images
from preprocessing.images.image_folder import ImageFolder
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.karpathy import is_karpathy, read_karpathy
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.sources.split_names import RecordSplits, split_of
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `coco`."""
    parser.add_argument(
        "--annotations", required=True, nargs="+", metavar="FILE", help="captions_*.json of COCO, or dataset_coco.json"
    )
    parser.add_argument(
        "--no-restval", action="store_true", help="leave restval of a Karpathy file out of the train split"
    )
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "caption")
    files = [storage_path(name) for name in args.annotations]
    content = read_json(files[0])
    cleaning, excluded, images = text_cleaning(args), excluded_images(args), ImageFolder(args.images)
    if is_karpathy(content):
        if len(files) > 1:
            raise UserError(f"{files[1]}: a Karpathy file must be the only one in --annotations; leave out the others")
        source = read_karpathy(content, files[0], images, args.split, cleaning, excluded, not args.no_restval)
    else:
        contents = [content, *(read_json(path) for path in files[1:])]
        parsed = list(zip(files, contents, strict=True))
        source = read_coco(parsed, images, cleaning, excluded, RecordSplits(args.split))
    write_split(source, args)


def read_coco(
    files: Sequence[tuple[StoragePath, Any]],
    images: ImageFolder,
    cleaning: TextCleaning,
    excluded: ImageList,
    splits: RecordSplits,
) -> Source:
    """One row an image, in the order of the files' `images`; captions in the order of their `annotations`.

    An image is at `images/file_name`, or, as in COCO's archives, in a subfolder named after its subset, with its name
    of 2014 or of 2017. Raises UserError naming the record at fault.
    """
    source = Source("caption", [], [path for path, _ in files], {"images": 0, "captions": 0})
    rows: list[Row] = []
    seen: set[int] = set()
    for path, content in files:
        names, skipped = _read_images(path, content, seen, splits, source.faults)
        captions: dict[int, list[str]] = {image_id: [] for image_id in names}
        for image_id, name in skipped.items():
            excluded.match(name, str(image_id))  # counts the match: a list of another split is no mistake
        for index, record in enumerate(field(content, "annotations", list, f"{path}")):
            where = f"{path}: annotations[{index}]"
            with source.faults:
                image_id = field(record, "image_id", int, where)
                if image_id in skipped or ((named := split_of(record)) and splits.is_other_split(where, named)):
                    continue
                if image_id not in names:
                    what = f"image_id {image_id} is none of the file's images; fetch the file again"
                    raise BadRecord(where, what, "caption of an image that the file has not")
                captions[image_id].append(field(record, "caption", str, where))
                source.counts["captions"] += 1
        source.counts["images"] += len(names)
        for image_id, name in names.items():
            if excluded.match(name, str(image_id)):
                source.left_out[EXCLUDED] += 1
                continue
            texts = cleaning.captions(captions[image_id], source.left_out)
            if texts:
                rows.append(Row(name, (images.find(name),), {"caption": texts, "image_id": str(image_id)}))
            else:
                source.left_out["image without caption"] += 1
    source.rows = rows
    splits.report(source)
    return source


def _read_images(
    path: StoragePath, content: Any, seen: set[int], splits: RecordSplits, faults: Faults
) -> tuple[dict[int, str], dict[int, str]]:
    """Two dicts image id -> file name: the images of this split, and those of other splits or at fault.

    `seen` has the ids of the files before, and gets those of this one.
    """
    names: dict[int, str] = {}
    skipped: dict[int, str] = {}
    for index, record in enumerate(field(content, "images", list, f"{path}")):
        where = f"{path}: images[{index}]"
        with faults:
            image_id = field(record, "id", int, where)
            if image_id in seen:
                raise UserError(f"{where}: id {image_id} occurs twice; make ids unique")
            seen.add(image_id)
            skipped[image_id] = str(record.get("file_name"))
            if not splits.is_other_split(where, split_of(record)):
                names[image_id] = field(record, "file_name", str, where)
                del skipped[image_id]
    return names, skipped
