"""The rows of a micro-batch that a pass of masked modeling takes: with sources of images or texts alone, not all.

Every rank takes the same passes whatever its micro-batch holds, if need be with no row: which passes there are follows
from the columns of the batch, and these from the sources of the run (``eve_ds/data/modalities.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eve_ds.tasks.base import Batch
from eve_ds.tasks.masked_parts import Masks


@dataclass
class Part:
    """Some rows of a micro-batch, and what is hidden of them; rows are the first dimension of every tensor."""

    batch: Batch
    masks: Masks

    def rows(self, chosen: Tensor) -> Part:
        """The rows where ``chosen`` [B] bool is True."""
        index = chosen.nonzero().squeeze(1)
        batch = {name: value[index] for name, value in self.batch.items()}
        return Part(batch, Masks(**{name: value[index] for name, value in vars(self.masks).items()}))


def parts_of(batch: Batch, masks: Masks) -> tuple[Part, Part, Part | None]:
    """The rows with an image, the pairs, and the texts alone; None where no source of the run has such texts.

    The first part includes the second. A row with ``has_text`` 0 is an image alone; its text is all padding. Without
    sources of one modality all rows are pairs, and the first two parts are the batch itself.
    """
    whole = with_image = Part(batch, masks)
    texts = None
    if "has_image" in batch:
        with_image, texts = whole.rows(batch["has_image"] > 0), whole.rows(batch["has_image"] == 0)
    pairs = with_image.rows(with_image.batch["has_text"] > 0) if "has_text" in batch else with_image
    return with_image, pairs, texts
