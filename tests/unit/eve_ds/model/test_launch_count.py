"""How many launches a forward and backward pass of masked pre-training would take on an H100 with compiled blocks:
EVE-Base's blocks and decoder over as many tokens, of a tiny width, counted on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from eve_ds.kernels import expert_mlp, grouped_mm, linear_cross_entropy, permute
from eve_ds.kernels.permute import Layout, RowOperations
from eve_ds.model import block, compiled, counter_random, moe
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.masking import masked_words
from tests.support.lean_zero import Launches
from tests.support.tiny import MASK_ID, caption_batch, model_config

if TYPE_CHECKING:  # the compiler takes seconds to import
    from tests.support.graph_launches import Graphs

# Seen with torch 2.13: 368 outside of three graphs and 1,030 within; 2,494 of a plain pass.
MOST, MOST_GRAPHS = 1400, 4
CHUNKS = 5  # of the words' loss: with 256 texts of 40 tokens there are as many
COUNTED_AS = [  # owner, name, kernels there
    (counter_random, "plain_numbers", 1),
    (expert_mlp, "bias_activation_", 1),
    (expert_mlp, "add_group_bias_", 1),
    (expert_mlp, "zero_rest_", 1),
    (expert_mlp, "activation_gradient_", 2),
    (expert_mlp, "grouped_sum", 2),
    (grouped_mm, "zero_empty_groups_", 1),
    (F, "grouped_mm", 2),  # torch's own: one that prepares, and the products
]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """What Triton or a fused kernel computes there takes several operations here, and counts for what it is there."""
    launches = Launches()

    def counted(function: Callable[..., Any], kernels: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = launches.names.copy()
            with _disable_current_modes():
                result = function(*args, **kwargs)
            launches.names = before  # less what of these it called itself
            launches.names[function.__name__] += kernels
            return result

        return run

    def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def sort_by_expert(experts: Tensor, counts: Tensor) -> Layout:
        order = experts.argsort(stable=True)
        return Layout(order, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel())), counts)

    monkeypatch.setattr(linear_cross_entropy, "CHUNK", -(-4 * masked_words(40, 0.5) // CHUNKS))
    for owner, name, kernels in COUNTED_AS:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), kernels))
    plain = permute.operations(torch.empty(1))
    rows = RowOperations(*(counted(operation, 1) for operation in plain))
    monkeypatch.setattr(permute, "operations", lambda tensor: rows)
    monkeypatch.setattr(block, "attention", fused)
    monkeypatch.setattr(moe, "sort_by_expert", sort_by_expert)
    for owner in (grouped_mm, expert_mlp):
        monkeypatch.setattr(owner, "has_grouped_kernel", lambda device: True)
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    yield launches
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


def base_like() -> MaskedModeling:
    torch.manual_seed(0)
    # With fewer tokens sums over them would take fewer kernels.
    size = {"image_size": 224, "patch_size": 16, "max_text_length": 40, "text_positions": 40}
    backbone = Backbone(model_config(depth=12, soft_layers=[10, 11], drop_path=0.1, dim=64, **size))
    objective = ObjectiveConfig(decoder_dim=32, decoder_heads=4, word_head="mlp")
    assert objective.decoder_depth == 4
    return MaskedModeling(backbone, objective, MASK_ID).bfloat16().train()


def count(task: MaskedModeling, launches: Launches, graphs: Graphs) -> tuple[int, int]:
    """Outside of compiled code and within, of a pass after the first."""
    from tests.support.graph_launches import counting_outside

    batch = caption_batch(4, longest=40) | {"images": torch.randn(4, 3, 224, 224)}
    batch["text_ids"], batch["text_mask"] = torch.randint(5, 50, (4, 40)), torch.ones(4, 40, dtype=torch.bool)
    task(batch).loss.backward()
    task.zero_grad()
    launches.names.clear()
    graphs.calls.clear()
    with counting_outside(launches):
        task(batch).loss.backward()
    return launches.names.total(), graphs.launched()


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="asks inductor as torch 2.13 has it")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: tests/gpu/test_launches.py counts on it")
def test_launches_on_an_h100(as_on_a_gpu: Launches) -> None:
    from tests.support.graph_launches import Graphs

    task, graphs = base_like(), Graphs()
    plain, _ = count(task, as_on_a_gpu, graphs)
    assert plain > 2000  # so that the count sees what runs
    compiled.compile_parts(task, graphs)
    outside, within = count(task, as_on_a_gpu, graphs)
    assert len(graphs.launches) <= 2 * MOST_GRAPHS  # a forward and a backward one each
    assert outside + within <= MOST, f"{outside} outside, {within} within"
