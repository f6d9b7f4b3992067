"""The image files in a folder, and what of it cannot be looked at."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from eve_ds.predict.image_index import Broken
from preprocessing.errors import UserError
from preprocessing.local_files import replace_surrogates

ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
GONE = (errno.ENOENT, errno.ELOOP)  # a link to nothing, or a file deleted meanwhile


class ImageFile(NamedTuple):
    """A file by its path relative to the folder; ``mtime_ns`` is the time of its last change."""

    path: str
    size: int
    mtime_ns: int


def find_images(folder: Path) -> tuple[list[ImageFile], list[Broken], dict[str, str]]:
    """The image files in a folder and below, by their endings, sorted; names with a leading dot are left out.

    Links are followed, and each folder is visited once, so that loops end.

    Returns:
        the files, those that cannot be looked at, and {path: reason} of folders and files that are hidden: they cannot
        be looked at, as for want of permission, but may be as they were.
    Raises:
        UserError: no such folder, or nothing is found because of a folder that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give one of image files")
    found, broken, visited = [], [], set()
    hidden: dict[str, str] = {}

    def hide(error: OSError) -> None:
        if error.errno not in GONE:
            hidden[os.path.relpath(error.filename, folder)] = str(error.strerror)

    for place, folders, names in os.walk(folder, followlinks=True, onerror=hide):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            image = name.lower().endswith(ENDINGS)
            if name.startswith(".") or not (image or os.path.islink(os.path.join(place, name))):
                continue  # a link may be to a folder of which this cannot be told now
            path = os.path.relpath(os.path.join(place, name), folder)
            try:
                status = os.stat(os.path.join(place, name))
                if image and replace_surrogates(path) != path:
                    broken.append(Broken(replace_surrogates(path), "its name is not UTF-8"))
                elif image and stat.S_ISREG(status.st_mode):
                    found.append(ImageFile(path, status.st_size, status.st_mtime_ns))
            except OSError as error:
                hide(error)
                if image:
                    broken.append(Broken(replace_surrogates(path), str(error.strerror)))
    if hidden and not found:
        place, reason = next(iter(hidden.items()))
        raise UserError(f"{folder / place}: cannot be read ({reason}); see that it can be read")
    return sorted(found), broken, hidden


def hiding(path: str, hidden: Mapping[str, str]) -> str | None:
    """Which of the hidden files and folders the path is, or is below."""
    return next((each for each in (path, *map(str, PurePath(path).parents)) if each in hidden), None)
