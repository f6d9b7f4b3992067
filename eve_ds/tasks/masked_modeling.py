"""EVE's pre-training (Chen et al., AAAI 2024, arXiv 2308.11971): masked pixels and masked words, and nothing else.

Two passes a pair: 75 % of the patches dropped and rebuilt, text whole; then 50 % of the words masked and predicted,
image whole. ``mode: joint`` masks both in one pass.
Legend: B samples, P patches, K kept, M masked, L text length, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.data.samples import Samples
from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.decoders import PixelDecoder, WordDecoder, unpatchify
from eve_ds.model.embeddings import patches
from eve_ds.model.model_config import MOST, ModelConfig
from eve_ds.tasks.base import (
    Batch,
    Metrics,
    Task,
    TaskOutput,
    evaluating,
    global_counts,
    to_numpy,
    valid_rows,
)
from eve_ds.tasks.masking import choose_words, masked_patches, masked_words, split_patches
from eve_ds.tasks.spec import HeldOutExamples, Objective, Pass, PretrainSpec, stored_mask_id, stored_section
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import Tokenizer

EPSILON = 1e-6  # beside the variance of a patch: a uniform one must not divide by zero

WORD_ROW_MULTIPLE = 64


@dataclass
class ObjectiveConfig(Objective):
    """Masked modeling.

    Args:
        mode: separate: two passes a pair, as EVE; joint: one pass with patches and words masked at once.
        image_mask_ratio: share of patches masked.
        text_mask_ratio: share of words masked; at least one a text.
        decoder_dim: width of the pixel decoder; a multiple of 4 and of ``decoder_heads``.
        decoder_depth: blocks of the pixel decoder.
        decoder_heads: its attention heads.
        seed: of the masks; the engine's seed is added to it.
    """

    mode: Literal["separate", "joint"] = "separate"
    image_mask_ratio: float = 0.75
    text_mask_ratio: float = 0.5
    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    seed: int = 0

    def check(self) -> None:
        """Raise UserError naming the first field that makes no objective."""
        if self.mode not in ("separate", "joint"):
            raise UserError(f"objective.mode={self.mode!r} must be separate or joint")
        for name in ("image_mask_ratio", "text_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"objective.{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"objective.{name}={getattr(self, name)} must be at least 1 and at most {MOST}")
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            heads = f"objective.decoder_heads={self.decoder_heads}"
            raise UserError(f"objective.decoder_dim={self.decoder_dim} must be a multiple of 4 and of {heads}")


@dataclass
class Masks:
    """What is hidden: kept [B, K] and masked [B, M] patches; words [B, L] bool; text_ids [B, L] with [MASK] there."""

    kept: Tensor
    masked: Tensor
    words: Tensor
    text_ids: Tensor


@dataclass
class PixelOutput:
    """Rebuilt patches: predicted, target [B, M, 3 p p] float32 (mean 0, deviation 1 a patch); masked [B, M]."""

    predicted: Tensor
    target: Tensor
    masked: Tensor

    def metrics(self, suffix: str = "") -> Metrics:
        """Squared error of normalized pixels, mean over a patch's values, summed over patches; with its gradient."""
        error = F.mse_loss(self.predicted, self.target, reduction="sum") / self.target.shape[-1]
        count = torch.tensor(float(self.masked.numel()), device=error.device)
        return {f"mim_loss{suffix}": (error, count)}


@dataclass
class WordOutput:
    """Predicted words: scores [n, V] float32 and truth [n] at the n True places of mask [B, L]."""

    scores: Tensor
    truth: Tensor
    mask: Tensor

    def metrics(self, suffix: str = "") -> Metrics:
        """Cross entropy (nats; with its gradient) and right predictions, summed over masked words."""
        entropy = F.cross_entropy(self.scores, self.truth, reduction="sum")
        count = torch.tensor(float(self.truth.numel()), device=entropy.device)
        right = (self.scores.argmax(dim=1) == self.truth).sum().float()
        return {f"mlm_loss{suffix}": (entropy, count), f"mlm_accuracy{suffix}": (right, count)}


class MaskedModeling(Task):
    """Pixels and words from context.

    Args:
        backbone: the shared Transformer.
        objective: ratios, mode and the decoder's size.
        mask_id: id of [MASK].
    Raises:
        UserError: ``objective`` makes no objective, or the image has a single patch.
    """

    heads = ("pixel_decoder.", "word_decoder.")

    def __init__(self, backbone: Backbone, objective: ObjectiveConfig, mask_id: int) -> None:
        super().__init__(backbone)
        objective.check()
        config = self.config
        if config.num_patches < 2:
            raise UserError(f"model.image_size={config.image_size} gives a single patch; masking needs two or more")
        self.objective, self.mask_id = objective, mask_id
        self.pixel_decoder = PixelDecoder(
            config.dim,
            config.num_patches,
            config.patch_size,
            objective.decoder_dim,
            objective.decoder_depth,
            objective.decoder_heads,
        )
        self.word_decoder = WordDecoder(config.dim, config.vocab_size)

    def forward(self, batch: Batch) -> TaskOutput:
        """Squared error of normalized pixels, mean over masked patches, + cross entropy, mean over masked words.

        While ``held_out`` is set, the metrics also tell whether words use the image, and pixels the text.
        """
        batch = valid_rows(batch)
        image, words, passes = self._predict(batch)
        measured = image.metrics() | words.metrics()
        (mim_sum, own_patches), (mlm_sum, own_words) = measured["mim_loss"], measured["mlm_loss"]
        patch_count, word_count = global_counts(own_patches, own_words)
        aux, metrics = self.aux_share(*passes)
        metrics |= {name: (total.detach(), count) for name, (total, count) in measured.items()}
        if self.held_out:
            metrics |= self._grounding(batch)
        return TaskOutput(mim_sum / patch_count + mlm_sum / word_count + aux, metrics)

    def reconstruct(self, batch: Batch) -> dict[str, np.ndarray]:
        """Images for the report: ``original``, ``masked`` (gray where masked), ``rebuilt``; uint8 [B, H, W, 3].

        Rebuilt patches have the mean and the contrast of the true ones, since those are not predicted.
        """
        batch = valid_rows(batch)
        with evaluating(self):
            image = self._predict(batch)[0]
        size, images = self.config.patch_size, batch["images"].float()
        pixels = patches(images, size)
        place = _places(image.masked)
        variance, mean = torch.var_mean(pixels[place], dim=-1, correction=0, keepdim=True)
        masked, rebuilt = pixels.clone(), pixels.clone()
        masked[place] = 0
        rebuilt[place] = image.predicted * (variance + EPSILON).sqrt() + mean
        values = {"original": images, "masked": unpatchify(masked, size), "rebuilt": unpatchify(rebuilt, size)}
        return to_numpy({name: _to_pixels(value) for name, value in values.items()})

    def predict_words(self, batch: Batch) -> list[dict[str, Any]]:
        """Words for the report, one dict a sample.

        ``sample_id``; ``text_ids``, the true text without padding; ``positions`` of the masked places in it; ``truth``
        and ``predicted`` ids there.
        """
        batch = valid_rows(batch)
        with evaluating(self):
            words = self._predict(batch)[1]
        predicted = torch.zeros_like(batch["text_ids"])
        predicted[words.mask] = words.scores.argmax(dim=1)
        found = []
        for row, mask in enumerate(words.mask):
            found.append(
                {
                    "sample_id": int(batch["sample_id"][row]),
                    "text_ids": batch["text_ids"][row][batch["text_mask"][row].bool()].tolist(),
                    "positions": mask.nonzero()[:, 0].tolist(),
                    "truth": batch["text_ids"][row][mask].tolist(),
                    "predicted": predicted[row][mask].tolist(),
                }
            )
        return found

    def _predict(self, batch: Batch) -> tuple[PixelOutput, WordOutput, list[BackboneOutput]]:
        """Mask, encode (once or twice) and decode."""
        images, text_ids, text_mask = batch["images"], batch["text_ids"], batch["text_mask"]
        masks = self.draw_masks(batch)
        noise = self.drop_path_noise(batch["sample_id"], 0)
        if self.objective.mode == "joint":
            for_pixels = for_words = self.encode(images, masks.text_ids, text_mask, masks.kept, noise)
            passes = [for_pixels]
        else:
            for_pixels = self.encode(images, text_ids, text_mask, masks.kept, noise)
            for_words = self.encode(
                images, masks.text_ids, text_mask, noise=self.drop_path_noise(batch["sample_id"], 1)
            )
            passes = [for_pixels, for_words]
        image = self.rebuild(for_pixels, images, masks)
        return image, self.score_words(for_words, text_ids, masks.words), passes

    @torch.no_grad()
    def _grounding(self, batch: Batch) -> Metrics:
        """The losses with another pair's image or text, and of the words without an image; the masks stay as they are.

        Three passes of the backbone, whatever the batch holds, since each is a collective: a row for which there is no
        other pair runs with its own and does not count.
        """
        images, text_ids, text_mask = batch["images"], batch["text_ids"], batch["text_mask"]
        masks = self.draw_masks(batch)
        joint = self.objective.mode == "joint"
        other, has_other = another_image(batch["image_index"])
        wrong_image = self.encode(images[other], masks.text_ids, text_mask, masks.kept if joint else None)
        metrics = self.score_words(wrong_image, text_ids, masks.words & has_other[:, None]).metrics("_shuffled")
        alone = self.encode(text_ids=masks.text_ids, text_mask=text_mask)
        metrics |= self.score_words(alone, text_ids, masks.words).metrics("_no_image")
        other_text = (masks.text_ids if joint else text_ids)[other]
        wrong_text = self.encode(images, other_text, text_mask[other], masks.kept)
        image = self.rebuild(wrong_text, images, masks)
        counted = PixelOutput(image.predicted[has_other], image.target[has_other], image.masked[has_other])
        return metrics | counted.metrics("_shuffled")

    def draw_masks(self, batch: Batch) -> Masks:
        """What is hidden of each pair: a function of the seed and the sample id."""
        objective, sample_id = self.objective, batch["sample_id"]
        kept, masked = split_patches(objective.seed, sample_id, self.config.num_patches, objective.image_mask_ratio)
        words = choose_words(objective.seed, sample_id, batch["text_mask"], objective.text_mask_ratio)
        return Masks(kept, masked, words, batch["text_ids"].masked_fill(words, self.mask_id))

    def rebuild(self, output: BackboneOutput, images: Tensor, masks: Masks) -> PixelOutput:
        """The masked patches, rebuilt from a pass that saw ``masks.kept``."""
        predicted = self.pixel_decoder(output.hidden[:, : output.num_image_tokens], masks.kept, masks.masked).float()
        pixels = patches(images.float(), self.config.patch_size)[_places(masks.masked)]
        return PixelOutput(predicted, F.layer_norm(pixels, pixels.shape[-1:], eps=EPSILON), masks.masked)

    def score_words(self, output: BackboneOutput, text_ids: Tensor, mask: Tensor) -> WordOutput:
        """Scores at the True places of ``mask`` [B, L], from a pass that saw [MASK] there.

        Only these rows go through the projection to the vocabulary.
        """
        text = output.hidden[:, output.num_image_tokens :][:, : mask.shape[1]]
        rows = text[mask]
        # As in the experts: few distinct shapes, or each step waits for new CPU kernels.
        missing = -rows.shape[0] % WORD_ROW_MULTIPLE
        scores = self.word_decoder(F.pad(rows, (0, 0, 0, missing)), self.backbone.text_embedding.words.weight)
        return WordOutput(scores[: rows.shape[0]].float(), text_ids[mask], mask)


def another_image(image_index: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first one after it, around the end of the batch, that shows another image.

    Captions of one image stand side by side in a split, so the next row would often show the same one.

    Args:
        image_index: [B] int64, equal where rows show the same image.
    Returns:
        row [B] int64, and found [B] bool, False where all rows show the same image: then ``row`` is the row itself.
    """
    count = image_index.shape[0]
    place = torch.arange(count, device=image_index.device)
    steps = (place - place[:, None]) % max(count, 1)
    steps = steps.masked_fill(image_index == image_index[:, None], count)
    nearest = F.pad(steps, (0, 1), value=count).amin(dim=1)  # padded: without rows there is no column to reduce
    return (place + nearest) % max(count, 1), nearest < count


def _places(index: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column to pick patches [B, M] out of [B, P, ...]: copies whole patches, which ``gather`` does not."""
    return torch.arange(index.shape[0], device=index.device)[:, None], index


def _to_pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] with mean = std = 0.5 -> uint8 [B, H, W, 3]."""
    return ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class MaskedSpec(PretrainSpec):
    name = "pretrain"
    objective = ObjectiveConfig

    def build(
        self, backbone: Backbone, objective: ObjectiveConfig, *, mask_id: int, num_classes: int, seed: int
    ) -> MaskedModeling:
        return MaskedModeling(backbone, replace(objective, seed=objective.seed + seed), mask_id)

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> MaskedModeling:
        """Decoders that the file does not hold have default sizes and initial values (published files have none)."""
        objective = ObjectiveConfig()
        if files.config is not None and "pixel_decoder.embed.weight" in state:
            objective = stored_section(ObjectiveConfig, files.config, "objective")
        return MaskedModeling(backbone, objective, stored_mask_id(files))

    def held_out_examples(
        self, task: MaskedModeling, batch: Batch, dataset: Samples, chosen: Sequence[int]
    ) -> HeldOutExamples:
        """Images rebuilt and words predicted."""
        pixels, words = task.reconstruct(batch), task.predict_words(batch)
        examples = HeldOutExamples()
        rows = []
        for place, sample in enumerate(chosen):
            row = {"caption": dataset.text(sample)}
            for kind, images in pixels.items():
                row[kind] = f"p{place}_{kind}.png"
                examples.images[row[kind]] = images[place]
            rows.append(row)
        examples.tree = {"images": rows, "words": [_spelled(entry, dataset.tokenizer) for entry in words]}
        return examples

    def passes(self, model: ModelConfig, objective: ObjectiveConfig, rows: int, text_length: int) -> list[Pass]:
        kept = model.num_patches - masked_patches(model.num_patches, objective.image_mask_ratio)
        first = Pass(rows, kept, text_length)
        return [first] if objective.mode == "joint" else [first, Pass(rows, model.num_patches, text_length)]

    def selected_rows(self, objective: ObjectiveConfig, rows: int, text_length: int) -> int:
        return rows * masked_words(text_length, objective.text_mask_ratio)


def _spelled(entry: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """What ``predict_words`` gives for a text, in words; masked places read [MASK]."""
    masked = list(entry["text_ids"])
    for position in entry["positions"]:
        masked[position] = tokenizer.mask_id
    ids = {"text_masked": masked, "truth": entry["truth"], "predicted": entry["predicted"]}
    return {name: [tokenizer.decode([token], skip_special=False) for token in found] for name, found in ids.items()}


SPEC = MaskedSpec()
