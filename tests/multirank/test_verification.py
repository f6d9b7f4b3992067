"""`data.verify: full` by two ranks: work shared on one host, and every host's own files read on that host."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from eve_ds.data import hashing_process
from eve_ds.data.shards import Shard, Split
from eve_ds.engine import verification
from preprocessing.errors import UserError
from tests.support.distributed import run_distributed_test
from tests.support.shards import make_caption_set


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def verify(folders: list[str], hosts: list[str], expected: str, reads: list[int]) -> None:
    """As on hosts of these names, which see these folders under one name."""
    rank = dist.get_rank()
    shards = [
        Shard(Path(folders[rank]) / shard.path.name, shard.bytes, shard.rows, shard.samples, shard.sha256)
        for shard in Split(Path(folders[0]) / "../whole/train").hashed_shards
    ]
    with (
        mock.patch.object(verification, "host", return_value=hosts[rank]),
        mock.patch.object(hashing_process, "check", wraps=hashing_process.check) as check,
    ):
        if expected:
            with pytest.raises(UserError, match=expected):
                verification.verify_now(shards)
        else:
            verification.verify_now(shards)
    assert check.call_count == reads[rank]


def verify_all(cases: list[tuple[list[str], list[str], str, list[int]]]) -> None:
    for case in cases:
        verify(*case)


def test_each_file_is_read_once_and_a_host_s_own_copy_is_read_there(tmp_path: Path) -> None:
    whole = make_caption_set(tmp_path / "whole", 9, shard_rows=3)
    for name in ("a", "b", "c"):
        shutil.copytree(whole, tmp_path / name)
    flip(tmp_path / "c/shard-00000.arrow")  # which rank 0 reads first: on the other host
    one, own, rotten = ([str(tmp_path / name) for name in pair] for pair in ("aa", "ab", "ac"))
    told = "c/shard-00000.arrow: its SHA-256 is not the manifest's"
    cases = [(one, ["h", "h"], "", [2, 1]), (one, ["h", "i"], "", [2, 1]), (own, ["h", "i"], "", [3, 3])]
    run_distributed_test(verify_all, 2, args=([*cases, (rotten, ["h", "i"], told, [3, 3])],))
