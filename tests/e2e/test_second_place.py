"""A run whose disk is lost goes on from its second place, as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.support import interrupted, ranks
from tests.support.s3 import BUCKET, S3, s3_server
from tests.support.shards import make_vqa_set, tiny_tokenizer

STEPS = 8


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def test_two_ranks_whose_disk_is_lost_go_on_bit_for_bit(s3: S3, tiny_run: list[str], tmp_path: Path) -> None:
    run, uri = tmp_path / "run", f"s3://{BUCKET}/lost"
    whole = interrupted.undisturbed(tiny_run, tmp_path / "whole", STEPS)
    second = [*tiny_run, f"--checkpoint.second_place={uri}"]
    started = interrupted.start(second, run, STEPS, keep=2)
    interrupted.until(started, lambda: any("complete.json" in name for name in s3.names("lost/checkpoints")))
    interrupted.kill(started)
    newest = max(int(name[5:13]) for name in s3.names("lost/checkpoints") if name.endswith("/complete.json"))
    shutil.rmtree(run)
    codes, text = ranks.finish(interrupted.start(second, run, STEPS, keep=2))
    assert codes == [0, 0] and f"training from step {newest} to step {STEPS}" in text, text
    assert interrupted.records(run) == interrupted.records(whole)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)
    there = set(s3.names("lost"))
    for step, files in interrupted.saved(run).items():  # those that are kept here are whole there
        for name, (size, _) in files.items():
            assert len(s3.read(f"lost/checkpoints/step_{step:08d}/{name}")) == size
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/step")} == {
        f"step_{step:08d}" for step in interrupted.saved(run)
    }
    for name in (
        "metrics.jsonl",
        "config.yaml",
        "identity.json",
        "model/model.safetensors",
        "provenance/start_0002.json",
    ):
        assert s3.read(f"lost/{name}") == (run / name).read_bytes(), name
    assert not [name for name in there if "/." in name or name.startswith(".")]


def test_a_stop_is_copied_within_the_grace_time(tiny_run: list[str], tmp_path: Path) -> None:
    run, second = tmp_path / "run", tmp_path / "second"
    options = [*tiny_run, f"--checkpoint.second_place=file://{second}", "--checkpoint.every=0"]
    started = interrupted.start([*options], run, 10_000, keep=2)
    interrupted.until(started, lambda: bool(interrupted.records(run)))
    for rank in started:
        rank.terminate()
    codes, text = ranks.finish(started)
    assert codes == [75, 75], text
    assert interrupted.saved(run) == interrupted.saved(second) and interrupted.saved(run)
    assert json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["step"] == max(interrupted.saved(run))


def test_a_run_that_ends_with_an_error_copies_what_it_has(tiny_run: list[str], tmp_path: Path) -> None:
    run, second = tmp_path / "run", tmp_path / "second"
    interrupted.undisturbed(tiny_run, run, 2)
    options = [*tiny_run, f"--checkpoint.second_place=file://{second}", "--checkpoint.best=val/nothing"]
    codes, text = ranks.finish(interrupted.start(options, run, 4, keep=9))
    assert codes[0] == 2 and "checkpoint.best=val/nothing: evaluations find no such metric" in text, text
    assert (second / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_what_is_not_there_is_copied_by_the_next_start_and_another_run_is_refused(
    tiny_run: list[str], tmp_path: Path
) -> None:
    run, second = tmp_path / "run", tmp_path / "second"
    interrupted.undisturbed(tiny_run, run, 4)
    options = [*tiny_run, f"--checkpoint.second_place=file://{second}"]
    codes, text = ranks.finish(interrupted.start(options, run, 4, keep=9))
    assert codes == [0, 0], text
    assert max(interrupted.saved(second)) == 4 and interrupted.saved(second)[4] == interrupted.saved(run)[4]
    other = [*options, "--optimizer.lr=1e-3"]
    codes, text = ranks.finish(interrupted.start(other, tmp_path / "other", 4, keep=9))
    assert codes[0] == 2 and "Traceback" not in text, text
    assert "holds another run: optimizer.lr is 0.01 there and 0.001 here" in text and text.count("error:") == 1
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_scores_and_predictions_are_copied_and_one_place_is_for_one_run(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_vqa_set(tmp_path / "vqa", rows=8, split=split)
    tiny_tokenizer(tmp_path / "tokenizer")
    run, second = tmp_path / "run", tmp_path / "second"
    options = ["--task=vqa", f"--data={tmp_path / 'vqa'}", f"--output_hdfs=file://{second}", "--logging.wandb=false"]
    own = [f"--data.tokenizer={tmp_path / 'tokenizer'}", "--data.val_split=null", "--optimizer.total_steps=2"]
    tree = yaml.safe_load((ranks.REPOSITORY / "tests/e2e/tiny.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": tree["model"]}))
    recipe = [f"--config={tmp_path / 'recipe.yaml'}", "--bs=8", "--engine.precision=fp32", *own]
    ranks.run("eve_ds.finetune", [*options, *recipe, f"--output_dir={run}"], 1)
    names = {path.name for path in run.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert {"scores_test.json", "predictions_test.json", "metrics.jsonl"} <= names
    for name in (*names, "model/model.safetensors"):
        assert (second / name).read_bytes() == (run / name).read_bytes(), name
    scoring = [*options, "--evaluate", f"--checkpoint={run}", f"--output_dir={tmp_path / 'scored'}"]
    codes, text = ranks.finish(ranks.start("eve_ds.finetune", scoring, 1))
    assert codes == [2] and "holds another run" in text and "Traceback" not in text, text
    ranks.run("eve_ds.finetune", [*scoring, f"--output_hdfs=file://{tmp_path / 'scores'}"], 1)
    again, scores = (json.loads((place / "scores_test.json").read_text()) for place in (tmp_path / "scores", second))
    assert again.pop("about")["checkpoint"]["sha256"] == scores.pop("about")["checkpoint"]["sha256"]
    assert again == scores
