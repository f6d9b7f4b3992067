"""The experts of a softly routing block: E feed-forward networks over contiguous slices of sorted rows.

Shapes: R rows, P rows with padding, D dim, H hidden, E experts held here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), written with SiLU, which is one fused operation in both directions."""
    return F.silu(1.702 * x) / 1.702


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def expert_seed(seed: int, expert: int) -> int:
    """The seed of one expert's first values: 32 well-mixed bits (torch's CPU generator ignores the higher ones)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{expert}".encode(), digest_size=4).digest(), "little")


# On the CPU every matrix product of a new shape has its kernel generated anew (about 0.5 ms, and memory that grows by
# 1 GB in 3,000 shapes): rows of an expert are padded to a multiple of this, so that shapes recur.
CPU_ROW_MULTIPLE = 32


class _ExpertMLPs(torch.autograd.Function):
    """All experts in one autograd node: each weight gradient is written in place, zeros for an expert without rows.

    Plain autograd over ``w1[e]`` would make a full [E, H, D] gradient per expert, over ``w1.unbind()`` one more copy of
    it, and without any rows there would be no gradient, which ZeRO cannot reduce. Padding rows are zeros in x and dy,
    so they add nothing to any gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        w1_EHD: Tensor,
        w2_EDH: Tensor,
        w3_E1B: Tensor,
        counts: list[int],
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        hidden = w1_EHD.shape[1]
        padded = [_padded(count, x_RD.device) for count in counts]
        x_PD = _spread(x_RD, counts, padded)
        h_PH = x_RD.new_empty(sum(padded), hidden)
        for expert, rows in _slices(padded):
            torch.addmm(w3_E1B[expert, 0, :hidden], x_PD[rows], w1_EHD[expert].t(), out=h_PH[rows])
        a_PH = activation(h_PH)
        y_PD = torch.empty_like(x_PD)
        for expert, rows in _slices(padded):
            torch.addmm(w3_E1B[expert, 0, hidden:], a_PH[rows], w2_EDH[expert].t(), out=y_PD[rows])
        ctx.save_for_backward(x_PD, h_PH, w1_EHD, w2_EDH, w3_E1B)
        ctx.counts, ctx.padded, ctx.activation = counts, padded, activation
        return _collect(y_PD, counts, padded, x_RD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, h_PH, w1_EHD, w2_EDH, w3_E1B = ctx.saved_tensors
        counts, padded, hidden = ctx.counts, ctx.padded, w1_EHD.shape[1]
        dy_PD = _spread(dy_RD.contiguous(), counts, padded)
        da_PH = torch.empty_like(h_PH)
        for expert, rows in _slices(padded):
            torch.mm(dy_PD[rows], w2_EDH[expert], out=da_PH[rows])
        with torch.enable_grad():  # the activation is computed anew: cheaper than keeping [P, H] a second time
            h_PH = h_PH.detach().requires_grad_()
            a_PH = ctx.activation(h_PH)
        (dh_PH,) = torch.autograd.grad(a_PH, h_PH, da_PH)
        a_PH = a_PH.detach()
        dw1_EHD, dw2_EDH, dw3_E1B = torch.empty_like(w1_EHD), torch.empty_like(w2_EDH), torch.zeros_like(w3_E1B)
        dx_PD = torch.empty_like(x_PD)
        for expert, rows in _slices(padded):
            torch.mm(dy_PD[rows].t(), a_PH[rows], out=dw2_EDH[expert])
            torch.mm(dh_PH[rows].t(), x_PD[rows], out=dw1_EHD[expert])
            torch.sum(dh_PH[rows], dim=0, out=dw3_E1B[expert, 0, :hidden])
            torch.sum(dy_PD[rows], dim=0, out=dw3_E1B[expert, 0, hidden:])
            torch.mm(dh_PH[rows], w1_EHD[expert], out=dx_PD[rows])
        for expert, count in enumerate(counts):
            if not count:
                dw1_EHD[expert], dw2_EDH[expert] = 0, 0
        return _collect(dx_PD, counts, padded, dy_RD.shape[0]), dw1_EHD, dw2_EDH, dw3_E1B, None, None


def _padded(count: int, device: torch.device) -> int:
    return -(-count // CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE if device.type == "cpu" else count


def _spread(rows: Tensor, counts: list[int], padded: list[int]) -> Tensor:
    """[R, D] sorted by expert -> [P, D], zeros after each expert's rows."""
    if counts == padded and sum(counts) == rows.shape[0]:
        return rows
    spread = rows.new_empty(sum(padded), rows.shape[1])
    start = place = 0
    for count, space in zip(counts, padded, strict=True):
        spread[place : place + count] = rows[start : start + count]
        spread[place + count : place + space] = 0
        start, place = start + count, place + space
    return spread


def _collect(spread: Tensor, counts: list[int], padded: list[int], total: int) -> Tensor:
    """The inverse of ``_spread``: [P, D] -> [total, D], zeros in rows of no expert."""
    if counts == padded and sum(counts) == total:
        return spread
    rows = spread.new_empty(total, spread.shape[1])
    start = place = 0
    for count, space in zip(counts, padded, strict=True):
        rows[start : start + count] = spread[place : place + count]
        start, place = start + count, place + space
    rows[start:] = 0
    return rows


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    slices, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices


class Experts(nn.Module):
    """Feed-forward experts ``first .. first + count - 1`` of a layer: fc2(activation(fc1(x))), both with bias.

    DeepSpeed saves exactly the three tensors w1, w2, w3 per expert (FACTS.md), hence both biases in w3.

    Args:
        dim: D.
        hidden: H.
        count: experts held here.
        activation: "gelu" or "quick_gelu".
        seed: of the layer; an expert's first values depend on it and on the expert's global index alone.
        first: global index of the first expert held here.

    Attributes:
        w1: [E, H, D] weights of fc1.
        w2: [E, D, H] weights of fc2.
        w3: [E, 1, H + D] biases of fc1, then of fc2.
    """

    def __init__(self, dim: int, hidden: int, count: int, activation: str, seed: int, first: int = 0) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(count, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, hidden))
        self.w3 = nn.Parameter(torch.zeros(count, 1, hidden + dim))
        if not self.w1.is_meta:
            self._initialise(seed, first)

    @torch.no_grad()
    def _initialise(self, seed: int, first: int) -> None:
        for index in range(self.w1.shape[0]):
            generator = torch.Generator().manual_seed(expert_seed(seed, first + index))
            for weight in (self.w1, self.w2):
                # Drawn on the CPU in float32: the same values on any device and in any dtype.
                values = torch.empty(weight.shape[1:], device="cpu", dtype=torch.float32)
                weight[index].copy_(nn.init.trunc_normal_(values, std=0.02, generator=generator))

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Apply expert e to its slice.

        Args:
            rows: [R, D], sorted by expert.
            counts: rows of each expert held here; rows beyond their sum belong to no expert and come out as zeros.
        Returns:
            [R, D].
        """
        return _ExpertMLPs.apply(rows, self.w1, self.w2, self.w3, counts, ACTIVATIONS[self.activation])
