"""Promises of the backbone: samples do not see each other, padding is nothing, patches may be missing."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eve_ds.callbacks.pretrain_examples import expert_load
from eve_ds.model.backbone import Backbone
from eve_ds.model.block import HardBlock, SharedBlock, SoftBlock
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE
from preprocessing.errors import UserError

CONFIG = ModelConfig(
    image_size=16, patch_size=8, dim=16, depth=3, num_heads=2, mlp_hidden=24, vocab_size=20, max_text_length=8,
    text_positions=8, soft_layers=[1, 2], num_experts=4,
)  # fmt: skip
PATCHES = CONFIG.num_patches


def make(**changes: object) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(replace(CONFIG, **changes))
    with torch.no_grad():  # larger than initial values, so that a leak shows
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return backbone


@settings(max_examples=25)
@given(data=st.data())
def test_a_sample_is_the_same_alone_in_a_batch_and_padded(data: st.DataObject) -> None:
    backbone = make(num_experts=data.draw(st.integers(2, 5)), top_k=data.draw(st.integers(1, 2))).eval()
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    longest = max(lengths) + data.draw(st.integers(0, 2))
    with_image = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    images = torch.randn(len(lengths), 3, 16, 16, generator=generator) if with_image else None
    ids = torch.randint(0, 20, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        batch = backbone(images, ids, mask).hidden
        for sample, length in enumerate(lengths):
            image = images[sample : sample + 1] if with_image else None
            alone = backbone(image, ids[sample : sample + 1, :length]).hidden
            torch.testing.assert_close(batch[sample, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)


def test_padding_does_not_count_in_the_auxiliary_loss() -> None:
    backbone, ids = make().eval(), torch.randint(0, 20, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    torch.testing.assert_close(backbone(None, ids, mask).aux_per_layer, backbone(None, ids[:, :4]).aux_per_layer)


def test_keeping_all_patches_in_another_order_permutes_the_tokens() -> None:
    backbone, images = make().eval(), torch.randn(2, 3, 16, 16)
    order = torch.stack([torch.randperm(PATCHES) for _ in range(2)])
    whole, shuffled = backbone(images).hidden, backbone(images, patch_keep=order)
    places = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + order], dim=1)
    expected = whole.gather(1, places[..., None].expand_as(whole))
    torch.testing.assert_close(shuffled.hidden, expected, atol=1e-5, rtol=1e-5)


def test_dropped_patches_shorten_the_sequence() -> None:
    backbone = make().eval()
    out = backbone(torch.randn(2, 3, 16, 16), torch.randint(0, 20, (2, 5)), None, torch.tensor([[2], [0]]))
    assert out.hidden.shape == (2, 2 + 5, 16) and out.num_image_tokens == 2
    assert backbone.moe_layers()[0].last_load.sum(dim=1).tolist() == [2 * 2 * 2, 2 * 5 * 2]


def test_every_parameter_but_the_absent_modality_has_a_gradient() -> None:
    backbone = make()
    out = backbone(torch.randn(1, 3, 16, 16))
    (out.hidden.sum() + out.aux_loss).backward()
    without = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert without and all(name.startswith("text_embedding.") or ".text_" in name for name in without)
    assert not any(".moe." in name for name in without)


@pytest.mark.parametrize("changes", [{"shared_layers": [0]}, {"modality_routing": False}, {"router_jitter": 0.1}])
def test_no_switch_leaves_a_parameter_unused(changes: dict[str, object]) -> None:
    backbone = make(**changes)
    out = backbone(torch.randn(1, 3, 16, 16), torch.randint(0, 20, (1, 5)))
    (out.hidden.sum() + out.aux_loss).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("num_image_tokens", [0, 3, 5])
def test_a_shared_block_is_a_hard_one_with_twice_the_same_network(num_image_tokens: int) -> None:
    block = make(shared_layers=[0]).blocks[0]
    assert isinstance(block, SharedBlock)
    hard, state = HardBlock(CONFIG), block.state_dict()
    copies = {name.replace("shared", kind): value for name, value in state.items() for kind in ("image", "text")}
    hard.load_state_dict(copies)
    x = torch.randn(2, 5, 16)
    # Attention is dropped of one sample, the feed-forward part of the other, and a key is masked.
    kept, bias = torch.tensor([[0.0, 2.0], [2.0, 0.0]]), torch.tensor([0.0, 0, -9, 0, 0])
    given = (bias.view(1, 1, 1, 5).expand(2, 1, 1, 5), num_image_tokens, kept)
    torch.testing.assert_close(block(x, *given), hard(x, *given))


@pytest.mark.parametrize(("num_experts", "top_k"), [(32, 1), (32, 2), (4, 1)])
def test_jitter_is_the_samples_own_and_rests_in_evaluation(num_experts: int, top_k: int) -> None:
    backbone = make(num_experts=num_experts, top_k=top_k, router_jitter=0.5, drop_path=0.0)
    images, ids, draws = torch.randn(3, 3, 16, 16), torch.randint(0, 20, (3, 5)), torch.rand(9, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    batch = backbone(images, ids, mask, draws=draws).hidden
    for row, length in enumerate([5, 3, 4]):
        rows = slice(row, row + 1)
        alone = backbone(images[rows], ids[rows, :length], draws=draws[:, rows]).hidden
        torch.testing.assert_close(batch[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
    others = draws.clone()
    others[:7] = torch.rand(7, 3)  # drop path is 0 here, and the first block has no router
    plain = make(num_experts=num_experts, top_k=top_k).eval()
    assert torch.equal(backbone(images, ids, mask, draws=others).hidden, batch)
    assert not torch.allclose(backbone(images, ids, mask, draws=1 - draws).hidden, batch)
    assert not torch.allclose(backbone(images, ids, mask).hidden, batch)
    assert torch.equal(backbone.eval()(images, ids, mask, draws=draws).hidden, plain(images, ids, mask).hidden)


class OfThree(MoE):
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, modality: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, modality, valid)


def test_a_layer_of_three_arguments_serves_where_there_is_no_jitter() -> None:
    images, draws = torch.randn(2, 3, 16, 16), torch.rand(6, 2)
    hidden = []
    for layer in (MoE, OfThree):
        torch.manual_seed(0)
        hidden.append(Backbone(replace(CONFIG, drop_path=0.5), moe_layer=layer)(images, draws=draws).hidden)
    assert torch.equal(*hidden)


def test_router_z_loss_is_the_mean_over_layers_and_words() -> None:
    backbone, ids = make(router_z_loss_weight=0.1).eval(), torch.randint(0, 20, (2, 6))
    seen: list[torch.Tensor] = []
    for layer in backbone.moe_layers():
        layer.router.register_forward_hook(lambda router, args, out: seen.append(args[0] @ router.weight.t()))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    out = backbone(None, ids, mask)
    words = mask.flatten().bool()
    plain = [(scores.exp().sum(-1).log()[words] ** 2).mean() for scores in seen]
    torch.testing.assert_close(out.router_z_loss, torch.stack(plain).mean())
    torch.testing.assert_close(out.aux_per_layer, make().eval()(None, ids, mask).aux_per_layer)
    assert make().eval()(None, ids, mask).router_z_loss == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_repeats_exactly_with_the_same_seed(checkpointed: bool) -> None:
    options = {"drop_path": 0.5, "router_jitter": 0.2, "router_z_loss_weight": 1.0, "shared_layers": [0]}
    backbone = make(**options, checkpoint_activations=checkpointed).train()
    reference = make(**options).train()
    images, ids = torch.randn(4, 3, 16, 16), torch.randint(0, 20, (4, 5))
    for model in (backbone, reference):
        torch.manual_seed(3)
        out = model(images, ids)
        (out.hidden.square().mean() + out.aux_loss + out.router_z_loss).backward()
    for (name, mine), other in zip(backbone.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_drop_path_rises_with_depth_and_rests_in_evaluation() -> None:
    backbone = make(drop_path=0.4)
    x, draws = torch.zeros(4000, 1, 16), torch.linspace(0, 0.999, 4000).repeat(6, 1)
    torch.manual_seed(0)
    drawn, given = backbone.train()._branch_factors(x, None), backbone._branch_factors(x, draws)
    assert drawn is not None and given is not None
    for branch, rate in enumerate([0.0, 0.0, 0.2, 0.2, 0.4, 0.4]):  # attention and feed-forward of three blocks
        assert sorted(set(given[branch].tolist())) == pytest.approx([*([0.0] if rate else []), 1 / (1 - rate)])
        assert torch.equal(given[branch] > 0, draws[branch] >= rate)
        assert (drawn[branch] > 0).float().mean() == pytest.approx(1 - rate, abs=0.03)
    block, branch = backbone.blocks[2], torch.ones_like(x)
    assert torch.equal(block.add(x, branch, torch.ones(16), given[5])[:, 0, 0], given[5])
    assert backbone.eval()._branch_factors(x, draws) is None
    assert torch.equal(block.add(x, branch, torch.ones(16), None), branch)


def test_rates_of_drop_path_without_values_are_not_kept() -> None:
    """Fake ones made every later pass fake; and of a cache the compiler warns."""
    backbone = make(drop_path=0.37).train()
    x, draws = torch.zeros(50, 1, 16), torch.rand(6, 50)
    with FakeTensorMode() as mode:
        backbone._branch_factors(mode.from_tensor(x), mode.from_tensor(draws))
    given = backbone._branch_factors(x, draws)
    assert type(given) is Tensor
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*lru_cache")
        compiled = torch.compile(backbone._branch_factors, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, draws), given)


def test_first_values() -> None:
    torch.manual_seed(0)
    backbone = Backbone(replace(CONFIG, dim=64, num_experts=2))
    for name, parameter in backbone.named_parameters():
        if name.endswith("_scale"):
            assert (parameter == CONFIG.layer_scale).all()
        elif name.endswith(("bias", "w3")):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.ndim > 1:
            expected = 0.02 * min(1, 64 / parameter[0].numel()) ** 0.5 if "projection" in name else 0.02
            assert 0.85 * expected < parameter.std() < 1.15 * expected, name


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = make().state_dict(), make().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    layers = [block.moe for block in make().blocks if isinstance(block, SoftBlock)]
    assert not torch.equal(layers[0].experts.fc1_weight, layers[1].experts.fc1_weight)


def test_empty_batch() -> None:
    out = make()(torch.zeros(0, 3, 16, 16), torch.zeros(0, 5, dtype=torch.int64), torch.ones(0, 5))
    (out.hidden.sum() + out.aux_loss).backward()
    assert out.hidden.shape == (0, 1 + PATCHES + 5, 16) and out.aux_loss == 0


def test_a_model_without_soft_layers_has_no_auxiliary_loss() -> None:
    out = make(soft_layers=[])(torch.randn(1, 3, 16, 16))
    assert out.aux_loss == 0 and out.aux_per_layer.shape == (0,)
    assert expert_load(make(soft_layers=[])).tolist() == []  # as the report has it


def test_nothing_to_encode_is_an_error() -> None:
    with pytest.raises(ValueError, match="images, text_ids or both"):
        make()()


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 20}, {"num_heads": 3}, {"patch_size": 0}, {"top_k": 5}, {"soft_layers": [3]},
        {"max_text_length": 9}, {"capacity_factor": 0.0}, {"drop_path": 1.0}, {"shared_layers": [3]},
        {"shared_layers": [1]}, {"shared_layers": [0, 0]}, {"soft_layers": [1, 1]}, {"shared_layers": [-1]},
        {"router_jitter": 1.0}, {"router_z_loss_weight": -1.0},
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model_names_its_field(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"model.{next(iter(changes))}="):
        Backbone(replace(CONFIG, **changes))
