"""The experts' feed-forward networks: gather each expert's tokens, fc2(activation(fc1(x))), weigh and sum, in one
autograd node.

Two autograd functions compute the same. ``_LoopedExpertMLP`` takes one expert after the other (on the CPU, and on GPUs
without a grouped kernel); ``_GroupedExpertMLP`` computes each product of all experts in one ``grouped_mm``.

Shapes: T tokens, k experts per token, R = T k choices, P rows sorted by expert (choices and padding, see ``permute``),
E experts, D dim, H hidden. h is fc1's output, a the activation's, y fc2's; dz is the gradient of the loss with respect
to z.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds.kernels import permute
from eve_ds.kernels.group_activation import activation_gradient_, bias_activation_
from eve_ds.kernels.grouped_mm import (
    add_group_bias_,
    grouped_mm,
    grouped_sum,
    grouped_weight_gradient,
    has_grouped_kernel,
)
from eve_ds.kernels.groups import Groups, zero_rest_
from eve_ds.kernels.mlp import ACTIVATIONS, Activation, reused_empty_like
from eve_ds.kernels.permute import Layout


def expert_mlp(
    x_TD: Tensor,
    weights_Tk: Tensor | None,
    fc1_weight_EHD: Tensor,
    fc1_bias_EH: Tensor,
    fc2_weight_EDH: Tensor,
    fc2_bias_ED: Tensor,
    layout: Layout,
    activation: str,
    use_grouped_mm: bool | None = None,
) -> Tensor:
    """The sum over a token's k choices of weight x expert(token).

    Plain autograd over ``fc1_weight[e]`` would make a full [E, H, D] gradient per expert, and none for an expert
    without tokens, which ZeRO cannot reduce. Here each weight gradient is written once, in place. The loop keeps h
    alone, and everything else per row lives in buffers of one expert's size (they stay in the cache; large fresh
    buffers cost the CPU more in page faults than the arithmetic does).

    Args:
        x_TD: tokens.
        weights_Tk: of each choice, in x's dtype; differentiable. None: k is 1 and every weight too.
        fc1_weight_EHD: weights of fc1.
        fc1_bias_EH: biases of fc1.
        fc2_weight_EDH: weights of fc2.
        fc2_bias_ED: biases of fc2.
        layout: the rows of each expert; choices of no expert add nothing.
        activation: a name in ``ACTIVATIONS``.
        use_grouped_mm: one grouped product for all experts instead of one per expert; None: for bf16 on devices that
            have the kernel.
    Returns:
        [T, D] in x's dtype.
    """
    if use_grouped_mm is None:
        use_grouped_mm = has_grouped_kernel(x_TD.device) and x_TD.dtype == torch.bfloat16
    function = _GroupedExpertMLP if use_grouped_mm else _LoopedExpertMLP
    parameters = (fc1_weight_EHD, fc1_bias_EH, fc2_weight_EDH, fc2_bias_ED)
    return function.apply(x_TD, weights_Tk, *parameters, layout, ACTIVATIONS[activation])


def reference(
    x_TD: Tensor,
    weights_Tk: Tensor | None,
    fc1_weight_EHD: Tensor,
    fc1_bias_EH: Tensor,
    fc2_weight_EDH: Tensor,
    fc2_bias_ED: Tensor,
    layout: Layout,
    activation: str,
) -> Tensor:
    """``expert_mlp`` in plain PyTorch."""
    top_k = _top_k(weights_Tk)
    x_PD = permute.gather_rows(x_TD, layout.order, layout.inverse.numel(), top_k)
    served = sum(layout.padded_tokens_per_expert)
    experts = zip(
        x_PD[:served].split(layout.padded_tokens_per_expert),
        *(fc1_weight_EHD, fc1_bias_EH, fc2_weight_EDH, fc2_bias_ED),
        strict=True,
    )
    parts = [
        F.linear(ACTIVATIONS[activation](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        for x, fc1_weight, fc1_bias, fc2_weight, fc2_bias in experts
    ]
    y_RD = torch.cat([*parts, x_PD.new_zeros(x_PD.shape[0] - served, x_PD.shape[1])])[layout.inverse]
    return y_RD if weights_Tk is None else (y_RD.view(-1, top_k, y_RD.shape[1]) * weights_Tk.unsqueeze(2)).sum(dim=1)


class _LoopedExpertMLP(torch.autograd.Function):
    """One expert after the other. Keeps scale x h (see ``Activation``) of the experts' rows; with weights, fc2's biases
    too."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_Tk: Tensor | None,
        fc1_weight_EHD: Tensor,
        fc1_bias_EH: Tensor,
        fc2_weight_EDH: Tensor,
        fc2_bias_ED: Tensor,
        layout: Layout,
        activation: Activation,
    ) -> Tensor:
        groups = Groups(layout.padded_tokens_per_expert, x_TD.device)
        scale, (hidden, dim) = activation.scale, fc1_weight_EHD.shape[1:]
        token_P, weight_P1 = _token_and_weight_of_row(layout, weights_Tk, x_TD)
        h_PH, out_TD = x_TD.new_empty(sum(groups.counts), hidden), torch.zeros_like(x_TD)
        buffer_D, buffer_H = (x_TD.new_empty(max(groups.counts, default=0), width) for width in (dim, hidden))
        for e, rows in groups.slices():
            token, h, count = token_P[rows], h_PH[rows], layout.tokens_per_expert[e]
            x, a = buffer_D[: len(token)], buffer_H[: len(token)]
            torch.index_select(x_TD, 0, token, out=x)
            torch.addmm(fc1_bias_EH[e], x, fc1_weight_EHD[e].t(), beta=scale, alpha=scale, out=h)
            activation.forward(h, out=a)
            y = torch.addmm(fc2_bias_ED[e], a, fc2_weight_EDH[e].t(), alpha=1 / scale, out=x).mul_(weight_P1[rows])
            out_TD.index_add_(0, token[:count], y[:count])  # each token once: the order of the sum is fixed
        kept = (h_PH,) if weights_Tk is None else (h_PH, fc2_bias_ED.contiguous())
        ctx.save_for_backward(layout.order, layout.inverse, x_TD, weights_Tk, fc1_weight_EHD, fc2_weight_EDH, *kept)
        ctx.tokens_per_expert, ctx.groups, ctx.activation = layout.tokens_per_expert, groups, activation
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under activation checkpointing each read of saved_tensors unpacks them again.
        order, inverse, x_TD, weights_Tk, fc1_weight_EHD, fc2_weight_EDH, h_PH, *kept = ctx.saved_tensors
        groups, activation, (hidden, dim) = ctx.groups, ctx.activation, fc1_weight_EHD.shape[1:]
        layout, fc2_bias_ED = Layout(order, inverse, ctx.tokens_per_expert, groups.counts), kept[0] if kept else None
        token_P, weight_P1 = _token_and_weight_of_row(layout, weights_Tk, x_TD)
        dfc1_weight_EHD, dfc2_weight_EDH = reused_empty_like(fc1_weight_EHD), reused_empty_like(fc2_weight_EDH)
        dfc1_bias_EH, dfc2_bias_ED = (w.new_empty(w.shape[:2]) for w in (fc1_weight_EHD, fc2_weight_EDH))
        dout_TD, dx_TD, dweight_P1 = dout_TD.contiguous(), torch.zeros_like(x_TD), torch.zeros_like(weight_P1)
        buffers_D, buffers_H = (x_TD.new_empty(2, max(groups.counts, default=0), width) for width in (dim, hidden))
        for e, rows in groups.slices():
            token, weight, h, count = token_P[rows], weight_P1[rows], h_PH[rows], layout.tokens_per_expert[e]
            (x, dy), (a, dh) = buffers_D[:, : len(token)], buffers_H[:, : len(token)]
            torch.index_select(x_TD, 0, token, out=x)
            torch.index_select(dout_TD, 0, token, out=dy)
            activation.forward(h, out=a)
            torch.mm(dy, fc2_weight_EDH[e], out=dh)
            if fc2_bias_ED is not None:  # dweight = <dout, y>; y = fc2_weight a / scale + fc2_bias is not kept
                torch.mv(dy, fc2_bias_ED[e], out=dweight_P1[rows, 0])
            dy *= weight
            torch.addmm(dfc2_weight_EDH[e], dy.t(), a, beta=0, alpha=1 / activation.scale, out=dfc2_weight_EDH[e])
            torch.sum(dy, dim=0, out=dfc2_bias_ED[e])
            if fc2_bias_ED is not None:
                dweight_P1[rows].add_(a.mul_(dh).sum(dim=1, keepdim=True), alpha=1 / activation.scale)
            activation.backward(dh, h, grad_input=dh)  # the two scales cancel
            dh *= weight
            torch.mm(dh.t(), x, out=dfc1_weight_EHD[e])
            torch.sum(dh, dim=0, out=dfc1_bias_EH[e])
            torch.mm(dh, fc1_weight_EHD[e], out=x)
            dx_TD.index_add_(0, token[:count], x[:count])
        gradients = dfc1_weight_EHD, dfc1_bias_EH, dfc2_weight_EDH, dfc2_bias_ED
        for e, count in enumerate(groups.counts):
            for gradient in gradients if not count else ():
                gradient[e] = 0
        dweights_Tk = None if weights_Tk is None else dweight_P1[inverse].view_as(weights_Tk)
        return dx_TD, dweights_Tk, *gradients, None, None


class _GroupedExpertMLP(torch.autograd.Function):
    """Each product of all experts at once. Keeps h (all P rows); with weights, y too: <dout, y> takes less time from a
    kept [P, D] than from passes over [P, H]. Never waits for the device where grouped kernels and Triton serve."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_Tk: Tensor | None,
        fc1_weight_EHD: Tensor,
        fc1_bias_EH: Tensor,
        fc2_weight_EDH: Tensor,
        fc2_bias_ED: Tensor,
        layout: Layout,
        activation: Activation,
    ) -> Tensor:
        order, inverse, top_k = layout.order, layout.inverse, _top_k(weights_Tk)
        operations, groups = permute.operations(x_TD), layout.groups
        x_PD = operations.gather_rows(x_TD, order, inverse.numel(), top_k)
        h_PH = grouped_mm(x_PD, fc1_weight_EHD.mT, groups)
        del x_PD
        a_PH = bias_activation_(h_PH, fc1_bias_EH, groups, activation)
        y_PD = add_group_bias_(grouped_mm(a_PH, fc2_weight_EDH.mT, groups), fc2_bias_ED, groups)
        kept = (h_PH,) if weights_Tk is None else (h_PH, y_PD)
        ctx.save_for_backward(order, inverse, x_TD, weights_Tk, fc1_weight_EHD, fc2_weight_EDH, *kept)
        ctx.groups, ctx.activation = groups, activation
        return operations.sum_rows(y_PD, weights_Tk, inverse, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        order, inverse, x_TD, weights_Tk, fc1_weight_EHD, fc2_weight_EDH, h_PH, *kept = ctx.saved_tensors
        operations, groups, activation, top_k = permute.operations(x_TD), ctx.groups, ctx.activation, _top_k(weights_Tk)
        dout_TD, num_choices, dweights_Tk = dout_TD.contiguous(), inverse.numel(), None
        if weights_Tk is None:
            dy_PD = operations.sum_gradient(dout_TD, order, num_choices, 1)
        else:
            dy_PD, dweights_Tk = operations.weighted_gradients(dout_TD, kept.pop(), weights_Tk, order, inverse)
        dh_PH = grouped_mm(dy_PD, fc2_weight_EDH, groups)
        a_PH, dfc1_bias_EH = activation_gradient_(dh_PH, h_PH, groups, activation)
        dfc2_weight_EDH, dfc2_bias_ED = grouped_weight_gradient(dy_PD, a_PH, groups), grouped_sum(dy_PD, groups)
        del a_PH, dy_PD
        x_PD = operations.gather_rows(x_TD, order, num_choices, top_k)
        dfc1_weight_EHD = grouped_weight_gradient(dh_PH, x_PD, groups)
        del x_PD
        # The sum also reads the rows of choices of no expert: zeros, as in y_PD. No product reads them.
        dx_PD = zero_rest_(grouped_mm(dh_PH, fc1_weight_EHD, groups), groups)
        dx_TD = operations.sum_rows(dx_PD, None, inverse, top_k)
        return dx_TD, dweights_Tk, dfc1_weight_EHD, dfc1_bias_EH, dfc2_weight_EDH, dfc2_bias_ED, None, None


def _top_k(weights_Tk: Tensor | None) -> int:
    return 1 if weights_Tk is None else weights_Tk.shape[1]


def _token_and_weight_of_row(layout: Layout, weights_Tk: Tensor | None, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """[P] int64, any token in a padding row; and [P, 1] in x's dtype, zero in a padding row."""
    num_choices = layout.inverse.numel()
    token_P = permute.token_of_row(layout.order, num_choices, _top_k(weights_Tk))
    weights_R = x_TD.new_ones(num_choices) if weights_Tk is None else weights_Tk.reshape(-1)
    return token_P, torch.cat([weights_R, weights_R.new_zeros(1)])[layout.order].unsqueeze(1)
