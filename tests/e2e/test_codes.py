"""Token targets from end to end: the example's tokenizer, the command `codes`, training on the column, the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.examples import image_codes
from eve_ds.report.__main__ import main as report
from preprocessing.__main__ import main as preprocessing
from tests.e2e.test_pretrain import documented, pattern_of
from tests.support import ranks
from tests.support.shapes import shapes_world

STEPS, VOCABULARY = 30, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shapes world with codes, the nearest of eight mean colors, of both splits."""
    folder = shapes_world(tmp_path_factory.mktemp("world"))
    size = ["--image_size", "64", "--patch_size", "16", "--vocabulary", str(VOCABULARY)]
    image_codes.main([str(folder / "data"), str(folder / "codes.npz"), *size])
    command = ["codes", "--data", str(folder / "data"), "--codes", str(folder / "codes.npz")]
    command += ["--vocabulary", str(VOCABULARY), "--out", str(folder / "coded")]
    assert preprocessing(command) == 0 and preprocessing(["verify", str(folder / "coded")]) == 0
    return folder


def options(world: Path, run: Path, *more: str) -> list[str]:
    model = [
        "--model.image_size=64",
        "--model.patch_size=16",
        "--model.max_text_length=32",
        "--model.text_positions=32",
    ]
    data = ["--data.crop_scale=null", "--data.flip=false", "--data.augmentation=none"]
    data += [f"--data.path={world / 'coded'}", f"--data.tokenizer={world / 'tokenizer'}"]
    engine = [
        "--engine.expert_parallel_size=1",
        "--engine.precision=fp32",
        "--logging.wandb=false",
        "--checkpoint.every=0",
    ]
    common = ["--config=tests/e2e/tiny.yaml", "--task=mlm_mim_codes", f"--output_dir={run}", *model, *data, *engine]
    return [*common, *more]


def test_codes_are_learned_and_shown(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = [
        f"--optimizer.total_steps={STEPS}",
        "--engine.micro_batch_size=8",
        "--logging.eval_every=0",
        "--logging.images_every=20",
    ]
    ranks.run("eve_ds.pretrain", options(world, run, *more), world_size=1)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["mim_code_loss"] for record in records if "lr" in record]
    assert len(losses) == STEPS and sum(losses[-5:]) < 0.8 * sum(losses[:3]) * 5 / 3
    logged = {key for record in records for key in record}
    assert {"val/mim_code_loss", "val/mim_code_accuracy_shuffled", "mim_code_accuracy"} <= logged
    assert not {key for key in logged if pattern_of(key) not in documented()}
    shown = json.loads((run / "samples/samples.json").read_text())
    assert {"original", "masked", "right"} <= shown["images"][0].keys()
    for kind in ("original", "masked", "right"):
        assert (run / "samples" / shown["images"][0][kind]).is_file()
        assert (run / f"samples/step_00000020/p0_{kind}.png").is_file()
    report(["--run", str(run), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "whose code the model predicted" in page and "Codes of masked patches: accuracy" in page


def test_without_codes_a_run_ends_in_a_line(world: Path, tmp_path: Path) -> None:
    codes, text = ranks.finish(
        ranks.start("eve_ds.pretrain", options(world, tmp_path / "run", f"--data.path={world / 'data'}"), 1)
    )
    assert codes == [2]
    assert text == (
        f"error: {world}/data/train/shard-00000.arrow: has no column 'codes', which --task mlm_mim_codes predicts; "
        "add codes with `python -m preprocessing codes`\n"
    )
