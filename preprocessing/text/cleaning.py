"""Cleans captions and questions as X-VLM and EVE do when they read their fine-tuning JSON.

The rules are those of `pre_caption` and `pre_question` in dataset/utils.py of github.com/zengyan-97/X-VLM and of
github.com/ssyze/EVE, which also removes backticks from captions and turns single tabs and line breaks into spaces.
"""

import argparse
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

CLEANINGS = ("none", "xvlm", "eve")
_DELETED = str.maketrans("", "", ",.'!?\"()*#:;~")
_SPACES = re.compile(r"\s{2,}")
_EVE_SPACES = re.compile(r"\s+")
# Words that both keep: retrieval 30, VQA 30 in training and 50 in evaluation. NLVR2 as in ALBEF and X-VLM.
CAPTION_WORDS, QUESTION_WORDS, TEST_QUESTION_WORDS = 30, 30, 50
STATEMENT_WORDS = {"xvlm": 30, "eve": 40}
EMPTY = "caption is empty"
MAX_CHARACTERS = 10_000  # of a text: ten times the longest that people write about an image
_WORD = re.compile(r"[^\W_]")
_LINES = re.compile(r"\r\n|\n|\r")


def _strip_marks(text: str) -> str:
    return text.lower().translate(_DELETED).replace("-", " ").replace("/", " ")


def _shorten(text: str, max_words: int) -> str:
    # Cut at single spaces, as both do: there is an empty word between two spaces.
    words = text.split(" ")
    return text if len(words) <= max_words else " ".join(words[:max_words])


def _is_mark(character: str) -> bool:
    """Whether a character that is neither letter nor digit is punctuation, space or U+FFFD, and not an emoji."""
    kind = unicodedata.category(character)
    return kind[0] in "PZC" or kind in ("Sm", "Sc", "Sk") or character == "\ufffd"


def text_fault(text: str) -> str:
    """Why a text cannot be learned from, such as "holds a NUL byte"; "" for a good text and for an empty one."""
    if "\0" in text:
        return "holds a NUL byte"
    if len(text) > MAX_CHARACTERS:
        return f"has more than {MAX_CHARACTERS} characters"
    if _WORD.search(text) or not text.strip():
        return ""
    return "has only punctuation" if all(map(_is_mark, text)) else ""


def lines_of(text: str) -> list[str]:
    """The captions in a text file: its lines that are not blank."""
    return [line for line in _LINES.split(text.removeprefix("\ufeff")) if line.strip()]


def pre_question(question: str, max_words: int) -> str:
    """A question as X-VLM and EVE use it: lower case, without most punctuation, at most `max_words` words."""
    return _shorten(_strip_marks(question).rstrip(" "), max_words)


def pre_caption(caption: str, max_words: int) -> str:
    """A caption as X-VLM uses it; "" if nothing is left (X-VLM raises then)."""
    text = _strip_marks(caption).replace("<person>", "person")
    return _shorten(_SPACES.sub(" ", text).rstrip("\n").strip(" "), max_words)


def pre_caption_eve(caption: str, max_words: int) -> str:
    """A caption as EVE's version of the function returns it; "" if nothing is left."""
    text = _strip_marks(caption.replace("`", "")).replace("<person>", "person")
    return _shorten(_EVE_SPACES.sub(" ", text).strip(" "), max_words)


@dataclass(frozen=True)
class TextCleaning:
    """The cleaning chosen by `--text-cleaning`. With "none", only white space at both ends is removed."""

    name: str = "none"
    lenient: bool = False  # on a test split: only empty captions are left out

    def caption(self, text: str) -> str:
        """A cleaned caption; "" if it is to be left out."""
        return "" if self._fault(text) else self._clean(text, CAPTION_WORDS)

    def statement(self, text: str) -> str:
        """An NLVR2 sentence."""
        return self._clean(text, STATEMENT_WORDS.get(self.name, 0))

    def question(self, text: str, split: str) -> str:
        """A question; in the training split it is cut shorter."""
        if self.name == "none":
            return text.strip()
        return pre_question(text, QUESTION_WORDS if split == "train" else TEST_QUESTION_WORDS)

    def captions(self, texts: Iterable[str], left_out: Counter[str] | None = None) -> list[str]:
        """The cleaned captions. Those that are left out are counted in `left_out`, by reason."""
        kept = []
        for text in texts:
            if clean := self.caption(text):
                kept.append(clean)
            elif left_out is not None:
                left_out[self._fault(text) or EMPTY] += 1
        return kept

    def _fault(self, text: str) -> str:
        """The reason to leave out a caption; "" for a good one and for an empty one."""
        fault = "" if self.lenient else text_fault(text)
        return f"caption {fault}" if fault else ""

    def _clean(self, text: str, max_words: int) -> str:
        if self.name == "none":
            return text.strip()
        return (pre_caption if self.name == "xvlm" else pre_caption_eve)(text, max_words)


def add_text_argument(parser: argparse.ArgumentParser, default: str = "none") -> None:
    """Declare `--text-cleaning`."""
    parser.add_argument(
        "--text-cleaning",
        choices=CLEANINGS,
        default=default,
        help=f"clean texts as X-VLM's or EVE's fine-tuning does: lower case, few marks, cut (default {default})",
    )


def text_cleaning(args: argparse.Namespace) -> TextCleaning:
    """The cleaning of the options."""
    return TextCleaning(args.text_cleaning, lenient=args.split == "test")
