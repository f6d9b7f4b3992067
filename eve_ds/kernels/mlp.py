"""Feed-forward networks over contiguous slices of rows: fc2(activation(fc1(x))), one autograd node for all of them.

Shapes: R rows sorted by network, E networks, D dim, H hidden. With E = 1 it is an ordinary feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds.kernels.buffers import reused_empty_like
from eve_ds.kernels.grouped_mm import (
    Groups,
    add_group_bias_,
    grouped_mm,
    grouped_sum,
    grouped_weight_gradient,
    has_grouped_kernel,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """f(x) = plain(scale x) / scale, so that both factors ride along with the matrix products around it.

    Attributes:
        plain: the function without scale.
        scale: e.g. 1.702 for x sigmoid(1.702 x), which is silu(1.702 x) / 1.702.
        forward: (x, out=) writes plain(x).
        backward: (gradient, x, grad_input=) writes gradient * plain'(x); may be in place.
    """

    plain: Callable[[Tensor], Tensor]
    scale: float
    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """f(x), by plain autograd."""
        return self.plain(x) if self.scale == 1 else self.plain(self.scale * x) / self.scale


ACTIVATIONS = {
    "gelu": Activation(F.gelu, 1.0, aten.gelu.out, aten.gelu_backward.grad_input),
    "quick_gelu": Activation(F.silu, 1.702, aten.silu.out, aten.silu_backward.grad_input),
}


def reference(
    x_RD: Tensor, w1_EHD: Tensor, b1_EH: Tensor, w2_EDH: Tensor, b2_ED: Tensor, counts: list[int], activation: str
) -> Tensor:
    """What ``mlp`` computes, in plain PyTorch."""
    rows = x_RD[: sum(counts)].split(counts)
    parts = [
        F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
        for x, w1, b1, w2, b2 in zip(rows, w1_EHD, b1_EH, w2_EDH, b2_ED, strict=True)
    ]
    return torch.cat([*parts, x_RD.new_zeros(x_RD.shape[0] - sum(counts), w2_EDH.shape[1])])


def mlp(
    x_RD: Tensor, w1_EHD: Tensor, b1_EH: Tensor, w2_EDH: Tensor, b2_ED: Tensor, counts: list[int], activation: str
) -> Tensor:
    """Network e applied to its slice of rows.

    Plain autograd over ``w1[e]`` would make a full [E, H, D] gradient per network, and none for a network without rows,
    which ZeRO cannot reduce. Here each weight gradient is written once, in place. Only x and the values before the
    activation are kept; what the activation gives lives in a buffer of one slice's size (it stays in the cache, and
    large fresh buffers cost the CPU more in page faults than the arithmetic does).

    Args:
        x_RD: rows of network 0, then 1, …; rows beyond the sum of ``counts`` belong to none and come out as zeros.
        w1_EHD: weights of fc1.
        b1_EH: biases of fc1.
        w2_EDH: weights of fc2.
        b2_ED: biases of fc2.
        counts: rows of each network.
        activation: a name in ``ACTIVATIONS``.
    Returns:
        [R, D] in x's dtype.
    """
    return _MLP.apply(x_RD, w1_EHD, b1_EH, w2_EDH, b2_ED, counts, ACTIVATIONS[activation])


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        w1_EHD: Tensor,
        b1_EH: Tensor,
        w2_EDH: Tensor,
        b2_ED: Tensor,
        counts: list[int],
        activation: Activation,
    ) -> Tensor:
        groups = Groups(counts, x_RD.device)
        forward = _grouped_forward if _is_grouped(x_RD, counts) else _looped_forward
        h_RH, y_RD = forward(x_RD, w1_EHD, b1_EH, w2_EDH, b2_ED, groups, activation)
        ctx.save_for_backward(x_RD, h_RH, w1_EHD, w2_EDH)
        ctx.groups, ctx.activation = groups, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RH, w1_EHD, w2_EDH = ctx.saved_tensors
        backward = _grouped_backward if _is_grouped(x_RD, ctx.groups.counts) else _looped_backward
        return *backward(dy_RD.contiguous(), x_RD, h_RH, w1_EHD, w2_EDH, ctx.groups, ctx.activation), None, None


def _is_grouped(x_RD: Tensor, counts: list[int]) -> bool:
    """Whether one grouped product for all networks beats a loop of ordinary ones."""
    return len(counts) > 1 and has_grouped_kernel(x_RD.device)


def _looped_forward(
    x_RD: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor,
    w2_EDH: Tensor,
    b2_ED: Tensor,
    groups: Groups,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """(scale * what the activation sees [R, H], result [R, D])."""
    hidden, longest = w1_EHD.shape[1], max(groups.counts, default=0)
    h_RH = x_RD.new_empty(x_RD.shape[0], hidden)
    y_RD = x_RD.new_empty(x_RD.shape[0], w2_EDH.shape[1])
    buffer = x_RD.new_empty(longest, hidden)
    for e, rows in groups.slices():
        h, a = h_RH[rows], buffer[: groups.counts[e]]
        torch.addmm(b1_EH[e], x_RD[rows], w1_EHD[e].t(), beta=activation.scale, alpha=activation.scale, out=h)
        activation.forward(h, out=a)
        torch.addmm(b2_ED[e], a, w2_EDH[e].t(), alpha=1 / activation.scale, out=y_RD[rows])
    return h_RH, groups.zero_rest(y_RD)


def _looped_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    w1_EHD: Tensor,
    w2_EDH: Tensor,
    groups: Groups,
    activation: Activation,
) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1, w2 and b2."""
    dw1_EHD, dw2_EDH = reused_empty_like(w1_EHD), reused_empty_like(w2_EDH)
    db1_EH, db2_ED = (w.new_empty(w.shape[:2]) for w in (w1_EHD, w2_EDH))
    dx_RD = torch.empty_like(x_RD)
    buffers = x_RD.new_empty(2, max(groups.counts, default=0), w1_EHD.shape[1])
    for e, rows in groups.slices():
        x, h, dy = x_RD[rows], h_RH[rows], dy_RD[rows]
        a, dh = buffers[:, : groups.counts[e]]
        activation.forward(h, out=a)  # computed anew: cheaper than keeping [R, H] a second time
        torch.addmm(dw2_EDH[e], dy.t(), a, beta=0, alpha=1 / activation.scale, out=dw2_EDH[e])
        torch.sum(dy, dim=0, out=db2_ED[e])
        torch.mm(dy, w2_EDH[e], out=dh)
        activation.backward(dh, h, grad_input=dh)  # both scales cancel here
        torch.mm(dh.t(), x, out=dw1_EHD[e])
        torch.sum(dh, dim=0, out=db1_EH[e])
        torch.mm(dh, w1_EHD[e], out=dx_RD[rows])
    for e, count in enumerate(groups.counts):
        if not count:
            for gradient in (dw1_EHD, db1_EH, dw2_EDH, db2_ED):
                gradient[e] = 0
    return groups.zero_rest(dx_RD), dw1_EHD, db1_EH, dw2_EDH, db2_ED


def _grouped_forward(
    x_RD: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor,
    w2_EDH: Tensor,
    b2_ED: Tensor,
    groups: Groups,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """As ``_looped_forward``, each product of all networks at once."""
    h_RH = add_group_bias_(grouped_mm(x_RD, w1_EHD.mT, groups), b1_EH, groups)
    if activation.scale != 1:
        h_RH *= activation.scale
    y_RD = grouped_mm(activation.forward(h_RH, out=torch.empty_like(h_RH)), w2_EDH.mT, groups)
    if activation.scale != 1:
        y_RD /= activation.scale
    return h_RH, add_group_bias_(y_RD, b2_ED, groups)


def _grouped_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    w1_EHD: Tensor,
    w2_EDH: Tensor,
    groups: Groups,
    activation: Activation,
) -> tuple[Tensor, ...]:
    """As ``_looped_backward``, each product of all networks at once."""
    a_RH = activation.forward(h_RH, out=torch.empty_like(h_RH))
    dw2_EDH = grouped_weight_gradient(dy_RD / activation.scale, a_RH, groups)
    dh_RH = grouped_mm(dy_RD, w2_EDH, groups)
    dh_RH = activation.backward(dh_RH, h_RH, grad_input=dh_RH)
    dw1_EHD = grouped_weight_gradient(dh_RH, x_RD, groups)
    return (
        grouped_mm(dh_RH, w1_EHD, groups),
        dw1_EHD,
        grouped_sum(dh_RH, groups),
        dw2_EDH,
        grouped_sum(dy_RD, groups),
    )
