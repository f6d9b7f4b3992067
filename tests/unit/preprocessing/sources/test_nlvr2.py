import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of


def write(folder: Path, examples: list[dict[str, Any]]) -> list[object]:
    (folder / "a.json").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return ["nlvr2", "--annotations", folder / "a.json", "--images", folder, "--split", "val", "--out", folder / "out"]


def example(identifier: str, label: str = "True", **more: Any) -> dict[str, Any]:
    return {"identifier": identifier, "sentence": f"about {identifier}", "label": label, **more}


def draw(folder: Path, pair: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for side in (0, 1):
        (folder / f"{pair}-img{side}.png").write_bytes(image_of(2 * seed + side, "PNG", side=8))


def test_shapes_world(raw: Path, tmp_path: Path) -> None:
    images = raw / "nlvr2/images"
    convert("nlvr2", "--annotations", raw / "nlvr2/dev.json", "--images", images, "--split", "val", "--out", tmp_path)
    examples = [json.loads(line) for line in (raw / "nlvr2/dev.json").read_text().splitlines()]
    rows = rows_of(tmp_path / "val")
    flat = [
        (identifier, sentence, label, row["image_0"], row["image_1"])
        for row in rows
        for identifier, sentence, label in zip(row["identifier"], row["questions"], row["answers"], strict=True)
    ]
    expected = [
        (
            e["identifier"],
            e["sentence"],
            e["label"],
            *((images / "dev" / Path(e[url]).name).read_bytes() for url in urls),
        )
        for urls in [("left_url", "right_url")]
        for e in examples
    ]
    assert flat == expected
    assert read_manifest(tmp_path / "val")["source"] == {"pairs": 8, "statements": 16}


def test_a_file_of_another_split_is_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, name, said in (
        ("train", "test1", "test"),
        ("val", "train", "train"),
        ("val", "dev", ""),
        ("val", "mine", ""),
    ):
        folder = tmp_path / f"{split}-{name}"
        draw(folder, f"{name}-7-0", 1)
        convert(*write(folder, [example(f"{name}-7-0-0")]), "--split", split)
        told = f"a.json: 1 of 1 statements are of NLVR2's {name} by their identifiers, and become --split {split}; "
        assert (f"{told}choose --split {said} unless" in capsys.readouterr().out) == bool(said)


@pytest.mark.parametrize("place", ["train/41", "41", "train", "."])
def test_images_are_found_where_the_archives_put_them(tmp_path: Path, place: str) -> None:
    draw(tmp_path / place, "train-7-0", 1)
    draw(tmp_path / place, "train-7-1", 2)
    examples = [example(f"train-7-{pair}-{sentence}", directory=41) for pair in (0, 1) for sentence in (0, 1)]
    convert(*write(tmp_path, examples))
    rows = rows_of(tmp_path / "out/val")
    assert [row["identifier"] for row in rows] == [["train-7-0-0", "train-7-0-1"], ["train-7-1-0", "train-7-1-1"]]
    assert rows[1]["image_1"] == image_of(5, "PNG", side=8)


def test_one_missing_image_drops_the_pair(tmp_path: Path, refuse: Callable[..., str]) -> None:
    draw(tmp_path / "dev", "dev-1-0", 1)
    draw(tmp_path / "dev", "dev-1-1", 2)
    (tmp_path / "dev/dev-1-0-img1.png").unlink()
    words = write(tmp_path, [example("dev-1-0-0"), example("dev-1-1-0")])
    assert "dev-1-0 (image is missing)" in refuse(*words)
    convert(*words, "--max-dropped", 0.5)
    assert [row["identifier"] for row in rows_of(tmp_path / "out/val")] == [["dev-1-1-0"]]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (example("dev-1"), "line 2: identifier 'dev-1' is not split-set-pair-sentence"),
        (example("dev-1-0-0"), "line 2: identifier dev-1-0-0 occurs twice"),
        (example("dev-1-0-1", label="maybe"), 'line 2: label "maybe" is neither True nor False'),
        (example("dev-1-0-1", directory="../other"), "line 2: directory '../other' leads out of --images"),
        ({"identifier": "dev-1-0-1", "label": "True"}, "line 2: has no field 'sentence'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, refuse: Callable[..., str], second: dict[str, Any], said: str) -> None:
    draw(tmp_path / "dev", "dev-1-0", 1)
    assert f"a.json: {said}" in refuse(*write(tmp_path, [example("dev-1-0-0"), second]))


def test_labels_in_any_case(tmp_path: Path) -> None:
    draw(tmp_path / "dev", "dev-1-0", 1)
    convert(*write(tmp_path, [example("dev-1-0-0", "true"), example("dev-1-0-1", False)]))
    assert rows_of(tmp_path / "out/val")[0]["answers"] == ["True", "False"]


def test_a_pair_listed_by_duplicates_is_left_out_completely(tmp_path: Path) -> None:
    for number in (1, 2):
        draw(tmp_path / "dev", f"dev-1-{number}", number)
    words = write(tmp_path, [example(f"dev-1-{pair}-{sentence}") for pair in (1, 2) for sentence in (0, 1)])
    convert(*words)
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen/x.png").write_bytes(image_of(3, "PNG", side=8))  # the right one of the first pair
    (tmp_path / "seen.json").write_text(json.dumps([{"image": "x.png", "caption": "x"}]))
    convert("json", "--task", "retrieval", "--annotations", tmp_path / "seen.json", "--images", tmp_path / "seen",
            "--split", "test", "--out", tmp_path / "test")  # fmt: skip
    convert("duplicates", "find", tmp_path / "out", "--of", tmp_path / "test", "--out", tmp_path / "d.json",
            "--distance", 0)  # fmt: skip
    convert(*words, "--exclude", tmp_path / "d.json", "--overwrite")
    assert [row["identifier"] for row in rows_of(tmp_path / "out/val")] == [["dev-1-2-0", "dev-1-2-1"]]
    assert read_manifest(tmp_path / "out/val")["dropped"] == {"statement: image is listed in --exclude": 2}


def test_the_pairs_of_another_split_are_excluded_by_its_file(tmp_path: Path) -> None:
    for number in (1, 2):
        draw(tmp_path / "dev", f"dev-1-{number}", number)
    words = write(tmp_path, [example(f"dev-1-{pair}-0") for pair in (1, 2)])
    (tmp_path / "other.json").write_text("".join(json.dumps(example(f"dev-1-1-{n}")) + "\n" for n in (0, 1)))
    convert(*words, "--exclude", tmp_path / "other.json")
    assert [row["identifier"] for row in rows_of(tmp_path / "out/val")] == [["dev-1-2-0"]]


def test_statements_without_a_word_are_left_out_and_counted(tmp_path: Path) -> None:
    draw(tmp_path / "dev", "dev-1-0", 1)
    convert(*write(tmp_path, [example("dev-1-0-0", sentence=" "), example("dev-1-0-1")]))
    assert rows_of(tmp_path / "out/val")[0]["identifier"] == ["dev-1-0-1"]
    assert read_manifest(tmp_path / "out/val")["dropped"] == {"statement without a word": 1}
    convert("verify", tmp_path / "out")
