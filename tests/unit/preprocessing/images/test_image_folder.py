from pathlib import Path

import pytest

from preprocessing.images.image_folder import ImageFolder, image_key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("val2014/COCO_val2014_000000391895.jpg", "coco:391895"),
        ("000000391895.jpg", "coco:391895"),
        ("COCO_test2015_000000000001.png", "coco:1"),
        ("flickr30k-images/1000092795.jpg", "1000092795"),
        ("1000092795", "1000092795"),
        ("VG_100K_2/1.jpg", "1"),
        ("4385058960_b0f291553e.jpg", "4385058960_b0f291553e"),
        ("train-12-0-img1.png", "train-12-0-img1"),
        ("a.b", "a.b"),
    ],
)
def test_one_key_an_image(name: str, key: str) -> None:
    assert image_key(name) == key


def test_files_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    for name in ("val2014/COCO_val2014_000000000009.jpg", "train2017/000000000010.jpg", "plain.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = ImageFolder(f"{tmp_path}")
    found = {
        "COCO_val2014_000000000009.jpg": "val2014/COCO_val2014_000000000009.jpg",
        "000000000009.jpg": "val2014/COCO_val2014_000000000009.jpg",
        "train2014/COCO_train2014_000000000010.jpg": "train2017/000000000010.jpg",
        "plain.jpg": "plain.png",
        "none.jpg": "none.jpg",
    }
    for name, place in found.items():
        assert images.find(name).path == f"{tmp_path}/{place}"
