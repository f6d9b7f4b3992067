"""Records that name their split themselves: one of another split than the wanted one never becomes a row."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.__main__ import main
from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

SPLITS = ("test", "train2014", "val", "restval", "Validation", "dev", "TEST")
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
            for ending, content in {"jpg": image_of(number), **beside(splits, number, text)}.items():
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return ["img2dataset", "--format", "webdataset"]


def folders(raw: Path, splits: Sequence[Any], text: bool) -> list[object]:
    for number in range(len(splits)):
        for ending, content in beside(splits, number, text).items():
            (raw / f"{number}.{ending}").write_bytes(content)
    return ["img2dataset", "--format", "files"]


def parquet(raw: Path, splits: Sequence[Any]) -> list[object]:
    rows = [{"image": {"bytes": image_of(number)}, "caption": f"a {number}"} for number in range(len(splits))]
    table = pa.Table.from_pylist(rows)
    if any(splits):
        table = table.append_column("Split", pa.array(splits, pa.string()))
    pq.write_table(table, raw / "0.parquet")
    return ["img2dataset", "--format", "parquet"]


Form = Callable[[Path, Sequence[Any]], list[object]]
LAYOUTS: dict[str, Form] = {
    "tars, captions in .json": lambda raw, splits: tars(raw, splits, False),
    "tars, captions in .txt": lambda raw, splits: tars(raw, splits, True),
    "folders, captions in .json": lambda raw, splits: folders(raw, splits, False),
    "folders, captions in .txt": lambda raw, splits: folders(raw, splits, True),
}
FORMS: dict[str, Form] = {
    **{form.__name__: form for form in (tsv, json_lines, json_list, flickr, coco, retrieval, vqa, nlvr, parquet)},
    **LAYOUTS,
}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[object]]:
    """The words that convert records of these splits, written in a form."""

    def words(form: str, splits: Sequence[Any], split: str) -> list[object]:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        for number in range(len(splits)):
            (raw / image(number)).write_bytes(image_of(number))
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
        assert (row.get("image") or row["image_0"]) == image_of(found[-1])
    return found


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("form", FORMS)
def test_records_of_other_splits_are_no_rows(
    form: str, split: str, command: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*command(form, SPLITS, split))
    assert numbers(tmp_path / "out" / split) == OF[split]
    assert read_manifest(tmp_path / "out" / split)["dropped"] == {}
    others = ", ".join(f"{len(OF[name])} of {name}" for name in sorted(OF) if name != split)
    said = f": {len(OF[split])} records are of {split} by their split, skipped: {others}\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_a_split_that_no_record_names(
    form: str, command: Callable[..., list[object]], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    message = refuse(*command(form, ["train", "train", "val"], "test"))
    assert ": holds no record of split test by their split, but 2 of train, 1 of val; give another" in message
    assert not (tmp_path / "out" / "test").exists()


WITHOUT = [form for form in FORMS if form != "tsv"]  # which has a column or none


@pytest.mark.parametrize("form", WITHOUT)
def test_records_without_a_split_are_all_of_the_wanted_one(
    form: str, command: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*command(form, [None] * 3, "val"))
    assert numbers(tmp_path / "out" / "val") == [0, 1, 2] and "by their split" not in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("odd", "said", "reason"),
    [
        ("", "names no split, as others do; fix the file", "record names no split, others do"),
        (
            "trn",
            """its split is "trn", none of train, restval, val, dev and test; fix""",
            "split of the record is none",
        ),
    ],
)
def test_a_record_whose_split_is_invalid(
    form: str,
    odd: str,
    said: str,
    reason: str,
    command: Callable[..., list[object]],
    tmp_path: Path,
    refuse: Callable[..., str],
) -> None:
    words = command(form, ["train", odd, "train", "test"], "train")
    message = refuse(*words)
    assert said in message and "(1 of 3 records are at fault" in message
    convert(*words, "--max-dropped", "0.5")
    assert numbers(tmp_path / "out" / "train") == [0, 2]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {reason: 1}


@pytest.mark.parametrize("form", WITHOUT)
def test_a_first_record_without_a_split(
    form: str, command: Callable[..., list[object]], refuse: Callable[..., str]
) -> None:
    message = refuse(*command(form, [None, "train", "test"], "train"), "--max-dropped", "1")
    assert ": names no split, as 2 records behind it do; fix it, or take it out" in message


@pytest.mark.parametrize("form", ["json_lines", "retrieval", "coco"])
def test_a_field_that_means_something_else(
    form: str, command: Callable[..., list[object]], refuse: Callable[..., str]
) -> None:
    message = refuse(*command(form, [0, {"name": "train"}], "train"))
    assert "its split is 0, none of train, " in message and "or call the field otherwise if it means" in message


@pytest.mark.parametrize("form", ["json_lines", "json_list", "coco", "retrieval", "tars, captions in .txt"])
def test_the_field_in_capitals(form: str, command: Callable[..., list[object]], tmp_path: Path) -> None:
    words = command(form, ["train", "test"], "train")
    for path in (tmp_path / "raw").glob("*.*"):
        if path.suffix != ".jpg":
            path.write_bytes(path.read_bytes().replace(b'"split"', b'"Split"'))
    convert(*words)
    assert numbers(tmp_path / "out" / "train") == [0]


@pytest.mark.parametrize("form", ["json_lines", "flickr", "coco", "retrieval", "folders, captions in .txt"])
def test_a_list_of_another_split_excludes_nothing_and_is_no_wrong_list(
    form: str, command: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(form, ["train", "test", "train"], "train")
    (tmp_path / "list.txt").write_text("1.jpg\n")
    convert(*words, "--exclude", tmp_path / "list.txt")
    assert "list.txt: 1 of 1 images found\n--exclude: nothing left out\n" in capsys.readouterr().out
    assert numbers(tmp_path / "out" / "train") == [0, 2]


@pytest.mark.parametrize("form", ["json_lines", "json_list", "coco"])
def test_faults_of_another_split_are_not_of_this_one(
    form: str, command: Callable[..., list[object]], tmp_path: Path
) -> None:
    words = command(form, ["train", "test", "train"], "train")
    path = next(path for path in (tmp_path / "raw").glob("*.json*"))
    name = "file_name" if form == "coco" else "image"
    path.write_text(path.read_text().replace(f'"{name}": "1.jpg"', f'"{name}": null'))
    convert(*words)
    assert numbers(tmp_path / "out" / "train") == [0, 2]


def test_a_split_of_coco_in_its_annotations(command: Callable[..., list[object]], tmp_path: Path) -> None:
    words = command("coco", [None] * 2, "train")
    path = tmp_path / "raw" / "coco.json"
    content = json.loads(path.read_text())
    for record, split in zip(content["annotations"], ("train", "test"), strict=True):
        record["split"] = split
    path.write_text(json.dumps({**content, "images": [{**image, "split": ""} for image in content["images"]]}))
    assert main([str(word) for word in words]) == 2  # images without, annotations with: no way to tell
    path.write_text(json.dumps({**content, "images": [{**image, "split": "train"} for image in content["images"]]}))
    convert(*words)
    assert numbers(tmp_path / "out" / "train") == [0]


@pytest.mark.parametrize("layout", ["tars, captions in .txt", "folders, captions in .txt"])
def test_the_last_of_many_records(
    layout: str, command: Callable[..., list[object]], refuse: Callable[..., str]
) -> None:
    message = refuse(*command(layout, [None] * 20 + ["test"], "train"))
    assert "names no split, as 1 records behind it do" in message


def test_a_cut_record_beside_a_text(command: Callable[..., list[object]], tmp_path: Path) -> None:
    words = command("folders, captions in .txt", ["test", "train", "train"], "train")
    path = tmp_path / "raw" / "0.json"
    path.write_text(path.read_text()[:-1])
    convert(*words, "--max-dropped", "0.4")
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {"text of an image is unreadable": 1}
    assert numbers(tmp_path / "out" / "train") == [1, 2]


@pytest.mark.parametrize("mark", [",", "|"])
def test_a_caption_that_runs_over_into_the_split(
    mark: str, command: Callable[..., list[object]], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    words = command("flickr", ["train", "train"], "train")
    lines = [mark.join(line) for line in (("image", "comment", "split"), ("0.jpg", "a 0", "train"))]
    (tmp_path / "raw" / "captions.txt").write_text(
        "\n".join([*lines, mark.join(("1.jpg", "a man", "unquoted", "train"))])
    )
    assert "none of train, restval, val, dev and test; fix the file" in refuse(*words)
