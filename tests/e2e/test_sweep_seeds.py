"""``python -m eve_ds.sweep seeds`` as it is typed: two seeds side by side, and a third one later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from tests.support.ranks import LIMIT, REPOSITORY
from tests.support.shards import make_vqa_set, tiny_tokenizer

RECIPE = """
model: {image_size: 32, patch_size: 16, dim: 16, depth: 1, num_heads: 2, mlp_hidden: 32, vocab_size: 400,
        max_text_length: 16, text_positions: 16, soft_layers: []}
data: {val_split: null}
optimizer: {lr: 1.0e-3, total_steps: 2}
engine: {global_batch_size: 8}
checkpoint: {every: 0, keep: 1, export: false}
logging: {wandb: false}
"""


def test_a_seed_is_run_once_and_each_score_has_its_mean_and_spread(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_vqa_set(tmp_path / "vqa", rows=9, split=split)
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "vqa.yaml").write_text(RECIPE)
    run = f"eve_ds.finetune --config {tmp_path}/vqa.yaml --task vqa --data {tmp_path}/vqa"
    words = ["--jobs", "2", "--out", f"{tmp_path}/out", "--", *run.split(), "--data.tokenizer", f"{tmp_path}/tokenizer"]

    def seeds(count: int) -> str:
        command = [sys.executable, "-m", "eve_ds.sweep", "seeds", "--seeds", str(count), *words]
        own = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=LIMIT)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def files(count: int) -> list[Path]:
        return [tmp_path / f"out/seed_{seed}/scores_test.json" for seed in range(count)]

    assert "[2/2]" in seeds(2)
    before = [file.stat().st_mtime_ns for file in files(2)]
    assert "[1/1] seed 2: done" in seeds(3)
    assert [file.stat().st_mtime_ns for file in files(2)] == before
    scores = [json.loads(file.read_text()) for file in files(3)]
    found = json.loads((tmp_path / "out/seeds.json").read_text())
    assert found["split"] == "test" and found["metrics"].keys() == scores[0].keys() - {"intervals", "about"}
    for name, each in found["metrics"].items():
        values = [one[name] for one in scores]
        assert each == {"mean": fmean(values), "deviation": stdev(values), "n": 3, "values": values}
    configs = [(file.parent / "config.yaml").read_text() for file in files(3)]
    assert [f"seed: {seed}\n" in config for seed, config in enumerate(configs)] == [True] * 3
