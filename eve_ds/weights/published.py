"""Config of a published model: EVE's config JSON, completed by the shapes of the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.positions import POSITIONS

# Names in published files and in EVE-DS.
IMAGE_POSITIONS = ("backbone.pos_embed_vision", POSITIONS)
TEXT_POSITIONS = ("backbone.pos_embed_text", "backbone.text_embedding.positions")


def published_config(
    vlmo_config: str | Path, state: Mapping[str, Tensor], image_size: int | None = None
) -> ModelConfig:
    """Read the ``config_vlmo*.json`` of published weights.

    Args:
        vlmo_config: the JSON file.
        state: published or EVE-DS names.
        image_size: side of an image, pixels; None: that of the weights.
    Raises:
        UserError: as ``ModelConfig.from_vlmo``.
    """
    config = sized_as(ModelConfig.from_vlmo(vlmo_config), state)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    config.check()
    return config


def sized_as(config: ModelConfig, state: Mapping[str, Tensor]) -> ModelConfig:
    """Set the image size and the number of text positions of a config to those of the tensors.

    Args:
        config: all other values.
        state: published or EVE-DS names; without positions, the config is returned unchanged.
    """
    image, text = (
        next((state[name].shape for name in names if name in state and state[name].ndim == 2), None)
        for names in (IMAGE_POSITIONS, TEXT_POSITIONS)
    )
    if image is not None and image[0] > 1:
        config = replace(config, image_size=math.isqrt(image[0] - 1) * config.patch_size)
    if text is not None:
        config = replace(config, text_positions=text[0], max_text_length=min(config.max_text_length, text[0]))
    return config
