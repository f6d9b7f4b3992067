"""Blocks under torch.compile: one graph a kind and shape, no graph break, the numbers of the plain ones, no more kept.

"aot_eager" traces, splits forward from backward and runs torch's own operations: what is generated for a device is
checked where there is one (tests/gpu), and for the CPU by the long test. "eager" only traces, in half the time: for
what is compiled, not how.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from eve_ds.model import compiled
from eve_ds.model.block import HardBlock, SoftBlock, key_bias
from eve_ds.model.compiled import MOST_SHAPES, compile_parts
from eve_ds.model.decoders import DecoderBlock
from eve_ds.model.moe import MoE
from tests.support.tiny import caption_batch, masked_task, mixed, model_config


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    from torch._dynamo.utils import counters

    for _ in range(2):
        torch._dynamo.reset()
        compiled._compiled.cache_clear()
        counters.clear()
        if _ == 0:
            yield


def stats() -> tuple[int, int]:
    """(graphs compiled, graph breaks)."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def pair(backend: str, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The same task twice, the second with compiled blocks: three without experts, two soft, one of the decoder."""
    shape: dict[str, Any] = {"depth": 5, "soft_layers": [3, 4], "drop_path": 0.3, **changes}
    plain, other = (masked_task(**shape).train() for _ in range(2))
    assert compile_parts(other, backend) == 6
    return plain, other


def compare(plain: nn.Module, other: nn.Module, steps: int, kinds: str = "") -> None:
    for step in range(steps):
        batch = caption_batch(4, seed=step)
        batch = mixed(batch, kinds) if kinds else batch
        losses = [task(batch).loss for task in (plain, other)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_three_graphs_serve_all_blocks_and_both_passes() -> None:
    plain, other = pair("aot_eager")
    compare(plain, other, steps=2)
    assert stats() == (3, 0)  # hard blocks, soft ones, each with both passes, and the decoder's
    with torch.no_grad():
        other(caption_batch(3))
        other.eval()(caption_batch(4))
    compiled.run_plainly(True)
    with FlopCounterMode(display=False) as counter:  # as in a run's first step
        other.train()(caption_batch(4))
    compiled.run_plainly(False)
    assert counter.get_total_flops() > 0
    assert stats() == (3, 0)  # all these run as they stand, whatever their batches


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ({"router_jitter": 0.1, "router_z_loss_weight": 0.1, "modality_to_experts": False}, 3),
        ({"drop_path": 0.0, "modality_routing": False, "shared_layers": [0, 1]}, 4),
        ({"capacity_factor": 0.5}, 2),  # soft blocks run plainly
    ],
)
def test_other_models(changes: dict[str, Any], graphs: int) -> None:
    compare(*pair("aot_eager", **changes), steps=1)
    assert stats() == (graphs, 0)


@pytest.mark.parametrize("kinds", ["ppit", "iiit"])
def test_rows_of_one_modality(kinds: str) -> None:
    """The passes have rows of their own, or none: then they run as they stand."""
    compare(*pair("aot_eager"), steps=1, kinds=kinds)
    assert stats()[1] == 0


def test_hooks_see_all_passes() -> None:
    """What callbacks count: choices of a layer by modality and expert, tokens of the backbone."""
    found = []
    for task in pair("eager"):
        loads = torch.zeros(2, 4, dtype=torch.float64)
        tokens: list[int] = []

        def count_load(layer: Any, *_: Any, sums: Tensor = loads) -> None:
            sums.add_(layer.last_load)

        def count_tokens(_: Any, args: Any, output: Any, seen: list[int] = tokens) -> None:
            seen += [one.hidden.shape[1] for one in (output if isinstance(output, list) else [output])]

        task.backbone.moe_layers()[0].register_forward_hook(count_load)
        task.backbone.register_forward_hook(count_tokens)
        task(caption_batch(4))
        found.append((loads.tolist(), tokens))
    assert found[0] == found[1] and found[0][1] == [17, 29]


class OwnBlock(nn.Module):
    """Takes one pass, and is not compiled."""

    def __init__(self, block: HardBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, bias: Tensor | None, num_image_tokens: int, factors: Tensor | None) -> Tensor:
        out: Tensor = self.block(x, bias, num_image_tokens, factors)
        return out


class OwnLayer(nn.Module):
    """Takes one pass: a mixture around another."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, modality: Tensor, valid: Tensor | None) -> Any:
        return self.moe(x, modality, valid)


@pytest.mark.parametrize("what", ["block", "layer"])
def test_own_parts_in_place_of_ours(what: str) -> None:
    tasks = [masked_task(depth=4, soft_layers=[2, 3]).train() for _ in range(2)]
    for task in tasks:
        blocks = task.backbone.blocks
        if what == "block":
            blocks[1] = OwnBlock(blocks[1])
        else:
            blocks[3].moe = OwnLayer(blocks[3].moe)
    assert compile_parts(tasks[1], "eager") == 5
    compare(*tasks, steps=1)


def test_odd_shapes_do_not_compile_without_end_and_other_reasons_to_compile_anew_do_not_end_a_run() -> None:
    block = HardBlock(model_config()).train()
    compile_parts(block, "eager")
    for rows in range(MOST_SHAPES + 3):  # without a row it runs as it stands
        out = block(torch.randn(rows, 5, 32), None, 3)
        assert out.shape == (rows, 5, 32)
    assert stats() == (MOST_SHAPES, 0)
    assert block(torch.randn(2, 32, 5).transpose(1, 2), None, 3).shape == (2, 5, 32)
    block(torch.randn(2, 5, 32, requires_grad=True), None, 3).sum().backward()
    assert stats()[0] > MOST_SHAPES


@pytest.mark.parametrize("kind", ["hard", "both passes", "both passes, soft", "decoder"])
def test_no_more_is_kept_than_without_the_compiler(kind: str) -> None:
    """Activations are computed again in the backward pass, as ``kernels.mlp`` does."""
    inputs: tuple[Any, ...] = ()
    for tokens in (20, 40) if kind.startswith("both passes") else (20,):
        valid = torch.ones(4, tokens, dtype=torch.bool)
        inputs += (torch.randn(4, tokens, 32, requires_grad=True), key_bias(valid, torch.float32))
        modality = (torch.arange(tokens) >= tokens - 8).long()
        inputs += (modality, valid, torch.ones(2, 4), None) if "soft" in kind else (tokens - 8, torch.ones(2, 4))
    block: nn.Module = DecoderBlock(32, 4) if kind == "decoder" else HardBlock(model_config(mlp_hidden=512))
    block = SoftBlock(model_config(), MoE(32, 64, 4)) if "soft" in kind else block
    inputs = inputs[:1] if kind == "decoder" else inputs
    plain = kept_bytes(block.train(), inputs)
    compile_parts(block, "aot_eager_decomp_partition")  # the split of forward and backward that inductor has
    joined = 4 * (20 + 40) * 32 * 4 if "soft" in kind else 0  # bytes: the tokens of both passes, not kept twice
    assert kept_bytes(block, inputs) <= plain - joined


def kept_bytes(block: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Of all that the backward pass needs, weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}
    alive = []  # else a later tensor could take the place of an earlier one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = block(*inputs)
    torch.cat([each.flatten() for each in tree_leaves(outs)]).sum().backward()
    return sum(kept.values())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_code_generated_for_the_cpu() -> None:
    compare(*pair("inductor"), steps=1)
