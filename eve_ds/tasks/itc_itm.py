"""ITC + ITM: contrast and matching with hard negatives from the global batch, as pre-training (ALBEF's, arXiv
2107.07651, without its momentum encoder). The loss is that of fine-tuning for retrieval."""

from __future__ import annotations

from eve_ds.model.backbone import Backbone
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.rivals import RivalConfig, RivalSpec


class ItcItm(Retrieval):
    """Contrast and matching.

    Args:
        backbone: the shared Transformer.
        objective: width and temperature; settings of masks and decoders have no effect.
        mask_id: not used.
    """

    def __init__(self, backbone: Backbone, objective: RivalConfig, mask_id: int) -> None:
        super().__init__(backbone, objective.embed_dim, objective.temperature, objective.seed)
        self.negatives_seed = objective.seed


SPEC = RivalSpec("itc_itm", ItcItm, "itc", "itm")
