"""webdataset's tars -> rows."""

import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from preprocessing.image_refs import ImageRef, TarMember
from preprocessing.json_text import whole_characters
from preprocessing.places import open_input
from preprocessing.schema import DataError
from preprocessing.shard_rows import ENDINGS, ShardRows, decode

_DOTTED = tuple(f".{ending}" for ending in ENDINGS)
_CHUNK = 1 << 20


class TarRows(ShardRows):
    """webdataset: the places of image and text in the tar. A key ends at the first dot of a name."""

    fields = np.dtype(
        [("image", "i8"), ("image_bytes", "i8"), ("text", "i8"), ("text_bytes", "i4"), ("json", "?"), ("ending", "i1")]
    )

    def look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        try:
            with open_input(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                group: dict[str, tarfile.TarInfo] = {}
                key = None
                for member in tar:
                    cast(Any, tar).members = []  # tarfile keeps all that it has seen
                    if not member.isfile():
                        continue
                    stem, _, ending = posixpath.basename(member.name).partition(".")
                    stem = posixpath.join(posixpath.dirname(member.name), stem)
                    if stem != key:
                        if key is not None:
                            yield from self._entry(file, key, group)
                        key, group = stem, {}
                    ending = ending.lower()
                    if ending in group:
                        raise DataError(f"{shard}: key {whole_characters(key)} stands twice; make keys unique")
                    if "." in ending and ending.endswith(_DOTTED):
                        self.left_out["image name has a second dot"] += 1
                    group[ending] = member
                if key is not None:
                    yield from self._entry(file, key, group)
                _check_end(file, tar.offset)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{shard}: is no whole tar ({error}); fetch it again") from None

    def _entry(
        self, file: Any, key: str, group: dict[str, tarfile.TarInfo]
    ) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        ending = next((ending for ending in ENDINGS if ending in group), None)
        if ending is None:
            return
        image, text = group[ending], group.get("txt") or group.get("json")
        if text is None:
            yield key, (), (image.offset_data, image.size, 0, 0, False, 0)
            return
        as_json = "txt" not in group
        back = file.tell()
        file.seek(text.offset_data)
        captions = decode(bytes(file.read(text.size)), as_json)
        file.seek(back)
        where = (image.offset_data, image.size, text.offset_data, text.size, as_json, ENDINGS.index(ending))
        yield key, captions, where

    def at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        with open_input(shard) as file:
            file.seek(int(entry["text"]))
            captions = decode(bytes(file.read(int(entry["text_bytes"]))), bool(entry["json"]))
        name = f"{key}.{ENDINGS[int(entry['ending'])]}"
        return captions, TarMember(shard, int(entry["image"]), int(entry["image_bytes"]), name)


def _check_end(file: Any, end: int) -> None:
    """Raise TarError unless at byte `end`, where tarfile stopped, there is a block of zeros, and nothing else follows.

    It takes for an archive's end what is no header, the end of the file, and a header that a disk has lost to zeros.
    """
    file.seek(end)
    zeros = 0
    while data := bytes(file.read(_CHUNK)):
        if data.count(0) < len(data):
            raise tarfile.TarError(f"no header and no end at byte {end}, behind which more follows")
        zeros += len(data)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.TarError(f"no end at byte {end}")
