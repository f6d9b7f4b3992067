"""Two hosts whose own names are 127.0.1.1, as Debian installs them: network namespaces, each with a name of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import require, wait_until

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # for documentation (RFC 5737): nobody's
RANK = """
import os, torch, torch.distributed as dist
from eve_ds.engine import distributed
with distributed.joined():
    total = torch.ones(1)
    dist.all_reduce(total)
    print("sum", total.item(), "through", os.environ.get("GLOO_SOCKET_IFNAME"))
"""


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """What to put before a command so that it runs on one host or the other: they see each other, and not this one."""
    require("unshare", "nsenter", "ip")
    started, prefixes = [], []
    try:
        for number in range(2):
            hosts = tmp_path / f"hosts{number}"
            others = "".join(f"{ADDRESSES[i]} node{i}\n" for i in range(2) if i != number)
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n{others}", encoding="ascii")
            ready = tmp_path / f"ready{number}"
            script = 'hostname "$1"; mount --bind "$2" /etc/hosts; ip link set lo up; touch "$3"; exec sleep infinity'
            command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", script, "sh", f"node{number}", hosts, ready]
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            wait_until(ready.exists, f"host {number}")
            prefixes.append(["nsenter", f"--target={started[-1].pid}", "--net", "--uts", "--mount", "--"])
        first, second = (str(process.pid) for process in started)
        link = [
            "ip",
            "link",
            "add",
            "cable0",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "cable1",
            "netns",
            second,
        ]
        subprocess.run(link, check=True)
        for number, prefix in enumerate(prefixes):
            for words in (["addr", "add", f"{ADDRESSES[number]}/30"], ["link", "set", "up"]):
                subprocess.run([*prefix, "ip", *words, "dev", f"cable{number}"], check=True)
        yield prefixes
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for network namespaces")
def test_hosts_that_call_themselves_127_0_1_1_meet(repository: Path, two_hosts: list[list[str]]) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    place = {
        "PYTHONPATH": str(repository),
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    ranks = [
        subprocess.Popen(
            [*prefix, sys.executable, "-c", RANK],
            cwd=repository,
            env=kept | place | {"RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, prefix in enumerate(two_hosts)
    ]
    try:
        told = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, text in enumerate(told):
        assert f"sum 2.0 through cable{rank}" in text, text
