"""`own`: one's own folder of images and one file become three splits; nothing leaks, nothing is lost in silence."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluation import nlvr, vqa
from preprocessing.__main__ import main
from preprocessing.formats.record_files import read_records
from tests.unit.preprocessing.helpers import convert, image_of, rows_of

SPLITS = ("train", "val", "test")
IMAGES = 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 images, and in a subfolder a copy of each under another name."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(IMAGES):
        for name in (f"{number}.png", f"more/again {number}.png"):
            (folder / name).write_bytes(image_of(number, "PNG", 8))
    return folder


def table(path: Path, *rows: Sequence[object], separator: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def options(photos: Path, file: Path, *more: object) -> list[str]:
    words = ["own", "--annotations", file, "--images", photos, "--out", photos.parent / "data", *more]
    return [str(word) for word in words]


def splits_of(photos: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: rows_of(photos.parent / "data" / split) for split in SPLITS}


def captions(photos: Path, *more: object, separator: str = ",") -> dict[str, list[dict[str, Any]]]:
    """Two captions of each image and one of its copy."""
    rows = [(f"{number}.png", f"photo, number {number}, {view}") for number in range(IMAGES) for view in "ab"]
    rows += [(f"more/again {number}.png", f"copy {number}") for number in range(IMAGES)]
    file = table(photos.parent / "captions.csv", ("image", "Caption"), *rows, separator=separator)
    convert(*options(photos, file, *more))
    return splits_of(photos)


def test_an_image_is_in_one_split_under_all_its_names(photos: Path) -> None:
    found = captions(photos, "--val", 0.2, "--test", 0.3)
    seen = {split: {row["image"] for row in rows} for split, rows in found.items()}
    assert sum(len(some) for some in seen.values()) == IMAGES == len(set().union(*seen.values()))
    assert all(seen.values())
    assert sum(len(row["caption"]) for rows in found.values() for row in rows) == 3 * IMAGES
    row = next(row for rows in found.values() for row in rows if row["image_id"] == "7.png")
    assert row["caption"] == ["photo, number 7, a", "photo, number 7, b"]
    convert("verify", photos.parent / "data")


def test_the_draw_is_the_same_for_other_files_and_larger_ones(photos: Path) -> None:
    first = {row["image"] for row in captions(photos)["test"]}
    rows = [(f"{number}.png", "what is it?", "a thing") for number in range(IMAGES // 2)]
    file = table(photos.parent / "questions.csv", ("image", "question", "answer"), *rows)
    convert("own", "--annotations", file, "--images", photos, "--out", photos.parent / "asked")
    asked = {row["image"] for row in rows_of(photos.parent / "asked" / "test")}
    assert asked == first & {image_of(number, "PNG", 8) for number in range(IMAGES // 2)} != set()
    assert {row["image"] for row in captions(photos, "--seed", 1, "--overwrite")["test"]} != first


def test_a_separator_of_a_spreadsheet(photos: Path) -> None:
    assert sum(map(len, captions(photos, separator=";").values())) == 2 * IMAGES


def test_questions_have_the_answers_of_training_and_can_be_scored(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers of `test`, as predictions, are all right by the official accuracy, whatever their case."""
    said = ["Yes", "no", "a red Cat", "two"]
    rows = [(f"{number % IMAGES}.png", f"is it {number}?", said[number % 4]) for number in range(4 * IMAGES)]
    file = table(photos.parent / "questions.csv", ("image", "question", "answer"), *rows)
    convert(*options(photos, file, "--test", 0.3))
    assert "always saying '" in capsys.readouterr().out
    data = photos.parent / "data"
    assert sorted(json.loads((data / "answer_list.json").read_text())) == ["2", "no", "red cat", "yes"]
    found = splits_of(photos)
    assert sorted(i for rows in found.values() for row in rows for i in row["question_id"]) == [*range(4 * IMAGES)]
    answers = [
        {"question_id": number, "answer": answer}
        for row in found["test"]
        for number, (answer,) in zip(row["question_id"], row["answers"], strict=True)
    ]
    annotations = vqa.read_list(f"{data / 'test_annotations.json'}", "annotations")
    scores = vqa.score(answers, annotations)
    assert scores["overall"] == 100 and scores["per_answer_type"].keys() == {"number", "other", "yes/no"}


def test_statements_stay_together_and_can_be_scored(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same words in another case are one statement. Consistency counts by statement."""
    rows = [
        (
            f"{number}.png",
            f"{(number + step) % IMAGES}.png",
            f"{'There' if step % 2 else 'there'} are {number}",
            step < 3,
        )
        for number in range(IMAGES)
        for step in range(1, 5)
    ]
    file = table(photos.parent / "pairs.csv", ("image_0", "image_1", "statement", "label"), *rows)
    convert(*options(photos, file, "--val", 0.2, "--test", 0.3))
    said = {
        split: {text.lower() for row in rows for text in row["questions"]} for split, rows in splits_of(photos).items()
    }
    assert sum(map(len, said.values())) == IMAGES == len(set().union(*said.values()))
    assert "images of test are in train, too" in capsys.readouterr().out
    lines = (photos.parent / "data" / "test_annotations.json").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    scores = nlvr.score({example["identifier"]: "True" for example in examples}, examples)
    assert scores == {
        "accuracy": 0.5,
        "consistency": 0.0,
    }  # "There" and "there" count as two sentences, alike to the letter


def test_json_of_xvlm_and_lines_are_read(photos: Path) -> None:
    pairs = [
        {"images": ["1.png", "2.png"], "sentence": f"s {n}", "label": "False", "identifier": f"x-{n}-0-0"}
        for n in range(30)
    ]
    whole, lines = photos.parent / "pairs.json", photos.parent / "pairs.jsonl"
    whole.write_text(json.dumps(pairs))
    lines.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    convert(*options(photos, whole))
    first = splits_of(photos)
    convert(*options(photos, lines, "--overwrite"))
    assert splits_of(photos) == first
    assert {name for row in first["test"] for name in row["identifier"]} < {f"x-{n}-0-0" for n in range(30)}


def test_a_column_names_the_split_or_the_group(photos: Path) -> None:
    rows = [(f"{n}.png", f"photo {n}", ("train", "dev", "Test")[n % 3], f"patient {n % 10}") for n in range(30)]
    file = table(photos.parent / "captions.csv", ("image", "caption", "split", "patient"), *rows)
    convert(*options(photos, file))
    found = splits_of(photos)
    assert {split: len(some) for split, some in found.items()} == {"train": 10, "val": 10, "test": 10}
    assert {row["caption"][0] for row in found["val"]} == {f"photo {n}" for n in range(1, 30, 3)}
    file = table(file, ("image", "caption", "patient"), *((a, b, d) for a, b, _, d in rows))
    convert(*options(photos, file, "--group", "patient", "--val", 0.3, "--test", 0.3, "--overwrite"))
    told = {
        split: {int(row["caption"][0].split()[1]) % 10 for row in some} for split, some in splits_of(photos).items()
    }
    assert sorted(patient for some in told.values() for patient in some) == [*range(10)]


def test_new_answers_replace_the_old_ones(photos: Path) -> None:
    for answers in (("red", "blue"), ("green", "black")):
        rows = [(f"{n}.png", "which color?", answers[n % 2]) for n in range(IMAGES)]
        file = table(photos.parent / "q.csv", ("image", "question", "answer"), *rows)
        convert(*options(photos, file, "--overwrite"))
        assert sorted(json.loads((photos.parent / "data/answer_list.json").read_text())) == sorted(answers)
    convert("verify", photos.parent / "data")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,caption\n1.png,one,two\n", "line 2: has 3 columns, the first line has 2"),
        ('image,caption\n1.png,"one\n', "is no CSV (unexpected end of data)"),
        ("image,image\n1.png,one\n", "two columns are called 'image'"),
        ("image,caption\n", "has no record below the names of its columns"),
        ("photo,caption\n1.png,one\n", "line 2: has no image, but photo, caption; records need image, caption"),
        ("image,words\n1.png,one\n", "has image, words, but no caption, question or statement"),
        ("image,caption,question\n1.png,a,b\n", "is of retrieval and of vqa; choose one with --task"),
        ("image,question\n1.png,one\n", "line 2: has no answer, but image, question"),
        ("image,caption\n1.png,one\n,two\n", "line 3: image names no file"),
        ("image,caption\n1.png,one\n99.png,two\n", "1 of 2 images are missing: 99.png; paths in the file count from"),
        ("image,caption,split\n1.png,a,train\n2.png,b,trial\n", "line 3: split is 'trial'; write train, val or test"),
        ("image,caption,split\n1.png,a,train\n2.png,b,\n", "line 3: split is ''; write train, val or test"),
        ("image,caption\n1.png,one\n2.png,two\n", "none falls into"),
        ("image_0,image_1,statement,label\n1.png,2.png,s,maybe\n", "none falls into"),
        ('[{"image": "1.png"}, 3]', "record 1: is no JSON object"),
        ('{"image": "1.png"}\n{"image"\n', "line 2: invalid JSON"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    text: str, said: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = photos.parent / "own.csv"
    file.write_text(text)
    assert main(options(photos, file)) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1
    assert not (photos.parent / "data").exists()


def test_a_wrong_label_and_wrong_options_are_one_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("1.png", "2.png", f"s {n}", "maybe" if n == 7 else "true") for n in range(30)]
    file = table(photos.parent / "pairs.csv", ("image_0", "image_1", "statement", "label"), *rows)
    assert main(options(photos, file)) == 2
    assert 'line 9: label "maybe" is neither True nor False' in capsys.readouterr().err
    assert main(options(photos, file, "--val", 0.5, "--test", 0.5)) == 2
    assert "must be shares that leave some for training" in capsys.readouterr().err
    assert main(options(photos, file, "--group", "patient")) == 2
    assert "--group patient: " in capsys.readouterr().err


def test_missing_images_are_left_out_on_request(photos: Path) -> None:
    rows = [(f"{number}.png", f"photo {number}") for number in range(IMAGES + 2)]
    file = table(photos.parent / "captions.csv", ("image", "caption"), *rows)
    convert(*options(photos, file, "--max-dropped", 0.5))
    assert sum(map(len, splits_of(photos).values())) == IMAGES


def test_a_text_in_several_lines_and_a_mark_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes('\ufeffimage\tcaption\r\n1.png\t"one\r\ntwo, ""three"""\r\n\r\n2.png\t four \r\n'.encode())
    assert [row for _, row in read_records(file)] == [
        {"image": "1.png", "caption": 'one\ntwo, "three"'},
        {"image": "2.png", "caption": "four"},
    ]
