"""Devices that the plan knows, and how fast EVE-Base was on one of them.

What is called measured was, on one H100 SXM with torch 2.11, at commit 0e234b1 (docs/benchmarks.md, "On one H100"). All
else is scaled from it: by operations per block, and by the devices' peaks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CardName = Literal["h100", "h200", "a100", "a100_40gb"]
MEASURED_CARD = "h100"
RANKS_PER_NODE = 8  # assumed
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU, by NVIDIA's data sheets.

    Attributes:
        memory: bytes.
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


@dataclass(frozen=True)
class Timing:
    """Seconds of a micro-batch of EVE-Base, whose pairs take so many operations each."""

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
# The training loop: JPEGs, 14 workers, ZeRO 1, texts of 13 to 17 tokens; 142 and 634 pairs/s.
LOOP = (Timing(32, 184e9, 32 / 142), Timing(256, 184e9, 256 / 634))
BLOCKS = 2 * 12  # that a micro-batch of these goes through: two passes
GRADIENTS = 322  # parameters of theirs

# For 256 pairs the device was busy for 227 ms (forward and backward).
DEVICE_SHARE = 256 * 215e9 / 0.227 / (CARDS["h100"].peak_tflops * 1e12)
# With 32 pairs the host's launches take the time, in the forward and backward passes and in DeepSpeed's step.
LAUNCH_SECONDS = FORWARD_BACKWARD[0].seconds / BLOCKS  # for each block that a micro-batch goes through
ENGINE_SECONDS = (LOOP[0].seconds - FORWARD_BACKWARD[0].seconds) / GRADIENTS  # for each gradient of a step
IMAGES_PER_WORKER = 2435 / 14  # a second; decoding 640 x 480 JPEGs, by the machine's 14 loader processes
# Of a CPU's own peak (`bench step` measures it): EVE-Base, 16 pairs, bf16, on a CPU with AVX-512 (docs/benchmarks.md).
CPU_SHARE = 0.6


def share_of_peak(curve: Curve, flops: float, blocks: int, peak: float) -> float:
    """The share of its peak that a device reaches with a micro-batch of ``flops`` operations.

    The time is that of EVE-Base with as many operations in each block. Below the smallest micro-batch that was measured
    it stays, as it is that of launches; beyond the largest it grows as between the last two. A device of half the peak
    takes for its operations what the H100 takes for twice as many.

    Args:
        curve: ``LOOP`` or ``FORWARD_BACKWARD``.
        flops: of a micro-batch, forward and backward.
        blocks: that it goes through.
        peak: of the device, operations/s.
    """
    measured = CARDS[MEASURED_CARD].peak_tflops * 1e12
    work = flops / blocks * BLOCKS * measured / peak
    return work / (_seconds(curve, work) * measured)


def _seconds(curve: Curve, flops: float) -> float:
    """Time of ``flops`` operations by the line through the two timings beside it."""
    if flops <= curve[0].flops:
        return curve[0].seconds
    place = min(bisect_left(curve, flops, key=lambda timing: timing.flops), len(curve) - 1)
    low, high = curve[place - 1], curve[place]
    return low.seconds + (flops - low.flops) / (high.flops - low.flops) * (high.seconds - low.seconds)


def link_speed(card: Card, ranks_on_node: int, nodes: bool) -> float:
    """Bytes/s at which a rank sends in a ring. Rings between nodes use the adapters of all its ranks on a node at once.

    Args:
        card: of all ranks.
        ranks_on_node: how many ranks of a group are on one node.
        nodes: whether the group reaches beyond one.
    """
    return min(card.nvlink, card.network * ranks_on_node) if nodes else card.nvlink
