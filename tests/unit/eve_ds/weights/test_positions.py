"""Position embeddings for another picture size against a direct bicubic interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eve_ds.weights import WeightsError, interpolate_positions


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """[new, old]: Keys' cubic convolution (a = -0.75) at half-pixel centres, borders repeated."""
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            distance = abs(centre - tap)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            matrix[row, min(max(tap, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 30), (4, 2), (3, 3)])
def test_bicubic(old: int, new: int) -> None:
    torch.manual_seed(0)
    positions = torch.randn(1 + old**2, 5)
    out = interpolate_positions(positions, new**2)
    assert torch.equal(out[0], positions[0])
    matrix = cubic_matrix(old, new)
    expected = np.einsum("ri,cj,ijd->rcd", matrix, matrix, positions[1:].reshape(old, old, 5).double().numpy())
    np.testing.assert_allclose(out[1:].reshape(new, new, 5).numpy(), expected, atol=1e-5)


def test_dtype_is_kept() -> None:
    assert interpolate_positions(torch.randn(5, 3).bfloat16(), 16).dtype == torch.bfloat16


@pytest.mark.parametrize(("old", "new"), [(6, 9), (4, 10)])
def test_grids_must_be_square(old: int, new: int) -> None:
    with pytest.raises(WeightsError, match="square"):
        interpolate_positions(torch.zeros(1 + old, 3), new)
