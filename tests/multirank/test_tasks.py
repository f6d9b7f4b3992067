"""Parallel equals single: the ranks' loss shares and gradients add up to those of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import run_distributed_test
from tests.support.tiny import mixed
from tests.support.tiny_tasks import TASKS, rows_of, tiny_batch, tiny_task

ROWS = 7  # odd on purpose: one image's captions lie on two ranks, and the ranks hold different numbers of rows
FIRST_RANKS = 3
# Modalities of the rows, by task: no rank has all, and the first has no text alone, the other no pair.
MIXED = {"pretrain mixed": "pipttti", "pretrain_joint mixed": "pipttti", "pretrain_mlm mixed": "ppptttt"}


def _gradients(name: str, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    task = tiny_task(name.removesuffix(" mixed"))
    batch = mixed(tiny_batch(ROWS), MIXED[name]) if name in MIXED else tiny_batch(ROWS)
    output = task(rows_of(batch, rows))
    output.loss.backward()
    gradients = {key: value.grad for key, value in task.named_parameters() if value.grad is not None}
    metrics = {key: torch.stack([part.double() for part in pair]) for key, pair in output.metrics.items()}
    return output.loss.detach(), gradients, metrics


def _shares_add_up(names: list[str], expected: dict[str, tuple]) -> None:
    rank = dist.get_rank()
    for name in names:
        loss, gradients, metrics = _gradients(name, slice(0, FIRST_RANKS) if rank == 0 else slice(FIRST_RANKS, ROWS))
        single_loss, single_gradients, single_metrics = expected[name]
        dist.all_reduce(loss)
        assert torch.allclose(loss, single_loss, atol=1e-5, rtol=0), (name, loss, single_loss)
        assert gradients.keys() == single_gradients.keys()
        for key, gradient in gradients.items():
            dist.all_reduce(gradient)
            error = (gradient - single_gradients[key]).abs().max().item()
            assert error < 1e-5 * max(1.0, single_gradients[key].abs().max().item()), (name, key, error)
        for key, pair in metrics.items():
            dist.all_reduce(pair)
            assert torch.allclose(pair, single_metrics[key], atol=1e-4), (name, key, pair, single_metrics[key])


def _evaluates_unevenly(names: list[str], expected: dict[str, tuple]) -> None:
    """The last batch of an evaluation: rank 1 has nothing but repeated rows, yet takes part in every collective."""
    rank = dist.get_rank()
    for name in names:
        task = tiny_task(name).eval()
        batch = tiny_batch(ROWS) | {"valid": torch.full((ROWS,), rank == 0)}
        with torch.no_grad():
            metrics = task(batch).metrics
        for key, pair in metrics.items():
            total = torch.stack([part.double() for part in pair])
            dist.all_reduce(total)
            assert torch.allclose(total, expected[name][2][key], atol=1e-4), (name, key)


@pytest.fixture(scope="module")
def single() -> dict[str, tuple]:
    return {name: _gradients(name, slice(0, ROWS)) for name in (*TASKS, *MIXED)}


def test_shares_and_gradients_add_up(single: dict[str, tuple]) -> None:
    run_distributed_test(_shares_add_up, 2, args=([*TASKS, *MIXED], single))


def test_a_rank_without_valid_rows_takes_part(single: dict[str, tuple]) -> None:
    run_distributed_test(_evaluates_unevenly, 2, args=(list(TASKS), single))
