"""A job of `bench loader` in a process, and perhaps an environment, of its own: told to do a round, it answers figures.

    python -m eve_ds.bench.loader_process MODULE:CLASS SETTINGS

A line in from the parent asks for a round; a line out answers, as JSON: first {"ready": versions}, then {"figures":
{name: number}} a round, or {"error": line} and the end. Whatever else the job's libraries print goes to stderr, a log.
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

from evaluation.common import without_secrets  # a leaf: rivals' environments lack much

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "pillow", "numpy", "pyarrow", "webdataset", "mosaicml-streaming", "datasets")
# No rival looks for anything on a network, and none takes this for a rank of a distributed run.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Settings:
    """What a job must know. Window: the batches that are timed, of those of one pass over the images.

    Args:
        work: folder for what the jobs write.
        images: folder of the JPEGs.
        images: how many there are.
        batch_size: images.
        processes: that decode.
        prefetch: batches read ahead by each.
        image_size: side of the training image, pixels.
        packing_copies: how often each JPEG is packed, under another name.
        shards: of the split whose opening is timed.
        shard_rows: in each of these.
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
        """Batches before the window and after it: until every process has read ahead as far as it may."""
        return self.processes * self.prefetch

    @property
    def window(self) -> int:
        return self.images // self.batch_size - 2 * self.lead


class Job(Protocol):
    """Built once, which prepares its data; each round measures."""

    def round(self) -> dict[str, float]: ...


class JobError(Exception):
    """A job cannot be done; the message, one line, says why."""


class JobProcess:
    """The parent's end.

    Args:
        name: of the log file in the work folder.
        job: "module:class", called with the settings.
        settings: of the run.
        python: interpreter of the environment that the job runs in.
        timeout: seconds that an answer may take.
    Raises:
        JobError: the interpreter is missing; `start` and `round`: the job failed, died or hangs.
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
        """Have it measure once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"round\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise JobError(self._died()) from None
        return self._answer("figures")

    def close(self) -> None:
        """End it: by the end of its input, and if it does not heed that, by force."""
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
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    module, name = job.split(":")
    try:
        prepared: Job = getattr(importlib.import_module(module), name)(settings)
        answer({"ready": _versions()})
        for _ in sys.stdin:
            answer({"figures": prepared.round()})
    except Exception as error:  # noqa: BLE001 - a rival may raise anything, and the parent tells what
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
