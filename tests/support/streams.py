"""A GPU's streams acted out on the CPU, to see without a GPU what one stream may do to another's data.

DeepSpeed is told that the CPU has streams. Operations run one by one all the same, but of each it is noted on which
stream it would be and what it reads and writes; each stream knows how much of every other it has waited for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.lean_zero import SILENT


class Stream:
    """What is used of ``torch.cuda.Stream``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: collections.Counter[Stream] = collections.Counter()  # operations that have ended before the next
        self.freed: list[Use] = []  # of memory that the next operation may be given

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def synchronize(self) -> None:
        RACES.host |= self.seen


class Event:
    """What is used of ``torch.cuda.Event``."""

    def record(self, stream: Stream | None = None) -> None:
        self.seen = (stream or RACES.current).seen.copy()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        RACES.host |= self.seen


@dataclasses.dataclass
class Use:
    """Of bytes ``first`` to ``last`` of a storage by an operation."""

    name: str
    stream: Stream
    time: int
    writes: bool
    first: int
    last: int

    def replaces(self, other: Use) -> bool:
        """What may not run beside ``other`` may not run beside this one either."""
        within = self.first <= other.first and other.last <= self.last
        return self.stream is other.stream and within and self.writes >= other.writes


@dataclasses.dataclass
class Memory:
    """A storage, and the stream to which torch gives its bytes again once it is freed."""

    alive: StorageWeakRef
    owner: Stream
    uses: list[Use] = dataclasses.field(default_factory=list)
    recorded: set[Stream] = dataclasses.field(default_factory=set)


class Races(TorchDispatchMode):
    """Within it, ``found`` gets what may be used while it is written, by two streams of which neither waits for the
    other, or by one that uses memory which another was given anew; ``ran`` gets each operation with its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.default = self.current = Stream()
        self.host: collections.Counter[Stream] = collections.Counter()  # what Python has waited for
        self.memories: dict[int, Memory] = {}
        self.found: list[str] = []
        self.ran: list[tuple[str, Stream]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, schema = kwargs or {}, function.overloadpacket.__name__, function._schema
        output = function(*args, **kwargs)
        if name in SILENT:
            for tensor in tensors_of(output):
                self._memory(tensor)
            return output
        self._launch(name)
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            changed = bool(argument.alias_info and argument.alias_info.is_write)
            self._use(value, changed or function.namespace == "c10d", name)
        if not any(each.alias_info for each in schema.returns):
            self._use(output, True, name)
        return output

    def _launch(self, name: str) -> None:
        stream = self.current
        for key in [key for key, memory in self.memories.items() if memory.alive.expired()]:
            memory = self.memories.pop(key)
            memory.owner.freed += [use for use in memory.uses if use.stream not in memory.recorded]
        stream.seen |= self.host
        stream.seen[stream] += 1
        for use in stream.freed:
            if stream.seen[use.stream] < use.time:
                self.found.append(f"{name} may be given memory that {use.name} uses")
        stream.freed.clear()
        self.ran.append((name, stream))

    def _use(self, values: Any, writes: bool, name: str) -> None:
        stream = self.current
        for tensor in tensors_of(values):
            extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.storage_offset() * tensor.itemsize
            use = Use(name, stream, stream.seen[stream], writes, first, first + extent * tensor.itemsize)
            memory = self._memory(tensor)
            for other in memory.uses:
                touch = use.first < other.last and other.first < use.last
                if touch and (writes or other.writes) and stream.seen[other.stream] < other.time:
                    self.found.append(f"{name} may run beside {other.name}")
            memory.uses = [other for other in memory.uses if not use.replaces(other)] + [use]

    def _memory(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.memories:
            self.memories[storage._cdata] = Memory(StorageWeakRef(storage), self.current)
        return self.memories[storage._cdata]

    def record(self, tensor: Tensor, stream: Stream) -> None:
        self._memory(tensor).recorded.add(stream)

    def synchronize(self, *_: Any) -> None:
        for memory in self.memories.values():
            for use in memory.uses:
                self.host |= use.stream.seen

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before


RACES = Races()


def tensors_of(values: Any) -> list[Tensor]:
    found = [each for each in tree_leaves(values) if isinstance(each, Tensor)]
    return [each for each in found if each.device.type == "cpu" and each.numel()]


def act_out_streams() -> Races:
    """From here on DeepSpeed finds streams on the CPU, for as long as this process lives."""
    accelerator = get_accelerator()
    kind = type(accelerator)
    kind.Stream, kind.Event = Stream, Event
    kind.is_synchronized_device, kind.use_host_timers = (lambda _: False), (lambda _: True)
    accelerator.stream, accelerator.synchronize = RACES.stream, RACES.synchronize
    accelerator.current_stream = lambda *_: RACES.current
    accelerator.default_stream = lambda *_: RACES.default
    torch.Tensor.record_stream = lambda tensor, stream: RACES.record(tensor, stream)  # type: ignore[method-assign]
    return RACES
