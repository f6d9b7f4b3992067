"""Loading of the published files in tests/assets into a bare backbone, whatever head they hold."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.load import load_state, load_weights
from eve_ds.weights.names import from_published
from eve_ds.weights.positions import resize_positions


def load_backbone(module: nn.Module, path: Path, config: ModelConfig) -> None:
    """Load a VQA file into ``module.backbone``; its head is left out."""
    state = resize_positions(from_published(load_weights(path), config), config)
    load_state(module, state, path, may_exceed=["output."])
