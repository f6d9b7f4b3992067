"""A pre-training objective of your own: masked words alone, predicted from the whole image and the other words.

python -m eve_ds.pretrain --task docs.examples.my_objective:SPEC --config C.yaml --data.path DIR --output_dir RUN
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F

from eve_ds.data.samples import Samples
from eve_ds.model.backbone import Backbone
from eve_ds.model.decoders import WordDecoder
from eve_ds.tasks import Objective, PretrainSpec, Task, TaskOutput
from eve_ds.tasks.base import Batch, global_counts, valid_rows
from eve_ds.tasks.masking import choose_words, masked_words
from eve_ds.tasks.spec import HeldOutExamples
from preprocessing.errors import UserError


@dataclass
class WordsObjective(Objective):
    """The settings: ``--objective.text_mask_ratio 0.3``.

    Args:
        text_mask_ratio: share of words masked; at least one a text.
    """

    text_mask_ratio: float = 0.5

    def check(self) -> None:
        if not 0 < self.text_mask_ratio < 1:
            raise UserError(f"objective.text_mask_ratio={self.text_mask_ratio} must lie between 0 and 1")


class MaskedWords(Task):
    """Cross entropy of masked words, mean over those of the global batch."""

    heads = ("word_decoder.",)

    def __init__(self, backbone: Backbone, text_mask_ratio: float, mask_id: int, mask_seed: int) -> None:
        super().__init__(backbone)
        self.text_mask_ratio, self.mask_id, self.mask_seed = text_mask_ratio, mask_id, mask_seed
        self.word_decoder = WordDecoder(self.config.dim, self.config.vocab_size)

    def forward(self, batch: Batch) -> TaskOutput:
        batch = valid_rows(batch)
        text_ids, text_mask, sample_id = batch["text_ids"], batch["text_mask"], batch["sample_id"]
        hidden = choose_words(self.mask_seed, sample_id, text_mask, self.text_mask_ratio)  # of the sample id alone
        masked_ids = text_ids.masked_fill(hidden, self.mask_id)
        output = self.encode(batch["images"], masked_ids, text_mask, noise=self.drop_path_noise(sample_id, 0))
        words = output.hidden[:, output.num_image_tokens :][hidden]
        scores = self.word_decoder(words, self.backbone.text_embedding.words.weight).float()
        loss_sum = F.cross_entropy(scores, text_ids[hidden], reduction="sum")
        own = hidden.sum().float()
        (count,) = global_counts(own)  # of all ranks: each gives its share of the mean
        aux, metrics = self.aux_share(output)
        right = (scores.argmax(dim=1) == text_ids[hidden]).sum().float()
        metrics |= {"words_loss": (loss_sum.detach(), own), "words_accuracy": (right, own)}
        return TaskOutput(loss_sum / count + aux, metrics)


class WordsSpec(PretrainSpec):
    name = "words"
    objective = WordsObjective

    def build(
        self, backbone: Backbone, objective: WordsObjective, *, mask_id: int, num_classes: int, seed: int
    ) -> MaskedWords:
        return MaskedWords(backbone, objective.text_mask_ratio, mask_id, mask_seed=seed)

    # The rest is optional: examples for samples/samples.json, and what `python -m eve_ds.plan` needs.

    def held_out_examples(
        self, task: MaskedWords, batch: Batch, dataset: Samples, chosen: Sequence[int]
    ) -> HeldOutExamples:
        return HeldOutExamples({"captions": [dataset.text(sample) for sample in chosen]})

    def selected_rows(self, objective: WordsObjective, rows: int, text_length: int) -> int:
        return rows * masked_words(text_length, objective.text_mask_ratio)


SPEC = WordsSpec()
