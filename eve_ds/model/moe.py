"""EVE's modality-aware mixture of experts (arXiv 2308.11971, section 3.2), in PyTorch alone.

Legend: B samples, N tokens per sample, T = B N tokens, k experts per token, R = T k choices (a token and one of its
experts), P rows of a tensor sorted by expert (one per choice, on the CPU padding rows too), D dim, H hidden, E experts.

Forward, from a block (``block.SoftBlock``) to the matrix products:

1. ``MoE.forward`` adds the modality's vector to each token, [T, D]. ``Router`` turns the sums into gates [T, E], the
   indices of the k best experts and the weights of these choices, [T, k]. ``balance_share`` makes the auxiliary loss.
   A choice of padding, or beyond an expert's capacity, gets the index E: no expert. Where blocks run compiled,
   ``MoE.route`` has done all this, within the block's graph, for all passes of a micro-batch (``Routed``).
2. ``kernels.permute.sort_by_expert`` sorts the R choices by expert: a ``Layout``, indices only.
3. ``Experts.forward`` hands the tokens and its weights to ``kernels.expert_mlp``, which for each expert gathers its
   tokens [rows, D], computes h = fc1(x) [rows, H], a = activation(h) and y = fc2(a) [rows, D], and adds weight x y to
   the tokens' results [T, D]. One autograd function does this with a loop over the experts (``_LoopedExpertMLP``), one
   with a grouped product for all of them (``_GroupedExpertMLP``: bf16 on NVIDIA GPUs of compute capability 9 and 10).

Backward: that function gathers each expert's dy = weight x dout [rows, D] and x, recomputes a from the kept h, and
computes da = dy fc2_weight, dfc2_weight = dy' a, dh, dfc1_weight = dh' x and dx = dh fc1_weight; the gradient of a
choice's weight is <dout, y>. dx goes to the tokens and their modality's vector; the weights' gradient goes through the
gates to the router (``router._Scores``) and from there to the tokens as well.

With expert parallelism (``ep_size`` > 1), ``_through_ranks`` takes the place of steps 2 and 3: it copies each token to
the rows of its choices (``permute``), sends the rows to the ranks that hold their experts, applies these as above,
sends the results back and sums them (``combine``). Backward takes the same way in reverse.

No shape depends on the routing but those of the CPU's padding, of the loop and of what is sent to other ranks: with
grouped products at ``ep_size`` 1 the host never waits for the device (tests/unit/eve_ds/tasks/test_host_syncs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds import parallel
from eve_ds.kernels.permute import combine, permute, sort_by_expert
from eve_ds.model.experts import Experts
from eve_ds.model.router import Router, balance_share, jitter_noise, renormalize, within_capacity, z_share

IMAGE, TEXT = 0, 1  # modality ids


class Routed(NamedTuple):
    """Where the T tokens of n passes go.

    Attributes:
        tokens: [T, D], as the experts see them, of one pass after the other.
        weights: [T, k] of each choice; differentiable. ``block.SoftBlock`` multiplies them by drop path's factors.
        chosen: [R] int64, the expert of each choice; E: none.
        loads: [n, 2, E] int64, choices of a pass by modality.
        gates: [T, E] float32, softmax over the experts, detached; as the next two for callbacks alone.
        modality: [T] int64.
        counted: [T] bool, False on padding.
        gate_sums: [n, E] float32, of the tokens that count; differentiable.
        firsts: [n, E] int64, first choices of these tokens.
        z: [n] float32, of these tokens the sum of squared logsumexps of their scores, or None; differentiable.
    """

    tokens: Tensor
    weights: Tensor
    chosen: Tensor
    loads: Tensor
    gates: Tensor
    modality: Tensor
    counted: Tensor
    gate_sums: Tensor
    firsts: Tensor
    z: Tensor | None


class MoE(nn.Module):
    """A router that sees token + modality vector, and the experts (this rank's part of them).

    Args:
        dim: D.
        hidden: H.
        num_experts: E, over all ranks of the expert-parallel group.
        top_k: k.
        activation: "gelu" or "quick_gelu".
        capacity_factor: None drops no token; see ``router.capacity``. Counted over this rank's tokens.
        modality_to_experts: the experts see token + modality vector as well (as EVE's published files need).
        published_routing: route and count padding like any token, as the published code does.
        modality_routing: False: there are no modality vectors, router and experts see the tokens alone.
        z_loss: give the share of the router z-loss as well.
        jitter: in training the router's input is multiplied by noise between 1 - jitter and 1 + jitter.
        seed: of this layer's experts (the router and the modality vectors draw from torch's global generator).
        init_std: standard deviation of the experts' initial weights.
        ep_size: ranks that share the experts; divides E.
        ep_rank: this rank's index among them; it holds experts [ep_rank E / ep_size, (ep_rank + 1) E / ep_size).
        experts_type: class of the experts, called with ``Experts``'s keywords; docs/extending.md has another.

    Attributes:
        ep_group: the expert-parallel process group; None is all ranks. Set it before the first forward if ep_size > 1.
        last_load: [2, E] float64; how many choices of this rank's image (0) and text (1) tokens went to each expert in
            the last forward, of all its passes.

    Raises:
        ValueError: ep_size does not divide num_experts, or top_k is not in 1..num_experts.
    """

    image_vector: nn.Parameter | None
    text_vector: nn.Parameter | None

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
        init_std: float = 0.02,
        ep_size: int = 1,
        ep_rank: int = 0,
        experts_type: Callable[..., Any] = Experts,
        modality_routing: bool = True,
        z_loss: bool = False,
        jitter: float = 0.0,
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
        self.jitter = jitter
        self.router = Router(dim, num_experts, top_k, log_z=z_loss)
        self.experts: Experts = experts_type(
            dim=dim,
            hidden=hidden,
            count=self.num_local_experts,
            activation=activation,
            seed=seed,
            first=ep_rank * self.num_local_experts,
            std=init_std,
        )
        for name in ("image_vector", "text_vector"):
            vector = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02)) if modality_routing else None
            self.register_parameter(name, vector)
        self.last_load = torch.zeros(2, num_experts, dtype=torch.float64)

    def forward(
        self,
        x: Tensor | Routed,
        modality: Tensor | None = None,
        valid: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Route and transform tokens. A collective: of all ranks for the loss, of ``ep_group`` if ep_size > 1.

        Args:
            x: [B, N, D]; or what ``route`` has made of the tokens of several passes, then alone.
            modality: [N] or [B, N] int64, IMAGE or TEXT.
            valid: [B, N] bool, False on padding, which is routed to no expert and gives zeros. None: no padding.
            draw: [B] float32 between 0 and 1, from which a sample's jitter comes. None: from torch's generator.
        Returns:
            y [B, N, D] in x's dtype, and this rank's share (float32 scalar) of the load-balancing loss; with ``z_loss``
            [2], the shares of that and of the router z-loss. Of ``Routed`` y is [T, D], and there is a share a pass.
        """
        if isinstance(x, Routed):
            return self._of_routed(x)
        assert modality is not None
        seen = self._with_modality(x, modality)
        tokens = (seen if self.modality_to_experts else x).flatten(0, 1)
        valid = None if valid is None or self.published_routing else valid.flatten()
        routing = self.router(self._jittered(seen, draw).flatten(0, 1))
        aux = balance_share(routing.gates, routing.experts[:, 0], valid)
        if routing.log_z is not None:
            aux = torch.stack([aux, z_share(routing.log_z, valid)])
        chosen, weights = routing.experts, routing.weights
        keep = None if valid is None else valid.unsqueeze(1)
        if self.capacity_factor is not None:
            keep = within_capacity(chosen, valid, self.num_experts, self.capacity_factor)
            weights = renormalize(routing.gates.gather(1, chosen) * keep)
        if keep is not None:
            chosen = chosen.masked_fill(~keep, self.num_experts)
        counts = self._count(chosen, modality.expand(x.shape[:2]).reshape(-1, 1))
        y = self._through_experts(tokens, chosen.flatten(), weights.to(tokens.dtype), counts)
        return y.view_as(x), aux

    @property
    def routes_together(self) -> bool:
        """Whether ``route`` stands for the first half of ``forward``: a class of its own may do otherwise there, and a
        capacity takes choices away from tokens in their order."""
        return type(self).forward is MoE.forward and self.capacity_factor is None

    def route(self, passes: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> Routed:
        """The first half of ``forward`` for several passes, each given by its arguments: what can be compiled of it.
        Only where ``routes_together``. No hook of the router runs."""
        seen = [self._with_modality(x, modality) for x, modality, _, _ in passes]
        jittered = [self._jittered(each, draw) for each, (*_, draw) in zip(seen, passes, strict=True)]
        given = seen if self.modality_to_experts else [x for x, *_ in passes]
        tokens = torch.cat([each.flatten(0, 1) for each in given])
        # Of the same parts a second tensor would be kept for the backward pass, too: the compiler does not see it.
        same = all(one is other for one, other in zip(jittered, given, strict=True))
        routing = self.router.forward(tokens if same else torch.cat([each.flatten(0, 1) for each in jittered]))
        whole = self.published_routing
        counted = [torch.ones_like(x[..., 0], dtype=torch.bool) if whole or v is None else v for x, _, v, _ in passes]
        counted_T = torch.cat([each.flatten() for each in counted])
        modality_T = torch.cat([modality.expand(x.shape[:2]).flatten() for x, modality, _, _ in passes])
        chosen = routing.experts.masked_fill(~counted_T[:, None], self.num_experts)
        # One count for all: by pass, modality, whether it is a later choice than a token's first, and expert.
        later = (torch.arange(self.top_k, device=chosen.device) > 0).long()
        sizes = [each.numel() for each in counted]
        pass_T = torch.cat([chosen.new_full((size,), number) for number, size in enumerate(sizes)])
        cell = ((2 * pass_T + modality_T)[:, None] * 2 + later) * (self.num_experts + 1) + chosen
        cells = torch.zeros(4 * len(passes) * (self.num_experts + 1), dtype=torch.int64, device=chosen.device)
        cells = cells.scatter_add(0, cell.flatten(), torch.ones_like(cell).flatten())
        counts = cells.view(len(passes), 2, 2, -1)[..., :-1]
        counts_as_1 = [each.to(routing.gates.dtype) for each in counted_T.split(sizes)]
        gates = zip(counts_as_1, routing.gates.split(sizes), strict=True)
        z = None
        if routing.log_z is not None:
            squares = zip(counts_as_1, routing.log_z.square().split(sizes), strict=True)
            z = torch.stack([(one * each).sum() for one, each in squares])
        return Routed(
            tokens=tokens,
            weights=routing.weights,
            chosen=chosen.flatten(),
            loads=counts.sum(dim=2),
            gates=routing.gates.detach(),
            modality=modality_T,
            counted=counted_T,
            gate_sums=torch.stack([(one[:, None] * each).sum(dim=0) for one, each in gates]),
            firsts=counts[:, :, 0].sum(dim=1),
            z=z,
        )

    def _of_routed(self, routed: Routed) -> tuple[Tensor, Sequence[Tensor]]:
        self.last_load = routed.loads.sum(dim=0).double()
        firsts = parallel.all_reduce_sum(routed.firsts).to(routed.gate_sums.dtype)
        total = firsts.sum(dim=1, keepdim=True).clamp_min(1)
        shares = self.num_experts * (routed.gate_sums / total * (firsts / total)).sum(dim=1)  # as balance_share's
        if routed.z is not None:
            shares = torch.stack([shares, routed.z / total[:, 0]], dim=1)
        weights = routed.weights.to(routed.tokens.dtype)
        y = self._through_experts(routed.tokens, routed.chosen, weights, routed.loads.sum(dim=(0, 1)))
        return y, shares.unbind()

    def _through_experts(self, tokens: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """As ``_through_ranks``, wherever the experts live."""
        if self.ep_size > 1:
            return self._through_ranks(tokens, chosen, weights, counts)
        y: Tensor = self.experts(tokens, weights, sort_by_expert(chosen, counts))
        return y

    def _with_modality(self, x: Tensor, modality: Tensor) -> Tensor:
        """Each token + the vector of its modality, if the layer has these."""
        if self.image_vector is None or self.text_vector is None:
            return x
        # Both vectors take part whatever the batch holds, so both always have a gradient (ZeRO reduces all parameters).
        # A product with 0 and 1, not an index: the backward pass of an index adds row by row on the CPU.
        kind = (modality[..., None] == torch.arange(2, device=x.device)).to(x.dtype)  # one_hot asserts on the device
        return x + kind @ torch.stack([self.image_vector, self.text_vector]).to(x.dtype)

    def _jittered(self, seen: Tensor, draw: Tensor | None) -> Tensor:
        """The router's input [B, N, D]; with noise in float32, since bf16 would round most of it away."""
        if not self.jitter or not self.training:
            return seen
        draw = torch.rand(len(seen), device=seen.device) if draw is None else draw
        return seen.float() * jitter_noise(draw, seen.shape[1], seen.shape[2], self.jitter)

    def _through_ranks(self, tokens: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Tokens [T, D] -> weighted sums [T, D] of what their experts give, wherever those live. A collective.

        Args:
            chosen: [R] int64, the expert of each choice; E: none.
            weights: [T, k].
            counts: [E] int64, choices per expert.
        """
        order = chosen.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = permute(tokens, order, inverse, self.top_k)  # by expert, so by rank; choices of no expert come last
        sent = counts.view(self.ep_size, -1)  # [rank, expert there]
        received = parallel.exchange_counts(sent, self.ep_group)  # [rank, expert here]
        send, receive = torch.stack([sent, received]).sum(dim=2).tolist()  # at once: the host waits for the device
        arrived = parallel.all_to_all_uneven(rows[: sum(send)], send, receive, self.ep_group)
        # Rows arrive sorted by rank, then by expert; the experts need them by expert.
        local = torch.arange(received.shape[1], device=rows.device).repeat(self.ep_size)
        expert = local.repeat_interleave(received.reshape(-1), output_size=sum(receive))
        done = self.experts(arrived, None, sort_by_expert(expert, received.sum(dim=0)))
        back = parallel.all_to_all_uneven(done, receive, send, self.ep_group)
        if sum(send) < len(rows):
            back = torch.cat([back, back.new_zeros(len(rows) - sum(send), back.shape[1])])
        return combine(back, weights, order, inverse)

    @torch.no_grad()
    def _count(self, chosen: Tensor, modality: Tensor) -> Tensor:
        """Choices per expert, [E] int64; keeps them by modality in ``last_load``."""
        columns = self.num_experts + 1  # the last one counts choices of no expert
        load = torch.zeros(2 * columns, dtype=torch.int64, device=chosen.device)
        cell = (chosen + modality * columns).reshape(-1)
        load = load.scatter_add_(0, cell, torch.ones_like(cell)).view(2, columns)[:, :-1]
        self.last_load = load.double()
        return load.sum(dim=0)
