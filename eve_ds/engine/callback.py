"""Callbacks: the hooks through which logging, progress, profiling and the like join the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from preprocessing.errors import UserError

if TYPE_CHECKING:
    from eve_ds.engine.checkpoint_record import Manifest
    from eve_ds.engine.trainer import Trainer

HOOKS = (
    "checkpoint_loaded",
    "fit_start",
    "step_start",
    "backward_end",
    "step_end",
    "evaluating",
    "evaluation_end",
    "checkpoint_saved",
    "images_made",
    "alert",
    "fit_end",
    "close",
)


class Callback:
    """Base class: every hook does nothing. Override those that are needed; the others cost nothing.

    Hooks run on every rank, in the order in which the callbacks are listed. A hook that prints or writes files does so
    only where ``trainer.is_main``. A hook that communicates does so on every rank.

    Hooks read the trainer: ``config``, ``task`` (the module), ``engine`` (DeepSpeed's), ``device``, ``output_dir``,
    ``step`` (optimizer steps done), ``start_step``, ``total_steps``, ``rank``, ``world_size``, ``is_main``, and
    ``whole_weights()``. They change nothing in it, except through its ``set_lr_factor``,
    ``keep_checkpoint`` and ``end``.
    """

    def checkpoint_loaded(self, trainer: Trainer, path: Path, manifest: Manifest) -> None:
        """After a run that resumes or branches has loaded the checkpoint ``path`` (weights, Adam's moments, callback
        states): for what `rank_files` put into it. It may be of another topology."""

    def fit_start(self, trainer: Trainer) -> None:
        """Before the first step of this process. ``start_step`` is set, weights and callback states are loaded."""

    def step_start(self, trainer: Trainer) -> None:
        """Before an optimizer step, after the configured schedule has set its learning rate.

        ``trainer.step`` counts the steps done, so it is 0 here in the first step of a run. ``trainer.set_lr_factor``
        replaces the learning rate of this step.
        """

    def backward_end(self, trainer: Trainer) -> None:
        """After the backward pass of each micro-batch, before DeepSpeed's ``step``."""

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """After an optimizer step, with the weights updated.

        ``record`` holds step, samples, loss, the task's metrics, lr, grad_norm, samples_per_second, step_seconds and
        more. It is the same on every rank, except for the times. What a callback adds to it, on rank 0 at least, those
        after it see.
        """

    def evaluating(self, trainer: Trainer, found: dict[str, float]) -> None:
        """In an evaluation, after ``trainer.evaluate``. ``found`` holds its metrics by split (``val/loss``), complete
        on rank 0; what a callback adds to them is recorded, too. May raise StopError, on all ranks together.
        """

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """After an evaluation. ``record`` holds step and the metrics by split (``val/loss``); complete on rank 0."""

    def checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint is complete on disk at ``path``."""

    def images_made(self, trainer: Trainer, images: dict[str, np.ndarray]) -> None:
        """Images of this step for dashboards, by name: uint8 [H, W, 3]. On rank 0 alone."""

    def alert(self, trainer: Trainer, title: str, text: str) -> None:
        """Something that whoever watches the run should hear of, such as a suspect loss. The same on every rank."""

    def fit_end(self, trainer: Trainer) -> None:
        """After the last step, or after the step in which a stop request was served. Not called after an exception."""

    def close(self, trainer: Trainer) -> None:
        """The last call, also after an exception and if ``fit_start`` was never reached. Must not raise."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: tensors, numbers, strings, None, and lists and dicts of these.

        Called on every rank; the state of rank 0 is stored. An empty dict stores nothing.
        """
        return {}

    def rank_files(self) -> dict[str, Any]:
        """{file name: content} that this rank adds to a checkpoint: what `state_dict` may hold, of any size.

        Called on every rank; no two ranks name the same file.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on rank 0, with tensors on the CPU and tuples as lists.

        Called on every rank before ``fit_start``, when a run resumes or branches from a checkpoint that has a state of
        this callback.
        """


def overridden(callbacks: Sequence[Callback], method: str) -> list[Callable[..., Any]]:
    """The bound ``method`` of each callback that does not just inherit it from `Callback`."""
    methods = [getattr(callback, method) for callback in callbacks]
    return [found for found in methods if getattr(found, "__func__", None) is not getattr(Callback, method)]


def named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks by the name under which a checkpoint keeps their state: their class's import path, and for the second
    callback of a class ``#2``, and so on."""
    found: dict[str, Callback] = {}
    for callback in callbacks:
        kind = type(callback)
        name, count = f"{kind.__module__}:{kind.__qualname__}", 1
        while (key := name if count == 1 else f"{name}#{count}") in found:
            count += 1
        found[key] = callback
    return found


def collect_states(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """{name: state} of the callbacks that have a state, ready to be saved. Called by all ranks.

    Raises:
        UserError: a state holds what ``torch.load(weights_only=True)`` would refuse.
    """
    states = {}
    for name, callback in named(callbacks).items():
        if state := callback.state_dict():
            states[name] = _storable(state, f"callback {name}: state_dict()")
    return states


def restore_states(callbacks: Sequence[Callback], states: Mapping[str, Any]) -> list[str]:
    """Give each callback its state. Returns the names of the states that belong to none of them."""
    known = named(callbacks)
    for name, state in states.items():
        if name in known:
            known[name].load_state_dict(state)
    return [name for name in states if name not in known]


def _storable(value: Any, place: str) -> Any:
    """A copy of ``value`` that consists of plain Python types and CPU tensors."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().cpu()
    for kind in (bool, int, float, str):  # subclasses, such as NumPy's float64, become the plain type
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        return [_storable(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_storable(key, place): _storable(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise UserError(
        f"{place} is a {type(value).__name__}; return tensors, numbers, strings, None, and lists and dicts of these"
    )
