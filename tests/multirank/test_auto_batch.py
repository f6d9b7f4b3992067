"""Ranks whose devices differ take one micro-batch: that which fits the smallest."""

from __future__ import annotations

from tests.support.distributed import run_distributed_test


def settle() -> None:
    import torch
    import torch.distributed as dist

    from eve_ds.config import PretrainConfig
    from eve_ds.config_sections import EngineConfig
    from eve_ds.plan import auto
    from eve_ds.tasks.masked_modeling import ObjectiveConfig
    from tests.support.tiny import model_config

    light = ObjectiveConfig(decoder_dim=32, decoder_depth=1, decoder_heads=4)
    found = []
    for small in (0, 1):
        engine = EngineConfig(global_batch_size=256, micro_batch_size="auto", precision="fp32")
        config = PretrainConfig(model=model_config(), objective=light, engine=engine)
        auto._free = lambda device, small=small: (16 if dist.get_rank() == small else 2**20) * 2**20
        auto.settle_micro_batch_size(config, 7, torch.device("cpu"))
        found.append(config.engine.micro_batch_size)
    assert 1 < found[0] == found[1] < 128, found


def test_the_smallest_device_decides() -> None:
    run_distributed_test(settle, 2)
