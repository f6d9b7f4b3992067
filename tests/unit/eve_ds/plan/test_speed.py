"""The speed that a plan expects: what was measured comes out again, and the rest by hand."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from eve_ds.callbacks.performance import PEAK_TFLOPS
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.plan import devices
from eve_ds.plan.__main__ import FinetunePlan, PretrainPlan
from eve_ds.plan.devices import (
    BLOCKS,
    CARDS,
    FORWARD_BACKWARD,
    GIB,
    GRADIENTS,
    LOOP_MICRO_BATCH,
    CardName,
    micro_batch_seconds,
)
from eve_ds.plan.figures import make_plan
from eve_ds.plan.memory import Batch
from eve_ds.plan.meta_model import build
from eve_ds.plan.speed import Device, Step, exchange_seconds, expected, step_of
from eve_ds.plan.table import as_text
from eve_ds.plan.work import Sent
from eve_ds.plan.zero_states import Zero
from tests.support.tiny import model_config

H100, PEAK = Device("h100", 989.0), 989e12


def zero(world: int = 1, ep: int = 1) -> Zero:
    return Zero(1, world, ep, 2, 1, {}, whole_buffers=True)


def step(pairs: int, flops_per_pair: float = 184e9, **changes: Any) -> Step:
    """Of EVE-Base, on one rank."""
    base = Step(pairs * flops_per_pair, 1.0, 1, BLOCKS, GRADIENTS, images=pairs, loaders=14, exchange=[])
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(("pairs", "share"), [(32, 0.084), (64, 0.146), (128, 0.202), (256, 0.225)])
def test_forward_and_backward_as_measured(pairs: int, share: float) -> None:
    seconds = micro_batch_seconds(FORWARD_BACKWARD, pairs * 215e9, BLOCKS, PEAK)
    assert pairs * 215e9 / (seconds * PEAK) == pytest.approx(share, abs=0.002)
    assert expected(step(pairs, 215e9), zero(), H100, None).mfu_forward_backward == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(("pairs", "rate", "share"), [(32, 142, 0.026), (256, 634, 0.118)])
def test_the_loop_as_measured(pairs: int, rate: float, share: float) -> None:
    found = expected(step(pairs), zero(), H100, None)
    assert found.step_seconds == pytest.approx(pairs / rate)
    assert found.mfu == pytest.approx(share, abs=0.001)
    assert found.bottleneck == "host", "of 225 ms: launches, where the device is busy for 194"


def test_between_and_beyond() -> None:
    def seconds(pairs: float, blocks: int = BLOCKS, peak: float = PEAK) -> float:
        return micro_batch_seconds(LOOP_MICRO_BATCH, pairs * 184e9, blocks, peak)

    low, high = seconds(32), seconds(256)
    assert seconds(1) == seconds(16) == low, "launches"
    assert seconds(144) == pytest.approx((low + high) / 2)
    assert seconds(480) == pytest.approx(high + (high - low))
    assert seconds(288, blocks=2 * BLOCKS) == pytest.approx(2 * seconds(144)), "twice as deep"
    assert seconds(144, peak=PEAK / 2) == pytest.approx(seconds(288)), "a device of half the peak"


def test_cards() -> None:
    assert set(CARDS) == set(get_args(CardName))
    assert {name: card.peak_tflops for name, card in CARDS.items()} == {
        "h100": PEAK_TFLOPS["H100"],
        "h200": PEAK_TFLOPS["H200"],
        "a100": PEAK_TFLOPS["A100"],
        "a100_40gb": PEAK_TFLOPS["A100"],
    }


def test_gradients_and_blocks_are_those_of_the_recipe() -> None:
    config = parse(PretrainConfig, ["--config", "pretrain_base", "--engine.precision", "bf16"], "test")
    found = step_of(config, zero(), Batch(2, 17), build(config, 7), 184e9, 7)
    assert (found.blocks, found.images, found.flops) == (BLOCKS, 2, 2 * 184e9)
    assert abs(found.gradients - GRADIENTS) <= 1


@pytest.mark.parametrize(("task", "images"), [("nlvr", 2), ("vqa", 1), ("itr_coco", 1)])
def test_images_of_a_sample(task: str, images: int) -> None:
    config = FinetuneConfig(model=model_config(), task=task)
    config.engine.precision = "fp32"
    accumulated = dataclasses.replace(zero(), accumulation=3)
    assert step_of(config, accumulated, Batch(4, 12), build(config, 7), 1e9, 7).images == 3 * 4 * images


def test_parts_by_hand() -> None:
    sent = [Sent("one", 10**9), Sent("other", 10**9, "expert_parallel")]
    found = expected(step(256, 215e9, loaders=1, exchange=sent), zero(8, 8), H100, None)
    assert found.seconds == pytest.approx(
        {"data": 256 / (2435 / 14), "host": 32 / 142, "exchange": 2 / 450, "arithmetic": 0.227}
    )
    assert found.bottleneck == "data" and found.step_seconds == found.seconds["data"], "the others wait for it"
    fed = expected(step(256, 215e9, loaders=14, exchange=sent), zero(8, 8), H100, None)
    assert fed.step_seconds and fed.step_seconds > fed.seconds["data"]
    assert found.loader_processes == fed.loader_processes == pytest.approx(256 / fed.step_seconds / (2435 / 14))
    more = expected(step(256, 215e9, micro_batches=2, recompute_factor=4 / 3), zero(), H100, None).seconds
    assert more["host"] == pytest.approx(0.083 * 2 * 4 / 3 + 32 / 142 - 0.083)
    assert more["arithmetic"] == pytest.approx(0.227 * 4 / 3)


def test_an_accumulating_step_has_its_fixed_cost_once() -> None:
    fixed = 32 / 142 - 0.083
    small = expected(step(8 * 32, micro_batches=8), zero(), H100, None)
    assert small.step_seconds == pytest.approx(8 * 0.083 + fixed), "launch-bound"
    assert small.step_seconds == pytest.approx(small.seconds["host"])
    large = expected(step(2 * 256, micro_batches=2), zero(), H100, None)
    assert large.step_seconds == pytest.approx(2 * (256 / 634 - fixed) + fixed)
    recomputed = expected(step(8 * 32, micro_batches=8, recompute_factor=4 / 3), zero(), H100, None)
    assert recomputed.step_seconds == pytest.approx(8 * 0.083 * 4 / 3 + fixed), "forward is repeated, nothing else"


def test_links() -> None:
    """GB over GB/s: within a node of 8, between nodes over its 8 adapters, and experts with fewer ranks on a node."""
    card, sent = CARDS["h100"], [Sent("expert, by its label only", 36 * 10**9)]
    assert exchange_seconds(sent, zero(8), card) == pytest.approx(36 / 450)
    assert exchange_seconds(sent, zero(16), card) == pytest.approx(36 / 400)
    assert exchange_seconds(sent, zero(16, ep=8), card) == pytest.approx(36 / 400)
    experts = [Sent("gradients", 36 * 10**9, "same_experts")]
    assert exchange_seconds(experts, zero(16, ep=1), card) == pytest.approx(36 / 400)
    assert exchange_seconds(experts, zero(16, ep=8), card) == pytest.approx(36 / 50)
    tokens = [Sent("values", 36 * 10**9, "expert_parallel")]
    assert exchange_seconds(tokens, zero(16, ep=8), card) == pytest.approx(36 / 450)
    assert exchange_seconds(tokens, zero(16, ep=16), card) == pytest.approx(36 / 50)
    slow = expected(step(256, exchange=[Sent("weights", 10**12)]), zero(16), H100, None)
    fast = expected(step(256), zero(16), H100, None)
    assert slow.bottleneck == "exchange"
    assert slow.step_seconds == pytest.approx((fast.step_seconds or 0) + 2.5)


def test_a_share_that_is_given_and_devices_that_were_not_measured() -> None:
    found = expected(step(256), zero(), H100, 0.5)
    assert (found.mfu, found.source, found.mfu_forward_backward) == (0.5, "--mfu", None)
    assert found.step_seconds == pytest.approx(256 * 184e9 / (0.5 * PEAK))
    assert expected(step(256), zero(), H100, None).source.startswith("from EVE-Base in the training loop on one H100")
    a100 = expected(step(256), zero(), Device("a100", 312.0), None)
    assert a100.source.endswith("; scaled by the peak, 312 to 989 TFLOP/s") and a100.bottleneck == "arithmetic"
    same_peak = expected(step(256), zero(), Device("h200", 989.0), None)
    assert same_peak.source.endswith("; scaled by the peak, 989 to 989 TFLOP/s")
    cpu = expected(step(256), zero(), Device(None, 2.0), None)
    assert cpu.mfu == pytest.approx(devices.CPU_SHARE) and cpu.seconds.keys() == {"data", "arithmetic"}
    unknown = expected(step(256), zero(), Device(None, None), None)
    assert (unknown.mfu, unknown.step_seconds, unknown.bottleneck) == (None, None, None)


TINY = ("--config", "tiny_shapes", "--world_size", "2")
SMALL = ("--device_memory", "6GiB")  # few micro-batches are tried


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SMALL, ["share of 989 TFLOP/s", "<- bottleneck", "from EVE-Base in the training loop", "backward alone"]),
        (("--card", "a100_40gb", "--micro_batch_size", "auto"), ["scaled by the peak, 312", "(auto) a rank", "40.0"]),
        (("--mfu", "0.4", "--pairs", "1e9", *SMALL), ["40.0%", "days for 1000 M samples", "  --mfu"]),
        (("--device", "cpu", *SMALL), ["--peak_tflops is not given"]),
    ],
)  # fmt: skip
def test_what_is_printed(options: tuple[str, ...], words: list[str]) -> None:
    plan = make_plan(parse(PretrainPlan, [*TINY, *options], "plan"))
    text = as_text(plan)
    assert [word for word in words if word not in text] == []
    assert (plan["samples_per_second"] is None) == ("--device" in options)
    if plan["speed"]["bottleneck"]:
        assert plan["samples_per_second"] == pytest.approx(128 / plan["speed"]["step_seconds"])


def test_a_card_has_its_memory_and_what_is_named_wins() -> None:
    argv = ["--task", "vqa", "--config", "vqa", "--card", "h200"]
    options = parse(FinetunePlan, argv, "plan")
    plan = make_plan(dataclasses.replace(options, model=model_config()))
    assert (plan["device_memory"], plan["peak_tflops"]) == (139 * GIB, 989.0)
    options = parse(FinetunePlan, [*argv, "--device_memory", "24GiB", "--peak_tflops", "100"], "plan")
    plan = make_plan(dataclasses.replace(options, model=model_config()))
    assert (plan["device_memory"], plan["peak_tflops"]) == (24 * GIB, 100.0)
