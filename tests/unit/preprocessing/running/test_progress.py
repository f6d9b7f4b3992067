import io
import re

import pytest

from preprocessing.running import progress
from preprocessing.running.progress import Progress


def test_rate_and_time_left_leave_out_what_an_earlier_run_did() -> None:
    with Progress("caption train", 1000) as counter:
        counter.skip(400)
        counter.add(100)
        assert counter.state(5.0) == "500 of 1000 rows, 20.0 a second, 25 s left"


def test_nothing_done_yet_is_no_division_by_zero() -> None:
    with Progress("verify", 3, "shard") as counter:
        assert counter.state(0.0) == "0 of 3 shards, 0.0 a second, time left unknown"


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("caption train", 10) as counter:
        counter.add(1)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "_SECONDS", 0.0)
        counter.add(1)
    assert re.fullmatch(r"caption train: 2 of 10 rows, [\d.]+ a second, \d+ s left\n", capsys.readouterr().err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress("caption train", 10) as counter:
        counter.skip(4)
        counter.add(6)
        counter.say("a word")
        import sys

        shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "caption train: 100%" in shown and "10/10" in shown and "caption train: a word\n" in shown
