"""Without a process group every collective is that of a world of one. Real ranks: tests/multirank/test_parallel.py."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from eve_ds import parallel


@pytest.fixture
def among_four() -> Iterator[None]:
    """This process is rank 1 of 4."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def place() -> tuple[int, int]:
    return parallel.rank(), parallel.world_size()


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


def test_alone_is_a_world_of_one_for_this_thread_alone(among_four: None) -> None:
    assert place() == (1, 4)
    with ThreadPoolExecutor(1) as other, pytest.raises(KeyError), parallel.alone():
        test_a_world_of_one()
        with parallel.alone():
            pass
        assert place() == (0, 1)
        assert other.submit(place).result() == (1, 4)
        raise KeyError
    assert place() == (1, 4)
