"""The mixture of experts with dispatch masks: slow, plain, and the reference to compare with.

As in GShard (Lepikhin et al. 2021, arXiv 2006.16668: algorithm 1 and the einsums), and in DeepSpeed's first MoE layer.

Legend: T tokens (B N), E experts, C capacity of an expert, D dim, H hidden, k choices per token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.moe import MoE

MIN_CAPACITY = 4


class EinsumMoE(nn.Module):
    """Computes what ``MoE`` with that capacity factor computes, from that layer's own weights.

    Every token meets every slot of every expert in a mask [T, E, C]; products with it bring tokens to the slots and
    back, so the work grows with T squared.

    Args:
        layer: whose weights it uses (the same tensors) and whose settings; all of its experts must live here.
        capacity_factor: an expert has C = ceil(k T / E x factor) slots, at least 4; tokens queue in order, second
            choices after all first ones, and what finds no slot is dropped.
    """

    def __init__(self, layer: MoE, capacity_factor: float = 1.0) -> None:
        super().__init__()
        assert layer.ep_size == 1 and not layer.published_routing
        self.router_weight = layer.router.weight
        self.image_vector, self.text_vector = layer.image_vector, layer.text_vector
        self.w1_EHD, self.w2_EDH, self.w3_E1B = layer.experts.w1, layer.experts.w2, layer.experts.w3
        self.activation = layer.experts.activation
        self.num_experts, self.top_k = layer.num_experts, layer.top_k
        self.modality_to_experts = layer.modality_to_experts
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor, modality: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, N, D], modality [N] or [B, N], valid [B, N] -> y [B, N, D] and the load-balancing loss, as ``MoE``."""
        seen = x + torch.stack([self.image_vector, self.text_vector])[modality]
        tokens_TD = (seen if self.modality_to_experts else x).flatten(0, 1)
        valid_T = x.new_ones(tokens_TD.shape[0], dtype=torch.bool) if valid is None else valid.flatten()
        gates_TE = F.linear(seen.flatten(0, 1).float(), self.router_weight.float()).softmax(dim=-1)
        combine_TEC, aux = self._masks(gates_TE, valid_T)
        dispatch_TEC = (combine_TEC > 0).to(x.dtype)
        slots_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, tokens_TD)
        y_TD = torch.einsum("tec,ecd->td", combine_TEC.to(x.dtype), self._experts(slots_ECD))
        return y_TD.view_as(x), aux

    def _masks(self, gates_TE: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of each token in each slot, [T, E, C] float32, and the load-balancing loss."""
        used = valid_T.sum()
        capacity = max(MIN_CAPACITY, math.ceil(int(used) * self.top_k / self.num_experts * self.capacity_factor))
        choices, places, waiting = [], [], gates_TE.new_zeros(self.num_experts, dtype=torch.int64)
        left_TE = gates_TE.detach()
        for _ in range(self.top_k):
            choice_TE = F.one_hot(left_TE.argmax(dim=1), self.num_experts) * valid_T[:, None]
            left_TE = left_TE.masked_fill(choice_TE.bool(), -1)
            place_TE = (choice_TE.cumsum(dim=0) - 1 + waiting) * choice_TE
            waiting = waiting + choice_TE.sum(dim=0)
            choices.append(choice_TE * (place_TE < capacity))
            places.append(place_TE.sum(dim=1))
            if len(choices) == 1:
                share_E = choice_TE.sum(dim=0) / used
        aux = self.num_experts * torch.dot((gates_TE * valid_T[:, None]).sum(dim=0) / used, share_E)
        weights = [(gates_TE * choice_TE).sum(dim=1) for choice_TE in choices]
        if self.top_k > 1:
            total_T = torch.stack(weights).sum(dim=0).clamp_min(torch.finfo(gates_TE.dtype).eps)
            weights = [weight_T / total_T for weight_T in weights]
        combine_TEC = gates_TE.new_zeros(())
        for weight_T, choice_TE, place_T in zip(weights, choices, places, strict=True):
            slot_TC = F.one_hot(place_T.clamp(max=capacity - 1), capacity).to(gates_TE.dtype)
            combine_TEC = combine_TEC + torch.einsum("te,tc->tec", weight_T[:, None] * choice_TE, slot_TC)
        return combine_TEC, aux

    def _experts(self, slots_ECD: Tensor) -> Tensor:
        """[E, C, D] -> [E, C, D], all experts in two batched products."""
        bias1_E1H, bias2_E1D = self.w3_E1B.split(self.w1_EHD.shape[1:], dim=2)
        h_ECH = torch.baddbmm(bias1_E1H, slots_ECD, self.w1_EHD.transpose(1, 2))
        # x sigmoid(1.702 x), by way of SiLU: one operation less to run and to keep.
        a_ECH = F.gelu(h_ECH) if self.activation == "gelu" else F.silu(1.702 * h_ECH) / 1.702
        return torch.baddbmm(bias2_E1D, a_ECH, self.w2_EDH.transpose(1, 2))
