"""The generator of pairwise lists against a direct count of what its lists cover."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pairwise import Case, every_case, pairs_of, pairwise


def never_both_last(case: Case) -> bool:
    """Forbids one pair of values, as expert parallelism over four ranks in a world of two."""
    return not (case["f0"] == "last" and case["f1"] == "last")


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 3), min_size=2, max_size=5), constrained=st.booleans())
def test_every_pair_that_can_meet_meets_in_valid_cases(sizes: list[int], constrained: bool) -> None:
    factors = {f"f{i}": [*range(size), "last"] for i, size in enumerate(sizes)}
    valid = never_both_last if constrained else lambda case: True
    chosen, whole = pairwise(factors, valid), every_case(factors, valid)
    assert all(case in whole for case in chosen)
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, whole))
    assert any("last" in (case["f0"], case["f1"]) for case in chosen)
    assert (("f0", "last", "f1", "last") in set().union(*map(pairs_of, chosen))) != constrained
    assert pairwise(factors, valid) == chosen


def test_a_list_is_much_shorter_than_all_cases() -> None:
    factors = {name: [0, 1, 2] for name in "abcd"}
    assert len(every_case(factors, lambda case: True)) == 81
    assert 9 <= len(pairwise(factors)) <= 12  # nine at least: the pairs of two factors alone
