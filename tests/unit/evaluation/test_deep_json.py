"""JSON so deep that Python can hardly read it, or cannot, is a user's bad input wherever it stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation import nlvr, vqa
from evaluation.common import run

MARK = "@"
QUESTION = {"question_id": 1, "question": "a"}
ANNOTATION = {"question_id": 1, "answers": [{"answer": "yes"}] * 10, "question_type": "a", "answer_type": "b"}
FILES: dict[str, Any] = {
    "predictions": [{"question_id": 1, "answer": "yes"}],
    "annotations": {"annotations": [ANNOTATION]},
    "questions": {"questions": [QUESTION]},
}
EXAMPLE = {"identifier": "dev-1-0-0", "label": "True", "sentence": "a"}


def with_mark(value: Any) -> Iterator[Any]:
    """`value` with the mark in each of its places in turn."""
    yield MARK
    if isinstance(value, dict):
        for name, one in value.items():
            yield from (value | {name: changed} for changed in with_mark(one))
    elif isinstance(value, list):
        yield from ([changed, *value[1:]] for changed in with_mark(value[0]))


@pytest.mark.parametrize("depth", [800, 900, 940, 980, 100_000])
def test_deep_json_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int) -> None:
    deep = "[" * depth + "]" * depth
    (tmp_path / "p.csv").write_text("dev-1-0-0,True\n")

    def put(name: str, value: Any) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(value).replace(json.dumps(MARK), deep))
        return str(path)

    def check(code: int) -> None:
        """Where it could be read, a field that no score needs may hold it."""
        assert code == 2 or (code == 0 and depth < 1000)
        assert capsys.readouterr().err.count("\n") == (code == 2)

    end = ["--out", str(tmp_path / "m.json")]
    for changed in FILES:
        for value in with_mark(FILES[changed]):
            words = [f"--{name}={put(name, value if name == changed else whole)}" for name, whole in FILES.items()]
            check(run(vqa.main, [*words, *end]))
    for value in with_mark([EXAMPLE]):
        check(run(nlvr.main, ["--predictions", str(tmp_path / "p.csv"), "--annotations", put("a.json", value), *end]))
