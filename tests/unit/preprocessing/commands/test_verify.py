import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.__main__ import main
from preprocessing.shards.schema import KINDS, read_manifest
from preprocessing.shards.writer import ShardWriter, write_manifest
from tests.unit.preprocessing.helpers import convert, rows_of, write_json


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images as caption, vqa and nlvr data sets."""
    folder = tmp_path_factory.mktemp("prepared")
    end = ("--images", raw / "images", "--split", "val")
    convert("coco", "--annotations", raw / "annotations/captions_val2014.json", *end, "--out", folder / "caption")
    questions = raw / "vqa/v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = raw / "vqa/v2_mscoco_val2014_annotations.json"
    answers = folder / "answers.json"
    answers.write_text(json.dumps(["yes", "no", "red", "circle", "2", "3"]))
    convert("vqav2", "--questions", questions, "--annotations", annotations, "--answer-list", answers, *end,
            "--out", folder / "vqa")  # fmt: skip
    convert("nlvr2", "--annotations", raw / "nlvr2/dev.json", "--images", raw / "nlvr2/images", "--split", "val",
            "--out", folder / "nlvr")  # fmt: skip
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(kind: str) -> Path:
        return Path(shutil.copytree(prepared / kind, tmp_path / kind))

    return copied


def faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `verify` says of a folder that has faults."""
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    return capsys.readouterr().err


def rewrite(folder: Path, kind: str, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Write the rows of `folder/val` anew after `change`, with a manifest that fits."""
    rows = rows_of(folder / "val")
    change(rows)
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    writer = ShardWriter(folder / "val", kind, "val")
    for row in rows:
        writer.add(row)
    write_manifest(folder / "val", kind, "val", writer.close(), dropped={}, dropped_items=[], source={})


@pytest.mark.parametrize("kind", list(KINDS))
def test_clean_data_has_no_fault(prepared: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(prepared / kind)]) == 0
    assert main(["verify", str(prepared / kind / "val")]) == 0
    assert "no fault in val" in capsys.readouterr().out


def test_a_flipped_byte_is_reported_by_shard_and_row(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("caption")
    shard = folder / "val/shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    image = rows_of(folder / "val")[5]["image"]
    data[data.find(image) + len(image) // 2] ^= 1
    shard.write_bytes(data)
    said = faults(folder, capsys)
    assert "shard-00000.arrow: its SHA-256 is not the manifest's" in said
    assert "shard-00000.arrow row 5: image does not decode" in said


def test_lost_cut_and_foreign_shards(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("nlvr")
    shard = folder / "val/shard-00000.arrow"
    shutil.copy(shard, folder / "val/shard-00001.arrow")
    assert "shard-00001.arrow: is not in the manifest" in faults(folder, capsys)
    (folder / "val/shard-00001.arrow").unlink()
    shard.write_bytes(shard.read_bytes()[:-100])
    said = faults(folder, capsys)
    assert "shard-00000.arrow: has " in said and "is no Arrow file" in said
    shard.unlink()
    assert "shard-00000.arrow: is missing" in faults(folder, capsys)


def test_manifest_that_miscounts(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("caption")
    manifest = read_manifest(folder / "val")
    manifest["rows"] += 1
    manifest["shards"][0]["samples"] += 1
    (folder / "val/manifest.json").write_text(json.dumps(manifest))
    said = faults(folder, capsys)
    assert "the manifest's rows are not the sum" in said and "has 80 samples, the manifest says 81" in said
    (folder / "val/manifest.json").write_text("{")
    assert "manifest.json: invalid JSON" in faults(folder, capsys)


@pytest.mark.parametrize(
    ("kind", "column", "value", "said"),
    [
        ("caption", "image_id", "6101", "row 3: image_id 6101 stands in"),
        ("caption", "caption", [], "row 3: caption is empty"),
        ("caption", "image", b"no", "row 3: image is of no known format"),
        ("caption", "image_id", None, "row 3: column image_id is null"),
        ("vqa", "answers", [], "row 3: answers has 0 entries for"),
        ("nlvr", "answers", ["True", "perhaps"], "row 3: answers holds something"),
        ("nlvr", "identifier", ["dev-0-0-0", "x"], "row 3: identifier dev-0-0-0 stands in"),
        ("nlvr", "identifier", [None], "row 3: identifier holds a null"),
        ("vqa", "question_id", [None], "row 3: question_id holds a null"),
    ],
)
def test_bad_rows_are_named(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str], kind: str, column: str, value: Any, said: str
) -> None:
    folder = copy(kind)

    def change(rows: list[dict[str, Any]]) -> None:
        rows[3][column] = rows[0]["image_id"] if value == "6101" else value

    rewrite(folder, kind, change)
    said = said.replace("6101", str(rows_of(folder / "val")[0].get("image_id")))
    assert said in faults(folder, capsys)


@pytest.mark.parametrize(
    ("labels", "scores", "said"),
    [
        ([99], [1.0], "label 99 is beyond the 6 answers"),
        ([1], [1.0], "label 1 is 'no' in answer_list.json, here 'yes'"),
        ([0], [1.5], "score 1.5 of 'yes' is not in 0..1"),
        ([0, 1], [1.0], "answers, labels and scores differ in number"),
    ],
)
def test_bad_answers_are_named(
    copy: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    labels: list[int],
    scores: list[float],
    said: str,
) -> None:
    folder = copy("vqa")

    def change(rows: list[dict[str, Any]]) -> None:
        rows[2]["answers"][0], rows[2]["answer_labels"][0], rows[2]["answer_scores"][0] = ["yes"], labels, scores

    rewrite(folder, "vqa", change)
    assert f"shard-00000.arrow row 2: question 0: {said}" in faults(folder, capsys)


def test_vqa_without_its_answer_list(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("vqa")
    (folder / "answer_list.json").unlink()
    assert "answer_list.json: no such file" in faults(folder, capsys)


def test_vqa_beside_another_answer_list(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One more answer at its end: every label still means what it meant, but a model for it has a class more."""
    folder = copy("vqa")
    answers = json.loads((folder / "answer_list.json").read_text())
    write_json(folder / "answer_list.json", [*answers, "maybe"])
    assert "answer_list.json: is not the list that val was labeled by; put that one" in faults(folder, capsys)
    before = (folder / "val" / "manifest.json").read_bytes()
    for other in ([*answers, "maybe"], answers[:2]):  # to which most rows do not fit: no fault of theirs
        write_json(folder / "answer_list.json", other)
        assert main(["verify", str(folder), "--repair"]) == 2
        assert "is not the list that val was labeled by" in capsys.readouterr().err
    write_json(folder / "answer_list.json", answers)
    assert main(["verify", str(folder)]) == 0 and (folder / "val" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("make", ["folder", "loop"])
def test_files_that_cannot_be_read_are_faults(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str], make: str
) -> None:
    folder = copy("caption")
    manifest = read_manifest(folder / "val")
    manifest["dropped_list"] = {"file": "dropped.jsonl", "bytes": 1, "sha256": ""}
    (folder / "val/manifest.json").write_text(json.dumps(manifest))
    (folder / "val/shard-00000.arrow").unlink()
    for name in ("shard-00000.arrow", "dropped.jsonl"):
        path = folder / "val" / name
        path.mkdir() if make == "folder" else path.symlink_to(path)
    said = faults(folder, capsys)
    assert said.count("\n") == 2
    assert "shard-00000.arrow: cannot be read (" in said and "dropped.jsonl: cannot be read (" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_shard_without_permission_is_a_fault(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("caption")
    (folder / "val/shard-00000.arrow").chmod(0)
    assert "shard-00000.arrow: cannot be read (Permission denied)" in faults(folder, capsys)


def test_a_folder_named_as_another_split_is_a_fault(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("caption")
    (folder / "val").rename(folder / "train")
    said = f"{folder}/train: is named train, its manifest says val; rename it"
    assert said in faults(folder, capsys) and said in faults(folder / "train", capsys)
    monkeypatch.chdir(folder / "train")
    assert ".: is named train, its manifest says val" in faults(Path("."), capsys)
    (folder / "train").rename(folder / "mine")  # names that are no split's say nothing
    assert main(["verify", str(folder / "mine")]) == 0


def test_what_is_no_data_set_is_bad_usage(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "name a prepared data set" in refuse("verify", tmp_path)
    assert "name a prepared data set" in refuse("verify", tmp_path / "nowhere")


def test_inspect_prints_and_writes_a_page(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refuse: Callable[..., str]
) -> None:
    for kind in KINDS:
        capsys.readouterr()
        convert("inspect", prepared / kind, "--rows", 2, "--html", tmp_path / "page.html")
        out = capsys.readouterr().out
        page = (tmp_path / "page.html").read_text()
        assert f"{kind}, split val" in out and "64x64 RGB" in out and "columns: image" in out
        assert page.count("data:image/png;base64,") == (4 if kind == "nlvr" else 2)
        assert "http" not in page
    assert "--rows -1" in refuse("inspect", prepared, "--rows", -1)


def test_inspect_shows_broken_images_and_escapes(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("caption")

    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["image"] = b"no"
        rows[0]["caption"] = ["<script>alert(1)</script>"]

    rewrite(folder, "caption", change)
    convert("inspect", folder, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<em>is of no known format</em>" in page and "&lt;script&gt;" in page and "<script>" not in page
