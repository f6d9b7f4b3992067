"""EVE's modality-aware mixture of experts (arXiv 2308.11971, section 3.2), in torch alone.

Shapes: B samples, N tokens a sample, T = B N, D dim, E experts, k choices per token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.dispatch import dispatch
from eve_ds.model.experts import Experts
from eve_ds.model.router import Router, balance_share, renormalize, within_capacity

IMAGE, TEXT = 0, 1  # modality ids


class MoE(nn.Module):
    """A router that sees token + modality vector, and the experts (this rank's part of them).

    Args:
        dim: D.
        hidden: hidden width of an expert.
        num_experts: E, over all ranks of the expert-parallel group.
        top_k: experts a token visits.
        activation: "gelu" or "quick_gelu".
        capacity_factor: None drops no token; see ``router.capacity``. Counted over this rank's tokens.
        modality_to_experts: the experts see token + modality vector as well (as EVE's published files need).
        published_routing: route and count padding like any token, as the published code does.
        seed: of this layer's experts (the router and the modality vectors draw from torch's global generator).
        ep_size: ranks that share the experts; divides E.
        ep_rank: this rank's place among them; it holds experts [ep_rank E / ep_size, (ep_rank + 1) E / ep_size).

    Attributes:
        ep_group: the expert-parallel process group; None is all ranks. Set it before the first forward if ep_size > 1.
        last_load: [2, E] float64; how many choices of this rank's image (0) and text (1) tokens each expert served in
            the last forward.

    Raises:
        ValueError: ep_size does not divide num_experts, or top_k is not in 1..num_experts.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        activation: str = "quick_gelu",
        capacity_factor: float | None = None,
        modality_to_experts: bool = True,
        published_routing: bool = False,
        seed: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
    ) -> None:
        nn.Module.__init__(self)  # not super(): engine/moe_deepspeed.py has a second base with another signature
        if num_experts % ep_size:
            raise ValueError(f"num_experts={num_experts} is not a multiple of expert_parallel_size={ep_size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        self.num_experts, self.num_local_experts = num_experts, num_experts // ep_size
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.modality_to_experts, self.published_routing = modality_to_experts, published_routing
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.ep_group: dist.ProcessGroup | None = None
        self.router = Router(dim, num_experts, top_k)
        first = ep_rank * self.num_local_experts
        self.experts = Experts(dim, hidden, self.num_local_experts, activation, seed, first)
        self.image_vector = nn.Parameter(torch.empty(dim))
        self.text_vector = nn.Parameter(torch.empty(dim))
        for vector in (self.image_vector, self.text_vector):
            nn.init.trunc_normal_(vector, std=0.02)
        self.last_load = torch.zeros(2, num_experts, dtype=torch.float64)

    def forward(self, x: Tensor, modality: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route and transform tokens. A collective: of all ranks for the loss, of ``ep_group`` if ep_size > 1.

        Args:
            x: [B, N, D].
            modality: [N] or [B, N] int64, IMAGE or TEXT.
            valid: [B, N] bool, False on padding, which visits no expert and comes out as zeros. None: no padding.
        Returns:
            y [B, N, D] in x's dtype, and this rank's share (float32 scalar) of the load-balancing loss.
        """
        # Both vectors take part whatever the batch holds, so both always have a gradient (ZeRO reduces all parameters).
        # A product with 0 and 1, not an index: the backward pass of an index adds row by row on the CPU.
        kind = F.one_hot(modality, 2).to(x.dtype)
        seen = x + kind @ torch.stack([self.image_vector, self.text_vector]).to(x.dtype)
        tokens = (seen if self.modality_to_experts else x).flatten(0, 1)
        valid = None if valid is None or self.published_routing else valid.flatten()
        routing = self.router(seen.flatten(0, 1))
        aux = balance_share(routing.gates, routing.experts[:, 0], valid)
        experts, weights = routing.experts, routing.weights
        keep = None if valid is None else valid.unsqueeze(1)
        if self.capacity_factor is not None:
            keep = within_capacity(experts, valid, self.num_experts, self.capacity_factor)
            weights = renormalize(routing.gates.gather(1, experts) * keep)
        if keep is not None:
            experts = experts.masked_fill(~keep, self.num_experts)
        counts = self._count(experts, modality.expand(x.shape[:2]).reshape(-1, 1))
        y = dispatch(tokens, experts, weights, counts, self.experts, self.ep_size, self.ep_group)
        return y.view_as(x), aux

    @torch.no_grad()
    def _count(self, experts: Tensor, modality: Tensor) -> Tensor:
        """Choices per expert, [E] int64; keeps them by modality in ``last_load``."""
        columns = self.num_experts + 1  # the last one counts choices of no expert
        load = torch.zeros(2 * columns, dtype=torch.int64, device=experts.device)
        slot = (experts + modality * columns).reshape(-1)
        load = load.scatter_add_(0, slot, torch.ones_like(slot)).view(2, columns)[:, :-1]
        self.last_load = load.double()
        return load.sum(dim=0)
