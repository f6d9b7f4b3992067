"""Two ssh hosts on this machine: 127.0.0.1 and 127.0.0.2 behind one sshd with keys of its own, for pdsh and mpirun."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.processes import require, stop_processes, system_program, wait_until
from tests.support.ports import free_ports

HOSTS = ("127.0.0.1", "127.0.0.2")
PRIVILEGE_SEPARATION = Path("/run/sshd")  # sshd, started as root, wants this empty folder

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
AllowUsers {user}
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PrintMotd no
"""


@dataclass(frozen=True)
class SshHosts:
    """Args:
    hostfile: DeepSpeed's, one slot a host.
    options: for ssh: port, key, no questions asked.
    environment: for the launcher: ssh options for pdsh, and the file of variables that the remote ranks get.
    """

    hostfile: Path
    options: list[str]
    environment: dict[str, str]


@contextlib.contextmanager
def two_ssh_hosts() -> Iterator[SshHosts]:
    """Start sshd; stop it and everything that was started through it at the end."""
    require("ssh", "ssh-keygen", "pdsh")
    sshd = system_program("sshd")
    with tempfile.TemporaryDirectory(prefix="ssh-", dir="/tmp") as name, _privilege_separation_folder():
        folder = Path(name)
        port = free_ports(1)[0]
        hosts = _configure(folder, port)
        with open(folder / "sshd.log", "wb") as log:
            daemon = subprocess.Popen(
                [sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_until(lambda: all(_answers(host, port) for host in HOSTS), f"sshd\n{_log(folder)}")
            yield hosts
        finally:
            stop_processes(folder)  # ranks: no signal reaches them when the ssh that started them ends
            daemon.terminate()
            daemon.wait()


def _configure(folder: Path, port: int) -> SshHosts:
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (folder / "sshd_config").write_text(
        CONFIG.format(port=port, folder=folder, user=getpass.getuser()), encoding="utf-8"
    )
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS), encoding="utf-8")
    # What the remote ranks get, and by the folder's name stop_processes knows them. The launcher reads nothing else.
    variables = {
        "OMP_NUM_THREADS": "1",
        "EVE_DS_TEST_FOLDER": str(folder),
    }
    (folder / "deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()), encoding="utf-8")
    options = ["-p", str(port), "-i", str(folder / "user_key"), "-F", "none"]
    for option in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"):
        options += ["-o", option]
    environment = {
        "HOSTFILE": str(hostfile),
        "PDSH_SSH_ARGS_APPEND": " ".join(options),
        "DS_ENV_FILE": str(folder / "deepspeed_env"),
        "EVE_DS_PYTHON": sys.executable,
        "DEEPSPEED_ARGS": "--no_ssh_check",  # that check knows no key of ours
        "EVE_DS_TEST_FOLDER": str(folder),
    }
    return SshHosts(hostfile, options, environment)


@contextlib.contextmanager
def _privilege_separation_folder() -> Iterator[None]:
    made = os.geteuid() == 0 and not PRIVILEGE_SEPARATION.exists()
    if made:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            PRIVILEGE_SEPARATION.rmdir()


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _log(folder: Path) -> str:
    return (folder / "sshd.log").read_text(encoding="utf-8", errors="replace")
