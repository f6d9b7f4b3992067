"""The batch scripts on a real two-node Slurm, as clusters use them: preemption, requeue, arrays, other folders."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.processes import run, wait_until
from tests.cluster.runs import TinyRun
from tests.cluster.slurm import ended, job_field, submit

STEPS = 150  # long enough to be stopped twice by a Slurm that looks once a second


@pytest.fixture
def elsewhere(environment: Mapping[str, str], slurm: dict[str, str]) -> dict[str, str]:
    """The environment of someone who submits; MASTER_ADDR and MASTER_PORT are the batch scripts' own."""
    return {name: value for name, value in environment.items() if not name.startswith("MASTER_")} | slurm


def steps_done(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def absolute(arguments: list[str], repository: Path) -> list[str]:
    """Recipes as someone names them who is not in the checkout."""
    return [re.sub(r"=(tests|ds_configs)/", rf"={repository}/\1/", argument) for argument in arguments]


@pytest.mark.timeout(900)
def test_a_job_that_is_preempted_and_reaches_its_time_limit_ends_as_if_undisturbed(
    repository: Path, tiny_run: TinyRun, environment: Mapping[str, str], elsewhere: dict[str, str], tmp_path: Path
) -> None:
    long = [f"--optimizer.total_steps={STEPS}", "--checkpoint.export=true"]
    undisturbed, output, log = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "job.log"
    scripts = repository / "launch" / "slurm"
    job = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--output={log}"]
    # Nothing else, as --export=NONE does. With other threads sums would be in another order.
    job += [f"--export=EVE_DS_PYTHON={elsewhere['EVE_DS_PYTHON']},OMP_NUM_THREADS=1"]
    arguments = absolute(tiny_run.arguments(output), repository)
    number = submit([*job, scripts / "pretrain.sbatch", *arguments, *long], elsewhere, tmp_path)

    def runs_again(times: int) -> bool:
        """Whether the job has been queued so often and runs."""
        restarts, state = (job_field(number, name, elsewhere) for name in ("Restarts", "JobState"))
        if (restarts, state) == (str(times), "PENDING"):  # spare it the two minutes that Slurm lets a requeued job wait
            time.sleep(3)  # a start within a second of the requeue is refused: the nodes still revoke the job
            start = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
            subprocess.run(start, env=elsewhere, capture_output=True, check=False)  # it may have begun meanwhile
        return restarts == str(times) and state in ("RUNNING", "COMPLETED")

    wait_until(lambda: steps_done(output) > 1, f"the first training steps of {log}", seconds=120)
    assert "NumCPUs=4 NumTasks=2 CPUs/Task=2" in run(["scontrol", "show", "job", number], elsewhere, tmp_path)
    assert "CPUs=4" in run(["scontrol", "show", "step", f"{number}.0"], elsewhere, tmp_path), "srun has them, too"
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path / 'urgent.log'}", "--wrap=true"]
    urgent_job = submit(urgent, elsewhere, tmp_path)
    assert ended(urgent_job, elsewhere, tmp_path) == "COMPLETED"
    reached = steps_done(output)
    wait_until(lambda: runs_again(1), f"the first restart of {log}", seconds=120)
    wait_until(lambda: steps_done(output) > reached, f"steps after {reached} of {log}", seconds=120)
    run(["scancel", "--signal=USR1", number], elsewhere, tmp_path)  # what --signal=USR1@120 sends before the time limit
    wait_until(lambda: runs_again(2), f"the second restart of {log}", seconds=120)
    assert ended(number, elsewhere, tmp_path, seconds=500) == "COMPLETED", log.read_text()

    text = log.read_text()
    assert text.count("2 ranks on n[1-2], meeting at") == 3, text
    assert "queued again (1 of at most 100 times)" in text and "queued again (2 of at most 100 times)" in text
    launcher = [elsewhere["EVE_DS_PYTHON"], "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    launcher += [f"--master_port={environment['MASTER_PORT']}", "--module", "eve_ds.pretrain"]
    run([*launcher, *tiny_run.arguments(undisturbed), *long], {**environment, "OMP_NUM_THREADS": "1"}, repository, 500)
    weights = Path("model") / "model.safetensors"
    assert (output / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_a_mistake_is_not_queued_again(repository: Path, elsewhere: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}", "launch/slurm/finetune.sbatch", "--task=no-such-task"]
    number = submit(job, elsewhere, repository)
    assert ended(number, elsewhere, repository) == "FAILED"
    assert "no-such-task" in log.read_text()
    assert job_field(number, "Restarts", elsewhere) == "0"
    # srun tells the highest code: 2, or 143 where it ended a rank that had not come as far as the mistake.
    assert job_field(number, "ExitCode", elsewhere) in ("2:0", "143:0")


def test_the_runs_of_an_array_have_folders_of_their_own(
    repository: Path, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    job = ["--array=3,5", "--ntasks=1", f"--output={tmp_path}/%a.log"]
    script = repository / "launch" / "slurm" / "pretrain.sbatch"
    given = ["--output_dir", "runs/a b", "--engine.seed=%a", "--data.tokenizer", "$(touch run)%a", "--print_config"]
    number = submit([*job, script, *given], elsewhere, tmp_path)
    for task in (3, 5):
        assert ended(f"{number}_{task}", elsewhere, tmp_path) == "COMPLETED", (tmp_path / f"{task}.log").read_text()
        told = (tmp_path / f"{task}.log").read_text()
        for line in (f"output_dir: runs/a b/{task}\n", f"seed: {task}\n", f"tokenizer: $(touch run){task}\n"):
            assert line in told, told
    assert not (tmp_path / "run").exists()


def test_a_script_outside_a_checkout_says_what_to_set(
    repository: Path, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    copied, log = tmp_path / "mine.sbatch", tmp_path / "job.log"
    copied.write_bytes((repository / "launch" / "slurm" / "pretrain.sbatch").read_bytes())
    number = submit([f"--output={log}", copied], elsewhere, tmp_path)
    assert ended(number, elsewhere, tmp_path) == "FAILED"
    assert "is no checkout of EVE-DS; set EVE_DS_HOME to it" in log.read_text()
