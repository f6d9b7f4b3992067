"""The cross entropy by chunks of rows against the plain one: values, gradients, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import linear_cross_entropy as module
from eve_ds.kernels.linear_cross_entropy import linear_cross_entropy, reference
from eve_ds.plan.live_bytes import LiveBytes

DIM, VOCABULARY = 12, 50
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def inputs(rows: int, more: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows + more, DIM), (VOCABULARY, DIM), (VOCABULARY,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    return x, weight, bias, torch.randint(VOCABULARY, (rows,), generator=generator).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "more"), [(0, 0), (0, 4), (1, 3), (7, 0), (8, 0), (8, 5), (9, 7), (29, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(
    dtype: torch.dtype, rows: int, more: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)
    given = inputs(rows, more, dtype, device)
    exact = [each.detach().double().requires_grad_() for each in given[:3]]
    entropy, best = linear_cross_entropy(*given)
    expected, expected_best = reference(*exact, given[3])
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = torch.autograd.grad(entropy * 0.3, given[:3])
    wanted = torch.autograd.grad(expected * 0.3, exact)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(entropy.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * (scale + 1e-9))
    if dtype != torch.bfloat16:  # whose scores may tie
        assert torch.equal(best, expected_best)
    with torch.no_grad():
        again, best_again = linear_cross_entropy(*given)
    assert torch.equal(again, entropy) and torch.equal(best_again, best)


def test_a_loss_scale_reaches_small_gradients_in_fp16() -> None:
    """Of most entries of a large vocabulary the softmax is below what fp16 holds; times the scale it is not."""
    generator = torch.Generator().manual_seed(0)
    entries, scale = 60_000, 2.0**14
    x, weight = (torch.randn(shape, generator=generator) * 0.1 for shape in ((3, DIM), (entries, DIM)))
    bias = torch.full((entries,), -6.0)
    bias[:2] = 6.0  # others have 2e-11 each
    truth = torch.zeros(3, dtype=torch.int64)
    given = [each.half().requires_grad_() for each in (x, weight, bias)]
    exact = [each.detach().double().requires_grad_() for each in given]
    found = torch.autograd.grad(linear_cross_entropy(*given, truth)[0] * scale, given[2])[0]
    wanted = torch.autograd.grad(reference(*exact, truth)[0] * scale, exact[2])[0]
    assert found[2:].double().sum() == pytest.approx(float(wanted[2:].sum()), rel=0.05)


def test_frozen_weights_get_no_gradient_and_states_do() -> None:
    x, weight, bias, truth = inputs(5, 3, torch.float32, "cpu")
    entropy, best = linear_cross_entropy(x, weight.detach(), bias.detach(), truth)
    entropy.backward()
    assert x.grad is not None and x.grad[:5].any() and not x.grad[5:].any()
    assert weight.grad is None and not best.requires_grad


def test_no_float32_scores_are_kept() -> None:
    x, weight, bias, truth = inputs(40, 8, torch.bfloat16, "cpu")
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(x, weight, bias, truth)
    shapes = [(48, DIM), (48, VOCABULARY), (VOCABULARY, DIM)]
    assert sorted(kept, key=str) == sorted([(shape, torch.bfloat16) for shape in shapes], key=str)


def test_no_more_than_three_chunks_of_float32_scores_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk's, the scores and their softmax, beside the gradient in x's dtype, which is kept; the bf16 scores
    as well would be more."""
    monkeypatch.setattr(module, "CHUNK", 64)
    rows, vocabulary = 256, 4000
    x, weight = (torch.empty(count, 8, dtype=torch.bfloat16, device="meta") for count in (rows, vocabulary))
    bias, truth = weight.new_empty(vocabulary), torch.empty(rows, dtype=torch.int64, device="meta")
    with LiveBytes([x, weight, bias, truth], selected=rows, scalar=0) as live:
        linear_cross_entropy(x.requires_grad_(), weight, bias, truth)
    kept, scores = 2 * rows * vocabulary, 4 * 64 * vocabulary
    assert kept + 2 * scores <= live.peak < kept + 3.2 * scores
