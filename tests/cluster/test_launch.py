"""Every way of docs/launching.md, run for real: two ranks, and the losses of the local run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.cluster.processes import require, run
from tests.cluster.runs import TinyRun, losses
from tests.cluster.slurm import ended, submit
from tests.cluster.ssh import SshHosts

TOLERANCE = 1e-6
# Rank 1 fails while rank 0 is at something that knows nothing of it.
FAILING_RANK = """
import os, sys, time
from eve_ds.engine import distributed
from eve_ds.errors import RankError, run_command

def main():
    with distributed.joined():
        if distributed.launched_world()[0] == 1:
            raise {"mistake": RankError("rank 1: a mistake"), "defect": KeyError("a defect")}[sys.argv[1]]
        time.sleep(600)

run_command(main)
"""


def without_meeting_place(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("MASTER_")}


def assert_same_losses(output: Path, local: Path) -> None:
    for here, there in zip(losses(output), losses(local), strict=True):
        assert here == pytest.approx(there, abs=TOLERANCE)
        assert here["loss"] > 0


def test_slurm(
    repository: Path,
    tiny_run: TinyRun,
    environment: Mapping[str, str],
    local: Path,
    slurm: dict[str, str],
    tmp_path: Path,
) -> None:
    output, log = tmp_path / "run", tmp_path / "job.log"
    job = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}", "launch/slurm/pretrain.sbatch"]
    ours = without_meeting_place(environment) | slurm
    state = ended(submit([*job, *tiny_run.arguments(output)], ours, repository), ours, repository)
    assert state == "COMPLETED", log.read_text()
    assert "2 ranks on n[1-2], meeting at 127.0.0.1:2" in log.read_text()
    assert_same_losses(output, local)


def test_deepspeed_over_two_ssh_hosts(
    repository: Path,
    tiny_run: TinyRun,
    environment: Mapping[str, str],
    local: Path,
    ssh_hosts: SshHosts,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    told = run(
        ["launch/deepspeed/pretrain.sh", *tiny_run.arguments(output)], environment | ssh_hosts.environment, repository
    )
    assert "127.0.0.1: " in told and "127.0.0.2: " in told, "both hosts had a part"
    assert_same_losses(output, local)


def test_deepspeed_names_a_missing_hostfile(repository: Path, environment: Mapping[str, str]) -> None:
    with pytest.raises(AssertionError, match=r"exit code 2\nerror: hostfile /nowhere is not there"):
        run(["launch/deepspeed/pretrain.sh"], environment | {"HOSTFILE": "/nowhere"}, repository)


@pytest.mark.parametrize("meeting_place", ["given", "told through MPI"])
def test_mpirun(
    repository: Path, tiny_run: TinyRun, environment: Mapping[str, str], local: Path, tmp_path: Path, meeting_place: str
) -> None:
    require("mpirun")
    output = tmp_path / "run"
    ours = without_meeting_place(environment) | {"RANKS": "2", "MPIRUN_ARGS": "--allow-run-as-root --oversubscribe"}
    if meeting_place == "given":
        ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": environment["MASTER_PORT"]}
    run(["launch/mpi/pretrain.sh", *tiny_run.arguments(output)], ours, repository)
    assert_same_losses(output, local)


@pytest.mark.parametrize(("what", "code", "words"), [("mistake", 2, "error: rank 1: a mi"), ("defect", 1, "KeyError")])
def test_mpirun_ends_all_when_a_rank_fails(
    repository: Path, environment: Mapping[str, str], what: str, code: int, words: str
) -> None:
    require("mpirun")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", FAILING_RANK, what]
    ended = subprocess.run(
        command, env=without_meeting_place(environment), cwd=repository, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == code and words in ended.stderr, ended.stderr


def test_torchrun(
    repository: Path, tiny_run: TinyRun, environment: Mapping[str, str], local: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    place = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{environment['MASTER_PORT']}"]
    run([*torchrun, *place, "--module", "eve_ds.pretrain", *tiny_run.arguments(output)], environment, repository)
    assert_same_losses(output, local)


def test_deepspeed_over_ssh_passes_words_on_as_they_are(
    repository: Path, environment: Mapping[str, str], ssh_hosts: SshHosts, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    words = {
        "output_dir": f"$(touch {ran})`touch {ran}` 'a'  \"b\" \\c %h $HOME",
        "init_from": f"$(touch${{IFS}}{ran})it's;%h\"$HOME\\",
        "deepspeed_config": "",
    }
    arguments = [word for option, value in words.items() for word in (f"--{option}", value)]
    started = environment | ssh_hosts.environment
    told = run(["launch/deepspeed/pretrain.sh", *arguments, "--print_config"], started, repository)
    config = yaml.safe_load("\n".join(re.findall(r"^127.0.0.2: (?!\[)(.*)$", told, re.MULTILINE)))
    assert {option: config[option] for option in words} == words
    assert not ran.exists()


def test_deepspeed_is_not_started_where_the_hosts_would_run_a_folder_or_a_variable(
    repository: Path, environment: Mapping[str, str], ssh_hosts: SshHosts, tmp_path: Path
) -> None:
    checkout = tmp_path / "$(touch ran)"
    checkout.symlink_to(repository)
    started = environment | ssh_hosts.environment
    (tmp_path / "launch").symlink_to(repository / "launch")
    with pytest.raises(AssertionError, match=r"exit code 2\nerror: \$PYTHONWARNINGS: "):
        run(["launch/deepspeed/pretrain.sh"], started | {"PYTHONWARNINGS": "$(touch ran)"}, repository)
    with pytest.raises(AssertionError, match=r"exit code 2\nerror: .*cannot be started from a folder with such a name"):
        run([checkout / "launch/deepspeed/pretrain.sh"], started, tmp_path)
