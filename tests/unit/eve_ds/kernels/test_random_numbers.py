"""Random numbers against splitmix64 in Python's integers. tests/e2e/test_triton.py has a Triton kernel draw them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eve_ds.kernels.choices import triton_serves, triton_state
from eve_ds.model import counter_random
from eve_ds.model.counter_random import random_bits, random_uniform

DEVICES = ["cpu", *["cuda", "cuda:1"][: torch.cuda.device_count()]]
EXTREMES = torch.tensor([0, 1, -1, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)])


def mixed(value: int) -> int:
    """Steele, Lea and Flood, OOPSLA 2014, as published: of unsigned 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def by_hand(seed: int, stream: int, first: int, second: int) -> int:
    return mixed(mixed(mixed(mixed(seed % 2**64) ^ stream) ^ first % 2**64) ^ second % 2**64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (7, 5), (-3, 16), (2**63 - 1, 1)])
def test_bits_by_hand(seed: int, stream: int, device: str) -> None:
    extremes = EXTREMES.to(device)
    found = random_bits(seed, stream, extremes[:, None], extremes)
    assert (found.dtype, found.shape) == (torch.int64, (7, 7))
    numbers = EXTREMES.tolist()
    wanted = [by_hand(seed, stream, one, other) for one, other in itertools.product(numbers, numbers)]
    assert [number % 2**64 for number in found.flatten().tolist()] == wanted
    uniform = random_uniform(seed, stream, extremes[:, None], extremes)
    assert uniform.dtype == torch.float32
    assert uniform.flatten().tolist() == [((bits >> 41) + 0.5) / 2**23 for bits in wanted]  # exact


def parts() -> list[tuple[Tensor, Tensor]]:
    drawn = torch.randint(-(2**63), 2**63 - 1, (4000,), generator=torch.Generator().manual_seed(0))
    return [
        (drawn[:5, None], torch.arange(196)),
        (drawn[:7], drawn[7:13].view(3, 2, 1)),  # drop path's
        (drawn[:4, None, None], drawn[4:28].view(6, 4)),  # jitter's
        (drawn[:1200:2, None], drawn[:12].view(4, 3).t()[0]),  # strided, more than a program's block
        (torch.tensor(3), torch.tensor(8)),
        (drawn[:0, None], torch.arange(3)),
        (torch.arange(3)[:, None], drawn[:0]),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", range(7))
def test_all_ways_to_broadcast(place: int, device: str) -> None:
    first, second = (part.to(device) for part in parts()[place])
    found = random_bits(1, 2, first, second)
    each = torch.broadcast_tensors(first, second)
    pairs = zip(each[0].flatten().tolist(), each[1].flatten().tolist(), strict=True)
    assert found.shape == each[0].shape
    assert [number % 2**64 for number in found.flatten().tolist()] == [by_hand(1, 2, *pair) for pair in pairs]
    assert random_uniform(1, 2, first, second).shape == found.shape


@pytest.mark.parametrize("device", DEVICES)
def test_who_draws_them(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel where Triton serves; not while the compiler traces, which fuses the formula by itself."""
    plain, calls = counter_random.plain_numbers, []
    monkeypatch.setattr(counter_random, "plain_numbers", lambda *args: calls.append(args) or plain(*args))
    number = torch.zeros(1, dtype=torch.int64, device=device)
    random_bits(1, 2, number, number)
    assert len(calls) == (not triton_serves(number))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    random_bits(1, 2, number, number)
    assert len(calls) == 1 + (not triton_serves(number))


def plain_bits(first: Tensor, second: Tensor) -> Tensor:
    return counter_random.plain_numbers(counter_random._key(1, 2), first, second, False)


def test_the_compiler_traces_the_formula_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it met the search for Triton, which it cannot trace: the first step with router jitter ended the run."""
    monkeypatch.setattr(counter_random, "triton_serves", lambda _: triton_state()[0])
    monkeypatch.delenv("CC", raising=False)
    torch._dynamo.reset()
    drawn = torch.compile(lambda first, second: random_bits(1, 2, first, second), fullgraph=True, backend="eager")
    assert torch.equal(drawn(EXTREMES[:, None], EXTREMES), plain_bits(EXTREMES[:, None], EXTREMES))
