"""The shape of a published model: EVE's config JSON, and what that file leaves out, read off the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.positions import POSITIONS

# In published files and here.
IMAGE_POSITIONS = ("backbone.pos_embed_vision", POSITIONS)
TEXT_POSITIONS = ("backbone.pos_embed_text", "backbone.text_embedding.positions")


def published_config(
    vlmo_config: str | Path, state: Mapping[str, Tensor], image_size: int | None = None
) -> ModelConfig:
    """Read EVE's ``config_vlmo*.json`` for the weights that belong to it.

    Args:
        vlmo_config: the JSON file.
        state: published or EVE-DS names.
        image_size: images' side, pixels. None: as the weights have it.
    Raises:
        ModelConfigError: as ``ModelConfig.from_vlmo``.
    """
    config = sized_as(ModelConfig.from_vlmo(vlmo_config), state)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    config.check()
    return config


def sized_as(config: ModelConfig, state: Mapping[str, Tensor]) -> ModelConfig:
    """The config with the image size and the number of text positions that the tensors have.

    Args:
        config: all else.
        state: published or EVE-DS names; without positions, the config stays as it is.
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
