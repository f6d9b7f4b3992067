"""The experts of a softly routing block: E feed-forward networks.

Shapes: T tokens, k experts per token, E experts held here, D dim, H hidden.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from eve_ds.kernels.expert_mlp import expert_mlp
from eve_ds.kernels.permute import Layout

DRAWN_STD = 0.02  # values are drawn with this deviation and scaled, so that ``std`` changes no draw


def expert_seed(seed: int, expert: int) -> int:
    """The seed of one expert's initial values: 32 well-mixed bits (torch's CPU generator ignores the higher ones)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{expert}".encode(), digest_size=4).digest(), "little")


def pack_biases(fc1_bias: Tensor, fc2_bias: Tensor) -> Tensor:
    """[E, H] and [E, D] -> [E, 1, H + D], as they are stored in ``Experts.w3``."""
    return torch.cat([fc1_bias, fc2_bias], dim=1).unsqueeze(1)


def split_biases(w3: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``pack_biases``: views [E, H] and [E, D]."""
    biases = w3.squeeze(1)
    fc1_bias, fc2_bias = biases.split([hidden, biases.shape[1] - hidden], dim=1)
    return fc1_bias, fc2_bias


class Experts(nn.Module):
    """Experts ``first .. first + count - 1`` of a layer: fc2(activation(fc1(x))), both with bias.

    DeepSpeed's checkpoints hold exactly three tensors per expert, named w1, w2 and w3 (``engine/moe_deepspeed.py``), so
    the parameters have these names, and both biases share w3. Other code uses the properties.

    Args:
        dim: D.
        hidden: H.
        count: experts held here.
        activation: "gelu" or "quick_gelu".
        seed: of the layer; an expert's initial values depend on it and on the expert's global index alone.
        first: global index of the first expert held here.
        std: standard deviation of the initial weights; biases start at zero.

    Attributes:
        w1: [E, H, D], ``fc1_weight``.
        w2: [E, D, H], ``fc2_weight``.
        w3: [E, 1, H + D], ``fc1_bias`` then ``fc2_bias``.
        use_grouped_mm: see ``kernels.expert_mlp.expert_mlp``.
    """

    without_weight_decay = ("w3",)

    def __init__(
        self, dim: int, hidden: int, count: int, activation: str, seed: int, first: int = 0, std: float = DRAWN_STD
    ) -> None:
        super().__init__()
        self.activation = activation
        self.use_grouped_mm: bool | None = None
        self.w1 = nn.Parameter(torch.empty(count, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, hidden))
        self.w3 = nn.Parameter(torch.zeros(count, 1, hidden + dim))
        if not self.w1.is_meta:
            initialize((self.w1, self.w2), seed, first, std)

    @property
    def fc1_weight(self) -> nn.Parameter:
        """[E, H, D]."""
        return self.w1

    @property
    def fc2_weight(self) -> nn.Parameter:
        """[E, D, H]."""
        return self.w2

    @property
    def fc1_bias(self) -> Tensor:
        """[E, H], a view of w3."""
        return split_biases(self.w3, self.w1.shape[1])[0]

    @property
    def fc2_bias(self) -> Tensor:
        """[E, D], a view of w3."""
        return split_biases(self.w3, self.w1.shape[1])[1]

    def forward(self, tokens: Tensor, weights: Tensor | None, layout: Layout) -> Tensor:
        """Apply to each token the experts that it is routed to.

        Args:
            tokens: [T, D].
            weights: [T, k] in the tokens' dtype, of each choice; differentiable. None: k is 1 and so is every weight.
            layout: which rows of the tokens sorted by expert belong to which expert held here; a choice of no expert
                adds nothing.
        Returns:
            [T, D], the weighted sum over a token's choices.
        """
        fc1_bias, fc2_bias = split_biases(self.w3, self.w1.shape[1])
        parameters = (self.fc1_weight, fc1_bias, self.fc2_weight, fc2_bias)
        return expert_mlp(tokens, weights, *parameters, layout, self.activation, self.use_grouped_mm)


@torch.no_grad()
def initialize(weights: tuple[Tensor, ...], seed: int, first: int, std: float) -> None:
    """Draw the weights [E, ...] of experts ``first .. first + E - 1``, one expert after the other.

    On the CPU in float32 and with a generator per expert: the same values on any device, in any dtype and at any
    expert-parallel size.
    """
    for index in range(len(weights[0])):
        generator = torch.Generator().manual_seed(expert_seed(seed, first + index))
        for weight in weights:
            values = torch.empty(weight.shape[1:], device="cpu", dtype=torch.float32)
            nn.init.trunc_normal_(values, std=DRAWN_STD, generator=generator)
            weight[index].copy_(values.mul_(std / DRAWN_STD))
