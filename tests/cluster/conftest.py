"""The clusters, the run, and a check that nothing is left on the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cluster.processes import run
from tests.cluster.runs import TinyRun
from tests.cluster.slurm import two_node_slurm
from tests.cluster.ssh import SshHosts, two_ssh_hosts
from tests.support.ports import free_ports
from tests.support.shards import make_caption_set, tiny_tokenizer

SHARED_MEMORY = Path("/dev/shm")
LAUNCHER_PREFIXES = ("SLURM", "OMPI", "PMIX", "MASTER_", "HOSTFILE")


@pytest.fixture(autouse=True)
def shared_memory_as_found() -> Iterator[None]:
    """A run leaves nothing in /dev/shm."""
    before = set(SHARED_MEMORY.iterdir())
    yield
    assert set(SHARED_MEMORY.iterdir()) - before == set()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    make_caption_set(folder / "data", rows=16)
    make_caption_set(folder / "data", rows=8, split="val")
    tiny_tokenizer(folder / "tokenizer")
    return TinyRun(folder / "data", folder / "tokenizer")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What the launchers start with: this Python, and nothing that another launcher has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    return kept | {"EVE_DS_PYTHON": sys.executable, "MASTER_PORT": str(free_ports(1)[0])}


@pytest.fixture(scope="session")
def local(
    repository: Path, tiny_run: TinyRun, environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output folder of the same run on this machine alone, two ranks: what the others are compared with."""
    output = tmp_path_factory.mktemp("local") / "run"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    port = f"--master_port={environment['MASTER_PORT']}"
    run([*launcher, port, "--module", "eve_ds.pretrain", *tiny_run.arguments(output)], environment, repository)
    return output


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Variables of a running two-node Slurm."""
    with two_node_slurm() as variables:
        yield variables


@pytest.fixture(scope="module")
def ssh_hosts() -> Iterator[SshHosts]:
    with two_ssh_hosts() as hosts:
        yield hosts
