"""Tars whose files stand in any order, in folders, in tars, and beside what macOS leaves there."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of
from tests.unit.preprocessing.sources.test_img2dataset import add

Member = tuple[str, bytes]
IMAGES: list[Member] = [(f"{n}.jpg", image_of(n)) for n in range(3)]
TEXTS: list[Member] = [(f"{n}.txt", f"caption {n}".encode()) for n in range(3)]


def pack(members: Sequence[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            add(tar, name, data)
    return buffer.getvalue()


def command(tmp_path: Path, members: Sequence[Member] | bytes) -> list[object]:
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw/a.tar").write_bytes(members if isinstance(members, bytes) else pack(members))
    return ["img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out", "--overwrite"]


def found(tmp_path: Path) -> list[tuple[str, list[str], bytes]]:
    return [(row["image_id"], row["caption"], row["image"]) for row in rows_of(tmp_path / "out/train")]


def expected(*numbers: int, prefix: str = "") -> list[tuple[str, list[str], bytes]]:
    return [(f"{prefix}{n}", [f"caption {n}"], image_of(n)) for n in numbers]


def dropped(tmp_path: Path) -> dict[str, int]:
    counts: dict[str, int] = read_manifest(tmp_path / "out/train")["dropped"]
    return counts


@pytest.mark.parametrize(
    ("members", "order"),
    [
        ([*IMAGES, *TEXTS], (0, 1, 2)),
        ([*TEXTS, *IMAGES], (0, 1, 2)),
        ([*IMAGES[::-1], *TEXTS], (2, 1, 0)),
        ([IMAGES[1], IMAGES[0], TEXTS[0], TEXTS[1], IMAGES[2], TEXTS[2]], (1, 0, 2)),  # a key that comes back
        ([IMAGES[0], ("._0.txt", b"\0\5\x16\7"), TEXTS[0], IMAGES[1], TEXTS[1]], (0, 1)),
        ([(".DS_Store", b"x"), ("._0.jpg", b"x"), *IMAGES, ("._0.txt", b"x"), ("._0.txt", b"x"), *TEXTS], (0, 1, 2)),
    ],
)  # fmt: skip
def test_files_of_a_key_may_be_anywhere(tmp_path: Path, members: Sequence[Member], order: tuple[int, ...]) -> None:
    convert(*command(tmp_path, members))
    assert found(tmp_path) == expected(*order) and dropped(tmp_path) == {}


def test_folders_in_a_tar(tmp_path: Path) -> None:
    """A key has its folder in it; where images lie in one folder and texts in another, names bring them together."""
    convert(*command(tmp_path, [(f"{folder}/{n}", data) for folder in ("a", "b/c") for n, data in [*IMAGES, *TEXTS]]))
    assert found(tmp_path) == [*expected(0, 1, 2, prefix="a/"), *expected(0, 1, 2, prefix="b/c/")]
    apart = [*((f"images/{n}", data) for n, data in IMAGES), *((f"texts/{n}", data) for n, data in TEXTS[:2])]
    convert(*command(tmp_path, apart))
    assert found(tmp_path) == expected(0, 1, prefix="images/") and dropped(tmp_path) == {"image without caption": 1}
    mixed = [*IMAGES[:1], *TEXTS[:1], ("a/1.jpg", image_of(1)), ("b/1.txt", b"of another image")]
    convert(*command(tmp_path, mixed))
    assert found(tmp_path) == expected(0)
    assert dropped(tmp_path) == {"image without caption": 1, "text without image": 1}


def test_tars_in_a_tar(tmp_path: Path, refuse: Callable[..., str]) -> None:
    inner = pack([*IMAGES[:2], *TEXTS[:2]])
    convert(*command(tmp_path, [("sub/one.tar", inner), IMAGES[2], ("deep.tar", pack([("two.tar", inner)])), TEXTS[2]]))
    assert found(tmp_path) == [
        *expected(2),
        *expected(0, 1, prefix="sub/one/"),
        *expected(0, 1, prefix="deep/two/"),
    ]
    endless = inner[: -(-len(inner.rstrip(b"\0")) // 512) * 512]
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        second = tar.getmember("1.jpg").offset
    garbled = inner[:second] + b"\xaa" * 512 + inner[second + 512 :]
    for bad in (inner[:1500], endless, garbled, b"x" * 2000):
        assert "a.tar: is no whole tar" in refuse(*command(tmp_path, [("one.tar", bad), *IMAGES, *TEXTS]))
    deep = inner
    for _ in range(6):
        deep = pack([("x.tar", deep)])
    assert "a.tar: holds tars in tars, 5 deep; unpack" in refuse(*command(tmp_path, deep))


@pytest.mark.parametrize("name", ["more.tar.gz", "x/more.TGZ", "more.zip"])
def test_what_is_compressed_in_a_tar_is_reported(tmp_path: Path, refuse: Callable[..., str], name: str) -> None:
    message = refuse(*command(tmp_path, [*IMAGES, *TEXTS, (name, b"\x1f\x8b")]))
    assert f"a.tar: holds {name.lower() if 'x/' not in name else 'x/more.tgz'}, which is compressed" in message


@pytest.mark.parametrize("twice", [IMAGES[1], TEXTS[1]])
def test_a_file_that_occurs_twice_is_refused(tmp_path: Path, refuse: Callable[..., str], twice: Member) -> None:
    assert "a.tar: key 1 occurs twice" in refuse(*command(tmp_path, [*IMAGES, *TEXTS, twice]))


def test_links_in_a_tar_lead_to_what_they_name(tmp_path: Path) -> None:
    """tar stores a file that has two names once."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind, name, target in (
            (tarfile.LNKTYPE, "d/1.jpg", "0.jpg"),
            (tarfile.SYMTYPE, "d/1.txt", "../0.txt"),
            (tarfile.SYMTYPE, "2.jpg", "/elsewhere/2.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
        for name, data in (IMAGES[0], TEXTS[0]):
            add(tar, name, data)
    convert(*command(tmp_path, buffer.getvalue()))
    assert found(tmp_path) == [("0", ["caption 0"], image_of(0)), ("d/1", ["caption 0"], image_of(0))]
    assert dropped(tmp_path) == {"image is a link that leads nowhere": 1}


def test_a_negative_size_does_not_hang(tmp_path: Path, refuse: Callable[..., str]) -> None:
    whole = bytearray(pack([*IMAGES[:1], *TEXTS[:1]]))
    whole[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256: -1024 bytes
    header = whole[:148] + b" " * 8 + whole[156:512]
    whole[148:156] = b"%06o\0 " % sum(header)
    assert "a.tar: is no whole tar (a negative size at byte 0)" in refuse(*command(tmp_path, bytes(whole)))


@pytest.mark.parametrize("layout", ["webdataset", "files"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("2.json", b'{"caption": '),
        ("2.json", b"[" * 100_000),
        ("2.json", b'{"caption": "' + b"a" * (17 << 20) + b'"}'),
        ("2.txt", b"a caption of many\n" * (1 << 20)),
        ("2.txt", "café".encode("latin-1")),
    ],
)
def test_a_text_that_is_none_is_counted(
    tmp_path: Path, refuse: Callable[..., str], layout: str, name: str, bad: bytes
) -> None:
    texts = [(f"{n}.json", json.dumps({"caption": f"caption {n}"}).encode()) for n in range(2)]
    members = [*IMAGES, *texts, (name, bad)]
    words = command(tmp_path, members)
    if layout == "files":
        (tmp_path / "raw/a.tar").unlink()
        (tmp_path / "raw/00000").mkdir()
        for file, data in members:
            (tmp_path / "raw/00000" / file).write_bytes(data)
    message = refuse(*words)
    assert f"{name}: " in message and "(1 of 3 records are at fault, --max-dropped is 0.01)" in message
    convert(*words, "--max-dropped", 0.4)
    assert found(tmp_path) == expected(0, 1)
    assert dropped(tmp_path) == {"text of an image is unreadable": 1}


def test_names_of_shards_tell_splits_apart(tmp_path: Path, refuse: Callable[..., str]) -> None:
    """pixparse/cc3m-wds has the tars of both splits in one folder: val was trained on."""
    words = command(tmp_path, [*IMAGES[2:], *TEXTS[2:]])
    (tmp_path / "raw/a.tar").rename(tmp_path / "raw/cc3m-validation-0000.tar")
    (tmp_path / "raw/cc3m-validation-0000_stats.json").write_text('{"count": 3, "successes": 1}')
    (tmp_path / "raw/train").mkdir()
    (tmp_path / "raw/train/0000.tar").write_bytes(pack([*IMAGES[:2], *TEXTS[:2]]))
    convert(*words)
    assert found(tmp_path) == expected(0, 1)
    assert "holds train, val by the names of its files, not test" in refuse(
        *["test" if w == "train" else w for w in words]
    )
    (tmp_path / "raw/more.tar").write_bytes(pack([]))
    assert "more.tar could be of any; call it by its split" in refuse(*words)


def test_shards_in_folders_below_and_compressed_ones(tmp_path: Path, refuse: Callable[..., str]) -> None:
    words = command(tmp_path, [*IMAGES[:1], *TEXTS[:1]])
    (tmp_path / "raw/part/more").mkdir(parents=True)
    (tmp_path / "raw/part/more/a.tar").write_bytes(pack([*IMAGES[:1], *TEXTS[:1]]))
    (tmp_path / "raw/part/loop").symlink_to(tmp_path / "raw")
    convert(*words)
    assert [name for name, *_ in found(tmp_path)] == ["a/0", "part/more/a/0"]
    (tmp_path / "raw/part/b.tar.gz").write_bytes(b"\x1f\x8b")
    assert "raw: part/b.tar.gz is compressed, and images are read by their place; unpack it" in refuse(*words)


def test_a_shard_that_its_statistics_know_and_that_is_gone(tmp_path: Path, refuse: Callable[..., str]) -> None:
    words = command(tmp_path, [*IMAGES, *TEXTS])
    (tmp_path / "raw/b_stats.json").write_text('{"count": 9, "successes": 5}')
    assert "b_stats.json: says 5 successes, the shard holds 0 images" in refuse(*words)


def test_folders_within_a_folder_of_images(tmp_path: Path) -> None:
    for folder in ("", "a/b", "v1.0"):
        (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
        for name, data in (*IMAGES, *TEXTS, ("._0.jpg", b"x")):
            (tmp_path / "raw" / folder / name).write_bytes(data)
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    ids = [*expected(0, 1, 2), *expected(0, 1, 2, prefix="a/b/"), *expected(0, 1, 2, prefix="v1.0/")]
    assert found(tmp_path) == ids and dropped(tmp_path) == {}


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_images_are_excluded_by_what_their_json_calls_them(tmp_path: Path, layout: str) -> None:
    """img2dataset's own names are numbers: COCO's test images, fetched by their addresses, are known by those alone."""
    records: list[dict[str, Any]] = [
        {"url": "http://images.cocodataset.org/val2014/COCO_val2014_000000000042.jpg?size=2"},
        {"url": "http://a/b.jpg"},
        {"url": None, "cocoid": 7},
    ]
    members = [*IMAGES, *TEXTS, *((f"{n}.json", json.dumps(record).encode()) for n, record in enumerate(records))]
    words = command(tmp_path, members)
    if layout == "files":
        (tmp_path / "raw/a.tar").unlink()
        (tmp_path / "raw/00000").mkdir()
        for name, data in members:
            (tmp_path / "raw/00000" / name).write_bytes(data)
    (tmp_path / "test.txt").write_text("COCO_val2014_000000000042.jpg\n000000000007.jpg\n")
    convert(*words, "--exclude", tmp_path / "test.txt")
    assert found(tmp_path) == expected(1)


def test_captions_of_a_field_by_name(tmp_path: Path) -> None:
    records = [{"caption": "old", "new": f"caption {n}", "more": ["x", None]} for n in range(3)]
    members = [*IMAGES, *TEXTS, *((f"{n}.json", json.dumps(record).encode()) for n, record in enumerate(records))]
    convert(*command(tmp_path, members), "--caption-column", "new")
    assert found(tmp_path) == expected(0, 1, 2)
    convert(*command(tmp_path, members), "--caption-column", "more", "new")
    assert [row["caption"] for row in rows_of(tmp_path / "out/train")] == [["x", f"caption {n}"] for n in range(3)]
