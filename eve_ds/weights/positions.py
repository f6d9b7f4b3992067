"""Interpolation of position embeddings to another image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.model.model_config import ModelConfig
from preprocessing.errors import UserError

POSITIONS = "backbone.image_embedding.positions"


def interpolate_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Interpolate a square grid of positions bicubically, as the published code does. The class token's is copied.

    Args:
        positions: [1 + P, D], class token first, then patches row by row; P a square.
        num_patches: P', a square.
    Returns:
        [1 + P', D] in the same dtype (computed in float32); the input itself if P' = P.
    Raises:
        UserError: P or P' is not a square.
    """
    old, new = math.isqrt(positions.shape[0] - 1), math.isqrt(num_patches)
    if old**2 != positions.shape[0] - 1 or new**2 != num_patches:
        raise UserError(
            f"positions of {positions.shape[0] - 1} patches cannot be interpolated to {num_patches}: not square grids"
        )
    if old == new:
        return positions
    grid = positions[1:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.reshape(-1, num_patches).T.to(positions.dtype)])


def resize_positions(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state (EVE-DS names) with image positions for ``config.image_size``."""
    if POSITIONS not in state:
        return state
    return state | {POSITIONS: interpolate_positions(state[POSITIONS], config.num_patches)}
