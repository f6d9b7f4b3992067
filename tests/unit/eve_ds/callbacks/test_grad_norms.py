"""Every parameter of every kind of block belongs to the kind that its name says."""

from __future__ import annotations

from dataclasses import replace

from eve_ds.callbacks.grad_norms import kind_of
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
