"""The list of a split's ids, and what converters, `verify` and training make of ids that stand in two splits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from eve_ds.config import PretrainConfig
from eve_ds.data.data_config import DataConfig
from eve_ds.data.overlap import SplitIds
from eve_ds.data.shards import Split
from eve_ds.engine import setup
from preprocessing.__main__ import main
from preprocessing.errors import UserError
from preprocessing.running.storage import file_sha256
from preprocessing.shards.ids import IdKeys, join_keys, keys_of_shards, read_ids, shared_ids
from preprocessing.shards.schema import ID_COLUMNS, IDS, id_key, image_mark, is_leak, read_manifest
from tests.support.shards import tiny_tokenizer
from tests.unit.preprocessing.helpers import convert, image_of, write_json


def keys_of(values: list[object]) -> list[int]:
    return sorted({int.from_bytes(id_key(value), "little") for value in values})  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(image_of(number))
    return tmp_path


def split(folder: Path, task: str, split: str, records: list[dict[str, Any]], *more: object) -> Path:
    """Convert records into `folder`/out/`split`; returns that."""
    file = write_json(folder / "records.json", records)
    words = ["json", "--task", task, "--annotations", file, "--images", folder, "--split", split]
    convert(*words, "--out", folder / "out", "--min-answers", 1, *more)
    return folder / "out" / split


def caption(number: int, **more: object) -> dict[str, Any]:
    return {"image": f"{number}.jpg", "caption": "a b", "image_id": number, **more}


def test_the_list_holds_every_id_once(images: Path) -> None:
    asked = [
        {"image": f"{n // 2}.jpg", "image_id": n // 2, "question": "a?", "question_id": 100 + n, "answer": "yes"}
        for n in range(6)
    ]
    folder = split(images, "vqa", "train", asked, "--shard-rows", 1)
    manifest = read_manifest(folder)
    assert manifest["ids"] == {
        "file": IDS,
        "bytes": 8 * 9,
        "sha256": file_sha256(folder / IDS),
        "distinct": {"image_id": 3, "question_id": 6},
        "numbered": [],
        "version": 2,
    }
    found = read_ids(folder, manifest)
    assert found is not None and list(found) == list(ID_COLUMNS["vqa"])
    assert found["image_id"].tolist() == keys_of([0, 1, 2])
    assert found["question_id"].tolist() == keys_of(list(range(100, 106)))
    assert all(np.array_equal(found[column], keys) for column, keys in keys_of_shards(folder, manifest).items())
    convert("verify", images / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_list_is_the_same_after_a_stop_and_for_any_number_of_workers(
    images: Path, workers: int, refuse: Callable[..., str]
) -> None:
    records = [caption(number, image_id=f"id {number}") for number in (0, 1, 2, 9, 3, 4)]
    file = write_json(images / "records.json", records)
    words = ["json", "--task", "retrieval", "--annotations", file, "--images", images, "--split", "train", "--out",
             images / "out", "--shard-rows", 2, "--workers", workers]  # fmt: skip
    assert "9.jpg (image is missing)" in refuse(*words)
    if workers == 1:  # two are not told to stop at the same place each time
        assert (images / "out/.train.work/records/part-000000.json").exists()
    convert(*words, "--max-dropped", 0.5)
    found = read_ids(images / "out/train", read_manifest(images / "out/train"))
    assert found is not None and found["image_id"].tolist() == keys_of([f"id {n}" for n in range(5)])


def test_an_image_in_two_splits_is_reported_by_all(
    images: Path, refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    train = split(images, "retrieval", "train", [caption(n) for n in range(4)])
    val = split(images, "retrieval", "val", [caption(n) for n in (4, 5)])
    assert "warning" not in capsys.readouterr().out
    split(images, "retrieval", "val", [caption(n) for n in (2, 3, 4)], "--overwrite")
    test = split(images, "retrieval", "test", [caption(4)])
    printed = capsys.readouterr().out
    assert f"warning: {train} and {val}: hold the same 2 images, such as image_id 2, 3; training refuses" in printed
    assert f"warning: {val} and {test}: hold the same 1 images, such as image_id 4; a model chosen" in printed
    assert list(shared_ids([train, test])) == []
    assert main(["verify", str(images / "out")]) == 1
    error = capsys.readouterr().err
    assert (
        error
        == f"{train} and {val}: hold the same 2 images, such as image_id 2, 3; prepare one of them with --exclude\n"
    )
    (val / IDS).unlink()  # then the shards tell
    assert [which for _, _, which, _ in shared_ids([train, val])] == ["2 images, such as image_id 2, 3"]
    assert list(shared_ids([train, val], by_shards=False)) == []


def test_a_number_of_our_own_in_two_splits_is_another_image(images: Path) -> None:
    """Records without an identifier are numbered in each file anew: only the same pair in the same place is one."""

    def pairs(*first: int) -> list[dict[str, Any]]:
        return [{"images": [f"{n}.jpg", "5.jpg"], "sentence": "a b", "label": "True"} for n in first]

    train = split(images, "nlvr", "train", pairs(0, 1, 2))
    assert read_manifest(train)["ids"]["numbered"] == ["identifier"]
    other = split(images, "nlvr", "val", pairs(1, 3, 4))
    assert list(shared_ids([train, other])) == []
    assert SplitIds(Split(train)).shared(SplitIds(Split(other))) == ("", False)
    same = split(images, "nlvr", "test", pairs(3, 1))
    assert [which for _, _, which, _ in shared_ids([train, same])] == ["1 statements, such as identifier record-1-0-0"]
    for listed in (True, False):
        if not listed:
            (train / IDS).unlink()
            (same / IDS).unlink()
        found, is_fault = SplitIds(Split(train)).shared(SplitIds(Split(same)))
        assert is_fault and found.endswith(": 1 statements stand in both, such as identifier record-1-0-0")
        SplitIds(Split(same)).check_once()


def test_the_mark_of_an_image_is_its_length_and_its_end() -> None:
    whole = bytes(range(256)) * 2
    assert image_mark([whole]) == image_mark([memoryview(whole)]) == image_mark([pa.py_buffer(whole)])
    assert image_mark([whole]) != image_mark([whole[1:]])  # the same end
    assert image_mark([whole]) != image_mark([whole[:-1] + b"a"])  # the same length


def test_each_of_several_numbered_ids_of_a_row_has_a_key() -> None:
    keys = IdKeys("nlvr", ("identifier",))
    for first in (0, 2):
        keys.add({"identifier": [str(first), str(first + 1)]}, [b"left", b"right"])
    mark = image_mark([b"left", b"right"])
    assert join_keys("nlvr", [keys.record()])["identifier"].tolist() == sorted(
        int.from_bytes(id_key(str(number), mark), "little") for number in range(4)
    )


def test_two_downloads_with_the_same_keys_are_two_sets(tmp_path: Path) -> None:
    """img2dataset counts from 000000000 in each of its runs, and CC3M's train and val are two."""

    def download(name: str, first: int, *more: object) -> Path:
        folder = tmp_path / name / "00000"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"00000000{number}.jpg").write_bytes(image_of(first + number))
            (folder / f"00000000{number}.txt").write_text("a b")
        convert("img2dataset", "--images", folder.parent, "--split", name, "--out", tmp_path / "out", *more)
        return tmp_path / "out" / name

    train, val, test = download("train", 0), download("val", 10), download("test", 2)
    assert list(shared_ids([train, val])) == []
    assert [which for _, _, which, _ in shared_ids([train, test])] == [
        "1 images, such as image_id 000000000"
    ]  # image 2
    assert SplitIds(Split(train)).shared(SplitIds(Split(val))) == ("", False)
    (tmp_path / "val").rename(tmp_path / "gone")
    val = download("val", 0, "--overwrite")
    assert [which for _, _, which, _ in shared_ids([train, val])] == [
        "3 images, such as image_id 000000000, 000000001, 000000002"
    ]


def test_training_reads_no_shard_where_there_are_lists(images: Path) -> None:
    folders = [
        split(images, "retrieval", name, [caption(n) for n in numbers])
        for name, numbers in (("train", (0, 1, 2)), ("val", (3, 4)))
    ]
    splits = [Split(folder) for folder in folders]
    for folder in folders:
        (folder / "shard-00000.arrow").unlink()
    assert SplitIds(splits[0]).shared(SplitIds(splits[1])) == ("", False)


@pytest.mark.parametrize("harm", ["gone", "cut", "another", "no JSON object", "other columns", "older"])
def test_an_ids_file_that_does_not_match_the_manifest_is_ignored(
    harm: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = split(images, "retrieval", "train", [caption(n) for n in range(4)])
    val = split(images, "retrieval", "val", [caption(n) for n in (3, 4)])
    content = (train / IDS).read_bytes()
    manifest = json.loads((train / "manifest.json").read_text())
    if harm == "gone":
        (train / IDS).unlink()
    elif harm in ("cut", "another"):
        (train / IDS).write_bytes(content[:-8] if harm == "cut" else bytes(len(content)))
    else:
        other = {"version": 1} if harm == "older" else {"distinct": {"x": 4}}
        manifest["ids"] = 3 if harm == "no JSON object" else manifest["ids"] | other
        write_json(train / "manifest.json", manifest)
    assert "1 images stand in both, such as image_id 3" in SplitIds(Split(train)).shared(SplitIds(Split(val)))[0]
    assert main(["verify", str(train)]) == 1
    assert f"{train / IDS}: is missing, or is not what the manifest says" in capsys.readouterr().err
    assert main(["verify", str(train), "--repair"]) == 0
    assert "ids.bin is written anew: it is missing, or is not what the manifest says" in capsys.readouterr().out
    assert (train / IDS).read_bytes() == content
    assert read_manifest(train)["ids"]["distinct"] == {"image_id": 4}


def test_repair_lists_the_rows_that_are_left(images: Path) -> None:
    train = split(images, "retrieval", "train", [caption(n) for n in range(4)], "--shard-rows", 1)
    (train / "shard-00001.arrow").write_bytes(b"no Arrow file")
    convert("verify", train, "--repair")
    found = read_ids(train, read_manifest(train))
    assert found is not None and found["image_id"].tolist() == keys_of([0, 2, 3])


def test_the_webs_images_are_reported_apart_by_their_files(
    images: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The same image is another line of another file: all of val held out of train's lines is a leak, one is chance."""

    def lines(name: str, *numbers: int) -> Path:
        file = images / f"{name}_lines.tsv"
        file.write_text("caption\tfile\n" + "".join(f"a b\t{number}.jpg\n" for number in numbers))
        convert("cc3m", "--annotations", file, "--images", images, "--split", name, "--out", images / "out")
        return images / "out" / name

    train, val, test = lines("train", 0, 1, 2, 3, 3), lines("val", 2, 1, 0), lines("test", 4, 5, 1)
    printed = capsys.readouterr().out
    assert f"{train} and {val}: hold the same 3 images, such as image_id val_lines-0, val_lines-1" in printed
    assert "training refuses that" in printed
    assert f"{train} and {test}: hold the same 1 images, such as image_id test_lines-2; training lets so few" in printed
    assert read_manifest(train)["ids"]["distinct"] == {"image_id": 4}
    for _ in range(2):
        found = {split: SplitIds(Split(train)).shared(SplitIds(Split(split))) for split in (val, test)}
        assert [is_fault for _, is_fault in found.values()] == [True, False]
        assert "3 images stand in both, such as image_id val_lines-0, val_lines-1" in found[val][0]
        for folder in (train, val, test):
            (folder / IDS).unlink(missing_ok=True)  # then the shards tell
    assert main(["verify", str(images / "out"), "--repair"]) == 1
    assert f"{train} and {val}: hold the same 3 images" in (error := capsys.readouterr().err) and str(test) not in error
    config = PretrainConfig(data=DataConfig(path=str(images / "out")))
    opened = {
        name: setup.build_dataset(config, name, tiny_tokenizer(), train=False) for name in ("train", "val", "test")
    }
    setup.check_apart(config, opened["train"], {"test": opened["test"]})
    assert "1 images stand in both, such as image_id test_lines-2; so few are let pass" in caplog.text
    with pytest.raises(UserError, match=r"3 images stand in both, .*; leave them out of one of these"):
        setup.check_apart(config, opened["train"], {"val": opened["val"]})


def test_half_of_the_smaller_split_is_no_chance() -> None:
    assert is_leak("image_id", True, 1, 2) and not is_leak("image_id", True, 1, 3)
    assert is_leak("image_id", False, 1, 3) and is_leak("question_id", True, 1, 3)
