"""An index follows its folder, is never half-written, and finds what comparing with every image finds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eve_ds.errors import exit_code
from eve_ds.predict import EVE, index_command
from eve_ds.predict.__main__ import main
from eve_ds.predict.image_index import ImageIndex, best_rows
from eve_ds.predict.index_command import update_index
from preprocessing.errors import UserError
from tests.support.predicting import exported, image_files
from tests.support.shards import image_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("model"), "retrieval")


@pytest.fixture(scope="module")
def eve(model: Path) -> EVE:
    return EVE.from_pretrained(model, batch_size=4)


@pytest.fixture
def encoded(eve: EVE, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the model had."""
    sizes: list[int] = []
    vectors_of = eve.vectors_of

    def counting(pixels: Any) -> np.ndarray:
        sizes.append(len(pixels))
        return vectors_of(pixels)

    monkeypatch.setattr(eve, "vectors_of", counting)
    return sizes


def content(index: Path) -> dict[str, np.ndarray]:
    """{path: vector} of an index, through a search that returns all."""
    opened = ImageIndex(index)
    dim = opened.manifest.model["dim"]
    found = opened.search(np.eye(dim, dtype=np.float32), max(len(opened), 1))
    return {hit.path: np.array([dict(hits)[hit.path] for hits in found]) for hit in found[0]}


def check(eve: EVE, folder: Path, index: Path, names: list[str], atol: float = 1e-5) -> None:
    """The index holds exactly the images ``names``, with their vectors."""
    found = content(index)
    assert sorted(found) == sorted(names) and len(ImageIndex(index)) == len(names)
    for name in names:
        np.testing.assert_allclose(found[name], eve.image_features(folder / name), atol=atol)
    listed = {shard.file for shard in ImageIndex(index).manifest.shards}
    assert {path.name for path in index.iterdir()} == {"manifest.json", *listed}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_index_holds_the_vectors_of_all_images_below(eve: EVE, tmp_path: Path, workers: int, dtype: str) -> None:
    image_files(tmp_path / "photos", 6)
    image_files(tmp_path / "photos" / "deep" / "er", 3, first=6)
    done = update_index(eve, tmp_path / "photos", tmp_path / "index", workers, dtype)
    names = [f"image_{i:04d}.png" for i in range(6)] + [f"deep/er/image_{i:04d}.png" for i in range(6, 9)]
    assert (done.images, done.new, done.kept, done.removed, done.broken) == (9, 9, 0, 0, 0)
    check(eve, tmp_path / "photos", tmp_path / "index", names, 1e-5 if dtype == "float32" else 2e-3)


def test_an_update_encodes_only_what_is_new_or_changed(
    eve: EVE, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_command, "SHARD_ROWS", 4)
    photos, index = tmp_path / "photos", tmp_path / "index"
    paths = image_files(photos, 10)
    update_index(eve, photos, index, 0)
    whole = {shard.file for shard in ImageIndex(index).manifest.shards}
    encoded.clear()
    done = update_index(eve, photos, index, 0)
    assert (done.images, done.new, done.kept, done.removed) == (10, 0, 10, 0) and encoded == []
    assert {shard.file for shard in ImageIndex(index).manifest.shards} == whole

    os.unlink(paths[1])
    Path(paths[5]).write_bytes(image_of(77, 48))
    image_files(photos, 2, first=20)
    done = update_index(eve, photos, index, 0)
    assert (done.images, done.new, done.changed, done.kept, done.removed) == (11, 2, 1, 8, 1) and sum(encoded) == 3
    assert sorted(shard.rows for shard in ImageIndex(index).manifest.shards) == [3, 4, 4]
    check(eve, photos, index, sorted(path.name for path in photos.iterdir()))


def test_a_killed_run_goes_on_from_its_last_whole_file(
    eve: EVE, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_command, "SHARD_ROWS", 4)
    photos, index = tmp_path / "photos", tmp_path / "index"
    paths = image_files(photos, 3)
    update_index(eve, photos, index, 0)
    paths += image_files(photos, 12, first=3)
    os.unlink(paths.pop(0))
    counted = eve.vectors_of

    def killed(pixels: Any) -> np.ndarray:
        if sum(encoded) >= 11:
            raise KeyboardInterrupt
        return counted(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(eve, "vectors_of", killed)
        with pytest.raises(KeyboardInterrupt):
            update_index(eve, photos, index, 0)
    assert len(ImageIndex(index)) == 8  # two whole files, and what was kept is among them
    (index / "features-000099.arrow").write_bytes(b"left over from a killed run")
    done = update_index(eve, photos, index, 0)
    assert (done.images, done.new, done.kept) == (14, 6, 8)
    check(eve, photos, index, [Path(path).name for path in paths])


def test_a_killed_update_loses_no_row_that_it_was_to_keep(
    eve: EVE, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_command, "SHARD_ROWS", 4)
    monkeypatch.setattr(eve, "batch_size", 1)
    photos, index = tmp_path / "photos", tmp_path / "index"
    paths = image_files(photos, 12)
    update_index(eve, photos, index, 0)
    for number in (0, 4, 8):  # one of each file
        os.unlink(paths[number])
    image_files(photos, 3, first=12)
    encoded.clear()
    counted = eve.vectors_of

    def killed(pixels: Any) -> np.ndarray:
        if encoded:
            raise KeyboardInterrupt
        return counted(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(eve, "vectors_of", killed)
        with pytest.raises(KeyboardInterrupt):
            update_index(eve, photos, index, 0)
    done = update_index(eve, photos, index, 0)
    assert (done.images, done.kept) == (12, 9)
    check(eve, photos, index, [path.name for path in photos.iterdir()])


def nothing_to_read(folder: Path, files: list[Any], *_: Any) -> Iterator[Any]:
    assert files == []
    return iter([])


def test_broken_images_are_named_and_read_once(
    eve: EVE, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    image_files(photos, 3)
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image either, but it does not claim to be")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(photos / "pipe.png")
    for _ in range(2):
        caplog.clear()
        done = update_index(eve, photos, index, 2)
        assert (done.images, done.broken) == (3, 2)
        assert (
            "broken.jpg: left out: the image cannot be decoded" in caplog.text and "gone.png: left out" in caplog.text
        )
        monkeypatch.setattr(index_command, "decoded", nothing_to_read)
    monkeypatch.undo()
    (photos / "broken.jpg").write_bytes(image_of(5))
    assert update_index(eve, photos, index, 2).images == 4


def test_loops_of_links_end(eve: EVE, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    image_files(photos / "a", 2)
    image_files(tmp_path / "elsewhere", 1, first=7)
    (photos / "a" / "up").symlink_to(photos)
    (photos / "again").symlink_to(photos / "a")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    update_index(eve, photos, tmp_path / "index", 0)
    check(eve, photos, tmp_path / "index", ["a/image_0000.png", "a/image_0001.png", "linked/image_0007.png"])


def test_search_equals_brute_force(eve: EVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_command, "SHARD_ROWS", 7)
    photos = tmp_path / "photos"
    paths = image_files(photos, 24)
    update_index(eve, photos, tmp_path / "index", 0)
    queries = eve.text_features(["a red square", "image 3"])
    scores = queries @ eve.image_features(paths).T
    for k in (1, 5, 24, 100):
        for own, hits in zip(scores, ImageIndex(tmp_path / "index").search(queries, k), strict=True):
            expected = np.argsort(-own, kind="stable")[:k]
            assert [hit.path for hit in hits] == [Path(paths[i]).name for i in expected]
            np.testing.assert_allclose([hit.score for hit in hits], own[expected], atol=1e-5)


def test_the_best_rows_are_those_of_a_full_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 50):
        scores = rng.integers(0, 6, size).astype(np.float32)  # many are equal
        for k in (1, 3, size, size + 1):
            assert best_rows(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


def test_another_model_folder_or_place_is_refused(eve: EVE, tmp_path: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    image_files(photos, 2)
    image_files(tmp_path / "others", 2)
    update_index(eve, photos, index, 0)
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    other = EVE.from_pretrained(exported(tmp_path / "other", "retrieval", seed=1))
    with pytest.raises(UserError, match="made with another model"):
        update_index(other, photos, index, 0)
    with pytest.raises(UserError, match="made with another model"):
        update_index(EVE.from_pretrained(eve.files.weights, image_size=40), photos, index, 0)
    with pytest.raises(UserError, match="is the index of"):
        update_index(eve, tmp_path / "others", index, 0)
    with pytest.raises(UserError, match="has vectors of float32"):
        update_index(eve, photos, index, 0, "float16")
    with pytest.raises(UserError, match="holds other files"):
        update_index(eve, photos, tmp_path / "others", 0)
    with pytest.raises(UserError, match="holds no image files"):
        update_index(eve, index, tmp_path / "new", 0)
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before


def test_a_second_update_at_the_same_time_is_refused(eve: EVE, tmp_path: Path) -> None:
    image_files(tmp_path / "photos", 2)
    with index_command._locked(tmp_path / "index"), pytest.raises(UserError, match="another process is updating it"):
        update_index(eve, tmp_path / "photos", tmp_path / "index", 0)


def run(*arguments: object) -> int:
    return exit_code(lambda: main([str(argument) for argument in arguments]))


def test_search_prints_and_shows_what_was_found(
    eve: EVE, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    paths = image_files(photos, 5)
    (photos / "<i>9.png").write_bytes(image_of(9))
    common = ("--checkpoint", model)
    assert run("index", photos, "--out", index, "--num_workers", 2, "--json", *common) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    text = "<b>a red</b> square"
    assert run("search", text, "--index", index, "--k", 6, "--html", tmp_path / "found.html", *common) == 0
    captured = capsys.readouterr()
    expected = ImageIndex(index).search(eve.text_features([text]), 6)[0]
    assert [line.split()[-1] for line in captured.out.splitlines()] == [str(photos / hit.path) for hit in expected]
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6 and "<b>" not in page and "<i>" not in page
    assert "&lt;b&gt;a red" in page and "&lt;i&gt;9.png" in page
    assert "http://" not in page and "https://" not in page
    assert run("search", "--image", paths[2], "--index", index, "--k", 1, "--json", *common) == 0
    (best,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert best["path"] == paths[2] and best["score"] == pytest.approx(1, abs=1e-4)


def test_queries_of_a_file_are_found_in_order(
    eve: EVE, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = image_files(tmp_path / "photos", 5)
    update_index(eve, tmp_path / "photos", tmp_path / "index", 0)
    rows = [{"text": "a red square", "id": 1}, {"image": paths[3], "id": 2}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("--index", tmp_path / "index", "--checkpoint", model, "--k", 2)
    assert run("search", "--input", tmp_path / "rows.jsonl", *common) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["rank"]) for row in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert found[2]["path"] == paths[3]
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "image": "b"}')
    assert run("search", "--input", tmp_path / "rows.jsonl", *common) == 2
    assert "rows.jsonl:1: is no object with either 'text' or 'image'" in capsys.readouterr().err
    assert run("search", *common) == 2
    assert "give one of TEXT, --image FILE and --input FILE" in capsys.readouterr().err


def test_search_refuses_another_model_and_bad_numbers(
    eve: EVE, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_files(tmp_path / "photos", 2)
    update_index(eve, tmp_path / "photos", tmp_path / "index", 0)
    other = exported(tmp_path / "other", "retrieval", seed=1)
    for checkpoint, k, message in ((other, 2, "made with another model (sha256 "), (model, 0, "k=0: must be")):
        assert run("search", "a", "--index", tmp_path / "index", "--checkpoint", checkpoint, "--k", k) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
