"""Top-k routing: the experts of each token, and their weights.

Shapes: T tokens, D dim, E experts, k choices per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eve_ds import parallel
from eve_ds.model.counter_random import random_uniform

MIN_CAPACITY = 4  # of an expert, tokens; EVE's published code


class Routing(NamedTuple):
    """The routing of T tokens.

    Attributes:
        gates: [T, E] float32, softmax over the experts; differentiable.
        experts: [T, k] int64, best first.
        weights: [T, k] float32, of each choice in the token's output; differentiable.
        log_z: [T] float32, logsumexp of the scores, if the router was asked for it; differentiable.
    """

    gates: Tensor
    experts: Tensor
    weights: Tensor
    log_z: Tensor | None = None


class _Scores(torch.autograd.Function):
    """tokens @ weight' in float32. Saves the tokens in their own dtype; autograd would save a float32 copy."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_TD, weight_ED)
        return F.linear(tokens_TD.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores_TE: Tensor) -> tuple[Tensor, Tensor]:
        tokens_TD, weight_ED = ctx.saved_tensors
        dweight_ED = dscores_TE.t() @ tokens_TD.float()
        return (dscores_TE @ weight_ED.float()).to(tokens_TD.dtype), dweight_ED.to(weight_ED.dtype)


class Router(nn.Module):
    """Linear scores and their softmax, in float32 whatever the tokens' dtype (a bf16 score would tie experts).

    Args:
        dim: width of the tokens.
        num_experts: experts to choose from.
        top_k: choices per token.
        log_z: give ``Routing.log_z``.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, log_z: bool = False) -> None:
        super().__init__()
        self.top_k, self.log_z = top_k, log_z
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Routing:
        """Route tokens [T, D]. The weights are the gates of the chosen, divided by their sum.

        With k = 1 the weight is the gate itself, as in Switch Transformers (Fedus et al. 2021): divided by itself it
        would be 1, and the router would have no gradient.
        """
        if torch.compiler.is_compiling():  # which chooses what is kept
            scores = F.linear(tokens.float(), self.weight.float())
        else:
            scores = _Scores.apply(tokens, self.weight)
        gates = scores.softmax(dim=-1)
        chosen, experts = gates.topk(self.top_k, dim=-1)
        return Routing(gates, experts, renormalize(chosen), scores.logsumexp(dim=-1) if self.log_z else None)


def renormalize(chosen: Tensor) -> Tensor:
    """Divide [T, k] by its sum over k; k = 1 is returned as it is."""
    if chosen.shape[-1] == 1:
        return chosen
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(chosen.dtype).eps)


def capacity(num_tokens: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """The most choices an expert takes: ceil(k T / E x factor), at least 4 (EVE's published code). Both scalars."""
    return (num_tokens.double() * top_k / num_experts * factor).ceil().clamp_min(MIN_CAPACITY)


def within_capacity(experts: Tensor, valid: Tensor | None, num_experts: int, factor: float) -> Tensor:
    """Which choices are within their expert's capacity, in the order of tokens, second choices after all first ones.

    Args:
        experts: [T, k] int64.
        valid: [T] bool; other tokens do not count. None: all.
        factor: the capacity factor.
    Returns:
        [T, k] bool.
    """
    top_k = experts.shape[1]
    if valid is None:
        valid = torch.ones_like(experts[:, 0], dtype=torch.bool)
    queue = F.one_hot(experts.t().reshape(-1), num_experts)  # [k T, E]: all first choices, then all second ones
    queue = queue * valid.repeat(top_k).unsqueeze(1)
    place = (queue.cumsum(dim=0) * queue).sum(dim=1)  # 1-based; 0 where the token does not count
    limit = capacity(valid.sum(), num_experts, top_k, factor)
    return ((place > 0) & (place <= limit)).view(top_k, -1).t()


def balance_share(gates: Tensor, first: Tensor, valid: Tensor | None) -> Tensor:
    """This rank's share of the load-balancing loss E x sum_e (mean gate of e) x (part of the first choices that are e).

    Both are over the tokens of all ranks; only this rank's gates have a gradient; the ranks' shares add up to the loss
    of one process that holds the whole batch (EVE, Chen et al. 2024; GShard, Lepikhin et al. 2021). A collective.

    Args:
        gates: [T, E] float32.
        first: [T] int64, first choices.
        valid: [T] bool, tokens that count. None: all.
    Returns:
        float32 scalar.
    """
    num_experts = gates.shape[1]
    one = torch.ones_like(first) if valid is None else valid.long()
    counts = gates.new_zeros(num_experts + 1, dtype=torch.int64)
    counts.scatter_add_(0, first, one)
    counts[num_experts] = one.sum()
    counts = parallel.all_reduce_sum(counts).to(gates.dtype)
    total = counts[num_experts].clamp_min(1)
    gate_sum = gates.sum(dim=0) if valid is None else valid.to(gates.dtype) @ gates
    return num_experts * torch.dot(gate_sum / total, counts[:num_experts] / total)


def z_share(log_z: Tensor, valid: Tensor | None) -> Tensor:
    """This rank's share of the router z-loss, the mean over tokens of the squared logsumexp of their scores.

    ST-MoE (Zoph et al. 2022, arXiv 2202.08906, equation 5). The mean is over the tokens of all ranks, as in
    ``balance_share``: the ranks' shares add up to the loss of one process. A collective.

    Args:
        log_z: [T] float32.
        valid: [T] bool, tokens that count. None: all.
    Returns:
        float32 scalar.
    """
    kept = torch.ones_like(log_z) if valid is None else valid.to(log_z.dtype)
    total = parallel.all_reduce_sum(kept.sum(dtype=torch.float64)).clamp_min(1).to(log_z.dtype)
    return torch.dot(kept, log_z.square()) / total


def jitter_noise(draw: Tensor, tokens: int, dim: int, size: float) -> Tensor:
    """Uniform factors between 1 - size and 1 + size (Switch Transformers, Fedus et al. 2021, arXiv 2101.03961).

    A pure function of a sample's draw, the token's place and the channel: the same whatever else is in the batch, on
    any rank, and when a block is computed again.

    Args:
        draw: [B] float32 between 0 and 1, of each sample.
        tokens: N.
        dim: D.
        size: below 1.
    Returns:
        [B, N, D] float32.
    """
    place = torch.arange(tokens * dim, device=draw.device).view(tokens, dim)
    first = draw.float().view(torch.int32).long()[:, None, None]
    return 1 + size * (2 * random_uniform(0, 0, first, place) - 1)
