"""`python -m preprocessing coco`: COCO captions JSON (captions_train2014.json and its like) -> caption shards."""

import argparse
from pathlib import Path

from preprocessing.convert import Row, Source, add_common_arguments, check_common_arguments, write_split
from preprocessing.files import field, read_json
from preprocessing.schema import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `coco`."""
    parser.add_argument("--annotations", required=True, metavar="FILE", help="captions_*.json of COCO")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises DataError on bad input."""
    check_common_arguments(args, "caption")
    write_split(read_coco(Path(args.annotations), Path(args.images)), args)


def read_coco(annotations: Path, images: Path) -> Source:
    """One row an image, in the order of the file's `images`; captions in the order of its `annotations`.

    An image lies at `images/file_name`, or, as in COCO's archives, in a folder below named for its subset. Raises
    DataError naming the record at fault.
    """
    content = read_json(annotations)
    names: dict[int, str] = {}
    for index, record in enumerate(field(content, "images", list, f"{annotations}")):
        where = f"{annotations}: images[{index}]"
        image_id = field(record, "id", int, where)
        if image_id in names:
            raise DataError(f"{where}: id {image_id} stands twice; make ids unique")
        names[image_id] = field(record, "file_name", str, where)
    captions: dict[int, list[str]] = {image_id: [] for image_id in names}
    source = Source("caption", [], [annotations], {})
    records = field(content, "annotations", list, f"{annotations}")
    for index, record in enumerate(records):
        where = f"{annotations}: annotations[{index}]"
        image_id = field(record, "image_id", int, where)
        if image_id not in names:
            raise DataError(f"{where}: image_id {image_id} is none of the file's images; fetch the file again")
        caption = field(record, "caption", str, where).strip()
        if caption:
            captions[image_id].append(caption)
        else:
            source.left_out["caption is empty"] += 1
    for image_id, name in names.items():
        if captions[image_id]:
            columns = {"caption": captions[image_id], "image_id": str(image_id)}
            source.rows.append(Row(name, (_locate(images, name),), columns))
        else:
            source.left_out["image without caption"] += 1
    source.counts = {"images": len(names), "captions": len(records)}
    return source


def _locate(images: Path, name: str) -> Path:
    """Where the image is: COCO's archives unpack to train2014/COCO_train2014_*.jpg; file_name has no folder."""
    direct = images / name
    parts = Path(name).name.split("_")
    if len(parts) == 3 and parts[0] == "COCO" and not direct.exists():
        nested = images / parts[1] / name
        if nested.exists():
            return nested
    return direct
