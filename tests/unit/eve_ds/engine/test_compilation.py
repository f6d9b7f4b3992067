"""``engine.compile: auto`` by run; ``on`` and ``off`` as they are said."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from eve_ds.config import PretrainConfig
from eve_ds.data.data_config import DataSource
from eve_ds.engine.compilation import LEAST_MICRO_BATCHES, compile_task
from eve_ds.kernels.choices import triton_state
from preprocessing.errors import UserError
from tests.support.tiny import masked_task

GPU, CPU = torch.device("cuda"), torch.device("cpu")  # names alone: nothing is computed
PAYS = triton_state()[0]  # what the GPU's code is generated in


def settled(choice: str, stage: int, device: torch.device, micro_batches: int, **settings: Any) -> bool:
    """Whether the blocks of a task run compiled; the run's settings stay as they are."""
    config, task = PretrainConfig(), masked_task()
    config.engine.compile = choice  # type: ignore[assignment]
    for name, value in settings.items():
        setattr(config.data if hasattr(config.data, name) else config.engine, name, value)
    found = compile_task(task, config, stage, device, micro_batches)
    assert found == any("_compile_backend" in part.__dict__ for part in task.modules())
    assert config.engine.compile == choice
    return found


@pytest.mark.parametrize(
    ("stage", "device", "micro_batches", "expected"),
    [
        (1, GPU, LEAST_MICRO_BATCHES, PAYS),
        (2, GPU, LEAST_MICRO_BATCHES, PAYS),
        (1, GPU, LEAST_MICRO_BATCHES - 1, False),
        (3, GPU, LEAST_MICRO_BATCHES, False),
        (1, CPU, LEAST_MICRO_BATCHES, False),
    ],
)
def test_auto(stage: int, device: torch.device, micro_batches: int, expected: bool) -> None:
    assert settled("auto", stage, device, micro_batches) == expected


def test_auto_is_off_where_the_rows_of_a_pass_vary() -> None:
    sources = [DataSource("pairs"), DataSource("texts", modality="text")]
    assert not settled("auto", 1, GPU, LEAST_MICRO_BATCHES, sources=sources)


def test_auto_is_off_where_the_bits_must_repeat() -> None:
    assert not settled("auto", 1, GPU, LEAST_MICRO_BATCHES, deterministic=True)


def test_as_it_is_said() -> None:
    assert settled("on", 1, CPU, 1)
    assert not settled("off", 1, GPU, LEAST_MICRO_BATCHES)
    with pytest.raises(UserError, match=r"engine\.compile=on: ZeRO 3"):
        settled("on", 3, GPU, LEAST_MICRO_BATCHES)


def test_torch_does_not_warn_of_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would on a GPU, once a process, from the compiler."""
    from torch._inductor.compile_fx import _warn_tf32_disabled

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        inspect.unwrap(_warn_tf32_disabled)()
        assert len(found) == 1
        settled("on", 1, CPU, 1)
        inspect.unwrap(_warn_tf32_disabled)()
        assert len(found) == 1
