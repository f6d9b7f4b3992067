"""Exact and near duplicates between prepared sets, listed for a person, and the list used."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.images.fingerprints import HashList, content_key, perceptual_hashes
from tests.unit.preprocessing.helpers import IMAGES, convert, rows_of
from tests.unit.preprocessing.images.test_policy import encode, prepare, scene


def distance(one: Image.Image, other: Image.Image) -> int:
    """The greater of the two hashes' distances, bits."""
    pairs = zip(perceptual_hashes(one), perceptual_hashes(other), strict=True)
    return max((a ^ b).bit_count() for a, b in pairs)


def test_hashes_see_through_size_and_encoding() -> None:
    for seed in range(8):
        image = scene(seed)
        assert distance(image, image.resize((100, 100))) <= 6
        assert distance(image, Image.open(io.BytesIO(encode(image, "JPEG", quality=30)))) <= 6
        assert distance(image, Image.open(io.BytesIO(encode(image.resize((640, 480)), "WEBP")))) <= 6
        assert distance(image, scene(seed + 100)) > 12
        assert distance(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 12


def test_hash_lists_are_kept_and_joined(tmp_path: Path) -> None:
    entries = [(content_key(encode(scene(n), "PNG")), *perceptual_hashes(scene(n)), f"é{n}") for n in range(3)]
    HashList.of(entries).save(tmp_path / "a.npz")
    loaded = HashList.load(tmp_path / "a.npz")
    assert list(loaded.names) == ["é0", "é1", "é2"] and loaded.keys.dtype == np.uint64
    both = HashList.joined([loaded, HashList.of(entries[:1])])
    assert len(both) == 4 and len(HashList.joined([])) == 0
    found = list(both.near(*perceptual_hashes(scene(0).resize((200, 150))), 6))
    assert [index for index, _ in found] == [0, 3] and all(bits <= 6 for _, bits in found)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


HASHES = {name: np.zeros(2, np.uint64) for name in ("keys", "dhash", "phash")}
SOUND = npz(**HASHES, names=np.array(["a", "b"]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no",
        npy(),
        SOUND[:-30],
        SOUND[:200],
        SOUND.replace(b"'descr': ", b"'descr': ("),
        SOUND.replace(bytes(16), bytes(15) + b"1"),
        npz(**HASHES, names=np.array(["a"])),
        npz(**HASHES, names=np.zeros(2)),
        npz(**HASHES | {"dhash": np.zeros(2)}, names=np.array(["a", "b"])),
    ],
)
def test_a_damaged_list_is_reported(tmp_path: Path, refuse: Callable[..., str], content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(SOUND)
    assert len(HashList.load(tmp_path / "a.npz")) == 2
    (tmp_path / "a.npz").write_bytes(content)
    said = refuse("duplicates", "hash", tmp_path / "a.npz", "--out", tmp_path / "b.npz")
    assert "a.npz: is no list of hashes (" in said and "make it again" in said


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """A training set, and an evaluation set that shares one file and one image with it."""
    (tmp_path / "eval").mkdir()
    evaluation = {"e0.png": scene(0), "e1.png": scene(1), "e2.png": scene(2)}
    other = prepare(tmp_path / "eval", {name: encode(image, "PNG") for name, image in evaluation.items()})
    images = {
        "t7.png": encode(scene(7), "PNG"),
        "t1.png": encode(scene(1), "PNG"),
        "t2.jpg": encode(scene(2).resize((200, 150)), "JPEG"),
    }
    return prepare(tmp_path, images), other


def test_a_list_and_a_page_to_look_at(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    train, other = sets
    convert("duplicates", "find", train, "--of", other, "--out", tmp_path / "d.json", "--html", tmp_path / "d.html")
    found = json.loads((tmp_path / "d.json").read_text())["duplicates"]
    assert [(pair["image_id"], pair["of_image"], pair["exact"]) for pair in found] == [
        ("t1.png", "e1.png", True),
        ("t2.jpg", "e2.png", False),
    ]
    assert found[0]["distance"] == 0 and 0 <= found[1]["distance"] <= 6 and found[0]["of"] == str(other)
    page = (tmp_path / "d.html").read_text()
    assert page.count("<img") == 4 and "t2.jpg" in page
    # A person strikes out a pair; what is left is excluded.
    (tmp_path / "d.json").write_text(json.dumps({"duplicates": found[1:]}))
    convert("json", "--task", "retrieval", "--annotations", tmp_path / "out.json", "--images", tmp_path, "--split",
            "train", "--out", tmp_path / "new", "--exclude", tmp_path / "d.json")  # fmt: skip
    assert [row["image_id"] for row in rows_of(tmp_path / "new/train")] == ["t7.png", "t1.png"]


def test_pairs_of_images_have_sides(raw: Path, tmp_path: Path) -> None:
    annotations, images = raw / "nlvr2/dev.json", raw / "nlvr2/images"
    convert("nlvr2", "--annotations", annotations, "--images", images, "--split", "val", "--out", tmp_path)
    convert("duplicates", "hash", tmp_path, "--out", tmp_path / "n.npz")
    names = HashList.load(tmp_path / "n.npz").names
    assert len(names) == 16 and names[0] == "dev-0-0-0:left" and names[1] == "dev-0-0-0:right"


def test_workers_give_the_same_list(raw: Path, tmp_path: Path) -> None:
    annotations, images = raw / "annotations/captions_train2014.json", raw / "images"
    convert("coco", "--annotations", annotations, "--images", images, "--split", "train", "--out", tmp_path,
            "--shard-rows", 7)  # fmt: skip
    for workers in (1, 2):
        convert("duplicates", "hash", tmp_path, "--out", tmp_path / f"{workers}.npz", "--workers", workers)
    assert len(HashList.load(tmp_path / "1.npz")) == IMAGES["train"]
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


def test_bad_options(tmp_path: Path, refuse: Callable[..., str]) -> None:
    find = ["duplicates", "find", tmp_path, "--of", tmp_path, "--out", tmp_path / "d.json"]
    assert "--distance 99" in refuse(*find, "--distance", 99)
    assert "name a prepared data set" in refuse(*find)
