"""MLM + MIM with token targets: the target of a masked patch is the code that a frozen visual tokenizer gives it, as in
BEiT v2 (arXiv 2208.06366), in place of its pixels. The row "MIM tokens" of the paper's table 1.

Codes come with the data (``python -m preprocessing codes``), so no tokenizer runs here. BEiT v2 sends mask tokens
through the whole encoder; this keeps EVE's form: only visible patches are encoded, and the light decoder, with a linear
layer to the K codes in place of pixels, predicts the others.
Legend: B samples, P patches, M masked, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eve_ds.data.samples import CaptionSamples, Key, Sample
from eve_ds.data.shards import Row, RowError
from eve_ds.data.sources import AnySplit, JoinedSplit
from eve_ds.data.transforms import Transform
from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.embeddings import patches
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks.base import Batch, Metrics, evaluating, valid_rows
from eve_ds.tasks.masked_examples import rebuilt_images
from eve_ds.tasks.masked_modeling import MaskedModeling, MaskedSpec
from eve_ds.tasks.masked_parts import Masks, ObjectiveConfig, PixelOutput, classified, patches_at
from eve_ds.tasks.spec import TaskSpec
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError
from preprocessing.shards.schema import CODES, CodeGrid
from preprocessing.text.tokenizer import Tokenizer

BEIT_V2_CODES = 8192  # codes of its tokenizer; K if the data do not give one
_MEND = "add codes with `python -m preprocessing codes`"


@dataclass
class CodeOutput:
    """Predicted codes: scores [B, M, K] float32, truth [B, M] int64; masked [B, M], the places of the patches."""

    scores: Tensor
    truth: Tensor
    masked: Tensor

    def metrics(self, suffix: str = "") -> Metrics:
        """Cross entropy (nats; with its gradient) and right predictions, summed over masked patches."""
        loss, accuracy = classified(self.scores.flatten(0, 1), self.truth.flatten())
        return {f"mim_code_loss{suffix}": loss, f"mim_code_accuracy{suffix}": accuracy}

    def of_rows(self, rows: Tensor) -> CodeOutput:
        """Those of some samples, by rows [B] bool."""
        return CodeOutput(self.scores[rows], self.truth[rows], self.masked[rows])


class MaskedCodes(MaskedModeling):
    """Codes and words from context. The batch has ``codes`` [B, P] int64 as well, row by row.

    Args:
        backbone: the shared Transformer.
        objective: as for pixels, whose ``pixel_target`` has no effect.
        mask_id: id of [MASK].
        num_codes: K.
    Raises:
        UserError: as ``MaskedModeling``, or no code is predicted.
    """

    heads = ("code_decoder.", "word_decoder.")

    def __init__(self, backbone: Backbone, objective: ObjectiveConfig, mask_id: int, num_codes: int) -> None:
        if not objective.predicts_pixels:
            raise UserError(f"objective.mode={objective.mode!r} masks no patch: use it with --task pretrain")
        self.num_codes = num_codes  # before add_patch_decoder, which the next line calls
        super().__init__(backbone, objective, mask_id)

    def add_patch_decoder(self) -> None:
        self.code_decoder = self.new_patch_decoder(self.num_codes)

    def rebuild(self, output: BackboneOutput, batch: Batch, masks: Masks) -> CodeOutput:
        """The codes of masked patches, predicted from a pass that saw ``masks.kept``."""
        scores = self.code_decoder(output.hidden[:, : output.num_image_tokens], masks.kept, masks.masked)
        return CodeOutput(scores.float(), batch["codes"][patches_at(masks.masked)], masks.masked)

    def reconstruct(self, batch: Batch) -> dict[str, np.ndarray]:
        """Images for the report: ``original``, ``masked`` and ``right``, where those masked patches are shown whose
        code is predicted; uint8 [B, H, W, 3]."""
        batch = valid_rows(batch)
        with evaluating(self):
            found: Any = self._predict(batch)[0]
        pixels = patches(batch["images"].float(), self.config.patch_size)[patches_at(found.masked)]
        right = (found.scores.argmax(dim=-1) == found.truth)[..., None]
        seen = PixelOutput(pixels * right, pixels, found.masked)
        shown = rebuilt_images(batch["images"], seen, self.config.patch_size, "raw")
        return {"original": shown["original"], "masked": shown["masked"], "right": shown["rebuilt"]}


class CodeSamples(CaptionSamples):
    """Images with captions and the codes of their patches.

    dataset[sample, epoch] -> those of ``CaptionSamples``, codes [P] int64

    Raises:
        UserError: as ``CaptionSamples``; a source has no codes, or those of another grid or size; ``transform`` moves
            what is in the image, whose codes belong to the whole of it.
    """

    def __init__(
        self,
        directory: Any,
        tokenizer: Tokenizer,
        transform: Transform,
        max_text_length: int,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(directory, tokenizer, transform, max_text_length, vocab_size)
        moving = {
            "--data.crop_scale null": transform.crop_scale is not None,
            "--data.flip false": transform.flip,
            "--data.augmentation none": transform.augmentation != "none",
        }
        if transform.is_random:
            mends = " ".join(mend for mend, moves in moving.items() if moves)
            raise UserError(
                "data.crop_scale, data.flip, data.augmentation: codes belong to the whole image, which must be resized "
                f"straight to the square; give {mends}"
            )
        self.grid = _grid_of(self.split)
        self.num_classes = self.grid.vocabulary

    def describe(self, key: Key) -> Sample:
        described = super().describe(key)
        row: Row = described["images"].row
        if (grid := _grid(row)) != self.grid:
            raise UserError(f"{row.path}: has {grid}, other shards have {self.grid}; {_MEND}")
        codes = row.value(CODES)
        if fault := grid.fault(codes):
            raise RowError(row.where, f"{fault}; {_MEND}")
        return described | {"codes": np.array(codes, dtype=np.int64)}


def _grid_of(split: AnySplit) -> CodeGrid:
    """The one grid of all sources."""
    parts = split.splits if isinstance(split, JoinedSplit) else [split]
    grids = [_grid(part.row(0)) for part in parts]
    for part, grid in zip(parts, grids, strict=True):
        if grid != grids[0]:
            raise UserError(f"{part.name}: has {grid}, {parts[0].name} has {grids[0]}; {_MEND} of one tokenizer")
    return grids[0]


def _grid(row: Row) -> CodeGrid:
    try:
        grid = CodeGrid.of(row.batch.schema)
    except ValueError as error:
        raise UserError(f"{row.path}: {error}; {_MEND}") from None
    if grid is None:
        raise UserError(f"{row.path}: has no column {CODES!r}, which --task {SPEC.name} predicts; {_MEND}")
    return grid


class CodesSpec(MaskedSpec):
    name = "mlm_mim_codes"
    samples = CodeSamples

    def build(
        self, backbone: Backbone, objective: ObjectiveConfig, *, mask_id: int, num_classes: int, seed: int
    ) -> MaskedCodes:
        objective = replace(objective, seed=objective.seed + seed)
        return MaskedCodes(backbone, objective, mask_id, num_classes or BEIT_V2_CODES)

    def num_classes_of(self, state: Mapping[str, Tensor]) -> int:
        return state["code_decoder.head.weight"].shape[0]

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> MaskedCodes:
        """As the run that wrote the file was set up. Raises KeyError if the file lacks the decoder of codes."""
        task: Any = TaskSpec.build_for_weights(self, backbone, state, files)
        if files.tokenizer is not None:
            task.use_tokenizer(Tokenizer.load(files.tokenizer))
        return task

    def build_dataset(
        self,
        split: AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        model: ModelConfig,
        home: str,
        roots: Sequence[str],
    ) -> CodeSamples:
        dataset: Any = super().build_dataset(split, tokenizer, transform, model, home, roots)
        side = model.image_size // model.patch_size
        if dataset.grid.side != side:
            raise UserError(
                f"{split.name}: has {dataset.grid}, the model {side} x {side} patches; set model.image_size to "
                f"{dataset.grid.side * model.patch_size}, or {_MEND} of that grid"
            )
        return dataset

    def meta_batch(self, model: ModelConfig, rows: int, text_length: int, num_classes: int) -> Batch:
        codes = torch.empty(rows, model.num_patches, dtype=torch.int64, device="meta")
        return super().meta_batch(model, rows, text_length, num_classes) | {"codes": codes}


SPEC = CodesSpec()
