"""Finds image files in a folder by any of their usual names."""

import re
from collections.abc import Sequence

from preprocessing.images.image_refs import ImageRef, image_in, join
from preprocessing.running.storage import names_in, storage_path

_ENDINGS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff")
_COCO = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")
_SEPARATOR = re.compile(r"[/\\]")
_COCO_SUBSETS = ("train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017")
COCO_FOLDERS = (*_COCO_SUBSETS, "images", "image", *(f"images/{name}" for name in _COCO_SUBSETS))


def image_key(name: str) -> str:
    """The key of an image, equal in all releases: the name without folder and extension; for COCO the number.

    So train2014/COCO_train2014_000000000009.jpg and 000000000009.jpg (2017) are both "coco:9".
    """
    base = _SEPARATOR.split(name)[-1]
    stem, dot, ending = base.rpartition(".")
    if not dot or ending.lower() not in _ENDINGS:
        stem = base
    match = _COCO.fullmatch(stem)
    return coco_key(int(match[1])) if match else stem


def coco_key(number: int) -> str:
    """The key of a COCO image by its number."""
    return f"coco:{number}"


class ImageFolder:
    """Finds image files by name or key in `folder` and in its subfolders named in `below`."""

    def __init__(self, folder: str, below: Sequence[str] = COCO_FOLDERS) -> None:
        self._folder = folder
        self._names: set[str] = set()
        self._by_key: dict[str, str] = {}
        top = names_in(storage_path(folder))
        for sub in ("", *(name for name in below if name.split("/")[0] in top)):
            for entry in names_in(storage_path(join(folder, sub))) if sub else top:
                name = f"{sub}/{entry}" if sub else entry
                self._names.add(name)
                self._by_key.setdefault(image_key(entry), name)

    def contains(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return name in self._names

    def find(self, name: str, key: str | None = None) -> ImageRef:
        """The file of that name, else the one with the same key, else a reference to `name`, which does not exist."""
        found = name if name in self._names else self._by_key.get(key or image_key(name), name)
        return image_in(self._folder, found)
