"""A real two-node Slurm on this machine: two slurmd under one host name, each with a port of its own.

Nothing outside a temporary folder is touched, and no system service is used.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.cluster.processes import require, run, stop_processes, system_program, wait_until
from tests.support.ports import free_ports

CONFIG = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
TmpFS={folder}/tmp.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=30
PropagateResourceLimits=NONE
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@contextlib.contextmanager
def two_node_slurm() -> Iterator[dict[str, str]]:
    """Start the cluster and give the variables that a Slurm command needs; stop it and all its jobs at the end."""
    require("sbatch", "srun", "munged")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:  # short: it holds Unix sockets
        folder = Path(name)
        environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            _configure(folder)
            for command in _commands(folder):
                daemons.append(_start(command, folder, environment))
                if command[0].endswith("munged"):
                    wait_until((folder / "munge" / "socket").exists, f"munged\n{_logs(folder)}")
            wait_until(lambda: _idle_nodes(environment) == 2, f"two idle nodes\n{_logs(folder)}")
            yield environment
        finally:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(
                    ["scancel", "--user", getpass.getuser()], env=os.environ | environment, timeout=20, check=False
                )
            stop_processes(folder)
            for daemon in daemons:
                daemon.wait()


def submit(job: Sequence[str | Path], environment: Mapping[str, str], cwd: Path) -> str:
    """Submit ``job`` (what follows ``sbatch`` on the command line) and return its number."""
    return run(["sbatch", "--parsable", *job], environment, cwd).strip()


def ended(number: str, environment: Mapping[str, str], cwd: Path, seconds: float = 240) -> str:
    """Wait for the job's end and return its last state, as in COMPLETED. (``sbatch --wait`` looks too seldom.)"""
    over = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
    state = ""

    def is_over() -> bool:
        nonlocal state
        state = job_field(number, "JobState", environment)
        return state in over

    wait_until(is_over, f"the end of job {number}", seconds)
    return state


def job_field(number: str, name: str, environment: Mapping[str, str]) -> str:
    """A field of a job as ``scontrol show job`` has it."""
    told = run(["scontrol", "show", "job", number], environment, Path.cwd())
    return told.partition(f" {name}=")[2].split()[0]


def _configure(folder: Path) -> None:
    for sub in ("munge", "state", "spool.n1", "spool.n2", "tmp.n1", "tmp.n2"):
        (folder / sub).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(folder=folder, host=host, user=getpass.getuser(), ports=free_ports(3))
    (folder / "slurm.conf").write_text(text, encoding="utf-8")


def _commands(folder: Path) -> list[list[str]]:
    munge = folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    config = str(folder / "slurm.conf")
    slurmd = system_program("slurmd")
    return [
        [system_program("munged"), "--foreground", "--force", *options],
        [system_program("slurmctld"), "-D", "-c", "-i", "-f", config],
        [slurmd, "-D", "-c", "-N", "n1", "-f", config],
        [slurmd, "-D", "-c", "-N", "n2", "-f", config],
    ]


def _start(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / "daemons.log", "ab") as log:
        return subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
        )


def _idle_nodes(environment: dict[str, str]) -> int:
    query = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
    result = subprocess.run(
        query, env=os.environ | environment, capture_output=True, text=True, timeout=20, check=False
    )
    return sum(line.endswith(" idle") for line in set(result.stdout.splitlines()))  # a line a partition


def _logs(folder: Path) -> str:
    return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*.log")))
