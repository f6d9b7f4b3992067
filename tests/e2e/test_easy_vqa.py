"""The whole package easy-vqa, converted."""

import json
from pathlib import Path

import pytest

from tests.unit.preprocessing.helpers import convert, rows_of

pytest.importorskip("easy_vqa", reason="pip install easy-vqa")


def test_splits_of_the_package(tmp_path: Path) -> None:
    import easy_vqa

    for split in ("train", "val", "test"):
        convert("easy-vqa", "--split", split, "--out", tmp_path)
    rows = {split: rows_of(tmp_path / split) for split in ("train", "val", "test")}
    count = {split: sum(len(row["questions"]) for row in rows[split]) for split in rows}
    assert count["train"] + count["val"] == len(easy_vqa.get_train_questions()[0])
    assert count["test"] == len(easy_vqa.get_test_questions()[0])
    assert 0.05 < count["val"] / count["train"] < 0.2
    assert not {row["image"] for row in rows["train"]} & {row["image"] for row in rows["val"]}
    assert json.loads((tmp_path / "answer_list.json").read_text()) == easy_vqa.get_answers()

    texts, answers, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    for row in rows["test"][:50]:
        for number, text, answer in zip(row["question_id"], row["questions"], row["answers"], strict=True):
            assert (texts[number], [answers[number]]) == (text, answer)
            assert row["image_id"] == f"test-{images[number]}"
        assert row["image"] == Path(paths[images[number]]).read_bytes()


def test_captions_say_what_the_questions_tell(tmp_path: Path) -> None:
    import easy_vqa

    colors = set(easy_vqa.get_answers()) - {"yes", "no", "circle", "rectangle", "triangle"}
    for split in ("train", "val"):
        convert("easy-vqa", "--split", split, "--captions", "--out", tmp_path / "captions")
        convert("easy-vqa", "--split", split, "--out", tmp_path / "vqa")
        captions = {row["image_id"]: (row["image"], row["caption"]) for row in rows_of(tmp_path / "captions" / split)}
        asked = rows_of(tmp_path / "vqa" / split)
        assert 0.95 < len(captions) / len(asked) <= 1
        for row in asked:
            image, (caption,) = captions.get(row["image_id"], (row["image"], ("",)))
            assert image == row["image"]
            for (answer,) in row["answers"]:
                if answer not in ("yes", "no"):
                    assert answer in caption.split()
            assert len(colors & set(caption.split())) <= 1
