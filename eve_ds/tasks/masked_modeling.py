"""EVE's pre-training (Chen et al., AAAI 2024, arXiv 2308.11971): masked pixels and masked words, and nothing else.

Two passes a pair: 75 % of the patches dropped and rebuilt, text whole; then 50 % of the words masked and predicted,
image whole. ``mode: joint`` masks both in one pass; ``mim`` and ``mlm`` take one of the two passes alone.
Legend: B samples, P patches, K kept, M masked, L text length, p side of a patch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.data.data_config import DataSource
from eve_ds.data.modalities import IMAGE, PAIRS, TEXT, MixedSamples, modalities_of
from eve_ds.data.samples import CaptionSamples, Samples
from eve_ds.data.sources import AnySplit
from eve_ds.data.transforms import Transform
from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.decoders import PixelDecoder, WordDecoder, WordMLP
from eve_ds.model.embeddings import patches
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import read_run_config
from eve_ds.tasks.base import Batch, Metrics, Task, TaskOutput, evaluating, global_counts, valid_rows
from eve_ds.tasks.batch_parts import Part, parts_of
from eve_ds.tasks.masked_examples import predicted_words, rebuilt_images, spelled
from eve_ds.tasks.masked_parts import EPSILON, Masks, ObjectiveConfig, PixelOutput, WordOutput, patches_at
from eve_ds.tasks.masking import choose_words, hide_words, masked_patches, masked_words, split_blocks, split_patches
from eve_ds.tasks.spec import HeldOutExamples, Pass, PretrainSpec, stored_mask_id, stored_section
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import SPECIAL, Tokenizer

__all__ = ["SPEC", "MaskedModeling", "MaskedSpec", "Masks", "ObjectiveConfig", "PixelOutput", "WordOutput"]

WORD_ROW_MULTIPLE = 64


class MaskedModeling(Task):
    """Pixels and words from context. A decoder that ``objective.mode`` does not use is not built.

    Args:
        backbone: the shared Transformer.
        objective: ratios, mode, targets and the decoders.
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
        if objective.predicts_pixels:
            self.add_patch_decoder()
        if objective.predicts_words:
            head = WordMLP if objective.word_head == "mlp" else WordDecoder
            self.word_decoder = head(config.dim, config.vocab_size)
        # Of the vocabulary, see use_tokenizer: [V] does an entry continue a word, [n] the ids that random words have.
        self.continues: Tensor
        self.register_buffer("continues", torch.zeros(config.vocab_size, dtype=torch.bool), persistent=False)
        self.ordinary: Tensor
        self.register_buffer("ordinary", torch.arange(len(SPECIAL), config.vocab_size), persistent=False)

    def add_patch_decoder(self) -> None:
        """Build what ``rebuild`` needs."""
        self.pixel_decoder = self.new_patch_decoder()

    def new_patch_decoder(self, values: int | None = None) -> PixelDecoder:
        """A decoder of this objective, see ``PixelDecoder``."""
        config, objective = self.config, self.objective
        size = (objective.decoder_dim, objective.decoder_depth, objective.decoder_heads)
        return PixelDecoder(config.dim, config.num_patches, config.patch_size, *size, values)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Whole words and random words are the tokenizer's. Until then every token is a word, and any word random.

        Raises:
            UserError: whole words are to be masked, and the tokenizer does not tell where they begin.
        """
        if self.objective.word_masking == "whole_words":
            continues = torch.tensor(tokenizer.continues_word()[: self.config.vocab_size])
            self.continues[: len(continues)] = continues
        if self.objective.mask_replacement[1]:
            self.ordinary = torch.tensor(tokenizer.ordinary_ids(), device=self.ordinary.device)

    def forward(self, batch: Batch) -> TaskOutput:
        """Squared error of pixels, mean over masked patches, + cross entropy, mean over masked words.

        While ``held_out`` is set, the metrics also tell whether words use the image, and pixels the text.
        """
        batch = valid_rows(batch)
        image, words, passes = self._predict(batch)
        measured = (image.metrics() if image else {}) | (words.metrics() if words else {})
        losses = [pair for name, pair in measured.items() if name.endswith("_loss")]
        counts = global_counts(*(count for _, count in losses))
        aux, metrics = self.aux_share(*passes)
        metrics |= {name: (total.detach(), count) for name, (total, count) in measured.items()}
        if self.held_out:
            metrics |= self._grounding(batch)
        shares = [total / count for (total, _), count in zip(losses, counts, strict=True)]
        return TaskOutput(torch.stack(shares).sum() + aux, metrics)

    def reconstruct(self, batch: Batch) -> dict[str, np.ndarray]:
        """Images for the report, see ``rebuilt_images``; {} in a mode without pixels."""
        batch = valid_rows(batch)
        with evaluating(self):
            image = self._predict(batch)[0]
        if image is None:
            return {}
        return rebuilt_images(batch["images"], image, self.config.patch_size, self.objective.pixel_target)

    def predict_words(self, batch: Batch) -> list[dict[str, Any]]:
        """Words for the report, see ``predicted_words``; [] in a mode without words."""
        batch = valid_rows(batch)
        with evaluating(self):
            words = self._predict(batch)[1]
        return predicted_words(batch, words) if words else []

    def _predict(self, batch: Batch) -> tuple[PixelOutput | None, WordOutput | None, list[BackboneOutput]]:
        """Mask, encode (once or twice; texts alone once more) and decode; None for what the mode leaves out."""
        objective = self.objective
        with_image, pairs, texts = parts_of(batch, self.draw_masks(batch))
        image = words = None
        noises = self._noises(with_image.batch, pairs.batch)
        asked: list[tuple[Tensor | None, ...]] = []
        if objective.predicts_pixels:
            part, masks = with_image.batch, with_image.masks
            seen = masks.text_ids if objective.mode == "joint" else part["text_ids"]
            asked.append((part["images"], seen, part["text_mask"], masks.kept, noises[0]))
        if objective.predicts_words and objective.mode != "joint":
            part, masks = pairs.batch, pairs.masks
            asked.append((part["images"], masks.text_ids, part["text_mask"], None, noises[-1]))
        passes = self.encode_several(asked)
        if objective.predicts_pixels:
            image = self.rebuild(passes[0], with_image.batch, with_image.masks)
        if objective.predicts_words:
            whose = with_image if objective.mode == "joint" else pairs
            alone = None if texts is None else (self._encode_texts(texts), texts)
            words = self.score_words(passes[-1], whose.batch["text_ids"], whose.masks.words, alone)
            passes += [] if alone is None else [alone[0]]
        return image, words, passes

    def _noises(self, with_image: Batch, pairs: Batch) -> list[Tensor | None]:
        """``drop_path_noise`` of the pass with masked patches and of that with masked words, as far as there are."""
        uses = {"separate": (0, 1), "mlm": (1,)}.get(self.objective.mode, (0,))
        if len(uses) == 2 and pairs is with_image:  # at once: few operations
            both = self.drop_path_noise(pairs["sample_id"], 0, 1)
            return [None, None] if both is None else list(both.chunk(2, dim=1))
        return [self.drop_path_noise((with_image, pairs)[use]["sample_id"], use) for use in uses]

    def _encode_texts(self, texts: Part) -> BackboneOutput:
        """A pass of texts alone, with words masked."""
        noise = self.drop_path_noise(texts.batch["sample_id"], 1)
        return self.encode(text_ids=texts.masks.text_ids, text_mask=texts.batch["text_mask"], noise=noise)

    @torch.no_grad()
    def _grounding(self, batch: Batch) -> Metrics:
        """The losses with another pair's image or text, and of the words without an image; the masks stay as they are.

        As many passes of the backbone whatever the batch holds, since each is a collective: a row for which there is
        no other pair runs with its own and does not count.
        """
        images, text_ids, text_mask = batch["images"], batch["text_ids"], batch["text_mask"]
        masks = self.draw_masks(batch)
        joint = self.objective.mode == "joint"
        other, has_other = another_image(batch["image_index"])
        metrics: Metrics = {}
        if self.objective.predicts_words:
            wrong_image = self.encode(images[other], masks.text_ids, text_mask, masks.kept if joint else None)
            metrics |= self.score_words(wrong_image, text_ids, masks.words & has_other[:, None]).metrics("_shuffled")
            alone = self.encode(text_ids=masks.text_ids, text_mask=text_mask)
            metrics |= self.score_words(alone, text_ids, masks.words).metrics("_no_image")
        if self.objective.predicts_pixels:
            other_text = (masks.text_ids if joint else text_ids)[other]
            wrong_text = self.encode(images, other_text, text_mask[other], masks.kept)
            metrics |= self.rebuild(wrong_text, batch, masks).of_rows(has_other).metrics("_shuffled")
        return metrics

    def draw_masks(self, batch: Batch) -> Masks:
        """What is hidden of each pair: a function of the seed and the sample id."""
        objective, sample_id, text_ids = self.objective, batch["sample_id"], batch["text_ids"]
        split = split_blocks if objective.image_masking == "blockwise" else split_patches
        kept, masked = split(objective.seed, sample_id, self.config.num_patches, objective.image_mask_ratio)
        continues = self.continues[text_ids] if objective.word_masking == "whole_words" else None
        words = choose_words(objective.seed, sample_id, batch["text_mask"], objective.text_mask_ratio, continues)
        shares = objective.mask_replacement
        if shares[0] == 1:
            return Masks(kept, masked, words, text_ids.masked_fill(words, self.mask_id))
        hidden = hide_words(objective.seed, sample_id, text_ids, words, self.mask_id, shares, self.ordinary)
        return Masks(kept, masked, words, hidden)

    def rebuild(self, output: BackboneOutput, batch: Batch, masks: Masks) -> Any:
        """The masked patches, predicted from a pass that saw ``masks.kept``: a ``PixelOutput``, or like one."""
        predicted = self.pixel_decoder(output.hidden[:, : output.num_image_tokens], masks.kept, masks.masked).float()
        target = patches(batch["images"].float(), self.config.patch_size)[patches_at(masks.masked)]
        if self.objective.pixel_target == "normalized":
            target = F.layer_norm(target, target.shape[-1:], eps=EPSILON)
        return PixelOutput(predicted, target, masks.masked)

    def score_words(
        self, output: BackboneOutput, text_ids: Tensor, mask: Tensor, alone: tuple[BackboneOutput, Part] | None = None
    ) -> WordOutput:
        """Scores at the True places of ``mask`` [B, L], from a pass that saw ``Masks.text_ids``.

        Only these rows go through the projection to the vocabulary; after them those of texts ``alone``, from theirs.
        """
        rows, truth = _states_and_ids(output, text_ids, mask)
        if alone is not None:
            others = _states_and_ids(alone[0], alone[1].batch["text_ids"], alone[1].masks.words)
            rows, truth = torch.cat([rows, others[0]]), torch.cat([truth, others[1]])
        # As in the experts: few distinct shapes, or each step waits for new CPU kernels.
        missing = -rows.shape[0] % WORD_ROW_MULTIPLE
        tied = [self.backbone.text_embedding.words.weight] if self.objective.word_head == "tied" else []
        # Within the decoder's own forward: ZeRO 3 gathers its weights for that, and for its backward pass.
        return WordOutput(functools.partial(self.word_decoder, F.pad(rows, (0, 0, 0, missing)), *tied), truth, mask)


def _states_and_ids(output: BackboneOutput, text_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[n, D] the text tokens of a pass, and [n] their ids, at the True places of ``mask`` [B, L].

    By places, not by the mask: the host waits for their number once, and not again in the backward pass.
    """
    row, place = mask.nonzero(as_tuple=True)
    return output.hidden[row, output.num_image_tokens + place], text_ids[row, place]


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


class MaskedSpec(PretrainSpec):
    name = "pretrain"
    objective = ObjectiveConfig

    def build(
        self, backbone: Backbone, objective: ObjectiveConfig, *, mask_id: int, num_classes: int, seed: int
    ) -> MaskedModeling:
        return MaskedModeling(backbone, replace(objective, seed=objective.seed + seed), mask_id)

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> MaskedModeling:
        """As the run that wrote the file was set up; decoders that the file lacks have initial values.

        Files without decoders, or with only the word decoder of another objective, get those of the default settings.
        """
        objective = ObjectiveConfig()
        if files.config is not None and any(name.startswith(MaskedModeling.heads) for name in state):
            tree = read_run_config(files.config)
            ours = tree.get("task", self.name) == self.name
            if ours or "word_head" in (tree.get("objective") or {}) or "pixel_decoder.embed.weight" in state:
                objective = stored_section(ObjectiveConfig, files.config, "objective", only_own=not ours)
        task = MaskedModeling(backbone, objective, stored_mask_id(files))
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
    ) -> Samples:
        kind = self.samples if set(modalities_of(split)) == {PAIRS} else MixedSamples
        return kind(split, tokenizer, transform, model.max_text_length, model.vocab_size)

    def check_sources(self, objective: ObjectiveConfig, sources: Sequence[DataSource]) -> None:
        """Raise UserError for a source in which the mode predicts nothing, or that a dataset of its own cannot read."""
        if self.samples is not CaptionSamples:
            super().check_sources(objective, sources)
        unused = {"mim": TEXT, "mlm": IMAGE}.get(objective.mode)
        for source in sources:
            if source.modality == unused:
                raise UserError(
                    f"data.sources: {source.path} has modality: {unused}, and objective.mode={objective.mode} predicts "
                    "nothing of it; leave it out, or choose mode separate or joint"
                )

    def held_out_examples(
        self, task: MaskedModeling, batch: Batch, dataset: Samples, chosen: Sequence[int]
    ) -> HeldOutExamples:
        """Images rebuilt and words predicted, of what the mode predicts."""
        pixels, words = task.reconstruct(batch), task.predict_words(batch)
        examples = HeldOutExamples()
        rows = []
        for place, sample in enumerate(chosen):
            row = {"caption": dataset.text(sample)}
            for kind, images in pixels.items():
                row[kind] = f"p{place}_{kind}.png"
                examples.images[row[kind]] = images[place]
            rows.append(row)
        if task.objective.predicts_pixels:
            examples.tree["images"] = rows
        if task.objective.predicts_words:
            examples.tree["words"] = [spelled(entry, dataset.tokenizer) for entry in words]
        return examples

    def passes(self, model: ModelConfig, objective: ObjectiveConfig, rows: int, text_length: int) -> list[Pass]:
        kept = model.num_patches - masked_patches(model.num_patches, objective.image_mask_ratio)
        found = [Pass(rows, kept, text_length)] if objective.predicts_pixels else []
        if objective.predicts_words and objective.mode != "joint":
            found.append(Pass(rows, model.num_patches, text_length))
        return found

    def selected_rows(self, objective: ObjectiveConfig, rows: int, text_length: int) -> int:
        return rows * masked_words(text_length, objective.text_mask_ratio) if objective.predicts_words else 0


SPEC = MaskedSpec()
