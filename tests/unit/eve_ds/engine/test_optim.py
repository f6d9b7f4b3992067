"""Which parameters decay, and the learning rate of each: by what they are and how deep they lie."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from eve_ds.config_sections import OptimizerConfig
from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
from eve_ds.engine.optim import build_optimizer, decayed, parameter_groups
from eve_ds.model.moe import MoE
from preprocessing.errors import UserError
from tests.support.tiny_tasks import TASKS, tiny_batch, tiny_task

# The rule before it looked at kinds: words in names.
OLD_WORDS = ("pos_embed", "position", "type_embed", "class_embed", "class_token", "layer_scale", "gamma", "experts.w3")


def by_old_rule(name: str, parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and not any(word in name for word in OLD_WORDS)


@pytest.mark.parametrize("layer", [MoE, partial(DeepSpeedMoE, ep_size=2, ep_rank=1)], ids=["torch", "deepspeed"])
@pytest.mark.parametrize("name", TASKS)
def test_the_same_parameters_decay_as_by_the_rule_on_names(name: str, layer: Callable[..., MoE]) -> None:
    task = tiny_task(name, moe_layer=layer)
    expected = {key for key, parameter in task.named_parameters() if by_old_rule(key, parameter)}
    assert decayed(task) == expected
    with torch.no_grad():  # as ZeRO 3 leaves parameters: empty, with their shape beside them
        for parameter in task.parameters():
            parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)
    assert decayed(task) == expected


class Own(nn.Module):
    """A module of a user's own: what its names say is not what its parameters are."""

    without_weight_decay: tuple[str, ...] = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.position_mlp = nn.Linear(3, 2)
        self.gamma_head = nn.Linear(2, 1)
        self.weight = nn.Parameter(torch.zeros(4))
        self.table = nn.Parameter(torch.zeros(5, 2))
        self.grid_norm = nn.LayerNorm((4, 2))
        self.words = nn.Embedding(6, 2)


def test_kinds_decide_and_not_names() -> None:
    own = nn.Sequential(Own())
    assert decayed(own) == {"0.position_mlp.weight", "0.gamma_head.weight", "0.words.weight"}
    assert [group["lr"] for group in parameter_groups(own, OptimizerConfig(lr=1.0, layer_decay=0.5))] == [1.0, 1.0]
    own[0].without_weight_decay = ("tables",)
    with pytest.raises(UserError, match="0: without_weight_decay lists 'tables', but Own has no such parameter"):
        decayed(own)


def test_rates_rise_with_depth() -> None:
    task = tiny_task("vqa", moe_layer=partial(DeepSpeedMoE, ep_size=1, ep_rank=0))
    config = OptimizerConfig(lr=1.0, head_lr_mult=7, layer_decay=0.5)
    groups = parameter_groups(task, config)
    peaks = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    for name, parameter in task.named_parameters():
        part = name.removeprefix("backbone.")
        if part == name:
            expected = 7.0
        elif part.startswith("blocks."):
            expected = 0.5 ** (3 - int(part.split(".")[1]))
        else:
            expected = 1.0 if part.startswith("norm.") else 0.5**4
        assert peaks[id(parameter)] == expected, name
    # Two a layer, of its matrices and of the rest; two of the soft layer's experts; one of the final norm.
    assert len(groups) == 2 * (1 + 3) + 2 + 1 + 2
    assert sum(bool(group.get("moe")) for group in groups) == 2
    assert len(parameter_groups(task, OptimizerConfig(head_lr_mult=7))) == 6


FREEZE = ["backbone.blocks.0.*", "*.experts.w1", "backbone.text_embedding.words.weight"]


def test_frozen_parameters_have_no_rate_and_no_decay() -> None:
    task = tiny_task("vqa")
    next(task.parameters()).requires_grad_(False)  # by an own task: it is in no group, and has no gradient to make zero
    groups = build_optimizer(task, OptimizerConfig(freeze=["backbone.*"])).param_groups
    (still,) = [group for group in groups if group["peak_lr"] == 0]
    assert still["weight_decay"] == 0
    backbone = [parameter for name, parameter in task.named_parameters() if name.startswith("backbone.")]
    assert {id(each) for each in still["params"]} == {id(each) for each in backbone[1:]}


def test_frozen_parameters_are_as_if_they_had_no_gradient() -> None:
    """Beside plain PyTorch with ``requires_grad`` False, clipped, with decay and layer-wise rates."""
    config = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1, layer_decay=0.9, freeze=FREEZE)
    mine, plain = tiny_task("pretrain"), tiny_task("pretrain")
    still = {name for name, _ in mine.named_parameters() if any(fnmatch.fnmatch(name, each) for each in FREEZE)}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name not in still)
    unfrozen = OptimizerConfig(**vars(config) | {"freeze": []})
    reference = torch.optim.AdamW(parameter_groups(plain, unfrozen), betas=(0.9, 0.98), eps=1e-4)
    norms: tuple[list[float], list[float]] = [], []
    for task, optimizer, found in zip((mine, plain), (build_optimizer(mine, config), reference), norms, strict=True):
        for step in range(3):
            task(tiny_batch(4, seed=step)).loss.backward()
            found.append(float(torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    first = dict(tiny_task("pretrain").named_parameters())
    for (name, left), right in zip(mine.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6), name
        assert torch.equal(left, first[name]) == (name in still), name


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["backbone.text_embeding.*"], "'backbone.text_embeding.*' matches no parameter.* backbone.text_embedding.*"),
        (["backbone.*", "head.*"], "'head.*' matches no parameter"),
        (["*"], "leave no parameter to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parameter_groups(tiny_task("vqa"), OptimizerConfig(freeze=patterns))
