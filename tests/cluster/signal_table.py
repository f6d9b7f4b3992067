"""What a signal does through each launcher, observed; docs/signals.md holds the table, test_signals.py compares.

python -m tests.cluster.signal_table [WORDS]     prints those lines of the table that hold all WORDS as found now
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.processes import processes_of, ranks_of, require, stop_processes, wait_until
from tests.cluster.runs import TinyRun
from tests.cluster.slurm import two_node_slurm
from tests.support.ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "signals.md"
SIGNALS = ("TERM", "INT", "HUP", "USR1", "KILL")
MOMENTS = {"evaluation": ["--logging.eval_every=1"], "saving": ["--checkpoint.every=1", "--checkpoint.keep=2"]}
PYTHON = [sys.executable, "-u", "-m"]
RANKS = 2
LAUNCHERS = {
    "deepspeed": [*PYTHON, "deepspeed.launcher.runner", "--num_gpus=2", "--master_port={port}", "--module"],
    "torchrun": [*PYTHON, "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}", "--module"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", *PYTHON],
    "srun": ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", *PYTHON],
}


@dataclass(frozen=True)
class Line:
    """A line of the table: a launcher ("guard, X" is X under eve_ds.launching), who gets the signal, and when."""

    launcher: str
    target: str
    moment: str

    def command(self, port: int) -> list[str]:
        guard, _, name = self.launcher.rpartition(", ")
        words = [word.format(port=port) for word in LAUNCHERS[name]] if name in LAUNCHERS else PYTHON
        return [*([*PYTHON, "eve_ds.launching"] if guard else []), *words, "eve_ds.pretrain"]

    @property
    def ranks(self) -> int:
        return 1 if self.launcher == "python" else RANKS


def observe(line: Line, name: str, run: TinyRun, environment: Mapping[str, str], folder: Path) -> str:
    """Start a run, send the signal, wait for its end; returns a cell of the table, as in "saved, 75"."""
    require(*{"mpirun", "srun"} & set(line.command(0)))
    number = getattr(signal, f"SIG{name}")
    output, marker, port = folder / "run", folder / "marker", free_ports(1)[0]
    options = ["--optimizer.total_steps=1000000", "--checkpoint.every=0", *MOMENTS.get(line.moment, [])]
    options += ["--engine.expert_parallel_size=1"] if line.ranks == 1 else []
    place = {"OMPI_MCA_odls_base_sigkill_timeout": "10"}  # as in launch/mpi/pretrain.sh
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if "srun" in line.launcher else {}
    ours = {key: value for key, value in environment.items() if not key.startswith("MASTER_")} | place
    with (folder / "log").open("wb") as log:
        started = subprocess.Popen(
            [*line.command(port), *run.arguments(output), *options],
            env=ours | {"EVE_DS_TEST_FOLDER": str(marker), "OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_default_handlers,
        )
    try:
        wait_until(lambda: started.poll() is not None or _is_at(line, marker, output), str(line), seconds=180)
        assert started.poll() is None, (folder / "log").read_text()
        if line.target == "group":
            os.killpg(started.pid, number)
        else:
            os.kill(started.pid if line.target == "launcher" else max(ranks_of(marker)), number)
        try:
            code = started.wait(timeout=120)
        except subprocess.TimeoutExpired:
            return "trains on"
        with contextlib.suppress(AssertionError):  # those who are left, save and end; or train on
            wait_until(lambda: not processes_of(marker), "the end of all", seconds=60)
        left = f", {len(processes_of(marker))} processes left" if processes_of(marker) else ""
    finally:
        stop_processes(marker)
        started.wait()
    what = "saved" if _saved_on_request(line, (folder / "log").read_text(), output) else "ended at once"
    return f"{what}, {code if code >= 0 else 128 - code}{left}"


def _default_handlers() -> None:
    """In the child: a shell's "&" and nohup have INT and HUP ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _saved_on_request(line: Line, log: str, output: Path) -> bool:
    """Whether there is a checkpoint; where steps are saved anyway, whether it is of the step at which the run stopped.

    (A run whose launcher was killed may have nobody left who prints what it says.)
    """
    step = re.search(r"step (\d+)/\d+  stopped early", log)
    tag = "*" if line.moment != "saving" else f"step_{int(step[1]):08d}" if step else "none"
    return any(output.glob(f"checkpoints/{tag}/complete.json"))


def _is_at(line: Line, marker: Path, output: Path) -> bool:
    if line.moment == "start-up":
        return len(ranks_of(marker)) == line.ranks
    metrics = output / "metrics.jsonl"
    return metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") > 3


def table() -> dict[tuple[Line, str], str]:
    """The cells of docs/signals.md that were tried."""
    found = {}
    for row in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        if row.startswith("| `"):
            line = Line(*cells[:3])
            found |= {(line, name): cell for name, cell in zip(SIGNALS, cells[3:], strict=True) if cell != "-"}
    return found


@contextlib.contextmanager
def launched_from(line: Line, environment: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """The environment for a line: that of a cluster, for srun."""
    if "srun" not in line.launcher:
        yield environment
    else:
        with two_node_slurm() as variables:
            yield {**environment, **variables}


def main() -> None:
    from tests.support.shards import make_caption_set, tiny_tokenizer

    lines: dict[Line, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        make_caption_set(data / "data", rows=16)
        make_caption_set(data / "data", rows=8, split="val")
        tiny_tokenizer(data / "tokenizer")
        for index, (line, sent) in enumerate(table()):
            if all(word in f"{line.launcher} {line.target} {line.moment} {sent}" for word in sys.argv[1:]):
                folder = data / str(index)
                folder.mkdir()
                with launched_from(line, os.environ) as environment:
                    found = observe(line, sent, TinyRun(data / "data", data / "tokenizer"), environment, folder)
                print(line, sent, found, file=sys.stderr, flush=True)
                lines.setdefault(line, {})[sent] = found
    for line, cells in lines.items():
        row = [f"`{line.launcher}`", line.target, line.moment, *(cells.get(each, "-") for each in SIGNALS)]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
