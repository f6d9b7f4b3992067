"""The best that can be said of masked words by one who knows the scene, the wordings and the words left visible."""

from collections import Counter
from collections.abc import Iterable, Sequence

Token = int


def best_guesses(texts: Iterable[Sequence[Token]], shown: Sequence[Token], masked: Sequence[int]) -> list[Token] | None:
    """The likeliest token at each masked place, if all ``texts`` were equally likely before any was seen.

    Args:
        texts: all captions that the scene may have, as tokens; one that comes twice counts twice.
        shown: the tokens of the caption; those at masked places are not looked at.
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
