"""The hand-written Triton kernels beside torch's own operations, and the compiler's where these are elementwise (but
random numbers: compiled, each shape would be one of a run's few graphs).

    python -m tests.gpu.triton_rivals

Milliseconds of the device alone, at Base sizes, with all experts' loads equal and with all rows in one. A kernel that
does not win by 1.2 over the best of its rivals is named in ``to_go``, and the exit code is 1; in the dry run on the CPU
none is, because all are torch's there. Prints a JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.kernels import permute
from eve_ds.kernels.choices import triton_serves
from eve_ds.kernels.group_activation import activation_gradient_, bias_activation_
from eve_ds.kernels.grouped_mm import add_group_bias_, grouped_sum, plainly_add_group_bias_, plainly_grouped_sum
from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.model import counter_random
from tests.gpu.device_trace import trace
from tests.gpu.kit_sizes import kit_device, sizes_of

LEAST, REPEATS, WARMUP = 1.2, 5, 2
TOKENS, TOP_K = 30_336, 2
Rivals = dict[str, Callable[[], object]]  # "ours" first


def main() -> dict[str, Any]:
    device = kit_device() or torch.device("cpu")
    found: dict[str, Any] = {}
    loads = ("even", "all to one")
    all_rivals = {f"{kernel}, {load}": each for load in loads for kernel, each in kernels(device, load).items()}
    for kernel, rivals in (all_rivals | {"random numbers": drawing(device)}).items():
        ms = {f"{name}_ms": device_ms(run, device) for name, run in rivals.items()}
        found[kernel] = ms | {"wins_by": min(list(ms.values())[1:]) / ms["ours_ms"]}
    served = triton_serves(torch.empty(0, device=device))
    return found | {"to_go": [name for name, row in found.items() if served and row["wins_by"] < LEAST]}


def device_ms(run: Callable[[], object], device: torch.device) -> float:
    """Of one run. Those that write in place start from what the last one left, which their time does not depend on."""

    def several(times: int) -> None:
        for _ in range(times):
            run()

    several(WARMUP)
    return float(trace(lambda: several(REPEATS), device)["busy_ms"]) / REPEATS


def kernels(device: torch.device, load: str) -> dict[str, Rivals]:
    """By the kernel's name."""
    on_gpu, sizes = device.type == "cuda", sizes_of(device)
    tokens = TOKENS if on_gpu else sizes.tokens
    choice = torch.arange(TOP_K * tokens, device=device)
    chosen = choice % sizes.experts if load == "even" else torch.full_like(choice, 3)
    layout = permute.sort_by_expert(chosen, torch.bincount(chosen, minlength=sizes.experts))
    order, inverse, groups, rows = layout.order, layout.inverse, layout.groups, layout.order.numel()
    shapes = [(rows, sizes.hidden)] * 2 + [(rows, sizes.dim), (tokens, sizes.dim), (tokens, TOP_K)]
    torch.manual_seed(0)
    h, da, y, x, weights = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    bias_H, bias_D = (torch.randn(sizes.experts, n, device=device).bfloat16() for n in (sizes.hidden, sizes.dim))
    gelu, ours = ACTIVATIONS["gelu"], permute.operations(x)

    def gradient(of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> object:
        dh, a = of(da, h)
        return a, plainly_grouped_sum(dh, groups)

    def each(function: Callable[..., object], rival: Callable[..., object], *inputs: object) -> Rivals:
        return {"ours": lambda: function(*inputs), "torch": lambda: rival(*inputs)}

    found: dict[str, Rivals] = {
        "sums of hidden": each(grouped_sum, plainly_grouped_sum, da, groups),
        "sums of dim": each(grouped_sum, plainly_grouped_sum, y, groups),
        "activation's gradient": {
            "ours": lambda: activation_gradient_(da, h, groups, gelu),
            "torch": lambda: gradient(gradient_and_value),
        },
        "bias, activation": {
            "ours": lambda: bias_activation_(h, bias_H, groups, gelu),
            "torch": lambda: F.gelu(plainly_add_group_bias_(h, bias_H, groups)),
        },
        "bias": each(add_group_bias_, plainly_add_group_bias_, y, bias_D, groups),
        "gather": each(ours.gather_rows, permute.gather_rows, x, order, tokens * TOP_K, TOP_K),
        "weighted sum": each(ours.sum_rows, permute.sum_rows, y, weights, inverse, TOP_K),
        "weighted gradients": each(ours.weighted_gradients, permute.weighted_gradients, x, y, weights, order, inverse),
    }
    if on_gpu:
        compiled = torch.compile(gradient_and_value, fullgraph=True, dynamic=False)
        biased = torch.compile(biased_and_value, fullgraph=True, dynamic=False)
        found["activation's gradient"]["compiled"] = lambda: gradient(compiled)
        found["bias, activation"]["compiled"] = lambda: biased(h, bias_H, groups.group_of_row(rows))
    return found


def drawing(device: torch.device) -> Rivals:
    """Random numbers as EVE-Base's masks of 256 images take them."""
    samples, places = torch.arange(256, device=device)[:, None], torch.arange(196, device=device)
    return {
        "ours": lambda: counter_random.random_bits(0, 1, samples, places),
        "torch": lambda: counter_random.plain_numbers(1, samples, places, False),
    }


def gradient_and_value(da: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.gelu_backward(da, h), F.gelu(h)


def biased_and_value(x: Tensor, bias: Tensor, group_R: Tensor) -> tuple[Tensor, Tensor]:
    h = x + bias[group_R]
    return h, F.gelu(h)


if __name__ == "__main__":
    figures = main()
    print(json.dumps(figures))
    sys.exit(bool(figures["to_go"]))
