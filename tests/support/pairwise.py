"""A short list of cases in which every two settings meet: most faults of combinations are faults of two settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def every_case(factors: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool]) -> list[Case]:
    """All combinations of the factors' values that ``valid`` lets pass, the last factor's values changing fastest."""
    whole = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in whole if valid(case)]


def pairs_of(case: Case) -> set[Pair]:
    """The pairs of settings that meet in a case: (factor, value, other factor, value)."""
    return {(first, case[first], second, case[second]) for first, second in combinations(case, 2)}


def pairwise(factors: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Some of ``every_case``, such that all pairs that meet in any of those meet in one of these.

    Greedy (the "automatic efficient test generator" of Cohen et al., IEEE TSE 1997, over all cases in place of drawn
    ones): always the case with the most pairs still missing, the first of equals; so the list is the same every time.
    """
    cases = every_case(factors, valid)
    missing = set().union(*map(pairs_of, cases))
    chosen: list[Case] = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen
