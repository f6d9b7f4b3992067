"""AdamW against its formula, whichever kernel computes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import adam

CPU = torch.device("cpu")
STEPS, BETAS, EPS = 5, (0.9, 0.98), 1e-8
SIZES = [(7, 5), (3,), (64, 33)]


def formula(value: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Tensor:
    """Algorithm 2 of arXiv 1711.05101 with the schedule in ``lr``, in float64."""
    value, first, second = value.double(), torch.zeros_like(value.double()), torch.zeros_like(value.double())
    for step, gradient in enumerate(gradients, start=1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient.double()
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.double().square()
        root = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        value = value - lr * (first / (1 - BETAS[0] ** step) / root + weight_decay * value)
    return value


def distance_from_formula(device: torch.device, offload: bool) -> tuple[str, float]:
    """(class of the optimizer, largest difference after STEPS steps of two groups with their own settings)."""
    torch.manual_seed(0)
    where = CPU if offload else device
    values = [torch.randn(size) for size in SIZES]
    gradients = [[torch.randn(size) for _ in range(STEPS)] for size in SIZES]
    parameters = [torch.nn.Parameter(value.to(where, copy=True)) for value in values]
    settings = [(1e-2, 0.01), (3e-3, 0.0), (3e-3, 0.0)]  # lr, weight decay
    groups: list[dict[str, Any]] = [
        {"params": parameters[:1], "lr": 1e-2, "weight_decay": 0.01},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    optimizer = adam.build_adamw(groups, 3e-3, BETAS, EPS, device, offload)
    for step in range(STEPS):
        for parameter, made in zip(parameters, gradients, strict=True):
            parameter.grad = made[step].to(where, copy=True)
        optimizer.step()
    differences = [
        (parameter.detach().cpu().double() - formula(value, made, *setting)).abs().max().item()
        for parameter, value, made, setting in zip(parameters, values, gradients, settings, strict=True)
    ]
    return type(optimizer).__name__, max(differences)


def test_on_the_cpu() -> None:
    name, difference = distance_from_formula(CPU, offload=False)
    assert name == "LeanAdamW" and difference < 3e-6


def test_torchs_adamw_without_its_wrappers_is_the_same_bit_for_bit() -> None:
    """Several groups, a changed learning rate, states stored and loaded in the middle."""

    def trained(kind: type[torch.optim.AdamW]) -> list[Tensor]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in SIZES]
        optimizer = kind(parameters[:2], lr=1e-2, betas=BETAS, eps=EPS, fused=True)
        optimizer.add_param_group({"params": parameters[2:], "weight_decay": 0.0})
        for step in range(STEPS):
            optimizer.zero_grad()
            for parameter in parameters:
                parameter.square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
        states = [moment for state in optimizer.state.values() for moment in state.values()]
        return [*(parameter.detach() for parameter in parameters), *states]

    ours, theirs = trained(adam.LeanAdamW), trained(torch.optim.AdamW)
    assert len(ours) == len(theirs) == 4 * len(SIZES)
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


STEP = """
import sys
import torch
from eve_ds.kernels.adam import LeanAdamW
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = LeanAdamW([parameter], fused=True)
optimizer.zero_grad()
parameter.sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_no_step_imports_torchs_compiler() -> None:
    ended = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


@pytest.mark.long  # compiles DeepSpeed's operation, which takes a minute or two
@pytest.mark.timeout(900)
def test_with_states_in_host_memory() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()
    name, difference = distance_from_formula(CPU, offload=True)
    assert name == "DeepSpeedCPUAdam" and difference < 3e-6
    assert adam.compiled(adam.CPU_ADAM) and adam.choice(CPU, offload=True).live.name == "DeepSpeedCPUAdam"


if torch.cuda.is_available():

    def test_on_cuda() -> None:
        name, difference = distance_from_formula(torch.device("cuda"), offload=False)
        assert name == ("FusedAdam" if adam.operation_state(adam.FUSED_ADAM)[0] else "LeanAdamW")
        assert difference < 3e-6


def test_what_is_not_compiled_is_never_compiled_in_passing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    name, difference = distance_from_formula(CPU, offload=True)
    assert name == "LeanAdamW" and difference < 3e-6 and not any(tmp_path.iterdir())
    available, reason, how = adam.operation_state(adam.CPU_ADAM)
    assert not available and reason == "not compiled" and "CPUAdamBuilder" in how


def test_a_compiled_operation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert adam.operation_state(adam.CPU_ADAM)[1] != "compiled"
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert adam.operation_state(adam.CPU_ADAM) == (True, "compiled", "")


def test_fused_adam_is_for_cuda() -> None:
    choice = adam.choice(CPU, offload=False)
    if not torch.cuda.is_available():
        assert choice.live.name == "torch fused AdamW" and choice.alternatives[0].reason == "for CUDA devices"
    assert adam.operation_for(CPU, offload=False) is None
    assert adam.operation_for(torch.device("cuda"), offload=False) == adam.FUSED_ADAM
