import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json


def annotation(question_id: int, answers: list[str], main: str | None = None) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "multiple_choice_answer": main or answers[0],
        "answers": [{"answer": answer} for answer in answers],
    }


class World:
    """A small VQA v2 of two images: one named as in 2014, one as in 2017."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train2014").mkdir()
        (folder / "train2014/COCO_train2014_000000000001.jpg").write_bytes(image_of(1))
        (folder / "000000000002.png").write_bytes(image_of(2, "PNG"))
        self.questions = [
            {"image_id": 2, "question_id": 20, "question": "Red?"},
            {"image_id": 1, "question_id": 10, "question": "How many? "},
            {"image_id": 2, "question_id": 21, "question": "What?"},
        ]
        self.annotations = [
            annotation(10, ["two"] * 3 + ["2"] * 4 + ["3"] * 2 + ["four."], "2"),
            annotation(20, ["yes"] * 10),
            annotation(21, ["the dog"] * 9 + ["cat"], "dog"),
        ]

    def arguments(self, split: str = "train", annotated: bool = True) -> list[object]:
        head = {"data_subtype": "train2014"}
        questions = write_json(self.folder / "q.json", head | {"questions": self.questions})
        annotations = write_json(self.folder / "a.json", head | {"annotations": self.annotations})
        words = ["vqav2", "--questions", questions, *(["--annotations", annotations] if annotated else [])]
        return [*words, "--images", self.folder, "--split", split, "--out", self.folder / "out"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_labels_scores_and_order(world: World) -> None:
    convert(*world.arguments(), "--min-answers", 1)
    assert json.loads((world.folder / "out/answer_list.json").read_text()) == ["2", "dog", "yes"]
    first, second = rows_of(world.folder / "out/train")
    assert first == {
        "image": image_of(2, "PNG"),
        "questions": ["Red?", "What?"],
        "answers": [["yes"], ["dog"]],
        "answer_labels": [[2], [1]],
        "answer_scores": [[1.0], [1.0]],
        "question_id": [20, 21],
        "image_id": "2",
        "split": "train",
    }
    assert (second["image"], second["questions"], second["answers"]) == (image_of(1), ["How many?"], [["2"]])


def test_soft_scores_of_disagreeing_people(world: World) -> None:
    listed = write_json(world.folder / "list.json", ["4", "3", "2", "yes"])
    convert(*world.arguments(), "--answer-list", listed)
    row = rows_of(world.folder / "out/train")[1]
    assert row["answers"] == [["2", "3", "4"]] and row["answer_labels"] == [[2, 1, 0]]
    assert row["answer_scores"][0] == pytest.approx([1.0, 0.6, 0.3])
    manifest = read_manifest(world.folder / "out/train")
    assert manifest["dropped"] == {"question without a listed answer": 1}
    assert manifest["source"] == {"questions": 3, "images": 2}


def test_an_answer_list_in_another_spelling(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    listed = write_json(world.folder / "list.json", ["Dog", "two", "yes", "three"])
    convert(*world.arguments(), "--answer-list", listed)
    printed = capsys.readouterr().out
    assert f"{listed}: 3 of 4 entries are spelled as no normalized answer is: 'Dog' is taken for 'dog', " in printed
    first, second = rows_of(world.folder / "out/train")
    assert (first["answers"], first["answer_labels"]) == ([["yes"], ["Dog"]], [[2], [0]])
    assert (second["answers"], second["answer_labels"]) == ([["two", "three"]], [[1, 3]])
    convert("verify", world.folder / "out")


def test_entries_without_use_are_named_with_what_to_do(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    listed = write_json(world.folder / "list.json", {"": 0, "dog": 1, "the dog": 2, "yes": 3, "2": 4, "owl": 5})
    convert(*world.arguments(), "--answer-list", listed)
    keep = "keep them for a head that was trained with this list, else take them out"
    printed = capsys.readouterr().out
    assert (
        f"{listed}: 2 of 6 entries can never be right; {keep}: '' (nothing is left of it), 'the dog' ('dog'" in printed
    )
    assert (
        f"{listed}: 1 of 6 entries are the answer of no training question, so that none is learnt; {keep}: 'owl'\n"
        in printed
    )
    assert json.loads((world.folder / "out/answer_list.json").read_text()) == ["", "dog", "the dog", "yes", "2", "owl"]
    assert rows_of(world.folder / "out/train")[0]["answer_labels"] == [[3], [1]]
    convert("verify", world.folder / "out")
    convert(*world.arguments("val"))
    assert "no training question" not in capsys.readouterr().out


def test_answers_of_other_annotations_count_for_a_built_list(world: World, refuse: Callable[..., str]) -> None:
    more = [annotation(number, ["The dog"] * 9 + ["cat"]) for number in (100, 101)]
    other = write_json(world.folder / "val.json", {"annotations": [*more, annotation(102, ["yes"] * 10)]})
    convert(*world.arguments(), "--min-answers", 2, "--answer-annotations", other)
    assert json.loads((world.folder / "out/answer_list.json").read_text()) == ["dog", "yes"]
    listed = write_json(world.folder / "list.json", ["dog"])
    for words in (world.arguments("val"), [*world.arguments(), "--overwrite", "--answer-list", listed]):
        assert "--answer-annotations: is for a list that is built" in refuse(*words, "--answer-annotations", other)


def test_answers_that_would_not_count_or_count_twice_are_refused(world: World, refuse: Callable[..., str]) -> None:
    other = write_json(world.folder / "val.json", {"annotations": [annotation(100, ["owl"] * 10)]})
    same = write_json(world.folder / "same.json", {"data_subtype": "train2014", "annotations": world.annotations})
    built = [*world.arguments(), "--min-answers", 1, "--answer-annotations"]
    for first, files in (("a.json", [same]), ("a.json", [world.folder / "a.json"]), ("val.json", [other, other])):
        message = refuse(*built, *files)
        assert f"{files[-1]}: is the same file as {world.folder / first}, so its answers would count twice" in message
    (world.folder / "out").mkdir()
    listed = write_json(world.folder / "out/answer_list.json", ["yes", "2", "dog"])
    assert f"{listed}: is there and stays, so --answer-annotations would not count" in refuse(*built, other)
    listed.write_text(json.dumps(["2", "dog", "owl", "yes"]))  # of a run that was killed after it wrote the list
    convert(*built, other)


def test_what_has_no_answer_is_counted_by_reason(world: World) -> None:
    for number, answers in ((30, []), (31, ["a", "The"]), (32, ["owl"] * 10)):
        world.questions.append({"question_id": number, "image_id": 1, "question": "What?"})
        world.annotations.append(annotation(number, answers, "owl"))
    convert(*world.arguments(), "--answer-list", write_json(world.folder / "list.json", ["yes", "2", "dog"]))
    assert read_manifest(world.folder / "out/train")["dropped"] == {
        "question without a listed answer": 1,
        "question without an answer": 1,
        "question whose answers have no word": 1,
    }


def test_evaluation_splits_keep_all_questions(world: World) -> None:
    convert(*world.arguments(), "--answer-list", write_json(world.folder / "list.json", ["yes"]))
    convert(*world.arguments("val"))
    convert(*world.arguments("test", annotated=False))
    for split in ("val", "test"):
        rows = rows_of(world.folder / "out" / split)
        assert [row["question_id"] for row in rows] == [[20, 21], [10]]
        assert rows[1]["answers"] == [[]] == rows[1]["answer_labels"] == rows[1]["answer_scores"]
    assert rows_of(world.folder / "out/val")[0]["answers"] == [["yes"], []]


def test_answer_list_belongs_to_the_data_set(world: World, refuse: Callable[..., str]) -> None:
    assert "convert the train split into this folder first" in refuse(*world.arguments("val"))
    convert(*world.arguments(), "--min-answers", 1)
    convert(*world.arguments("val"))
    other = write_json(world.folder / "list.json", ["yes", "2"])
    message = refuse(*world.arguments(), "--overwrite", "--answer-list", other)
    assert "answer_list.json: differs from the answer list given, and val is labeled by it" in message
    convert(*world.arguments(), "--overwrite", "--min-answers", 1)
    assert "no answer is given that often" in refuse(*world.arguments()[:-1], world.folder / "new")
    assert not (world.folder / "new").exists()


def test_files_that_do_not_fit_together(world: World, refuse: Callable[..., str]) -> None:
    assert "--annotations: is needed" in refuse(*world.arguments(annotated=False))
    del world.annotations[1]
    assert "q.json: questions[0]: question_id 20 is not in" in refuse(*world.arguments())
    world.annotations.append({"question_id": 20, "answers": "yes", "multiple_choice_answer": "yes"})
    assert "a.json: annotations[2]: field 'answers'" in refuse(*world.arguments())
    world.annotations[-1]["answers"] = ["yes"]
    assert "a.json: annotations[2]: field 'answers'" in refuse(*world.arguments())


def test_missing_image_is_named_as_coco_names_it(world: World, refuse: Callable[..., str]) -> None:
    world.questions[0]["image_id"] = world.questions[2]["image_id"] = 5
    assert "5 (image is missing)" in refuse(*world.arguments(), "--min-answers", 1)
    world.questions[1]["image_id"] = 6
    message = refuse(*world.arguments(), "--min-answers", 1)
    assert "train2014: holds no image of 2 rows looked at, such as COCO_train2014_000000000005.jpg" in message


def test_ids_that_occur_twice_and_empty_files(world: World, refuse: Callable[..., str]) -> None:
    world.questions[2]["question_id"] = 20
    assert "questions[2]: question_id 20 occurs twice" in refuse(*world.arguments())
    world.questions = []
    assert "q.json" in (message := refuse(*world.arguments())) and "empty data set" in message


def test_shapes_world(raw: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        questions = raw / f"vqa/v2_OpenEnded_mscoco_{split}2014_questions.json"
        annotations = raw / f"vqa/v2_mscoco_{split}2014_annotations.json"
        convert("vqav2", "--questions", questions, "--annotations", annotations, "--images", raw / "images",
                "--split", split, "--out", tmp_path, "--min-answers", 2)  # fmt: skip
        expected = {a["question_id"]: a for a in json.loads(annotations.read_text())["annotations"]}
        found = {}
        for row in rows_of(tmp_path / split):
            found.update(zip(row["question_id"], zip(row["answers"], row["answer_scores"], strict=True), strict=True))
        assert set(found) == set(expected)
        for question_id, (answers, scores) in found.items():
            assert answers[0] == expected[question_id]["multiple_choice_answer"] and scores[0] == 1.0


def test_questions_without_a_word_are_left_out_and_counted(world: World) -> None:
    world.questions[0]["question"] = "  "
    convert(*world.arguments(), "--min-answers", 1)
    assert sorted(row["question_id"] for row in rows_of(world.folder / "out/train")) == [[10], [21]]
    assert read_manifest(world.folder / "out/train")["dropped"]["question without a word"] == 1
    convert("verify", world.folder / "out")


def test_annotations_that_occur_twice_or_answer_of_another_image(world: World, refuse: Callable[..., str]) -> None:
    world.annotations[1]["image_id"] = 1
    assert "questions[0]: asks of image 2, its annotation in" in refuse(*world.arguments())
    world.annotations[1]["image_id"] = 2
    world.annotations.append(annotation(20, ["dog"] * 10))
    assert "a.json: annotations[3]: question_id 20 occurs twice" in refuse(*world.arguments())


def test_an_id_of_more_than_64_bits(world: World, refuse: Callable[..., str]) -> None:
    world.questions[0]["question_id"] = world.annotations[1]["question_id"] = 2**70
    assert f"questions[0]: question_id {2**70} has over 64 bits" in refuse(*world.arguments())
