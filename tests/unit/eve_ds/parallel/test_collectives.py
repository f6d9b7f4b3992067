"""Without a process group every collective is that of a world of one. Real ranks: tests/multirank/test_parallel.py."""

from __future__ import annotations

import pytest
import torch

from eve_ds import parallel


def test_a_world_of_one() -> None:
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    rows = torch.randn(3, 2, requires_grad=True)
    assert parallel.all_to_all_uneven(rows, [3], [3]) is rows
    assert parallel.gather_with_gradient(rows) is rows
    total = parallel.all_reduce_sum(rows)
    assert torch.equal(total, rows) and not total.requires_grad
    counts = torch.tensor([[1, 2]])
    assert torch.equal(parallel.exchange_counts(counts), counts)


def test_rows_and_counts_must_agree() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        parallel.all_to_all_uneven(torch.zeros(3, 2), [2], [2])
