"""Text files without images, and what the tools say of them."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.__main__ import main
from preprocessing.shards.schema import read_manifest
from preprocessing.shards.writer import ShardWriter, write_manifest
from preprocessing.sources.text_lines import read_texts
from preprocessing.text.cleaning import TextCleaning
from tests.unit.preprocessing.helpers import convert, image_of, rows_of

LINES = ["The first sentence.", "", "  A second one, twice.  ", "A second one, twice.", "--", "last"]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(LINES).encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"of another file\r\n\xff\n" + b"x\n" * 300))
    return [tmp_path / "a.txt", tmp_path / "b.txt.gz"]


@pytest.fixture
def prepared(files: list[Path], tmp_path: Path) -> Path:
    convert("texts", "--texts", *files, "--split", "train", "--out", tmp_path / "out", "--shard-rows", 200)
    return tmp_path / "out"


def test_a_row_a_line(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, manifest = rows_of(prepared / "train"), read_manifest(prepared / "train")
    kept = [(1, "The first sentence."), (3, "A second one, twice."), (4, "A second one, twice."), (6, "last")]
    assert [(row["image_id"], row["caption"]) for row in rows[:5]] == [
        *((f"train-a-{number}", [text]) for number, text in kept),
        ("train-b-1", ["of another file"]),
    ]
    assert all(row["image"] == b"" and row["split"] == "train" for row in rows) and len(rows) == 305
    assert (manifest["modality"], manifest["samples"], len(manifest["shards"])) == ("text", 305, 2)
    assert manifest["dropped"] == {"caption has only punctuation": 1, "line is not UTF-8 text": 1}
    assert manifest["source"] == {"lines": 306}
    capsys.readouterr()
    assert main(["verify", str(prepared)]) == 0
    assert main(["inspect", str(prepared), "--rows", "1", "--html", str(prepared / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "train: caption, split train, texts without images" in said and '"image": "none"' in said
    page = (prepared / "page.html").read_text()
    assert "The first sentence." in page and "<img" not in page and "<em>" not in page


def test_the_same_bytes_for_any_workers(files: list[Path], prepared: Path, tmp_path: Path) -> None:
    more = ("--split", "train", "--out", tmp_path / "again", "--shard-rows", 200, "--workers", 2)
    convert("texts", "--texts", *files, *more)
    for path in sorted((prepared / "train").iterdir()):
        if path.name != "provenance.json":
            assert path.read_bytes() == (tmp_path / "again/train" / path.name).read_bytes(), path.name


def test_files_of_one_name_in_two_splits(files: list[Path], prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("texts", "--texts", files[0], "--split", "val", "--out", prepared)
    assert "warning" not in capsys.readouterr().out
    assert main(["verify", str(prepared)]) == 0


def test_a_file_that_changes_while_it_is_read(files: list[Path]) -> None:
    source = read_texts([str(files[0])], "train", TextCleaning())
    assert len(source.rows) == 4 and source.rows[2].name == "train-a-4"
    files[0].write_text("one line")
    with pytest.raises(Exception, match=r"a\.txt: 1 lines, 4 when the run began; start again"):
        list(source.rows)


def test_bad_input(files: list[Path], tmp_path: Path, refuse: Callable[..., str]) -> None:
    options = ("--split", "train", "--out", tmp_path / "out")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("another b")
    shutil.copy(files[0], tmp_path / "copy.txt")
    for texts, words in (
        ([tmp_path / "none.txt"], "none.txt: no such file"),
        ([tmp_path / "empty.txt"], "empty.txt: is empty"),
        ([files[1], tmp_path / "b.txt"], "--texts: two files are called b, which ids of lines begin with; rename one"),
        ([files[0], tmp_path / "copy.txt"], "are one file under two names"),
    ):
        assert words in refuse("texts", "--texts", *texts, *options)
    assert "--max-side" in refuse("texts", "--texts", files[0], *options, "--max-side", 64)


def test_tools_for_images_refuse_texts(prepared: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    other = ("img2dataset", "--images", tmp_path, "--split", "train", "--out", tmp_path / "x")
    for arguments in (
        ("duplicates", "hash", prepared, "--out", tmp_path / "hashes.npz"),
        (*other, "--exclude-images-of", prepared),
    ):
        assert f"{prepared}/train: holds texts without images; name a data set of images" in refuse(*arguments)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_what_a_row_must_not_hold(modality: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row with both is a fault of such a split, and taken out; without a manifest the rows tell which it is."""
    own = {"image": image_of(1, "PNG"), "caption": []} if modality == "image" else {"image": b"", "caption": ["a"]}
    folder = tmp_path / "train"
    folder.mkdir()
    with ShardWriter(folder, "caption", "train") as writer:
        for number in range(3):
            both = {"image": image_of(number, "PNG"), "caption": ["a"]} if number == 2 else own
            writer.add(both | {"image_id": str(number)})
        shards = writer.close()
    more = {"dropped": {}, "dropped_items": [], "source": {}, "modality": modality}
    write_manifest(folder, "caption", "train", shards, **more)
    assert main(["verify", str(folder)]) == 1
    column = {"image": "caption", "text": "image"}[modality]
    fault = f"shard-00000.arrow row 2: {column} is not empty, and the manifest says modality {modality}"
    assert fault in capsys.readouterr().err
    assert main(["verify", str(folder), "--repair"]) == 0
    assert [row["image_id"] for row in rows_of(folder)] == ["0", "1"]
    assert read_manifest(folder)["modality"] == modality
    (folder / "manifest.json").unlink()
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert read_manifest(folder)["modality"] == modality and main(["verify", str(folder)]) == 0
