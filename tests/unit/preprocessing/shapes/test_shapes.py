import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing.shapes.captions import wordings
from preprocessing.shapes.drawing import CELL, SIDE, draw
from preprocessing.shapes.questions import questions, ten_answers
from preprocessing.shapes.scenes import (
    COLORS,
    FEWEST,
    GRID,
    MOST,
    QUADRANTS,
    SHAPES,
    SIZES,
    Scene,
    SceneSampler,
    Thing,
    read_scenes,
)
from preprocessing.shapes.statements import pair_set
from tests.unit.preprocessing.helpers import IMAGES, convert

things = st.builds(
    Thing, st.integers(0, GRID**2 - 1), st.sampled_from(SHAPES), st.sampled_from(COLORS), st.sampled_from(SIZES)
)
scenes = st.lists(things, min_size=FEWEST, max_size=MOST, unique_by=lambda thing: thing.cell).map(
    lambda found: tuple(sorted(found))
)
kinds = st.tuples(st.sampled_from(COLORS), st.sampled_from(SHAPES))


def sample(count: int, seed: int = 0) -> list[Scene]:
    sampler = SceneSampler(random.Random(seed))
    return [sampler.draw() for _ in range(count)]


def official_accuracy(answer: str, people: list[str]) -> float:
    return min(1.0, 0.3 * people.count(answer)) if people.count(answer) < 4 else 1.0


# Scenes


def test_scenes_are_valid_and_never_repeat() -> None:
    drawn = sample(2000)
    assert len(set(drawn)) == 2000
    assert {len(scene) for scene in drawn} == {2, 3, 4, 5}
    for scene in drawn:
        assert len({thing.cell for thing in scene}) == len(scene)


@given(st.sets(kinds, max_size=2), st.sets(kinds, max_size=2), st.integers(0, 99))
def test_scenes_hold_what_they_must_and_nothing_they_must_not(
    present: set[tuple[str, str]], absent: set[tuple[str, str]], seed: int
) -> None:
    present -= absent
    scene = SceneSampler(random.Random(seed)).draw(frozenset(present), frozenset(absent))
    found = {thing.kind for thing in scene}
    assert present <= found and not absent & found


def test_quadrants() -> None:
    assert [Thing(cell, "ring", "red", "small").quadrant for cell in (0, 3, 12, 15)] == list(QUADRANTS)
    assert [Thing(cell, "ring", "red", "small").quadrant for cell in (5, 6, 9, 10)] == list(QUADRANTS)


# Images


def test_every_object_stays_in_its_cell() -> None:
    drawn = sample(200)
    images = draw(drawn, np.random.default_rng(0))
    assert images.shape == (200, SIDE, SIDE, 3) and images.dtype == np.uint8
    for scene, image in zip(drawn, images, strict=True):
        cells = image.reshape(GRID, CELL, GRID, CELL, 3).astype(int)
        spread = np.ptp(cells, axis=(1, 3)).max(axis=-1).reshape(-1)  # an empty cell holds ground and noise alone
        assert {int(cell) for cell in np.flatnonzero(spread > 40)} == {thing.cell for thing in scene}


def test_same_scene_same_seed_same_image() -> None:
    drawn = sample(5)
    one, two = (draw(drawn, np.random.default_rng(7)) for _ in range(2))
    assert (one == two).all()
    assert (draw(drawn, np.random.default_rng(8)) != one).any(axis=(1, 2, 3)).all()


def test_kinds_and_sizes_can_be_told_apart() -> None:
    drawn = [(Thing(5, shape, color, size),) for shape in SHAPES for color in COLORS for size in SIZES]
    images = draw(drawn, np.random.default_rng(0)).reshape(len(drawn), -1).astype(int)
    for index in range(len(drawn)):
        others = np.delete(np.abs(images - images[index]).max(axis=1), index)
        assert others.min() > 40


# Questions


def true_answer(text: str, scene: Scene) -> str:
    """Answers a question from its text alone, as a reader of the image would."""
    words = text.rstrip("?").lower().split()
    shape = next((shape for shape in SHAPES if shape in words or f"{shape}s" in words), None)
    color = next((color for color in COLORS if color in words), None)
    quadrant = next((quadrant for quadrant in QUADRANTS if quadrant in text), None)
    fitting = [
        thing
        for thing in scene
        if shape in (None, thing.shape) and color in (None, thing.color) and quadrant in (None, thing.quadrant)
    ]
    if words[:2] == ["is", "there"]:
        return "yes" if fitting else "no"
    if words[:2] == ["how", "many"]:
        return str(len(fitting))
    assert len(fitting) == 1
    return fitting[0].color if words[1] == "color" else fitting[0].shape


@settings(max_examples=20)
@given(st.lists(scenes, min_size=1, max_size=8), st.integers(0, 9))
def test_answers_are_true(drawn: list[Scene], seed: int) -> None:
    asked = questions(drawn, random.Random(seed))
    assert len({(question.scene, question.text) for question in asked}) == len(asked)
    for question in asked:
        assert question.answer == true_answer(question.text, drawn[question.scene])


def test_questions_are_balanced_over_a_large_split() -> None:
    drawn = sample(3000)
    asked = questions(drawn, random.Random(0))
    assert 4.5 < len(asked) / len(drawn) < 6.5
    per_image = Counter(question.scene for question in asked)
    assert len(per_image) == 3000 and max(per_image.values()) <= 9
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for question in asked:
        by_text[question.text][question.answer] += 1
    for text, answers in by_text.items():
        if set(answers) <= {"yes", "no"}:
            assert answers["yes"] == answers["no"], text
        else:
            assert max(answers.values()) <= 0.42 * answers.total(), text
    total = Counter(question.answer for question in asked)
    assert 0.15 < total.most_common(1)[0][1] / len(asked) < 0.32
    prior = sum(max(answers.values()) for answers in by_text.values()) / len(asked)
    assert prior < 0.42  # what a model that reads the question alone can reach, but for the score of mistakes


def test_people_disagree_a_little() -> None:
    asked = questions(sample(500), random.Random(0))
    rng = random.Random(1)
    said = [ten_answers(question, rng) for question in asked]
    for question, people in zip(asked, said, strict=True):
        assert len(people) == 10 and people.count(question.answer) >= 8
    assert 0.05 < sum(len(set(people)) > 1 for people in said) / len(said) < 0.2


# Statements


def test_each_statement_is_true_of_two_pairs_and_the_labels_are_right() -> None:
    rng = random.Random(0)
    sampler = SceneSampler(rng)
    right_alone: list[bool] = []
    for index in range(90):
        group = pair_set(index, sampler, rng)
        assert len(group.pairs) == 4 and len(group.sentences) == len(group.labels) == 2
        for sentence, labels in zip(group.sentences, group.labels, strict=True):
            assert sum(labels) == 2
            color, shape = (next(word for word in sentence.split() if word in names) for names in (COLORS, SHAPES))
            inside = [tuple((color, shape) in {t.kind for t in side} for side in pair) for pair in group.pairs]
            if "both" in sentence:
                assert list(labels) == [left and right for left, right in inside]
            else:
                side = int("right" in sentence)
                assert list(labels) == [pair[side] for pair in inside]
                right_alone += [label == pair[1 - side] for label, pair in zip(labels, inside, strict=True)]
    assert sum(right_alone) == len(right_alone) / 2  # the image that is not spoken of tells nothing


# Files


def load(raw: Path, split: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    read = [
        json.loads((raw / name).read_text())
        for name in (
            f"annotations/captions_{split}2014.json",
            f"vqa/v2_OpenEnded_mscoco_{split}2014_questions.json",
            f"vqa/v2_mscoco_{split}2014_annotations.json",
        )
    ]
    return read[0], read[1]["questions"], read[2]["annotations"]


def test_files_are_as_coco_and_vqa_ship_them(raw: Path) -> None:
    image_ids: set[int] = set()
    for split, count in IMAGES.items():
        captioned, asked, answered = load(raw, split)
        names = sorted(path.name for path in (raw / f"images/{split}2014").iterdir())
        assert names == [image["file_name"] for image in captioned["images"]] and len(names) == count
        assert names[0] == f"COCO_{split}2014_{captioned['images'][0]['id']:012d}.png"
        ids = {image["id"] for image in captioned["images"]}
        assert Counter(a["image_id"] for a in captioned["annotations"]) == dict.fromkeys(ids, 5)
        assert not ids & image_ids
        image_ids |= ids
        assert [q["question_id"] for q in asked] == [a["question_id"] for a in answered]
        for question, annotation in zip(asked, answered, strict=True):
            assert question["question_id"] // 1000 == question["image_id"] == annotation["image_id"]
            assert question["question"].lower().startswith(annotation["question_type"])
            assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        assert {a["answer_type"] for a in answered} == {"yes/no", "number", "other"}


def test_scene_files_say_what_is_in_each_image(raw: Path) -> None:
    for split, count in IMAGES.items():
        captioned, _, _ = load(raw, split)
        path = raw / f"annotations/scenes_{split}2014.json"
        order, read = read_scenes(path)
        assert order == "reading"
        assert list(read) == [image["id"] for image in captioned["images"]] and len(read) == count
        for image in captioned["images"]:
            with Image.open(raw / f"images/{split}2014" / image["file_name"]) as file:
                cells = np.asarray(file).reshape(GRID, CELL, GRID, CELL, 3).astype(int)
            spread = np.ptp(cells, axis=(1, 3)).max(axis=-1).reshape(-1)  # as in the test of drawing above
            assert np.flatnonzero(spread > 40).tolist() == [thing.cell for thing in read[image["id"]]]
        for annotation in captioned["annotations"]:
            assert annotation["caption"] in set(wordings(read[annotation["image_id"]]))
        content = json.loads(path.read_text())
        assert list(content) == ["info", "license", "order", "scenes"]
        assert list(content["scenes"][0]["objects"][0]) == ["cell", "shape", "color", "size"]


def test_no_image_file_is_in_two_splits(raw: Path) -> None:
    files = [path.read_bytes() for path in raw.rglob("*.png")]
    assert len(files) == len(set(files)) == 100 + 88


def test_no_scene_is_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in an image, be its noise, shading and shifts as they may, is in no other image of the world."""
    from preprocessing.shapes import generate

    drawn: list[Scene] = []
    images = generate.draw
    monkeypatch.setattr(generate, "draw", lambda scenes, rng: drawn.extend(scenes) or images(scenes, rng))
    counts = ("--train", 300, "--val", 50, "--test", 50, "--nlvr-train", 160, "--nlvr-test", 80)
    convert("shapes", "--out", tmp_path / "raw", *counts)
    assert len(drawn) == len(set(drawn)) == 400 + 160 + 400 + 80


def test_text_alone_reaches_little(tmp_path: Path) -> None:
    """The best model of the question's text, made on train and scored on test as VQA v2 is."""
    convert("shapes", "--out", tmp_path / "raw", "--train", 600, "--val", 8, "--test", 200,
            "--nlvr-train", 8, "--nlvr-dev", 8, "--nlvr-test", 160)  # fmt: skip
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    _, asked, answered = load(tmp_path / "raw", "train")
    for question, annotation in zip(asked, answered, strict=True):
        by_text[question["question"]][annotation["multiple_choice_answer"]] += 1
    overall = sum(by_text.values(), Counter())
    _, asked, answered = load(tmp_path / "raw", "test")
    said = [[answer["answer"] for answer in annotation["answers"]] for annotation in answered]
    guesses = [by_text[question["question"]].most_common(1)[0][0] for question in asked]
    prior = [official_accuracy(guess, people) for guess, people in zip(guesses, said, strict=True)]
    majority = [official_accuracy(overall.most_common(1)[0][0], people) for people in said]
    assert np.mean(prior) < 0.45
    assert 0.15 < np.mean(majority) < 0.3

    examples = [json.loads(line) for line in (tmp_path / "raw/nlvr2/test1.json").read_text().splitlines()]
    by_sentence: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        by_sentence[example["sentence"]][example["label"]] += 1
    assert len(examples) == 160
    assert all(labels["True"] == labels["False"] for labels in by_sentence.values())


SMALL = ("--train", 20, "--val", 2, "--test", 2, "--nlvr-train", 8, "--nlvr-dev", 8, "--nlvr-test", 8)


def test_same_seed_same_files_other_seed_other_files(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        convert("shapes", "--out", tmp_path / name, "--seed", seed, *SMALL)
    files = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*.*"))]
    assert len(files) == 24 + 24 + 12 + 3
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes()
        assert content != (tmp_path / "three" / file).read_bytes()


def changed_files(one: Path, two: Path) -> set[str]:
    """Files, without folders, of two folders that hold the same ones but not the same bytes."""
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in (one, two)]
    assert files[0] == files[1]
    return {file.name for file in files[0] if (one / file).read_bytes() != (two / file).read_bytes()}


def test_questions_are_asked_about_the_first_training_images_alone(tmp_path: Path) -> None:
    for name, options in (("all", ()), ("few", ("--asked", 7)), ("twenty", ("--asked", 20))):
        convert("shapes", "--out", tmp_path / name, *SMALL, "--val", 9, "--test", 9, *options)
    kinds = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json")
    assert changed_files(tmp_path / "all", tmp_path / "few") == set(kinds)
    assert not changed_files(tmp_path / "all", tmp_path / "twenty")
    captioned, asked, answered = load(tmp_path / "few", "train")
    assert sorted({question["image_id"] for question in asked}) == [image["id"] for image in captioned["images"]][:7]
    read = read_scenes(tmp_path / "few/annotations/scenes_train2014.json").scenes
    for question, annotation in zip(asked, answered, strict=True):
        assert question["question_id"] == annotation["question_id"]
        assert annotation["multiple_choice_answer"] == true_answer(question["question"], read[question["image_id"]])


def test_order_of_the_objects_changes_the_captions_alone(tmp_path: Path) -> None:
    convert("shapes", "--out", tmp_path / "reading", *SMALL)
    convert("shapes", "--out", tmp_path / "random", "--order", "random", *SMALL)
    changed = changed_files(tmp_path / "reading", tmp_path / "random")
    assert changed <= {f"{kind}_{split}2014.json" for split in IMAGES for kind in ("captions", "scenes")}
    assert "captions_train2014.json" in changed
    in_order = 0
    order, read = read_scenes(tmp_path / "random/annotations/scenes_train2014.json")
    assert order == "random" and read == read_scenes(tmp_path / "reading/annotations/scenes_train2014.json").scenes
    annotations = load(tmp_path / "random", "train")[0]["annotations"]
    for annotation in annotations:
        scene = read[annotation["image_id"]]
        assert annotation["caption"] in set(wordings(scene, "random"))
        in_order += annotation["caption"] in set(wordings(scene))
    assert 0.2 * len(annotations) < in_order < 0.8 * len(annotations)  # a few of two objects are in order by chance


def test_bad_options_are_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "--train 0: must be at least 1" in refuse("shapes", "--out", tmp_path / "raw", "--train", 0)
    assert "--nlvr-dev 12: must be a positive multiple of 8" in refuse(
        "shapes", "--out", tmp_path / "raw", "--nlvr-dev", 12
    )
    for value in (0, -3, 21):
        told = refuse("shapes", "--out", tmp_path / "raw", "--asked", value, *SMALL)
        assert told.endswith(f": --asked {value}: must be from 1 to the 20 of --train\n")
    assert "--order" in refuse("shapes", "--out", tmp_path / "raw", "--order", "alphabetical")
    assert not (tmp_path / "raw").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("")
    assert "taken: holds another run's files" in refuse("shapes", "--out", tmp_path / "taken")
    assert "holds thesis.tex" in refuse("shapes", "--out", tmp_path / "taken", "--overwrite")
    (tmp_path / "file").write_text("")
    assert "file: is a file" in refuse("shapes", "--out", tmp_path / "file")
