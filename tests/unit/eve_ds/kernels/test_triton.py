"""The Triton kernels compile for two generations of NVIDIA GPUs. tests/e2e/test_triton.py runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eve_ds.kernels import triton_kernels

INTEGERS = dict.fromkeys(["dim", "num_choices", "width", "bias_stride", "groups"], "i32")
INDICES = {"order": "*i64", "inverse": "*i64", "offsets": "*i32"}
CONSTANTS: dict[str, Any] = {"TOP_K": 2, "WEIGH": True, "SUM_IN": tl.float32, "BLOCK": 256, "GROUPS": 32}


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile(capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = (
        triton_kernels._gather_kernel,
        triton_kernels._sum_kernel,
        triton_kernels._gradients_kernel,
        triton_kernels._bias_kernel,
    )
    for kernel in kernels:
        constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
        types = INTEGERS | INDICES | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
        assert compiled.asm["cubin"], kernel
