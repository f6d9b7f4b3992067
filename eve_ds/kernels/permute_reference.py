"""The four row operations of ``permute`` in plain PyTorch: for the CPU, and to test the kernels against.

Shapes as in ``permute``.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # rows whose products fit in the cache


def gather_rows(x_TD: Tensor, order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P, D]: row i is token order[i] // k; in a padding row, the last token."""
    return x_TD.index_select(0, token_of_row(order_P, num_choices, top_k))


def sum_rows(y_PD: Tensor, weights_Tk: Tensor | None, inverse_R: Tensor, top_k: int) -> Tensor:
    """[T, D]: the sum of each token's k rows, weighted if there are weights."""
    inverse_Tk = inverse_R.view(-1, top_k)
    out_TD = y_PD.index_select(0, inverse_Tk[:, 0])
    if weights_Tk is not None:
        out_TD.mul_(weights_Tk[:, :1])
    for choice in range(1, top_k):
        rows_TD = y_PD.index_select(0, inverse_Tk[:, choice])
        if weights_Tk is None:
            out_TD += rows_TD
        else:
            out_TD.addcmul_(rows_TD, weights_Tk[:, choice : choice + 1])
    return out_TD


def sum_gradient(dout_TD: Tensor, order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P, D]: the gradient of unweighted ``sum_rows``; zeros in padding rows."""
    return _zero_padding(gather_rows(dout_TD, order_P, num_choices, top_k), order_P, num_choices)


def weighted_gradients(
    dout_TD: Tensor, y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients [P, D] (zeros in padding rows) and [T, k] of y and the weights of weighted ``sum_rows``."""
    num_choices = inverse_R.numel()
    dy_PD = gather_rows(dout_TD, order_P, num_choices, weights_Tk.shape[1])
    pairs = zip(y_PD.split(CHUNK), dy_PD.split(CHUNK), strict=True)
    dweights_P = torch.cat([(y * dy).sum(dim=1) for y, dy in pairs])
    dweights_Tk = dweights_P.index_select(0, inverse_R).view_as(weights_Tk)
    if num_choices:
        dy_PD.mul_(weights_Tk.reshape(-1, 1).index_select(0, order_P.clamp(max=num_choices - 1)))
    return _zero_padding(dy_PD, order_P, num_choices), dweights_Tk


def token_of_row(order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P] int64; the last token in a padding row."""
    choices = order_P if order_P.numel() == num_choices else order_P.clamp(max=num_choices - 1)
    return choices if top_k == 1 else choices.div(top_k, rounding_mode="floor")


def _zero_padding(rows_PD: Tensor, order_P: Tensor, num_choices: int) -> Tensor:
    if order_P.numel() > num_choices:
        rows_PD.index_fill_(0, (order_P == num_choices).nonzero().squeeze(1), 0)
    return rows_PD
