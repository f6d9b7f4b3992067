"""`python -m preprocessing flickr30k`: Flickr30k -> caption shards.

From Karpathy's dataset_flickr30k.json, which holds the splits (29,000 + 1,014 + 1,000 images), or from the captions'
own file, results_20130124.token, which holds none: then `--only` names the images of the split.
"""

import argparse
import posixpath

from preprocessing.convert import add_common_arguments, check_common_arguments, write_split
from preprocessing.files import read_json, read_text
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
from preprocessing.schema import DataError
from preprocessing.source import Row, Source
from preprocessing.text import TextCleaning, add_text_argument, text_cleaning

_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flickr30k`."""
    parser.add_argument(
        "--annotations", required=True, metavar="FILE", help="dataset_flickr30k.json or results_20130124.token"
    )
    parser.add_argument(
        "--only", metavar="FILE", help="of a .token file, keep the images that this file names, one a line"
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
            print(f"--only {file}: {found} of {names} images found")
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
    """One row an image, in the order of the file; its lines are `1000092795.jpg#0<tab>caption`.

    Raises DataError naming the line at fault.
    """
    captions: dict[str, list[str]] = {}
    source = Source("caption", [], [path], {"images": 0, "captions": 0})
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        label, tab, text = line.partition("\t")
        name, mark, place = label.rpartition("#")
        if not (tab and mark and place.isdigit()):
            raise DataError(f"{path}: line {number}: is not 'image.jpg#0<tab>caption'; is this the right file?")
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
