"""Position embeddings for another image size against a direct bicubic interpolation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks import load_task_model
from eve_ds.tasks.vqa import VQA
from eve_ds.weights.load import POSITIONS, interpolate_positions
from preprocessing.errors import UserError

ASSETS = Path(__file__).parents[3] / "assets"


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """[new, old]: Keys' cubic convolution (a = -0.75) at half-pixel centers, borders repeated."""
    matrix = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            distance = abs(center - tap)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            matrix[row, min(max(tap, 0), old - 1)] += weight
    return matrix


def directly(positions: Tensor, new: int) -> np.ndarray:
    """[1 + new^2, D] from [1 + old^2, D], class position first, in float64."""
    old = round((positions.shape[0] - 1) ** 0.5)
    matrix, grid = cubic_matrix(old, new), positions[1:].reshape(old, old, -1).double().numpy()
    resized = np.einsum("ri,cj,ijd->rcd", matrix, matrix, grid).reshape(new * new, -1)
    return np.concatenate([positions[:1].double().numpy(), resized])


# 224 -> 384 and 480 pixels as published (patch 16), other sizes up and down, also to and from one row; the same size.
@pytest.mark.parametrize(
    ("old", "new"), [(14, 24), (14, 30), (14, 15), (14, 37), (24, 14), (4, 2), (3, 7), (2, 1), (1, 3), (3, 3)]
)
def test_bicubic(old: int, new: int) -> None:
    torch.manual_seed(0)
    positions = torch.randn(1 + old**2, 5)
    before = positions.clone()
    out = interpolate_positions(positions, new**2)
    assert torch.equal(out[0], positions[0]) and torch.equal(positions, before)
    np.testing.assert_allclose(out.numpy(), directly(positions, new), atol=1e-5)
    assert old != new or torch.equal(out, positions)


def test_constant_and_transposed_positions() -> None:
    """Properties of any interpolation by rows and columns, whatever its kernel."""
    torch.manual_seed(0)
    constant = torch.full((1 + 14**2, 3), 2.5)
    torch.testing.assert_close(interpolate_positions(constant, 24**2), torch.full((1 + 24**2, 3), 2.5))
    grid = torch.randn(14, 14, 3)
    class_position = torch.randn(1, 3)
    upright = interpolate_positions(torch.cat([class_position, grid.flatten(0, 1)]), 24**2)
    turned = interpolate_positions(torch.cat([class_position, grid.transpose(0, 1).flatten(0, 1)]), 24**2)
    torch.testing.assert_close(turned[1:].view(24, 24, 3).transpose(0, 1), upright[1:].view(24, 24, 3))


@pytest.mark.parametrize("image_size", [224, 384, 480, 240])
def test_a_model_folder_loads_at_another_size(image_size: int, tmp_path: Path) -> None:
    config = ModelConfig(dim=8, depth=2, num_heads=2, mlp_hidden=8, vocab_size=20, soft_layers=[1], num_experts=2)
    torch.manual_seed(0)
    state = VQA(Backbone(config), 3).state_dict()
    state[POSITIONS] = torch.randn(1 + 14**2, 8)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(config)}))
    loaded = load_task_model("vqa", tmp_path, image_size=image_size)
    assert loaded.config.image_size == image_size
    got = loaded.state_dict()
    np.testing.assert_allclose(got.pop(POSITIONS).numpy(), directly(state[POSITIONS], image_size // 16), atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in got.items())
    text = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert loaded.predict(torch.randn(1, 3, image_size, image_size), text, text).isfinite().all()
    with pytest.raises(ValueError, match=r"model\.image_size"):
        loaded.predict(torch.randn(1, 3, image_size + 16, image_size + 16), text, text)


@pytest.mark.parametrize("patches", [2, 5, 6])
def test_a_published_file_loads_at_another_size(patches: int) -> None:
    """The golden file has 4 x 4 patches of 8 pixels."""
    file = ASSETS / "vqa.safetensors"
    loaded = load_task_model("vqa", file, ASSETS / "vlmo_config.json", image_size=8 * patches)
    published = load_file(file)["backbone.pos_embed_vision"]
    got = loaded.backbone.image_embedding.positions.detach().numpy()
    np.testing.assert_allclose(got, directly(published, patches), atol=1e-5)


def test_dtype_is_kept_and_the_sum_is_in_float32() -> None:
    positions = torch.randn(5, 3).bfloat16()
    out = interpolate_positions(positions, 16)
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.float().numpy(), directly(positions.float(), 4), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(6, 9), (4, 10)])
def test_grids_must_be_square(old: int, new: int) -> None:
    with pytest.raises(UserError, match="square"):
        interpolate_positions(torch.zeros(1 + old, 3), new)
