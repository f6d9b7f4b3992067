"""Ranks that see different folders: rank 0 decides for all, and a folder that is not shared is refused by all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.distributed import run_distributed_test


def mine() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def told_by(function: object, *arguments: object) -> Exception:
    """What a call on this rank raises."""
    with pytest.raises(ValueError) as raised:
        function(*arguments)  # type: ignore[operator]
    return raised.value


def decisions(root: Path) -> None:
    from eve_ds.engine import distributed
    from eve_ds.engine.checkpoint_record import DamagedError
    from eve_ds.errors import RankError
    from preprocessing.errors import UserError

    def refuse(error: Exception) -> None:
        raise error

    assert distributed.decide(lambda: f"of rank {mine()}") == "of rank 0"
    damaged = told_by(distributed.decide, lambda: refuse(DamagedError(root, "a file")))
    assert isinstance(damaged, DamagedError) and (damaged.path, damaged.what) == (root, "a file")
    assert type(told_by(distributed.decide, lambda: refuse(RankError("x")))) is (UserError if mine() else RankError)
    distributed.agree(None)
    assert str(told_by(distributed.agree, "the disk of rank 1" if mine() else None)) == "the disk of rank 1"


def late(root: Path) -> None:
    from eve_ds.engine import distributed

    seen = [0, 1, 2, 3] if mine() else [3] * 4  # rank 1's metadata is slow
    assert distributed.same_view(lambda: seen.pop(0), "it") == 3 and not seen


def folders(root: Path) -> None:
    """One folder for both, then another for each, as on disks of their own."""
    from eve_ds.engine import distributed

    (root / ".seen-before").touch()  # by a start that was killed
    distributed.prove_shared(root, "--output_dir")
    distributed.agree(None)
    assert not list(root.iterdir())
    distributed.agree(None)
    distributed.PATIENCE_SECONDS = 0.5
    own = root / f"host{mine()}"
    own.mkdir()
    refused = str(told_by(distributed.prove_shared, own, "--output_dir X"))
    assert refused.startswith("--output_dir X: rank 1 on host ") and "does not see there what rank 0 on host" in refused
    distributed.agree(None)
    assert not list(own.iterdir())


def claims(root: Path) -> None:
    """A start and a resume where rank 1 sees another folder by the same name: refused, and nothing is left in it."""
    import dataclasses

    import yaml

    from eve_ds.config import PretrainConfig
    from eve_ds.engine import deepspeed_config, distributed, run_folder
    from eve_ds.engine.identity import Identity, Input

    distributed.PATIENCE_SECONDS = 0.5
    own = root / f"own{mine()}"
    config = PretrainConfig(output_dir=str(own))
    identity = Identity.from_config(dataclasses.asdict(config))
    assert "all ranks need one folder" in str(told_by(run_folder.claim, config, identity))
    assert not own.exists() or {path.name for path in own.iterdir()} == {run_folder.LOCK}

    data = Input("/data/train", "0" * 64 if mine() else "1" * 64)  # a copy on each host, one of them old
    refused = str(told_by(run_folder.claim, config, Identity(identity.settings, {"training data": data})))
    assert refused.startswith("rank 1 on host ") and "reads other things than rank 0: training data is" in refused

    if mine() == 0:  # the run is there, but rank 1 does not see it yet
        (own / "config.yaml").write_text(yaml.safe_dump({"engine": {"precision": "bf16"}}))
        (own / "metrics.jsonl").write_text("")
    deepspeed_config.multiplies_bf16 = lambda device: False
    deepspeed_config.settle_precision(config, mine())
    assert config.engine.precision == "bf16"


@pytest.mark.parametrize("check", [decisions, late, folders, claims], ids=lambda check: check.__name__)
def test_two_ranks(check: object, tmp_path: Path) -> None:
    run_distributed_test(check, 2, args=(tmp_path,))  # type: ignore[arg-type]
