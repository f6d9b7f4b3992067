"""Every parameter of every kind of block belongs to the kind that its name says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eve_ds.callbacks import grad_norms
from eve_ds.callbacks.grad_norms import GradNorms, kind_of, norms_by_kind
from eve_ds.model.backbone import Backbone
from tests.support.tiny_tasks import tiny_config


def test_what_computes_counts_where_it_belongs() -> None:
    config = replace(tiny_config(), shared_layers=[1])  # block 0 hard, 1 shared, 2 soft
    kinds: dict[str, set[str]] = {}
    for name, parameter in Backbone(config).named_parameters(prefix="backbone"):
        if parameter.ndim >= 2:
            kinds.setdefault(kind_of(name), set()).add(name.removeprefix("backbone.").rpartition(".")[0])
    assert kinds == {
        "embeddings": {"image_embedding.projection", "text_embedding.words", "image_embedding", "text_embedding"},
        "attention": {f"blocks.{i}.attention.{part}" for i in range(3) for part in ("qkv", "proj")},
        "image_ffn": {f"blocks.0.image_mlp.fc{i}" for i in (1, 2)},
        "text_ffn": {f"blocks.0.text_mlp.fc{i}" for i in (1, 2)},
        "shared_ffn": {f"blocks.1.shared_mlp.fc{i}" for i in (1, 2)},
        "experts": {"blocks.2.moe.experts"},
        "router": {"blocks.2.moe.router"},
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pixel_decoder.head.weight", "heads"),
        ("backbone.norm.weight", "norms"),
        ("backbone.embedding_norm.weight", "embeddings"),
        ("backbone.blocks.0.attention_scale", "attention"),
        ("backbone.blocks.0.attention_norm.weight", "attention"),
        ("backbone.blocks.0.image_norm.bias", "image_ffn"),
        ("backbone.blocks.0.text_norm.bias", "text_ffn"),
        ("backbone.blocks.1.shared_norm.bias", "shared_ffn"),
        ("backbone.blocks.2.mlp_scale", "norms"),
        ("backbone.blocks.2.moe_norm.weight", "norms"),
        ("backbone.blocks.2.moe.image_vector", "router"),
    ],
)
def test_norms_and_vectors_count_with_their_branch(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("groups", ["fp16_groups", "params_in_partition"])
def test_norms_are_of_own_parts_without_padding_and_without_the_loss_scale(
    monkeypatch: pytest.MonkeyPatch, groups: str
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda packed: packed.mul_(4))  # four ranks alike
    task = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 1), "backbone": torch.nn.ModuleDict()})
    task["backbone"]["norm"] = torch.nn.LayerNorm(2)
    (weight, bias), norm = task["one"].parameters(), task["backbone"]["norm"].weight
    padding = torch.full((2,), 9.0)
    padding._zero_padding = True  # type: ignore[attr-defined]
    gradients = {0: [torch.tensor([3.0]), torch.tensor([4.0]), padding], 1: [torch.tensor([6.0, 8.0])]}
    optimizer: Any = SimpleNamespace(device=torch.device("cpu"), averaged_gradients=gradients, loss_scale=8.0)
    setattr(optimizer, groups, [[weight, bias], [norm]])
    assert norms_by_kind(task, optimizer) == {"heads": 5 * 2 / 8, "norms": 10 * 2 / 8}


def test_the_last_micro_batch_of_every_nth_step_is_looked_at_and_its_record_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, bool]] = []
    engine = SimpleNamespace(is_gradient_accumulation_boundary=lambda: trainer.last, optimizer=None)
    trainer: Any = SimpleNamespace(step=0, engine=engine, task=None)
    monkeypatch.setattr(
        grad_norms, "norms_by_kind", lambda *_: seen.append((trainer.step, trainer.last)) or {"heads": 2.0}
    )
    callback, records = GradNorms(2), []
    for _ in range(5):
        for trainer.last in (False, True):
            callback.backward_end(trainer)
        trainer.step += 1
        records.append({"step": trainer.step})
        callback.step_end(trainer, records[-1])
    assert seen == [(1, True), (3, True)]
    found = {"optim/grad_norm/heads": 2.0}
    assert records == [{"step": 1}, {"step": 2} | found, {"step": 3}, {"step": 4} | found, {"step": 5}]
