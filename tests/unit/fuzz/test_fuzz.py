"""Thousands of damaged inputs to every reader: taken as what they are or refused in one line, within bounds.

No traceback, no hang, no abort, no code run, nothing printed that a terminal obeys; and of what is taken, a check that
what was read is what is there. A fault names its case: ``fuzz.one(target, number, folder)`` makes it again.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.support.fuzz import converters, readers, training
from tests.support.fuzz import runner as fuzz

MAKERS = {
    "converters": converters.converters,
    "tools": converters.tools,
    "scores": readers.scores,
    "reports": readers.reports,
    "shards": training.shards,
    "settings": training.settings,
    "checkpoints": training.checkpoints,
    "tokenizers": training.tokenizers,
    "models": training.models,
}
FEW = {  # cases in `make test`; a few hundred in all
    "converters": 90, "tools": 27, "scores": 30, "reports": 8, "shards": 60, "settings": 24, "checkpoints": 24,
    "tokenizers": 24, "models": 19,
}  # fmt: skip
MANY = {
    "converters": 1680, "tools": 450, "scores": 600, "reports": 120, "shards": 900, "settings": 450, "checkpoints": 300,
    "tokenizers": 300, "models": 200,
}  # fmt: skip


def check(group: str, count: int, first: int) -> None:
    targets = MAKERS[group]()
    tally, faults = fuzz.run(targets, count, first=first)
    told = "\n".join(f"{fault.case} {fault.kind}: {fault.text}" for fault in faults[:20])
    assert not faults, f"{len(faults)} of {count} cases:\n{told}"
    assert sum(tally.values()) == count
    for outcome in (
        ("taken", "refused") if count > 100 else ()
    ):  # else the damage misses what is read, or nothing sound is left
        assert any(name.endswith(outcome) for name in tally), tally


@pytest.mark.parametrize("group", MAKERS)
def test_sound_inputs_are_taken(group: str) -> None:
    for target in MAKERS[group]():
        with tempfile.TemporaryDirectory() as folder:
            assert fuzz.sound(target, Path(folder)) == 0, target.name


@pytest.mark.parametrize("group", MAKERS)
def test_a_few_hundred_damaged_inputs(group: str) -> None:
    check(group, FEW[group], first=0)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", MAKERS)
def test_five_thousand_damaged_inputs(group: str) -> None:
    check(group, MANY[group], first=FEW[group])


def test_that_is_five_thousand() -> None:
    assert sum(MANY.values()) == 5000 and FEW.keys() == MANY.keys() == MAKERS.keys()


def _reader(behavior: str, folder: Path) -> int:
    """What a reader should not do, by its name."""
    if behavior == "traceback":
        raise KeyError("a")
    if behavior == "wrong":
        raise fuzz.Wrong("other weights")
    if behavior == "death":
        import os

        os.abort()
    if behavior == "hang":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (1, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        while True:
            pass
    if behavior == "code":
        import subprocess

        subprocess.run(["true"], check=True)
    if behavior == "memory":
        return len(bytearray(8 << 30)) and 0
    if behavior == "message":
        print("error: \x1b[31m")
    return 2


@pytest.mark.parametrize("behavior", ["traceback", "wrong", "death", "hang", "code", "memory", "message", "silence"])
def test_the_harness_sees(behavior: str) -> None:
    """And goes on with the next case."""
    target = fuzz.Target(behavior, {"a.txt": b"a\nb\n"}, ["a.txt"], lambda folder: _reader(behavior, folder))
    tally, faults = fuzz.run([target], 2)
    kinds = {"memory": "traceback", "silence": "message"}
    assert Counter(fault.kind for fault in faults) == {kinds.get(behavior, behavior): 2} and not tally


def test_a_hostile_pickle_does_run_where_nothing_holds_it_back() -> None:
    """So that 0 bytes of code run says something."""
    import pickle

    def careless(folder: Path) -> int:
        pickle.loads((folder / "a.bin").read_bytes())  # noqa: S301
        return 0

    from tests.support.fuzz.mutate import hostile_pickle

    target = fuzz.Target(
        "careless", {"a.bin": b""}, ["a.bin"], careless, damage=lambda name, data, rng: hostile_pickle(rng)
    )
    _, faults = fuzz.run([target], 10)
    assert {fault.kind for fault in faults} == {"code"} and len(faults) == 10
