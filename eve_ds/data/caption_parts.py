"""The two halves of a caption split, for passes that need one of them: texts without images, and chosen images once."""

from __future__ import annotations

from collections.abc import Sequence

from eve_ds.data.samples import CaptionImages, CaptionSamples, Key, Pending, Sample, row_text


class CaptionTexts(CaptionSamples):
    """Every caption of a split; no image is read or decoded.

    dataset[sample, epoch] -> text_ids [l] int64, sample_id, image_index (the row)

    Args:
        dataset: over the split.
    """

    images = ()

    def __init__(self, dataset: CaptionSamples) -> None:
        super().__init__(dataset.split, dataset.tokenizer, dataset.transform, dataset.max_text_length)

    def describe(self, key: Key) -> Sample:
        image_index, row, item = self.split.sample(int(key[0]))
        text = self.tokenize(row_text(row, "caption", item))
        return {"text_ids": text, "sample_id": self.sample_id(key), "image_index": image_index}


class ChosenImages(CaptionImages):
    """Some images of a caption split, in an order of one's own, without text.

    dataset[place, epoch] -> images [H,W,3] uint8, sample_id (in evaluation the place), image_index (the row)

    Args:
        dataset: over the split; images that it keeps decoded are shared with it.
        rows: [n], of the images; place p holds that of row rows[p].
    """

    def __init__(self, dataset: CaptionSamples, rows: Sequence[int]) -> None:
        super().__init__(dataset.split, dataset.tokenizer, dataset.transform, dataset.max_text_length)
        self._decoded = dataset._decoded
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self, key: Key) -> Sample:
        image_index = int(self._rows[int(key[0])])
        image = Pending(self.split.row(image_index), image_index, True)
        return {"images": image, "sample_id": self.sample_id(key), "image_index": image_index}
