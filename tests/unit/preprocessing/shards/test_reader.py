"""What reads prepared data is refused a damaged shard in one line: no crash, no traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.writer import ShardWriter, write_manifest
from tests.unit.preprocessing.helpers import convert, image_of

_VQA = {
    "questions": ["what?"],
    "answers": [["yes"]],
    "answer_labels": [[0]],
    "answer_scores": [[1.0]],
    "question_id": [1],
}


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    """A split "train" of one shard."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, kind, "train") as writer:
        for row in rows:
            writer.add(row)
        write_manifest(folder, kind, "train", writer.close(), dropped={}, dropped_items=[], source={})


def captioned(index: int, **changes: Any) -> dict[str, Any]:
    return {"image": image_of(index, "PNG", side=8), "caption": ["a tall one"], "image_id": str(index)} | changes


def paired(index: int, **changes: Any) -> dict[str, Any]:
    images = {"image_0": image_of(index, "PNG", side=8), "image_1": image_of(index + 50, "PNG", side=8)}
    return images | {"questions": ["a"], "answers": ["True"], "identifier": [f"dev-{index}-0-0"]} | changes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data/train", "caption", [captioned(index) for index in range(4)])
    (tmp_path / "images").mkdir()
    return tmp_path / "data"


def set_offset(shard: bytes, length: int) -> bytes:
    """The offset behind the first value, which is `length` bytes long, becomes 2^30."""
    place = shard.index(bytes(4) + length.to_bytes(4, "little")) + 4
    return shard[:place] + (1 << 30).to_bytes(4, "little") + shard[place + 4 :]


def damage(path: Path, kind: str) -> None:
    shard = path.read_bytes()
    if kind == "image offset":
        path.write_bytes(set_offset(shard, len(image_of(0, "PNG", side=8))))
    elif kind == "caption offset":
        path.write_bytes(set_offset(shard, len("a tall one")))
    elif kind == "batch header":
        place = 16 + int.from_bytes(shard[12:16], "little") + 8  # behind the magic word, the schema and two lengths
        path.write_bytes(shard[:place] + bytes(192) + shard[place + 192 :])
    elif kind == "column name":
        name = len("caption").to_bytes(4, "little") + b"caption"
        assert name in shard
        path.write_bytes(shard.replace(name, name[:-1] + b"\xa0"))
    elif kind == "another kind":
        write(path.parent / "other", "vqa", [_VQA | {"image": image_of(), "image_id": "1"}])
        path.write_bytes((path.parent / "other/shard-00000.arrow").read_bytes())
    elif kind == "cut":
        path.write_bytes(shard[:-100])
    else:
        path.unlink()
        if kind == "a folder":
            path.mkdir()


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "inspect": lambda data: ["inspect", data],
    "duplicates": lambda data: ["duplicates", "hash", data, "--out", data / "list.npz"],
    "tokenizer": lambda data: ["tokenizer", "train", "--data", data, "--vocab-size", 300, "--out", data / "t"],
    "exclude": lambda data: ["json", "--task", "retrieval", "--annotations", data / "a.json", "--split", "train",
                             "--images", data.parent / "images", "--out", data / "new",
                             "--exclude-images-of", data],
}  # fmt: skip


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("image offset", "record batch 0 cannot be read"),
        ("caption offset", "record batch 0 cannot be read"),
        ("batch header", "cannot be read"),
        ("column name", "is no Arrow file ('utf-8' codec can't decode byte 0xa0"),
        ("another kind", "its columns are not those that its kind has"),
        ("cut", "is no Arrow file"),
        ("lost", "is missing"),
        ("a folder", "is no Arrow file"),
    ],
)
def test_damaged_shards_are_refused(data: Path, refuse: Callable[..., str], command: str, kind: str, said: str) -> None:
    damage(data / "train/shard-00000.arrow", kind)
    line = refuse(*COMMANDS[command](data))
    assert f"{data}/train/shard-00000.arrow: " in line and said in line
    assert f"`python -m preprocessing verify {data}/train`" in line


def test_null_values_are_refused_by_row(tmp_path: Path, refuse: Callable[..., str]) -> None:
    def refused(name: str, kind: str, row: dict[str, Any], command: str) -> str:
        data = tmp_path / name
        make = captioned if kind == "caption" else paired
        write(data / "train", kind, [make(0), make(1), row])
        return refuse(*COMMANDS[command](data)).partition("shard-00000.arrow ")[2]

    assert refused("a", "caption", captioned(2, caption=["x", None]), "tokenizer").startswith("row 2: caption is null")
    assert refused("c", "caption", captioned(2, image_id=None), "duplicates").startswith("row 2: image or its id")
    for name, identifier in (("d", None), ("e", []), ("f", [None])):
        line = refused(name, "nlvr", paired(2, identifier=identifier), "duplicates")
        assert line.startswith("row 2: image_0 or its id is null")


def test_inspect_shows_rows_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"image": image_of(), "image_id": None}
    rows = [
        _VQA | image | {"answers": [[None], ["no"]], "answer_scores": None},
        _VQA | image | {"questions": [None, "b"]},
    ]
    write(tmp_path / "vqa/train", "vqa", rows)
    write(tmp_path / "nlvr/train", "nlvr", [paired(0, answers=[None, "True"], identifier=[]), paired(1, answers=None)])
    for kind in ("vqa", "nlvr"):
        convert("inspect", tmp_path / kind, "--html", tmp_path / "page.html")
        assert "null" in capsys.readouterr().out
        assert "<div class=id>None</div>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("content", ['{"command": "python', "[]", "", '{"time": ' + "9" * 5000 + "}"])
def test_a_broken_provenance_is_reported(data: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (data / "train/provenance.json").write_text(content)
    convert("inspect", data)
    assert "made by: unknown, provenance.json cannot be read\n" in capsys.readouterr().out
