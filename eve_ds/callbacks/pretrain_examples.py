"""For the report: what a pre-trained model makes of a few held-out pairs, and where its experts' tokens came from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from PIL import Image

from eve_ds.data.batch_reader import stack, to_batch
from eve_ds.data.samples import Samples
from eve_ds.engine.callback import Callback
from eve_ds.engine.device_feed import on_device
from eve_ds.engine.distributed import decide
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.spec import HeldOutExamples, PretrainSpec
from preprocessing.local_files import write_json

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer


_log = logging.getLogger(__name__)
KEPT = 5  # folders ``samples/step_N``


class PretrainExamples(Callback):
    """Writes ``samples/`` at the end of a run: the objective's examples and the expert load (see eve_ds/report).

    Every ``images_every``-th step it writes the images alone, into ``samples/step_N``, and shows them on dashboards.

    Args:
        spec: of the objective.
        held_out: the split to show.
        count: pairs of it, each of another image.
        images_every: steps; 0 looks at the end alone.
    """

    def __init__(self, spec: PretrainSpec, held_out: Samples, count: int, images_every: int = 0) -> None:
        self.images_every = images_every
        self.spec, self.held_out = spec, held_out
        first: dict[int, int] = {}  # the first caption of each of the first images
        for sample in range(len(held_out)):
            if len(first) >= count:
                break
            first.setdefault(int(held_out.split.sample(sample)[0]), sample)
        self.chosen = list(first.values())
        self.load: torch.Tensor | None = None
        self._warned = False

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """Counts the tokens of the last tenth of the run. A collective where images are due."""
        if trainer.step > 0.9 * trainer.total_steps:
            load = expert_load(trainer.task.backbone)
            self.load = load if self.load is None else self.load + load
        if self.images_every and trainer.step % self.images_every == 0:
            self._show_images(trainer)

    def _show_images(self, trainer: Trainer) -> None:
        images = self._examples(trainer).images
        if not trainer.is_main:
            return
        if not images:
            if not self._warned:
                _log.warning("logging.images_every=%d shows nothing: no patches are masked", self.images_every)
            self._warned = True
            return
        folder = trainer.output_dir / "samples"
        own = folder / f"step_{trainer.step:08d}"
        own.mkdir(parents=True, exist_ok=True)
        for name, pixels in images.items():
            Image.fromarray(pixels).save(own / name)
        for old in sorted(folder.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)
        trainer.show_images({f"samples/{Path(name).stem}": pixels for name, pixels in images.items()})

    def _examples(self, trainer: Trainer) -> HeldOutExamples:
        """A collective: with experts spread over ranks, all ranks predict the same pairs."""
        samples = [self.held_out[index, 0] for index in self.chosen]
        arrays = stack(samples, self.held_out.pad_id, self.held_out.max_text_length)
        batch = on_device(to_batch(arrays, raw=True), trainer.device)
        with trainer.whole_weights():
            return self.spec.held_out_examples(trainer.task, batch, self.held_out, self.chosen)

    def fit_end(self, trainer: Trainer) -> None:
        """A collective."""
        written = trainer.output_dir / "samples" / "samples.json"
        if trainer.step == trainer.start_step and decide(written.exists):
            return  # the run was whole already, and so are its samples
        load = self.load if self.load is not None else expert_load(trainer.task.backbone)
        load = load.to(trainer.device)
        dist.all_reduce(load)
        examples = self._examples(trainer)
        if trainer.is_main:
            self._write(trainer, examples, load.tolist())

    @staticmethod
    def _write(trainer: Trainer, examples: HeldOutExamples, load: list[Any]) -> None:
        folder = trainer.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for name, pixels in examples.images.items():
            Image.fromarray(pixels).save(folder / name)
        layers = [
            {"layer": layer, "counts": counts}
            for layer, counts in zip(sorted(trainer.config.model.soft_layers), load, strict=True)
        ]
        write_json(folder / "samples.json", {**examples.tree, "expert_load": {"layers": layers}})


def expert_load(backbone: Backbone) -> torch.Tensor:
    """[soft layers, 2, E] choices of this rank's image (0) and text (1) tokens per expert in the last forward."""
    if not (layers := backbone.moe_layers()):  # `model.soft_layers: []`
        return torch.zeros(0, 2, backbone.config.num_experts, dtype=torch.float64)
    return torch.stack([layer.last_load for layer in layers])
