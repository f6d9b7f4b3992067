"""One bad line of twelve million: counted under --max-dropped, never fatal by itself, never silent."""

import base64
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.errors import UserError
from preprocessing.formats import lines as lines_module
from preprocessing.formats.caption_files import ImageFinder, read_captions
from preprocessing.formats.lines import CutFile, open_text, read_lines
from preprocessing.images.exclusion import ImageList
from preprocessing.shards.schema import read_manifest
from preprocessing.sources.split_names import RecordSplits
from preprocessing.text.cleaning import TextCleaning
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

GOOD = 60
BAD: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"caption": "a", "image"', "line is invalid JSON"),
    "no object": (b"[1]", "line is no JSON object"),
    "NaN": (b'{"caption": NaN, "image": "0.jpg"}', "caption is no text"),
    "null": (b'{"caption": "a", "image": null}', "record names no image"),
    "no caption": (b'{"image": "0.jpg"}', "record has no caption"),
    "no UTF-8": (b'{"caption": "\xff\xfe", "image": "0.jpg"}', "line is invalid JSON"),
    "deep": (b'{"caption": ' + b"[" * 100_000, "line is invalid JSON"),
    "deep, but readable": (b'{"caption": ' + b"[" * 900 + b"]" * 900 + b', "image": "0.jpg"}', "caption is no text"),
    "a tab too many": (b"a\tb\t0.jpg", "line has too many columns or too few"),
    "a tab too few": (b"a", "line has too many columns or too few"),
    "no UTF-8 in TSV": (b"\xff\t0.jpg", "line is not UTF-8 text"),
}


UNSEEN = min({*range(300)} - {*random.Random(0).sample(range(300), 100)})  # no row of a fixed number that is looked at


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(image_of(number))
    return folder


def text(form: str, bad: bytes | None = None) -> bytes:
    """Sixty lines, `bad` among them behind the seventh."""
    if form == "tsv":
        found = [b"caption\tfile", *(f"caption {n}\t{n % 3}.jpg".encode() for n in range(GOOD))]
    else:
        found = [json.dumps({"caption": f"caption {n}", "image": f"{n % 3}.jpg"}).encode() for n in range(GOOD)]
    return b"\n".join(found if bad is None else [*found[:7], bad, *found[7:]]) + b"\n"


def command(tmp_path: Path, images: Path, name: str = "set.x") -> list[object]:
    return [
        "cc12m", "--annotations", tmp_path / name, "--images", images, "--split", "train", "--out", tmp_path / "out"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_counted_and_the_others_are_kept(
    tmp_path: Path, images: Path, refuse: Callable[..., str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    bad, reason = BAD[kind]
    form = "tsv" if "ta" in kind or "TSV" in kind else "json"
    (tmp_path / "set.x").write_bytes(text(form, bad))
    message = refuse(*command(tmp_path, images))  # 1 of 61 is more than the default, 0.01
    assert f"set.x: line 8: {'' if kind != 'deep' else 'invalid JSON (nested too deep'}" in message
    assert "(1 of 61 records are at fault, --max-dropped is 0.01)" in message
    convert(*command(tmp_path, images), "--max-dropped", 0.02)
    rows = rows_of(tmp_path / "out/train")
    assert [row["caption"] for row in rows] == [[f"caption {n}"] for n in range(GOOD)]
    assert [row["image"] for row in rows] == [image_of(n % 3) for n in range(GOOD)]
    before = 6 if form == "tsv" else 7
    assert [row["image_id"] for row in rows] == [f"set-{n}" for n in range(GOOD + 1) if n != before]  # lines, from 0
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"] == {reason: 1}
    assert manifest["dropped_items"] == [{"item": "set.x: line 8", "reason": reason}]
    assert f"1 dropped: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "rest"), [(b"a\tb\thttp://a/0.jpg", b"a\thttp://a/%d.jpg"), (b'"caption": "a"}', b'{"desc": "a", "url": "http://a/%d.jpg"}')]
)  # fmt: skip
def test_a_first_line_that_is_bad_is_no_header(tmp_path: Path, images: Path, first: bytes, rest: bytes) -> None:
    """Its row counts all the same: images are named by their rows."""
    (tmp_path / "set.x").write_bytes(b"\n".join([first, rest % 1, rest % 2]))
    convert(*command(tmp_path, images), "--image-name", "{row}", "--max-dropped", 0.5)
    assert [row["image"] for row in rows_of(tmp_path / "out/train")] == [image_of(1), image_of(2)]


def test_a_header_with_unknown_names_is_refused_whatever_the_bound(
    tmp_path: Path, images: Path, refuse: Callable[..., str]
) -> None:
    """Were it taken for a bad line, every image would get the caption before its own."""
    (tmp_path / "set.x").write_bytes(b"link\twords\n" + b"a\thttp://a/b\n" * 9)
    message = refuse(*command(tmp_path, images), "--image-name", "{row}", "--max-dropped", 1)
    assert "set.x: line 1: has 2 tab-separated columns without known names" in message


def test_bad_entries_of_a_list(tmp_path: Path, images: Path, refuse: Callable[..., str]) -> None:
    entries: list[Any] = [{"caption": f"c{n}", "image": f"{n}.jpg"} for n in range(3)]
    write_json(tmp_path / "set.x", [entries[0], {"caption": 5, "image": "1.jpg"}, None, *entries[1:]])
    assert "set.x: entry 1: its caption is 5, not text; fix the file (2 of 5" in refuse(*command(tmp_path, images))
    convert(*command(tmp_path, images), "--max-dropped", 0.4)
    assert [row["image_id"] for row in rows_of(tmp_path / "out/train")] == ["set-0", "set-3", "set-4"]
    content = {"image_urls": ["http://a/0.jpg", None, "http://a/2.jpg"], "captions": ["a", "b", "c"]}
    write_json(tmp_path / "set.x", content)
    convert(*command(tmp_path, images), "--image-name", "{row}", "--max-dropped", 0.4, "--overwrite")
    assert [row["caption"] for row in rows_of(tmp_path / "out/train")] == [["a"], ["c"]]


def test_faults_and_lost_images_have_one_bound(tmp_path: Path, images: Path, refuse: Callable[..., str]) -> None:
    lines = [*text("json", b"{").splitlines(), b'{"caption": "a", "image": "lost.jpg"}']
    (tmp_path / "set.x").write_bytes(b"\n".join(lines))
    message = refuse(*command(tmp_path, images), "--max-dropped", 0.03)
    assert (
        "more than --max-dropped 0.03 of 62 rows must be dropped: lost.jpg (image is missing); and 1 records are"
        in (message)
    )
    convert(*command(tmp_path, images), "--max-dropped", 0.033)
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"line is invalid JSON": 1, "image is missing": 1}


@pytest.mark.parametrize(
    ("lost", "bound"), [({*range(150)}, 0.9), ({*range(300)} - {UNSEEN}, 0.999), ({*range(300)} - {UNSEEN}, 1)]
)
def test_the_look_at_the_images_refuses_nothing_that_the_bound_allows(
    tmp_path: Path, images: Path, lost: set[int], bound: float
) -> None:
    for number in set(range(300)) - lost:
        (images / f"row{number}.jpg").write_bytes(image_of(number))
    entries = [{"caption": "a", "image": f"row{number}.jpg"} for number in range(300)]
    write_json(tmp_path / "set.x", entries)
    convert(*command(tmp_path, images), "--max-dropped", bound)
    assert len(rows_of(tmp_path / "out/train")) == 300 - len(lost)
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"image is missing": len(lost)}


def test_compressed_lines(tmp_path: Path, images: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "set.gz").write_bytes(gzip.compress(text("json")))
    convert(*command(tmp_path, images, "set.gz"))
    (tmp_path / "set.x").write_bytes(text("json"))
    convert(*command(tmp_path, images)[:-1], tmp_path / "plain")
    assert rows_of(tmp_path / "out/train") == rows_of(tmp_path / "plain/train")
    line = json.dumps({"desc": "a", "binary": base64.b64encode(image_of()).decode()})
    (tmp_path / "set.gz").write_bytes(gzip.compress(line.encode()))
    assert "set.gz: is compressed, and images in it are read by" in refuse(
        *command(tmp_path, images, "set.gz"), "--overwrite"
    )


def test_a_compressed_file_that_is_cut_counts_and_one_that_is_damaged_is_refused(
    tmp_path: Path, images: Path, refuse: Callable[..., str]
) -> None:
    noise = random.Random(0)
    lines = [json.dumps({"caption": f"{noise.random()}", "image": f"{n % 3}.jpg"}) for n in range(300)]
    packed = gzip.compress("\n".join(lines).encode())
    half = len(packed) // 2
    (tmp_path / "set.gz").write_bytes(packed[:half])
    convert(*command(tmp_path, images, "set.gz"))
    captions = [row["caption"] for row in rows_of(tmp_path / "out/train")]
    assert captions == [[json.loads(line)["caption"]] for line in lines[: len(captions)]] and 100 < len(captions) < 200
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"] == {"lines are lost: a file is cut": 1}
    assert manifest["dropped_items"][0]["item"] == f"set.gz: line {len(captions) + 1}"
    for at, byte in ((half, 0xFF), (half, 0), (len(packed) - 6, 0)):  # the last: of the checksum
        (tmp_path / "set.gz").write_bytes(packed[:at] + bytes([packed[at] ^ 0x55, byte]) + packed[at + 2 :])
        message = refuse(*command(tmp_path, images, "set.gz"), "--overwrite", "--max-dropped", 1)
        assert "set.gz: cannot be read (" in message


def test_the_first_line_alone_tells_the_form(tmp_path: Path, images: Path) -> None:
    whole, cut = (
        json.dumps({"caption": "a cat", "image": "0.jpg"}).encode() + b"\n",
        b'{"caption": "a long caption of a dog',
    )
    (tmp_path / "set.gz").write_bytes(gzip.compress(whole + cut)[:-8])
    convert(*command(tmp_path, images, "set.gz"), "--max-dropped", 0.6)
    assert read_manifest(tmp_path / "out/train")["dropped_items"][0]["item"] == "set.gz: line 2"
    assert [row["caption"] for row in rows_of(tmp_path / "out/train")] == [["a cat"]]


def test_a_read_that_fails_is_not_reported_as_a_change(tmp_path: Path) -> None:
    (tmp_path / "set.gz").write_bytes(gzip.compress(text("tsv")))
    found = read_captions(
        [str(tmp_path / "set.gz")], None, ImageFinder("/", None), TextCleaning(), ImageList([]), RecordSplits("train")
    ).rows
    (tmp_path / "set.gz").write_bytes(b"no gzip" + bytes(100))
    with pytest.raises(UserError, match=r"set\.gz: row 3 cannot be read \(Not a gzipped file .*\); start again"):
        found.row(3)


def test_a_first_line_that_is_too_long_is_reported_as_such(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    monkeypatch.setattr(lines_module.read_lines, "__defaults__", (1 << 10,))
    (tmp_path / "set.x").write_bytes(b"a cat \t" + b"a" * (1 << 11) + b"\nanother\t0.jpg\n")
    assert "set.x: line 1: has more than 64 MiB; fix the file" in refuse(*command(tmp_path, images))


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_end_is_skipped_in_little_memory(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(lines_module.read_lines, "__defaults__", (1 << 20,))
    content = text("json", b'{"caption": "' + b"a" * (3 << 20) + b'", "image": "0.jpg"}')
    (tmp_path / "set.x").write_bytes(gzip.compress(content) if packed else content)
    convert(*command(tmp_path, images), "--max-dropped", 0.02)
    assert len(rows_of(tmp_path / "out/train")) == GOOD
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"line is too long": 1}


@pytest.mark.parametrize("packed", [False, True])
def test_lines_at_the_bound(tmp_path: Path, packed: bool) -> None:
    found = [b"\xef\xbb\xbfab", b"a" * 10, b"b" * 11, b"", b"c" * 10 + b"\r", b"d" * 30, b"e" * 10]
    content = b"\n".join(found)
    (tmp_path / "x").write_bytes(gzip.compress(content) if packed else content)
    with open_text(tmp_path / "x") as file:
        lines = list(read_lines(file, 10))
    starts = [3, 6, 17, 29, 30, 42, 73]
    assert lines == list(zip(starts, [b"ab", b"a" * 10, None, b"", None, None, b"e" * 10], strict=True))


def test_a_cut_file_gives_all_that_stands_before_the_cut(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"".join(b"%d\n" % number for number in range(9)))[:-8])
    seen = []
    with open_text(tmp_path / "x.gz") as file, pytest.raises(CutFile) as told:
        for _, line in read_lines(file):
            seen.append(line)
    assert seen == [b"%d" % number for number in range(9)] and told.value.line == 10
    (tmp_path / "long.gz").write_bytes(gzip.compress(b"1\n" + b"long" * 9)[:-8])
    with open_text(tmp_path / "long.gz") as file, pytest.raises(CutFile) as told:
        list(read_lines(file, 4))
    assert told.value.line == 2, "the line that is cut, not the one after it"


@pytest.mark.parametrize("name", ["results.token", "results.csv"])
def test_bad_lines_of_flickrs_files(tmp_path: Path, images: Path, name: str) -> None:
    mark, head = ("#0\t", b"") if name.endswith("token") else ("|0|", b"image_name|comment_number|comment\n")
    good = [f"{n}.jpg{mark}caption {n}".encode() for n in range(3)]
    (tmp_path / name).write_bytes(head + b"\n".join([*good, b"odd", b"\xff" + good[0]]))
    words = ["flickr30k", "--annotations", tmp_path / name, "--images", images, "--split", "train"]
    convert(*words, "--out", tmp_path / "out", "--max-dropped", 0.4)
    assert [row["caption"] for row in rows_of(tmp_path / "out/train")] == [[f"caption {n}"] for n in range(3)]
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"] == {"line is of another form": 1, "line is not UTF-8 text": 1}


def test_bad_lines_of_sbus_two_files_keep_the_others_together(tmp_path: Path, images: Path) -> None:
    (tmp_path / "urls.txt").write_bytes(b"".join(b"http://a/%d.jpg\n" % n for n in range(3)))
    (tmp_path / "captions.txt").write_bytes(b"c0\n\xff\nc2\n")
    files = ["--annotations", tmp_path / "urls.txt", tmp_path / "captions.txt"]
    convert("sbu", *files, "--images", images, "--split", "train", "--out", tmp_path / "out", "--max-dropped", 0.4)
    rows = rows_of(tmp_path / "out/train")
    assert [(row["caption"], row["image"]) for row in rows] == [(["c0"], image_of(0)), (["c2"], image_of(2))]
    (item,) = read_manifest(tmp_path / "out/train")["dropped_items"]
    assert item == {"item": "urls.txt: entry 1", "reason": "line is not UTF-8 text"}


def test_a_bad_line_of_an_exclusion_list_is_refused(tmp_path: Path, images: Path, refuse: Callable[..., str]) -> None:
    """Who can tell which image it names?"""
    (tmp_path / "set.x").write_bytes(text("json"))
    (tmp_path / "test.txt").write_bytes(b"0.jpg\n\xff.jpg\n")
    message = refuse(*command(tmp_path, images), "--exclude", tmp_path / "test.txt")
    assert "test.txt: line 2: is not UTF-8 text; fix the file" in message
