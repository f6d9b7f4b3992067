"""When DeepSpeed's ZeRO holds which gradients, counted by hand: three weights of 16 elements, buckets of 20, two ranks.

A rank's part is 24 elements: it has a share in two weights, 0 and 1, whose gradients are made last.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eve_ds.plan.live_bytes import LiveBytes
from eve_ds.plan.zero_states import GradientBuckets, Group, Zero

FP32 = 4
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Meter(LiveBytes):
    """Remembers what was held, by kind, in elements."""

    def __init__(self) -> None:
        super().__init__([], selected=0, scalar=0)

    def held(self, kind: str) -> int:
        return self._held.get(kind, 0) // FP32


def backward(stage: int, accumulation: int, whole_buffers: bool, **settings: Any) -> tuple[list[int], int]:
    """(gradients held before the backward pass, at its end, after the reduction; communication buffers)."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False, device="meta") for _ in range(3)))
    group = Group([16] * 3, [id(parameter) for parameter in layers.parameters()], ranks=2, experts=False)
    zero = Zero(stage, 2, 1, FP32, accumulation, {"reduce_bucket_size": 20} | settings, whole_buffers)
    meter, gradients = Meter(), []
    buckets = GradientBuckets([group], zero, meter)
    with meter, buckets.attached(layers):
        loss = layers(torch.empty(1, 4, device="meta")).sum()
        buckets.begin()
        gradients.append(meter.held("gradients"))
        loss.backward()
        gradients.append(meter.held("gradients"))
        buckets.end()
    assert all(parameter.grad is None for parameter in layers.parameters())
    return [*gradients, meter.held("gradients")], meter.held("communication")


@pytest.mark.parametrize(
    ("stage", "accumulation", "on_gpu", "settings", "gradients"),
    [
        (1, 1, True, {}, [0, 48, 32]),  # all, up to the reduction after the pass; then those of the part, whole
        (1, 2, True, {}, [48, 48, 32]),  # the sum is there; what is added to it comes and goes
        (1, 1, True, {"overlap_comm": True}, [0, 32, 32]),
        (1, 1, True, {"reduce_bucket_size": 10}, [0, 48, 32]),  # each too large for a bucket
        (2, 1, True, {}, [0, 32, 32]),  # one buffer, made when the second gradient is reduced
        (2, 1, False, {}, [0, 16, 32]),  # and written one by one
        (2, 2, True, {}, [32, 64, 64]),  # the sum, and what is added to it
        (2, 2, True, OFFLOAD, [0, 0, 0]),
        (3, 2, True, {}, [0, 0, 0]),  # a part of fixed size: `steady`
    ],
)
def test_gradients(stage: int, accumulation: int, on_gpu: bool, settings: Any, gradients: list[int]) -> None:
    found, _ = backward(stage, accumulation, on_gpu, **settings)
    assert found == gradients


def test_a_gradient_is_let_go_before_it_is_held_and_one_that_is_not_made_does_not() -> None:
    used, unused = (nn.Linear(64, 64, bias=False, device="meta") for _ in range(2))
    layers = nn.ModuleList([used, unused])
    group = Group([64 * 64] * 2, [id(parameter) for parameter in layers.parameters()], ranks=2, experts=False)
    meter = Meter()
    buckets = GradientBuckets([group], Zero(1, 2, 1, FP32, 1, {}, whole_buffers=False), meter)
    with meter, buckets.attached(layers):
        used(torch.empty(1, 64, device="meta")).sum().backward()
        assert meter.peak // FP32 < 2.1 * 64 * 64  # autograd copies it, since the meter looks at it
        buckets.end()
    assert meter.held("gradients") == 64 * 64  # the part of the one that was made


@pytest.mark.parametrize(
    ("stage", "settings", "live"), [(2, {}, [4, 4]), (3, {}, [4, 6]), (2, OFFLOAD, [2, 4]), (3, OFFLOAD, [2, 4])]
)
def test_gradients_wait_for_their_bucket(stage: int, settings: Any, live: list[int]) -> None:
    """Two weights, two gradients that wait: at stage 2 freed before they are copied flat, at 3 after. None waits where
    ZeRO offloads."""
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False, device="meta") for _ in range(2))
    group = Group([64 * 64] * 2, [id(parameter) for parameter in layers.parameters()], ranks=2, experts=False)
    meter = Meter()
    buckets = GradientBuckets([group], Zero(stage, 2, 1, FP32, 1, settings, whole_buffers=True), meter)
    with meter, buckets.attached(layers):
        for layer in layers:
            layer(torch.empty(1, 64, device="meta")).sum().backward()
        found = [meter.live]
        buckets.end()
    assert [size // (64 * 64 * FP32) for size in (*found, meter.peak)] == live


@pytest.mark.parametrize(
    ("stage", "on_gpu", "overlap", "elements"),
    [(1, True, False, 20), (2, True, True, 40), (2, False, True, 32), (2, False, False, 16), (3, True, True, 0)],
)
def test_buckets(stage: int, on_gpu: bool, overlap: bool, elements: int) -> None:
    assert backward(stage, 1, on_gpu, overlap_comm=overlap)[1] == elements  # reserved on a GPU, else written
