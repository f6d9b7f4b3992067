"""A tiny shapes world, converted as users convert it, and a model with initial values that reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from preprocessing.__main__ import main
from preprocessing.text.tokenizer import SPECIAL

COUNTS = {"train": 60, "val": 30, "test": 2}


def shapes_world(folder: Path, seed: int = 0, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Raw files in folder/raw, caption shards of `splits` in folder/data, folder/tokenizer. Returns `folder`."""
    counts = [f"--{split}={count}" for split, count in COUNTS.items()]
    counts += ["--nlvr-train=8", "--nlvr-dev=8", "--nlvr-test=8"]
    raw, data = folder / "raw", folder / "data"
    commands = [["shapes", "--out", str(raw), "--seed", str(seed), *counts]]
    for split in splits:
        annotations = str(raw / f"annotations/captions_{split}2014.json")
        where = ["--images", str(raw / "images"), "--split", split, "--out", str(data)]
        commands.append(["coco", "--annotations", annotations, *where])
    words = ["tokenizer", "train", "--data", str(data / "train"), "--vocab-size", "320"]
    for command in [*commands, [*words, "--out", str(folder / "tokenizer")]]:
        assert main(command) == 0
    return folder


def shapes_config(image_size: int = 64) -> ModelConfig:
    """A tiny model with the world's cells as its patches."""
    return ModelConfig(
        image_size=image_size,
        patch_size=16,
        dim=32,
        depth=2,
        num_heads=4,
        mlp_hidden=64,
        vocab_size=320,
        max_text_length=24,
        text_positions=24,
        soft_layers=[1],
        num_experts=4,
        layer_scale=1.0,
        init_std=0.1,
        position_std=0.5,
    )


def model_folder(folder: Path, world: Path, image_size: int = 64, seed: int = 0, tokenizer: bool = True) -> Path:
    """A model folder as a pre-training leaves it, all with the initial values that `seed` gives. Returns `folder`."""
    folder.mkdir()
    config, objective = shapes_config(image_size), ObjectiveConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2)
    torch.manual_seed(seed)
    task = MaskedModeling(Backbone(config), objective, SPECIAL.index("[MASK]"))
    save_file(task.state_dict(), folder / "model.safetensors")
    sections = {"model": dataclasses.asdict(config), "objective": dataclasses.asdict(objective)}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes((world / "tokenizer/tokenizer.json").read_bytes())
    return folder
