"""Rows of shards with images in them, whatever their layout."""

import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from preprocessing.errors import DataError
from preprocessing.formats.annotations import BadRecord
from preprocessing.images.exclusion import EXCLUDED, ImageList
from preprocessing.images.image_refs import ImageRef
from preprocessing.json_text import parse_json, replace_surrogates
from preprocessing.sources.lazy_rows import LazyRows
from preprocessing.sources.source import Row, Source
from preprocessing.sources.split_names import SPLIT_FIELD, RecordSplits, split_of
from preprocessing.text.cleaning import EMPTY, TextCleaning

ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_TEXT = 16 << 20  # bytes of an image's .txt or .json
_NAMED = json.dumps(SPLIT_FIELD).encode()


@dataclass(frozen=True)
class Wanted:
    """What the options say of the rows."""

    split: str
    cleaning: TextCleaning = field(default_factory=TextCleaning)
    excluded: ImageList = field(default_factory=lambda: ImageList(()))
    columns: Sequence[str] = ()  # --caption-column


@dataclass(frozen=True)
class Shard:
    """A file or folder of images: where it is, and its name in the set, without an ending."""

    path: str
    name: str


@dataclass(slots=True)
class Found:
    """An image of a shard: its key, captions, values of `fields`, and by what exclusion lists may call it besides."""

    key: str
    captions: Sequence[str]
    entry: tuple[Any, ...]
    names: tuple[str, ...] = ()
    other: bool = False  # whether it is of another split
    fault: BadRecord | None = None  # what is wrong with it, if something is


class ShardRows(LazyRows):
    """What the three layouts share: shards with images in them, of which a number and some fields are kept.

    Attributes:
        images: of each shard's name, how many it holds, with captions or without.
        splits: what the images name as theirs; `tell` is the caller's to call.
    """

    fields: ClassVar[np.dtype[Any]]

    def __init__(self, shards: Sequence[Shard], wanted: Wanted, source: Source) -> None:
        """Look through all shards for images with captions. Raises DataError naming the shard at fault."""
        self._shards = list(shards)
        self._wanted = wanted
        self._source: Source | None = source
        self.splits = RecordSplits(wanted.split)
        parts, counts = [], []
        self.images: dict[str, int] = {}
        for shard in self._shards:
            entries = []
            count = 0
            for found in self.look_through(shard.path):
                count += 1
                source.counts["images"] += not found.other
                if found.other:
                    self._wanted.excluded.holds(found.key, *found.names)  # a list of another split is one of this set
                elif self._keeps(found, source):
                    entries.append((found.key, *found.entry))
            self.images[shard.name] = count
            width = max((len(os.fsencode(entry[0])) for entry in entries), default=1)
            kept = np.empty(len(entries), dtype=[("key", f"S{width}"), *self.fields.descr])
            for index, (key, *values) in enumerate(entries):
                kept[index] = (os.fsencode(key), *values)  # names of files need not be UTF-8
            parts.append(kept)
            counts.append(len(entries))
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._unique = self._is_unique()
        self._source = None  # it holds these rows

    def _keeps(self, found: Found, source: Source) -> bool:
        """Whether an image becomes a row; else it is counted."""
        faults = Counter[str]()
        if found.fault is not None:
            source.faults.add(found.fault)
        elif self._wanted.excluded.holds(found.key, *found.names):
            source.left_out[EXCLUDED] += 1
        elif self._wanted.cleaning.captions(found.captions, faults):
            source.left_out.update(faults)
            return True
        else:
            source.left_out["image without caption"] += 1
            del faults[EMPTY]
            source.left_out.update(faults)
        return False

    def leave_out(self, reason: str) -> None:
        """Count what is no image, and still not passed over in silence."""
        assert self._source is not None  # only while the shards are looked through
        self._source.left_out[reason] += 1

    def note_split(self, found: Found, record: bytes, where: str) -> None:
        """Note of a sound image whether its .json, b"" for none, names another split, or none where others do."""
        if found.fault is not None:
            return
        try:
            found.other = self.splits.skip_at(where, _split_in(record))
        except BadRecord as error:
            found.fault = error
        except ValueError as error:
            found.fault = unreadable(where, error)

    def _is_unique(self) -> bool:
        """Whether no key stands in two shards: img2dataset's do not. Raises DataError when one stands twice in one."""
        for shard, part in zip(self._shards, self._parts, strict=True):
            keys, counts = np.unique(part["key"], return_counts=True)
            if len(keys) < len(part):
                raise twice(shard.path, os.fsdecode(keys[counts > 1][0]))
        keys = np.concatenate([part["key"] for part in self._parts])
        keys.sort()
        return not bool((keys[1:] == keys[:-1]).any())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """See LazyRows."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        entry = self._parts[number][index - int(self._starts[number])]
        key, shard = os.fsdecode(entry["key"]), self._shards[number]
        captions, image = self.at(shard.path, key, entry)
        image_id = replace_surrogates(key if self._unique or not shard.name else f"{shard.name}/{key}")
        kept = self._wanted.cleaning.captions(captions)
        if not kept:
            where = f"{shard.path}: image {image_id}"
            raise DataError(f"{where}: has no caption any more; it changed since the run began, start again")
        return Row(image_id, (image,), {"caption": kept, "image_id": image_id})

    @abstractmethod
    def look_through(self, shard: str) -> Iterator[Found]:
        """The images of a shard."""

    @abstractmethod
    def at(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        """Captions and image of an entry."""


def _split_in(record: bytes) -> Any:
    """What a .json names as its split; None for nothing. Raises ValueError where that cannot be read."""
    if _NAMED not in record.lower():
        return None
    fields = parse_json(record)
    return split_of(fields) if isinstance(fields, dict) else None


def unreadable(where: str, why: object) -> BadRecord:
    """What to say of an image's text that cannot be read for what it is."""
    return BadRecord(replace_surrogates(where), f"{why}; mend it, or take it out", "text of an image is unreadable")


def twice(shard: str, key: str) -> DataError:
    """What to say of a key that two images or two texts of a shard have."""
    return DataError(f"{shard}: key {replace_surrogates(key)} stands twice; make keys unique")
