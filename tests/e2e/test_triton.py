"""The Triton kernels, run on the CPU by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter(repository: Path) -> None:
    """The tests of each operation, and of what is built on them, in a process where the interpreter serves CPU
    tensors."""
    names = (
        "test_permute.py",
        "test_random_numbers.py",
        "test_expert_extremes.py",
        "test_grouped_sums.py",
        "test_grouped_mm.py::test_bias",
        "test_grouped_mm.py::test_bias_with_activation_and_its_gradient",
        "test_grouped_mm.py::test_zeros",
        "test_expert_mlp.py::test_without_weights",
        "test_expert_mlp.py::test_a_choice_of_weight_zero_still_has_a_gradient",
    )
    tests = [str(repository / "tests/unit/eve_ds/kernels" / name) for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not looped and not padded", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
