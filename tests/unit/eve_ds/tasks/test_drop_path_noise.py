"""Drop path is a function of the sample: not of its place, its neighbors, its rank or torch's generator."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_tasks import TASKS, Batch, tiny_batch, tiny_task

ROWS = 6


def loss(task: torch.nn.Module, batch: Batch, seed: int) -> float:
    torch.manual_seed(seed)
    with torch.no_grad():
        return float(task(batch).loss)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_the_same_in_any_order_of_its_samples(name: str) -> None:
    task, batch = tiny_task(name, drop_path=0.5).train(), tiny_batch(ROWS)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    dropped = loss(task, batch, seed=0)
    assert loss(task, {key: value[order] for key, value in batch.items()}, seed=1) == pytest.approx(dropped, abs=2e-6)
    assert abs(loss(task.eval(), batch, seed=0) - dropped) > 2e-5
    task.train().seed += 1
    assert abs(loss(task, batch, seed=0) - dropped) > 2e-5


def test_every_branch_use_and_sample_has_a_number_of_its_own() -> None:
    task, sample_id = tiny_task("nlvr_plain", drop_path=0.5).train(), torch.arange(1000)
    noise = task.drop_path_noise(sample_id, 0, 1)
    assert noise is not None and noise.shape == (2 * 3, 2000)
    assert torch.equal(noise[:, 1000:], task.drop_path_noise(sample_id, 1))
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.cat([noise[:, :1000], noise[:, 1000:]])).fill_diagonal_(0).abs().max() < 0.15
    task.backbone.config.router_jitter = 0.1
    more = task.drop_path_noise(sample_id, 0, 1)
    assert more is not None and more.shape == (3 * 3, 2000) and torch.equal(more[: 2 * 3], noise)
    assert torch.corrcoef(torch.cat([more[:, :1000], more[:, 1000:]])).fill_diagonal_(0).abs().max() < 0.15
    assert task.eval().drop_path_noise(sample_id, 0) is None
    assert tiny_task("vqa").train().drop_path_noise(sample_id, 0) is None
