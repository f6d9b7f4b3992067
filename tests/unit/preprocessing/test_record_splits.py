"""Records that name their split themselves: one of another split than the wanted one never becomes a row."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from preprocessing.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, picture, rows_of, write_json

SPLITS = ("test", "train", "val", "restval", "Validation", "dev", "TEST")
OF = {"train": [1, 3], "val": [2, 4, 5], "test": [0, 6]}


def image(number: int) -> str:
    return f"{number}.jpg"


def tsv(raw: Path, splits: Sequence[Any]) -> list[object]:
    lines = ["caption\tfile\tsplit", *(f"a {number}\t{image(number)}\t{name}" for number, name in enumerate(splits))]
    (raw / "set.tsv").write_text("\n".join(lines))
    return ["cc3m", "--annotations", raw / "set.tsv"]


def entries(splits: Sequence[Any]) -> list[dict[str, Any]]:
    named: list[dict[str, Any]] = [{} if name is None else {"split": name} for name in splits]
    return [{"image": image(number), "caption": f"a {number}", **more} for number, more in enumerate(named)]


def json_lines(raw: Path, splits: Sequence[Any]) -> list[object]:
    (raw / "set.jsonl").write_text("\n".join(map(json.dumps, entries(splits))))
    return ["cc3m", "--annotations", raw / "set.jsonl"]


def json_list(raw: Path, splits: Sequence[Any]) -> list[object]:
    return ["sbu", "--annotations", write_json(raw / "set.json", entries(splits))]


def flickr(raw: Path, splits: Sequence[Any]) -> list[object]:
    lines = ["image,split,caption", *(f"{image(number)},{name or ''},a {number}" for number, name in enumerate(splits))]
    (raw / "captions.txt").write_text("\n".join(lines))
    return ["flickr30k", "--annotations", raw / "captions.txt"]


def coco(raw: Path, splits: Sequence[Any]) -> list[object]:
    images = [
        {"id": number, "file_name": image(number), **({} if name is None else {"split": name})}
        for number, name in enumerate(splits)
    ]
    captions = [{"id": number, "image_id": number, "caption": f"a {number}"} for number in range(len(splits))]
    return ["coco", "--annotations", write_json(raw / "coco.json", {"images": images, "annotations": captions})]


def retrieval(raw: Path, splits: Sequence[Any]) -> list[object]:
    return ["json", "--task", "retrieval", "--annotations", write_json(raw / "set.json", entries(splits))]


def vqa(raw: Path, splits: Sequence[Any]) -> list[object]:
    records = [
        {**entry, "question": f"a {number}", "question_id": number, "answer": "yes"}
        for number, entry in enumerate(entries(splits))
    ]
    words = ["json", "--task", "vqa", "--answer-list", write_json(raw / "answers.json", ["yes"])]
    return [*words, "--annotations", write_json(raw / "set.json", records)]


def nlvr(raw: Path, splits: Sequence[Any]) -> list[object]:
    records = [
        {**entry, "images": [entry["image"]] * 2, "sentence": f"a {number}", "label": "True"}
        for number, entry in enumerate(entries(splits))
    ]
    return ["json", "--task", "nlvr", "--annotations", write_json(raw / "set.json", records)]


def beside(splits: Sequence[Any], number: int, text: bool) -> dict[str, bytes]:
    """The files of an image: its captions are in the .txt, else in the .json."""
    record = entries(splits)[number]
    if text:
        del record["caption"]
        return {"txt": f"a {number}".encode(), "json": json.dumps(record).encode()}
    return {"json": json.dumps(record).encode()}


def tars(raw: Path, splits: Sequence[Any], text: bool) -> list[object]:
    with tarfile.open(raw / "0.tar", "w") as tar:
        for number in range(len(splits)):
            for ending, content in {"jpg": picture(number), **beside(splits, number, text)}.items():
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return ["img2dataset", "--format", "webdataset"]


def folders(raw: Path, splits: Sequence[Any], text: bool) -> list[object]:
    for number in range(len(splits)):
        for ending, content in beside(splits, number, text).items():
            (raw / f"{number}.{ending}").write_bytes(content)
    return ["img2dataset", "--format", "files"]


Form = Callable[[Path, Sequence[Any]], list[object]]
LAYOUTS: dict[str, Form] = {
    "tars, captions in .json": lambda raw, splits: tars(raw, splits, False),
    "tars, captions in .txt": lambda raw, splits: tars(raw, splits, True),
    "folders, captions in .json": lambda raw, splits: folders(raw, splits, False),
    "folders, captions in .txt": lambda raw, splits: folders(raw, splits, True),
}
FORMS: dict[str, Form] = {
    **{form.__name__: form for form in (tsv, json_lines, json_list, flickr, coco, retrieval, vqa, nlvr)},
    **LAYOUTS,
}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[object]]:
    """The words that convert records of these splits, written in a form."""

    def words(form: str, splits: Sequence[Any], split: str) -> list[object]:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        for number in range(len(splits)):
            (raw / image(number)).write_bytes(picture(number))
        more = ["--split", split, "--images", raw, "--out", tmp_path / "out", "--overwrite"]
        return [*FORMS[form](raw, splits), *more]

    return words


def numbers(folder: Path) -> list[int]:
    """The numbers of the images whose rows a split has, by their texts."""
    found = []
    for row in rows_of(folder):
        texts = row.get("caption") or row["questions"]
        assert len(texts) == 1
        found.append(int(texts[0].removeprefix("a ")))
        assert (row.get("image") or row["image_0"]) == picture(found[-1])
    return found


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("form", FORMS)
def test_records_of_other_splits_are_no_rows(
    form: str, split: str, command: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*command(form, SPLITS, split))
    assert numbers(tmp_path / "out" / split) == OF[split]
    assert read_manifest(tmp_path / "out" / split)["dropped"] == {}
    said = f": {len(OF[split])} of 7 records are of split {split} by their split: test (1), train (1), "
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_a_split_that_no_record_names(
    form: str, command: Callable[..., list[object]], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    message = refuse(*command(form, ["train", "train", "part 1"], "test"))
    assert ": no record's split says test, but train (2), part 1 (1); give another --split, or a file of" in message
    assert not (tmp_path / "out" / "test").exists()


WITHOUT = [form for form in FORMS if form != "tsv"]  # which has a column or none


@pytest.mark.parametrize("form", WITHOUT)
def test_records_without_a_split_are_all_of_the_wanted_one(
    form: str, command: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*command(form, [None] * 3, "val"))
    assert numbers(tmp_path / "out" / "val") == [0, 1, 2] and "by their split" not in capsys.readouterr().out


@pytest.mark.parametrize("form", WITHOUT)
def test_a_record_without_a_split_among_others(
    form: str, command: Callable[..., list[object]], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    words = command(form, ["train", None, "train", "test"], "train")
    assert "names no split, as others do; mend the file (1 of 3 records are at fault" in refuse(*words)
    convert(*words, "--max-dropped", "0.5")
    assert numbers(tmp_path / "out" / "train") == [0, 2]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {"record names no split, others do": 1}


@pytest.mark.parametrize("form", WITHOUT)
def test_a_first_record_without_a_split(
    form: str, command: Callable[..., list[object]], refuse: Callable[..., str]
) -> None:
    message = refuse(*command(form, [None, "train", "test"], "train"), "--max-dropped", "1")
    assert ": 1 records name no split, 2 after them do; mend the file" in message


@pytest.mark.parametrize("form", ["json_lines", "retrieval", "coco"])
def test_a_split_that_is_no_text(form: str, command: Callable[..., list[object]], refuse: Callable[..., str]) -> None:
    message = refuse(*command(form, [0, 0, {"name": "train"}], "train"))
    assert """no record's split says train, but 0 (2), {"name": "train"} (1); give another""" in message


def test_few_of_very_many_names_are_counted_apart(
    command: Callable[..., list[object]], refuse: Callable[..., str]
) -> None:
    message = refuse(*command("json_lines", [f"part {number}" for number in range(200)], "train"))
    assert "but … (100), part 0 (1), part 1 (1), part 2 (1), part 3 (1); give" in message


def test_tars_of_which_only_some_name_splits(
    command: Callable[..., list[object]], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    """The texts are in .txt: whether the .json files matter is asked of each tar, by the first of them."""
    command("tars, captions in .txt", [None] * 3, "train")
    (tmp_path / "raw" / "0.tar").rename(tmp_path / "raw" / "1.tar")
    words = command("tars, captions in .txt", ["train", "test"], "train")
    assert "1.tar: 0.txt: names no split, as others do" in refuse(*words)
