"""Map-style datasets over prepared shards: dataset[sample, epoch] -> what one sample adds to a batch.

A sample is one text of a row with the row's images: a caption, a question (tasks/vqa.py), a statement (tasks/nlvr.py).
Its `sample_id`, which all random choices made for it depend on, is epoch x n + sample: unique in a run, the same on any
rank and in any batch. The look-ups (text, image_bytes ...) are for evaluation and reports.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eve_ds.data.shards import Row, RowError, Split
from eve_ds.data.sources import AnySplit, JoinedSplit
from eve_ds.data.transforms import Transform, may_mirror
from preprocessing.errors import UserError
from preprocessing.shards.schema import IMAGE_COLUMNS, SAMPLE_COLUMN
from preprocessing.text.tokenizer import Tokenizer

DECODED_BYTES = 128 << 20  # of decoded images kept by a process; filled once, since all rows come equally often
Sample = dict[str, Any]
Key = tuple[int, int]  # (sample index, epoch)


class Pending(NamedTuple):
    """An image that is yet to be read and decoded: number `image` of the row's."""

    row: Row
    sample_id: int
    mirror: bool
    image_number: int = 0


class Samples(ABC):
    """What the kinds of data set have in common.

    Args:
        directory: a prepared split folder of this kind, or a split that is open already.
        tokenizer: of the text.
        transform: of the images.
        max_text_length: longest text, tokens, [CLS] and [SEP] included.
        vocab_size: of the model; None if there is none to check against.
    Raises:
        UserError: the split is broken or of another kind, or the tokenizer has ids beyond the model's vocabulary.
    """

    kind = ""  # of the shards: caption, vqa or nlvr
    plural = "samples"  # what people call them, as manifests do in "source"
    images: tuple[str, ...] = ("images",)  # the names of a sample's images
    num_classes = 0  # of the task's head, where the data tell it

    def __init__(
        self,
        directory: str | os.PathLike[str] | AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        max_text_length: int,
        vocab_size: int | None = None,
    ) -> None:
        self.split: AnySplit = directory if isinstance(directory, Split | JoinedSplit) else Split(directory)
        self.tokenizer = tokenizer
        self.transform = transform
        self.max_text_length = max_text_length
        self._decoded: dict[tuple[Path, int, str], np.ndarray] = {}  # images that will come out the same again
        if self.split.kind != self.kind:
            raise UserError(
                f"{self.split.name}: holds {self.split.kind} data, {self.kind} data is needed; prepare it with "
                "another converter or choose the task that it is for"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{tokenizer.path or 'tokenizer'}: its token ids go up to {tokenizer.vocab_size - 1}, beyond the "
                f"model's vocabulary; set model.vocab_size to {tokenizer.vocab_size}, or train a tokenizer of at most "
                f"{vocab_size} entries"
            )

    def __len__(self) -> int:
        return self.split.samples

    @property
    def rows(self) -> int:
        return self.split.rows

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def __getitem__(self, key: Key) -> Sample:
        return self.complete(self.describe(key))

    @abstractmethod
    def describe(self, key: Key) -> Sample:
        """A sample but for its pixels: where its images are (`Pending`) stands in their place.

        The loader describes all samples of a batch, then completes them: it takes a third less time than by turns with
        the decoders, which leave nothing else in the processor's caches.
        """

    def complete(self, described: Sample) -> Sample:
        """The sample with its pixels. Raises RowError naming shard and row where an image cannot be decoded."""
        return {name: self._pixels(item) if isinstance(item, Pending) else item for name, item in described.items()}

    def text(self, sample: int) -> str:
        """The sample's caption, question or statement."""
        _, row, item = self.split.sample(sample)
        return row_text(row, SAMPLE_COLUMN[self.kind], item)

    def image_bytes(self, sample: int, image_number: int = 0) -> bytes:
        """The file of one of the sample's images, as it was prepared."""
        _, row, _ = self.split.sample(sample)
        return row.blob(IMAGE_COLUMNS[self.kind][image_number])

    def sample_id(self, key: Key) -> int:
        """Unique in a run: see the top of this file."""
        sample, epoch = key
        return int(epoch) * len(self) + int(sample)

    def tokenize(self, text: str) -> np.ndarray:
        """[l] int64 token ids, l at most `max_text_length`."""
        return np.array(self.tokenizer.encode(text, self.max_text_length), dtype=np.int64)

    def _pixels(self, pending: Pending) -> np.ndarray:
        """[H, W, 3] uint8."""
        row, sample_id, mirror, image_number = pending
        column = IMAGE_COLUMNS[self.kind][image_number]
        key = (row.path, row.number, column)
        if key in self._decoded:
            return self._decoded[key]
        data = row.blob(column)
        try:
            pixels = self.transform(data, sample_id, mirror, image_number)
        except UserError as error:
            raise RowError(row.where, f"{error}; prepare the split again to drop such images") from error
        if not self.transform.is_random and len(self._decoded) * pixels.nbytes < DECODED_BYTES:
            self._decoded[key] = pixels
        return pixels


class CaptionSamples(Samples):
    """Images with captions; a sample is one caption with its image.

    dataset[sample, epoch] -> images [H,W,3] uint8, text_ids [l] int64, sample_id, image_index (the row)
    """

    kind = "caption"
    plural = "captions"

    def describe(self, key: Key) -> Sample:
        image_index, row, item = self.split.sample(int(key[0]))
        sample_id = self.sample_id(key)
        text = row_text(row, "caption", item)
        return {
            "images": Pending(row, sample_id, may_mirror([text])),
            "text_ids": self.tokenize(text),
            "sample_id": sample_id,
            "image_index": image_index,
        }

    def row_image_bytes(self, image_index: int) -> bytes:
        """The file of image `image_index`."""
        return self.split.row(image_index).blob("image")

    def text_image_index(self) -> np.ndarray:
        """[samples] int64: the image of every caption."""
        return self.split.sample_rows()


class CaptionImages(CaptionSamples):
    """Every image of a caption split once, without text.

    dataset[image_index, epoch] -> images, sample_id (in evaluation the image_index), image_index
    """

    def __len__(self) -> int:
        return self.split.rows

    def describe(self, key: Key) -> Sample:
        sample_id, image_index = self.sample_id(key), int(key[0])
        image = Pending(self.split.row(image_index), sample_id, True)
        return {"images": image, "sample_id": sample_id, "image_index": image_index}


def row_text(row: Row, column: str, item: int) -> str:
    """Entry `item` of a text column. Raises RowError naming shard and row where that is no text."""
    value = row.item(column, item)
    if not isinstance(value, str):
        raise RowError(row.where, f"column {column!r} entry {item} is {value!r}, not text; prepare the split again")
    return value
