"""Another expert network from outside: SwiGLU experts, as docs/extending.md shows them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.kernels.permute import Layout, combine, permute
from eve_ds.model.backbone import Backbone
from eve_ds.model.experts import initialize
from eve_ds.model.moe import IMAGE, TEXT, MoE
from tests.support.tiny import model_config


class SwiGLUExperts(nn.Module):
    """fc2(silu(gate(x)) * up(x)) without biases (Shazeer, arXiv 2002.05202).

    Attributes:
        w1: [E, H, D], gate.
        w2: [E, D, H], fc2.
        w3: [E, H, D], up.
    """

    def __init__(
        self, dim: int, hidden: int, count: int, activation: str, seed: int, first: int = 0, std: float = 0.02
    ) -> None:
        super().__init__()
        self.use_grouped_mm: bool | None = None
        self.w1 = nn.Parameter(torch.empty(count, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(count, hidden, dim))
        if not self.w1.is_meta:
            initialize((self.w1, self.w2, self.w3), seed, first, std)

    def forward(self, tokens: Tensor, weights: Tensor | None, layout: Layout) -> Tensor:
        """tokens [T, D], weights [T, k] or None (k is 1, each weight is 1) -> weighted sums [T, D]."""
        if weights is None:
            weights = tokens.new_ones(len(tokens), 1)
        rows = permute(tokens, layout.order, layout.inverse, weights.shape[1])
        counts = layout.padded_tokens_per_expert
        *parts, rest = rows.split([*counts, len(rows) - sum(counts)])  # rest: choices of no expert
        matrices = zip(parts, self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        done = [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), fc2) for x, gate, fc2, up in matrices]
        return combine(torch.cat([*done, torch.zeros_like(rest)]), weights, layout.order, layout.inverse)


def test_it_is_the_loop_over_tokens() -> None:
    torch.manual_seed(0)
    moe = MoE(4, 6, num_experts=5, top_k=2, seed=1, experts_type=SwiGLUExperts).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    x, modality = torch.randn(2, 7, 4, dtype=torch.float64), torch.tensor([IMAGE] * 4 + [TEXT] * 3)
    valid = torch.arange(7) < torch.tensor([[7], [5]])
    y, _ = moe(x, modality, valid)
    expected = torch.zeros_like(y)
    for sample, place in valid.nonzero().tolist():
        seen = x[sample, place] + (moe.image_vector if modality[place] == IMAGE else moe.text_vector)
        gates, chosen = (moe.router.weight.float() @ seen.float()).softmax(0).topk(2)
        for weight, e in zip(gates / gates.sum(), chosen, strict=True):
            w1, w2, w3 = moe.experts.w1[e], moe.experts.w2[e], moe.experts.w3[e]
            expected[sample, place] += weight.double() * (w2 @ (F.silu(w1 @ seen) * (w3 @ seen)))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)  # the gates are float32


def test_a_backbone_trains_with_it() -> None:
    torch.manual_seed(0)
    config = replace(model_config(), init_std=0.2)
    backbone = Backbone(config, moe_layer=partial(MoE, experts_type=SwiGLUExperts))
    experts = backbone.moe_layers()[0].experts
    assert 0.17 < experts.w1.std() < 0.23, "init_std reaches it"
    before = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-2)
    images, text_ids = torch.randn(4, 3, 32, 32), torch.randint(5, 50, (4, 8))
    losses = []
    for _ in range(10):
        out = backbone(images, text_ids)
        loss = (out.hidden[:, 0] - 1).square().mean() + out.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in experts.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_deepspeed_takes_it() -> None:
    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE

    layer = DeepSpeedMoE(4, 6, 4, ep_size=2, ep_rank=1, experts_type=SwiGLUExperts)
    placed = {name: parameter.allreduce for name, parameter in layer.experts.named_parameters()}
    assert placed == dict.fromkeys(("w1", "w2", "w3"), False)  # the names that DeepSpeed's checkpoints hold


def test_the_document_shows_this_class(repository: Path) -> None:
    shown = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(class SwiGLUExperts.*?)```", shown, flags=re.DOTALL)
    assert code.strip() in Path(__file__).read_text(encoding="utf-8")
