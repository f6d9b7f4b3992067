"""First weights of a run: another run's backbone, and its head if asked for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import read_run_config
from eve_ds.tasks.base import Task
from eve_ds.weights.load import load_state, load_weights
from eve_ds.weights.model_folder import ModelFolder
from eve_ds.weights.names import from_published, is_published
from eve_ds.weights.positions import resize_positions
from preprocessing.errors import UserError

# What changes the model's function and no tensor's shape: weights trained with one value fit any other, and go wrong.
SHAPE_INDEPENDENT = ("num_heads", "top_k", "modality_to_experts", "activation", "norm_eps")


def load_initial(task: Task, checkpoint: str | Path, load_head: bool) -> None:
    """Copy weights into ``task``; an expert-parallel rank takes its experts, positions are interpolated.

    Args:
        task: built for its own image size and head.
        checkpoint: a run folder, a model folder, or a weights file in EVE's published naming or EVE-DS's own.
        load_head: the head comes from there too, and must be there; else it keeps its initial values.
    Raises:
        UserError: nothing there, unreadable, or of another model; the message names file and tensors.
        UserError: the config beside the weights has other values of ``SHAPE_INDEPENDENT`` settings.
    """
    files = ModelFolder.find(checkpoint)
    state = load_weights(files.weights)
    if is_published(state):
        state = from_published(state, task.config)
    copy_initial(task, state, files, load_head)


def wanted(task: Task, load_head: bool) -> tuple[str, ...]:
    """How the names of the weights begin that ``task`` starts from."""
    return ("backbone.", *task.heads) if load_head else ("backbone.",)


def copy_initial(task: Task, state: dict[str, Tensor], files: ModelFolder, load_head: bool) -> None:
    """As ``load_initial``, of weights that have been read: ``state`` (EVE-DS names), from ``files``."""
    if files.config is not None:
        _check_settings(task.config, files.config)
    own = {name: tensor for name, tensor in state.items() if name.startswith(wanted(task, load_head))}
    load_state(task, resize_positions(own, task.config), files.weights, () if load_head else task.heads)


def _check_settings(config: ModelConfig, stored: Path) -> None:
    trained = read_run_config(stored, "model")["model"]
    for name in SHAPE_INDEPENDENT:
        before, now = trained.get(name, getattr(ModelConfig, name)), getattr(config, name)
        if before != now:
            raise UserError(
                f"model.{name} is {now} here, but the weights were trained with {before} ({stored}); "
                f"set --model.{name} {str(before).lower() if isinstance(before, bool) else before}"
            )
