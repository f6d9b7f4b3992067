"""Devices that the plan knows, and how fast EVE-Base was on one of them.

What is called measured was, on one H100 SXM with torch 2.11, at commit 0e234b1 (docs/benchmarks.md, "On one H100"). All
else is scaled from it: by operations per block, and by the devices' peaks. That was before engine/lean_zero.py,
engine/device_feed.py and compiled blocks: today's code should be faster, by how much is not measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

CardName = Literal["h100", "h200", "a100", "a100_40gb"]
MEASURED_CARD = "h100"
RANKS_PER_NODE = 8  # assumed
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU. All but ``memory`` is from NVIDIA's data sheets.

    Attributes:
        memory: bytes. Of h100, a100 and a100_40gb the 80 and 40 GB of their names, taken as GiB: a little more than
            torch shows. Of h200 what torch shows; its data sheet says 141 GB.
        peak_tflops: dense, bf16, as callbacks/performance.py has it (which imports DeepSpeed).
        nvlink: bytes/s from one GPU of a node to the others.
        network: bytes/s of the adapter that each GPU of a DGX node has: 400 Gb/s, with the A100 200 Gb/s.
    """

    memory: int
    peak_tflops: float
    nvlink: float
    network: float


CARDS: dict[str, Card] = {
    "h100": Card(80 * GIB, 989.0, 450e9, 50e9),
    "h200": Card(139 * GIB, 989.0, 450e9, 50e9),
    "a100": Card(80 * GIB, 312.0, 300e9, 25e9),
    "a100_40gb": Card(40 * GIB, 312.0, 300e9, 25e9),
}
MEASURED_PEAK = CARDS[MEASURED_CARD].peak_tflops * 1e12  # operations/s


@dataclass(frozen=True)
class Timing:
    """Seconds of a micro-batch of EVE-Base, with ``flops_per_pair`` operations for each of its ``pairs``."""

    pairs: int
    flops_per_pair: float
    seconds: float

    @property
    def flops(self) -> float:
        return self.pairs * self.flops_per_pair


Curve = Sequence[Timing]
# Forward and backward alone (bench step), texts of 40 tokens.
FORWARD_BACKWARD = (
    Timing(32, 215e9, 0.083),
    Timing(64, 215e9, 0.095),
    Timing(128, 215e9, 0.138),
    Timing(256, 215e9, 0.2475),  # 240 to 255 ms
)
# A step of the training loop, of one micro-batch: JPEGs, 14 workers, ZeRO 1, texts of 13 to 17 tokens; 142 and 634
# pairs/s.
LOOP = (Timing(32, 184e9, 32 / 142), Timing(256, 184e9, 256 / 634))
BLOCKS = 2 * 12  # that a micro-batch of LOOP and FORWARD_BACKWARD goes through: two passes
GRADIENTS = 322  # parameter tensors of EVE-Base

# For 256 pairs the device was busy for 227 ms (forward and backward).
DEVICE_SHARE = 256 * 215e9 / 0.227 / MEASURED_PEAK
# The host's launches are taken to be what 32 pairs wait for: twice as many take 14 % longer, and at the rate of 256
# pairs the device would be busy for 28 of the 83 ms.
LAUNCH_SECONDS = FORWARD_BACKWARD[0].seconds / BLOCKS  # for each block that a micro-batch goes through
# All that a step of 32 pairs takes beyond forward and backward: DeepSpeed's part, but also waits for data, images
# normalized by the main process, and logging (and the two were measured with texts of different length). Most is
# thought to be DeepSpeed's, so it is taken to come once in a step and to grow with the number of gradients.
FIXED_SECONDS = LOOP[0].seconds - FORWARD_BACKWARD[0].seconds
# What is left of LOOP for each micro-batch: forward and backward, and what grows with the pairs beside them.
LOOP_MICRO_BATCH = tuple(replace(timing, seconds=timing.seconds - FIXED_SECONDS) for timing in LOOP)
IMAGES_PER_WORKER = 2435 / 14  # a second; decoding 640 x 480 JPEGs, by the machine's 14 loader processes
# Of a CPU's own peak (`bench step` measures it): EVE-Base, 16 pairs, bf16, on a CPU with AVX-512 (docs/benchmarks.md).
CPU_SHARE = 0.6


def micro_batch_seconds(curve: Curve, flops: float, blocks: int, peak: float) -> float:
    """Seconds of a micro-batch of ``flops`` operations.

    The time is that of EVE-Base with as many operations in each block. Below the smallest micro-batch that was measured
    the time stays constant (launch-bound); beyond the largest it grows as between the last two. A device of half the
    peak takes for its operations what the H100 takes for twice as many.

    Args:
        curve: ``LOOP_MICRO_BATCH`` or ``FORWARD_BACKWARD``.
        flops: of the micro-batch, forward and backward.
        blocks: that it goes through.
        peak: of the device, operations/s.
    """
    deeper = blocks / BLOCKS
    return _seconds(curve, flops / deeper * MEASURED_PEAK / peak) * deeper


def _seconds(curve: Curve, flops: float) -> float:
    """Time of ``flops`` operations by the line through the two timings beside it."""
    if flops <= curve[0].flops:
        return curve[0].seconds
    place = min(bisect_left(curve, flops, key=lambda timing: timing.flops), len(curve) - 1)
    low, high = curve[place - 1], curve[place]
    return low.seconds + (flops - low.flops) / (high.flops - low.flops) * (high.seconds - low.seconds)


def link_speed(card: Card, ranks_on_node: int, crosses_nodes: bool) -> float:
    """Bytes/s at which a rank sends in a ring. A ring that crosses nodes uses the adapters of all ranks that the group
    has on a node at once.

    Args:
        card: of all ranks.
        ranks_on_node: how many ranks of the group are on one node.
        crosses_nodes: whether the group reaches beyond one node.
    """
    return min(card.nvlink, card.network * ranks_on_node) if crosses_nodes else card.nvlink
