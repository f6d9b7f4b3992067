"""Visual Genome's region descriptions and questions, and its questions beside those of VQA v2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

PLACES = {10: "VG_100K/10.jpg", 1: "VG_100K_2/1.jpg", 2: "VG_100K_2/2.jpg"}


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    """A miniature of Visual Genome, image 2 of which is COCO's 391895."""
    regions, questions, images = [], [], []
    for image_id, place in PLACES.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(image_of(image_id))
        boxes = {"x": 1, "y": 2, "width": 10, "height": 12}
        regions.append(
            {
                "id": image_id,
                "regions": [
                    {"region_id": 100 * image_id + n, "image_id": image_id, "phrase": f"thing {n}\n", **boxes}
                    for n in range(3)
                ],
            }
        )
        questions.append(
            {
                "id": image_id,
                "qas": [
                    {
                        "qa_id": 1000 * image_id + n,
                        "image_id": image_id,
                        "question": f"What is thing {n}?",
                        "answer": answer,
                        "a_objects": [],
                        "q_objects": [],
                    }
                    for n, answer in enumerate(["A dog.", "on the long winding road"])
                ],
            }
        )
        coco = 391895 if image_id == 2 else None
        url = f"https://cs.stanford.edu/people/rak248/{place}"
        images.append({"image_id": image_id, "url": url, "width": 40, "height": 40, "coco_id": coco, "flickr_id": None})
    regions[1]["regions"][1]["phrase"] = " "
    write_json(tmp_path / "region_descriptions.json", regions)
    write_json(tmp_path / "question_answers.json", questions)
    write_json(tmp_path / "image_data.json", images)
    write_json(tmp_path / "coco_test.json", [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a"]}])
    return tmp_path


def end(folder: Path, split: str = "train") -> list[object]:
    return ["--images", folder, "--split", split, "--out", folder / "out"]


def test_phrases_are_captions_of_the_image(genome: Path) -> None:
    convert("visual-genome", "--regions", genome / "region_descriptions.json", *end(genome))
    rows = rows_of(genome / "out/train")
    assert [(row["image_id"], row["image"]) for row in rows] == [(str(n), image_of(n)) for n in PLACES]
    assert rows[0]["caption"] == ["thing 0", "thing 1", "thing 2"] and rows[1]["caption"] == ["thing 0", "thing 2"]
    manifest = read_manifest(genome / "out/train")
    assert manifest["source"] == {"images": 3, "captions": 9} and manifest["dropped"] == {"caption is empty": 1}


def test_images_of_the_coco_test_list_are_known_by_their_coco_number(genome: Path) -> None:
    convert("visual-genome", "--regions", genome / "region_descriptions.json", "--image-data",
            genome / "image_data.json", "--exclude", genome / "coco_test.json", *end(genome))  # fmt: skip
    assert [row["image_id"] for row in rows_of(genome / "out/train")] == ["10", "1"]


def test_without_image_data_no_coco_name_is_known(genome: Path, refuse: Callable[..., str]) -> None:
    message = refuse("visual-genome", "--regions", genome / "region_descriptions.json", "--exclude",
                     genome / "coco_test.json", *end(genome))  # fmt: skip
    assert "coco_test.json: none of its 1 images is here: it has names like val2014/COCO_val2014_" in message
    assert "the data set like 10.jpg; give the right list, --image-data, by which COCO's names are known, or" in message


def test_questions_with_one_answer_each(genome: Path) -> None:
    convert("visual-genome-qa", "--questions", genome / "question_answers.json", "--min-answers", 3, *end(genome))
    assert json.loads((genome / "out/answer_list.json").read_text()) == ["dog", "on long winding road"]
    row = rows_of(genome / "out/train")[0]
    assert (row["image_id"], row["question_id"]) == ("10", [10000, 10001])
    assert row["answers"] == [["dog"], ["on long winding road"]] and row["answer_scores"] == [[1.0], [1.0]]


@pytest.fixture
def both(genome: Path) -> list[object]:
    """VQA v2 over COCO image 1, which is not Visual Genome's image 1; one question has the id of one of VG's."""
    (genome / "train2014").mkdir()
    (genome / "train2014/COCO_train2014_000000000001.jpg").write_bytes(image_of(77))
    questions = [{"image_id": 1, "question_id": 1000 + n, "question": f"Q {n}?"} for n in range(2)]
    answers = [{"answer": "dog", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    annotations = [{"question_id": 1000 + n, "multiple_choice_answer": "dog", "answers": answers} for n in range(2)]
    head = {"data_subtype": "train2014"}
    return [
        "vqav2",
        "--questions",
        write_json(genome / "q.json", head | {"questions": questions}),
        "--annotations",
        write_json(genome / "a.json", head | {"annotations": annotations}),
        "--min-answers",
        2,
        *end(genome),
    ]


def test_vqav2_with_visual_genome(genome: Path, both: list[object]) -> None:
    more = ["--visual-genome", genome / "question_answers.json", "--visual-genome-images", genome]
    convert(*both, *more, "--image-data", genome / "image_data.json", "--exclude", genome / "coco_test.json")
    assert json.loads((genome / "out/answer_list.json").read_text()) == ["dog"]  # counted over VQA v2 alone
    rows = rows_of(genome / "out/train")
    assert [row["image_id"] for row in rows] == ["1", "vg-10", "vg-1"]
    assert rows[0]["image"] == image_of(77) and rows[2]["image"] == image_of(1)
    assert rows[2]["question_id"] == [1_000_001_000]
    assert read_manifest(genome / "out/train")["dropped"] == {
        "question without a listed answer": 2,
        "question: image is listed in --exclude": 2,
    }


def test_options_that_need_each_other(genome: Path, both: list[object], refuse: Callable[..., str]) -> None:
    assert "give both or neither" in refuse(*both, "--visual-genome", genome / "question_answers.json")
    both.insert(3, both[2])
    assert "1 files for 2 of --questions" in refuse(*both)


def test_bad_records_are_named(genome: Path, refuse: Callable[..., str]) -> None:
    bad = write_json(genome / "bad.json", [{"id": 1, "regions": [{"image_id": 1}]}])
    assert "bad.json: record 0: has no field 'phrase'" in refuse("visual-genome", "--regions", bad, *end(genome))
    bad = write_json(genome / "bad.json", {"regions": []})
    assert "bad.json: is no JSON list" in refuse("visual-genome", "--regions", bad, *end(genome))
    bad = write_json(genome / "bad.json", [{"id": 1, "qas": [{"qa_id": 1, "image_id": 1, "question": "x?"}]}])
    message = refuse("visual-genome-qa", "--questions", bad, *end(genome))
    assert "record 0: qas[0]: has no field 'answer'" in message
    twice = [{"id": 1, "regions": [{"image_id": 1, "phrase": "a"}]}] * 2
    message = refuse("visual-genome", "--regions", write_json(genome / "bad.json", twice), *end(genome))
    assert "record 1: image 1 occurs twice" in message


def test_what_duplicates_calls_an_image_beside_vqav2_is_left_out(genome: Path, both: list[object]) -> None:
    more = ["--visual-genome", genome / "question_answers.json", "--visual-genome-images", genome]
    listed = write_json(genome / "d.json", {"duplicates": [{"image_id": "vg-10"}]})
    convert(*both, *more, "--exclude", listed)
    assert "vg-10" not in [row["image_id"] for row in rows_of(genome / "out/train")]
    assert read_manifest(genome / "out/train")["dropped"]["question: image is listed in --exclude"] > 0
