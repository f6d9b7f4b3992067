"""What ``engine.deterministic`` sets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.config_sections import EngineConfig
from eve_ds.engine.determinism import be_deterministic
from preprocessing.errors import UserError
from tests.support.tiny_tasks import TASKS, tiny_batch, tiny_task


@pytest.fixture(autouse=True)
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_fixed_order_is_an_error_and_memory_is_not_filled() -> None:
    be_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else attention would stay cuDNN's
    assert not torch.backends.cudnn.benchmark and not torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


@pytest.mark.parametrize(
    ("found", "expected", "told"), [(None, ":4096:8", False), (":16:8", ":16:8", False), (":0:0", ":4096:8", True)]
)
def test_the_workspace_of_cublas(
    found: str | None,
    expected: str,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if found is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
    be_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
    assert ("CUBLAS_WORKSPACE_CONFIG=:0:0 is replaced by :4096:8" in caplog.text) == told


def test_compiled_blocks_are_refused() -> None:
    EngineConfig(deterministic=True).check()
    with pytest.raises(UserError, match=r"engine\.compile=on: the first micro-batch .* engine\.deterministic=false"):
        EngineConfig(deterministic=True, compile="on").check()
    both = ["--engine.deterministic=true", "--engine.compile=on"]
    for scores in ("--evaluate=true", "--zeroshot=true"):  # nothing is compiled there
        assert parse(FinetuneConfig, [*both, scores], "finetune").engine.compile == "on"
    for trains in (FinetuneConfig, PretrainConfig):
        with pytest.raises(UserError, match=r"engine\.compile=on"):
            parse(trains, both, "")


# Of torch.use_deterministic_algorithms: what raises on a GPU (2.13), and on floating point alone.
RAISES = re.compile(
    r"avg_pool3d_backward|adaptive_\w+_backward|fractional_max_pool\w+_backward|max_unpool|upsample_\w+linear\w*_backward|"
    r"upsample_\w*bicubic\w*_backward|reflection_pad\w+_backward|nll_loss2d|ctc_loss|embedding_bag|put_?$|histc|bincount|"
    r"median|grid_sampler\w+_backward|scatter_reduce"
)
RAISES_OF_FLOATS = re.compile(r"cumsum|cumprod|logcumsumexp")


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.raising: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        floats = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        if RAISES.match(name) or (floats and RAISES_OF_FLOATS.match(name)):
            self.raising.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TASKS)
def test_no_task_needs_an_operation_that_raises_on_a_gpu(name: str) -> None:
    """All that a task computes passes by, in both directions. With a cumulative sum of floats, as the proof that it is
    seen."""
    task = tiny_task(name, drop_path=0.2)
    with _Operations() as found:
        task(tiny_batch(6)).loss.backward()
        assert found.raising == set()
        torch.rand(3).cumsum(dim=0)
    assert found.raising == {"cumsum"}


@pytest.mark.parametrize("name", TASKS)
def test_on_a_cpu_each_task_has_the_same_bits_with_it(name: str) -> None:
    gradients = []
    for _ in range(2):
        task = tiny_task(name)
        task(tiny_batch(6)).loss.backward()
        gradients.append([parameter.grad for parameter in task.parameters() if parameter.grad is not None])
        be_deterministic()
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
