"""Pre-training on several data sets at once: pairs, images alone from files of ViLT's scripts, texts alone; its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preprocessing.__main__ import main
from tests.support import foreign_shards, ranks
from tests.support.shards import make_caption_set, tiny_tokenizer

NAMES = ("ours", "vilt", "texts")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    make_caption_set(root / "ours", rows=20)
    make_caption_set(root / "ours", rows=8, split="val")
    foreign_shards.vilt_coco(root / "vilt", rows=6)
    (root / "lines.txt").write_text("\n".join(f"{i} images show a red square" for i in range(9)))
    assert main(["texts", "--texts", f"{root}/lines.txt", "--split", "train", "--out", f"{root}/texts"]) == 0
    tiny_tokenizer(root / "tokenizer")
    return root


def options(root: Path, out: Path, **more: object) -> list[str]:
    chosen = {
        "config": "tests/e2e/tiny.yaml",
        "data.sources": f"[{{path: {root}/vilt, weight: 1, modality: image}}, {{path: {root}/ours, weight: 2}}, "
        f"{{path: {root}/texts, weight: 1, modality: text}}]",
        "data.tokenizer": root / "tokenizer",
        "logging.wandb": "false",
        "output_dir": out,
        **more,
    }
    return [f"--{name}={value}" for name, value in chosen.items()]


def records(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "data/wait_fraction" in record]


def test_sources_are_counted_and_a_resumed_run_counts_on(prepared: Path, tmp_path: Path) -> None:
    window = {"data.shuffle_window": 16, "optimizer.total_steps": 6, "checkpoint.every": 3}
    ranks.run("eve_ds.pretrain", options(prepared, tmp_path / "whole", **window))
    whole = records(tmp_path / "whole")
    assert len(whole) == 6
    for record in whole:
        assert 0 <= record["data/wait_fraction"] <= 1 and record["data/replaced"] == 0
        assert sum(record[f"data/samples/{name}"] for name in NAMES) == record["samples"]
    shares = [whole[-1][f"data/samples/{name}"] / whole[-1]["samples"] for name in NAMES]
    assert 0.35 < shares[0] < 0.65 and min(shares[1:]) > 0.15
    validated = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"val/mim_loss", "val/mlm_loss", "val/mlm_loss_no_image"} <= validated.keys()  # of pairs
    for step in sorted((tmp_path / "whole" / "checkpoints").glob("step_*"))[1:]:
        for file in sorted(step.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        step.rmdir()
    ranks.run("eve_ds.pretrain", options(prepared, tmp_path / "whole", **window))
    again = records(tmp_path / "whole")[-3:]
    kept = ("step", "loss", "mim_loss", "mlm_loss", *(f"data/samples/{name}" for name in NAMES))
    assert [[record[key] for key in kept] for record in again] == [
        [record[key] for key in kept] for record in whole[3:]
    ]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("[]", "data.sources is empty"),
        ("[{path: a, weight: 1}, {path: b}]", "give one to every source, or to none"),
        ("[{path: a, weight: -1}]", "each must be positive"),
        ("[{path: a, wieght: 1}]", "wieght"),
        ("[{path: a}, {path: ./a}]", "more than once"),
        ("[{path: a, modality: sound}]", "data.sources[0].modality: expected one of pairs, image, text"),
        ("[{path: /nowhere/a}]", "/nowhere/a/train/manifest.json: no such file"),
    ],
)
def test_bad_sources_are_one_line(prepared: Path, tmp_path: Path, sources: str, words: str) -> None:
    arguments = options(
        prepared,
        tmp_path / "run",
        **{"data.sources": sources, "data.val_split": "null", "engine.expert_parallel_size": 1},
    )
    codes, output = ranks.finish(ranks.start("eve_ds.pretrain", arguments, 1))
    assert codes == [2] and words in output and "Traceback" not in output, output
    assert len([line for line in output.splitlines() if line.startswith("error:")]) == 1, output


def test_vilts_folder_serves_pretraining_and_finetuning(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "vilt"
    foreign_shards.vilt_coco(data)
    foreign_shards.vilt_vqa(data)  # all in one folder, as ViLT has it; without answers on test, and without a list
    path = {"data.sources": "null", "data.path": data, "engine.expert_parallel_size": 1, "optimizer.total_steps": 1}
    ranks.run("eve_ds.pretrain", options(prepared, tmp_path / "run", **path), 1)
    chosen = ["--task=vqa", f"--checkpoint={tmp_path / 'run'}", f"--data={data}", f"--output_dir={tmp_path / 'vqa'}"]
    chosen += ["--bs=4", "--optimizer.total_steps=2", "--logging.wandb=false", "--engine.expert_parallel_size=1"]
    output = ranks.run("eve_ds.finetune", chosen, 1)
    assert "the split has no answers to score them by" in output
    rows = json.loads((tmp_path / "vqa" / "predictions_test.json").read_text(encoding="utf-8"))
    assert len(rows) == 10 and {row["answer"] for row in rows} <= {"yes", "<1>", "red", "green", "blue", "yellow"}
    records = (tmp_path / "vqa" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert any("val/soft_accuracy" in json.loads(record) for record in records)
