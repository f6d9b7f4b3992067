"""For the report: what a pre-trained model makes of a few held-out pairs, and where its experts' tokens came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from PIL import Image

from eve_ds.data.collate import collate
from eve_ds.data.samples import Samples
from eve_ds.engine.agreement import decide
from eve_ds.engine.batches import to_device
from eve_ds.engine.callback import Callback
from eve_ds.files import write_json
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.masked import MaskedModeling

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer


class PretrainExamples(Callback):
    """Writes ``samples/`` at the end of a run: rebuilt images, predicted words, expert load (see eve_ds/report).

    Args:
        held_out: the split to show.
        count: pairs of it, each of another image.
    """

    def __init__(self, held_out: Samples, count: int) -> None:
        self.held_out = held_out
        first: dict[int, int] = {}  # the first caption of each of the first images
        for sample in range(len(held_out)):
            if len(first) >= count:
                break
            first.setdefault(int(held_out.split.sample(sample)[0]), sample)
        self.chosen = list(first.values())
        self.load: torch.Tensor | None = None

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """Counts the tokens of the last tenth of the run."""
        if trainer.step > 0.9 * trainer.total_steps:
            load = expert_load(trainer.task.backbone)
            self.load = load if self.load is None else self.load + load

    def fit_end(self, trainer: Trainer) -> None:
        """A collective: with experts spread over ranks, all ranks predict the same pairs."""
        written = trainer.output_dir / "samples" / "samples.json"
        if trainer.step == trainer.start_step and decide(written.exists):
            return  # the run was whole already, and so are its samples
        load = self.load if self.load is not None else expert_load(trainer.task.backbone)
        load = load.to(trainer.device)
        dist.all_reduce(load)
        samples = [self.held_out[index, 0] for index in self.chosen]
        batch = to_device(collate(samples, self.held_out.pad_id, self.held_out.max_text_length), trainer.device)
        task = trainer.task
        assert isinstance(task, MaskedModeling)
        with trainer.whole_weights():
            images, words = task.reconstruct(batch), task.predict_words(batch)
        if trainer.is_main:
            self._write(trainer, images, words, load.tolist())

    def _write(self, trainer: Trainer, images: dict[str, Any], words: list[dict[str, Any]], load: list[Any]) -> None:
        folder = trainer.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for place, sample in enumerate(self.chosen):
            row = {"caption": self.held_out.text(sample)}
            for kind, pixels in images.items():
                row[kind] = f"p{place}_{kind}.png"
                Image.fromarray(pixels[place]).save(folder / row[kind])
            rows.append(row)
        layers = [
            {"layer": layer, "counts": counts}
            for layer, counts in zip(trainer.config.model.soft_layers, load, strict=True)
        ]
        write_json(
            folder / "samples.json",
            {"images": rows, "words": [self._words(entry) for entry in words], "expert_load": {"layers": layers}},
        )

    def _words(self, entry: dict[str, Any]) -> dict[str, list[str]]:
        """Ids to the words of one text; masked places read [MASK]."""
        tokenizer = self.held_out.tokenizer
        masked = list(entry["text_ids"])
        for position in entry["positions"]:
            masked[position] = tokenizer.mask_id

        def spell(ids: list[int]) -> list[str]:
            return [tokenizer.decode([token], skip_special=False) for token in ids]

        return {"text_masked": spell(masked), "truth": spell(entry["truth"]), "predicted": spell(entry["predicted"])}


def expert_load(backbone: Backbone) -> torch.Tensor:
    """[soft layers, 2, E] choices of this rank's image (0) and text (1) tokens per expert in the last forward."""
    if not (layers := backbone.moe_layers()):  # `model.soft_layers: []`
        return torch.zeros(0, 2, backbone.config.num_experts, dtype=torch.float64)
    return torch.stack([layer.last_load for layer in layers])
