"""Export of the trained model as a folder that loads without DeepSpeed: fp32 master weights, config, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from eve_ds import config as config_tree
from eve_ds.engine.watchdog import mark
from eve_ds.model.moe import MoE
from eve_ds.weights.hashes import HASHES, write_hashes
from eve_ds.weights.model_folder import HASHED, metadata
from preprocessing.local_files import make_folder, write_atomic, write_json
from preprocessing.text.tokenizer import Tokenizer


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """{name: fp32 CPU tensor} of all weights with all ranks' experts; {} but on rank 0. Called by all ranks."""
    groups = {}
    for prefix, layer in module.named_modules():
        if isinstance(layer, MoE) and layer.ep_size > 1:
            groups.update({f"{prefix}.experts.{name}": layer.ep_group for name, _ in layer.experts.named_parameters()})
    state = {}
    for name, parameter in module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        value = (parameter.detach().float() if value is None else value.detach()).contiguous()
        if name in groups:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(groups[name]))]
            dist.all_gather(parts, value, group=groups[name])
            value = torch.cat(parts)
        if dist.get_rank() == 0:
            state[name] = value.cpu().clone()
    return state


def export_model(
    module: nn.Module,
    config: Any,
    tokenizer: Tokenizer,
    folder: Path,
    step: int,
    companions: Mapping[str, Any] | None = None,
) -> None:
    """Write model.safetensors, config.yaml, tokenizer.json, hashes.json and ``companions``.

    Each file is written atomically. Called by all ranks.

    Args:
        module: the trained module.
        config: the resolved tree.
        tokenizer: of the run.
        folder: is made if it does not exist.
        step: optimizer steps so far; stored in the metadata of the weights.
        companions: {name: content} of the JSON files that the task's head needs, such as VQA's answer list.
    """
    mark(f"the export into {folder}")
    state = full_state(module)
    if dist.get_rank() == 0:
        make_folder(folder)
        (folder / HASHES).unlink(missing_ok=True)  # of an earlier export
        config_tree.save(config, folder / "config.yaml")
        tokenizer.save(folder)
        for name, content in (companions or {}).items():
            write_json(folder / name, content)
        write_atomic(folder / "model.safetensors", safetensors_bytes(state, metadata=metadata(step)))
        write_hashes(folder, HASHED)
    dist.barrier()
