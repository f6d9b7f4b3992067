"""`bench probe`: the solver by hand and by another one, the labels of known scenes, and a tiny world end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.bench import __main__ as bench
from eve_ds.bench import probe
from eve_ds.bench.probe_labels import (
    Labels,
    class_numbers,
    kinds_to_ask,
    object_labels,
    presence_labels,
    top_left_labels,
)
from eve_ds.bench.probe_linear import RIDGES, Examples, accuracy, fit_ridges, held_out, linear_probe
from eve_ds.errors import exit_code
from eve_ds.model.backbone import Backbone
from preprocessing.shapes.scenes import Thing
from tests.support.shapes import COUNTS, model_folder, shapes_config, shapes_world
from tests.support.shards import make_caption_set, make_vqa_set


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The solver


def test_ridge_by_hand() -> None:
    """x has mean 1.5 and variance 1.25, its covariance with "class 1" is 0.5: w = 0.5 / (1.25 + 0.6 x 1.25)."""
    x, labels = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1, 1])
    (model,) = fit_ridges(x, labels, 2, ridges=[0.6])
    torch.testing.assert_close(model.weight, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(model.bias, torch.tensor([0.875, 0.125], dtype=torch.float64))
    assert model.classes(x).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("balanced", [False, True])
def test_ridge_equals_least_squares_with_the_penalty_as_rows(balanced: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 3
    labels = torch.cat([torch.zeros(5), torch.ones(45)]).long()[torch.randperm(50, generator=generator)]
    weights = torch.where(labels == 0, 0.5 / 5, 0.5 / 45).double() if balanced else torch.full((50,), 1 / 50).double()
    variance = (weights @ (x - weights @ x) ** 2).mean()
    root = weights.sqrt()[:, None]
    for ridge, model in zip(RIDGES, fit_ridges(x, labels, 2, RIDGES, balanced), strict=True):
        penalty = (ridge * variance).sqrt() * torch.eye(6, 7, dtype=torch.float64)  # none on the bias
        left = torch.cat([F.pad(x, (0, 1), value=1.0) * root, penalty])
        right = torch.cat([F.one_hot(labels).double() * root, torch.zeros(6, 2, dtype=torch.float64)])
        expected = torch.linalg.lstsq(left, right).solution
        torch.testing.assert_close(torch.cat([model.weight, model.bias[None]]), expected, rtol=1e-7, atol=1e-9)


def test_constant_features_predict_the_most_frequent_class() -> None:
    for value in (0.0, 7.1):
        features = torch.full((5, 3), value)
        for model in fit_ridges(features, torch.tensor([2, 0, 2, 1, 2]), 4):
            assert model.classes(features).tolist() == [2] * 5


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    truth, predicted = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 0, 2])
    assert accuracy(truth, predicted) == pytest.approx(5 / 7)
    assert accuracy(truth, predicted, balanced=True) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)


def test_a_tenth_of_the_images_is_held_out_with_all_their_examples() -> None:
    image = torch.arange(40).repeat_interleave(3) * 7 + 5
    held = held_out(image)
    assert image[held].tolist() == [number * 7 + 5 for number in (0, 10, 20, 30) for _ in range(3)]


def examples(count: int, generator: torch.Generator, noise: float = 0.1) -> Examples:
    """Two questions, told by a feature each: one has as many 0 as 1, the other one 1 in nine. Six more are noise."""
    labels = torch.stack([torch.arange(count) // 2 % 2, (torch.arange(count) % 9 == 3).long()], dim=1)
    features = torch.cat([labels * 2.0 - 1, torch.zeros(count, 6)], dim=1)
    return Examples(features + noise * torch.randn(count, 8, generator=generator), labels, torch.arange(count))


def test_a_probe_finds_only_what_the_features_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    fitted, tested = examples(300, generator), examples(200, generator)
    assert linear_probe(fitted, tested).accuracy == 1
    rare, rare_tested = (part._replace(labels=part.labels[:, 1:]) for part in (fitted, tested))
    blind = rare._replace(features=rare.features[:, 2:]), rare_tested._replace(features=rare_tested.features[:, 2:])
    assert linear_probe(*blind).accuracy > 0.85  # "never" is right eight times in nine
    assert 0.4 < linear_probe(*blind, balanced=True).accuracy < 0.6


def test_balanced_probes_find_rare_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    fitted, tested = (
        part._replace(labels=part.labels[:, 1:])
        for part in (examples(1000, generator, noise=1.0), examples(1000, generator, noise=1.0))
    )
    (plain,) = fit_ridges(fitted.features, fitted.labels[:, 0], 2, [1e-6])
    said_never = accuracy(tested.labels[:, 0], plain.classes(tested.features), balanced=True)
    assert linear_probe(fitted, tested, balanced=True).accuracy > max(0.8, said_never + 0.05)


def test_the_tested_split_does_not_choose_the_ridge_and_scale_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    fitted, tested = examples(100, generator, noise=2.0), examples(100, generator, noise=2.0)
    result = linear_probe(fitted, tested)
    turned = linear_probe(fitted, tested._replace(labels=1 - tested.labels))
    assert turned.ridge == result.ridge and turned.accuracy == pytest.approx(1 - result.accuracy)
    large = linear_probe(fitted._replace(features=fitted.features * 1000), tested._replace(features=tested[0] * 1000))
    assert large == result


# The labels

RED_RING = Thing(0, "ring", "red", "small")
BLUE_SQUARE = Thing(6, "square", "blue", "large")
BLUE_RING = Thing(5, "ring", "blue", "large")
SCENES = [(RED_RING, BLUE_SQUARE), (RED_RING, BLUE_RING), (BLUE_SQUARE,), (BLUE_RING, BLUE_SQUARE)]


def test_objects_are_labeled_at_their_cells() -> None:
    assert object_labels(SCENES[:2], "color") == (
        [0, 0, 1, 1],
        [0, 6, 0, 5],
        [("red",), ("blue",), ("red",), ("blue",)],
    )
    assert object_labels(SCENES[:1], "size").answers == [("small",), ("large",)]
    assert object_labels([()], "size") == ([], [], [])


def test_top_left_needs_exactly_one_object_there() -> None:
    assert top_left_labels(SCENES) == ([0, 3], [0, 0], [("red",), ("blue",)])
    cells = [cell for cell in range(16) if Thing(cell, "ring", "red", "small").quadrant == "top left"]
    assert cells == [0, 1, 4, 5]


def test_presence_labels() -> None:
    kinds = kinds_to_ask(SCENES, SCENES[1:3])
    assert kinds == [("blue", "ring"), ("blue", "square"), ("red", "ring")]
    assert kinds_to_ask(SCENES, SCENES[2:]) == [("blue", "ring")]  # all of these hold a blue square, none a red ring
    assert presence_labels(SCENES, kinds).answers == [
        (False, True, True),
        (True, False, True),
        (False, True, False),
        (True, True, False),
    ]


def test_classes_are_numbered_alike_in_both_splits() -> None:
    parts = [Labels([0, 1], [0, 0], [("red",), ("blue",)]), Labels([0], [0], [("green",)])]
    assert [part.tolist() for part in class_numbers(*parts)] == [[[2], [0]], [[1]]]
    assert class_numbers(presence_labels(SCENES[:1], [("red", "ring"), ("red", "square")]))[0].tolist() == [[1, 0]]


# End to end


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of 60 + 30 images; `model` in it has the initial values of seed 0."""
    folder = shapes_world(tmp_path_factory.mktemp("world"))
    model_folder(folder / "model", folder)
    return folder


def arguments(world: Path, **changes: object) -> list[str]:
    values = {"checkpoint": world / "model", "data": world / "data", "scenes": world / "raw/annotations", "threads": 1}
    return ["probe", *(f"--{name}={value}" for name, value in (values | changes).items())]


def probed(world: Path, tmp_path: Path, **changes: object) -> list[dict[str, Any]]:
    bench.main(arguments(world, json=tmp_path / "figures.json", **changes))
    return json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))


def test_features_are_those_of_the_two_passes() -> None:
    torch.manual_seed(0)
    backbone = Backbone(shapes_config()).eval()
    images, question = torch.randn(3, 3, 64, 64), torch.tensor([[2, 9, 8, 3]])
    found = probe.encode(backbone, images, question)
    with torch.no_grad():
        alone, joint = backbone(images).hidden, backbone(images, question.repeat(3, 1)).hidden
    assert torch.equal(found.class_token, alone[:, 0]) and torch.equal(found.patches, alone[:, 1:17])
    assert torch.equal(found.question, joint[:, 17])
    labels = Labels([2, 0], [15, 3], [("red",), ("red",)])
    expected = torch.stack([alone[2, 16], alone[0, 4]])
    assert torch.equal(found.select("patches", labels), expected)
    assert torch.equal(found.select("question", labels), joint[[2, 0], 17])


def test_rows_of_a_model_with_initial_values(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = probed(world, tmp_path)
    assert [row["probe"] for row in rows] == [one.name for one in probe.PROBES]
    for row in rows:
        assert row["accuracy"] == row["first_values"]  # the same weights, from the file and from the seed
        assert 0 < row["chance"] <= 0.75 and 0 <= row["accuracy"] <= 1
        assert row["fitted_images"] <= COUNTS["train"] and row["tested_images"] <= COUNTS["val"]
        assert set(row["ridges"].values()) <= set(RIDGES) and row["machine"]["threads"] == 1
    color, shape, size, class_token, question, presence = rows
    assert color["tested"] == shape["tested"] == size["tested"] > 2 * COUNTS["val"]
    assert color["pixels"] > 0.8 and min(row["pixels"] for row in (shape, size)) > 0.4
    assert color["accuracy"] > color["chance"] + 0.2
    assert class_token["tested"] == question["tested"] < COUNTS["val"] and class_token["pixels"] is None
    assert presence["chance"] == 0.5 and presence["balanced"] and 1 <= presence["questions"] <= 18
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["probe", "accuracy", "chance", "untrained", "pixels", "tested"]
    assert lines[5].split()[-2] == "-"
    other = probed(world, tmp_path, seed=1, images=40)
    assert [row["accuracy"] for row in other] != [row["first_values"] for row in other]
    assert other[0]["fitted_images"] == 40 and other[0]["tested"] == color["tested"]


def test_the_patch_of_an_object_is_the_one_that_is_read(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def elsewhere(features: probe.Features, place: str, labels: Labels) -> Tensor:
        return select(features, place, labels._replace(cell=[15 - cell for cell in labels.cell]))

    here = probed(world, tmp_path)[0]
    select = probe.Features.select
    monkeypatch.setattr(probe.Features, "select", elsewhere)
    assert probed(world, tmp_path)[0]["pixels"] < here["pixels"] - 0.3


def refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert exit_code(lambda: bench.main(options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_mistakes_are_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_folder(tmp_path / "large", world, image_size=96)
    model_folder(tmp_path / "mute", world, tokenizer=False)
    (model_folder(tmp_path / "bare", world) / "config.yaml").unlink()
    make_vqa_set(tmp_path / "vqa")
    make_caption_set(tmp_path / "captions")
    make_caption_set(tmp_path / "captions", split="val")
    cases: list[tuple[dict[str, object], list[str]]] = [
        ({"checkpoint": tmp_path / "large"}, ["--checkpoint", "large", "6x6 patches", "4x4 cells"]),
        ({"checkpoint": tmp_path / "mute"}, ["--checkpoint", "mute", "no tokenizer.json"]),
        ({"checkpoint": tmp_path / "bare"}, ["bare: no config.yaml beside the weights", "eve_ds.convert"]),
        ({"checkpoint": tmp_path / "none"}, ["none: no such file"]),
        ({"split": "train"}, ["--split train"]),
        ({"split": "test"}, ["data/test", "run a converter"]),
        ({"data": tmp_path / "vqa"}, ["vqa/train", "caption data is needed"]),
        ({"data": tmp_path / "captions"}, ["shard-00000.arrow: row 0", "'image-0' is not in", "--scenes"]),
        ({"scenes": tmp_path}, ["scenes_train2014.json", "No such file", "preprocessing shapes"]),
        ({"images": 1}, ["--images 1", "patch color"]),
        ({"images": 0}, ["images"]),
    ]
    for changes, words in cases:
        told = refused(arguments(world, **changes), capsys)
        assert all(word in told for word in words), told
    assert "checkpoint" in refused(["probe", "--data=x", "--scenes=y"], capsys)
    assert "must be below 2**63" in refused(arguments(world, seed=2**63), capsys)
    assert "File name too long" in refused(arguments(world, data="x" * 300), capsys)


def test_scenes_that_agree_with_the_captions_in_color_alone_are_noticed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A world drawn upside down: what is at the top is told to be at the bottom."""
    shutil.copytree(world / "raw/annotations", tmp_path / "scenes")
    path = tmp_path / "scenes/scenes_val2014.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for scene in content["scenes"]:
        for thing in scene["objects"]:
            thing["cell"] = 15 - thing["cell"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "does not fit image" in refused(arguments(world, scenes=tmp_path / "scenes"), capsys)


def test_scenes_of_another_world_are_noticed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes_world(tmp_path / "other", seed=1)
    told = refused(arguments(world, scenes=tmp_path / "other/raw/annotations"), capsys)
    assert "does not fit image" in told and "same world" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ("[]", "has no list 'scenes'"),
        ('{"scenes": []}', "order is null"),
        ('{"order": "reading", "scenes": [4]}', "scenes[0]"),
        ('{"order": "reading", "scenes": [{"image_id": 1, "objects": []}]}', "scenes[0]: has 0 objects"),
    ],
)
def test_bad_scene_files_are_refused(
    content: str, told: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "raw/annotations", tmp_path / "scenes")
    (tmp_path / "scenes/scenes_val2014.json").write_text(content, encoding="utf-8")
    error = refused(arguments(world, scenes=tmp_path / "scenes"), capsys)
    assert "scenes_val2014.json: " in error and told in error
