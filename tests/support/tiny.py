"""A model and batches so small that every combination of ranks can be compared with one process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig

MASK_ID = 4


def model_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 8,
        "dim": 32,
        "depth": 3,
        "num_heads": 4,
        "mlp_hidden": 64,
        "vocab_size": 50,
        "max_text_length": 12,
        "text_positions": 12,
        "soft_layers": [1, 2],
        "num_experts": 4,
        "top_k": 2,
        "drop_path": 0.0,
        "aux_loss_weight": 0.01,
    }
    return ModelConfig(**{**values, **changes})


def masked_task(moe_layer: Any = MoE, seed: int = 0, **changes: Any) -> MaskedModeling:
    torch.manual_seed(seed)
    backbone = Backbone(model_config(**changes), moe_layer=moe_layer)
    objective = ObjectiveConfig(decoder_dim=32, decoder_depth=1, decoder_heads=4)
    return MaskedModeling(backbone, objective, MASK_ID)


def draw_weights(module: nn.Module, seed: int = 1) -> None:
    """Values so large that everything tells in the loss, the same with every version of torch: the values that its
    ``trunc_normal_`` draws from a seed are others from one version to the next."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = 0.2 * torch.randn(parameter.shape, generator=generator)
            constant = bool((parameter == parameter.flatten()[0]).all())  # of a norm, a bias, LayerScale
            parameter.copy_(parameter + drawn if constant else drawn)


def expert_parallel(layer: type[MoE], ep_size: int, rank: int) -> Any:
    return functools.partial(layer, ep_size=ep_size, ep_rank=rank % ep_size)


def caption_batch(rows: int, seed: int = 0, longest: int = 12) -> dict[str, Tensor]:
    """Images, and texts whose lengths grow with the row, so that ranks get different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 3 + torch.arange(rows) * (longest - 3) // max(1, rows - 1)
    text_ids = torch.randint(5, 50, (rows, longest), generator=generator)
    text_mask = torch.arange(longest)[None] < lengths[:, None]
    text_ids[:, 0] = 2
    text_ids[torch.arange(rows), lengths - 1] = 3
    return {
        "images": torch.randn(rows, 3, 32, 32, generator=generator),
        "text_ids": text_ids * text_mask,
        "text_mask": text_mask,
        "sample_id": torch.arange(rows) + 1000 * seed,
        "image_index": torch.arange(rows),
    }


def mixed(batch: dict[str, Tensor], kinds: str) -> dict[str, Tensor]:
    """The batch as sources of several modalities give it: a letter a row, over and over, p a pair, i an image alone, t
    a text alone."""
    letters = [kinds[row % len(kinds)] for row in range(len(batch["sample_id"]))]
    has_image, has_text = (torch.tensor([letter != lacking for letter in letters]) for lacking in "ti")
    return batch | {
        "images": batch["images"] * has_image[:, None, None, None],
        "text_ids": batch["text_ids"] * has_text[:, None],
        "text_mask": batch["text_mask"] & has_text[:, None],
        "has_image": has_image.long(),
        "has_text": has_text.long(),
    }


def rows_of(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Rows [start, stop), the texts cut to their longest, as a loader makes them."""
    part = {key: value[start:stop] for key, value in batch.items()}
    longest = max(int(part["text_mask"].sum(1).max()), 1)
    return part | {key: part[key][:, :longest] for key in ("text_ids", "text_mask")}
