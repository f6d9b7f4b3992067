"""Annotations, image files, tars, base64 lines and hash lists behind s3:// URIs, on a server of the test's own."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.s3 import S3, s3_server
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json
from tests.unit.preprocessing.sources import test_img2dataset

HERE = "s3://bucket/raw"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, known by the environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def test_raw_files_behind_uris(s3: S3, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "val2014").mkdir(parents=True)
    for number in (1, 2):
        (raw / f"val2014/COCO_val2014_{number:012d}.jpg").write_bytes(image_of(number))
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (1, 2)]
    annotations = [{"image_id": n, "caption": f"c{n}"} for n in (1, 2)]
    write_json(raw / "captions.json", {"images": images, "annotations": annotations})
    write_json(raw / "test.json", [{"image": "COCO_val2014_000000000002.jpg"}])
    lines = [json.dumps({"desc": f"d{n}", "binary": base64.b64encode(image_of(n)).decode()}) for n in (3, 4)]
    (raw / "part-0").write_text("\n".join(lines))
    test_img2dataset.write_output(raw / "tars", "webdataset")
    test_img2dataset.write_output(raw / "tables", "parquet")
    s3.put(raw, "raw")

    end = ["--split", "train", "--out"]
    convert("coco", "--annotations", f"{HERE}/captions.json", "--images", HERE, "--exclude", f"{HERE}/test.json",
            *end, tmp_path / "coco")  # fmt: skip
    assert [row["image"] for row in rows_of(tmp_path / "coco/train")] == [image_of(1)]
    convert("cc3m", "--annotations", f"{HERE}/part-0", *end, tmp_path / "lines")
    assert [row["image"] for row in rows_of(tmp_path / "lines/train")] == [image_of(3), image_of(4)]
    convert("img2dataset", "--images", f"{HERE}/tars", *end, tmp_path / "tars")
    convert("img2dataset", "--images", f"{HERE}/tables", *end, tmp_path / "tables")
    rows = rows_of(tmp_path / "tars/train")
    assert len(rows) == 4 and rows == rows_of(tmp_path / "tables/train")


def test_hash_lists_behind_uris(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(image_of(0))
    (tmp_path / "1.jpg").write_bytes(image_of(1))
    files = [write_json(tmp_path / f"{n}.json", [{"image": f"{n}.jpg", "caption": "a"}]) for n in range(2)]
    common = ["json", "--task", "retrieval", "--images", tmp_path, "--split", "train", "--annotations"]
    convert(*common, files[0], "--out", "s3://bucket/one")
    convert("duplicates", "hash", "s3://bucket/one", "--out", "s3://bucket/one.npz")
    for listed in ("s3://bucket/one", "s3://bucket/one.npz"):
        out = tmp_path / listed[-3:]
        convert(*common, *files, "--out", out, "--exclude-images-of", listed)
        assert [row["image"] for row in rows_of(out / "train")] == [image_of(1)]
