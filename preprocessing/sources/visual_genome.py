"""`python -m preprocessing visual-genome`: Visual Genome's region descriptions -> caption shards, a row an image.

region_descriptions.json  [{"id": image, "regions": [{"region_id", "image_id", "phrase", "x", "y", "width", "height"}]}]
image_data.json           [{"image_id", "url", "width", "height", "coco_id", "flickr_id"}], optional here; 1.0 has "id"

Each phrase is a caption of the whole image, as in the training of ViLT and EVE; the boxes are dropped. About half of
the images are COCO's (`coco_id`): with `--image-data`, `--exclude` matches them by their COCO names, too.
"""

import argparse
from typing import Any, cast

from preprocessing.errors import UserError
from preprocessing.formats.annotations import field, read_json
from preprocessing.images.exclusion import EXCLUDED, ImageList, add_exclude_argument, excluded_images
from preprocessing.images.image_folder import ImageFolder, coco_key
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Row, Source
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning

FOLDERS = ("VG_100K", "VG_100K_2", "images", "images/VG_100K", "images/VG_100K_2", "image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `visual-genome`."""
    parser.add_argument("--regions", required=True, metavar="FILE", help="region_descriptions.json")
    add_image_data_argument(parser)
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def add_image_data_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--image-data`."""
    parser.add_argument(
        "--image-data", metavar="FILE", help="image_data.json: lets --exclude know images by their COCO names"
    )


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "caption")
    images = ImageFolder(args.images, FOLDERS)
    coco = read_coco_numbers(args.image_data)
    source = read_regions(storage_path(args.regions), images, coco, text_cleaning(args), excluded_images(args))
    write_split(source, args)


def read_coco_numbers(path: str | None) -> dict[int, int]:
    """image id -> COCO number, of the images that are COCO's; empty without a file."""
    if path is None:
        return {}
    numbers = {}
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: is no JSON list of images; give Visual Genome's image_data.json")
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        image_id = image_number(record, where)
        if record.get("coco_id") is not None:
            numbers[image_id] = field(record, "coco_id", int, where)
    return numbers


def image_number(record: Any, where: str) -> int:
    """The number of an image: field "id" in version 1.0, "image_id" in version 1.2. Raises BadRecord."""
    name = "id" if isinstance(record, dict) and "image_id" not in record and "id" in record else "image_id"
    return cast(int, field(record, name, int, where))


def image_names(image_id: int, coco: dict[int, int]) -> tuple[str, ...]:
    """The names that an exclusion list may use for an image."""
    own = (f"{image_id}.jpg", prefixed_image_id(image_id))
    return (*own, coco_key(coco[image_id])) if image_id in coco else own


def prefixed_image_id(image_id: int | str) -> str:
    """The id of an image in a data set that also has COCO's numbers as ids."""
    return f"vg-{image_id}"


def read_regions(
    path: StoragePath, images: ImageFolder, coco: dict[int, int], cleaning: TextCleaning, excluded: ImageList
) -> Source:
    """One row an image, in the order of the file. Raises UserError naming the record at fault."""
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: is no JSON list of images with regions; give region_descriptions.json")
    source = Source("caption", [], [path], {"images": len(records), "captions": 0})
    rows: list[Row] = []
    seen: set[int] = set()
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        with source.faults:
            regions = field(record, "regions", list, where)
            # Some copies have the image's number in the regions alone.
            holder = next(
                (one for one in (record, *regions[:1]) if isinstance(one, dict) and "image_id" in one), record
            )
            image_id = image_number(holder, where)
            if image_id in seen:
                raise UserError(f"{where}: image {image_id} occurs twice; make ids unique")
            seen.add(image_id)
            phrases = []
            for region in regions:
                with source.faults:
                    phrases.append(field(region, "phrase", str, where))
            source.counts["captions"] += len(phrases)
            if excluded.match(*image_names(image_id, coco)):
                source.left_out[EXCLUDED] += 1
            elif captions := cleaning.captions(phrases, source.left_out):
                name = f"{image_id}.jpg"
                rows.append(Row(name, (images.find(name),), {"caption": captions, "image_id": str(image_id)}))
            else:
                source.left_out["image without caption"] += 1
    source.rows = rows
    return source
