"""What a run's own gauge forecasts, without a plan's options."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from eve_ds.config import PretrainConfig
from eve_ds.config_sections import EngineConfig
from eve_ds.model.model_config import ModelConfig
from eve_ds.plan.forecast import memory_forecast, memory_gauge
from eve_ds.plan.memory import GPU_RESERVE

CPU, ROWS = torch.device("cpu"), 24


@pytest.mark.parametrize("fits", [0, 17, ROWS])
def test_the_largest_micro_batch_that_fits_a_gpu_is_at_most_that_of_the_run(fits: int) -> None:
    model = ModelConfig(image_size=32, dim=32, depth=2, num_heads=2, vocab_size=100, soft_layers=[1], num_experts=4)
    engine = EngineConfig(global_batch_size=ROWS, micro_batch_size=ROWS, precision="fp32")
    config = PretrainConfig(model=model, engine=engine, deepspeed_config="ds_configs/zero1.json")
    limit = GPU_RESERVE
    if fits:
        smaller = dataclasses.replace(engine, global_batch_size=fits, micro_batch_size=fits)
        limit += memory_forecast(dataclasses.replace(config, engine=smaller), 1, CPU)
    fitting = memory_gauge(config, 1, CPU).fitting
    state = torch.get_rng_state()
    assert fitting is not None and fitting(limit) == (ROWS, fits)
    assert torch.equal(torch.get_rng_state(), state)
