"""A checkpoint folder as a dense run of one rank at ZeRO 2 leaves it, with small files of other contents."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch

from eve_ds.engine.checkpoint_record import Manifest, Topology, file_names, hash_files
from eve_ds.engine.resume import tag_of

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def make_checkpoint(folder: Path, step: int) -> Path:
    """Write ``folder/step_NNNNNNNN``, whole and sound."""
    path = folder / tag_of(step)
    path.mkdir(parents=True)
    version = deepspeed.__version__
    records = {"dp_world_size": 1, "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": version}
    torch.save({**records, "module": {"weight": torch.full((64,), float(step))}}, path / MODEL)
    torch.save({"optimizer_state_dict": {"moment": torch.ones(64) * step}}, path / OPTIMIZER)
    Manifest(step, Topology(1, 1, 2), {}, version, {"step": step}, hash_files(path, file_names(path))).write(path)
    return path
