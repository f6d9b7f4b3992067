"""The page of a run that trains: how far it is, when it ends, and what a half-written file does to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evaluation.common import InputError
from eve_ds.report import watch as watching
from eve_ds.report.__main__ import build
from eve_ds.report.watch import progress, watch
from eve_ds.weights.model_folder import metadata
from tests.support.page import Page


def trained(folder: Path, steps: int, config: str = "task: pretrain\noptimizer: {total_steps: 4}\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    lines = [json.dumps({"step": step + 1, "loss": 1.0}) + "\n" for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def exported(folder: Path, step: int) -> None:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.zeros(1)}, folder / "model" / "model.safetensors", metadata=metadata(step))


def test_a_page_says_how_far_the_run_is_and_reloads_itself(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 3)
    written = (run / "metrics.jsonl").stat().st_mtime
    state = progress(run, 7, now=written + 12)
    assert state.refresh == 7
    assert state.status.startswith("training, step 3 of 4, last record 12 seconds ago (written at ")
    assert "last record 0 seconds ago" in progress(run, 7, now=written - 5).status  # another machine's clock
    content = build(run, state)
    assert "step 3 of 4, last record 12 seconds ago" in Page(content).text
    assert '<meta http-equiv="refresh" content="7">' in content
    assert "refresh" not in build(run)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 4, "lo')
    assert "step 3 of 4" in progress(run, 7).status
    (run / "metrics.jsonl").unlink()
    assert progress(run, 7).status.startswith("training, step 0 of 4, no record yet")
    (run / "config.yaml").unlink()
    assert progress(run, 7).status.startswith("Waiting for the first step")


def test_a_run_that_patience_ended_early_is_finished_with_its_export(tmp_path: Path) -> None:
    config = "task: pretrain\noptimizer: {total_steps: 4}\ncheckpoint: {best: val/loss, patience: 1}\n"
    run = trained(tmp_path / "run", 3, config)
    exported(run, 2)  # of an end before: it went on with more patience
    assert progress(run, 7).status.startswith("training, step 3 of 4")
    exported(run, 3)
    assert progress(run, 7).status.startswith("finished at step 3 of 4")


def test_the_newest_start_says_how_long_the_run_is(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 3, "task: pretrain\noptimizer: {epochs: 2}\n")
    assert progress(run, 7).status.startswith("training, step 3, last record")
    (run / "provenance").mkdir()
    (run / "provenance" / "start_0001.json").write_text(json.dumps({"total_steps": 3}))
    assert progress(run, 7).status.startswith("training, step 3 of 3")  # its model is not exported yet
    exported(run, 3)
    state = progress(run, 7)
    assert state.status.startswith("finished at step 3 of 3") and state.refresh is None
    (run / "provenance" / "start_0002.json").write_text(json.dumps({"total_steps": 9}))  # extended
    assert progress(run, 7).status.startswith("training, step 3 of 9")
    trained(run, 9, "task: pretrain\noptimizer: {epochs: 2}\n")
    assert progress(run, 7).status.startswith("training, step 9 of 9")  # the model is still that of step 3


def test_a_run_without_export_ends_with_its_last_checkpoint_or_its_scores(tmp_path: Path) -> None:
    common = "optimizer: {total_steps: 3}\ncheckpoint: {export: false}\n"
    run = trained(tmp_path / "a", 3, f"task: pretrain\n{common}")
    for step, finished in ((2, False), (3, True)):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "complete.json").write_text("{}")
        assert (progress(run, 7).refresh is None) is finished
    run = trained(tmp_path / "b", 3, f"task: nlvr\nsplit: test\n{common}")
    for split, finished in (("val", False), ("test", True)):
        (run / f"predictions_{split}.csv").write_text("")
        assert (progress(run, 7).refresh is None) is finished
    (run / "provenance").mkdir()
    (run / "provenance" / "start_0002.json").write_text(json.dumps({"total_steps": 9}))  # extended
    assert progress(run, 7).refresh == 7


def test_a_stage_of_the_demo_is_named(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    exported(trained(tmp_path / "pretrain", 4), 4)
    trained(tmp_path / "vqa", 2)
    assert progress(tmp_path, 7).status.startswith("vqa: training, step 2 of 4")
    (tmp_path / "metrics.json").write_text("{}")
    assert progress(tmp_path, 7).refresh is None


def test_watching_goes_on_over_a_bad_moment_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, out = trained(tmp_path / "run", 3), tmp_path / "report.html"
    samples = run / "samples" / "samples.json"
    pages = []

    def sleep(seconds: float) -> None:
        """While the page is not written: a file is half there, then whole, then the run ends."""
        pages.append(out.read_text())
        if len(pages) == 1:
            samples.parent.mkdir()
            samples.write_text("{")
        elif len(pages) == 2:
            samples.write_text("{}")
            trained(run, 4)
        else:
            exported(run, 4)

    monkeypatch.setattr(watching.time, "sleep", sleep)
    watch(run, out, 7, build)
    assert ["step 3 of 4" in page for page in pages] == [True, True, False] and "training, step 4 of 4" in pages[2]
    assert "samples.json: invalid JSON at line 1 column 2: " in caplog.text and "trying again in 7 s" in caplog.text
    assert "finished at step 4 of 4" in out.read_text() and "refresh" not in out.read_text()


def test_a_folder_that_holds_no_run_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        watch(tmp_path, tmp_path / "report.html", 7, build)
    assert not (tmp_path / "report.html").exists()


def test_ctrl_c_leaves_a_page_that_does_not_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = trained(tmp_path / "run", 3), tmp_path / "report.html"

    def interrupted(seconds: float) -> None:
        assert "refresh" in out.read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(run, out, 7, build)
    assert "training, step 3 of 4" in out.read_text() and "refresh" not in out.read_text()
