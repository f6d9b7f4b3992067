"""One bad record of an annotation file, in every converter: counted by reason, the others as without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of

N = 30
SENTENCE = {"raw": "a", "tokens": ["a"]}
DEEP = "as deep as json still reads"  # stands for a list in lists


def answers(word: str = "yes") -> list[dict[str, str]]:
    return [{"answer": word}] * 10


def annotation(number: int) -> dict[str, Any]:
    return {"question_id": number, "image_id": 1, "answers": answers(), "multiple_choice_answer": "yes"}


def question(number: int) -> dict[str, Any]:
    return {"question_id": number, "image_id": 1, "question": f"q{number}"}


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"image_id": 1, "caption": f"c{n}"} for n in range(N)],
}
KARPATHY = {"images": [{"filename": f"{n}.jpg", "split": "train", "sentences": [SENTENCE]} for n in range(N)]}
REGIONS = [{"id": n, "regions": [{"phrase": "a"}]} for n in range(N)]
QAS = [{"id": n, "qas": [{"qa_id": n, "question": "q", "answer": "yes"}]} for n in range(N)]
ASKED = {"questions": [question(n) for n in range(N)], "annotations": [annotation(n) for n in range(N)]}
NLVR = [{"identifier": f"dev-{n}-0-0", "sentence": "s", "label": "True"} for n in range(N)]
PAIRS = [{"images": ["1.jpg", "2.jpg"], "sentence": "s", "label": "True", "identifier": f"a-{n}-0-0"} for n in range(N)]
RETRIEVAL = [{"image": f"{n}.jpg", "caption": ["a", "b"]} for n in range(N)]
VQA = [{"image": "1.jpg", "question": "q", "question_id": n, "answer": ["yes", "yes"]} for n in range(N)]


def beside(content: dict[str, list[Any]], name: str, record: Any) -> dict[str, list[Any]]:
    return content | {name: [*content[name], record]}


CASES: list[tuple[list[str], Any, Any, str, str]] = [  # command, sound content, with a fault, where, reason
    (
        ["coco"],
        COCO,
        beside(COCO, "annotations", {"image_id": 1, "caption": None}),
        "annotations[30]",
        "field 'caption' is not str",
    ),
    (
        ["coco"],
        COCO,
        beside(COCO, "annotations", {"image_id": 7, "caption": "a"}),
        "annotations[30]",
        "caption of an image that the file has not",
    ),
    (["coco"], COCO, beside(COCO, "images", {"id": 2}), "images[1]", "record has no field 'file_name'"),
    (["coco"], COCO, beside(COCO, "images", {"id": DEEP, "file_name": "a"}), "images[1]", "field 'id' is not int"),
    (
        ["coco"],
        KARPATHY,
        beside(KARPATHY, "images", {"filename": "x", "split": "odd"}),
        "images[30]",
        "split is none of train, restval, val, test",
    ),
    (["flickr30k"], KARPATHY, beside(KARPATHY, "images", None), "images[30]", "record is no JSON object"),
    (
        ["flickr30k"],
        KARPATHY,
        beside(KARPATHY, "images", {"filename": "x.jpg", "split": "train", "sentences": [{"raw": 5}]}),
        "images[30]",
        "field 'raw' is not str",
    ),
    (
        ["coco"],
        KARPATHY,
        beside(KARPATHY, "images", {"filename": "x", "split": "train", "cocoid": DEEP, "sentences": [SENTENCE]}),
        "images[30]",
        "field 'cocoid' is not int or str",
    ),
    (
        ["nlvr2"],
        NLVR,
        [*NLVR, {"identifier": "dev-99-0-0", "sentence": "s", "label": "True", "directory": DEEP}],
        "line 31",
        "field 'directory' is not int or str",
    ),
    (["visual-genome"], REGIONS, [*REGIONS, {"id": None, "regions": []}], "record 30", "field 'id' is not int"),
    (
        ["visual-genome"],
        REGIONS,
        [*REGIONS[:-1], {"id": 29, "regions": [{"phrase": "a"}, {"phrase": None}]}],
        "record 29",
        "field 'phrase' is not str",
    ),
    (
        ["visual-genome-qa"],
        QAS,
        [*QAS, {"id": 1, "qas": [{"qa_id": 99, "question": None, "answer": "a"}]}],
        "record 30: qas[0]",
        "field 'question' is not str",
    ),
    (["visual-genome-qa"], QAS, [*QAS, {"id": 1, "qas": None}], "record 30", "field 'qas' is not list"),
    (["vqav2"], ASKED, beside(ASKED, "questions", question(99)), "questions[30]", "question has no annotation"),
    (
        ["vqav2"],
        ASKED,
        beside(ASKED, "questions", {"question_id": True}),
        "questions[30]",
        "field 'question_id' is not int",
    ),
    (
        ["vqav2"],
        ASKED,
        beside(ASKED, "annotations", {"answers": [{}]}),
        "annotations[30]",
        "field 'answers' is no list of objects with an 'answer' string",
    ),
    (
        ["nlvr2"],
        NLVR,
        [*NLVR, {"identifier": "dev-99-0-0", "sentence": "s", "label": 5}],
        "line 31",
        "label is neither True nor False",
    ),
    (
        ["nlvr2"],
        NLVR,
        [*NLVR, {"identifier": "odd", "sentence": "s", "label": "True"}],
        "line 31",
        "identifier is not split-set-pair-sentence",
    ),
    (["nlvr2"], NLVR, [*NLVR, "{broken"], "line 31", "line is invalid JSON"),
    (
        ["json", "--task", "nlvr"],
        PAIRS,
        [*PAIRS, PAIRS[0] | {"images": ["1.jpg"]}],
        "record 30",
        "field 'images' does not name two images",
    ),
    (
        ["json", "--task", "nlvr"],
        PAIRS,
        [*PAIRS, PAIRS[0] | {"label": DEEP}],
        "record 30",
        "label is neither True nor False",
    ),
    (
        ["json", "--task", "retrieval"],
        RETRIEVAL,
        [*RETRIEVAL, {"image": "1.jpg", "caption": [5]}],
        "record 30",
        "field 'caption' holds something that is no string",
    ),
    (
        ["json", "--task", "retrieval"],
        RETRIEVAL,
        [*RETRIEVAL, {"image": float("nan"), "caption": "a"}],
        "record 30",
        "field 'image' is not str",
    ),
    (
        ["json", "--task", "vqa"],
        VQA,
        [*VQA, {"image": "1.jpg", "question": None}],
        "record 30",
        "field 'question' is not str",
    ),
]


def write(folder: Path, command: list[str], content: Any) -> list[object]:
    """The files of `content`; gives the command that converts them."""
    folder.mkdir()
    file = folder / "a.json"
    if command == ["nlvr2"]:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content)
    elif command == ["vqav2"]:
        text = json.dumps({"questions": content["questions"]})
        (folder / "b.json").write_text(json.dumps({"annotations": content["annotations"]}))
    else:
        text = json.dumps(content)
    file.write_text(text.replace(json.dumps(DEEP), "[" * 900 + "]" * 900))
    option = {"visual-genome": "--regions", "visual-genome-qa": "--questions", "vqav2": "--questions"}
    words: list[object] = [*command, option.get(command[0], "--annotations"), file]
    return [*words, "--annotations", folder / "b.json"] if command == ["vqav2"] else words


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(N + 1):
        (folder / f"{number}.jpg").write_bytes(image_of(number, side=8))
    for number in range(N):
        for side in range(2):
            (folder / f"dev-{number}-0-img{side}.png").write_bytes(image_of(number, "PNG", side=8))
    (folder / "COCO__000000000001.jpg").write_bytes(image_of(1, side=8))
    return folder


@pytest.mark.parametrize(("command", "sound", "faulty", "where", "reason"), CASES)
def test_the_others_are_unchanged(
    tmp_path: Path,
    images: Path,
    refuse: Callable[..., str],
    command: list[str],
    sound: Any,
    faulty: Any,
    where: str,
    reason: str,
) -> None:
    end = ["--images", images, "--split", "train", "--out"]
    convert(*write(tmp_path / "sound", command, sound), *end, tmp_path / "as")
    words = [*write(tmp_path / "faulty", command, faulty), *end, tmp_path / "out"]
    message = refuse(*words)
    assert f"json: {where}: " in message and "records are at fault, --max-dropped is 0.01)" in message
    convert(*words, "--max-dropped", 0.5)
    assert rows_of(tmp_path / "out/train") == rows_of(tmp_path / "as/train")
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"][reason] == 1
    file = "b.json" if command == ["vqav2"] and "annotations" in where else "a.json"
    assert {"item": f"{file}: {where}", "reason": reason} in manifest["dropped_items"]
    if "raw" not in reason:  # Karpathy's files hold all splits
        message = refuse(*["test" if word == "train" else word for word in words[:-1]], tmp_path / "test")
        assert where in message  # of a test split nothing goes by default
