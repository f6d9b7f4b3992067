"""The MoE layer against a loop over tokens; its properties over lengths, masks, experts and modalities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eve_ds.model.moe import IMAGE, TEXT, MoE


def layer(num_experts: int, top_k: int, **options: object) -> MoE:
    torch.manual_seed(num_experts)
    moe = MoE(4, 6, num_experts, top_k, seed=1, **options).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    return moe


def token_by_token(moe: MoE, x: Tensor, modality: Tensor, valid: Tensor) -> Tensor:
    """What the layer means, in the plainest form (dropless)."""
    none = x.new_zeros(x.shape[-1])
    vectors = torch.stack([none if vector is None else vector for vector in (moe.image_vector, moe.text_vector)])
    out = torch.zeros_like(x)
    for sample in range(x.shape[0]):
        for token in range(x.shape[1]):
            if not valid[sample, token]:
                continue
            seen = x[sample, token] + vectors[modality[token]]
            gates = (seen.float() @ moe.router.weight.float().t()).softmax(-1)
            chosen, experts = gates.topk(moe.top_k)
            weights = (chosen / chosen.sum() if moe.top_k > 1 else chosen).to(x.dtype)
            into = seen if moe.modality_to_experts else x[sample, token]
            for weight, expert in zip(weights, experts, strict=True):
                inner = into @ moe.experts.fc1_weight[expert].t() + moe.experts.fc1_bias[expert]
                inner = inner * torch.sigmoid(1.702 * inner)
                outer = inner @ moe.experts.fc2_weight[expert].t() + moe.experts.fc2_bias[expert]
                out[sample, token] = out[sample, token] + weight * outer
    return out


@settings(max_examples=40)
@given(data=st.data())
def test_layer_is_the_loop_over_tokens(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    routing = {name: data.draw(st.booleans()) for name in ("modality_to_experts", "modality_routing")}
    moe = layer(num_experts, top_k, **routing)
    batch, image, text = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    modality = torch.tensor([IMAGE] * image + [TEXT] * text, dtype=torch.int64)
    x = torch.randn(batch, image + text, 4, dtype=torch.float64, requires_grad=True)
    mask = st.lists(st.booleans(), min_size=x[..., 0].numel(), max_size=x[..., 0].numel())
    valid = torch.tensor(data.draw(mask), dtype=torch.bool).view(x.shape[:2])
    ours, aux = moe(x, modality, valid)
    theirs = token_by_token(moe, x, modality, valid)
    # The gates are float32 inside.
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert aux.isfinite() and aux.dtype == torch.float32
    weight = torch.randn_like(ours)
    inputs = (x, *moe.parameters())
    mine = torch.autograd.grad((ours * weight).sum() + 0 * aux, inputs)
    other = torch.autograd.grad((theirs * weight).sum() + 0 * x.sum(), inputs, allow_unused=True)
    for ours_grad, theirs_grad in zip(mine, other, strict=True):  # ours: never None, whatever the batch holds
        expected = torch.zeros_like(ours_grad) if theirs_grad is None else theirs_grad
        torch.testing.assert_close(ours_grad, expected, atol=1e-4, rtol=1e-4)
    served = valid.sum(0) * top_k
    assert moe.last_load.sum(1).tolist() == [served[:image].sum(), served[image:].sum()]
    assert moe.last_load.dtype == torch.float64 and moe.last_load.shape == (2, num_experts)


def test_modality_may_differ_by_sample() -> None:
    moe, x = layer(4, 2), torch.randn(2, 3, 4, dtype=torch.float64)
    rows = torch.tensor([[IMAGE, TEXT, TEXT], [IMAGE, IMAGE, TEXT]])
    both, _ = moe(x, rows)
    for sample in range(2):
        alone, _ = moe(x[sample : sample + 1], rows[sample])
        torch.testing.assert_close(both[sample], alone[0], atol=1e-5, rtol=1e-5)  # the gates are float32


def test_padding_changes_nothing_else() -> None:
    moe, x = layer(4, 2), torch.randn(2, 5, 4, dtype=torch.float64)
    modality = torch.tensor([IMAGE, IMAGE, TEXT, TEXT, TEXT])
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    out, aux = moe(x, modality, valid)
    load = moe.last_load
    other, other_aux = moe(torch.where(valid[..., None], x, 100.0), modality, valid)
    assert torch.equal(out, other) and torch.equal(aux, other_aux) and torch.equal(load, moe.last_load)
    assert not out[~valid].any()


def test_published_routing_treats_padding_as_any_token() -> None:
    published, x = layer(4, 2, published_routing=True), torch.randn(2, 5, 4, dtype=torch.float64)
    modality, valid = torch.tensor([IMAGE, IMAGE, TEXT, TEXT, TEXT]), torch.zeros(2, 5, dtype=torch.bool)
    for masked, whole in zip(published(x, modality, valid), published(x, modality), strict=True):
        assert torch.equal(masked, whole)


def test_capacity_drops_the_last_in_the_queue_and_renormalizes() -> None:
    moe = layer(3, 2, capacity_factor=0.1)  # four places an expert
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[9.0], [5.0], [1.0]]).expand(3, 4))
    x = torch.rand(1, 6, 4, dtype=torch.float64) + 1
    modality = torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        moe.image_vector.zero_()
        out, _ = moe(x, modality)
        whole = token_by_token(moe, x, modality, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(out[:, :4], whole[:, :4], atol=1e-5, rtol=1e-5)
    assert not out[:, 4:].any()
    assert moe.last_load.tolist() == [[4.0, 4.0, 0.0], [0.0, 0.0, 0.0]]


def test_local_experts_are_a_slice_of_all() -> None:
    def build(**place: int) -> MoE:
        torch.manual_seed(0)
        return MoE(4, 6, 8, 2, seed=2, **place)

    whole, part = build(), build(ep_size=4, ep_rank=2)
    assert part.num_local_experts == 2
    assert torch.equal(part.experts.fc1_weight, whole.experts.fc1_weight[4:6])
    assert torch.equal(part.router.weight, whole.router.weight)
    assert torch.equal(part.text_vector, whole.text_vector)


@pytest.mark.parametrize(
    ("options", "culprit"), [({"ep_size": 3}, "expert_parallel_size=3"), ({"top_k": 9}, "top_k=9")]
)
def test_impossible_layers_name_the_culprit(options: dict[str, int], culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        MoE(4, 6, 8, **options)


def test_bf16_is_near_float32() -> None:
    torch.manual_seed(0)
    moe, x = MoE(32, 64, 4, 2, seed=1), torch.randn(2, 9, 32)
    modality = (torch.arange(9) > 4).long()
    reference, _ = moe(x, modality)
    out, aux = moe.bfloat16()(x.bfloat16(), modality)
    assert out.dtype == torch.bfloat16 and aux.dtype == torch.float32
    assert F.cosine_similarity(out.float().flatten(), reference.flatten(), dim=0) > 0.99
