"""How often the host waits for the device in a micro-batch of masked pre-training: on the meta device, by a look at
every operation. The experts take the way that they take on a GPU, but for Triton kernels: these only launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eve_ds.kernels import groups, permute
from eve_ds.tasks import Task
from tests.support.tiny_tasks import TASKS, tiny_batch, tiny_task

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
META = torch.device("meta")

WORDS = "nonzero"  # how many words are masked decides how many rows go through the projection to the vocabulary
ROWS = "nonzero"  # of sources without pairs: rows with an image, texts alone, and pairs decide the passes' sizes


class Waits(TorchDispatchMode):
    """The names of operations for which the host would wait, as they come, and how many there were of all."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        self.operations += 1
        waits = packet in READS
        if packet in INDEXING:  # by a mask: its True places are counted first
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        elif packet is aten.repeat_interleave:
            waits = kwargs.get("output_size") is None
        elif packet is aten._to_copy:  # from or to pageable memory
            waits = kwargs.get("device", args[0].device) != args[0].device
        elif packet is aten.copy_:
            waits = args[0].device != args[1].device
        if waits:
            self.names.append(packet.__name__)
        return func(*args, **kwargs)


class Copies(TorchFunctionMode):
    """Adds the tensors that are made of Python's numbers and copied to the device: no operation on meta."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and made.is_meta and not isinstance(args[0], Tensor):
            self.waits.names.append(func.__name__)
        return made


@contextmanager
def watched() -> Iterator[Waits]:
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True), Waits() as waits, Copies(waits):
        yield waits


def on_meta(name: str, columns: tuple[str, ...]) -> tuple[Task, dict[str, Tensor]]:
    task = tiny_task(name, drop_path=0.5).to(META, torch.bfloat16).train()
    for layer in task.backbone.moe_layers():
        layer.experts.use_grouped_mm = True
    batch = tiny_batch(4) | {column: torch.ones(4, dtype=torch.int64) for column in columns}
    return task, {name: value.to(META) for name, value in batch.items()}


@pytest.fixture
def numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, ``to_host`` makes up numbers."""

    def refused(counts: Tensor, rows: int) -> list[int]:
        raise AssertionError("the experts' loads were read back")

    for module in (groups, permute):
        monkeypatch.setattr(module, "to_host", refused)


@pytest.mark.usefixtures("numbers_are_refused")
@pytest.mark.parametrize(
    ("name", "columns", "allowed"),
    [
        ("pretrain", (), [WORDS]),
        ("pretrain_joint", (), [WORDS]),
        ("pretrain_mim", (), []),
        ("pretrain_mlm", (), [WORDS]),
        ("pretrain_masked_otherwise", (), [WORDS]),
        ("pretrain_codes", (), [WORDS]),
        ("pretrain", ("has_image", "has_text"), [ROWS] * 3 + [WORDS] * 2),
    ],
)
def test_waits_of_forward_and_backward(name: str, columns: tuple[str, ...], allowed: list[str]) -> None:
    task, batch = on_meta(name, columns)
    with watched() as forward:
        loss = task(batch).loss
    with watched() as backward:
        loss.backward()
    assert forward.names == allowed and len(allowed) <= 6
    assert backward.names == [] and backward.operations > 100


MASK = torch.ones(3, dtype=torch.bool, device=META)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor(1.0, device=META),
        lambda x: torch.as_tensor([1, 2], device=META),
        lambda x: x[MASK],
        lambda x: x.masked_select(MASK),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: torch.repeat_interleave(x.long()),
    ],
)
def test_a_wait_is_seen(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=META)
    with watched() as seen, suppress(NotImplementedError, RuntimeError):  # the meta device has no values to give
        wait(x)
    assert len(seen.names) == 1


def test_every_mode_of_masked_pretraining_is_watched() -> None:
    assert {name for name in TASKS if name.startswith("pretrain")} == {
        "pretrain", "pretrain_joint", "pretrain_mim", "pretrain_mlm", "pretrain_masked_otherwise", "pretrain_codes",
    }  # fmt: skip
