"""Fine-tuning and scoring as users run them: two ranks train, four score the same, the files agree with the metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation import nlvr, retrieval
from eve_ds.tasks import load_task_model
from eve_ds.tasks.itc_itm_mlm_mim import ItcItmMlmMim
from tests.support import ranks
from tests.support.shards import FIRST_ID, make_caption_set, make_nlvr_set, make_vqa_set, tiny_tokenizer

ROWS = 9  # 18 samples on 4 ranks of 2: the last block has fewer than ranks, and repeats must not count
KINDS = {"captions": make_caption_set, "vqa": make_vqa_set, "nlvr": make_nlvr_set}
TASKS = {"itr_coco": "captions", "vqa": "vqa", "nlvr": "nlvr"}
NAMES = {"itr_coco": "retrieval"}  # for ``load_task_model``
VAL = ("val/", "val_ema/")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for kind, make in KINDS.items():
        for split, rows in (("train", 24), ("val", ROWS), ("test", ROWS)):
            make(root / kind, rows=rows, split=split)
    tiny_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the rival with all losses, so that retrieval can take its heads."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    options = [
        "--config=tests/e2e/tiny.yaml",
        f"--data.path={data / 'captions'}",
        f"--data.tokenizer={data / 'tokenizer'}",
    ]
    options += [
        f"--output_dir={output}",
        "--task=itc_itm_mlm_mim",
        "--objective.embed_dim=16",
        "--optimizer.total_steps=2",
        "--logging.wandb=false",
        "--logging.eval_every=2",
    ]
    (output.parent / "printed").write_text(ranks.run("eve_ds.pretrain", options))
    return output


def finetune(task: str, data: Path, checkpoint: Path, output: Path, *more: str, world_size: int = 2) -> str:
    options = [f"--task={task}", f"--checkpoint={checkpoint}", f"--data={data / TASKS[task]}", f"--output_dir={output}"]
    options += [
        "--bs=8",
        "--optimizer.total_steps=4",
        "--optimizer.lr=1e-3",
        "--objective.embed_dim=16",
        "--optimizer.ema=0.9",
        "--logging.eval_every=2",
    ]
    options += ["--logging.wandb=false", "--engine.expert_parallel_size=2", *more]
    return ranks.run("eve_ds.finetune", options, world_size)


def test_a_rival_is_evaluated_shown_and_exported(pretrained: Path) -> None:
    records = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    (held_out,) = (record for record in records if "val/loss" in record)
    losses = [held_out[f"val/{name}_loss"] for name in ("itc", "itm", "mlm", "mim")]
    assert held_out["val/loss"] == pytest.approx(sum(losses))
    assert 0 <= held_out["val/itm_accuracy"] <= 1
    told = "negatives come from one micro-batch of all ranks, 4 of the 8 samples of a step; engine.micro_batch_size=4, "
    printed = (pretrained.parent / "printed").read_text()
    assert printed.count(told) == 1 and "memory: at most " in printed
    shown = json.loads((pretrained / "samples" / "samples.json").read_text())
    assert len(shown["images"]) == len(shown["words"]) == 8
    task = load_task_model("itc_itm_mlm_mim", pretrained)
    assert isinstance(task, ItcItmMlmMim) and task.objective.decoder_dim == 32 and task.mask_id == 4


def test_memory_is_forecast_where_negatives_come_from_all_ranks(data: Path, pretrained: Path, tmp_path: Path) -> None:
    """The forecast is made on one rank alone, where a collective would wait for ever or fail."""
    dry = ("--dry_run=true", "--engine.micro_batch_size=auto")
    printed = finetune("itr_coco", data, pretrained, tmp_path / "unused", *dry)
    assert "; the plan forecasts " in printed and "no forecast" not in printed, printed
    assert "engine.micro_batch_size auto: 4 of a rank's 4 samples a step; forecast " in printed


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_finetune_and_four_score_the_same(task: str, data: Path, pretrained: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    printed = finetune(task, data, pretrained, first, *(["--load_head"] if task == "itr_coco" else []))
    assert "negatives" not in printed  # a step is one micro-batch
    assert "memory: at most " in printed
    assert "untested optimizer" not in printed  # DeepSpeed's warning of what it does not know
    scores = json.loads((first / "scores_test.json").read_text())
    about, intervals = scores.pop("about"), scores.pop("intervals")
    hashes = json.loads((first / "model" / "hashes.json").read_text())
    assert about["checkpoint"]["sha256"] == hashes["model.safetensors"] and about["checkpoint"]["step"] == 4
    assert intervals.keys() == scores.keys()
    logged = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in logged if any(key.startswith("val/") for key in record)]
    assert [record["step"] for record in held_out] == [2, 4]
    for record in held_out:
        keys = {group: {key.removeprefix(group) for key in record if key.startswith(group)} for group in VAL}
        assert keys["val/"] == keys["val_ema/"]
    assert {path.name for path in (first / "model_ema").iterdir()} == {
        path.name for path in (first / "model").iterdir()
    }
    load_task_model(NAMES.get(task, task), first / "model_ema")
    assert json.loads((first / "samples" / "samples.json").read_text())
    finetune(task, data, first, again, "--evaluate", world_size=4)
    repeated = json.loads((again / "scores_test.json").read_text())
    read, _ = repeated.pop("about"), repeated.pop("intervals")
    assert read["checkpoint"]["sha256"] == hashes["model.safetensors"] and read["data"] == about["data"]
    assert repeated.keys() == scores.keys()
    if task == "itr_coco":
        arrays = np.load(first / "predictions_test.npz")
        assert arrays["image_to_text"].shape == (ROWS, 2 * ROWS)
        assert arrays["text_image_index"].tolist() == [i // 2 for i in range(2 * ROWS)]
        assert retrieval.recalls(**arrays) == scores
        np.testing.assert_allclose(
            np.load(again / "predictions_test.npz")["image_to_text"], arrays["image_to_text"], atol=0.05
        )
    elif task == "vqa":
        rows = json.loads((first / "predictions_test.json").read_text())
        assert [row["question_id"] for row in rows] == [
            10 * (FIRST_ID["test"] + i) + q for i in range(ROWS) for q in (0, 1)
        ]
        assert 0 <= scores["soft_accuracy"] <= 100
        answers = [row["answer"] for row in rows]
        repeats = [row["answer"] for row in json.loads((again / "predictions_test.json").read_text())]
        assert sum(a != b for a, b in zip(answers, repeats, strict=True)) <= 2  # bf16 against fp32
    else:
        lines = (first / "predictions_test.csv").read_text().splitlines()
        predictions = dict(line.split(",") for line in lines)
        assert len(lines) == len(predictions) == 2 * ROWS
        labels = [{"identifier": f"test-{i}-0-{s}", "label": str(s == 0)} for i in range(ROWS) for s in (0, 1)]
        assert nlvr.score(predictions, labels) == scores


def test_a_checkpoint_of_another_size_is_refused(data: Path, pretrained: Path, tmp_path: Path) -> None:
    options = [
        f"--checkpoint={pretrained}",
        f"--data={data / 'vqa'}",
        f"--output_dir={tmp_path / 'run'}",
        "--task=vqa",
        "--bs=8",
    ]
    started = ranks.start("eve_ds.finetune", [*options, "--optimizer.total_steps=1", "--model.dim=48"], 1)
    codes, text = ranks.finish(started)
    assert codes == [2] and "Traceback" not in text
    assert "model.safetensors" in text and "is [32], the model has [48]" in text
