import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import vqa
from preprocessing.errors import UserError
from preprocessing.text.answers import (
    Labels,
    build_answer_list,
    labels_of,
    normalize_answer,
    read_answer_list,
    resolve_answer_list,
    soft_score,
)

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The Two cats.", "2 cats"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("hot-dog", "hot dog"),
        ("hot- dog", "hot dog"),
        ("black/ white/red", "black whitered"),
        ("3.5", "3.5"),
        ("a\n none\t", "0"),
        ("5%", "5%"),
        ("somebody'd", "somebodyd"),
        ("an", ""),
    ],
)
def test_official_normalization(raw: str, normal: str) -> None:
    assert normalize_answer(raw) == normal


@given(st.text(st.sampled_from("ab two dont an the 01,.;/[]\"{}()=+\\_-><@`?!':$%\n\t"), max_size=20))
def test_agrees_with_the_evaluation(text: str) -> None:
    assert normalize_answer(text) == vqa.normalize(vqa.clean(text))


def test_agrees_with_the_evaluation_on_golden_answers() -> None:
    annotations = json.loads((ASSETS / "vqa_annotations.json").read_text())["annotations"]
    texts = {answer["answer"] for annotation in annotations for answer in annotation["answers"]}
    assert len(texts) > 20
    for text in texts:
        assert normalize_answer(text) == vqa.normalize(vqa.clean(text))


def test_entries_of_a_list_that_are_spelled_otherwise_or_never_right() -> None:
    labels = labels_of(["two", "t-shirt", "yes", "the", "2", "a lot", "lot", "No", "t shirt.", ""])
    assert labels.of == {"yes": 2, "2": 4, "lot": 6, "t shirt": 1, "no": 7}
    assert labels.respelled == ["'t-shirt' is taken for 't shirt'", "'No' is taken for 'no'"]
    assert labels.unreachable == [
        "'two' ('2' stands for it)",
        "'the' (nothing is left of it)",
        "'a lot' ('lot' stands for it)",
        "'t shirt.' ('t-shirt' stands for it)",
        "'' (nothing is left of it)",
    ]
    assert labels_of(["2", "don't", "t shirt"]) == Labels({"2": 0, "don't": 1, "t shirt": 2}, [], [])


def test_soft_scores() -> None:
    assert [soft_score(count) for count in range(6)] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_answer_list_is_frequent_answers_first() -> None:
    assert build_answer_list({"no": 9, "yes": 9, "red": 12, "rare": 8, "": 50}, 9) == ["red", "no", "yes"]
    with pytest.raises(UserError, match="--min-answers 99"):
        build_answer_list({"no": 9}, 99)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("3", "is neither a JSON list of answers, such as X-VLM's, nor an object"),
        ("[]", "is neither a JSON list"),
        ("{}", "is neither a JSON list"),
        ('["a", 3]', "entry 1 is 3, no text"),
        ('["a", "b", "a"]', 'entries 0 and 2 are both "a"; take one out'),
        ('{"a": 0, "b": "1"}', 'the label of "b" is "1"; labels must be the numbers 0 to 1, each once'),
        ('{"a": 0, "b": true}', 'the label of "b" is true'),
        ('{"a": 0, "b": 2}', 'the label of "b" is 2'),
        ('{"a": 0, "b": 0}', 'the label of "b" is 0, as that of "a"'),
        ('{"0": "yes", "1": "no"}', 'the label of "0" is "yes"'),
        ("yes\nno\n", "invalid JSON"),
    ],
)
def test_bad_answer_lists_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_answer_list(tmp_path / "list.json")
    assert f"list.json: {words}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [["", "net", "yes"], {"yes": 2, "": 0, "net": 1}])
def test_lists_in_the_forms_of_xvlm_and_lxmert(tmp_path: Path, content: object) -> None:
    (tmp_path / "list.json").write_text(json.dumps(content, indent=4))
    assert read_answer_list(tmp_path / "list.json") == ["", "net", "yes"]


def test_which_answer_list_counts(tmp_path: Path) -> None:
    counts = Counter({"red": 9, "blue": 3})
    assert resolve_answer_list(tmp_path, "train", None, counts, 3, False) == ["red", "blue"]
    assert resolve_answer_list(tmp_path, "val", ["x"], counts, 3, False) == ["x"]
    with pytest.raises(UserError, match=r"answer_list\.json: no such file; convert the train split"):
        resolve_answer_list(tmp_path, "val", None, counts, 3, False)
    (tmp_path / "answer_list.json").write_text('["green"]')
    assert resolve_answer_list(tmp_path, "train", None, counts, 3, False) == ["green"]
    assert resolve_answer_list(tmp_path, "train", None, counts, 3, True) == ["red", "blue"]
