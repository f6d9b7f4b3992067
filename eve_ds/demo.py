"""The whole pipeline on an embedded data set: raw files, shards, pre-training, fine-tuning, scores.

    make demo          or          python -m eve_ds.demo [--seed N] [--out runs/demo]

Each stage consists of commands that a user could type; the report lists them. They run in order, on two CPU ranks or on
the GPUs of this machine, with an estimate of the time left. Each fine-tuning has a baseline run: the same from initial
values, without pre-training. On the CPU both run at the same time on one rank each: most of a step is small operations,
whose time hardly depends on the size of the batch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.common import Parser
from eve_ds.demo_results import (
    FIRST_VALUES,
    LABELED_IMAGES,
    RERANKED_SCORES,
    answers,
    metrics,
    run_folder,
    scores_file,
    table,
)
from eve_ds.environment import free_port, prepare_environment, version
from eve_ds.errors import run_command
from eve_ds.options import check_secrets
from eve_ds.recipes import read_yaml
from preprocessing.errors import UserError
from preprocessing.local_files import write_json

CONFIGS = Path(__file__).parent / "configs"
PRETRAIN = CONFIGS / "tiny_shapes.yaml"
MARKER = "demo.json"
POLL_SECONDS = 0.2
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # some containers set them for all
TAKING_TURNS = 1.8  # times as long as two runs at once, for two runs one after the other


@dataclass(frozen=True)
class Stage:
    """Commands that run one after the other, or two at the same time.

    Args:
        title: printed.
        expected: seconds on two cores of 2024, for the estimate of the time left.
        commands: arguments after ``python``; with ``ranks``, a module and its arguments.
        ranks: processes of each command, several of them started through the deepspeed launcher.
        second_log: None: one command after the other. A file: two commands, both started at once; the second one's
            output goes to the file.
    """

    title: str
    expected: float
    commands: list[list[str]]
    ranks: int = 0
    second_log: Path | None = None


def stages(root: Path, seed: int, gpus: int) -> list[Stage]:
    """All stages of the demo."""
    return [*data_stages(root, seed), *training_stages(root, seed, gpus), scoring_stage(root)]


def data_stages(root: Path, seed: int) -> list[Stage]:
    """Raw files, shards, tokenizer."""
    raw, data = root / "raw", root / "data"
    shapes = ["-m", "preprocessing", "shapes", "--out", str(raw), "--seed", str(seed), "--test", "200"]
    shapes += ["--asked", str(LABELED_IMAGES)]
    convert = []
    for split, nlvr_split in (("train", "train"), ("val", "dev"), ("test", "test1")):
        captions = ["--annotations", f"{raw}/annotations/captions_{split}2014.json", "--images", f"{raw}/images"]
        convert.append(["coco", *captions, "--split", split, "--out", f"{data}/captions"])
        files = ["--questions", vqa_file(raw, split, "questions"), "--annotations", vqa_file(raw, split, "annotations")]
        convert.append(["vqav2", *files, "--images", f"{raw}/images", "--split", split, "--out", f"{data}/vqa"])
        stated = ["--annotations", f"{raw}/nlvr2/{nlvr_split}.json", "--images", f"{raw}/nlvr2/images"]
        convert.append(["nlvr2", *stated, "--split", split, "--out", f"{data}/nlvr"])
    folders = [f"{data}/{kind}/train" for kind in ("captions", "vqa", "nlvr")]
    words = ["-m", "preprocessing", "tokenizer", "train", "--data", *folders, "--vocab-size", "512"]
    return [
        Stage("Drawing the data set, as raw files", 9, [shapes]),
        Stage("Raw files to Arrow shards", 9, [["-m", "preprocessing", *options] for options in convert]),
        Stage("Training the tokenizer", 2, [[*words, "--out", f"{root}/tokenizer"]]),
    ]


def training_stages(root: Path, seed: int, gpus: int) -> list[Stage]:
    """Pre-training, then three fine-tunings, each with its baseline run."""

    def parallel(ranks: int) -> list[str]:
        experts = ["--engine.expert_parallel_size", str(2 if ranks % 2 == 0 else 1)]
        return [*experts, "--deepspeed_config", "ds_configs/zero2.json"]

    pretrain_ranks = world_size(gpus)
    finetune_ranks = pretrain_ranks if gpus else 1  # on the CPU a run and its baseline share two cores
    pretrain = ["eve_ds.pretrain", "--config", str(PRETRAIN), "--data.path", f"{root}/data/captions"]
    pretrain += ["--data.tokenizer", f"{root}/tokenizer", "--engine.seed", str(seed)]
    pretrain += ["--output_dir", f"{root}/pretrain", *parallel(pretrain_ranks)]
    shape = json.dumps(read_yaml(str(PRETRAIN), "--config")["model"])
    first_values = ["--init_from", "null", "--model", shape, "--data.tokenizer", f"{root}/tokenizer"]

    def finetune(title: str, expected: float, *, task: str, recipe: str, data: str) -> Stage:
        config = ["--config", str(CONFIGS / f"tiny_shapes_{recipe}.yaml"), "--task", task, "--seed", str(seed)]
        config += ["--data", f"{root}/data/{data}", *parallel(finetune_ranks)]
        folder, baseline = f"{root}/{recipe}", f"{root}/{recipe}_{FIRST_VALUES}"
        own = ["eve_ds.finetune", *config, "--checkpoint", f"{root}/pretrain", "--output_dir", folder]
        other = ["eve_ds.finetune", *config, *first_values, "--output_dir", baseline]
        if gpus:
            return Stage(title, TAKING_TURNS * expected, [own, other], finetune_ranks)
        return Stage(title, expected, [own, other], finetune_ranks, Path(f"{baseline}.log"))

    return [
        Stage("Pre-training: masked pixels and words", 140, [pretrain], pretrain_ranks),
        finetune("Fine-tuning on retrieval, twice", 72, task="itr_coco", recipe="itr", data="captions"),
        finetune("Fine-tuning on VQA, twice", 48, task="vqa", recipe="vqa", data="vqa"),
        finetune("Fine-tuning on NLVR, twice", 63, task="nlvr", recipe="nlvr", data="nlvr"),
    ]


def scoring_stage(root: Path) -> Stage:
    """The evaluation commands on the predictions, and the baselines without a model or without an image."""
    raw = root / "raw"
    tested = ["--questions", vqa_file(raw, "test", "questions"), "--annotations", vqa_file(raw, "test", "annotations")]
    learned = ["--train-questions", vqa_file(raw, "train", "questions")]
    learned += ["--train-annotations", vqa_file(raw, "train", "annotations")]
    stated = ["--annotations", f"{raw}/nlvr2/test1.json"]
    commands = [["-m", "evaluation.baselines", *learned, *tested, "--out", f"{root}/baselines_vqa.json"]]
    for run in ("", FIRST_VALUES):
        for scores, program, options, predictions in (
            ("retrieval", "retrieval", ["--scores"], "predictions_test.npz"),
            (RERANKED_SCORES, "retrieval", ["--scores"], "predictions_test_reranked.npz"),
            ("vqa", "vqa", [*tested, "--predictions"], "predictions_test.json"),
            ("nlvr", "nlvr", [*stated, "--predictions"], "predictions_test.csv"),
        ):
            files = [str(run_folder(root, program, run) / predictions), "--out", str(scores_file(root, scores, run))]
            commands.append(["-m", f"evaluation.{program}", "--intervals", *options, *files])
    if importlib.util.find_spec("eve_ds.bench") is not None:  # a wheel does not hold it
        words = ["-m", "eve_ds.bench", "words", "--checkpoint", f"{root}/pretrain", "--data", f"{root}/data/captions"]
        commands.append([*words, "--scenes", f"{raw}/annotations", "--json", f"{root}/words.json"])
    return Stage("Scoring the predictions and the masked words", 12, commands)


def requests(root: Path) -> list[tuple[list[str], str]]:
    """Two commands that ask the fine-tuned models about one test image: [(arguments after python, the right answer)].

    VQA: the first question of the split whose answer is neither yes, no nor a number. Matching: the first caption of
    that question's image, and of the next image.
    """
    raw = root / "raw"

    def read(path: Path | str, key: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))[key]
        return found

    annotation = next(
        one for one in read(vqa_file(raw, "test", "annotations"), "annotations") if one["answer_type"] == "other"
    )
    questions = read(vqa_file(raw, "test", "questions"), "questions")
    question = next(one["question"] for one in questions if one["question_id"] == annotation["question_id"])
    captions = raw / "annotations" / "captions_test2014.json"
    images = read(captions, "images")
    place = next(number for number, one in enumerate(images) if one["id"] == annotation["image_id"])
    own, others = (
        next(one["caption"] for one in read(captions, "annotations") if one["image_id"] == image["id"])
        for image in (images[place], images[(place + 1) % len(images)])
    )
    file = str(raw / "images" / "test2014" / images[place]["file_name"])
    answer = ["answer", file, question, "--checkpoint", f"{root}/vqa", "--top", "2"]
    match = ["match", file, own, others, "--checkpoint", f"{root}/itr"]
    return [
        (["-m", "eve_ds.predict", *answer], f"right: {annotation['multiple_choice_answer']}"),
        (["-m", "eve_ds.predict", *match], "right: the first caption; the second is of another image"),
    ]


def vqa_file(raw: Path, split: str, kind: str) -> str:
    """VQA v2's own file names."""
    middle = "v2_OpenEnded_mscoco" if kind == "questions" else "v2_mscoco"
    return f"{raw}/vqa/{middle}_{split}2014_{kind}.json"


class StageRunner:
    """Runs the stages of ``plan``, prints the time left and records the commands."""

    def __init__(self, plan: list[Stage]) -> None:
        self.plan = plan
        self.done: list[dict[str, Any]] = []
        self.pace = 1.0  # this machine's time divided by the expected time

    def run(self) -> None:
        for name in OF_LAUNCHERS:
            os.environ.pop(name, None)
        began = time.monotonic()
        for number, stage in enumerate(self.plan):
            self._announce(number, stage)
            start = time.monotonic()
            if stage.second_log:
                self._side_by_side(stage, stage.second_log)
            else:
                for arguments in stage.commands:
                    self._command(stage, arguments)
            seconds = time.monotonic() - start
            if stage.ranks:  # a stage that trains: the others are too short to tell the pace
                spent = sum(earlier.expected for earlier in self.plan[: number + 1])
                self.pace = (time.monotonic() - began) / spent
            print(f"      done in {clock(seconds)}", flush=True)

    def _announce(self, number: int, stage: Stage) -> None:
        left = self.pace * sum(later.expected for later in self.plan[number:])
        about = f"about {clock(self.pace * stage.expected)}, then {clock(left - self.pace * stage.expected)} to go"
        print(f"\n[{number + 1}/{len(self.plan)}] {stage.title}  ({about})", flush=True)

    def ask(self, requested: Sequence[tuple[list[str], str]]) -> list[dict[str, str]]:
        """Run the ``requests``: [{"command", "output", "right"}]."""
        stage = Stage("Asking about a test image", 0, [])
        print(f"\n{stage.title}", flush=True)
        found = []
        for arguments, right in requested:
            output = self._command(stage, arguments, stdout=subprocess.PIPE)
            found.append({"command": self.done[-1]["command"], "output": output, "right": right})
        return found

    def _side_by_side(self, stage: Stage, log: Path) -> None:
        """Start both commands at once. If one fails, or this program is interrupted, both are asked to end.

        Each runs under eve_ds.launching, which passes a signal on to its ranks and returns when they have ended.
        """
        print(f"      beside it, without pre-training; its output: {log}", flush=True)
        start = time.monotonic()
        commands = [launched(stage, arguments) for arguments in stage.commands]
        guard = [sys.executable, "-m", "eve_ds.launching"]
        with (
            log.open("wb") as file,
            ExitStack() as waits,
            ExitStack() as ends,
        ):  # `ends` is left first: all get the signal
            running = []
            for command, output in zip(commands, (None, file), strict=True):
                running.append(subprocess.Popen([*guard, *command], stdout=output, stderr=output))
                waits.callback(running[-1].wait)
                ends.callback(running[-1].terminate)  # does nothing to a process that has ended
            seconds: dict[int, float] = {}
            while len(seconds) < len(running):
                time.sleep(POLL_SECONDS)
                for number, process in enumerate(running):
                    code = process.poll()
                    if code == 0:
                        seconds.setdefault(number, time.monotonic() - start)
                    elif code is not None:
                        which, where = (
                            (", without pre-training,", f"its output: {log}")
                            if number
                            else ("", "its own message stands above")
                        )
                        raise UserError(f"stage {stage.title!r}{which} ended with exit code {code}; {where}")
        for number, arguments in enumerate(stage.commands):
            self._record(stage, arguments, seconds[number], beside=number > 0)

    def _command(self, stage: Stage, arguments: list[str], stdout: int | None = None) -> str:
        start = time.monotonic()
        ended = subprocess.run(launched(stage, arguments), stdout=stdout, text=True)
        if status := ended.returncode:
            raise UserError(f"stage {stage.title!r} ended with exit code {status}; its own message stands above")
        self._record(stage, arguments, time.monotonic() - start)
        return ended.stdout or ""

    def _record(self, stage: Stage, arguments: list[str], seconds: float, beside: bool = False) -> None:
        command = shlex.join([*typed(stage), *arguments])
        self.done.append({"title": stage.title, "command": command, "seconds": seconds, "beside": beside})


def typed(stage: Stage) -> list[str]:
    """What a user types before the arguments of the stage's commands."""
    if stage.ranks > 1:
        return ["deepspeed", "--num_gpus", str(stage.ranks), "--module"]
    return ["python", "-m"] if stage.ranks else ["python"]  # one rank needs no launcher, which takes 4 s


def launched(stage: Stage, arguments: list[str]) -> list[str]:
    """The command line of one of the stage's commands."""
    if stage.ranks <= 1:
        return [sys.executable, *typed(stage)[1:], *arguments]
    # Not the deepspeed script, which may be missing beside the interpreter.
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(stage.ranks), "--master_port", str(free_port())]
    return [sys.executable, *launcher, "--log_level", "warning", "--module", *arguments]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def visible_gpus() -> int:
    """GPUs of this machine. A torch for the CPU has none, and takes a second to import."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


def world_size(gpus: int) -> int:
    """Ranks of pre-training: one per GPU, or two on the CPU."""
    return min(16, 1 << (gpus.bit_length() - 1)) if gpus else 2  # a power of two that divides the recipes' batches


def claim(root: Path, seed: int) -> None:
    """Empty ``root`` if an earlier demo made it. Raises UserError for any other folder with files."""
    if root.is_file():
        raise UserError(f"--out {root}: is a file; name a folder")
    if root.exists():
        if not (root / MARKER).is_file() and any(root.iterdir()):
            raise UserError(f"--out {root}: holds files that no demo wrote; name another folder")
        shutil.rmtree(root)
    write_json(root / MARKER, {"seed": seed})


def main() -> None:
    parser = Parser(prog="python -m eve_ds.demo", description="The whole pipeline on an embedded data set.")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world and another model (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default runs/demo)")
    options = parser.parse_args()
    began = time.monotonic()
    prepare_environment()
    gpus = visible_gpus()
    check_secrets(f"{options.out}", "--out")  # its commands are stored
    claim(options.out, options.seed)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size(gpus))))
    runner = StageRunner(stages(options.out, options.seed, gpus))
    runner.run()
    result = conclude(runner, options.out, gpus)
    print("\nWriting the report", flush=True)
    report = options.out / "report.html"
    subprocess.run([sys.executable, "-m", "eve_ds.report", "--run", str(options.out), "--out", str(report)], check=True)
    took = clock(time.monotonic() - began)
    print(f"\n{table(result)}\n\n{answers(result)}\n", f"{options.out / 'metrics.json'}", f"{report}", took, sep="\n  ")
    sys.stdout.flush()


def conclude(runner: StageRunner, root: Path, gpus: int) -> dict[str, Any]:
    """Write the scores, ask the models about an image, write that and the commands too. Returns metrics.json."""
    result = metrics(root, world_size(gpus))
    write_json(root / "metrics.json", result)  # the scores are kept if a request below fails
    result["predict"] = runner.ask(requests(root))
    write_json(root / "metrics.json", result)
    write_json(root / "commands.json", runner.done)
    return result


if __name__ == "__main__":
    run_command(main)
