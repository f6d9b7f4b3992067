from collections import Counter

import pytest

from preprocessing.text.cleaning import TextCleaning, lines_of, pre_caption, pre_caption_eve, pre_question

# What dataset/utils.py of zengyan-97/X-VLM (and of ssyze/EVE in the last column) gives, by running it.
CAPTIONS = [
    ("A man, riding a wave-on top of a surfboard.", 5, "a man riding a wave", "a man riding a wave"),
    (
        "<PERSON>'s black/white dog -- (asleep)  on\na couch!!",
        30,
        "persons black white dog asleep on\na couch",
        "persons black white dog asleep on a couch",
    ),
    (
        "It's 3:45 p.m.; the `clock` says so",
        30,
        "its 345 pm the `clock` says so",
        "its 345 pm the clock says so",
    ),
    ("tab\there and\n\nthere \n", 30, "tab\there and there", "tab here and there"),
    (" - / ", 30, "", ""),
    ("Café №5 & Co. [50%]", 30, "café №5 & co [50%]", "café №5 & co [50%]"),
    ("one two three four five six", 5, "one two three four five", "one two three four five"),
]
QUESTIONS = [
    ("What's the man's left-hand (or right) holding?", 4, "whats the mans left"),
    ("What's the man's left-hand (or right) holding?", 30, "whats the mans left hand or right holding"),
    ("How many  people / dogs are there ?  ", 30, "how many  people   dogs are there"),
    ("How many  people / dogs are there ?  ", 4, "how many  people"),
    ("Is it 3:45 p.m.?\n", 30, "is it 345 pm\n"),
]


@pytest.mark.parametrize(("raw", "words", "xvlm", "eve"), CAPTIONS)
def test_captions_come_out_as_published(raw: str, words: int, xvlm: str, eve: str) -> None:
    assert pre_caption(raw, words) == xvlm
    assert pre_caption_eve(raw, words) == eve


@pytest.mark.parametrize(("raw", "words", "clean"), QUESTIONS)
def test_questions_come_out_as_published(raw: str, words: int, clean: str) -> None:
    assert pre_question(raw, words) == clean


def test_lengths_of_each_task() -> None:
    text = " ".join(map(str, range(60)))
    xvlm = TextCleaning("xvlm")
    assert len(xvlm.caption(text).split()) == 30
    assert len(xvlm.statement(text).split()) == 30  # X-VLM's and ALBEF's NLVR configurations: max_words 30
    assert len(TextCleaning("eve").statement(text).split()) == 40
    assert TextCleaning().statement(text) == text
    assert len(xvlm.question(text, "train").split()) == 30
    assert len(xvlm.question(text, "test").split()) == 50


def test_without_cleaning_a_text_is_only_stripped() -> None:
    none = TextCleaning()
    assert none.caption(" A dog, a CAT. ") == none.statement(" A dog, a CAT. ") == "A dog, a CAT."
    assert none.question(" Who? ", "train") == "Who?"


@pytest.mark.parametrize("cleaning", ["none", "xvlm", "eve"])
def test_captions_of_no_use_are_counted_by_reason_and_not_kept(cleaning: str) -> None:
    bad = {
        "": "caption is empty",
        " \n": "caption is empty",
        "a cat\0": "caption holds a NUL byte",
        "\0": "caption holds a NUL byte",
        "cat " * 25_000: "caption has more than 10000 characters",
        "...": "caption has only punctuation",
        " — ¿?! ": "caption has only punctuation",
        "$ + = _": "caption has only punctuation",
        "\ufffd\ufffd": "caption has only punctuation",
    }
    good = ["a cat", "猫", "7", "😀", "☕ ", "é"]
    left_out: Counter[str] = Counter()
    assert TextCleaning(cleaning).captions([*bad, *good], left_out) == [text.strip() for text in good]
    assert left_out == Counter(bad.values())


def test_of_a_test_split_only_empty_captions_are_left_out() -> None:
    texts = ["...", "a\0", "a" * 100_000, " "]
    left_out: Counter[str] = Counter()
    assert TextCleaning(lenient=True).captions(texts, left_out) == texts[:3]
    assert left_out == {"caption is empty": 1}


def test_lines_of_a_text_file() -> None:
    assert lines_of("\ufeffa cat\r\n\n  \na dog\rtwo\u2028parts\n") == ["a cat", "a dog", "two\u2028parts"]
    assert lines_of("\n") == []
