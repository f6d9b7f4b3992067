"""ITC + ITM + MLM + MIM: all four losses of table 1 of the paper (7.73 hours an epoch)."""

from __future__ import annotations

from eve_ds.tasks.base import Batch, TaskOutput, valid_rows
from eve_ds.tasks.contrast import MATCHING_HEAD
from eve_ds.tasks.rivals import Rival, RivalSpec


class ItcItmMlmMim(Rival):
    heads = (*Rival.heads, MATCHING_HEAD)

    def forward(self, batch: Batch) -> TaskOutput:
        """Five passes: image alone, text alone, three joint rows a pair, masked words, masked patches."""
        batch = valid_rows(batch)
        contrast = self.contrast(batch)
        matching = self.match_negatives(batch, contrast)
        masks = self.draw_masks(batch)
        words, word_passes = self.mask_words(batch, masks)
        pixels, pixel_passes = self.mask_patches(batch, masks)
        measured = contrast.metrics() | matching.metrics() | words | pixels
        return self.sum_losses(measured, [*contrast.passes, *matching.passes, *word_passes, *pixel_passes])


SPEC = RivalSpec("itc_itm_mlm_mim", ItcItmMlmMim, "itc", "itm", "mlm", "mim")
