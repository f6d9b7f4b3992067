"""Which image a name means: finding files in a folder, and lists of images to keep out or to keep."""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from preprocessing.files import read_json, read_text
from preprocessing.image_refs import ImageRef, image_in, join
from preprocessing.places import Place, names_in, place
from preprocessing.schema import DataError

_ENDINGS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff")
_COCO = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")
COCO_FOLDERS = ("train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017")


def image_key(name: str) -> str:
    """A name that one image has in any release: without folder and ending, and for COCO its number alone.

    So train2014/COCO_train2014_000000000009.jpg and 000000000009.jpg (2017) are both "coco:9".
    """
    base = name.rsplit("/", 1)[-1]
    stem, dot, ending = base.rpartition(".")
    if not dot or ending.lower() not in _ENDINGS:
        stem = base
    match = _COCO.fullmatch(stem)
    return coco_key(int(match[1])) if match else stem


def coco_key(number: int) -> str:
    """The key of a COCO image by its number."""
    return f"coco:{number}"


class ImageFolder:
    """Finds image files by name, by key, or by COCO number, in `folder` and in those of `below` that it holds."""

    def __init__(self, folder: str, below: Sequence[str] = COCO_FOLDERS) -> None:
        self._folder = folder
        self._names: set[str] = set()
        self._by_key: dict[str, str] = {}
        top = names_in(place(folder))
        for sub in ("", *(name for name in below if name in top)):
            for entry in names_in(place(join(folder, sub))) if sub else top:
                name = f"{sub}/{entry}" if sub else entry
                self._names.add(name)
                self._by_key.setdefault(image_key(entry), name)

    def holds(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return name in self._names

    def find(self, name: str, key: str | None = None) -> ImageRef:
        """The file of that name, else the one with its key; where there is none, where `name` would be."""
        found = name if name in self._names else self._by_key.get(key or image_key(name), name)
        return image_in(self._folder, found)


class ImageList:
    """Names of images, as a list file has them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {form for name in names for form in (name, image_key(name))}

    def __bool__(self) -> bool:
        return bool(self._names)

    def holds(self, *names: str) -> bool:
        """Whether the list has an image of which `names` are the file's name, its id, or its key."""
        return bool(self._names) and any(name in self._names or image_key(name) in self._names for name in names)


def add_exclude_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--exclude`."""
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out the images that these files name: X-VLM JSON, COCO JSON, test split of a Karpathy JSON, the "
        "list of `duplicates find`, or text with a name or id a line",
    )


EXCLUDED = "image is listed in --exclude"


def excluded_images(args: argparse.Namespace) -> ImageList:
    """The images of all `--exclude` files. Raises DataError naming the file at fault."""
    return ImageList(name for path in args.exclude for name in read_image_names(place(path)))


def read_image_names(path: Place) -> Iterator[str]:
    """The images that a list file names; see `add_exclude_argument`. Raises DataError when it is none of those."""
    if not path.name.endswith(".json"):
        yield from (line.strip() for line in read_text(path).splitlines() if line.strip())
        return
    content = read_json(path)
    records = content
    if isinstance(content, dict):
        records = next((content[name] for name in ("images", "duplicates", "questions") if name in content), None)
    if not isinstance(records, list):
        raise DataError(f"{path}: is no list of images in a known form; give one image name a line in a .txt file")
    for index, record in enumerate(records):
        if isinstance(record, dict) and "split" in record and record["split"] != "test":
            continue  # Karpathy's file holds all splits
        names = list(_names_of(record))
        if not names:
            raise DataError(f"{path}: record {index}: names no image; give one image name a line in a .txt file")
        yield from names


def _names_of(record: Any) -> Iterator[str]:
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for name in ("file_name", "filename", "image"):
            if isinstance(record.get(name), str):
                yield record[name]
                return
        if isinstance(record.get("images"), list):
            yield from (name for name in record["images"] if isinstance(name, str))
        elif isinstance(record.get("image_id"), str | int):
            yield str(record["image_id"])
