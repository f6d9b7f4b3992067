"""Weights from files: other naming schemes, other picture sizes, strict loading."""

from eve_ds.weights.load import WeightsError, load_into, load_state, load_weights
from eve_ds.weights.names import from_published, is_published, to_published
from eve_ds.weights.positions import interpolate_positions, resize_positions

__all__ = [
    "WeightsError",
    "from_published",
    "interpolate_positions",
    "is_published",
    "load_into",
    "load_state",
    "load_weights",
    "resize_positions",
    "to_published",
]
