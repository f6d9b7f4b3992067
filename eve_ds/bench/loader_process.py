"""A job of ``bench loader`` in its own process and, if needed, its own environment.

    python -m eve_ds.bench.loader_process MODULE:CLASS SETTINGS

The job answers with one line of JSON: first {"ready": versions}, then {"figures": {name: number}} for each line on
stdin, or {"error": line}, after which it ends. Other output of the job's libraries goes to stderr, a log file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import select
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from evaluation.common import without_secrets  # needs no packages, which other environments may lack

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "pillow", "numpy", "pyarrow", "webdataset", "mosaicml-streaming", "datasets")
# Other loaders must not use the network, nor take this process for a rank of a distributed run.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Settings:
    """Settings of the jobs.

    Args:
        work: folder for the output of the jobs.
        image_folder: folder of the JPEGs.
        images: number of JPEGs.
        batch_size: images per batch.
        processes: number of decoding processes.
        prefetch: batches read ahead by each process.
        image_size: side of the training image, pixels.
        packing_copies: number of times that each JPEG is packed, under different names.
        shards: number of shards of the split whose opening is timed.
        shard_rows: rows per shard.
    """

    work: str
    image_folder: str
    images: int
    batch_size: int
    processes: int
    prefetch: int = 2
    image_size: int = 224
    packing_copies: int = 8
    shards: int = 1000
    shard_rows: int = 16_000

    @property
    def lead(self) -> int:
        """Batches before and after the timed window, in which the processes fill and empty their prefetch buffers."""
        return self.processes * self.prefetch

    @property
    def window(self) -> int:
        """Number of timed batches in one pass over the images."""
        return self.images // self.batch_size - 2 * self.lead


class Job(Protocol):
    """The constructor prepares the data; each round measures once."""

    def round(self) -> dict[str, float]: ...


class JobError(Exception):
    """A job failed; the message is one line."""


class JobProcess:
    """A job in a subprocess.

    Args:
        name: name of the log file in the work folder.
        job: "module:class", called with the settings.
        settings: of the run.
        python: interpreter of the job's environment.
        timeout: maximum seconds to wait for an answer.
    Raises:
        JobError: the interpreter is missing; in ``start`` and ``round``: the job failed, died or timed out.
    """

    def __init__(self, name: str, job: str, settings: Settings, python: Path, timeout: float) -> None:
        self.log = Path(settings.work) / f"{name}.log"
        self.versions: dict[str, str] = {}
        self._timeout = timeout
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        arguments = [str(python), "-m", __name__, job, json.dumps(asdict(settings))]
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment | _OFFLINE | {"PYTHONPATH": path},
                )
            except OSError as error:
                raise JobError(f"{python}: {error.strerror}") from error

    def start(self) -> None:
        """Wait until the job is prepared."""
        self.versions = self._answer("ready")

    def round(self) -> dict[str, float]:
        """Measure once; returns {name: figure}."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"round\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise JobError(self._died()) from None
        return self._answer("figures")

    def close(self) -> None:
        """End the process: close its stdin; kill it if it does not end within 10 s."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()

    def _answer(self, key: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._timeout)[0]:
            self._process.kill()
            raise JobError(f"no answer within {self._timeout:g} s; see {self.log}")
        line = self._process.stdout.readline()
        if not line:
            raise JobError(self._died())
        answer = json.loads(line)
        if "error" in answer:
            raise JobError(f"{answer['error']}; see {self.log}")
        found: dict[str, Any] = answer[key]
        return found

    def _died(self) -> str:
        return f"ended with exit code {self._process.wait()}; see {self.log}"


def _serve(job: str, settings: Settings) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    module, name = job.split(":")
    try:
        prepared: Job = getattr(importlib.import_module(module), name)(settings)
        answer({"ready": _versions()})
        for _ in sys.stdin:
            answer({"figures": prepared.round()})
    except Exception as error:  # noqa: BLE001 - a library may raise any exception; the parent reports it
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer({"error": without_secrets(f"{type(error).__name__}: {text}")[:300]})
        sys.exit(1)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    _serve(sys.argv[1], Settings(**json.loads(sys.argv[2])))
