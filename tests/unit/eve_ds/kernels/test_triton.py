"""The Triton kernels compile for two generations of NVIDIA GPUs. tests/e2e/test_triton.py runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eve_ds.kernels import triton_groups, triton_kernels, triton_random

INTEGERS = dict.fromkeys(["dim", "num_choices", "rows", "width", "bias_stride", "groups", "values"], "i32")
INTEGERS |= dict.fromkeys(triton_random.SIZES, "i32") | {"key": "i64"}
INDICES = {"order": "*i64", "inverse": "*i64", "offsets": "*i32", "first": "*i64", "second": "*i64"}
CONSTANTS: dict[str, Any] = {
    "TOP_K": 2, "WEIGH": True, "SUM_IN": tl.float32, "COMPUTE_IN": tl.float32, "BLOCK": 256, "GROUPS": 32,
    "ROWS": 16, "STEPS": 16,
    "STEP": 4, "TILES": 16, "UNIFORM": True,
}  # fmt: skip
KERNELS = [
    (triton_kernels._gather_kernel, ""),
    (triton_kernels._sum_kernel, ""),
    (triton_kernels._gradients_kernel, ""),
    (triton_groups._bias_kernel, ""),
    (triton_groups._bias_kernel, "gelu"),
    (triton_groups._bias_kernel, "quick_gelu"),
    (triton_groups._sum_rows_kernel, ""),
    (triton_groups._sum_rows_kernel, "gelu"),
    (triton_groups._sum_rows_kernel, "quick_gelu"),
    (triton_groups._sum_tiles_kernel, ""),
    (triton_groups._zero_rest_kernel, ""),
    (triton_groups._zero_empty_kernel, ""),
    (triton_random._random_kernel, ""),
]


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile(capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their products of numbers with strides are int64's: rows beyond 2^31 elements have a place, too."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, activation in KERNELS:
        constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
        constants |= {"ACTIVATION": activation} if "ACTIVATION" in kernel.arg_names else {}
        types = INTEGERS | INDICES | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
        assert compiled.asm["cubin"], kernel
        products = re.findall(r"arith\.muli .*: (\S+)", compiled.asm["ttir"])
        assert products and all("i64" in kind for kind in products), (kernel, products)
