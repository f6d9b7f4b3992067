"""How closely weights that were trained in two ways agree."""

from __future__ import annotations

import math

import numpy as np

FP32_TOLERANCE, BF16_TOLERANCE, BF16_TENSOR_TOLERANCE = 1e-5, 2e-2, 3e-1


def strays(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], first: dict[str, np.ndarray], exact: bool
) -> list[str]:
    """What differs of weights that came from ``first``: see ``differences`` in matrix.py."""
    if exact:
        errors = {name: float(np.abs(got[name] - other).max()) for name, other in expected.items()}
        return [f"{name} differs by {error:.3g}" for name, error in errors.items() if not error < FP32_TOLERANCE]
    kinds = {kind: [n for n in expected if sort_of(n) == kind] for kind in ("dense", "expert", "router")}
    limits = [(names, BF16_TOLERANCE) for names in kinds.values() if names] + [
        ([name], BF16_TENSOR_TOLERANCE) for name in expected
    ]
    faults = []
    for names, limit in limits:
        error = distance(got, expected, names) / distance(first, expected, names)
        if not error < limit:
            faults.append(f"{names[0]} and {len(names) - 1} more differ by {error:.3g} of their way")
    return faults


def sort_of(name: str) -> str:
    if ".experts." in name:
        return "expert"
    return "router" if ".moe." in name else "dense"  # the modality vectors are the router's


def distance(first: dict[str, np.ndarray], last: dict[str, np.ndarray], names: list[str]) -> float:
    """Euclidean, over all entries of some tensors."""
    return math.hypot(*(float(np.linalg.norm(first[name] - last[name])) for name in names))
