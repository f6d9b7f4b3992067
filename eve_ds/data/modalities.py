"""Sources of images alone and of texts alone beside pairs, as VLMo (arXiv 2111.02358) and BEiT-3 (2208.10442) mix them.

Any caption split can be one: its texts, or its images, are then not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from eve_ds.data.samples import CaptionSamples, Key, Pending, Sample, row_text
from eve_ds.data.shards import Row, Split
from eve_ds.data.sources import AnySplit, JoinedSplit
from eve_ds.data.transforms import may_mirror

IMAGE, TEXT, PAIRS = "image", "text", "pairs"


class ImageSplit(Split):
    """A split whose samples are its images: each once in an epoch, however many captions it has."""

    modality, counted = IMAGE, "rows"

    def sample(self, index: int) -> tuple[int, Row, int]:
        """As in Split; the index within the row is 0."""
        return index, self.row(index), 0

    def sample_rows(self) -> np.ndarray:
        """As in Split."""
        return np.arange(self.rows)


class TextSplit(Split):
    """A split whose samples are its captions without the images."""

    modality = TEXT

    def read_ahead(self, samples: Iterable[int]) -> None:
        """Nothing: no image is read."""


SPLITS: dict[str, type[Split]] = {kind.modality: kind for kind in (Split, ImageSplit, TextSplit)}


def modalities_of(split: AnySplit) -> list[str]:
    """The modality of each part of a split."""
    return [part.modality for part in (split.splits if isinstance(split, JoinedSplit) else [split])]


class MixedSamples(CaptionSamples):
    """Samples of sources of several modalities: images with a caption, images alone, texts alone.

    dataset[sample, epoch] -> as ``CaptionSamples``; a text alone has a blank image, an image alone no tokens. Where
    there are sources of texts alone also ``has_image``, where there are some of images alone ``has_text``, 0 or 1: all
    batches of a run have the same columns, whatever they hold.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._modalities = modalities_of(self.split)
        self._ends = np.cumsum([samples for _, samples in self.split.parts])
        side = self.transform.image_size
        self._blank = np.zeros((side, side, 3), dtype=np.uint8)

    def describe(self, key: Key) -> Sample:
        sample = int(key[0])
        modality = self._modalities[int(np.searchsorted(self._ends, sample, side="right"))]
        has = {
            name: int(modality != lacking)
            for name, lacking in (("has_image", TEXT), ("has_text", IMAGE))
            if lacking in self._modalities
        }
        if modality == PAIRS:
            return super().describe(key) | has
        image_index, row, item = self.split.sample(sample)
        sample_id = self.sample_id(key)
        numbers = {"sample_id": sample_id, "image_index": image_index} | has
        if modality == IMAGE:
            images = Pending(row, sample_id, may_mirror([]))
            return {"images": images, "text_ids": np.zeros(0, dtype=np.int64)} | numbers
        return {"images": self._blank, "text_ids": self.tokenize(row_text(row, "caption", item))} | numbers
