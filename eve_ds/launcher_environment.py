"""What the launcher of this process set in its environment. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # torchrun's and deepspeed's, mpirun's, srun's


def launcher_values(names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The values of those variables of ``names`` that a launcher set for this process, in the same order.

    Slurm also sets its variables in a batch script, which srun did not start. Only with SLURM_STEP_ID do they count.
    """
    in_step = "SLURM_STEP_ID" in environment
    return [environment[name] for name in names if name in environment and (in_step or not name.startswith("SLURM_"))]


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 if it was started by hand."""
    return int(next(iter(launcher_values(RANK, os.environ)), 0))
