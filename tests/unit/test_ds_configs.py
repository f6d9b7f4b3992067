"""The DeepSpeed JSON files that come with EVE-DS are taken by the engine and by DeepSpeed itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.engine.deepspeed_config import load_deepspeed_config

STAGES = {"zero1.json": 1, "zero2.json": 2, "zero3.json": 3, "zero2_offload.json": 2}


def test_all_files_are_known(repository: Path) -> None:
    assert {path.name for path in (repository / "ds_configs").iterdir()} == set(STAGES)


@pytest.mark.parametrize(("name", "stage"), STAGES.items())
def test_deepspeed_takes_the_filled_in_file(repository: Path, name: str, stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    micro = 32 if name.endswith("offload.json") else 8  # several micro-batches a step are refused there
    engine = EngineConfig(global_batch_size=32, micro_batch_size=micro, precision="bf16")
    filled = load_deepspeed_config(str(repository / "ds_configs" / name), engine, OptimizerConfig(), world_size=1)
    config = DeepSpeedConfig(filled)
    assert config.train_batch_size == 32
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (micro, 32 // micro)
    assert config.gradient_clipping == 3.0
    assert config.bfloat16_config.enabled
    zero = config.zero_config
    assert (zero.stage, zero.contiguous_gradients, zero.reduce_bucket_size) == (stage, True, 50_000_000)
    assert (zero.offload_optimizer is not None) == name.endswith("offload.json")
