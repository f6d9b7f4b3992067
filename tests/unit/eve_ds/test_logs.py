from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from eve_ds import errors
from tests.support.console import logging_restored


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with logging_restored():
        yield


@pytest.mark.parametrize(
    ("rank", "err", "out"),
    [
        (0, ["a step", "WARNING: a\\x1b[2J row", "ERROR: a fault"], ["a result"]),
        (3, ["WARNING: [rank 3] a\\x1b[2J row", "ERROR: [rank 3] a fault"], []),
    ],
)
def test_rank_0_speaks_and_others_name_themselves(
    rank: int, err: list[str], out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # set up twice, told once
        errors.setup_logging(rank)
    log = logging.getLogger("eve_ds.engine.trainer")
    log.debug("a detail")
    log.info("a %s", "step")
    log.warning("a\x1b[2J row")
    log.error("a fault")
    logging.getLogger(errors.OUTPUT).info("a result")
    told = capsys.readouterr()
    assert (told.err.splitlines(), told.out.splitlines()) == (err, out)


def test_a_traceback_follows_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    errors.setup_logging(0)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("eve_ds.mine").exception("what")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ERROR: what" and lines[-1] == "ValueError: why"


def test_other_loggers_stay_as_they_are() -> None:
    before = [list(logging.getLogger(name).handlers) for name in (None, "DeepSpeed")]
    errors.setup_logging(0)
    assert [list(logging.getLogger(name).handlers) for name in (None, "DeepSpeed")] == before
