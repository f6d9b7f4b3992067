"""``python -m eve_ds.sweep`` as it is typed: a row, its rival without pre-training, and again when all is done."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import retrieval
from tests.support.ranks import LIMIT, REPOSITORY
from tests.support.shards import make_caption_set, tiny_tokenizer

FINETUNE = """
objective: {embed_dim: 16}
data: {val_split: null}
optimizer: {lr: 1.0e-3}
engine: {global_batch_size: 8}
checkpoint: {every: 0, keep: 1, export: false}
logging: {wandb: false, eval_every: 0}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("sweep")
    for split, rows in (("train", 24), ("val", 6), ("test", 9)):
        make_caption_set(root / "captions", rows=rows, split=split)
    tiny_tokenizer(root / "tokenizer")
    (root / "itr.yaml").write_text(FINETUNE, encoding="utf-8")
    words = f"objective --seeds 1 --rows first_values,separate --steps 2 --finetune_steps 2 --jobs 2 --out {root}/out"
    words += f" --config tests/e2e/tiny.yaml --finetune_config {root}/itr.yaml"
    words += f" --data {root}/captions --tokenizer {root}/tokenizer -- --logging.wandb false"
    return words.split()


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eve_ds.sweep", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LIMIT)


def test_a_sweep_runs_its_rows_and_goes_on_where_it_was(sweep: list[str]) -> None:
    out = Path(sweep[sweep.index("--out") + 1])
    ended = run(sweep)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = json.loads((out / "table.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["first_values", "separate"] and table["reference"] == "separate"
    for row in table["rows"]:
        run_folder = out / row["row"] / "seed_0"
        official = run_folder / "official.json"  # what the evaluation command makes of the run's predictions
        predictions = f"{run_folder}/itr_coco/predictions_test.npz"
        assert retrieval.main(["--scores", predictions, "--out", str(official)]) is None
        expected = json.loads(official.read_text())
        for cell in row["scores"]:
            assert cell["seeds"] == [pytest.approx(expected[cell["measure"]])]
    separate = out / "separate/seed_0"
    command = json.loads((separate / "pretrain.json").read_text())["command"]
    assert f"    {command}\n" in ended.stdout and shlex.split(command)[:3] == ["python", "-m", "eve_ds.pretrain"]
    assert table["rows"][1]["minutes"] > 0 and (out / "table.md").read_text() in ended.stdout

    files = [separate / "pretrain/model/model.safetensors", *out.glob("*/seed_0/itr_coco/scores_test.json")]
    before = [file.stat().st_mtime_ns for file in files]
    again = run(sweep)
    assert again.returncode == 0 and (out / "table.md").read_text() in again.stdout and "done" not in again.stdout
    assert len(before) == 3 and [file.stat().st_mtime_ns for file in files] == before
