"""AdamW with its parameter groups: what decays, which learning rate a parameter has, which ranks share it."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from eve_ds.config_sections import OptimizerConfig
from eve_ds.kernels.adam import build_adamw
from eve_ds.model.backbone import Backbone
from preprocessing.errors import UserError

CPU = torch.device("cpu")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)  # the last one: BatchNorm and InstanceNorm


def decayed(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay shrinks, by what they are: matrices, and more dimensions.

    Not those of one dimension (biases, LayerScale, class and mask token, type vectors, temperatures), not those of
    norms of any shape, and not those that their own module lists in an attribute ``without_weight_decay``, as
    ``("positions",)``: tables of positions, and the experts' biases, which are a tensor of three dimensions.

    Raises:
        UserError: a module lists a parameter that it does not have.
    """
    exempt: set[int] = set()
    for place, owner in module.named_modules():
        listed = tuple(getattr(owner, "without_weight_decay", ()))
        if missing := [name for name in listed if not hasattr(owner, name)]:
            raise UserError(
                f"{place or type(owner).__name__}: without_weight_decay lists {missing[0]!r}, but "
                f"{type(owner).__name__} has no such parameter"
            )
        for name, parameter in owner.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) < 2 or isinstance(owner, NORMS) or name in listed:
                exempt.add(id(parameter))
    return {name for name, parameter in module.named_parameters() if id(parameter) not in exempt}


def depth_factors(module: nn.Module, decay: float) -> dict[int, float]:
    """{id of a parameter: ``decay ** (depth + 1 - layer)``}, for the embeddings (layer 0) and block i (layer i + 1).

    All others, as the final norm and the heads, have the factor 1. From BEiT (Bao et al., arXiv 2106.08254, and
    ``get_num_layer_for_vit`` in its optim_factory.py), as fine-tuning of BEiT-3 and MAE has it.
    """
    backbone = getattr(module, "backbone", None)
    if decay == 1.0 or not isinstance(backbone, Backbone):
        return {}
    embeddings = nn.ModuleList([backbone.image_embedding, backbone.text_embedding, backbone.embedding_norm])
    layers = [embeddings, *backbone.blocks]
    return {
        id(parameter): decay ** (len(layers) - layer)
        for layer, part in enumerate(layers)
        for parameter in part.parameters()
    }


def frozen(module: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters that match one of the patterns, as ``backbone.blocks.0.*``.

    Raises:
        UserError: a pattern matches nothing, or together they leave nothing to train.
    """
    names = [name for name, _ in module.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            known = [*(f"{place}.*" for place, _ in module.named_modules() if place), *names]
            close = ", ".join(difflib.get_close_matches(pattern, known, cutoff=0.4)) or ", ".join(known[:3])
            raise UserError(f"optimizer.freeze: {pattern!r} matches no parameter; close to it are {close}")
        found.update(matching)
    if found.issuperset(names):
        raise UserError(f"optimizer.freeze: {', '.join(patterns)} leave no parameter to train; freeze fewer")
    return found


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups by weight decay, learning rate and expert placement.

    Each group has ``lr`` and ``peak_lr``: the schedule multiplies the latter. Frozen parameters have a learning rate of
    0 and no decay. Experts stand in groups of their own with ``moe: True``, as ZeRO needs them to reduce and partition
    their gradients among the ranks that share them.
    """
    groups: dict[str, dict[str, Any]] = {}
    decayed_names, lr_factors = decayed(module), depth_factors(module, config.layer_decay)
    frozen_names = frozen(module, config.freeze)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        weight_decay = config.weight_decay if name in decayed_names else 0.0
        lr = config.lr * (1.0 if name.startswith("backbone.") else config.head_lr_mult)
        lr *= lr_factors.get(id(parameter), 1.0)
        if name in frozen_names:
            lr = weight_decay = 0.0
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
    states in host memory if ``offload``. A collective where there is a process group.

    The gradients of frozen parameters are made zero in the backward pass, so that they neither count in the gradient
    norm nor enter Adam's moments. They keep ``requires_grad``: without it, DeepSpeed leaves frozen experts out of
    checkpoints and all frozen parameters out of universal ones, so that no branch could free them again.
    """
    groups = parameter_groups(module, config)
    frozen_names = frozen(module, config.freeze)
    for name, parameter in module.named_parameters():
        if name in frozen_names and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    return build_adamw(groups, config.lr, (config.betas[0], config.betas[1]), config.eps, device, offload)
