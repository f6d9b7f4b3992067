"""The demo's commands fit together, and its metrics come from the files that they write."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eve_ds import demo, demo_results
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.finetune_options import expand_options
from eve_ds.recipes import read_yaml
from preprocessing.__main__ import main as prepare
from preprocessing.errors import UserError
from tests.support.made_run import dump

SEED = 7
START = {"--checkpoint", "--init_from", "--model", "--data.tokenizer"}  # options that say where a fine-tuning starts
FEW = ["--val", "3", "--test", "4", "--nlvr-train", "8", "--nlvr-dev", "8", "--nlvr-test", "8"]
SHAPE = read_yaml(str(demo.PRETRAIN), "--config")["model"]


def pretraining(root: Path) -> list[str]:
    (command,) = demo.training_stages(root, SEED, 0)[0].commands
    return command


def finetunings(root: Path) -> list[tuple[list[str], list[str]]]:
    """(with pre-training, without), a pair a task."""
    return [(stage.commands[0], stage.commands[1]) for stage in demo.training_stages(root, SEED, 0)[1:]]


def options(command: list[str]) -> dict[str, str]:
    names, values = command[1::2], command[2::2]
    assert all(name.startswith("--") for name in names) and len(set(names)) == len(names) == len(values)
    return dict(zip(names, values, strict=True))


def parsed(command: list[str]) -> FinetuneConfig:
    assert command[0] == "eve_ds.finetune"
    argv, defaults = expand_options(command[1:])
    return parse(FinetuneConfig, argv, "test", defaults)


# Commands


def test_every_fine_tuning_has_a_rival_that_differs_in_its_start_alone(tmp_path: Path) -> None:
    assert [options(own)["--task"] for own, _ in finetunings(tmp_path)] == ["itr_coco", "vqa", "nlvr"]
    for stage in demo.training_stages(tmp_path, SEED, 0)[1:]:
        assert stage.ranks and len(stage.commands) == 2
        own, rival = map(options, stage.commands)
        assert stage.commands[0][0] == stage.commands[1][0] == "eve_ds.finetune"
        assert {name for name in own.keys() | rival.keys() if own.get(name) != rival.get(name)} <= {
            *START,
            "--output_dir",
        }
        assert rival["--output_dir"] == f"{own['--output_dir']}_{demo.FIRST_VALUES}"


def test_every_fine_tuning_starts_from_the_pre_training_and_its_rival_from_nothing(tmp_path: Path) -> None:
    """No rival ever sees pre-trained weights, and no task another one's labels."""
    folders = set()
    for own, rival in finetunings(tmp_path):
        assert options(own)["--checkpoint"] == options(pretraining(tmp_path))["--output_dir"]
        assert options(rival)["--init_from"] == "null" and "--checkpoint" not in options(rival)
        folders |= {options(command)["--output_dir"] for command in (own, rival)}
    assert len(folders) == 6


def test_first_values_have_the_shape_and_the_seed_of_the_pre_training(tmp_path: Path) -> None:
    pretrained = parse(PretrainConfig, pretraining(tmp_path)[1:], "test")
    assert {name: getattr(pretrained.model, name) for name in SHAPE} == SHAPE
    assert pretrained.engine.seed == SEED and pretrained.engine.expert_parallel_size == 2
    for _, rival in finetunings(tmp_path):
        config = parsed(rival)
        assert config.init_from is None and config.model == pretrained.model
        assert config.engine.seed == SEED and config.engine.expert_parallel_size == 1
        assert config.data.tokenizer == pretrained.data.tokenizer == f"{tmp_path}/tokenizer"


def test_both_runs_of_a_task_train_alike(tmp_path: Path) -> None:
    """What is parsed differs in the start alone, too: the model's shape comes from the checkpoint, or is given."""
    folder = tmp_path / "pretrain" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": SHAPE}), encoding="utf-8")
    for pair in finetunings(tmp_path):
        own, rival = map(parsed, pair)
        assert own.init_from != rival.init_from and own.output_dir != rival.output_dir
        for config in (own, rival):
            config.init_from, config.output_dir, config.data.tokenizer = None, "", None
        assert own == rival
        assert own.optimizer.total_steps and own.engine.seed == SEED and own.model.vocab_size == SHAPE["vocab_size"]


@pytest.mark.parametrize(
    ("gpus", "ranks"),
    [
        (0, [2, 1, 1, 1]),
        (1, [1] * 4),
        (2, [2] * 4),
        (7, [4] * 4),
        (8, [8] * 4),
        (64, [16] * 4),  # the smallest batch of the recipes, 48, is a multiple of 16
    ],
)
def test_experts_are_spread_over_ranks_where_there_are_two(gpus: int, ranks: list[int], tmp_path: Path) -> None:
    """And the runs of a task take turns on GPUs, where one has all of them, but not on the CPU."""
    plan = demo.training_stages(tmp_path, SEED, gpus)
    assert [stage.ranks for stage in plan] == ranks
    assert [stage.second_log is None for stage in plan] == [True] + [gpus > 0] * 3
    assert len({stage.second_log for stage in plan if stage.second_log}) == (0 if gpus else 3)
    if gpus:
        together = demo.training_stages(tmp_path, SEED, 0)
        longer = [stage.expected / same.expected for stage, same in zip(plan, together, strict=True)]
        assert longer[0] == 1 and all(1.5 <= factor <= 2 for factor in longer[1:])
    for stage in plan:
        spread = {options(command)["--engine.expert_parallel_size"] for command in stage.commands}
        assert spread == {"1" if stage.ranks == 1 else "2"}


def test_gpus_are_looked_for_where_torch_could_use_them() -> None:
    code = "import sys; from eve_ds.demo import visible_gpus as gpus; print(gpus(), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for_cpu = torch.__version__.endswith("+cpu")
    assert found == (["0", "False"] if for_cpu else [str(torch.cuda.device_count()), "True"])


def test_what_is_scored_is_what_the_runs_predict(tmp_path: Path) -> None:
    runs = {options(command)["--output_dir"] for pair in finetunings(tmp_path) for command in pair}
    commands = demo.scoring_stage(tmp_path).commands
    predictions = [word for command in commands for word in command if "predictions_test" in word]
    assert {str(Path(file).parent) for file in predictions} == runs and len(runs) == 6
    assert len(set(predictions)) == len(predictions) == 8  # retrieval's with and without re-ranking
    written = [after for command in commands for word, after in pairwise(command) if word in ("--out", "--json")]
    assert len(set(written)) == len(written) == len(commands) == 10


def test_commands_are_told_as_a_shell_takes_them() -> None:
    words = ["-c", "pass", "--model", json.dumps({"dim": 96, "activation": "gelu"}), "a b"]
    runner = demo.StageRunner([demo.Stage("Nothing", 1, [words])])
    runner.run()
    assert shlex.split(runner.done[0]["command"]) == ["python", *words]


def test_one_rank_runs_without_a_launcher_and_several_below_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And alone, whatever group of processes the shell names."""
    for name in demo.OF_LAUNCHERS:
        monkeypatch.setenv(name, "7")
    stage = demo.Stage("One", 1, [["sysconfig"]], ranks=1)
    assert demo.launched(stage, ["sysconfig"]) == [sys.executable, "-m", "sysconfig"]
    runner = demo.StageRunner([stage, demo.Stage("None", 1, [["-c", "import os; print(sorted(os.environ))"]])])
    runner.run()
    assert runner.done[0]["command"] == "python -m sysconfig"
    printed = capfd.readouterr().out
    assert "Python version:" in printed and not [name for name in demo.OF_LAUNCHERS if f"'{name}'" in printed]
    assert demo.launched(demo.Stage("Two", 1, [], ranks=2), ["m"])[1:3] == ["-m", "deepspeed.launcher.runner"]


# Fails unless the other command, which writes that file, runs at the same time.
MEET = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
print(sys.argv[1], flush=True)
deadline = time.monotonic() + 60
while not pathlib.Path(sys.argv[2]).exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""


def test_a_fine_tuning_and_its_rival_run_at_the_same_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own, rival, log = (str(tmp_path / name) for name in ("own", "rival", "log"))
    commands = [["-c", MEET, own, rival], ["-c", MEET, rival, own]]
    runner = demo.StageRunner([demo.Stage("Both", 1, commands, second_log=Path(log))])
    runner.run()
    assert [shlex.split(done["command"])[1:] for done in runner.done] == commands
    assert [done["beside"] for done in runner.done] == [False, True]
    output = capfd.readouterr().out
    assert f"{own}\n" in output and f"{rival}\n" not in output and log in output
    assert Path(log).read_text() == f"{rival}\n"


def test_a_failure_of_either_ends_the_stage(tmp_path: Path) -> None:
    failing, waiting = ["-c", "raise SystemExit(3)"], ["-c", "import time; time.sleep(1000)"]
    log = tmp_path / "log"
    for commands, told in (
        ([waiting, failing], f"stage 'Both', without pre-training, ended with exit code 3; its output: {log}"),
        ([failing, waiting], "stage 'Both' ended with exit code 3; its own message stands above"),
    ):
        with pytest.raises(UserError, match=told):
            demo.StageRunner([demo.Stage("Both", 1, commands, second_log=log)]).run()  # and the other one is ended


# A launcher whose rank saves for a moment when it is asked to end.
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
"""
RANK = """
import os, pathlib, signal, sys, time

def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1]).touch()
    os._exit(0)

signal.signal(signal.SIGTERM, save)
if folder := os.environ.get("EVE_DS_RANKS"):
    (pathlib.Path(folder) / str(os.getpid())).touch()
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
"""
FAIL_WHEN = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
raise SystemExit(3)
"""


def test_ranks_below_a_launcher_save_when_the_other_run_fails(tmp_path: Path) -> None:
    saved, ready = str(tmp_path / "saved"), str(tmp_path / "ready")
    commands = [["-c", LAUNCHER, RANK, saved, ready], ["-c", FAIL_WHEN, ready]]
    with pytest.raises(UserError, match="exit code 3"):
        demo.StageRunner([demo.Stage("Both", 1, commands, second_log=tmp_path / "log")]).run()
    assert Path(saved).exists()


def test_a_test_image_is_asked_about_in_words_of_the_raw_files(tmp_path: Path) -> None:
    """The first image with a question that neither yes nor a number answers; its own caption, then the next one's."""
    assert prepare(["shapes", "--out", str(tmp_path / "raw"), *FEW, "--train", "6"]) == 0
    (answer, right), (match, _) = demo.requests(tmp_path)
    questions, annotations = (
        json.loads(Path(demo.vqa_file(tmp_path / "raw", "test", kind)).read_text())[kind]
        for kind in ("questions", "annotations")
    )
    told = next(row for row in annotations if row["answer_type"] == "other")
    asked = {row["question_id"]: row["question"] for row in questions}[told["question_id"]]
    assert answer[1:3] == ["eve_ds.predict", "answer"] and answer[4] == asked
    assert right == f"right: {told['multiple_choice_answer']}"
    captions = json.loads((tmp_path / "raw/annotations/captions_test2014.json").read_text())["annotations"]
    by_image = {
        row["image_id"]: [one["caption"] for one in captions if one["image_id"] == row["image_id"]] for row in captions
    }
    file, own, other = match[3:6]
    assert file == answer[3] and Path(file).is_file() and f"{told['image_id']:012d}" in file
    assert own == by_image.pop(told["image_id"])[0] and other in {texts[0] for texts in by_image.values()}
    runs = {options(command)["--output_dir"] for command, _ in finetunings(tmp_path)}
    assert {command[command.index("--checkpoint") + 1] for command in (answer, match)} <= runs


def test_a_model_that_is_asked_about_must_be_stored(tmp_path: Path) -> None:
    exports = {options(own)["--task"]: parsed(rival).checkpoint.export for own, rival in finetunings(tmp_path)}
    assert exports == {"itr_coco": True, "vqa": True, "nlvr": False}


def test_what_is_asked_is_recorded_with_what_came_out() -> None:
    runner = demo.StageRunner([])
    found = runner.ask([(["-c", "print('0.9  red'); print('0.1  blue')"], "right: red")])
    command = shlex.join(["python", "-c", "print('0.9  red'); print('0.1  blue')"])
    assert found == [{"command": command, "output": "0.9  red\n0.1  blue\n", "right": "right: red"}]
    assert [done["command"] for done in runner.done] == [command]
    lines = demo_results.answers({"predict": found}).splitlines()
    assert [line.strip() for line in lines] == [f"$ {command}", "0.9  red", "0.1  blue", "(right: red)"]


# Metrics

SCORES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "retrieval": ({"txt_r1": 71.5, "img_r1": 64.5, "r_mean": 80.0}, {"txt_r1": 55.0, "img_r1": 41.2, "r_mean": 62.1}),
    "retrieval_reranked": ({"txt_r1": 75.5, "img_r1": 68.0}, {"txt_r1": 54.0, "img_r1": 42.0}),
    "vqa": ({"overall": 78.3, "per_answer_type": {"other": 70}}, {"overall": 60.4, "per_answer_type": {"other": 52}}),
    "nlvr": ({"accuracy": 0.742, "consistency": 0.311}, {"accuracy": 0.663, "consistency": 0.187}),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files that ``metrics`` reads, with the names that the scoring commands are given."""
    for task, pair in SCORES.items():
        for run, scores in zip(("", demo.FIRST_VALUES), pair, strict=True):
            dump(demo.scores_file(tmp_path, task, run), scores | {"intervals": {"txt_r1": [1, 99]}})
    for run, accuracy in (("itr", 91.0), (f"itr_{demo.FIRST_VALUES}", 66.5)):
        scores = {"matching": {"accuracy": accuracy, "prior": 66.7}, "intervals": {"matching": {"accuracy": [60, 95]}}}
        dump(tmp_path / run / "scores_test.json", scores)
    dump(tmp_path / "baselines_vqa.json", {"majority_baseline": 21.0, "text_only_baseline": 41.7})
    parts = {"color": (0.8, 0.4, 0.99), "all": (0.92, 0.63, 0.998)}
    rows = [
        dict(zip(("words", "accuracy", "shuffled", "oracle"), (kind, *v), strict=True)) for kind, v in parts.items()
    ]
    dump(tmp_path / "words.json", rows)
    dump(tmp_path / "data/captions/test/manifest.json", {"rows": 200})
    lines = [
        {"step": n, "loss": 4.0 if n <= 20 else 1.0 + n % 2, "samples_per_second": 300.0 + n} for n in range(1, 61)
    ]
    lines.insert(30, {"step": 30, "split": "val", "val/loss": 9.0})
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_files_read_are_those_that_the_commands_write(root: Path) -> None:
    written = {Path(command[-1]) for command in demo.scoring_stage(root).commands}
    assert {path for path in root.glob("*.json") if path.is_file()} == written


def test_metrics_hold_both_roads(root: Path) -> None:
    found = demo.metrics(root, 2)
    for task, both in SCORES.items():
        own, rival = found[task.partition("_")[0]], found[task.partition("_")[0]]["from_first_values"]
        for part, scores in zip((own, rival), both, strict=True):
            if task == "retrieval_reranked":
                assert part["reranked"] == scores and part["intervals"]["reranked"] == {"txt_r1": [1, 99]}
                assert part["matching"]["prior"] == 66.7 and part["intervals"]["matching"] == {"accuracy": [60, 95]}
            else:
                assert {key: part[key] for key in scores} == scores
        assert rival.keys() <= own.keys()
    assert found["retrieval"]["matching"]["accuracy"] == 91.0
    assert found["retrieval"]["from_first_values"]["matching"]["accuracy"] == 66.5
    assert found["pretrain"] == {
        "loss_first": 4.0,
        "loss_last": 1.5,
        "samples_per_second": pytest.approx(330.5),
        "words_accuracy": 0.92,
        "words_accuracy_other_image": 0.63,
        "words_accuracy_oracle": 0.998,
    }
    assert (found["retrieval"]["pool"], found["retrieval"]["chance_txt_r1"], found["nlvr"]["chance"]) == (200, 0.5, 0.5)
    assert (found["vqa"]["text_only_baseline"], found["vqa"]["labeled_images"]) == (41.7, demo.LABELED_IMAGES)
    assert (found["world_size"], found["expert_parallel_size"], found["zero_stage"]) == (2, 2, 2)
    assert demo.metrics(root, 1)["expert_parallel_size"] == 1


def test_scores_are_kept_if_a_model_cannot_be_asked(root: Path) -> None:
    assert prepare(["shapes", "--out", str(root / "raw"), *FEW, "--train", "2"]) == 0
    with pytest.raises(UserError, match="stage 'Asking about a test image' ended with exit code 2"):
        demo.conclude(demo.StageRunner([]), root, 0)  # there is no checkpoint
    assert json.loads((root / "metrics.json").read_text()) == demo.metrics(root, 2)


def test_an_installed_package_has_no_benchmarks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not any("eve_ds.bench" in command for command in demo.scoring_stage(root).commands)
    (root / "words.json").unlink()
    found = demo.metrics(root, 2)
    assert set(found["pretrain"]) == {"loss_first", "loss_last", "samples_per_second"}
    assert "masked words" not in demo.table(found)


def test_the_table_has_both_runs_side_by_side(root: Path) -> None:
    lines = demo.table(demo.metrics(root, 2)).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "pre-trained no pre-training for comparison",
        "pre-training loss 1.500 4.000 at the start",
        "masked words 92.0 % 63.0 % with another image, 99.8 % by an oracle",
        "text retrieval R@1 71.5 % 55.0 % 0.5 % by chance",
        "re-ranked 75.5 % 54.0 %",
        "image retrieval R@1 64.5 % 41.2 % 0.5 % by chance",
        "re-ranked 68.0 % 42.0 %",
        "matching accuracy 91.0 % 66.5 % 66.7 % by one answer to all",
        "VQA accuracy 78.3 % 60.4 % 41.7 % from the words alone",
        "NLVR accuracy 74.2 % 66.3 % 50.0 % by chance",
        "NLVR consistency 31.1 % 18.7 %",
    ]
    ends = [
        line.index(heading) + len(heading)
        for line, heading in zip(lines[:1] * 2, ("pre-trained", "pre-training"), strict=True)
    ]
    for line in lines[3:]:
        assert line[ends[0] - 2 : ends[0]] == line[ends[1] - 2 : ends[1]] == " %"
    assert all(len(line) <= 120 for line in lines)
