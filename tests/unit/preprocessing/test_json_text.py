import json

import pytest

from preprocessing.local_files import parse_json


@pytest.mark.parametrize("kind", [str, bytes])
def test_halves_of_pairs_are_replaced(kind: type) -> None:
    text = '{"caption": ["bad \\ud83d end", "whole \\ud83d\\ude00", "caf\\u00e9"], "\\udc00": 1.5, "plain": null}'
    found = parse_json(text if kind is str else text.encode())
    assert found == {"caption": ["bad \ufffd end", "whole \U0001f600", "café"], "\ufffd": 1.5, "plain": None}
    json.dumps(found, ensure_ascii=False).encode()


def test_raw_halves_in_bytes_too() -> None:
    assert parse_json(b'["\xed\xa0\xbd"]') == ["\ufffd"]


def test_what_is_no_json_is_reported_as_json_does() -> None:
    for bad in ("{", b"\xff"):
        with pytest.raises(ValueError):
            parse_json(bad)
