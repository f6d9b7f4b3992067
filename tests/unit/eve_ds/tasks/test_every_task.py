"""What holds for every task: gradients for ZeRO, bf16 weights, repeated rows, empty batches."""

from __future__ import annotations

import pytest
import torch

from eve_ds.tasks import Task
from eve_ds.tasks.registry import BY_NAME
from tests.support.tiny_tasks import CONTRASTING, RIVALS, TASKS, Batch, rows_of, tiny_batch, tiny_task

EVERY = pytest.mark.parametrize("name", list(TASKS))


def means(task: Task, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(total / count) for name, (total, count) in task(batch).metrics.items()}


def test_registry_has_the_contracts_names() -> None:
    assert set(BY_NAME) == {"pretrain", "mlm_mim_codes", "retrieval", "vqa", "nlvr", *RIVALS}


@EVERY
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """ZeRO reduces all parameters on all ranks: one without a gradient would stop the run."""
    task = tiny_task(name)
    task.train()
    output = task(tiny_batch(4))
    output.loss.backward()
    for parameter_name, parameter in task.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    assert output.loss.dtype == torch.float32
    assert not any(part.requires_grad for pair in output.metrics.values() for part in pair)
    assert {prefix for prefix in task.heads if any(key.startswith(prefix) for key in task.state_dict())}
    assert all(key.startswith(("backbone.", *task.heads)) for key in task.state_dict())


@EVERY
def test_bf16_weights_give_nearly_the_same_loss(name: str) -> None:
    """As DeepSpeed's bf16 mode runs it: parameters bf16, images float32, losses float32."""
    batch = tiny_batch(6)
    exact = tiny_task(name)(batch).loss.detach()
    task = tiny_task(name).bfloat16()
    output = task(batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert float(output.loss.detach()) == pytest.approx(float(exact), rel=0.02)


@EVERY
def test_repeated_rows_do_not_count(name: str) -> None:
    task, batch = tiny_task(name).eval(), tiny_batch(5)
    valid = torch.tensor([True, True, False, True, False])
    assert means(task, batch | {"valid": valid}) == pytest.approx(means(task, rows_of(batch, valid)), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in CONTRASTING])  # they need a global batch
def test_a_batch_of_repeated_rows_alone_is_empty_not_an_error(name: str) -> None:
    task, batch = tiny_task(name), tiny_batch(2)
    output = task(batch | {"valid": torch.zeros(2, dtype=torch.bool)})
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(parameter.grad is not None for parameter in task.parameters())


@EVERY
def test_losses_do_not_depend_on_the_padding(name: str) -> None:
    task, batch = tiny_task(name).eval(), tiny_batch(4)
    short = batch["text_mask"].clone()
    short[:, 8:] = False
    batch |= {"text_mask": short, "text_ids": batch["text_ids"] * short}
    assert means(task, rows_of(batch, slice(0, 4))) == pytest.approx(means(task, batch), abs=1e-5)
