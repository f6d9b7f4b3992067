"""torch.compile for the parts of a model that take most launches, in training alone.

A method marked with ``compilable`` runs as it stands until ``compile_parts`` is called for a module; then, in training,
it runs compiled. All blocks of a kind share one function, and weights are its inputs: it is compiled once for each
set of shapes, whatever the number of blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

MOST_SHAPES = 8  # of one method: with others it runs plainly, so that batches of odd sizes do not compile without end
# torch compiles anew for less than a shape, too (strides, who needs a gradient), and ends the run at its limit, 8.
RECOMPILE_LIMIT = 8 * MOST_SHAPES
Method = TypeVar("Method", bound=Callable[..., Any])


class _Compiled:
    """A method compiled, and the shapes of its arguments that it runs for."""

    def __init__(self, method: Callable[..., Any], backend: str) -> None:
        self._plain = method
        self._run = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)
        self._shapes: set[tuple[Any, ...]] = set()

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        shapes = tuple((each.shape, each.dtype) if isinstance(each, Tensor) else each for each in args)
        if shapes not in self._shapes:
            empty = any(0 in each.shape for each in args if isinstance(each, Tensor))  # there is nothing to gain
            if len(self._shapes) == MOST_SHAPES or empty:
                return self._plain(module, *args)
            self._shapes.add(shapes)
        return self._run(module, *args)


_plainly = False


def run_plainly(on: bool) -> None:
    """Let all marked methods run plainly, or no longer: a mode that sees each operation, as a FLOP counter, cannot see
    into compiled code. From a forward pass on until after its backward pass, in which blocks may be computed again."""
    global _plainly
    _plainly = on


@functools.cache
def _compiled(method: Callable[..., Any], backend: str) -> _Compiled:
    return _Compiled(method, backend)


def runs_compiled(module: nn.Module) -> bool:
    """Whether a module's marked methods run compiled if they are called now."""
    trains = module.training and torch.is_grad_enabled()
    return trains and not _plainly and getattr(module, "_compile_backend", None) is not None


def compilable(method: Method) -> Method:
    """Mark a module's method that may be compiled. It takes a tensor first, then tensors, numbers and None, all by
    position: a call with keywords runs plainly."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not runs_compiled(self):
            return method(self, *args, **kwargs)
        return _compiled(method, self._compile_backend)(self, *args)

    run.is_compilable = True  # type: ignore[attr-defined]
    return cast(Method, run)


def compile_parts(module: nn.Module, backend: str = "inductor") -> int:
    """Let the marked methods of all modules within ``module`` run compiled in training, and set torch's compiler up for
    them, for the whole process.

    Args:
        module: any.
        backend: of ``torch.compile``.
    Returns:
        how many modules have such a method.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Inputs of products are computed again in the backward pass where that takes no product (activations), as our own
    # ``kernels.mlp`` does; left to itself, the compiler keeps them (tests/unit/eve_ds/model/test_compiled.py).
    torch._functorch.config.ban_recompute_materialized_backward = False
    found = 0
    for part in module.modules():
        if any(getattr(getattr(type(part), name, None), "is_compilable", False) for name in dir(type(part))):
            part._compile_backend = backend  # type: ignore[assignment]
            found += 1
    return found
