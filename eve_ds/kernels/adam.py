"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the fastest kernel available; all compute the same update.

DeepSpeed's FusedAdam on CUDA, DeepSpeedCPUAdam where ZeRO keeps the states in host memory, torch's fused AdamW
elsewhere. FusedAdam has not been run: there was no GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from eve_ds.environment import extensions_folder
from eve_ds.kernels.choices import Alternative, Choice

FUSED_ADAM, CPU_ADAM = "fused_adam", "cpu_adam"  # DeepSpeed's names of the compiled operations

# Not compiled on first use in a run: that takes minutes without output, and if killed leaves a lock that hangs the next
# compilation.
_COMPILE = {
    operation: (
        "from eve_ds.environment import prepare_environment; prepare_environment(); "
        f"from deepspeed.ops.op_builder import {builder}; {builder}().load()"
    )
    for operation, builder in ((FUSED_ADAM, "FusedAdamBuilder"), (CPU_ADAM, "CPUAdamBuilder"))
}

State = tuple[bool, str, str]  # available, reason, how to get it


def build_adamw(
    groups: list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    device: torch.device,
    offload: bool = False,
) -> Optimizer:
    """AdamW over parameter groups. With a process group it is a collective: all ranks use the same kernel.

    DeepSpeed's kernels are used only where they are compiled (``python -m eve_ds.doctor`` says how). If one does not
    load on some rank, all ranks use torch's AdamW and a warning says why; ZeRO-Offload with it needs
    ``"zero_force_ds_cpu_optimizer": false`` in DeepSpeed's config.

    Args:
        groups: with ``params``, ``weight_decay`` and optionally ``lr`` each.
        lr: for groups without their own.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        device: where the model trains.
        offload: ZeRO keeps parameters' masters and states in host memory.
    Returns:
        an optimizer that DeepSpeed's ZeRO accepts.
    """
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    operation = operation_for(device, offload)
    if operation is not None:
        available, problem, _ = operation_state(operation)
        optimizer: Optimizer | None = None
        if available:
            try:
                optimizer = _deepspeed_adam(operation)([dict(group) for group in groups], options)
            except Exception as error:  # noqa: BLE001  # whatever a compile may raise; the warning below tells it
                problem = " ".join(str(error).split()) or type(error).__name__
            else:
                problem = "it is not available on another rank"  # the only reason left for not using it
        if _on_all_ranks(optimizer is not None, device) and optimizer is not None:
            return optimizer
        if available:
            warnings.warn(f"using torch's AdamW instead of DeepSpeed's {operation}: {problem[:300]}", stacklevel=2)
    return LeanAdamW(groups, fused=True, **options)


class LeanAdamW(torch.optim.AdamW):
    """torch's AdamW, whose methods are not decorated with ``torch._disable_dynamo``. The update is the same.

    The first call of a decorated method imports torch's compiler, which takes longer than the import of torch itself
    and serves only programs that compile their optimizer.
    """

    # `unwrap` takes off the decorator that turns gradients off, too.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def operation_for(device: torch.device, offload: bool) -> str | None:
    """The DeepSpeed operation to use; None where torch's kernel is as fast (the CPU without offload)."""
    if offload:
        return CPU_ADAM
    return FUSED_ADAM if device.type == "cuda" else None


def _deepspeed_adam(operation: str) -> Callable[[list[dict[str, Any]], dict[str, Any]], Optimizer]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))  # loaded from where `compiled` looked
    if operation == FUSED_ADAM:
        return lambda groups, options: FusedAdam(groups, adam_w_mode=True, **options)
    return lambda groups, options: DeepSpeedCPUAdam(groups, adamw_mode=True, **options)


def _on_all_ranks(built: bool, device: torch.device) -> bool:
    """Whether ``built`` holds on every rank: their checkpoints must hold the same kind of states."""
    if not dist.is_initialized():
        return built
    flag = torch.tensor(int(built), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def operation_state(operation: str) -> State:
    """Whether DeepSpeed's operation is compiled here, why or why not, and how to get it."""
    if importlib.util.find_spec("deepspeed") is None:
        return False, "deepspeed is not installed", "pip install -r requirements.txt"
    if operation == FUSED_ADAM and not torch.cuda.is_available():
        return False, "for CUDA devices", ""
    if compiled(operation):
        return True, "compiled", ""
    return False, "not compiled", f"{sys.executable} -c '{_COMPILE[operation]}'"


def compiled(operation: str) -> bool:
    """Whether the operation came compiled with DeepSpeed, or a run has compiled it."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(operation)) or (extensions_folder() / operation / f"{operation}.so").is_file()


def choice(device: torch.device, offload: bool) -> Choice:
    """The implementation for a model that trains on ``device``."""
    name = "DeepSpeedCPUAdam" if offload else "DeepSpeed FusedAdam"
    available, reason, how = operation_state(CPU_ADAM if offload else FUSED_ADAM)
    return Choice(
        "AdamW with states in host memory (ZeRO-Offload)" if offload else "AdamW",
        (Alternative(name, available, reason, how), Alternative("torch fused AdamW", True, "always runs")),
    )
