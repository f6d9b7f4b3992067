"""LayerNorm, and the detection of NVIDIA Apex beside PyPI's unrelated package of that name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from eve_ds.kernels import layer_norm as module
from eve_ds.kernels.layer_norm import LayerNorm, apex_state

CPU = torch.device("cpu")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder first on the import path, and nothing remembered of earlier searches."""
    monkeypatch.syspath_prepend(tmp_path)
    apex_state.cache_clear()
    module._apex_layer_norm.cache_clear()
    yield tmp_path
    apex_state.cache_clear()
    module._apex_layer_norm.cache_clear()


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(24, eps=1e-6).to(device, dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 24, device=device, dtype=dtype, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    centered = wide - wide.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = scaled * norm.weight.double() + norm.bias.double()
    expected.sum().backward()
    close = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(x.grad.double(), wide.grad, **close)


def test_a_drop_in_for_torchs() -> None:
    ours, theirs = LayerNorm(8), nn.LayerNorm(8)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LayerNorm) and ours.eps == theirs.eps
    assert ours(torch.empty(0, 8)).shape == (0, 8)


def test_pypis_apex_is_told_apart_and_never_run(packages: Path) -> None:
    write(packages / "apex" / "__init__.py", "raise SystemExit('a web toolkit')\n")
    available, reason, how = apex_state()
    assert not available and "web toolkit" in reason and "pip uninstall apex" in how
    choice = module.choice(CPU)
    assert "web toolkit" in choice.alternatives[0].reason and choice.live.name == "torch layer_norm"


def test_apex_without_its_cuda_extensions(packages: Path) -> None:
    write(packages / "apex" / "__init__.py")
    write(packages / "apex" / "normalization" / "__init__.py")
    available, reason, _ = apex_state()
    assert not available and "without its CUDA extensions" in reason


def test_apex_is_called_with_its_own_arguments(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex needs a GPU to build: a function of its signature stands in its place."""
    write(packages / "fused_layer_norm_cuda.py")
    write(packages / "apex" / "__init__.py")
    write(packages / "apex" / "normalization" / "__init__.py")
    write(
        packages / "apex" / "normalization" / "fused_layer_norm.py",
        "from torch.nn.functional import layer_norm\n"
        "calls = []\n"
        "def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):\n"
        "    calls.append(tuple(normalized_shape))\n"
        "    return layer_norm(input, normalized_shape, weight, bias, eps)\n",
    )
    monkeypatch.setattr(module, "_apex_takes", lambda x, weight: True)
    assert apex_state()[0]
    norm = LayerNorm(8, eps=1e-3)
    x = torch.randn(2, 8)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8,), eps=1e-3))
    calls = module._apex_layer_norm().__globals__["calls"]  # type: ignore[union-attr]
    assert calls == [(8,)]


def test_apex_is_not_asked_for_cpu_tensors() -> None:
    assert not module._apex_takes(torch.randn(2, 8), torch.ones(8))
    assert module.choice(CPU).live.name == "torch layer_norm"
