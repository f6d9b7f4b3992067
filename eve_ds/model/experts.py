"""The experts of a softly routing block: E feed-forward networks.

Shapes: T tokens, k choices per token, D dim, H hidden, E experts held here.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from eve_ds.kernels.expert_mlp import expert_mlp
from eve_ds.kernels.permute import Layout


def expert_seed(seed: int, expert: int) -> int:
    """The seed of one expert's first values: 32 well-mixed bits (torch's CPU generator ignores the higher ones)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{expert}".encode(), digest_size=4).digest(), "little")


class Experts(nn.Module):
    """Feed-forward experts ``first .. first + count - 1`` of a layer: fc2(activation(fc1(x))), both with bias.

    DeepSpeed saves exactly the three tensors w1, w2, w3 per expert, hence both biases in w3.

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
        one_launch: whether one grouped product serves all experts; None: where the device has it.
    """

    def __init__(self, dim: int, hidden: int, count: int, activation: str, seed: int, first: int = 0) -> None:
        super().__init__()
        self.activation = activation
        self.one_launch: bool | None = None
        self.w1 = nn.Parameter(torch.empty(count, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, hidden))
        self.w3 = nn.Parameter(torch.zeros(count, 1, hidden + dim))
        if not self.w1.is_meta:
            self._initialize(seed, first)

    @torch.no_grad()
    def _initialize(self, seed: int, first: int) -> None:
        for index in range(self.w1.shape[0]):
            generator = torch.Generator().manual_seed(expert_seed(seed, first + index))
            for weight in (self.w1, self.w2):
                # Drawn on the CPU in float32: the same values on any device and in any dtype.
                values = torch.empty(weight.shape[1:], device="cpu", dtype=torch.float32)
                weight[index].copy_(nn.init.trunc_normal_(values, std=0.02, generator=generator))

    def forward(self, tokens: Tensor, weights: Tensor | None, layout: Layout) -> Tensor:
        """Every token through the experts it is laid out for.

        Args:
            tokens: [T, D].
            weights: [T, k] in the tokens' dtype, of each choice; differentiable. None: k is 1 and so is every weight.
            layout: the slots of each expert held here; choices in slots beyond them add nothing.
        Returns:
            [T, D], the weighted sum over a token's choices.
        """
        b1, b2 = self.w3.squeeze(1).split(self.w1.shape[1:], dim=1)
        return expert_mlp(tokens, weights, self.w1, b1, self.w2, b2, layout, self.activation, self.one_launch)
