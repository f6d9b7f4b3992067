"""ITC + MLM + MIM: contrast beside EVE's own losses, without matching (table 1 of the paper: 3.26 hours an epoch)."""

from __future__ import annotations

from eve_ds.tasks.base import Batch, TaskOutput, valid_rows
from eve_ds.tasks.rivals import Rival, RivalSpec


class ItcMlmMim(Rival):
    def forward(self, batch: Batch) -> TaskOutput:
        """Four passes: image alone, text alone, masked words, masked patches."""
        batch = valid_rows(batch)
        contrast = self.contrast(batch)
        masks = self.draw_masks(batch)
        words, word_passes = self.mask_words(batch, masks)
        pixels, pixel_passes = self.mask_patches(batch, masks)
        measured = contrast.metrics() | words | pixels
        return self.sum_losses(measured, [*contrast.passes, *word_passes, *pixel_passes])


SPEC = RivalSpec("itc_mlm_mim", ItcMlmMim, "itc", "mlm", "mim")
