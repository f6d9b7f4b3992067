"""An exponential moving average (EMA) of the weights, kept in the checkpoints: a callback with a state, as an example.

``--optimizer.ema`` is the built-in one, for experts on several ranks, too.

PYTHONPATH=docs/examples ... -m eve_ds.pretrain ... --logging.callbacks "[ema_callback:EMA]"
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eve_ds.engine.callback import Callback
from eve_ds.engine.trainer import Trainer
from preprocessing.errors import UserError


class EMA(Callback):
    """Keeps ``average = decay * average + (1 - decay) * weights`` on rank 0, in fp32, and writes it to
    ``output_dir/ema.safetensors`` at the end.

    The task's weights are bf16 in a bf16 run; a decay closer to 1 than about 0.999 needs their fp32 master copies.

    Args:
        decay: share of the average that each step keeps.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def fit_start(self, trainer: Trainer) -> None:
        if trainer.config.engine.expert_parallel_size > 1:
            raise UserError("ema_callback: rank 0 has not all experts; set engine.expert_parallel_size=1")
        if not self.average:  # a new run: a resumed one has got it by load_state_dict
            self._update(trainer, weight=1.0)

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._update(trainer, weight=1 - self.decay)

    def fit_end(self, trainer: Trainer) -> None:
        if trainer.is_main and not trainer.stopped_early:
            save_file(
                {name: value.cpu() for name, value in self.average.items()}, trainer.output_dir / "ema.safetensors"
            )

    def state_dict(self) -> dict[str, Any]:
        return self.average

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state

    @torch.no_grad()
    def _update(self, trainer: Trainer, weight: float) -> None:
        with trainer.whole_weights():  # a collective under ZeRO 3, so every rank enters it
            if not trainer.is_main:
                return
            for name, parameter in trainer.task.named_parameters():
                value = parameter.detach().float()
                average = self.average.get(name, value).to(value.device)
                self.average[name] = torch.lerp(average, value, weight)
