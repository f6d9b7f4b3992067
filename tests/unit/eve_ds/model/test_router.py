"""Routing decisions, capacity and the load-balancing loss against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds.model.router import Router, balance_share, jitter_noise, renormalize, within_capacity, z_share


def test_weights_are_the_best_gates_over_their_sum() -> None:
    torch.manual_seed(0)
    router, tokens = Router(6, 5, 2), torch.randn(7, 6)
    routing = router(tokens)
    gates = (tokens @ router.weight.t()).softmax(-1)
    torch.testing.assert_close(routing.gates, gates)
    best = gates.sort(descending=True).indices[:, :2]
    assert torch.equal(routing.experts, best)
    torch.testing.assert_close(routing.weights, gates.gather(1, best) / gates.gather(1, best).sum(1, keepdim=True))


def test_bf16_tokens_are_routed_in_float32() -> None:
    routing = Router(6, 5, 2).bfloat16()(torch.randn(7, 6, dtype=torch.bfloat16))
    assert routing.gates.dtype == routing.weights.dtype == torch.float32


def test_a_single_choice_keeps_its_gate_so_that_the_router_learns() -> None:
    router = Router(6, 5, 1)
    routing = router(torch.randn(7, 6))
    torch.testing.assert_close(routing.weights, routing.gates.max(dim=1, keepdim=True).values)
    routing.weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_dropped_choices_leave_their_weight_to_the_others() -> None:
    chosen = torch.tensor([[0.5, 0.25], [0.5, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(renormalize(chosen), torch.tensor([[2 / 3, 1 / 3], [1.0, 0.0], [0.0, 0.0]]))


@settings(max_examples=40)
@given(data=st.data())
def test_second_choices_queue_after_all_firsts(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    tokens = data.draw(st.integers(0, 30))
    factor = data.draw(st.floats(0.2, 2.0))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    valid = torch.rand(tokens, generator=generator) < 0.8
    limit = max(4, math.ceil(int(valid.sum()) * top_k / num_experts * factor))
    served, expected = [0] * num_experts, torch.zeros(tokens, top_k, dtype=torch.bool)
    for choice in range(top_k):
        for token in range(tokens):
            if valid[token]:
                expert = int(experts[token, choice])
                served[expert] += 1
                expected[token, choice] = served[expert] <= limit
    assert torch.equal(within_capacity(experts, valid, num_experts, factor), expected)


@settings(max_examples=30)
@given(tokens=st.integers(0, 20), num_experts=st.integers(1, 6), seed=st.integers(0, 1000))
def test_balance_loss_counts_valid_tokens_alone(tokens: int, num_experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(tokens, num_experts, generator=generator).softmax(-1)
    first = gates.argmax(-1) if tokens else torch.zeros(0, dtype=torch.int64)
    valid = torch.rand(tokens, generator=generator) < 0.6
    kept, count = gates[valid], max(1, int(valid.sum()))
    top1 = torch.bincount(first[valid], minlength=num_experts) / count
    expected = num_experts * (kept.sum(0) / count * top1).sum()
    torch.testing.assert_close(balance_share(gates, first, valid), expected)
    torch.testing.assert_close(balance_share(kept, first[valid], None), expected)


@settings(max_examples=30)
@given(tokens=st.integers(0, 20), seed=st.integers(0, 1000))
def test_z_loss_is_the_mean_square_of_log_z_over_valid_tokens(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, 5, generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.6
    squares = [math.log(sum(math.exp(score) for score in row)) ** 2 for row in scores[valid].tolist()]
    expected = sum(squares) / max(1, len(squares))
    assert z_share(scores.logsumexp(-1), valid).item() == pytest.approx(expected, rel=1e-4)
    assert z_share(scores[valid].logsumexp(-1), None).item() == pytest.approx(expected, rel=1e-4)


def test_jitter_is_uniform_around_one_and_a_function_of_draw_place_and_channel() -> None:
    draws = torch.rand(50, generator=torch.Generator().manual_seed(0))
    noise = jitter_noise(draws, 20, 8, 0.1)
    assert noise.shape == (50, 20, 8) and noise.min() > 0.9 and noise.max() < 1.1
    assert noise.mean().item() == pytest.approx(1, abs=2e-3)
    assert noise.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert noise.unique().numel() > 0.98 * noise.numel()
    assert torch.equal(jitter_noise(draws[7:8], 12, 8, 0.1)[0], noise[7, :12])
