"""At evaluation a sample's output is its own: alone, in any batch, in any order, padded, whatever stands in padding.

(And at any expert-parallel size: tests/multirank/test_evaluation.py.) float32, within 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.router import Routing
from tests.support.tiny_tasks import PREDICTING, predictions, rows_of, tiny_batch, tiny_task

Inputs = dict[str, Tensor]
WORDS, LONGEST = 20, 8
TIE = 1e-5  # gates closer than this are equal but for rounding: such a token may go to either expert


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@st.composite
def backbones(draw: st.DrawFn) -> Backbone:
    """Any number of experts and choices; weights above initial values, so that leaks show; some experts empty."""
    num_experts = draw(st.integers(1, 6), label="experts")
    top_k = draw(st.integers(1, min(3, num_experts)), label="top k")
    empty = draw(st.integers(0, num_experts - top_k), label="empty experts")
    config = ModelConfig(
        image_size=16, patch_size=8, dim=16, depth=3, num_heads=2, mlp_hidden=24, vocab_size=WORDS,
        max_text_length=LONGEST, text_positions=LONGEST, soft_layers=[1, 2], num_experts=num_experts, top_k=top_k,
        modality_to_experts=draw(st.booleans(), label="modality to experts"),
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 1000), label="weights"))
    backbone = Backbone(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for block in backbone.blocks[
            1:
        ]:  # the router sees 4 in dimension 0 of every token, so no empty expert is chosen
            block.moe_norm.weight[0] = block.moe_norm.bias[0] = 0.0
        for layer in backbone.moe_layers():
            for vector in (layer.image_vector, layer.text_vector):
                vector[0] = 4.0
            layer.router.weight[:, 0] = 0.0
            layer.router.weight[num_experts - empty :, 0] = -20.0
            layer.router.register_forward_hook(no_ties)
    backbone.empty_experts = empty
    return backbone


def no_ties(router: Any, _: Any, routing: Routing) -> None:
    """Drop the example if the last choice of a token is as good as the next best expert."""
    if router.top_k < routing.gates.shape[1] and len(routing.gates):
        best = routing.gates.topk(router.top_k + 1, dim=1).values
        assume(float((best[:, -2] - best[:, -1]).min()) > TIE)


@st.composite
def batches(draw: st.DrawFn) -> Inputs:
    """Images, texts or pairs; some or all patches; any mask that leaves a text one word, which may be anywhere."""
    rows = draw(st.integers(1, 4), label="rows")
    kind = draw(st.sampled_from(["pairs", "images", "texts"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000), label="inputs"))
    inputs = {}
    if kind != "texts":
        inputs["images"] = torch.randn(rows, 3, 16, 16, generator=generator)
        kept = draw(st.integers(0, 4), label="patches kept")
        order = torch.rand(rows, 4, generator=generator).argsort(dim=1)
        inputs |= {"patch_keep": order[:, :kept]} if kept < 4 else {}
    if kind != "images":
        length = draw(st.integers(1, LONGEST), label="length")
        inputs["text_ids"] = torch.randint(0, WORDS, (rows, length), generator=generator)
        row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
        mask = draw(st.lists(row, min_size=rows, max_size=rows), label="words")
        inputs["text_mask"] = torch.tensor(mask)
    return inputs


def some(inputs: Inputs, rows: list[int]) -> Inputs:
    return {name: value[rows] for name, value in inputs.items()}


def encode(backbone: Backbone, inputs: Inputs) -> list[Tensor]:
    """Each sample's tokens [n, D] after the final norm, without those of padding."""
    with torch.no_grad():
        out = backbone(**inputs)
    mask = inputs.get("text_mask")
    words = out.hidden.new_ones(len(out.hidden), 0) if mask is None else mask
    valid = torch.cat([words.new_ones(len(words), out.num_image_tokens), words], dim=1).bool()
    return [hidden[keep] for hidden, keep in zip(out.hidden, valid, strict=True)]


def check_loads(backbone: Backbone, inputs: Inputs) -> None:
    """Padding was not served, nor had an empty expert a token."""
    words = int(inputs["text_mask"].sum()) if "text_mask" in inputs else 0
    config, rows = backbone.config, len(next(iter(inputs.values())))
    image = rows * (1 + (inputs["patch_keep"].shape[1] if "patch_keep" in inputs else 4)) if "images" in inputs else 0
    for layer in backbone.moe_layers():
        assert layer.last_load.sum(dim=1).tolist() == [image * config.top_k, words * config.top_k]
        assert not layer.last_load[:, config.num_experts - backbone.empty_experts :].any()


@settings(max_examples=60)
@given(backbone=backbones(), inputs=batches(), data=st.data())
def test_a_sample_is_the_same_alone_in_a_batch_in_any_order_and_padded(
    backbone: Backbone, inputs: Inputs, data: st.DataObject
) -> None:
    whole = encode(backbone, inputs)
    check_loads(backbone, inputs)
    order = data.draw(st.permutations(range(len(whole))), label="order")
    for row, hidden in zip(order, encode(backbone, some(inputs, order)), strict=True):
        close(hidden, whole[row])
    for row, expected in enumerate(whole):
        alone = some(inputs, [row])
        if "text_mask" in alone:  # cut what is padding at the end, then pad anew
            length = int(alone["text_mask"][0].nonzero().max()) + 1
            alone |= {name: alone[name][:, :length] for name in ("text_ids", "text_mask")}
        close(encode(backbone, alone)[0], expected)
        if "text_mask" in alone and length < LONGEST:
            more = data.draw(st.integers(1, LONGEST - length), label="padding")
            alone |= {name: torch.nn.functional.pad(alone[name], (0, more)) for name in ("text_ids", "text_mask")}
            close(encode(backbone, alone)[0], expected)


@settings(max_examples=30)
@given(backbone=backbones(), inputs=batches().filter(lambda inputs: "text_mask" in inputs))
def test_what_stands_in_padding_is_nothing(backbone: Backbone, inputs: Inputs) -> None:
    other = inputs | {"text_ids": torch.where(inputs["text_mask"], inputs["text_ids"], WORDS - 1 - inputs["text_ids"])}
    for mine, expected in zip(encode(backbone, other), encode(backbone, inputs), strict=True):
        close(mine, expected)
    with torch.no_grad():
        aux = [backbone(**batch).aux_per_layer for batch in (inputs, other)]
    close(*aux)


@settings(max_examples=30)
@given(backbone=backbones(), inputs=batches())
def test_evaluation_repeats_itself(backbone: Backbone, inputs: Inputs) -> None:
    """To the bit: nothing is drawn at random, nothing is kept from one batch to the next."""
    first = encode(backbone, inputs)
    encode(backbone, some(inputs, [0]))
    torch.rand(1)
    assert all(torch.equal(mine, other) for mine, other in zip(encode(backbone, inputs), first, strict=True))


@pytest.mark.parametrize("name", PREDICTING)
@settings(max_examples=10)
@given(data=st.data())
def test_what_a_task_predicts_of_a_sample_is_its_own(name: str, data: st.DataObject) -> None:
    task = tiny_task(name, seed=data.draw(st.integers(0, 5), label="weights"))
    for layer in task.backbone.moe_layers():
        layer.router.register_forward_hook(no_ties)
    batch = tiny_batch(data.draw(st.integers(2, 6), label="rows"), seed=data.draw(st.integers(0, 50), label="inputs"))
    rows = data.draw(st.permutations(range(len(batch["sample_id"]))).map(torch.tensor), label="order")
    rows = rows[: data.draw(st.integers(1, len(rows)), label="kept")]
    whole, part = predictions(task, batch), predictions(task, rows_of(batch, rows))
    for key, value in part.items():
        close(value, whole[key][rows])
