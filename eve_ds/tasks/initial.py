"""First weights of a fine-tuning run: another run's backbone, and its head if asked for."""

from __future__ import annotations

from pathlib import Path

from eve_ds.tasks.base import Task
from eve_ds.weights import from_published, is_published, load_state, load_weights, resize_positions
from eve_ds.weights.model_folder import ModelFolder


def load_initial(task: Task, checkpoint: str | Path, load_head: bool) -> None:
    """Copy weights into ``task``; an expert-parallel rank takes its experts, positions are interpolated.

    Args:
        task: built for its own picture size and head.
        checkpoint: a run folder, a model folder, or a weights file in EVE's published naming or EVE-DS's own.
        load_head: the head comes from there too, and must be there; else it keeps its first values.
    Raises:
        WeightsError, DataError: nothing there, unreadable, or of another model; the message names file and tensors.
    """
    file = ModelFolder.find(checkpoint).weights
    state = load_weights(file)
    if is_published(state):
        state = from_published(state, task.config)
    wanted = ("backbone.", *task.heads) if load_head else ("backbone.",)
    own = {name: tensor for name, tensor in state.items() if name.startswith(wanted)}
    load_state(task, resize_positions(own, task.config), file, () if load_head else task.heads)
