"""Which weights a path means: never an export that the run has left behind, a checkpoint where it can be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from eve_ds.convert.__main__ import main
from eve_ds.errors import exit_code
from eve_ds.finetune_options import expand_options
from eve_ds.tasks import load_task_model
from eve_ds.weights.model_folder import (
    ModelFolder,
    checkpoints,
    exported_step,
    metadata,
    newer_checkpoint,
    run_of,
    step_of,
)
from preprocessing.errors import UserError
from tests.support.shards import tiny_tokenizer
from tests.support.tiny_tasks import OBJECTIVE, tiny_config, tiny_task


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was exported at step 4, the step of its newest checkpoint."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in tiny_task("pretrain").state_dict().items()}
    save_file(state, folder / "model" / "model.safetensors", metadata=metadata(4))
    tree = {"model": dataclasses.asdict(tiny_config()), "objective": dataclasses.asdict(OBJECTIVE)}
    tree |= {"optimizer": {"total_steps": 4}, "data": {"tokenizer": None}}
    for place in (folder, folder / "model"):
        (place / "config.yaml").write_text(yaml.safe_dump(tree))
    saved(folder, 2)
    saved(folder, 4)
    return folder


def saved(run: Path, step: int, whole: bool = True) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    if whole:
        (folder / "complete.json").write_text("{}")
    return folder


def test_an_export_of_the_newest_step_is_the_model(run: Path) -> None:
    assert exported_step(run / "model") == 4 and newer_checkpoint(run) is None
    saved(run, 6, whole=False)
    (run / "checkpoints" / "step_00000008.damaged").mkdir()
    (run / "checkpoints" / "step_00000008.damaged" / "complete.json").write_text("{}")
    for unfinished in (True, False):
        assert ModelFolder.find(run, unfinished).weights == run / "model" / "model.safetensors"
    assert [path.name for path in checkpoints(run)] == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("link", ["best", "step_00000004", "run/best/", "."])
def test_a_checkpoint_by_another_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """A link to a checkpoint, and the folder that the shell is in."""
    step = run / "checkpoints" / "step_00000002"
    (run / "best").symlink_to(step)
    (tmp_path / "step_00000004").symlink_to(step)
    (tmp_path / "best").symlink_to("run/best")
    monkeypatch.chdir(step if link == "." else tmp_path)
    for files in (ModelFolder.find(link, unfinished=True), ModelFolder.checkpoint(link)):
        assert files.weights == step and files.folder == run and step_of(files.weights) == 2
    assert run_of(Path(link)) == run


def test_links_of_checkpoints_folders_stay_in_their_run(run: Path, tmp_path: Path) -> None:
    """Checkpoints on scratch, linked into the run: the run is where the link is."""
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    assert run_of(run / "checkpoints" / "step_00000002") == run
    (tmp_path / "latest").symlink_to(run / "checkpoints" / "step_00000004")
    assert run_of(tmp_path / "latest") == run
    (tmp_path / "blob").mkdir()
    (tmp_path / "scratch" / "step_00000004").rename(tmp_path / "blob" / "data")
    (tmp_path / "scratch" / "step_00000004").symlink_to(tmp_path / "blob" / "data")
    assert run_of(tmp_path / "latest") == run and step_of(ModelFolder.checkpoint(tmp_path / "latest").weights) == 4
    (tmp_path / "loop").symlink_to("loop")
    assert run_of(tmp_path / "loop") is None


def test_a_folder_in_the_place_of_complete_json_is_refused(run: Path) -> None:
    (saved(run, 6, whole=False) / "complete.json").mkdir()
    with pytest.raises(UserError, match=r"step_00000006/complete\.json: is not a file; name another checkpoint"):
        ModelFolder.find(run, unfinished=True)


def test_an_older_export_is_not_the_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = saved(run, 6)
    words = (
        f"{run}: its newest state is a checkpoint, {newest} (its model is of step 4; name {run}/model to take that); "
        f"convert it to a model first: python -m eve_ds.convert from-deepspeed --checkpoint {run} --out MODEL"
    )
    with pytest.raises(UserError) as error:
        load_task_model("pretrain", run)
    assert str(error.value) == words
    monkeypatch.setattr(
        "sys.argv", ["convert", "to-published", "--checkpoint", str(run), "--out", f"{tmp_path}/eve.th"]
    )
    assert exit_code(main) == 2 and words in capsys.readouterr().err
    files = ModelFolder.find(run, unfinished=True)
    assert files.is_checkpoint and files.weights == newest and files.folder == run.absolute()
    assert torch.isfinite(next(load_task_model("pretrain", run / "model").parameters())).all()  # it was named itself


def test_exports_of_older_versions_take_the_step_from_the_config(run: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in tiny_task("pretrain").state_dict().items()}
    save_file(state, run / "model" / "model.safetensors", metadata={"format": "eve-ds"})
    assert exported_step(run / "model") == 4
    newest = saved(run, 6)
    assert newer_checkpoint(run) == newest
    (run / "model" / "config.yaml").write_text("model: {}")
    assert exported_step(run / "model") is None and newer_checkpoint(run) is None  # unknown: as it was


def test_a_run_without_an_export_is_its_newest_checkpoint(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()
    last = run / "checkpoints" / "step_00000004"
    with pytest.raises(
        UserError, match=r"its newest state is a checkpoint, .*step_00000004; convert it to a model first"
    ):
        ModelFolder.find(run)
    assert ModelFolder.find(run, unfinished=True).weights == ModelFolder.checkpoint(run).weights == last
    first = run / "checkpoints" / "step_00000002"
    with pytest.raises(UserError, match="step_00000002: a checkpoint of DeepSpeed; convert"):
        ModelFolder.find(first)
    assert ModelFolder.find(first, unfinished=True).weights == first
    assert ModelFolder.find(first, unfinished=True).tokenizer is None
    words = tiny_tokenizer(run)  # the run's own copy
    assert ModelFolder.find(first, unfinished=True).tokenizer == words.path
    for path in checkpoints(run):
        (path / "complete.json").unlink()
    for find in (ModelFolder.find, ModelFolder.checkpoint):
        with pytest.raises(UserError, match="no complete checkpoint; give"):
            find(run)


def test_a_file_of_a_checkpoint_and_the_checkpoints_folder_are_refused(run: Path) -> None:
    step = run / "checkpoints" / "step_00000002"
    for unfinished in (True, False):
        with pytest.raises(UserError, match=rf"complete\.json: is one file of a checkpoint; name its folder, {step}"):
            ModelFolder.find(step / "complete.json", unfinished)
        with pytest.raises(UserError, match=f"checkpoints: holds all checkpoints; name one of them, or the run, {run}"):
            ModelFolder.find(run / "checkpoints", unfinished)


def test_fine_tuning_finds_the_config_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step_00000002"
    for options in ([f"--checkpoint={step}"], [f"--resume_from={step}"], ["--resume_from", str(run)]):
        rest, defaults = expand_options(options)
        assert defaults["model.dim"] == tiny_config().dim
        assert rest == [
            *(["--init_from"] if "checkpoint=" in options[0] else ["--resume_from"]),
            options[-1].split("=")[-1],
        ]
    gone = [f"--checkpoint={tmp_path / 'gone'}", f"--output_dir={run}"]
    assert expand_options(gone)[1]["model.dim"] == tiny_config().dim
    with pytest.raises(UserError, match="gone: no such file or folder"):
        expand_options([gone[0], f"--output_dir={tmp_path / 'new'}"])
