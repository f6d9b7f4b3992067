"""Pipes and devices where files should be: refused by name, never waited at; files outside of a manifest's folder."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.local_files import check_regular
from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

SAID = "is a pipe, a socket or a device; write its content to a file, and name that"


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A read that waits at a pipe fails after a while: nobody will ever write to it."""
    signal.alarm(60)  # its default action ends the tests: nothing else gets a blocked open back
    yield
    signal.alarm(0)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data set of two images and their annotations."""
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(image_of(number))
    records = [{"image": f"{n}.jpg", "caption": f"text {n}", "image_id": n} for n in range(2)]
    convert("json", "--task", "retrieval", "--annotations", write_json(tmp_path / "a.json", records), "--images",
            tmp_path, "--split", "train", "--out", tmp_path / "data")  # fmt: skip
    return tmp_path / "data"


COMMANDS = {
    "json": "json --task retrieval --annotations PIPE",
    "json vqa": "json --task vqa --annotations PIPE",
    "coco": "coco --annotations PIPE",
    "flickr30k": "flickr30k --annotations PIPE",
    "only": "flickr30k --annotations a.token --only PIPE",
    "visual-genome": "visual-genome --regions PIPE",
    "image-data": "visual-genome --regions a.json --image-data PIPE",
    "visual-genome-qa": "visual-genome-qa --questions PIPE",
    "vqav2": "vqav2 --questions PIPE --annotations b.json",
    "annotations": "vqav2 --questions a.json --annotations PIPE",
    "answer-list": "json --task vqa --annotations a.json --answer-list PIPE",
    "nlvr2": "nlvr2 --annotations PIPE",
    "cc3m": "cc3m --annotations PIPE",
    "sbu": "sbu --annotations PIPE",
    "exclude": "json --task retrieval --annotations a.json --exclude PIPE",
    "hashes": "json --task retrieval --annotations a.json --exclude-images-of PIPE",
    "device": "cc3m --annotations /dev/zero",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_pipes_given_as_inputs(tmp_path: Path, pipe: Path, refuse: Callable[..., str], name: str) -> None:
    if name == "hashes":
        pipe = pipe.rename(tmp_path / "pipe.npz")
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption": "a", "question": "b?", "question_id": 1}]')
    (tmp_path / "b.json").write_text('{"annotations": []}')
    (tmp_path / "a.token").write_text("a.jpg#0\ta\n")
    words = [pipe if word == "PIPE" else word for word in COMMANDS[name].split()]
    words = [tmp_path / word if isinstance(word, str) and word[:2] in ("a.", "b.") else word for word in words]
    message = refuse(*words, "--images", tmp_path, "--split", "train", "--out", tmp_path / "out")
    assert SAID in message and ("/dev/zero" if name == "device" else str(pipe)) in message


@pytest.mark.parametrize("name", ["00001.tar", "00001.parquet", "00000/1.txt", "00000_stats.json"])
def test_pipes_among_img2datasets_files(tmp_path: Path, refuse: Callable[..., str], name: str) -> None:
    (tmp_path / "raw/00000").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"raw/00000/{number}.jpg").write_bytes(image_of(number))
    (tmp_path / "raw/00000/0.txt").write_text("a")
    os.mkfifo(tmp_path / "raw" / name)
    layout = {"tar": "webdataset", "parquet": "parquet"}.get(name.rpartition(".")[2], "files")
    command = ["img2dataset", "--images", tmp_path / "raw", "--format", layout, "--split", "train"]
    message = refuse(*command, "--out", tmp_path / "out")
    assert SAID in message and name in message


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.arrow"])
@pytest.mark.parametrize(
    "words", ["inspect", "tokenizer train --vocab-size 300 --out T --data", "duplicates hash --out T.npz"]
)
def test_pipes_in_prepared_data_sets(
    prepared: Path, tmp_path: Path, refuse: Callable[..., str], name: str, words: str
) -> None:
    (prepared / "train" / name).unlink()
    os.mkfifo(prepared / "train" / name)
    message = refuse(*words.replace("T", f"{tmp_path}/T").split(), prepared)
    assert SAID in message and name in message


def test_an_image_that_is_a_pipe_is_dropped_and_counted(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").unlink()
    os.mkfifo(tmp_path / "1.jpg")
    convert("json", "--task", "retrieval", "--annotations", tmp_path / "a.json", "--images", tmp_path, "--split",
            "val", "--out", prepared, "--max-dropped", 0.5)  # fmt: skip
    assert read_manifest(prepared / "val")["dropped"] == {"image is no regular file": 1}
    assert [row["image_id"] for row in rows_of(prepared / "val")] == ["0"]


def test_what_the_shell_has_opened_can_be_read_where_one_reading_is_enough(tmp_path: Path, pipe: Path) -> None:
    reader, writer = os.pipe()
    try:
        check_regular(f"/dev/fd/{reader}", streams=True)
        with pytest.raises(UserError, match="is a pipe"):
            check_regular(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)
    with pytest.raises(UserError, match="is a pipe"):
        check_regular(pipe, streams=True)
    check_regular(tmp_path)
    check_regular(tmp_path / "nothing")


@pytest.mark.parametrize("outside", ["../../other.arrow", "/OUT/other.arrow", "..", "", "a/b.arrow", "x\0"])
def test_manifests_name_files_of_their_folder_alone(
    prepared: Path, tmp_path: Path, refuse: Callable[..., str], capsys: pytest.CaptureFixture[str], outside: str
) -> None:
    """`verify --repair` removes and rewrites what the manifest names."""
    other = tmp_path / "other.arrow"
    shutil.copy(prepared / "train/shard-00000.arrow", other)
    name = outside.replace("/OUT", f"{tmp_path}")
    manifest = json.loads((prepared / "train/manifest.json").read_text())
    before = manifest["shards"][0]["file"]
    manifest["shards"][0]["file"] = name
    write_json(prepared / "train/manifest.json", manifest)
    for words in (["inspect"], ["duplicates", "hash", "--out", tmp_path / "h.npz"]):
        assert f"file {name!r} is not in the folder of the manifest" in refuse(*words, prepared)
    manifest["shards"][0]["file"] = before
    manifest["dropped_list"] = {"file": name, "bytes": 1, "sha256": ""}
    write_json(prepared / "train/manifest.json", manifest)
    assert f"file {name!r} is not in the folder of the manifest" in refuse("inspect", prepared)
    assert other.read_bytes() == (prepared / "train/shard-00000.arrow").read_bytes()
