"""Feed-forward networks, each for the tokens that are routed to it: gather, fc2(activation(fc1(x))), weigh and sum, in
one autograd node.

Shapes: T tokens, k choices per token, R = T k rows, P slots sorted by network (``permute``), E networks, D dim, H
hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds.kernels import permute, permute_reference
from eve_ds.kernels.buffers import reused_empty_like
from eve_ds.kernels.grouped_mm import (
    Groups,
    add_group_bias_,
    grouped_mm,
    grouped_sum,
    grouped_weight_gradient,
    has_grouped_kernel,
)
from eve_ds.kernels.mlp import ACTIVATIONS, Activation
from eve_ds.kernels.permute import Layout

Networks = tuple[Tensor, Tensor, Tensor, Tensor]  # w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D]


def reference(
    x_TD: Tensor,
    weights_Tk: Tensor | None,
    w1_EHD: Tensor,
    b1_EH: Tensor,
    w2_EDH: Tensor,
    b2_ED: Tensor,
    layout: Layout,
    activation: str,
) -> Tensor:
    """What ``expert_mlp`` computes, in plain PyTorch."""
    top_k = 1 if weights_Tk is None else weights_Tk.shape[1]
    slots = permute_reference.gather_rows(x_TD, layout.order, layout.inverse.numel(), top_k)
    served = sum(layout.slots)
    parts = [
        F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
        for x, w1, b1, w2, b2 in zip(slots[:served].split(layout.slots), w1_EHD, b1_EH, w2_EDH, b2_ED, strict=True)
    ]
    rows = torch.cat([*parts, slots.new_zeros(slots.shape[0] - served, slots.shape[1])])[layout.inverse]
    return rows if weights_Tk is None else (rows.view(-1, top_k, rows.shape[1]) * weights_Tk.unsqueeze(2)).sum(dim=1)


def expert_mlp(
    x_TD: Tensor,
    weights_Tk: Tensor | None,
    w1_EHD: Tensor,
    b1_EH: Tensor,
    w2_EDH: Tensor,
    b2_ED: Tensor,
    layout: Layout,
    activation: str,
    one_launch: bool | None = None,
) -> Tensor:
    """The sum over a token's k choices of weight x network(token).

    Plain autograd over ``w1[e]`` would make a full [E, H, D] gradient per network, and none for a network without rows,
    which ZeRO cannot reduce. Here each weight gradient is written once, in place. Where networks take turns, only the
    values before the activation are kept; all else that has rows lives in buffers of one network's size (they stay in
    the cache, and large fresh buffers cost the CPU more in page faults than the arithmetic does).

    Args:
        x_TD: tokens.
        weights_Tk: of each choice, in x's dtype; differentiable. None: k is 1 and every weight too.
        w1_EHD: weights of fc1.
        b1_EH: biases of fc1.
        w2_EDH: weights of fc2.
        b2_ED: biases of fc2.
        layout: the slots of each network; choices in slots beyond them visit none and add nothing.
        activation: a name in ``ACTIVATIONS``.
        one_launch: whether each product of all networks is one call; None: in bf16 where the device has a kernel.
    Returns:
        [T, D] in x's dtype.
    """
    if one_launch is None:
        one_launch = has_grouped_kernel(x_TD.device) and x_TD.dtype == torch.bfloat16
    networks = (w1_EHD, b1_EH, w2_EDH, b2_ED)
    return _ExpertMLP.apply(x_TD, weights_Tk, *networks, layout, ACTIVATIONS[activation], one_launch)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_Tk: Tensor | None,
        w1_EHD: Tensor,
        b1_EH: Tensor,
        w2_EDH: Tensor,
        b2_ED: Tensor,
        layout: Layout,
        activation: Activation,
        one_launch: bool,
    ) -> Tensor:
        ctx.activation, ctx.one_launch = activation, one_launch
        ctx.top_k = 1 if weights_Tk is None else weights_Tk.shape[1]
        ctx.counts, ctx.groups = layout.counts, Groups(layout.slots, x_TD.device)
        forward = _grouped_forward if one_launch else _looped_forward
        out_TD, *kept = forward(ctx, layout, x_TD, weights_Tk, (w1_EHD, b1_EH, w2_EDH, b2_ED))
        ctx.save_for_backward(layout.order, layout.inverse, x_TD, weights_Tk, w1_EHD, w2_EDH, *kept)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        backward = _grouped_backward if ctx.one_launch else _looped_backward
        order, inverse, *kept = ctx.saved_tensors  # asked for once: activation checkpointing unpacks each time
        layout = Layout(order, inverse, ctx.counts, ctx.groups.counts)
        return *backward(ctx, layout, dout_TD.contiguous(), *kept), None, None, None


def _looped_forward(
    ctx: Any, layout: Layout, x_TD: Tensor, weights_Tk: Tensor | None, networks: Networks
) -> tuple[Tensor, ...]:
    """The result, and what is kept: scale x what the activation sees, a row for every slot of a network; with weights,
    b2 too."""
    w1_EHD, b1_EH, w2_EDH, b2_ED = networks
    groups, scale, (hidden, dim) = ctx.groups, ctx.activation.scale, w1_EHD.shape[1:]
    token_P, weight_P1 = _token_of_slot(layout, ctx.top_k), _weight_of_slot(layout, weights_Tk, x_TD)
    h_PH, out_TD = x_TD.new_empty(sum(groups.counts), hidden), torch.zeros_like(x_TD)
    rows_D, rows_H = (x_TD.new_empty(max(groups.counts, default=0), width) for width in (dim, hidden))
    for e, rows in groups.slices():
        token, h, count = token_P[rows], h_PH[rows], layout.counts[e]
        x, a = rows_D[: len(token)], rows_H[: len(token)]
        torch.index_select(x_TD, 0, token, out=x)
        torch.addmm(b1_EH[e], x, w1_EHD[e].t(), beta=scale, alpha=scale, out=h)
        ctx.activation.forward(h, out=a)
        y = torch.addmm(b2_ED[e], a, w2_EDH[e].t(), alpha=1 / scale, out=x).mul_(weight_P1[rows])
        out_TD.index_add_(0, token[:count], y[:count])  # a token comes to a network once: the sum has one order
    return (out_TD, h_PH) if weights_Tk is None else (out_TD, h_PH, b2_ED.contiguous())


def _looped_backward(
    ctx: Any,
    layout: Layout,
    dout_TD: Tensor,
    x_TD: Tensor,
    weights_Tk: Tensor | None,
    w1_EHD: Tensor,
    w2_EDH: Tensor,
    h_PH: Tensor,
    b2_ED: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the tokens, the weights of choices, w1, b1, w2 and b2."""
    groups, activation, (hidden, dim) = ctx.groups, ctx.activation, w1_EHD.shape[1:]
    token_P, weight_P1 = _token_of_slot(layout, ctx.top_k), _weight_of_slot(layout, weights_Tk, x_TD)
    dw1_EHD, dw2_EDH = reused_empty_like(w1_EHD), reused_empty_like(w2_EDH)
    db1_EH, db2_ED = (w.new_empty(w.shape[:2]) for w in (w1_EHD, w2_EDH))
    dx_TD, dweight_P1 = torch.zeros_like(x_TD), torch.zeros_like(weight_P1)
    rows_D, rows_H = (x_TD.new_empty(2, max(groups.counts, default=0), width) for width in (dim, hidden))
    for e, rows in groups.slices():
        token, weight, h, count = token_P[rows], weight_P1[rows], h_PH[rows], layout.counts[e]
        (x, dy), (a, dh) = rows_D[:, : len(token)], rows_H[:, : len(token)]
        torch.index_select(x_TD, 0, token, out=x)
        torch.index_select(dout_TD, 0, token, out=dy)
        activation.forward(h, out=a)
        torch.mm(dy, w2_EDH[e], out=dh)
        if b2_ED is not None:  # a weight's gradient is <dy, y>, but y = w2 a / scale + b2 was not kept
            torch.mv(dy, b2_ED[e], out=dweight_P1[rows, 0])
        dy *= weight
        torch.addmm(dw2_EDH[e], dy.t(), a, beta=0, alpha=1 / activation.scale, out=dw2_EDH[e])
        torch.sum(dy, dim=0, out=db2_ED[e])
        if b2_ED is not None:
            dweight_P1[rows].add_(a.mul_(dh).sum(dim=1, keepdim=True), alpha=1 / activation.scale)
        activation.backward(dh, h, grad_input=dh)  # both scales cancel here
        dh *= weight
        torch.mm(dh.t(), x, out=dw1_EHD[e])
        torch.sum(dh, dim=0, out=db1_EH[e])
        torch.mm(dh, w1_EHD[e], out=x)
        dx_TD.index_add_(0, token[:count], x[:count])
    for e, count in enumerate(groups.counts):
        if not count:
            for gradient in (dw1_EHD, db1_EH, dw2_EDH, db2_ED):
                gradient[e] = 0
    dweights_Tk = None if weights_Tk is None else dweight_P1[layout.inverse].view_as(weights_Tk)
    return dx_TD, dweights_Tk, dw1_EHD, db1_EH, dw2_EDH, db2_ED


def _grouped_forward(
    ctx: Any, layout: Layout, x_TD: Tensor, weights_Tk: Tensor | None, networks: Networks
) -> tuple[Tensor, ...]:
    """As ``_looped_forward``, each product of all networks at once. What is kept has rows for all slots; with weights,
    the networks' results are kept too."""
    w1_EHD, b1_EH, w2_EDH, b2_ED = networks
    groups, activation = ctx.groups, ctx.activation
    h_PH = add_group_bias_(grouped_mm(_slots(layout, x_TD, ctx.top_k), w1_EHD.mT, groups), b1_EH, groups)
    if activation.scale != 1:
        h_PH *= activation.scale
    y_PD = grouped_mm(activation.forward(h_PH, out=torch.empty_like(h_PH)), w2_EDH.mT, groups)
    if activation.scale != 1:
        y_PD /= activation.scale
    add_group_bias_(y_PD, b2_ED, groups)
    out_TD = permute.operations(x_TD).sum_rows(y_PD, weights_Tk, layout.inverse, ctx.top_k)
    return (out_TD, h_PH) if weights_Tk is None else (out_TD, h_PH, y_PD)


def _grouped_backward(
    ctx: Any,
    layout: Layout,
    dout_TD: Tensor,
    x_TD: Tensor,
    weights_Tk: Tensor | None,
    w1_EHD: Tensor,
    w2_EDH: Tensor,
    h_PH: Tensor,
    y_PD: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """As ``_looped_backward``, each product of all networks at once. Here <dy, y> takes less time from a y that was
    kept [P, D] than from passes over [P, H]."""
    order, inverse, _, _ = layout
    operations, groups, activation = permute.operations(x_TD), ctx.groups, ctx.activation
    if weights_Tk is None:
        dy_PD, dweights_Tk = operations.sum_gradient(dout_TD, order, inverse.numel(), 1), None
    else:
        dy_PD, dweights_Tk = operations.weighted_gradients(dout_TD, y_PD, weights_Tk, order, inverse)
    a_PH = activation.forward(h_PH, out=torch.empty_like(h_PH))
    scaled_PD = dy_PD if activation.scale == 1 else dy_PD / activation.scale
    dw2_EDH = grouped_weight_gradient(scaled_PD, a_PH, groups)
    del a_PH, scaled_PD
    dh_PH = grouped_mm(dy_PD, w2_EDH, groups)
    dh_PH = activation.backward(dh_PH, h_PH, grad_input=dh_PH)
    dw1_EHD = grouped_weight_gradient(dh_PH, _slots(layout, x_TD, ctx.top_k), groups)
    db1_EH, db2_ED = grouped_sum(dh_PH, groups), grouped_sum(dy_PD, groups)
    dx_TD = operations.sum_rows(grouped_mm(dh_PH, w1_EHD, groups), None, inverse, ctx.top_k)
    return dx_TD, dweights_Tk, dw1_EHD, db1_EH, dw2_EDH, db2_ED


def _slots(layout: Layout, x_TD: Tensor, top_k: int) -> Tensor:
    """[P, D]: the token in each slot."""
    return permute.operations(x_TD).gather_rows(x_TD, layout.order, layout.inverse.numel(), top_k)


def _token_of_slot(layout: Layout, top_k: int) -> Tensor:
    """[P] int64; some token's in an empty slot."""
    return permute_reference.token_of_slot(layout.order, layout.inverse.numel(), top_k)


def _weight_of_slot(layout: Layout, weights_Tk: Tensor | None, x_TD: Tensor) -> Tensor:
    """[P, 1] in x's dtype; zero in an empty slot."""
    weights_R = x_TD.new_ones(layout.inverse.numel()) if weights_Tk is None else weights_Tk.reshape(-1)
    return torch.cat([weights_R, weights_R.new_zeros(1)])[layout.order].unsqueeze(1)
