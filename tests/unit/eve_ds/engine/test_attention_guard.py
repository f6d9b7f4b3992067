"""A backend of attention that is off is found by shape, switched off and named; a sound one is left alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from eve_ds.engine.attention_guard import AttentionGuard, guard_attention
from eve_ds.kernels.attention import LOW_SCORE, make_trial, tolerance, worst_error
from eve_ds.model.block import key_bias
from eve_ds.model.compiled import compile_parts
from eve_ds.model.flops import flop_counter
from tests.support.tiny import caption_batch, masked_task

HEADS, WIDTH = 4, 16


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """All on, as torch has them; and again at the end."""
    yield
    for name in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)


def sound(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class _Spoilt(torch.autograd.Function):
    """q, whose gradient is not a number in rows of a low logsumexp (pytorch#196678)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.low = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).logsumexp(dim=-1, keepdim=True) < -88.7
        return q.clone()

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> tuple[Tensor, None]:
        return dq.masked_fill(ctx.low, float("nan")), None


def like_cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Sound but where cuDNN is not, while it is switched on."""
    if torch.backends.cuda.cudnn_sdp_enabled() and bias is not None and q.shape[2] % 128 == 64:
        q = _Spoilt.apply(q, k.detach())
    return sound(q, k, v, bias)


def choice(*_: Any) -> int:
    """As torch chooses on Hopper."""
    cuda = torch.backends.cuda
    if cuda.cudnn_sdp_enabled():
        return SDPBackend.CUDNN_ATTENTION.value
    return (SDPBackend.EFFICIENT_ATTENTION if cuda.mem_efficient_sdp_enabled() else SDPBackend.MATH).value


def inputs(tokens: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor | None]:
    x = torch.empty(4, tokens, HEADS * WIDTH, dtype=dtype)
    valid = torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens // 2)], [1], [0]])
    return x, key_bias(valid, dtype) if masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 64, 90, 192])
def test_sound_attention_stays(tokens: int, dtype: torch.dtype, masked: bool) -> None:
    """Far from the limit: also where a row has one key or none, and its gradients vanish."""
    x, bias = inputs(tokens, dtype, masked)
    trial = make_trial(x, HEADS, bias)
    assert worst_error(sound, trial) < tolerance(dtype) / 2
    AttentionGuard(sound, choice).check(x, HEADS, bias)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_trials_are_what_a_layer_makes_with_rows_of_low_scores() -> None:
    x, bias = inputs(64, torch.bfloat16, masked=True)
    before = torch.get_rng_state()
    trial = make_trial(x, HEADS, bias)
    assert torch.equal(torch.get_rng_state(), before)
    made = torch.empty(4, 64, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    assert [part.stride() for part in trial[:3]] == [part.stride() for part in made]
    q, k = (part.detach() for part in trial[:2])
    scores = (q.float() @ k.float().transpose(2, 3)) / WIDTH**0.5
    assert float((scores[:, ::2] - LOW_SCORE).abs().max()) < 2 and float(scores[:, 1::2].abs().mean()) < 2


def test_a_gradient_that_is_no_number_switches_the_backend_off(caplog: pytest.LogCaptureFixture) -> None:
    guard = AttentionGuard(like_cudnn, choice)
    for tokens, masked in ((128, True), (90, True), (192, False)):
        x, bias = inputs(tokens, torch.bfloat16, masked)
        guard.check(x, HEADS, bias)
    assert torch.backends.cuda.cudnn_sdp_enabled() and not caplog.records
    x, bias = inputs(192, torch.bfloat16, masked=True)
    guard.check(x, HEADS, bias)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    (record,) = caplog.records
    assert record.getMessage() == (
        "rank 0: attention by cuDNN is not finite at [4 samples, 4 heads, 192 tokens, width 16] in bfloat16, with a "
        "mask; it is switched off, and another backend computes"
    )


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_one_head_of_one_sample_that_is_off_is_found(part: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of the output, or of a gradient; by every backend, until the formula is left."""

    def off(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        factor = torch.ones(q.shape[:2])
        factor[1, 2] = 0.8
        factor = factor.to(q.dtype)[:, :, None, None]
        if part:
            wrong = [q, k, v][part - 1]
            wrong.register_hook(lambda gradient: gradient * factor)
            return sound(*(one * 1 for one in (q, k, v)), bias)
        return sound(q, k, v, bias) * factor

    x, bias = inputs(90, torch.bfloat16, masked=True)
    trial = make_trial(x, HEADS, bias)
    assert 0.1 < worst_error(off, trial) < 0.3
    AttentionGuard(off, choice).check(x, HEADS, bias)
    assert choice() == SDPBackend.MATH.value and torch.backends.cuda.flash_sdp_enabled()
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == [
        "rank 0: attention by cuDNN",
        "rank 0: attention by memory-efficient attention",
    ]
    assert "off by 0." in caplog.text and "(rounding explains 0.062)" in caplog.text


def test_each_shape_of_a_training_is_tried_once_before_it_is_used() -> None:
    """Of both passes and the decoder, also while operations are counted, which the trial is not; none in evaluation."""
    tried = []

    class Guard(AttentionGuard):
        def check(self, x: Tensor, heads: int, bias: Tensor | None) -> None:
            tried.append((tuple(x.shape), bias is None))
            super().check(x, heads, bias)

    task, batch = masked_task(), caption_batch(4)
    with flop_counter() as counter:
        task(batch).loss.backward()
    flops = counter.get_total_flops()
    guard = Guard(sound, choice)
    guard.watch(task)
    task.eval()
    task(batch)
    assert tried == []
    task.train()
    with flop_counter() as counter:
        task(batch).loss.backward()
    assert counter.get_total_flops() == flops
    assert tried == [((4, 1 + 4 + 12, 32), False), ((4, 1 + 16 + 12, 32), False), ((4, 1 + 16, 32), True)]
    task(batch)
    assert len(tried) == 3
    task(caption_batch(4, longest=10))
    assert [shape[1] for shape, _ in tried[3:]] == [15, 27]


def test_it_stays_outside_of_compiled_blocks() -> None:
    from torch._dynamo.utils import counters  # here: the compiler takes seconds to import

    task, tried = masked_task(), []
    compile_parts(task, backend="eager")
    guard = AttentionGuard(lambda *each: tried.append(each[0].shape[2]) or sound(*each), choice)
    guard.watch(task)
    counters.clear()
    for _ in range(2):
        task(caption_batch(4)).loss.backward()
    assert tried == [17, 29, 17] and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3  # hard blocks and soft ones, of both passes, and the decoder's


def test_a_trial_leaves_training_as_it_is() -> None:
    """Also where activations are computed again, and the trial's are seen by nobody."""

    def gradients(guarded: bool) -> list[Tensor | None]:
        task = masked_task(checkpoint_activations=True, drop_path=0.5)
        if guarded:
            AttentionGuard(sound, choice).watch(task)
        torch.manual_seed(1)
        task(caption_batch(4)).loss.backward()
        return [parameter.grad for parameter in task.parameters()]

    for one, other in zip(gradients(guarded=True), gradients(guarded=False), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_nothing_is_watched_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    task = masked_task()
    with caplog.at_level(logging.INFO):
        guard_attention(task, torch.device("cpu"))
    assert not any(part._forward_pre_hooks for part in task.modules())
