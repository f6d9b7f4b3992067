"""Retrieval scored as users do it: zero-shot from pre-trained heads, re-ranked, while training, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.common import run
from evaluation.retrieval import main as score_command
from tests.support import ranks
from tests.support.shards import make_caption_set, tiny_tokenizer

ROWS, K = 9, 3
RECALLS = {f"{query}_r{k}" for query in ("txt", "img") for k in ("1", "5", "10", "_mean")} | {"r_mean"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, splits in {"first": {"train": 24}, "other": {"train": 24, "val": ROWS, "test": ROWS}}.items():
        for split, rows in splits.items():
            make_caption_set(root / name, rows=rows, split=split)
    tiny_tokenizer(root / "tokenizer")
    return root


def pretrain(data: Path, output: Path, task: str, *more: str) -> Path:
    options = [
        "--config=tests/e2e/tiny.yaml",
        f"--data.path={data / 'first'}",
        f"--data.tokenizer={data / 'tokenizer'}",
    ]
    options += [f"--output_dir={output}", f"--task={task}", "--data.val_split=null", "--optimizer.total_steps=2"]
    ranks.run("eve_ds.pretrain", [*options, "--logging.wandb=false", *more])
    return output


@pytest.fixture(scope="module")
def contrastive(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(data, tmp_path_factory.mktemp("contrastive") / "run", "itc_itm", "--objective.embed_dim=16")


def finetune(
    data: Path, checkpoint: Path, output: Path, *more: str, task: str = "itr_coco", world_size: int = 2
) -> Any:
    """The exit codes and what is printed."""
    options = [f"--task={task}", f"--checkpoint={checkpoint}", f"--data={data / 'other'}", f"--output_dir={output}"]
    options += ["--bs=4", "--objective.embed_dim=16", "--logging.wandb=false", "--engine.precision=fp32"]
    options += [f"--engine.expert_parallel_size={world_size}", *more]
    return ranks.finish(ranks.start("eve_ds.finetune", options, world_size))


def scores_of(folder: Path) -> dict[str, Any]:
    """The metrics, beside which the file has intervals, of the re-ranked ones, too, and what they are of."""
    scores: dict[str, Any] = json.loads((folder / "scores_test.json").read_text())
    assert scores.pop("about")["split"] == "test"
    assert scores.pop("intervals").keys() == scores.keys()
    return scores


def test_a_contrastive_model_is_scored_zero_shot_and_reranked(data: Path, contrastive: Path, tmp_path: Path) -> None:
    found = {}
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}"
        options = ["--zeroshot", "--rerank", f"--k_test={K}"]
        codes, printed = finetune(data, contrastive, out, *options, world_size=world_size)
        assert set(codes) == {0}, printed
        found[world_size] = scores_of(out)
        lines = printed.splitlines()
        assert [sum(line.startswith(f"test{group}: txt_r1 ") for line in lines) for group in ("", ", reranked")] == [
            1,
            1,
        ]
        assert not (out / "checkpoints").exists()
    scores = found[2]
    assert scores == found[1] and scores.keys() == RECALLS | {"reranked", "matching"}
    assert scores["reranked"].keys() == RECALLS and scores["matching"].keys() == {"accuracy", "prior"}
    for name, own in (("", scores), ("_reranked", scores["reranked"])):  # from the files alone
        path = tmp_path / "2" / f"predictions_test{name}.npz"
        assert run(score_command, ["--scores", str(path), "--out", str(tmp_path / "m.json")]) == 0
        assert json.loads((tmp_path / "m.json").read_text()) == {key: own[key] for key in RECALLS}
        with np.load(path) as one, np.load(tmp_path / "1" / f"predictions_test{name}.npz") as other:
            for array in one:
                np.testing.assert_allclose(one[array], other[array], atol=1e-4, rtol=0)
            if name:
                for array, count in (("image_to_text", ROWS), ("text_to_image", 2 * ROWS)):
                    assert np.isfinite(one[array]).sum() == count * K


def test_reranking_while_training_is_logged_and_the_run_scores_as_its_model(
    data: Path, contrastive: Path, tmp_path: Path
) -> None:
    options = ["--load_head", "--rerank", f"--k_test={K}", "--logging.eval_every=1", "--logging.eval_samples=5"]
    codes, printed = finetune(data, contrastive, tmp_path / "run", *options, "--optimizer.total_steps=2")
    assert codes == [0, 0], printed
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in records if "val/r_mean" in record]
    assert [record["step"] for record in held_out] == [1, 2]
    for record in held_out:
        assert {f"val/{key}" for key in RECALLS} | {f"val/reranked/{key}" for key in RECALLS} <= record.keys()
    codes, printed = finetune(data, tmp_path / "run", tmp_path / "again", "--evaluate", "--rerank", f"--k_test={K}")
    assert codes == [0, 0], printed
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "run")


def test_a_model_without_the_heads_is_refused(data: Path, contrastive: Path, tmp_path: Path) -> None:
    masked = pretrain(data, tmp_path / "masked", "pretrain")
    without_matching = pretrain(data, tmp_path / "itc", "itc_mlm_mim", "--objective.embed_dim=16")
    cases: dict[tuple[Any, ...], str] = {
        (masked, "--zeroshot"): "itc_",
        (without_matching, "--zeroshot", "--rerank"): "itm_head.",
        (contrastive, "--zeroshot", "--task=vqa"): "--zeroshot is for retrieval",
        (contrastive, "--zeroshot", "--k_test=0"): "objective.k_test=0 must be a positive number",
    }
    for number, ((checkpoint, *options), words) in enumerate(cases.items()):
        out = tmp_path / f"refused_{number}"
        codes, printed = finetune(data, checkpoint, out, *options, world_size=1)
        errors = [line for line in printed.splitlines() if "error: " in line]
        assert codes == [2] and "Traceback" not in printed and len(errors) == 1 and words in errors[0], printed
        assert not list(out.glob("*_test*"))
    codes, printed = finetune(data, without_matching, tmp_path / "plain", "--zeroshot", world_size=1)
    assert codes == [0] and scores_of(tmp_path / "plain").keys() == RECALLS, printed
