"""Collectives: sums, uneven all-to-alls and gathers, differentiable where gradients must cross ranks."""

from eve_ds.parallel.collectives import (
    all_reduce_sum,
    all_to_all_uneven,
    alone,
    exchange_counts,
    gather_with_gradient,
    rank,
    world_size,
)

__all__ = [
    "all_reduce_sum",
    "all_to_all_uneven",
    "alone",
    "exchange_counts",
    "gather_with_gradient",
    "rank",
    "world_size",
]
