"""Folders of images, each with its text beside it -> rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from preprocessing.image_refs import FileImage, ImageRef, join
from preprocessing.places import names_in, open_input, place
from preprocessing.schema import DataError
from preprocessing.shard_rows import ENDINGS, ShardRows, decode


class FolderRows(ShardRows):
    """files: the ending of each image as it is spelled, and whether its text is JSON."""

    fields = np.dtype([("ending", "S4"), ("json", "?")])

    def look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        names = names_in(place(shard))
        known = set(names)
        for name in names:
            stem, _, ending = name.rpartition(".")
            if ending.lower() not in ENDINGS:
                continue
            text = next((f"{stem}.{kind}" for kind in ("txt", "json") if f"{stem}.{kind}" in known), None)
            as_json = text is not None and text.endswith(".json")
            captions = () if text is None else _read_captions(join(shard, text), as_json)
            yield stem, captions, (ending.encode(), as_json)

    def at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        as_json = bool(entry["json"])
        captions = _read_captions(join(shard, f"{key}.{'json' if as_json else 'txt'}"), as_json)
        return captions, FileImage(join(shard, f"{key}.{entry['ending'].decode()}"))


def _read_captions(path: str, as_json: bool) -> Sequence[str]:
    """The captions in a file; none where a link leads nowhere. Raises DataError when it cannot be read."""
    try:
        with open_input(path) as file:
            return decode(bytes(file.read()), as_json)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); mend it, or move it away") from None
