"""`bench words` on a tiny world: its shares beside the same ones taken directly, and mistakes in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eve_ds.bench import __main__ as bench
from eve_ds.data.batch_reader import collate
from eve_ds.data.samples import CaptionSamples
from eve_ds.data.transforms import build_transform
from eve_ds.errors import exit_code
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import load_task_model
from eve_ds.tasks.base import Batch
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from preprocessing.__main__ import main
from preprocessing.text.tokenizer import Tokenizer
from tests.support.shapes import COUNTS, model_folder, shapes_config, shapes_world
from tests.support.shards import make_vqa_set

CAPTIONS = 5 * COUNTS["val"]
LONGEST = 32
STEPS = 80
KIND_OF = {
    "color": "red green blue yellow purple black",
    "shape": "ring square triangle rings squares triangles",
    "place": "top bottom left right",
    "number": "no nothing one two three four five",
    "other": "a and at in is objects the there , :",
}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of 30 val images, a tokenizer with a token for each of its words, and a model."""
    folder = shapes_world(tmp_path_factory.mktemp("world"))
    train = ["tokenizer", "train", "--data", str(folder / "data/train"), "--vocab-size", "512"]
    assert main([*train, "--out", str(folder / "words")]) == 0
    trained_model(folder / "model", folder)
    return folder


def trained_model(folder: Path, world: Path) -> None:
    """A model folder after STEPS of pre-training: some words are right, and some of them for what the image shows."""
    tokenizer = Tokenizer.load(world / "words/tokenizer.json")
    config = dataclasses.replace(
        shapes_config(), vocab_size=tokenizer.vocab_size, max_text_length=LONGEST, text_positions=LONGEST
    )
    objective = ObjectiveConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2)
    torch.manual_seed(0)
    task = MaskedModeling(Backbone(config), objective, tokenizer.mask_id)
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for batch in islice(cycle(batches(world, "train")), STEPS):
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
    folder.mkdir()
    save_file(task.state_dict(), folder / "model.safetensors")
    sections = {"model": dataclasses.asdict(config), "objective": dataclasses.asdict(objective)}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((world / "words/tokenizer.json").read_bytes())


def batches(world: Path, split: str, size: int = 50) -> list[Batch]:
    """All captions of a split, in their order."""
    tokenizer = Tokenizer.load(world / "words/tokenizer.json")
    samples = CaptionSamples(world / "data" / split, tokenizer, build_transform(64, train=False), LONGEST)
    assert len(samples) == 5 * COUNTS[split]
    chosen = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
    return [collate([samples[number, 0] for number in numbers], samples.pad_id, LONGEST) for numbers in chosen]


def arguments(world: Path, **changes: object) -> list[str]:
    values = {"checkpoint": world / "model", "data": world / "data", "scenes": world / "raw/annotations", "threads": 1}
    return ["words", *(f"--{name}={value}" for name, value in (values | changes).items())]


def measured(world: Path, tmp_path: Path, **changes: object) -> dict[str, dict[str, Any]]:
    """The rows by their kind of word."""
    bench.main(arguments(world, json=tmp_path / "figures.json", **changes))
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert len({row["words"] for row in rows}) == len(rows) and rows[0]["words"] == "all"
    return {row["words"]: row for row in rows}


def counted(world: Path, batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """How many masked words of each kind a batch has, and how many of them the model predicts."""
    task = load_task_model("pretrain", checkpoint=str(world / "model"))
    assert isinstance(task, MaskedModeling)
    tokenizer = Tokenizer.load(world / "words/tokenizer.json")
    kinds = {word: kind for kind, words in KIND_OF.items() for word in words.split()}
    count, right = Counter(), Counter()
    for entry in task.predict_words(batch):
        for truth, predicted in zip(entry["truth"], entry["predicted"], strict=True):
            for kind in ("all", kinds[tokenizer.decode([truth]).strip()]):
                count[kind] += 1
                right[kind] += predicted == truth
    return count, right


def test_rows_of_a_model(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(world, tmp_path)
    assert list(rows) == ["all", "color", "shape", "place", "number", "other"]  # captions tell no size
    whole, parts = rows["all"], list(rows.values())[1:]
    assert whole["share"] == 1 and sum(row["share"] for row in parts) == pytest.approx(1)
    assert sum(row["count"] for row in parts) == whole["count"] > 5 * CAPTIONS
    for name in ("accuracy", "shuffled", "oracle"):
        mean = sum(row["share"] * row[name] for row in parts)
        assert whole[name] == pytest.approx(mean)
    assert whole["oracle"] > 0.99
    for row in rows.values():
        assert max(row["accuracy"], row["shuffled"]) <= row["oracle"] <= 1
        assert row["of_oracle"] == pytest.approx(row["accuracy"] / row["oracle"])
        assert row["share"] == pytest.approx(row["count"] / whole["count"])
        assert (row["split"], row["machine"]["threads"]) == ("val", 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:8]]
    assert " ".join(lines[0]) == "words of words accuracy other image oracle of oracle masked"
    for line, (kind, row) in zip(lines[1:], rows.items(), strict=False):
        figures = [f"{row[key]:.3f}" for key in ("share", "accuracy", "shuffled", "oracle", "of_oracle")]
        assert line == [kind, *figures, str(row["count"])]


@pytest.mark.parametrize("captions", [CAPTIONS, 37])
def test_figures_are_those_of_the_model_itself(captions: int, world: Path, tmp_path: Path) -> None:
    """One batch here; parts of it in the benchmark, and the model's with its own image do not depend on the parts."""
    count, right = counted(world, batches(world, "val", captions)[0])
    rows = measured(world, tmp_path, captions=captions, batch_size=20)
    assert {kind: row["count"] for kind, row in rows.items()} == count
    for kind, row in rows.items():
        assert row["accuracy"] == pytest.approx(right[kind] / count[kind])
    assert 0.2 < rows["all"]["accuracy"] < 0.9


def test_the_other_image_is_the_next_one(world: Path, tmp_path: Path) -> None:
    batch = batches(world, "val", CAPTIONS)[0]
    count, right = counted(world, batch | {"images": batch["images"].roll(-5, dims=0)})  # an image has five captions
    rows = measured(world, tmp_path, batch_size=CAPTIONS)
    for kind, row in rows.items():
        assert row["shuffled"] == pytest.approx(right[kind] / count[kind])
    assert any(row["shuffled"] != row["accuracy"] for row in rows.values())  # the model looks at the image


def test_no_other_image_in_the_batch(world: Path, tmp_path: Path) -> None:
    rows = measured(world, tmp_path, captions=5, batch_size=5)  # all of one image
    assert {row["shuffled"] for row in rows.values()} == {None}


def scenes_changed(world: Path, folder: Path, **changes: object) -> Path:
    """A folder with the scene file of val, changed."""
    content = json.loads((world / "raw/annotations/scenes_val2014.json").read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    (folder / "scenes_val2014.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def test_an_unknown_order_lowers_the_oracle(world: Path, tmp_path: Path) -> None:
    folders = {order: scenes_changed(world, tmp_path / order, order=order) for order in ("reading", "random")}
    reading, random = (measured(world, tmp_path, captions=60, scenes=folder) for folder in folders.values())
    assert random["color"]["oracle"] < 0.97 * reading["color"]["oracle"]
    unchanged = [(row["count"], row["accuracy"], row["shuffled"]) for row in reading.values()]
    assert [(row["count"], row["accuracy"], row["shuffled"]) for row in random.values()] == unchanged


# Mistakes


def refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert exit_code(lambda: bench.main(options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_mistakes_are_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_folder(tmp_path / "mute", world, tokenizer=False)
    (model_folder(tmp_path / "bare", world) / "config.yaml").unlink()
    weights = model_folder(tmp_path / "tuned", world) / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name.startswith("backbone.")}, weights)
    make_vqa_set(tmp_path / "vqa", split="val")
    cases: list[tuple[dict[str, object], list[str]]] = [
        ({"checkpoint": tmp_path / "mute"}, ["--checkpoint", "mute", "no tokenizer.json"]),
        ({"checkpoint": tmp_path / "bare"}, ["bare: no config.yaml beside the weights", "eve_ds.convert"]),
        ({"checkpoint": tmp_path / "none"}, ["none: no such file"]),
        ({"checkpoint": tmp_path / "tuned"}, ["--checkpoint", "tuned", "no word decoder", "pre-training run"]),
        ({"split": "test"}, ["data/test", "run a converter"]),
        ({"data": tmp_path / "vqa"}, ["vqa/val", "caption data is needed"]),
        ({"scenes": tmp_path}, ["scenes_val2014.json", "No such file", "preprocessing shapes"]),
        ({"scenes": world / "raw/annotations/scenes_val2014.json"}, ["--scenes", "is a file; name its folder"]),
        ({"captions": 0}, ["captions"]),
        ({"batch_size": 0}, ["batch_size"]),
    ]
    for changes, words in cases:
        told = refused(arguments(world, **changes), capsys)
        assert all(word in told for word in words), told


def test_scenes_of_another_world_are_noticed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes_world(tmp_path / "other", seed=1, splits=("train",))
    told = refused(arguments(world, scenes=tmp_path / "other/raw/annotations"), capsys)
    assert "does not fit image" in told and "same world" in told


def test_scenes_with_the_same_colors_but_other_shapes_are_noticed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((world / "raw/annotations/scenes_val2014.json").read_text(encoding="utf-8"))
    for item in content["scenes"][3]["objects"]:
        item["shape"] = {"ring": "square", "square": "triangle", "triangle": "ring"}[item["shape"]]
    (tmp_path / "scenes_val2014.json").write_text(json.dumps(content), encoding="utf-8")
    told = refused(arguments(world, scenes=tmp_path), capsys)
    assert re.search(r"row 3: its caption '.*' does not fit image \d+ of .*scenes_val2014.json", told)


def test_later_captions_of_another_scene_are_noticed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second caption of image 3 is that of image 4."""
    path = world / "raw/annotations/captions_val2014.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"][16]["caption"] = content["annotations"][20]["caption"]
    (tmp_path / path.name).write_text(json.dumps(content), encoding="utf-8")
    where = ["--images", str(world / "raw/images"), "--split", "val", "--out", str(tmp_path / "data")]
    assert main(["coco", "--annotations", str(tmp_path / path.name), *where]) == 0
    told = refused(arguments(world, data=tmp_path / "data"), capsys)
    assert re.search(r"row 3: caption 1[5-9] does not fit its scene", told) and "--scenes" in told


def test_captions_in_another_order_are_noticed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [*(f"--{split}={count}" for split, count in COUNTS.items()), "--nlvr-train=8", "--nlvr-dev=8"]
    raw = tmp_path / "raw"
    assert main(["shapes", "--out", str(raw), "--order", "random", *counts, "--nlvr-test=8"]) == 0
    where = ["--images", str(raw / "images"), "--split", "val", "--out", str(tmp_path / "data")]
    assert main(["coco", "--annotations", str(raw / "annotations/captions_val2014.json"), *where]) == 0
    told = refused(arguments(world, data=tmp_path / "data"), capsys)
    assert "does not fit" in told
    rows = measured(world, tmp_path, data=tmp_path / "data", scenes=raw / "annotations", captions=40)
    assert rows["color"]["oracle"] < 0.98
