"""Moving averages of the weights: by a plain rule, and evaluated as a trainer does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.engine.callback import Callback
from eve_ds.errors import StopError

EMA_DECAY = 0.26  # below what the bound that grows with the steps allows for the third of them
Batch = dict[str, Tensor]
State = dict[str, np.ndarray]


def moving(average: Tensor, value: Tensor, updates: Tensor) -> Tensor:
    """The next average; ``updates``: how many there were, with that which copied the first weights."""
    keep = min(EMA_DECAY, float((1 + updates) / (10 + updates)))
    return keep * average + (1 - keep) * value


def evaluate(trainer: Any, ema: Callback, rows: Batch, losses: list[float]) -> tuple[State, State]:
    """As a trainer, with the weights and with the averages, whose losses are added to ``losses``; then, after an
    evaluation of the averages that is stopped, with the weights once more: every bit is as it was.

    Args:
        trainer: has ``engine``.
        ema: the callback; one that does nothing where there are no averages.
        rows: this rank's, of the held-out batch.
    Returns:
        rank 0's ``full_state`` of both.
    """
    from eve_ds.engine.whole_weights import full_state

    states: list[State] = []

    @torch.no_grad()
    def held_out(trainer: Any) -> dict[str, float]:
        trainer.engine.eval()
        loss = trainer.engine(rows).loss.detach()
        dist.all_reduce(loss)
        states.append({name: value.numpy() for name, value in full_state(trainer.engine.module).items()})
        return {"val/loss": float(loss)}

    def stop(trainer: Any) -> dict[str, float]:
        raise StopError

    trainer.step, trainer.evaluate = 0, held_out
    found = held_out(trainer)
    # What ZeRO 3 keeps whole, being small, is gathered again; others may be whole until a forward pass comes.
    kept = [value for value in trainer.engine.module.parameters() if getattr(value, "ds_persist", True)]
    held = [value.numel() for value in kept]
    ema.evaluating(trainer, found)
    assert all(value.numel() >= before for value, before in zip(kept, held, strict=True))
    losses += found.values()
    if len(states) == 1:
        return states[0], {}
    assert found.keys() == {"val/loss", "val_ema/loss"} and found["val_ema/loss"] != found["val/loss"]
    trainer.evaluate = stop
    with pytest.raises(StopError):
        ema.evaluating(trainer, {})
    assert held_out(trainer)["val/loss"] == found["val/loss"]
    last, averages, again = states
    assert all(np.array_equal(last[name], again[name]) for name in last)
    return last, averages
