"""What a rank takes of its host."""

from __future__ import annotations

import socket

import pytest

from eve_ds import environment
from eve_ds.environment import compute_threads, device_ordinal, free_port, local_world_size
from preprocessing.errors import UserError

SRUN = {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("cores", "world_size", "environment", "threads"),
    [
        (8, 2, {}, 4),  # nothing is known: all ranks on this host
        (8, 16, {"LOCAL_WORLD_SIZE": "4"}, 2),  # torchrun
        (8, 16, {"LOCAL_SIZE": "4"}, 2),  # deepspeed
        (8, 16, {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 1),
        (8, 6, SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,2"}, 2),
        (8, 16, SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS_PER_NODE": "4"}, 1),
        (8, 16, SRUN | {"SLURM_NTASKS_PER_NODE": "4"}, 2),
        (8, 1, {"SLURM_NTASKS_PER_NODE": "4"}, 8),  # a batch shell in which no srun started us
        (2, 16, {"LOCAL_WORLD_SIZE": "8"}, 1),  # more ranks than cores
        (8, 2, {"OMP_NUM_THREADS": "3"}, 3),
        (8, 2, {"OMP_NUM_THREADS": "64"}, 8),  # never more than cores
        (8, 2, {"OMP_NUM_THREADS": "0"}, 1),
        (8, 2, {"OMP_NUM_THREADS": "4,2"}, 4),  # one number for each nested level
        (8, 2, {"OMP_NUM_THREADS": "many"}, 4),
    ],
)
def test_threads(cores: int, world_size: int, environment: dict[str, str], threads: int) -> None:
    assert compute_threads(cores, world_size, environment) == threads


def test_the_ranks_of_this_host_are_unknown_without_a_launcher() -> None:
    assert local_world_size({}) is None


def test_each_rank_has_its_gpu_and_a_task_that_sees_one_has_number_0() -> None:
    own = {"CUDA_VISIBLE_DEVICES": "2"}
    assert [device_ordinal(rank, 4, {}) for rank in range(4)] == [0, 1, 2, 3]
    assert [device_ordinal(rank, 1, own) for rank in range(4)] == [0, 0, 0, 0]  # --gpus-per-task=1
    with pytest.raises(UserError, match="rank 1 of this host has no GPU: 1 are visible"):
        device_ordinal(1, 1, {})  # two ranks on a host with one GPU
    with pytest.raises(UserError, match="rank 4 of this host has no GPU: 4 are visible"):
        device_ordinal(4, 4, {})


def test_a_free_port_is_none_that_the_kernel_gives_to_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("", first := free_port()))
        assert first < 20000
        monkeypatch.setattr(environment, "PORTS", [first])
        with pytest.raises(UserError, match=f"no port from {first} to {first} is free; set MASTER_ADDR"):
            free_port()
        monkeypatch.undo()
        second = free_port()
        monkeypatch.setattr(environment, "PORTS", [first, second])
        assert [free_port() for _ in range(4)] == [second] * 4
        free.bind(("", second))
