"""Compiled blocks against plain ones on the device, at Base width: losses, gradients, graphs, memory, seconds.

On a GPU inductor's code runs; in the dry run the traced graphs, by torch's own operations.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from eve_ds.bench.step import build_task, make_batch
from eve_ds.config import PretrainConfig, parse
from eve_ds.model import compiled
from eve_ds.model.backbone import Backbone
from eve_ds.model.compiled import compile_parts
from tests.gpu.kit_sizes import Sizes, pretrain_options

PAIRS = 8
COSINE, LOSS = {torch.float32: 0.999999, torch.bfloat16: 0.999}, {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def pair(device: torch.device, dtype: torch.dtype) -> tuple[PretrainConfig, nn.Module, nn.Module]:
    """A pre-training task of four blocks, plain and compiled; each token goes to all experts, so that none is a matter
    of rounding."""
    options = ["--model.depth=4", "--model.soft_layers=[2,3]", "--model.num_experts=4", "--model.top_k=4"]
    config = parse(PretrainConfig, [*pretrain_options(device), *options], "test")
    torch.manual_seed(0)
    plain = build_task(config, Backbone(config.model)).to(device, dtype).train()
    other = copy.deepcopy(plain)
    compile_parts(other, "inductor" if device.type == "cuda" else "aot_eager")
    return config, plain, other


def gradients(task: nn.Module) -> Tensor:
    return torch.cat([value.grad.double().flatten() for value in task.parameters() if value.grad is not None])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks(device: torch.device, sizes: Sizes, dtype: torch.dtype, figures: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()
    config, plain, other = pair(device, dtype)
    batch = make_batch(config, PAIRS, device)
    began = time.monotonic()
    losses = [task(batch).loss for task in (plain, other)]
    for loss in losses:
        loss.backward()
    figures[f"compiled, {dtype}: seconds of the first pass"] = round(time.monotonic() - began, 1)
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=LOSS[dtype])
    cosine = float(torch.cosine_similarity(gradients(plain), gradients(other), dim=0))
    figures[f"compiled, {dtype}: cosine of the gradients"] = round(cosine, 7)
    assert cosine > COSINE[dtype]
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (3, 0)
    if device.type == "cuda":
        peaks = [peak_bytes(task, make_batch(config, sizes.pairs, device)) for task in (plain, other)]
        figures[f"compiled, {dtype}: peak beside the plain one's"] = round(peaks[1] / peaks[0], 3)
        assert peaks[1] < 1.1 * peaks[0]


def peak_bytes(task: nn.Module, batch: dict[str, Tensor]) -> int:
    """Of a forward and backward pass, what was held before aside."""
    task(batch).loss.backward()
    task.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task(batch).loss.backward()
    task.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before
