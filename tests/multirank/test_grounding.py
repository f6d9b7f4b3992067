"""Grounding in validation is the same under ZeRO 1, 2 and 3 with spread experts as in one process, and leaves no trace.

The ranks are as uneven as an evaluation makes them: one holds a single image, one nothing but repeated rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.tasks.base import measuring_held_out
from tests.support.distributed import run_distributed_test
from tests.support.tiny import caption_batch, expert_parallel, masked_task

ROWS, WORLD_SIZE = 4, 2
IMAGES = [([7, 7, 8, 9], [5, 5, 5, 5]), ([1, 2, 2, 1], [3, 4, 3, 4])]  # by micro-batch and rank
VALID = [([1, 1, 1, 1], [1, 1, 1, 1]), ([1, 1, 1, 0], [0, 0, 0, 0])]
ADDED = {
    "val/mlm_loss_shuffled",
    "val/mlm_accuracy_shuffled",
    "val/mlm_loss_no_image",
    "val/mlm_accuracy_no_image",
    "val/mim_loss_shuffled",
}


def batches_of(rank: int) -> list[dict[str, Tensor]]:
    found = []
    for micro, (images, valid) in enumerate(zip(IMAGES, VALID, strict=True)):
        index = torch.tensor(images[rank])
        batch = caption_batch(ROWS, seed=10 * micro + rank)
        pixels = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))[index]
        found.append(batch | {"image_index": index, "images": pixels, "valid": torch.tensor(valid[rank]).bool()})
    return found


def tiny_task(moe_layer: Any = None) -> Any:
    layer = {} if moe_layer is None else {"moe_layer": moe_layer}
    return masked_task(**layer, init_std=0.1, layer_scale=1.0)


def expected_metrics() -> dict[str, float]:
    """One process that takes the ranks' micro-batches one after the other."""
    task = tiny_task().eval()
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), measuring_held_out(task):
        for batch in [batch for rank in range(WORLD_SIZE) for batch in batches_of(rank)]:
            for name, pair in task(batch).metrics.items():
                sums[name] = sums.get(name, torch.zeros(2)) + torch.stack(pair)
    means = {f"val/{name}": float(total / count) for name, (total, count) in sums.items()}
    del means["val/aux_loss"]  # of the tokens of all ranks: another number than of each rank's
    return means | {"val/loss": means["val/mim_loss"] + means["val/mlm_loss"]}


def evaluate(expected: dict[str, float]) -> None:
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    disable_shm_operation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for stage in (1, 2, 3):
        compare(stage, expected)


def compare(stage: int, expected: dict[str, float]) -> None:
    """Evaluate, train a step at a learning rate of 0, and both again: nothing of either changes."""

    from eve_ds.config_sections import EngineConfig, OptimizerConfig
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.evaluation import held_out_metrics
    from eve_ds.engine.initialize import initialize
    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.optim import build_optimizer
    from eve_ds.engine.signals import StopRequest

    rank, options = dist.get_rank(), OptimizerConfig(lr=1e-2, total_steps=1)
    task = tiny_task(expert_parallel(DeepSpeedMoE, WORLD_SIZE, rank))
    config = EngineConfig(global_batch_size=ROWS * WORLD_SIZE, expert_parallel_size=WORLD_SIZE, precision="fp32")
    settings = load_deepspeed_config(f"ds_configs/zero{stage}.json", config, options, WORLD_SIZE)
    engine = initialize(task, build_optimizer(task, options), settings)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    trainer: Any = SimpleNamespace(engine=engine, task=task, device=torch.device("cpu"), stop=StopRequest())
    norms = []
    for _ in range(2):
        engine.eval()
        found = held_out_metrics(trainer, batches_of(rank))
        assert found.pop("val/aux_loss") > 0
        assert found == pytest.approx(expected, abs=1e-5), f"ZeRO {stage}"
        engine.train()
        output = engine(caption_batch(ROWS, seed=rank))
        assert output.metrics.keys() == {"aux_loss", "mim_loss", "mlm_loss", "mlm_accuracy"}
        engine.backward(output.loss * WORLD_SIZE)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0, f"ZeRO {stage}"
    engine.destroy()


def test_two_ranks_find_what_one_process_finds() -> None:
    expected = expected_metrics()
    assert expected.keys() >= ADDED
    assert abs(expected["val/mlm_loss_shuffled"] - expected["val/mlm_loss"]) > 1e-3
    run_distributed_test(evaluate, WORLD_SIZE, args=(expected,))


def evaluate_single_images() -> None:
    """Micro-batches of one image each: what compares images has nothing to compare."""
    import contextlib
    import io

    from eve_ds.engine.evaluation import held_out_metrics
    from eve_ds.engine.signals import StopRequest
    from eve_ds.errors import setup_logging

    setup_logging(rank=0)
    task = tiny_task().eval()
    state = {"engine": task, "task": task, "device": torch.device("cpu"), "stop": StopRequest()}
    trainer: Any = SimpleNamespace(**state, step=7, is_main=True)
    for image_index, said in (([5, 5, 5, 5], True), ([5, 6, 5, 5], False)):
        batch = batches_of(1)[0] | {"image_index": torch.tensor(image_index)}
        with contextlib.redirect_stderr(io.StringIO()) as told:
            found = held_out_metrics(trainer, [batch])
        lost = {name for name in ADDED if name.endswith("_shuffled")}
        assert (found.keys() & lost == set()) is said
        words = told.getvalue()
        assert words.startswith(f"step 7: {', '.join(sorted(lost))} cannot be told") if said else not words, words
        assert ("raise engine.micro_batch_size" in words) is said


def test_measures_that_no_micro_batch_can_tell_are_named() -> None:
    run_distributed_test(evaluate_single_images, 1)
