"""The four row operations of ``permute`` in plain torch: what runs on the CPU, and what the kernels are tested against.

Shapes as in ``permute``.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # rows whose products stay in the cache


def gather_rows(x_TD: Tensor, order_P: Tensor, num_rows: int, top_k: int) -> Tensor:
    """[P, D]: slot i gets token order[i] // k; an empty one the last token's values."""
    return x_TD.index_select(0, token_of_slot(order_P, num_rows, top_k))


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


def sum_gradient(dout_TD: Tensor, order_P: Tensor, num_rows: int, top_k: int) -> Tensor:
    """[P, D]: the gradient of unweighted ``sum_rows``; zeros in empty slots."""
    return _zero_empty(gather_rows(dout_TD, order_P, num_rows, top_k), order_P, num_rows)


def weighted_gradients(
    dout_TD: Tensor, y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients [P, D] (zeros in empty slots) and [T, k] of y and the weights of weighted ``sum_rows``."""
    num_rows = inverse_R.numel()
    dy_PD = gather_rows(dout_TD, order_P, num_rows, weights_Tk.shape[1])
    pairs = zip(y_PD.split(CHUNK), dy_PD.split(CHUNK), strict=True)
    dweights_P = torch.cat([(y * dy).sum(dim=1) for y, dy in pairs])
    dweights_Tk = dweights_P.index_select(0, inverse_R).view_as(weights_Tk)
    if num_rows:
        dy_PD.mul_(weights_Tk.reshape(-1, 1).index_select(0, order_P.clamp(max=num_rows - 1)))
    return _zero_empty(dy_PD, order_P, num_rows), dweights_Tk


def token_of_slot(order_P: Tensor, num_rows: int, top_k: int) -> Tensor:
    """[P] int64; the last token in an empty slot."""
    choices = order_P if order_P.numel() == num_rows else order_P.clamp(max=num_rows - 1)
    return choices if top_k == 1 else choices.div(top_k, rounding_mode="floor")


def _zero_empty(rows_PD: Tensor, order_P: Tensor, num_rows: int) -> Tensor:
    if order_P.numel() > num_rows:
        rows_PD.index_fill_(0, (order_P == num_rows).nonzero().squeeze(1), 0)
    return rows_PD
