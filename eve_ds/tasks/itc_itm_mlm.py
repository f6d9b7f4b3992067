"""ITC + ITM + MLM: contrast, matching with hard negatives, masked words (table 1 of the paper: 6.88 hours an epoch)."""

from __future__ import annotations

from eve_ds.tasks.base import Batch, TaskOutput, valid_rows
from eve_ds.tasks.contrast import CONTRAST_HEADS, MATCHING_HEAD
from eve_ds.tasks.rivals import Rival, RivalSpec


class ItcItmMlm(Rival):
    heads = (*CONTRAST_HEADS, MATCHING_HEAD, "word_decoder.")

    def forward(self, batch: Batch) -> TaskOutput:
        """Four passes: image alone, text alone, three joint rows a pair, and one with masked words."""
        batch = valid_rows(batch)
        contrast = self.contrast(batch)
        matching = self.match_negatives(batch, contrast)
        words, word_passes = self.mask_words(batch, self.draw_masks(batch))
        measured = contrast.metrics() | matching.metrics() | words
        return self.sum_losses(measured, [*contrast.passes, *matching.passes, *word_passes])


SPEC = RivalSpec("itc_itm_mlm", ItcItmMlm, "itc", "itm", "mlm")
