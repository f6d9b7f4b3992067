"""``python -m eve_ds.predict``: what is printed, rows of a file, and one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from eve_ds.errors import exit_code
from eve_ds.predict import EVE
from eve_ds.predict.__main__ import main
from tests.support.predicting import exported, image_files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models vqa, itr and nlvr, and four images, in one folder."""
    folder = tmp_path_factory.mktemp("predict")
    for name, task in (("vqa", "vqa"), ("itr", "retrieval"), ("nlvr", "nlvr_plain")):
        exported(folder / name, task)
    image_files(folder / "images", 4)
    return folder


def image(place: Path, number: int) -> str:
    return str(place / "images" / f"image_{number:04d}.png")


def predict(*arguments: object) -> int:
    return exit_code(lambda: main([str(argument) for argument in arguments]))


def lines(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answer_prints_the_best_answers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = EVE.from_pretrained(place / "vqa").answer(image(place, 0), "what color", top=3)
    assert predict("answer", image(place, 0), "what color", "--checkpoint", place / "vqa", "--top", 3) == 0
    assert capsys.readouterr().out.splitlines() == [f"{one.probability:.4f}  {one.answer}" for one in best]


def test_match_and_judge_print_a_line_each(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a red square", "two dogs"]
    assert predict("match", image(place, 0), *texts, "--checkpoint", place / "itr") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in printed] == texts
    pair = (image(place, 0), image(place, 1))
    assert predict("judge", *pair, "both show it", "--checkpoint", place / "nlvr", "--json") == 0
    (found,) = lines(capsys)
    expected = EVE.from_pretrained(place / "nlvr").judge(*pair, "both show it")
    assert found["true"] is expected.true and found["probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_rows_of_a_file_are_answered_in_order_with_their_other_keys(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": image(place, i % 4), "question": f"what color {i}", "question_id": i} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    options = ("--checkpoint", place / "vqa", "--batch_size", 3)
    assert predict("answer", "--input", tmp_path / "rows.jsonl", *options) == 0
    found = lines(capsys)
    assert [row["question_id"] for row in found] == list(range(7))
    best = EVE.from_pretrained(place / "vqa").answer([r["image"] for r in rows], [r["question"] for r in rows], top=5)
    assert [[one["answer"] for one in row["answers"]] for row in found] == [[one.answer for one in row] for row in best]


BAD_ROWS = {
    b'{"image": "gone.png", "text": "a square"}': "gone.png: No such file",
    b"{": "is no JSON",
    b'{"image": "\xff.png", "text": "a"}': "is not UTF-8; write the row as UTF-8",
    b'{"image": "a.png", "text": "a", "id": [NaN]}': "a number is NaN or too large",
    b'{"image": "a.png", "text": "a", "id": -1e999}': "a number is NaN or too large",
    b'{"image": "a.png", "text": "a", "text": "b"}': "is no JSON ('text' stands twice in one object",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_before_a_bad_one_are_written(
    place: Path, tmp_path: Path, bad: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of its own batch, rows 4 and 5."""
    good = json.dumps({"image": image(place, 0), "text": "a square"}).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*[good] * 5, bad, *[good] * 3]))
    options = ("--checkpoint", place / "itr", "--batch_size", 3)
    assert predict("match", "--input", tmp_path / "rows.jsonl", *options) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5
    start = f"error: {tmp_path}/rows.jsonl:6: {BAD_ROWS[bad]}"
    assert captured.err.startswith(start) and captured.err.count("\n") == 1


def test_options_may_stand_anywhere(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "vqa": (["answer", image(place, 0), "what color"], ["--checkpoint", str(place / "vqa"), "--top", "2"]),
        "itr": (["match", image(place, 0), "a square", "a dog"], ["--checkpoint", str(place / "itr")]),
    }
    for (command, *arguments), options in words.values():
        printed = set()
        for cut in range(len(arguments) + 1):
            assert predict(command, *arguments[:cut], *options, *arguments[cut:]) == 0
            printed.add(capsys.readouterr().out)
        assert len(printed) == 1 and printed != {""}
    assert predict("answer", "--checkpoint", place / "vqa", "--", image(place, 0), "-what") == 0


def test_a_text_of_bytes_that_are_no_utf_8_is_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("match", image(place, 0), "a \udcff square", "--checkpoint", place / "itr") == 0
    assert capsys.readouterr().out.endswith("a \\udcff square\n")


def test_a_very_large_batch_size_takes_all_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--checkpoint", place / "itr", "--batch_size", 10**20)
    assert predict("match", image(place, 0), "a square", "a dog", *options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_odd_images_print_nothing_but_the_answer(place: Path, tmp_path: Path) -> None:
    damaged = Image.Exif()
    damaged[0x010E] = "words " * 9
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "JPEG", exif=damaged.tobytes()[:-40])
    (tmp_path / "odd.jpg").write_bytes(content.getvalue())
    command = [sys.executable, "-m", "eve_ds.predict", "answer", str(tmp_path / "odd.jpg"), "what"]
    ended = subprocess.run([*command, "--checkpoint", str(place / "vqa")], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout


def test_features_are_unit_vectors_with_names(place: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(b"a red square\r\ntwo\xe2\x80\xa8dogs\n")
    images = [image(place, 0), image(place, 1)]
    for name in ("f.npz", "f.arrow"):
        options = ("--texts", tmp_path / "texts.txt", "--checkpoint", place / "itr", "--out", tmp_path / name)
        assert predict("features", *images, *options) == 0
    eve = EVE.from_pretrained(place / "itr")
    with np.load(tmp_path / "f.npz") as found:
        assert found["image_names"].tolist() == images and found["text_names"].tolist() == [
            "a red square",
            "two\u2028dogs",
        ]
        np.testing.assert_allclose(found["images"], eve.image_features(images), atol=1e-6)
        np.testing.assert_allclose(found["texts"], eve.text_features(["a red square", "two\u2028dogs"]), atol=1e-6)
    table = pa.ipc.open_file(str(tmp_path / "f.arrow")).read_all()
    assert table["kind"].to_pylist() == ["image", "image", "text", "text"]
    np.testing.assert_allclose(table["vector"].to_pylist()[:2], eve.image_features(images), atol=1e-6)


def test_features_say_what_they_wrote(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("features", image(place, 0), "--checkpoint", place / "itr", "--out")
    assert predict(*common, tmp_path / "a\x1b.npz") == 0
    assert capsys.readouterr().out.endswith("a\\x1b.npz\n")
    assert predict(*common, tmp_path / "b.npz", "--json") == 0
    assert lines(capsys) == [{"images": 1, "texts": 0, "dim": 16, "out": str(tmp_path / "b.npz")}]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no question": (["answer", "IMAGE", "--checkpoint", "vqa"], "give either IMAGE QUESTION, or --input FILE"),
    "no text": (["match", "IMAGE", "--checkpoint", "itr"], "give either IMAGE TEXT, or --input FILE"),
    "nothing": (["judge", "--checkpoint", "nlvr"], "give either IMAGE_0 IMAGE_1 STATEMENT, or --input"),
    "both": (["answer", "IMAGE", "q", "--input", "ROWS", "--checkpoint", "vqa"], "give either IMAGE QUESTION"),
    "empty question": (["answer", "IMAGE", " ", "--checkpoint", "vqa"], "is empty"),
    "no such checkpoint": (["answer", "IMAGE", "q", "--checkpoint", "gone"], "gone: no such file or folder"),
    "another task": (["judge", "IMAGE", "IMAGE", "s", "--checkpoint", "vqa"], "has the head of vqa, not of nlvr"),
    "not an image": (["answer", "ROWS", "q", "--checkpoint", "vqa"], "its format is unknown"),
    "too large": (["answer", "IMAGE", "q", "--checkpoint", "vqa", "--max_pixels", "9"], "32 x 32 pixels, max_pixels=9"),
    "no pixel": (["answer", "IMAGE", "q", "--checkpoint", "vqa", "--max_pixels", "0"], "max_pixels=0: must be between"),
    "more than any": (["answer", "IMAGE", "q", "--checkpoint", "vqa", "--max_pixels", "9" * 12], "must be between"),
    "no side": (["answer", "IMAGE", "q", "--checkpoint", "vqa", "--image_size", "0"], "image_size=0: must be at least"),
    "a pipe": (["answer", "PIPE", "q", "--checkpoint", "vqa"], "error: pipe.png: is a pipe, a socket or a device;"),
    "a blank text": (["features", "--texts", "BLANK", "--checkpoint", "itr", "--out", "f.npz"], "txt:2: is blank"),
    "not UTF-8": (["features", "--texts", "LATIN", "--checkpoint", "itr", "--out", "f.npz"], ":3: is not UTF-8"),
    "no page": (["search", "q", "--html", "images", "--index", "x", "--checkpoint", "itr"], "images: is a folder"),
    "no rows": (["answer", "--input", "gone.jsonl", "--checkpoint", "vqa"], "gone.jsonl: No such file"),
    "no JSON": (["answer", "--input", "BROKEN", "--checkpoint", "vqa"], "broken.jsonl:2: is no JSON"),
    "other keys": (["match", "--input", "ROWS", "--checkpoint", "itr"], ":1: is no object with 'image', 'text'"),
    "no image to encode": (["features", "--checkpoint", "itr", "--out", "f.npz"], "nothing to encode"),
    "another suffix": (["features", "IMAGE", "--checkpoint", "itr", "--out", "f.csv"], "ends in .npz or .arrow"),
    "no text file": (["features", "--texts", "gone", "--checkpoint", "itr", "--out", "f.npz"], "gone: No such file"),
    "no GPU": (["answer", "IMAGE", "q", "--checkpoint", "vqa", "--device", "cuda:99"], "device=cuda:99: torch sees"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    place: Path, mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "rows.jsonl").write_text('{"image": "x"}\n')
    row = json.dumps({"image": image(place, 0), "question": "what"})
    (place / "broken.jsonl").write_text(f"{row}\n{{\n")
    named = {"IMAGE": image(place, 0), "ROWS": str(place / "rows.jsonl"), "BROKEN": str(place / "broken.jsonl")}
    (place / "blank.txt").write_text("a\n \nb\n")
    if not (place / "pipe.png").exists():
        os.mkfifo(place / "pipe.png")
    (place / "latin.txt").write_bytes(b"a\nb\ncaf\xe9\n")
    named |= {"PIPE": "pipe.png", "BLANK": "blank.txt", "LATIN": "latin.txt"}
    arguments, message = MISTAKES[mistake]
    assert predict(*(named.get(word, word) for word in arguments)) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(place.glob("f.*"))


def test_a_page_never_replaces_what_is_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "queries.jsonl").write_text('{"text": "a square"}\n')
    before = Path(image(place, 0)).read_bytes()
    for option, file in (("--image", image(place, 0)), ("--input", place / "queries.jsonl")):
        common = ("--index", place / "index", "--checkpoint", place / "itr")
        assert predict("search", option, file, "--html", file, *common) == 2
        assert f"--html and {option} are one file" in capsys.readouterr().err
    assert Path(image(place, 0)).read_bytes() == before


def test_no_output_goes_into_a_model_or_an_index(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, index = shutil.copytree(place / "itr", tmp_path / "itr"), tmp_path / "index"
    common = ("--checkpoint", model)
    assert predict("index", place / "images", "--out", index, "--num_workers", 0, *common) == 0
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "vectors.arrow").symlink_to(index / "features-000001.arrow")
    (model / "out.html").symlink_to(tmp_path / "elsewhere.html")
    before = {path: path.read_bytes() for folder in (model, index) for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    search = ("search", "a square", "--index", index, *common)
    for html in (model / "model.safetensors", tmp_path / "model/config.yaml", model / "out.html", model / "new/a.html"):
        assert predict(*search, "--html", html) == 2
        assert f"--html {html}: lies in --checkpoint {model}, which is read; choose" in capsys.readouterr().err
    assert predict(*search, "--html", index / "manifest.json") == 2
    assert f"manifest.json: lies in --index {index}, which is read" in capsys.readouterr().err
    for out in (index / "features-000001.arrow", tmp_path / "vectors.arrow"):
        assert predict("features", image(place, 0), "--out", out, *common) == 2
        assert f"--out {out}: lies in an index; choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before and not (model / "new").exists()
    assert predict(*search, "--html", tmp_path / "found.html") == 0
