"""AdamW with its parameter groups, and the learning rate as a pure function of the step: nothing to store or resume."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from eve_ds.config_sections import OptimizerConfig
from eve_ds.kernels.adam import build_adamw

CPU = torch.device("cpu")
NO_DECAY = ("pos_embed", "position", "type_embed", "class_embed", "class_token", "layer_scale", "gamma", "experts.w3")


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; biases (experts' are in w3), norms, LayerScale, class token, types and positions do not."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not any(word in name for word in NO_DECAY)


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups by weight decay, learning rate and expert placement.

    Each group has ``lr`` and ``peak_lr``: the schedule multiplies the latter. Experts stand in groups of their own with
    ``moe: True``, as ZeRO needs them to reduce and partition their gradients among the ranks that share them.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        weight_decay = config.weight_decay if has_weight_decay(name, parameter) else 0.0
        lr = config.lr * (1.0 if name.startswith("backbone.") else config.head_lr_mult)
        key = f"lr_{lr:g}_decay_{weight_decay:g}"  # as few groups as there are settings: ZeRO communicates for each
        group = groups.setdefault(
            key, {"name": key, "params": [], "weight_decay": weight_decay, "lr": lr, "peak_lr": lr}
        )
        group["params"].append(parameter)
    split = split_params_into_different_moe_groups_for_optimizer(list(groups.values()))
    return [group for group in split if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, offload: bool = False, device: torch.device = CPU
) -> torch.optim.Optimizer:
    """AdamW over ``parameter_groups``, by the kernel that ``kernels.adam`` picks for ``device``, with ZeRO's
    states in host memory if ``offload``. A collective where there is a process group."""
    groups = parameter_groups(module, config)
    return build_adamw(groups, config.lr, (config.betas[0], config.betas[1]), config.eps, device, offload)


def lr_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate for optimizer step ``step`` (the first is 0).

    Rises linearly over ``warmup * total_steps`` steps, then falls to ``min_lr_ratio`` along a cosine or a line.
    """
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
