"""A published file of weights in a bare backbone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.load import load_state, load_weights, resize_positions
from eve_ds.weights.published import from_published


def load_published(module: nn.Module, path: Path, config: ModelConfig) -> None:
    """Copy the backbone's weights of a file in EVE's published naming into ``module.backbone``."""
    state = from_published(load_weights(path), config)
    state = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    load_state(module, resize_positions(state, config), path)
