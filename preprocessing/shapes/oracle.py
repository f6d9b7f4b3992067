"""The best possible prediction of masked words, given the scene, all wordings and the visible words."""

from collections import Counter
from collections.abc import Iterable, Sequence

Token = int


def best_guesses(texts: Iterable[Sequence[Token]], shown: Sequence[Token], masked: Sequence[int]) -> list[Token] | None:
    """The most likely token at each masked place, with equal prior probability of all ``texts``.

    Args:
        texts: all captions that the scene may have, as tokens; a duplicate counts twice.
        shown: the tokens of the caption; those at masked places are ignored.
        masked: those places.
    Returns:
        a token for each masked place; None if no text fits the visible ones.
    """
    hidden = set(masked)
    visible = [place for place in range(len(shown)) if place not in hidden]
    fitting = [
        text for text in texts if len(text) == len(shown) and all(text[place] == shown[place] for place in visible)
    ]
    if not fitting:
        return None
    # The smallest of equally likely tokens, so that the answer does not depend on the order of the texts.
    counts = (Counter(text[place] for text in fitting) for place in masked)
    return [min(found, key=lambda token: (-found[token], token)) for found in counts]
