"""What an index meets: damage, other processes, killed ones, images that cannot be read now, names, moved folders."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from eve_ds.predict import EVE, index_command, raw_inputs, search_command
from eve_ds.predict.image_index import ImageIndex, IndexManifest
from eve_ds.predict.index_command import update_index
from eve_ds.predict.raw_inputs import UndecodableError, read_image
from eve_ds.predict.request_rows import Request
from preprocessing.errors import UserError
from tests.support.limits import few_descriptors, permissions_hold
from tests.support.predicting import exported, image_files


@pytest.fixture(scope="module")
def eve(tmp_path_factory: pytest.TempPathFactory) -> EVE:
    return EVE.from_pretrained(exported(tmp_path_factory.mktemp("model"), "retrieval"), batch_size=4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    image_files(tmp_path / "photos", 3)
    return tmp_path / "photos"


@pytest.fixture
def index(eve: EVE, photos: Path, tmp_path: Path) -> Path:
    update_index(eve, photos, tmp_path / "index", 0)
    return tmp_path / "index"


@pytest.mark.parametrize("damage", ["no manifest", "no JSON", "another type", "a file is missing", "a file is cut"])
def test_a_damaged_index_is_named(index: Path, damage: str) -> None:
    manifest = index / "manifest.json"
    (file,) = index.glob("features-*")
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "no JSON":
        manifest.write_text("{")
    elif damage == "another type":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"folder": 7}))
    elif damage == "a file is missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UserError, match=f"{index}.*make"):
        ImageIndex(index)


def test_changed_bytes_are_found_before_arrow_reads_them(index: Path) -> None:
    """Arrow crashes on some, and takes others as they are."""
    (file,) = index.glob("features-*")
    sound = file.read_bytes()
    for seed in range(100):
        rng, damaged = random.Random(seed), bytearray(sound)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="its bytes have changed"):
            ImageIndex(index)


def test_a_changed_manifest_meets_no_traceback(index: Path) -> None:
    manifest = index / "manifest.json"
    sound = manifest.read_bytes()
    refused = 0
    for seed in range(300):
        rng, damaged = random.Random(seed), bytearray(sound)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        manifest.write_bytes(damaged)
        try:
            ImageIndex(index)
        except UserError:
            refused += 1
    assert refused > 150
    tree = json.loads(sound)
    for changed in (
        {"shards": [{**tree["shards"][0], "file": "../index/features-000001.arrow"}]},
        {"shards": [{**tree["shards"][0], "rows": "3"}]},
        {"shards": 3},
        {"model": []},
        {"broken": [{"path": 7, "reason": ""}]},
        {"broken": [{"path": "a", "reason": "", "size": 1, "mtime_ns": [1]}]},
        {"model": tree["model"] | {"dim": 10**30}},
        {"model": tree["model"] | {"dim": -1}},
        {"shards": tree["shards"] * 2},
    ):
        manifest.write_text(json.dumps(tree | changed))
        with pytest.raises(UserError, match="is damaged or of another version"):
            ImageIndex(index)


def test_an_index_that_is_updated_meanwhile_is_read_again(
    eve: EVE, photos: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [IndexManifest.read(index)]
    image_files(photos, 2, first=3)
    update_index(eve, photos, index, 0)  # replaces the file, which was not full
    now = IndexManifest.read
    monkeypatch.setattr(IndexManifest, "read", lambda index: read.pop() if read else now(index))
    assert len(ImageIndex(index)) == 5


def test_an_image_that_could_not_be_read_is_tried_again(
    eve: EVE, photos: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = EVE.from_pretrained(eve.files.weights, max_pixels=1200)
    shutil.rmtree(index)
    done = update_index(small, photos, index, 0)
    assert (done.images, done.broken) == (1, 2) and "40 x 40 pixels, max_pixels=1200" in caplog.text
    done = update_index(eve, photos, index, 0)
    assert (done.images, done.new, done.broken) == (3, 2, 0)


def test_only_bytes_that_are_no_image_are_called_undecodable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UndecodableError):
        read_image(tmp_path / "text.png", 9)
    (path,) = image_files(tmp_path, 1)
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    with pytest.raises(UndecodableError):
        read_image(path, 9999)
    for unreadable in (tmp_path, tmp_path / "gone.png", "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(UserError) as caught:
            read_image(unreadable, 9)
        assert not isinstance(caught.value, UndecodableError)

    def no_memory(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(raw_inputs, "upright_rgb", no_memory)
    with pytest.raises(UserError, match="no memory is left") as caught:
        read_image(Image.new("RGB", (2, 2)), 9)
    assert not isinstance(caught.value, UndecodableError)


def test_temporary_files_of_a_killed_run_are_deleted(eve: EVE, photos: Path, index: Path) -> None:
    before = sorted(path.name for path in index.iterdir())
    for name in (".features-000002.arrow.0123abcd", ".manifest.json.89abcdef"):
        (index / name).write_bytes(b"half")
    update_index(eve, photos, index, 0)
    assert sorted(path.name for path in index.iterdir()) == before


@pytest.mark.parametrize("which", ["photos", "index"])
def test_a_folder_whose_name_is_not_utf_8_is_refused_at_once(eve: EVE, tmp_path: Path, which: str) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    places = {"photos": tmp_path / "photos", "index": tmp_path / "index"} | {which: odd}
    image_files(places["photos"], 1)
    with pytest.raises(UserError, match="its name is not UTF-8"):
        update_index(eve, places["photos"], places["index"], 0)
    assert not places["index"].exists()


@pytest.mark.parametrize("closed", ["index", "index/manifest.json", "index/features-000001.arrow"])
def test_what_may_not_be_read_is_no_damage(eve: EVE, photos: Path, index: Path, closed: str) -> None:
    path = index.parent / closed
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with permissions_hold(), pytest.raises(UserError, match=r"cannot be read \(Permission denied\); see") as caught:
            ImageIndex(index)
    finally:
        path.chmod(mode)
    assert str(caught.value).startswith(str(path)) and "delete" not in str(caught.value)
    assert len(ImageIndex(index)) == 3


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_decoding_process_is_told_in_the_words_of_the_command(
    eve: EVE, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_command, "read_image", killed)
    with pytest.raises(UserError, match=r"a decoding process was killed.*--num_workers") as caught:
        update_index(eve, photos, tmp_path / "index", 2)
    assert "training" not in str(caught.value) and "checkpoint" not in str(caught.value)


def test_too_many_open_files_are_told_in_a_line(eve: EVE, photos: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with few_descriptors(spare=6), pytest.raises(UserError, match=r"Too many open files.*ulimit -n.*--num_workers"):
        update_index(eve, photos, index, 2)
    torchs = "Too many open files. Communication with the workers is no longer possible. Please increase the limit"
    with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"), index_command._explained():
        raise RuntimeError(torchs)


def no_files(worker: int) -> None:
    """In a decoding process: no file can grow, as with ``ulimit -f 0``; those of shared memory neither."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_decoding_processes_need_no_shared_memory(
    eve: EVE, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch had none for a tensor, the batch was lost, and waited for without end."""
    monkeypatch.setattr(index_command, "initialize_worker", no_files)
    monkeypatch.setattr(index_command, "DataLoader", functools.partial(DataLoader, timeout=60))
    assert update_index(eve, photos, tmp_path / "index", 2).images == 3


def found(
    eve: EVE, index: Path, capsys: pytest.CaptureFixture[str], html: str | None = None, texts: int = 1, **row: Any
) -> str:
    requests = [Request({"text": f"image {i}"} | row) for i in range(texts)]
    search_command.search_images(lambda: eve, str(index), requests, 2, True, html)
    return capsys.readouterr().out


def test_a_moved_folder_is_told_once(
    eve: EVE,
    photos: Path,
    index: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found(eve, index, capsys)
    assert "gone" not in caplog.text
    photos.rename(photos.with_name("elsewhere"))
    found(eve, index, capsys, texts=9)
    assert caplog.text.count("the indexed folder is gone") == 1


def test_a_page_says_that_it_has_the_first_queries_only(
    eve: EVE,
    index: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_command, "MOST_ON_PAGE", 6)  # of the second batch a half
    caplog.set_level(logging.INFO, "eve_ds")
    page = tmp_path / "page.html"
    assert len(found(eve, index, capsys, str(page), texts=6).splitlines()) == 12 and "has the first" not in caplog.text
    found(eve, index, capsys, str(page), texts=9)
    assert page.read_text().count("<h2>") == 6 and "has the first 6 of 9 queries" in caplog.text


def test_the_keys_of_a_row_are_kept_whatever_their_names(
    eve: EVE, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, _) = map(json.loads, found(eve, index, capsys, hits="own").splitlines())
    assert first["hits"] == "own" and first["rank"] == 1


class Flushed(io.StringIO):
    """Notes how many lines each flush has made visible."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []

    def flush(self) -> None:
        self.lines.append(self.getvalue().count("\n"))


def test_results_are_written_a_batch_at_a_time(eve: EVE, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those before a bad row are, too."""
    requests = [Request({"text": "image 1"})] * 5 + [Request({"image": "gone.png"}, "rows:6: ")]
    stream = Flushed()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(UserError, match=r"rows:6: gone.png"):
        search_command.search_images(lambda: eve, str(index), requests, 1, True, None)
    assert stream.lines == [4, 5]


def test_more_processes_than_cores_are_no_warning(eve: EVE, photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eve_ds.predict", "index", str(photos), "--out", str(tmp_path / "a\x1b.index")]
    options = ["--checkpoint", str(eve.files.weights), "--num_workers", "2", "--batch_size", "1"]
    core = min(os.sched_getaffinity(0))
    ended = subprocess.run(
        ["taskset", "-c", str(core), *command, *options], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    line = f"{tmp_path}/a\\x1b.index: 3 images (3 new, 0 changed, 0 kept, 0 removed, 0 not readable), "
    assert ended.stdout.startswith(line)
