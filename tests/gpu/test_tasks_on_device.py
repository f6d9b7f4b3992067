"""Loss and gradients of each task on the device against float64 on the CPU.

Each token goes to all experts: which of two nearly equal gates is larger is for the rounding to say, and would tell
nothing. All statements of NLVR are true: of true and false ones the gradients almost cancel, down to the rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_tasks import TASKS, tiny_batch, tiny_task

ROWS = 16
LOSS, GRADIENT, TENSOR = 1e-5, 1e-4, 1e-3  # in float32, relative; of a tensor's gradient beside 1 % of the whole norm
COSINE = 0.999  # in bf16


def outcome(name: str, dtype: torch.dtype, device: torch.device | str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name, float64 on the CPU."""
    task = tiny_task(name)
    for layer in task.backbone.moe_layers():
        layer.top_k = layer.router.top_k = layer.num_experts
    task = task.to(device, dtype).train()
    batch = {
        key: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for key, value in (tiny_batch(ROWS) | {"label": torch.ones(ROWS, dtype=torch.int64)}).items()
    }
    loss = task(batch).loss
    loss.backward()
    gradients = {key: p.grad.double().cpu() for key, p in task.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("name", TASKS)
def test_a_task_in_fp32_and_bf16(name: str, device: torch.device, figures: dict[str, Any]) -> None:
    exact_loss, exact = outcome(name, torch.float64, "cpu")
    whole = flat(exact)
    loss, gradients = outcome(name, torch.float32, device)
    assert loss == pytest.approx(exact_loss, rel=LOSS) and gradients.keys() == exact.keys()
    assert float((flat(gradients) - whole).norm() / whole.norm()) < GRADIENT
    for key, value in exact.items():
        limit = TENSOR * (value.norm() + 0.01 * whole.norm())
        assert float((gradients[key] - value).norm()) < float(limit), key

    loss, gradients = outcome(name, torch.bfloat16, device)
    cosine = float(torch.cosine_similarity(flat(gradients), whole, dim=0))
    figures[f"bf16 cosine, {name}"] = round(cosine, 5)
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert cosine > COSINE
