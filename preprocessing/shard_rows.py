"""Rows of shards with images in them, whatever their layout; and the captions in a .txt, a .json or a table's cell."""

import os
import posixpath
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from preprocessing.image_names import EXCLUDED, ImageList
from preprocessing.image_refs import ImageRef
from preprocessing.json_text import parse_json, whole_characters
from preprocessing.rows import LazyRows
from preprocessing.schema import DataError
from preprocessing.source import Row, Source
from preprocessing.text import EMPTY, TextCleaning, lines_of

ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")


class ShardRows(LazyRows):
    """What the three layouts share: shards with images in them, of which a number and some fields are kept."""

    fields: ClassVar[np.dtype[Any]]

    def __init__(self, shards: Sequence[str], cleaning: TextCleaning, excluded: ImageList, source: Source) -> None:
        """Look through all shards for images with captions. Raises DataError naming the shard at fault."""
        self._shards = list(shards)
        self._cleaning = cleaning
        self.left_out = source.left_out
        parts, counts = [], []
        self.images: dict[str, int] = {}  # of each shard, captions or not
        for shard in self._shards:
            entries = []
            name = posixpath.basename(shard).partition(".")[0]
            self.images[name] = 0
            for key, captions, entry in self.look_through(shard):
                source.counts["images"] += 1
                self.images[name] += 1
                faults: Counter[str] = Counter()
                if excluded.holds(key):
                    source.left_out[EXCLUDED] += 1
                    continue
                if self._cleaning.captions(captions, faults):
                    entries.append((key, *entry))
                else:
                    source.left_out["image without caption"] += 1
                    del faults[EMPTY]
                source.left_out.update(faults)
            width = max((len(os.fsencode(entry[0])) for entry in entries), default=1)
            kept = np.empty(len(entries), dtype=[("key", f"S{width}"), *self.fields.descr])
            for index, (key, *values) in enumerate(entries):
                kept[index] = (os.fsencode(key), *values)  # names of files need not be UTF-8
            parts.append(kept)
            counts.append(len(entries))
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._unique = self._is_unique()

    def _is_unique(self) -> bool:
        """Whether no key stands in two shards: img2dataset's do not. Raises DataError when one stands twice in one."""
        for shard, part in zip(self._shards, self._parts, strict=True):
            keys, counts = np.unique(part["key"], return_counts=True)
            if len(keys) < len(part):
                raise DataError(
                    f"{shard}: key {whole_characters(os.fsdecode(keys[counts > 1][0]))} stands twice; make keys unique"
                )
        keys = np.concatenate([part["key"] for part in self._parts])
        keys.sort()
        return not bool((keys[1:] == keys[:-1]).any())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """See LazyRows."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        entry = self._parts[number][index - int(self._starts[number])]
        key = os.fsdecode(entry["key"])
        captions, image = self.at(self._shards[number], key, entry)
        name = posixpath.basename(self._shards[number]).partition(".")[0]
        image_id = whole_characters(key if self._unique else f"{name}/{key}")
        kept = self._cleaning.captions(captions)
        if not kept:
            where = f"{self._shards[number]}: image {image_id}"
            raise DataError(f"{where}: has no caption any more; it changed since the run began, start again")
        return Row(image_id, (image,), {"caption": kept, "image_id": image_id})

    @abstractmethod
    def look_through(self, shard: str) -> Iterator[tuple[str, Sequence[str], tuple[Any, ...]]]:
        """(key, captions, values of `fields`) of each image of a shard."""

    @abstractmethod
    def at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        """Captions and image of an entry."""


def decode(text: bytes, as_json: bool) -> Sequence[str]:
    """The captions of a .txt or of a .json file; none where it has none."""
    if not as_json:
        return lines_of(text.decode("utf-8", "replace"))
    try:
        record = parse_json(text)
    except ValueError:
        return ()
    found = (texts_in(record.get(name)) for name in CAPTION_COLUMNS) if isinstance(record, dict) else ()
    return next((texts for texts in found if texts), ())


def texts_in(value: Any) -> Sequence[str]:
    """The captions in a value: it is one, or a list of them, of which those that are null are empty."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        return [text or "" for text in value]
    return ()
