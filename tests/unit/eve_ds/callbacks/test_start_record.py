"""What a start records of the software and the machine."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from eve_ds.callbacks import start_record
from eve_ds.engine import run_folder
from eve_ds.weights.model_folder import starts


def test_versions_are_those_that_are_imported() -> None:
    found = start_record.versions()
    for name in ("torch", "deepspeed", "numpy", "pyarrow", "tokenizers", "pyyaml", "eve-ds"):
        try:
            expected = metadata.version(name)
        except metadata.PackageNotFoundError:  # eve-ds, where the code runs from a checkout
            assert name == "eve-ds" and name not in found
        else:
            assert found[name] == expected


def test_of_a_package_that_is_there_twice_the_one_that_is_imported_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/my_pack-1.dist-info", "b/My.Pack-2.dist-info", "b/other-3.egg-info", "b/editable.egg-info"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert start_record.versions().keys() == {"python", "my-pack", "other"}
    assert start_record.versions().items() >= {("my-pack", "1"), ("other", "3")}


def test_a_record_tells_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "s3://me:sEcReT@bucket/data"
    monkeypatch.setattr(start_record, "code", lambda root: {})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "eve_ds.pretrain", f"--data.path={address}"])
    for name in ("RANK_OF_KEYS", "MY_NCCL_KEY", "SLURM_JWT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "sEcReT")
    tree = dataclasses.make_dataclass("Tree", ["data", "engine"])
    trainer = SimpleNamespace(
        config=tree({"path": address, "all": [address, 0.5, None], "file": Path("x")}, {"seed": 3}),
        engine=SimpleNamespace(config={"nvme_path": address}),
        identity=SimpleNamespace(tree=lambda: {"inputs": {}}),
        topology=tree(1, 2),
        start_step=4,
        total_steps=9,
    )
    found = start_record.start_record(trainer, [])  # type: ignore[arg-type]
    assert "sEcReT" not in json.dumps(found)
    assert found["command"].endswith("--data.path=s3://***@bucket/data")
    assert found["variables"]["WORLD_SIZE"] == "2" and found["seeds"] == {"engine": 3}
    safe = "s3://***@bucket/data"
    assert found["config"]["data"] == {"path": safe, "all": [safe, 0.5, None], "file": "x"}


def test_each_start_has_a_file_of_its_own_and_makes_no_run_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    for number in (1, 2):
        path = start_record.next_file(tmp_path)
        assert path == tmp_path / "provenance" / f"start_{number:04d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(number))
    assert not run_folder.holds_run(tmp_path)  # its start failed before the first step
    (tmp_path / "provenance" / "start_10000.json").write_text("")
    (tmp_path / "provenance" / "start_of_mine.json").write_text("")
    assert [path.stem for path in starts(tmp_path)] == ["start_0001", "start_0002", "start_10000"]
    assert start_record.next_file(tmp_path).stem == "start_10001"
