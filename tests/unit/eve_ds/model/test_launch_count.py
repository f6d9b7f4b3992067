"""How many operations a forward and backward pass of masked pre-training launches with compiled blocks: EVE-Base's
blocks and decoder at a tiny width, counted on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from eve_ds.kernels import grouped_mm
from eve_ds.model import block, compiled, counter_random
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from tests.support.lean_zero import Launches
from tests.support.tiny import MASK_ID, caption_batch, model_config

# Seen with torch 2.13: 485 and 1,084, of three graphs. With each pass by itself through five graphs: 1,400 and 1,548.
MOST_OUTSIDE, MOST_WITHIN, MOST_GRAPHS = 520, 1200, 4


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fused attention, grouped products, random numbers by one kernel; what else Triton computes there takes several
    operations here."""

    def drawn(key: int, first: Tensor, second: Tensor, as_uniform: bool) -> Tensor:
        with _disable_current_modes():
            numbers = plain_numbers(key, first, second, as_uniform)
        return numbers.clone()  # what counts

    plain_numbers = counter_random.plain_numbers

    def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    monkeypatch.setattr(block, "attention", fused)
    monkeypatch.setattr(counter_random, "plain_numbers", drawn)
    monkeypatch.setattr(grouped_mm, "_grouped_kernel_takes", lambda *operands: True)
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    yield
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


def base_like() -> MaskedModeling:
    torch.manual_seed(0)
    backbone = Backbone(model_config(depth=12, soft_layers=[10, 11], drop_path=0.1))
    for layer in backbone.moe_layers():
        layer.experts.use_grouped_mm = True
    objective = ObjectiveConfig(decoder_dim=32, decoder_heads=4, word_head="mlp")
    assert objective.decoder_depth == 4
    return MaskedModeling(backbone, objective, MASK_ID).bfloat16().train()


def operations(task: MaskedModeling) -> int:
    """Outside of compiled code, of a pass after the first."""
    from tests.support.graph_launches import counting_outside

    batch = caption_batch(4)
    task(batch).loss.backward()
    task.zero_grad()
    with counting_outside(launches := Launches()):
        task(batch).loss.backward()
    return launches.names.total()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_compiled_pass_launches_few_operations() -> None:
    from tests.support.graph_launches import Graphs  # here: the compiler takes seconds to import

    task, graphs = base_like(), Graphs()
    plain = operations(task)
    assert plain > 2000  # so that the count sees what runs
    compiled.compile_parts(task, graphs)
    outside = operations(task)
    within = graphs.launched() // 2  # of two passes
    assert len(graphs.launches) <= 2 * MOST_GRAPHS  # a forward and a backward one each
    assert (outside <= MOST_OUTSIDE, within <= MOST_WITHIN) == (True, True), f"{outside} outside, {within} within"
