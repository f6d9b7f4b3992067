"""What a graph of torch.compile would launch on an H100, counted where the compiler decides it, without generating
code.

A launch is a loop nest that inductor fused, or an operation that it leaves to torch (products).
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._inductor import compile_fx, graph, ir, scheduler
from torch.utils._python_dispatch import _disable_current_modes

from eve_ds.model import compiled
from tests.support.h100 import move_graph, one_h100


class Graphs:
    """A backend of ``torch.compile``: inductor for an H100 up to its generated code; what runs are the traced
    operations.

    Attributes:
        launches: of each graph, a forward or a backward one, in the order of compilation.
        calls: how often each has run.
    """

    def __init__(self) -> None:
        self.launches: list[Counter[str]] = []
        self.calls: Counter[int] = Counter()

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(module, inputs, inner_compile=self._inner)

    def launched(self) -> int:
        """By all calls since ``calls`` was cleared."""
        return sum(self.launches[number].total() * calls for number, calls in self.calls.items())

    def _inner(self, module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        plain, number = copy.deepcopy(module), len(self.launches)  # the next line turns the module's into CUDA's
        self.launches.append(_launches(module, options))

        def run(arguments: list[Any]) -> Any:
            self.calls[number] += 1
            values = list(arguments)
            arguments.clear()
            with _disable_current_modes():
                return plain(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _launches(module: torch.fx.GraphModule, options: dict[str, Any]) -> Counter[str]:
    """Of inductor's schedule for a graph; no code is generated from it."""
    found: list[Counter[str]] = []

    def codegen(lowering: Any) -> None:
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        found.append(Counter(kind for node in lowering.scheduler.nodes for kind in _kinds(node)))
        raise _Counted

    patched = mock.patch.object(graph.GraphLowering, "codegen", codegen)
    with one_h100(), patched, torch._inductor.config.patch(fx_graph_cache=False):
        try:
            compile_fx.compile_fx_inner(module, move_graph(module), **options)
        except Exception:  # raised on as an error of the compiler's own
            if not found:
                raise
    return found[0]


class _Counted(Exception):
    """The schedule is there."""


def _kinds(node: Any) -> Iterator[str]:
    """A name for each launch of a node of inductor's schedule."""
    if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        yield str(getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
    else:
        yield "loops"


@contextlib.contextmanager
def counting_outside(launches: torch.utils._python_dispatch.TorchDispatchMode) -> Iterator[None]:
    """Count with ``launches`` what runs outside of compiled methods. These run without the mode: torch.compile refuses
    to compile under one."""
    call = compiled._Compiled.__call__

    def without(self: Any, *args: Any) -> Any:
        with _disable_current_modes():
            return call(self, *args)

    with mock.patch.object(compiled._Compiled, "__call__", without), launches:
        yield
