"""Rows of img2dataset's and similar shards: the base of the three layouts."""

import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord
from preprocessing.formats.caption_columns import parse_side_json
from preprocessing.images.exclusion import EXCLUDED, ImageList
from preprocessing.images.image_refs import ImageRef
from preprocessing.local_files import replace_surrogates
from preprocessing.sources.lazy_rows import LazyRows
from preprocessing.sources.source import Row, Source
from preprocessing.sources.split_names import SPLIT_FIELD, RecordSplits, split_of
from preprocessing.text.cleaning import EMPTY, TextCleaning

ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_TEXT = 16 << 20  # bytes of an image's .txt or .json
_SPLIT_NAME = json.dumps(SPLIT_FIELD).encode()


@dataclass(frozen=True)
class Wanted:
    """The options that select and clean rows."""

    split: str
    cleaning: TextCleaning = field(default_factory=TextCleaning)
    excluded: ImageList = field(default_factory=lambda: ImageList(()))
    columns: Sequence[str] = ()  # --caption-column
    images_only: bool = False  # --images-only


@dataclass(frozen=True)
class Shard:
    """A file or folder of images: its path, and its name in the data set without an extension."""

    path: str
    name: str


@dataclass(slots=True)
class FoundImage:
    """An image of a shard: its key, captions, values of `fields`, and other names that exclusion lists may use."""

    key: str
    captions: Sequence[str]
    entry: tuple[Any, ...]
    names: tuple[str, ...] = ()
    other_split: bool = False  # it is of another split
    fault: BadRecord | None = None  # what is wrong with it, if something is


class ShardRows(LazyRows):
    """Rows of shards with images in them. In memory are the key and a few `fields` of each image.

    Attributes:
        images: shard name -> number of its images, with captions or without.
        splits: the splits that the images name. The caller calls its `report`.
    """

    fields: ClassVar[np.dtype[Any]]

    def __init__(self, shards: Sequence[Shard], wanted: Wanted, source: Source) -> None:
        """Look through all shards for images with captions. Raises UserError naming the shard at fault."""
        self._shards = list(shards)
        self._wanted = wanted
        self._source: Source | None = source
        self.splits = RecordSplits(wanted.split)
        parts, counts = [], []
        self.images: dict[str, int] = {}
        for shard in self._shards:
            entries = []
            count = 0
            for found in self.scan_shard(shard.path):
                count += 1
                source.counts["images"] += not found.other_split
                if found.other_split:
                    self._wanted.excluded.match(
                        found.key, *found.names
                    )  # counts the match: a list of another split is no mistake
                elif self._is_kept(found, source):
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
        self._source = None  # it refers to these rows

    def _is_kept(self, found: FoundImage, source: Source) -> bool:
        """Whether an image becomes a row. If not, it is counted."""
        faults = Counter[str]()
        if found.fault is not None:
            source.faults.add(found.fault)
        elif self._wanted.excluded.match(found.key, *found.names):
            source.left_out[EXCLUDED] += 1
        elif self._wanted.images_only:
            return True
        elif self._wanted.cleaning.captions(found.captions, faults):
            source.left_out.update(faults)
            return True
        else:
            source.left_out["image without caption"] += 1
            del faults[EMPTY]
            source.left_out.update(faults)
        return False

    def count_left_out(self, reason: str) -> None:
        """Count an entry that does not become a row, by reason."""
        assert self._source is not None  # only during the scan
        self._source.left_out[reason] += 1

    def note_split(self, found: FoundImage, record: bytes, where: str) -> None:
        """Set `other_split`, or `fault`, of a valid image by its .json (b"" for none)."""
        if found.fault is not None:
            return
        try:
            found.other_split = self.splits.is_other_split(where, _split_in(record))
        except BadRecord as error:
            found.fault = error
        except ValueError as error:
            found.fault = unreadable_text(where, error)

    def _is_unique(self) -> bool:
        """Whether no key is in two shards: img2dataset's do not. Raises UserError when one is twice in a shard."""
        for shard, part in zip(self._shards, self._parts, strict=True):
            keys, counts = np.unique(part["key"], return_counts=True)
            if len(keys) < len(part):
                raise duplicate_key(shard.path, os.fsdecode(keys[counts > 1][0]))
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
        captions, image = self.read_entry(shard.path, key, entry)
        image_id = replace_surrogates(key if self._unique or not shard.name else f"{shard.name}/{key}")
        kept = [] if self._wanted.images_only else self._wanted.cleaning.captions(captions)
        if not kept and not self._wanted.images_only:
            where = f"{shard.path}: image {image_id}"
            raise UserError(f"{where}: has no caption any more; it changed since the run began, start again")
        return Row(image_id, (image,), {"caption": kept, "image_id": image_id})

    @abstractmethod
    def scan_shard(self, shard: str) -> Iterator[FoundImage]:
        """Yield the images of a shard."""

    @abstractmethod
    def read_entry(self, shard: str, key: str, entry: Any) -> tuple[Sequence[str], ImageRef]:
        """Captions and image of an entry."""


def _split_in(record: bytes) -> Any:
    """The split that a .json names; None if it names none. Raises ValueError when it cannot be parsed."""
    if _SPLIT_NAME not in record.lower():
        return None
    fields = parse_side_json(record)
    return split_of(fields) if isinstance(fields, dict) else None


def unreadable_text(where: str, why: object) -> BadRecord:
    """The fault of an image whose text cannot be read."""
    return BadRecord(replace_surrogates(where), f"{why}; fix it, or take it out", "text of an image is unreadable")


def duplicate_key(shard: str, key: str) -> UserError:
    """The error for a key that two images or two texts of a shard have."""
    return UserError(f"{shard}: key {replace_surrogates(key)} occurs twice; make keys unique")
