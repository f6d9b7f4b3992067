"""The experts of a softly routing block: E feed-forward networks over contiguous slices of sorted rows.

Shapes: R rows, D dim, H hidden, E experts held here, n rows of one expert.
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


class _ExpertMLPs(torch.autograd.Function):
    """All experts in one autograd node: each weight gradient is written in place, zeros for an expert without rows.

    Plain autograd over ``w1[e]`` would make a full [E, H, D] gradient per expert, over ``w1.unbind()`` one more copy of
    it, and without any rows there would be no gradient, which ZeRO cannot reduce.
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
        h_RH = x_RD.new_empty(sum(counts), hidden)
        for expert, rows in _slices(counts):
            torch.addmm(w3_E1B[expert, 0, :hidden], x_RD[rows], w1_EHD[expert].t(), out=h_RH[rows])
        a_RH = activation(h_RH)
        y_RD = torch.empty_like(x_RD)
        y_RD[sum(counts) :] = 0
        for expert, rows in _slices(counts):
            torch.addmm(w3_E1B[expert, 0, hidden:], a_RH[rows], w2_EDH[expert].t(), out=y_RD[rows])
        ctx.save_for_backward(x_RD, h_RH, w1_EHD, w2_EDH, w3_E1B)
        ctx.counts, ctx.activation = counts, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RH, w1_EHD, w2_EDH, w3_E1B = ctx.saved_tensors
        counts, hidden = ctx.counts, w1_EHD.shape[1]
        dy_RD = dy_RD.contiguous()
        da_RH = torch.empty_like(h_RH)
        for expert, rows in _slices(counts):
            torch.mm(dy_RD[rows], w2_EDH[expert], out=da_RH[rows])
        with torch.enable_grad():  # the activation is computed anew: cheaper than keeping [R, H] a second time
            h_RH = h_RH.detach().requires_grad_()
            a_RH = ctx.activation(h_RH)
        (dh_RH,) = torch.autograd.grad(a_RH, h_RH, da_RH)
        a_RH = a_RH.detach()
        dw1_EHD, dw2_EDH, dw3_E1B = torch.empty_like(w1_EHD), torch.empty_like(w2_EDH), torch.zeros_like(w3_E1B)
        dx_RD = torch.empty_like(x_RD)
        dx_RD[sum(counts) :] = 0
        for expert, rows in _slices(counts):
            torch.mm(dy_RD[rows].t(), a_RH[rows], out=dw2_EDH[expert])
            torch.mm(dh_RH[rows].t(), x_RD[rows], out=dw1_EHD[expert])
            torch.sum(dh_RH[rows], dim=0, out=dw3_E1B[expert, 0, :hidden])
            torch.sum(dy_RD[rows], dim=0, out=dw3_E1B[expert, 0, hidden:])
            torch.mm(dh_RH[rows], w1_EHD[expert], out=dx_RD[rows])
        for expert, count in enumerate(counts):
            if not count:
                dw1_EHD[expert], dw2_EDH[expert] = 0, 0
        return dx_RD, dw1_EHD, dw2_EDH, dw3_E1B, None, None


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
