"""VQA accuracy: the official scores to the last digit, the oddities one by one, and bad input."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import vqa
from evaluation.common import InputError, run
from evaluation.contractions import CONTRACTIONS
from tests.support import official_vqa

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "tests" / "assets"


def golden(name: str):
    return json.loads((ASSETS / f"vqa_{name}.json").read_text())


def annotation(question_id=1, answers=("yes",) * 10, **other):
    return {
        "question_id": question_id,
        "answer_type": "yes/no",
        "question_type": "is the",
        "answers": [{"answer": answer, "answer_id": i + 1} for i, answer in enumerate(answers)],
    } | other


def test_official_scores_overall_per_type_and_per_question() -> None:
    official = golden("official_scores")
    predictions, annotations = golden("predictions"), golden("annotations")["annotations"]
    scores = vqa.score(predictions, annotations)
    assert scores["overall"] == official["accuracy"]["overall"]
    assert scores["per_answer_type"] == official["accuracy"]["perAnswerType"]
    assert scores["per_question_type"] == official["accuracy"]["perQuestionType"]
    by_question = vqa.per_question(predictions, annotations)
    assert {str(question): value for question, value in by_question.items()} == official["per_question"]


def test_command_on_the_official_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "metrics.json"
    details = tmp_path / "details.json"
    command = [sys.executable, "-m", "evaluation.vqa", "--out", str(out), "--per_question", str(details)]
    for name in ("predictions", "annotations", "questions"):
        command += [f"--{name}", str(ASSETS / f"vqa_{name}.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(out.read_text())["overall"] == golden("official_scores")["accuracy"]["overall"]
    assert json.loads(details.read_text()) == golden("official_scores")["per_question"]
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["details.json", "metrics.json"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("a/c", "c"),  # a mark that touches no space becomes one; "a" is then an article
        ("red/ blue", "red blue"),
        ("on/off / up", "onoff up"),  # it touches a space somewhere, so it is deleted everywhere
        ("1,000 -2", "1000 2"),
        ("1,000/day", "1000day"),  # digit-comma-digit anywhere: every mark is deleted
        ("it's 5:30 $4 50%", "it's 5:30 $4 50%"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the table has it with a capital only
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert vqa.normalize(text) == normal


def test_only_the_first_32_periods_are_removed() -> None:
    assert vqa.normalize("." * 40) == "." * 8


def test_unanimous_answers_are_compared_to_the_letter() -> None:
    assert vqa.accuracy("Two", ["two"] * 10) == 0
    assert vqa.accuracy(" two\n", ["two"] * 9 + ["two\t"]) == 100
    assert vqa.accuracy("Two", ["two"] * 9 + ["2"]) == 100


@pytest.mark.parametrize(("matches", "percent"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (9, 100)])
def test_accuracy_by_number_of_matches(matches: int, percent: float) -> None:
    assert vqa.accuracy("cat", ["cat"] * matches + [f"other{i}" for i in range(10 - matches)]) == percent


WORDS = st.lists(
    st.sampled_from(["a cat", "the", "two", "2", "U.S.", "don't", "dont", "1,5", "x / y", "", "'"]),
    min_size=2,
    max_size=12,
)


@given(WORDS, st.sampled_from(["2", "two", "cat", "don't", "us"]))
def test_equals_leave_one_out_as_defined(answers: list[str], prediction: str) -> None:
    humans, mine = answers, prediction
    if len(set(humans)) > 1:
        humans, mine = [vqa.normalize(a) for a in humans], vqa.normalize(mine)
    sets = [humans[:i] + humans[i + 1 :] for i in range(len(humans))]
    expected = 100 * sum(min(1, others.count(mine) / 3) for others in sets) / len(sets)
    assert vqa.accuracy(prediction, answers) == pytest.approx(expected, abs=1e-9)


TEXTS = st.one_of(
    st.sampled_from(
        ["yes", "Yes.", "yes\n", "a dog", "dog", "the Dog!", "two", "2", "none", "1,000", "dont", "red/ blue"]
    ),
    st.text(st.sampled_from("ab two dont 01,.;/[]\"(+\\_-<@`?!':$%\n\t"), max_size=12),
)
ANSWERED = st.tuples(TEXTS, st.lists(TEXTS, min_size=10, max_size=10) | TEXTS.map(lambda text: [text] * 10))


@given(st.lists(ANSWERED, min_size=1, max_size=6))
def test_equals_the_official_algorithm_to_the_last_digit(asked: list[tuple[str, list[str]]]) -> None:
    predictions = [{"question_id": number, "answer": text} for number, (text, _) in enumerate(asked)]
    annotations = [
        annotation(number, answers, question_type=f"type {number % 2}") for number, (_, answers) in enumerate(asked)
    ]
    official = official_vqa.evaluate(predictions, copy.deepcopy(annotations))
    assert vqa.per_question(predictions, annotations) == official.pop("per_question")
    assert vqa.score(predictions, annotations) == official


def test_the_official_algorithm_of_these_tests_gives_the_official_scores() -> None:
    found, official = (
        official_vqa.evaluate(golden("predictions"), golden("annotations")["annotations"]),
        golden("official_scores"),
    )
    assert {str(question): value for question, value in found["per_question"].items()} == official["per_question"]
    assert found["per_question_type"] == official["accuracy"]["perQuestionType"]


def test_five_times_as_fast_as_the_official_algorithm_with_the_same_scores(tmp_path: Path) -> None:
    official, ours = official_vqa.pairs(1200, 3, tmp_path)  # asserts that the scores are equal
    assert min(official) > 5 * min(ours)
    for form in (vqa.clean, vqa.normalize):  # each text once
        assert form.cache_info().hits > 5 * form.cache_info().misses


def test_contractions_table_is_whole() -> None:
    assert len(CONTRACTIONS) == 120
    assert all(key.replace("'", "") == value.replace("'", "") for key, value in CONTRACTIONS.items())


YES = {"question_id": 1, "answer": "yes"}


@pytest.mark.parametrize(
    ("predictions", "annotations", "words"),
    [
        ([YES, YES], [annotation()], "prediction 1: question_id 1 occurs twice"),
        ([YES], [annotation(), annotation()], "annotation 1: question_id 1 occurs twice"),
        ([YES], [annotation(), annotation(2)], "1 of 2 questions have no prediction: question_id 2"),
        ([YES, {"question_id": "1", "answer": "x"}], [annotation()], "not in the annotations: '1'"),
        ([{"answer": "x"}], [annotation()], "prediction 0: no JSON object with a 'question_id'"),
        ([["x"]], [annotation()], "prediction 0: no JSON object"),
        ([{"question_id": [1]}], [annotation()], "prediction 0"),
        ([{"question_id": 1, "answer": 2}], [annotation()], "'answer' must be text, got 2"),
        ([YES], [annotation(answer_type=None)], "'answer_type' must be text"),
        ([YES], [annotation(answers=("yes",))], "at least two answers"),
        ([YES], [annotation() | {"answers": ["yes", "no"]}], "objects with a text 'answer'"),
        ([], [], "no annotations"),
    ],
)
def test_bad_rows_name_the_fault(predictions, annotations, words: str) -> None:
    with pytest.raises(InputError) as caught:
        vqa.score(predictions, annotations)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def write(path: Path, value: object) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("predictions", None, "No such file or directory"),
        ("predictions", '[{"question_id": 1,\n "answer": yes}]', "invalid JSON at line 2 column 12"),
        (
            "predictions",
            f'[{{"question_id": {"1" * 5000}, "answer": "yes"}}]',
            "invalid JSON from line 1: Exceeds the limit",
        ),
        ("predictions", {"question_id": 1}, "must be a JSON list"),
        ("annotations", [1], "a JSON object with a list 'annotations'"),
        ("questions", {"questions": [{"question_id": 3}]}, "questions without annotation: question_id 3"),
        ("questions", {"questions": [{"id": 3}]}, "question 0: no JSON object with a 'question_id'"),
        ("questions", {"questions": [{"question_id": 2}]}, "1 of 1 questions have no prediction: question_id 2"),
    ],
)
def test_bad_files_exit_with_2_and_one_line(tmp_path: Path, capsys, name: str, content, words: str) -> None:
    good = {
        "predictions": [YES],
        "annotations": {"annotations": [annotation(), annotation(2)]},
        "questions": {"questions": [YES]},
    }
    arguments = ["--out", str(tmp_path / "out.json")]
    for key, value in good.items():
        path = tmp_path / f"{key}.json"
        arguments += [
            f"--{key}",
            str(path) if key == name and content is None else write(path, content if key == name else value),
        ]
    assert run(vqa.main, arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(tmp_path / f"{name}.json") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_questions_restrict_what_is_scored(tmp_path: Path) -> None:
    annotations = [annotation(), annotation(2), {"question_id": [0]}]
    arguments = [
        "--predictions", write(tmp_path / "p.json", [YES]),
        "--annotations", write(tmp_path / "a.json", {"annotations": annotations}),
        "--questions", write(tmp_path / "q.json", {"questions": [{"question_id": 1}]}),
        "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    assert run(vqa.main, arguments) == 0
    assert json.loads((tmp_path / "out.json").read_text())["overall"] == 100


def test_predictions_beyond_the_annotations_are_refused_or_left_out_on_request(tmp_path: Path, capsys) -> None:
    more = [YES, *({"question_id": number, "answer": "no"} for number in range(2, 7))]
    arguments = [
        "--predictions", write(tmp_path / "p.json", more),
        "--annotations", write(tmp_path / "a.json", {"annotations": [annotation()]}),
        "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    assert run(vqa.main, arguments) == 2
    error = capsys.readouterr().err
    assert "5 of 6 predictions have a question_id that is not in the annotations: 2, 3, 4 and 2 more" in error
    assert "--allow_extra" in error and error.count("\n") == 1 and not (tmp_path / "out.json").exists()
    assert run(vqa.main, [*arguments, "--allow_extra"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["overall"] == 100
    assert "note: 5 predictions belong to no question" in capsys.readouterr().err


def test_wrong_options_are_one_line_with_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        vqa.main(["--prediction", "x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def files(folder: Path) -> list[str]:
    predictions = write(folder / "p.json", [YES])
    annotations = write(folder / "a.json", {"annotations": [annotation(question_type="\udc00?")]})
    return ["--predictions", predictions, "--annotations", annotations]


def test_no_output_may_be_an_input_or_the_other_output(tmp_path: Path, capsys) -> None:
    given = files(tmp_path)
    (tmp_path / "link.json").symlink_to("a.json")
    new = str(tmp_path / "new.json")
    for outputs in (["--out", given[3]], ["--out", str(tmp_path / "link.json")], ["--out", new, "--per_question", new]):
        with pytest.raises(SystemExit) as caught:
            vqa.main([*given, *outputs])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "are one file" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "a.json").read_text())["annotations"] and not Path(new).exists()


def test_a_pipe_is_written_to_and_half_an_emoji_is_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation.vqa", *files(tmp_path), "--out", "/dev/stdout"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert Path("/dev/stdout").is_symlink()
    end = done.stdout.rindex(b"}") + 1
    scores = json.loads(done.stdout[:end])
    assert scores["overall"] == 100 and scores["per_question_type"] == {"\udc00?": 100}
