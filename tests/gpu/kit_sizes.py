"""The device of the kit's checks and scripts, and their sizes: EVE-Base on a GPU, tiny ones in the dry run on the CPU.

EVE_DS_KIT_DEVICE: cuda or cpu. Not set (`make test`): the GPU if there is one, and no check without.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Args:
    dim, hidden, experts, heads: of a layer (Base, or tiny).
    tokens: of an expert layer's input.
    lengths: of samples that attention sees; some lie 64 above a multiple of 128.
    pairs: of a batch of pre-training.
    steps: of a short training.
    """

    dim: int
    hidden: int
    experts: int
    heads: int
    tokens: int
    lengths: tuple[int, ...]
    pairs: int
    steps: int


BASE = Sizes(768, 3072, 32, 12, 3000, (1, 7, 64, 90, 192, 197, 237, 320, 617, 704), 256, 60)
TINY = Sizes(32, 64, 4, 4, 60, (1, 7, 64), 2, 24)


def kit_device() -> torch.device | None:
    """None: there is no GPU, and no dry run was asked for."""
    name = os.environ.get("EVE_DS_KIT_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
    return None if name is None else torch.device(name)


def sizes_of(device: torch.device) -> Sizes:
    return BASE if device.type == "cuda" else TINY


def pretrain_options(device: torch.device) -> list[str]:
    """Of a pre-training with EVE-Base; in the dry run the same recipe with a tiny model."""
    base = ["--config=eve_ds/configs/pretrain_base.yaml", "--engine.expert_parallel_size=1"]
    if device.type == "cuda":
        return base
    tiny = {"dim": 32, "depth": 2, "num_heads": 4, "mlp_hidden": 64, "vocab_size": 400, "num_experts": 4}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    base += [f"--model.{name}={value}" for name, value in tiny.items()]
    base += [f"--objective.{name}={value}" for name, value in decoder.items()]
    return [*base, "--model.soft_layers=[1]", "--engine.precision=fp32"]
