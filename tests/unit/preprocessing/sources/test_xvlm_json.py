from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    for number in range(3):
        (tmp_path / f"pics/{number}.jpg").write_bytes(image_of(number))
    return tmp_path


def arguments(folder: Path, task: str, *files: list[dict[str, Any]], split: str = "train") -> list[object]:
    paths = [write_json(folder / f"f{index}.json", records) for index, records in enumerate(files)]
    words = ["json", "--task", task, "--annotations", *paths, "--images", folder]
    return [*words, "--split", split, "--out", folder / "out"]


def test_retrieval_brings_captions_of_an_image_together(images: Path) -> None:
    first = [
        {"image": "pics/1.jpg", "caption": "one a", "image_id": "coco_1"},
        {"image": "pics/0.jpg", "caption": ["zero a", " ", "zero b"], "image_id": 7},
        {"image": "pics/1.jpg", "caption": "one b", "image_id": "coco_1"},
    ]
    second = [{"image": "pics/2.jpg", "caption": ["two"]}, {"image": "pics/0.jpg", "caption": "zero c", "image_id": 7}]
    convert(*arguments(images, "retrieval", first, second))
    rows = rows_of(images / "out/train")
    assert [(row["image_id"], row["caption"]) for row in rows] == [
        ("coco_1", ["one a", "one b"]),
        ("7", ["zero a", "zero b", "zero c"]),
        ("pics/2.jpg", ["two"]),
    ]
    assert [row["image"] for row in rows] == [image_of(1), image_of(0), image_of(2)]
    manifest = read_manifest(images / "out/train")
    assert manifest["dropped"] == {"caption is empty": 1}
    assert manifest["source"] == {"images": 3, "captions": 7}


def test_captions_that_occur_twice_are_reported_and_kept(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that was joined with itself; a few such captions are in any set, and a test split must keep them."""
    records = [{"image": f"pics/{number}.jpg", "caption": [f"{number} a", f"{number} b"]} for number in range(3)]
    convert(*arguments(images, "retrieval", records, split="test"))
    assert "the same as another" not in capsys.readouterr().out
    convert(*arguments(images, "retrieval", records * 2, split="test"), "--overwrite")
    assert "f0.json: 6 of 12 captions are the same as another one of their image\n" in capsys.readouterr().out
    assert next(row["caption"] for row in rows_of(images / "out/test")) == ["0 a", "0 b", "0 a", "0 b"]


def test_vqa_with_ten_answers_one_and_none(images: Path) -> None:
    asked = {"image": "pics/0.jpg", "dataset": "vqa"}
    records = [
        {**asked, "question": "a?", "question_id": 1, "answer": ["Two"] * 8 + ["3"] * 2},
        {**asked, "question": "b?", "question_id": 2, "answer": "Red."},
        {"image": "pics/1.jpg", "question": "c?", "question_id": 3, "answer": ["red"], "dataset": "vg"},
    ]
    convert(*arguments(images, "vqa", records), "--min-answers", 1)
    first, second = rows_of(images / "out/train")
    assert first["answers"] == [["2"], ["red"]] and first["answer_scores"] == [[1.0], [1.0]]
    assert (second["answers"], second["answer_scores"]) == ([["red"]], [[1.0]])
    records = [{key: value for key, value in record.items() if key != "answer"} for record in records]
    convert(*arguments(images, "vqa", records, split="test"))
    assert [row["question_id"] for row in rows_of(images / "out/test")] == [[1, 2], [3]]
    assert rows_of(images / "out/test")[0]["answers"] == [[], []]


def test_a_list_of_one_is_one_vote_and_a_string_the_answer(images: Path) -> None:
    answers = {1: ["cat"], 2: "cat", 3: ["cat", "cat"], 4: ["cat"] * 3 + ["dog"]}
    records: list[dict[str, Any]] = [
        {"image": "pics/0.jpg", "dataset": "vqa", "question": "a?", "question_id": number, "answer": answer}
        for number, answer in answers.items()
    ]
    records.append({"image": "pics/0.jpg", "dataset": "vg", "question": "b?", "question_id": 5, "answer": ["cat"]})
    listed = write_json(images / "list.json", ["cat", "dog"])
    convert(*arguments(images, "vqa", records), "--answer-list", listed)
    (row,) = rows_of(images / "out/train")
    assert [pytest.approx(scores) for scores in row["answer_scores"]] == [[0.3], [1.0], [0.6], [0.9, 0.3], [1.0]]


def test_ids_of_visual_genome_that_are_taken(images: Path, refuse: Callable[..., str]) -> None:
    """EVE's vqa_train.json and vg_qa.json: both count their questions, and Visual Genome's numbers come first."""
    vqa = [
        {"image": "pics/0.jpg", "image_id": 7, "question": "a?", "question_id": 9000, "answer": ["red"] * 10}
        | {"dataset": "vqa"}
    ]
    vg = [
        {"image": "pics/1.jpg", "image_id": number, "question": "b?", "question_id": 9000 + number, "answer": "red"}
        | {"dataset": "vg"}
        for number in (0, 1)
    ]
    vg[0]["image"] = "pics/2.jpg"
    convert(*arguments(images, "vqa", vqa, vg), "--min-answers", 1)
    found = [(row["image_id"], row["question_id"], row["image"]) for row in rows_of(images / "out/train")]
    expected = [
        ("7", [9000], image_of(0)),
        ("vg-0", [1_000_009_000], image_of(2)),
        ("vg-1", [1_000_009_001], image_of(1)),
    ]
    assert found == expected
    vg[0]["question_id"] = vg[1]["question_id"] = 1  # now it is the image's id that is taken
    vg[0]["question_id"], vg[0]["image_id"] = 2, 7
    convert(*arguments(images, "vqa", vqa, vg), "--min-answers", 1, "--overwrite")
    assert [row["image_id"] for row in rows_of(images / "out/train")] == ["7", "vg-7", "vg-1"]
    vg[0]["image_id"] = 3  # nothing is: they stay as they are
    convert(*arguments(images, "vqa", vqa, vg), "--min-answers", 1, "--overwrite")
    assert [row["question_id"] for row in rows_of(images / "out/train")] == [[9000], [2], [1]]
    vqa[0]["question_id"] = vg[1]["question_id"] = 2  # twice in one file is a fault
    assert "f1.json: record 1: question_id 1000000002 occurs twice" in refuse(
        *arguments(images, "vqa", vqa, vg), "--overwrite"
    )


def test_nlvr(images: Path) -> None:
    pair = {"images": ["pics/0.jpg", "pics/1.jpg"]}
    records = [
        {**pair, "sentence": "a", "label": "True", "identifier": "dev-1-0-0"},
        {"images": ["pics/1.jpg", "pics/0.jpg"], "sentence": "b", "label": "False"},
        {**pair, "sentence": "c", "label": "False", "identifier": "dev-1-0-1"},
    ]
    convert(*arguments(images, "nlvr", records, split="val"))
    first, second = rows_of(images / "out/val")
    assert (first["image_0"], first["image_1"]) == (image_of(0), image_of(1)) == (second["image_1"], second["image_0"])
    assert (first["questions"], first["answers"]) == (["a", "c"], ["True", "False"])
    assert (first["identifier"], second["identifier"]) == (["dev-1-0-0", "dev-1-0-1"], ["record-1-0-0"])


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        ("retrieval", {"image": "pics/0.jpg"}, "record 0: has no field 'caption'"),
        ("retrieval", {"image": "pics/0.jpg", "caption": [3]}, "record 0: field 'caption' holds something"),
        ("retrieval", "x", "record 0: is no JSON object"),
        (
            "vqa",
            {"image": "pics/0.jpg", "question": "a?", "question_id": "v1"},
            "field 'question_id' is \"v1\", not int",
        ),
        ("nlvr", {"images": ["pics/0.jpg"], "sentence": "a", "label": "True"}, "names 1 images, not two"),
        ("nlvr", {"images": ["pics/0.jpg"] * 2, "sentence": "a"}, "label null is neither"),
    ],
)
def test_bad_records_are_named(images: Path, refuse: Callable[..., str], task: str, record: Any, said: str) -> None:
    message = refuse(*arguments(images, task, [record]))
    assert "f0.json: record 0" in message and said in message


def test_files_of_another_form_and_clashing_ids(images: Path, refuse: Callable[..., str]) -> None:
    assert "f0.json: is no JSON list" in refuse(*arguments(images, "retrieval", {"images": []}))  # type: ignore[arg-type]
    assert "empty data set" in refuse(*arguments(images, "retrieval", []))
    clash = [{"image": f"pics/{number}.jpg", "caption": "a", "image_id": "x"} for number in (0, 1)]
    assert "record 1: image_id x stands for pics/0.jpg too" in refuse(*arguments(images, "retrieval", clash))


def test_training_texts_of_no_use_are_counted_and_those_of_a_test_split_stay(images: Path) -> None:
    texts = ["is it red?", "?!", "nul\0", "x" * 20_000]
    asked = [
        {"image": "pics/0.jpg", "question": text, "question_id": n, "answer": "yes", "dataset": "vqa"}
        for n, text in enumerate(texts)
    ]
    said = [
        {"images": ["pics/0.jpg", "pics/1.jpg"], "sentence": text, "label": "True", "identifier": f"a-{n}-0-0"}
        for n, text in enumerate(texts)
    ]
    for task, records, noun in (("vqa", asked, "question"), ("nlvr", said, "statement")):
        for split, kept in (("train", texts[:1]), ("test", texts)):
            words = [*arguments(images, task, records, split=split), "--text-cleaning", "none"]
            words[words.index(images / "out")] = images / task
            convert(*words, "--min-answers", 1) if task == "vqa" else convert(*words)
            assert rows_of(images / task / split)[0]["questions"] == kept
        assert read_manifest(images / task / "train")["dropped"] == {
            f"{noun} has only punctuation": 1,
            f"{noun} holds a NUL byte": 1,
            f"{noun} has more than 10000 characters": 1,
        }
