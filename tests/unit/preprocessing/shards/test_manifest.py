import json
from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.local_files import dump_json, write_atomic
from preprocessing.shards.schema import MANIFEST, read_manifest

GOOD = {
    "schema_version": 1,
    "kind": "caption",
    "split": "train",
    "rows": 1,
    "samples": 2,
    "shards": [{"file": "shard-00000.arrow", "rows": 1, "samples": 2, "bytes": 3, "sha256": "0"}],
    "dropped": {},
}


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_atomic(tmp_path / MANIFEST, dump_json(GOOD))
    assert read_manifest(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{\n 3", "line 2 column 2"),
        ("[]", "schema_version None"),
        ("[" * 100_000, "invalid JSON (nested too deep"),
        (json.dumps(GOOD | {"schema_version": 9}), "schema_version 9"),
        (json.dumps(GOOD | {"kind": "sound"}), "'sound'"),
        (json.dumps(GOOD | {"rows": "1"}), "field rows"),
        (json.dumps(GOOD | {"shards": [{"file": "x"}]}), "field shards[0].rows"),
    ],
)
def test_bad_manifest_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path)
    assert said in str(error.value) and str(tmp_path / MANIFEST) in str(error.value) and "\n" not in str(error.value)


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prepared split folder"):
        read_manifest(tmp_path / "nowhere")
