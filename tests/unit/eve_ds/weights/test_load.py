"""Weights files of all kinds, and strict loading."""

from __future__ import annotations

import argparse
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE
from eve_ds.weights.load import interpolate_positions, load_state, load_weights
from preprocessing.errors import UserError
from tests.support.published import load_published

ASSETS = Path(__file__).parents[3] / "assets"
STATE = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


class Model(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)


def same(state: dict[str, Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", ["pt", "pth", "th", "bin"])
def test_torch_files_wrapped_or_bare(tmp_path: Path, suffix: str) -> None:
    options = argparse.Namespace(lr=1e-3, model="eve")  # as unilm's scripts save them
    for content in (STATE, OrderedDict(STATE), {"model": STATE, "args": options, "epoch": 3}, {"module": STATE}):
        torch.save(content, tmp_path / f"weights.{suffix}")
        assert same(load_weights(tmp_path / f"weights.{suffix}"))


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.safetensors")
    assert same(load_weights(tmp_path / "weights.safetensors"))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Payload()}, tmp_path / "weights.th")
    with pytest.raises(UserError, match=r"weights\.th: not a readable weights file"):
        load_weights(tmp_path / "weights.th")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_a_plain_pickle_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"model": Payload()}, protocol=4))
    with pytest.raises(UserError, match=r"weights\.pt: not a readable weights file"):
        load_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_files_are_refused_and_never_crash(tmp_path: Path, name: str) -> None:
    whole, path = tmp_path / f"whole-{name}", tmp_path / name
    if name == "weights.pt":
        torch.save({"model": STATE}, whole)
    else:
        save_file(STATE, whole)
    content, draw, refused = whole.read_bytes(), random.Random(0), 0
    for attempt in range(300):
        damaged = bytearray(content[: draw.randrange(len(content))] if attempt % 3 == 0 else content)
        for _ in range(draw.choice([1, 3, 30])):
            if damaged:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            load_weights(path)  # a changed value cannot be told from another one
        except UserError as error:
            refused += str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 150


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt", "empty.pt", "list.pt", "notes.txt", "absent.pt"])
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "list.pt":
        torch.save([1, 2], path)
    elif name != "absent.pt":
        path.write_bytes(b"" if name == "empty.pt" else b"not weights at all")
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_differs_is_listed() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    shapes = {"0.weight": (3, 3), "0.bias": (3,), "1.weight": (1, 3), "2.bias": (1,)}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError) as caught:
        load_state(module, state, "file.pt")
    message = str(caught.value)
    assert message.startswith("file.pt: ")
    for part in ("missing: 1.bias", "unknown: 2.bias", "0.weight is [3, 3], the model has [3, 2]"):
        assert part in message
    state["0.weight"] = torch.ones(3, 2)
    del state["2.bias"]
    load_state(module, state, "file.pt", may_lack=["1."])
    assert (module[0].weight == 1).all()


def test_published_file_at_another_image_size() -> None:
    config = ModelConfig.from_vlmo(ASSETS / "vlmo_config.json", image_size=48)
    model = Model(config)
    load_published(model, ASSETS / "vqa.safetensors", config)
    published = load_weights(ASSETS / "vqa.safetensors")["backbone.pos_embed_vision"]
    assert torch.equal(model.backbone.image_embedding.positions, interpolate_positions(published, 36))
    assert model.backbone(torch.zeros(1, 3, 48, 48)).hidden.isfinite().all()


def test_an_expert_parallel_rank_takes_its_part() -> None:
    whole = MoE(4, 6, 8, 2, seed=1)
    part = MoE(4, 6, 8, 2, seed=2, ep_size=4, ep_rank=3)
    state = {f"moe.{name}": tensor for name, tensor in whole.state_dict().items()}
    load_state(nn.ModuleDict({"moe": part}), state, "file")
    for name in ("w1", "w2", "w3"):
        assert torch.equal(getattr(part.experts, name), getattr(whole.experts, name)[6:])


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf")):
        save_file({"good": torch.ones(2), "bad": torch.tensor([1.0, bad])}, tmp_path / "weights.safetensors")
        with pytest.raises(UserError, match=r"weights\.safetensors: holds values that are not finite \(bad\)"):
            load_weights(tmp_path / "weights.safetensors")
    layer = torch.nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2, dtype=torch.int32), "bias": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(UserError, match=r"file: .*; not of floating point: weight \(torch\.int32\)$"):
        load_state(layer, state, "file")
