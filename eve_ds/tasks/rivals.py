"""What EVE's rivals share: the objectives of table 1 of the paper, made of contrast (ITC), matching (ITM), masked words
(MLM) and masked pixels (MIM). Each is a file of its own; its losses are summed with weight 1.

Masked words and pixels take a pass of their own each, as in EVE: half of the words masked, image whole; three quarters
of the patches dropped before the encoder, text whole. Contrast takes an image-only and a text-only pass, matching a
joint pass over three rows a pair, as in EVE's published fine-tuning code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from eve_ds.data.data_config import DataSource
from eve_ds.data.samples import Samples
from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.model_config import MOST, ModelConfig
from eve_ds.recipes import read_run_config
from eve_ds.tasks.base import Batch, Metrics
from eve_ds.tasks.contrast import CONTRAST_HEADS, DROP_PATH_USES, MATCHING_HEAD, Contrast, check_temperature
from eve_ds.tasks.masked_modeling import MaskedModeling, MaskedSpec, Masks, ObjectiveConfig
from eve_ds.tasks.retrieval import SPEC as RETRIEVAL
from eve_ds.tasks.spec import HeldOutExamples, Pass, TaskSpec, stored_mask_id, stored_section
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import Tokenizer

MLM_USE, MIM_USE = DROP_PATH_USES, DROP_PATH_USES + 1


@dataclass
class RivalConfig(ObjectiveConfig):
    """Contrast and matching beside masked modeling. Settings of what a task does not predict are without effect.

    Args:
        embed_dim: width of the contrastive vectors.
        temperature: first value of the learned temperature, which stays within 0.001 and 0.5.
    """

    embed_dim: int = 256
    temperature: float = 0.07

    def check(self) -> None:
        """Raise UserError naming the first field that makes no objective."""
        super().check()
        if self.mode != "separate":
            raise UserError(
                f"objective.mode={self.mode!r} is for --task pretrain; here masked words and masked patches have a "
                "pass each: separate"
            )
        for name in ("embed_dim", "temperature"):
            if not 0 < getattr(self, name) <= MOST:
                raise UserError(f"objective.{name}={getattr(self, name)} must be a positive number, at most {MOST}")
        check_temperature(self.temperature)


Part = tuple[Metrics, list[BackboneOutput]]  # losses with their gradient, and the passes behind them


class Rival(Contrast, MaskedModeling):
    """The parts of a rival that also predicts what is masked.

    Args:
        backbone: the shared Transformer.
        objective: masks, decoders and heads.
        mask_id: id of [MASK].
    Raises:
        UserError: as ``MaskedModeling``.

    Attributes:
        heads: what is built; a subclass adds the matching head or leaves the pixel decoder out.
    """

    heads: ClassVar[tuple[str, ...]] = (*CONTRAST_HEADS, *MaskedModeling.heads)  # type: ignore[assignment]  # as many

    def __init__(self, backbone: Backbone, objective: RivalConfig, mask_id: int) -> None:
        # A decoder without use must not be built: a parameter without a gradient would stop ZeRO.
        mode = {"mode": "separate" if "pixel_decoder." in self.heads else "mlm"}
        masked = {own.name: getattr(objective, own.name) for own in fields(ObjectiveConfig)}
        super().__init__(backbone, ObjectiveConfig(**masked | mode), mask_id)
        self.seed = self.negatives_seed = objective.seed
        self.add_pair_heads(objective.embed_dim, objective.temperature, MATCHING_HEAD in self.heads)

    def mask_words(self, batch: Batch, masks: Masks) -> Part:
        """A pass with half of the words masked and the whole image."""
        noise = self.drop_path_noise(batch["sample_id"], MLM_USE)
        output = self.encode(batch["images"], masks.text_ids, batch["text_mask"], noise=noise)
        return self.score_words(output, batch["text_ids"], masks.words).metrics(), [output]

    def mask_patches(self, batch: Batch, masks: Masks) -> Part:
        """A pass with a quarter of the patches and the whole text."""
        noise = self.drop_path_noise(batch["sample_id"], MIM_USE)
        output = self.encode(batch["images"], batch["text_ids"], batch["text_mask"], masks.kept, noise)
        return self.rebuild(output, batch, masks).metrics(), [output]


class RivalSpec(MaskedSpec):
    """A rival, by the losses that it sums.

    Args:
        task: class of the task, called as ``Rival`` is.
        losses: of itc, itm, mlm and mim.
    """

    objective = RivalConfig
    head_may_be_missing = False

    def __init__(self, name: str, task: Any, *losses: str) -> None:
        self.name, self.task, self.losses = name, task, losses

    def build(self, backbone: Backbone, objective: Any, *, mask_id: int, num_classes: int, seed: int) -> Any:
        return self.task(backbone, replace(objective, seed=objective.seed + seed), mask_id)

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> Any:
        """As the run that wrote the file was set up. Raises KeyError if the file lacks the contrastive heads."""
        width = state["itc_vision_proj_head.weight"].shape[0]
        objective = RivalConfig()
        if files.config is not None and "decoder_dim" in (read_run_config(files.config).get("objective") or {}):
            objective = stored_section(RivalConfig, files.config, "objective")
        task = self.task(backbone, replace(objective, embed_dim=width), stored_mask_id(files))
        if files.tokenizer is not None:
            task.use_tokenizer(Tokenizer.load(files.tokenizer))
        return task

    def held_out_examples(self, task: Any, batch: Batch, dataset: Samples, chosen: Sequence[int]) -> HeldOutExamples:
        """Images rebuilt and words predicted, of what the task predicts."""
        if not isinstance(task, MaskedModeling):
            return HeldOutExamples()
        return super().held_out_examples(task, batch, dataset, chosen)

    def passes(self, model: ModelConfig, objective: ObjectiveConfig, rows: int, text_length: int) -> list[Pass]:
        patches = model.num_patches
        masked_patches, masked_words = super().passes(model, objective, rows, text_length)
        of = {
            "itc": [Pass(rows, patches, 0), Pass(rows, 0, text_length)],
            "itm": [Pass(3 * rows, patches, text_length)],
            "mlm": [masked_words],
            "mim": [masked_patches],
        }
        return [one for loss in self.losses for one in of[loss]]

    def check_sources(self, objective: Any, sources: Sequence[DataSource]) -> None:
        """Contrast needs pairs."""
        TaskSpec.check_sources(self, objective, sources)

    def gathered_values(self, model: ModelConfig, rows: int) -> dict[str, int]:
        return RETRIEVAL.gathered_values(model, rows) if "itm" in self.losses else {}
