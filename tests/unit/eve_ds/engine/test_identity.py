"""What decides whether a run may go on: what changes its result, not where things lie or how paths are spelled."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from eve_ds import config as config_tree
from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.data_config import DataSource
from eve_ds.engine import first_weights, run_folder, setup
from eve_ds.engine.identity import SHOWN, Identity, Input, identity_of, summarized
from eve_ds.finetune_options import expand_options
from eve_ds.weights.model_folder import metadata
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import train_tokenizer
from tests.support.shards import make_caption_set

Config = PretrainConfig | FinetuneConfig


def pretraining(data: Path, output: Path | None = None) -> PretrainConfig:
    config = PretrainConfig(output_dir=str(output or data / "run"))
    config.data.path, config.data.tokenizer = str(data / "captions"), str(data / "tokenizer")
    return config


def of(config: Config) -> Identity:
    split = setup.build_dataset(config, config.data.train_split, setup.build_tokenizer(config), train=True)
    return setup.identity(config, split)


def changed(config: PretrainConfig, key: str, value: object) -> PretrainConfig:
    """A copy with another value at a dotted key."""
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})  # type: ignore[arg-type]
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def begun(folder: Path, config: Config) -> None:
    """A run whose first step is logged."""
    run_folder.claim(config, of(config))
    (folder / "metrics.jsonl").write_text("")


def same_place(data: Path) -> Config:
    return pretraining(data)


def trailing_slash(data: Path) -> Config:
    return changed(pretraining(data), "data.path", f"{data}/captions/")


def relative(data: Path) -> Config:
    config = changed(pretraining(data), "data.path", os.path.relpath(data / "captions"))
    return changed(config, "data.tokenizer", os.path.relpath(data / "tokenizer" / "tokenizer.json"))


def moved(data: Path) -> Config:
    for name in ("captions", "tokenizer"):
        (data / name).rename(data / f"moved_{name}")
    config = changed(pretraining(data), "data.path", str(data / "moved_captions"))
    return changed(config, "data.tokenizer", str(data / "moved_tokenizer"))


def linked(data: Path) -> Config:
    (data / "link").symlink_to(data / "captions")
    (data / "folder").symlink_to(data / "run")
    return changed(pretraining(data, data / "folder"), "data.path", str(data / "link"))


def one_source(data: Path) -> Config:
    config = changed(pretraining(data), "data.path", "")
    return changed(config, "data.sources", [DataSource(str(data / "captions"))])


def what_is_not_learned(data: Path) -> Config:
    config = changed(changed(pretraining(data), "logging.samples", 3), "data.val_split", None)
    config = changed(changed(config, "optimizer.epochs", 9.0), "data.num_workers", 2)
    config = changed(config, "optimizer.ema", 0.9)
    return changed(changed(config, "model.checkpoint_activations", True), "engine.micro_batch_size", 1)


SAME = [same_place, trailing_slash, relative, moved, linked, one_source, what_is_not_learned]


@pytest.mark.parametrize("other", SAME)
def test_a_run_goes_on_wherever_its_data_lie(other: Callable[[Path], Config], data: Path) -> None:
    begun(data / "run", pretraining(data))
    config = other(data)
    found = run_folder.claim(config, of(config))
    assert found.differences(of(config)) == []
    stored = yaml.safe_load((data / "run" / "config.yaml").read_text())
    assert stored["data"]["path"] == config.data.path  # the new place


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.lr", 1.0, "optimizer.lr is 0.0005 there and 1.0 here"),
        ("model.drop_path", 0.0, "model.drop_path is 0.1 there and 0.0 here"),
        ("objective.mode", "joint", "objective.mode is 'separate' there and 'joint' here"),
        ("engine.global_batch_size", 8, "engine.global_batch_size is 256 there and 8 here"),
        ("data.flip", False, "data.flip is True there and False here"),
    ],
)
def test_a_setting_that_changes_the_result_is_named(key: str, value: object, words: str, data: Path) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    other = changed(config, key, value)
    with pytest.raises(UserError, match=rf"run holds another run: {words}; make these equal to go on, or choose"):
        run_folder.claim(other, of(other))
    assert json.loads((data / "run" / "identity.json").read_text()) == of(config).tree()  # as it was


def test_other_data_at_the_same_place_are_told(data: Path) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    shutil.rmtree(data / "captions")
    make_caption_set(data / "captions", rows=7, split="train")
    train_tokenizer(["words of another kind"], 280).save(data / "tokenizer")
    place = rf"{data}/captions/train"
    with pytest.raises(UserError) as error:
        run_folder.claim(config, of(config))
    message = str(error.value)
    assert f"training data is {place} (6 rows, SHA-256 " in message and f" and {place} (7 rows, SHA-256 " in message
    assert f"tokenizer is {data}/tokenizer/tokenizer.json (" in message and "entries, SHA-256 " in message


def test_other_answers_are_another_run(data: Path) -> None:
    config = FinetuneConfig(task="vqa", output_dir=str(data / "run"))
    config.data.path, config.data.tokenizer = str(data / "vqa"), str(data / "tokenizer")
    begun(data / "run", config)
    answers = json.loads((data / "vqa" / "answer_list.json").read_text())
    (data / "vqa" / "answer_list.json").write_text(json.dumps(answers[::-1]))
    with pytest.raises(UserError, match=r"holds another run: answer list is .*/vqa \(SHA-256 \w+\) there and"):
        run_folder.claim(config, of(config))


def test_a_score_in_the_folder_of_a_training_run_is_told_what_to_give(data: Path) -> None:
    config = FinetuneConfig(task="vqa", output_dir=str(data / "run"))
    config.data.path, config.data.tokenizer = str(data / "vqa"), str(data / "tokenizer")
    begun(data / "run", config)
    scoring = dataclasses.replace(config, evaluate=True, split="train")

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            run_folder.claim(scoring, of(scoring))
        assert "--resume_from" not in str(error.value)
        start = (
            f"--output_dir {data}/run holds a training run; scores go into a folder of their own, so choose another "
        )
        assert str(error.value).startswith(f"{start}--output_dir (")
        return str(error.value).removeprefix(f"{start}--output_dir (")

    assert refusal() == "the run has saved nothing yet that could be scored)"
    newest = data / "run" / "checkpoints" / "step_00000002"
    newest.mkdir(parents=True)
    (newest / "complete.json").write_text("{}")
    assert refusal() == f"the run is unfinished: --checkpoint {data}/run scores its newest checkpoint, {newest})"
    (data / "run" / "model").mkdir()
    save_file({"x": torch.zeros(1)}, data / "run" / "model" / "model.safetensors", metadata=metadata(2))
    assert refusal() == f"--checkpoint {data}/run/model scores the run's model)"
    begun(data / "scores", dataclasses.replace(scoring, output_dir=str(data / "scores")))
    training = dataclasses.replace(config, output_dir=str(data / "scores"))
    with pytest.raises(UserError, match=r"run: evaluate is True there and False here; .* another folder$"):
        run_folder.claim(training, of(training))  # scores have no checkpoint to branch from


def test_first_weights_count_by_content_and_may_be_gone_later(data: Path) -> None:
    for name, value in (("a", b"a"), ("copy", b"a"), ("b", b"b")):
        (data / name).mkdir()
        (data / name / "model.safetensors").write_bytes(value * 70_000)
    config = pretraining(data)
    config.init_from = str(data / "a")
    config.model.vocab_size = setup.build_tokenizer(pretraining(data)).vocab_size  # the weights bring no tokenizer
    begun(data / "run", config)
    copy, other = (dataclasses.replace(config, init_from=str(data / name)) for name in ("copy", "b"))
    run_folder.claim(copy, of(copy))
    for wrong, told_as in ((other, rf"{data}/b \(SHA"), (dataclasses.replace(config, init_from=None), "null here")):
        with pytest.raises(UserError, match=rf"init_from is {data}/copy \(SHA-256 \w+\) there and {told_as}"):
            run_folder.claim(wrong, of(wrong))
    shutil.rmtree(data / "copy")
    with pytest.raises(UserError, match="copy: no such file or folder"):
        of(copy)
    checkpoint = data / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}")
    found = run_folder.claim(copy, of(copy)).inputs["init_from"]
    assert found is not None and found.hash  # it is remembered, and needed no more
    never = dataclasses.replace(config, init_from=str(data / "never"))
    with pytest.raises(UserError, match=rf"never \(no such.* here \(give --init_from {data}/copy\)"):
        run_folder.claim(never, of(never))
    assert first_weights.goes_on(copy)
    (data / "b" / "hashes.json").write_text("{}")  # damaged weights are no weights that are gone
    with pytest.raises(UserError, match=r"b/hashes\.json: is damaged"):
        first_weights.source(other)
    with pytest.raises(UserError, match=r"b/hashes\.json: is damaged"):
        first_weights.origin(other)
    options = ["--task", "vqa", "--output_dir", str(data / "run"), "--checkpoint"]
    with pytest.raises(UserError, match=r"b/hashes\.json: is damaged"):
        expand_options([*options, str(data / "b")])
    _, defaults = expand_options([*options, str(data / "copy")])  # gone: the model is that of the run itself
    assert defaults["model.dim"] == config.model.dim


def test_a_setting_that_an_older_version_did_not_have_counts_by_its_default(data: Path) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    for name in ("identity.json", "config.yaml"):
        path = data / "run" / name
        tree = yaml.safe_load(path.read_text()) if name == "config.yaml" else json.loads(path.read_text())
        settings = tree.get("settings")
        del (settings if settings else tree["optimizer"])["optimizer.weight_decay" if settings else "weight_decay"]
        path.write_text(yaml.safe_dump(tree) if name == "config.yaml" else json.dumps(tree))
        stored = path.read_bytes()
        run_folder.claim(config, of(config))
        other = changed(config, "optimizer.weight_decay", 0.5)
        path.write_bytes(stored)
        with pytest.raises(UserError, match=r"optimizer\.weight_decay is 0.05 there and 0.5 here"):
            run_folder.claim(other, of(other))
        (data / "run" / "identity.json").unlink(missing_ok=True)  # and a run that stored none is known by its config


def test_a_run_of_another_kind_is_another_run(data: Path) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    other = FinetuneConfig(task="vqa", output_dir=config.output_dir)
    for stored in (True, False):
        if not stored:
            (data / "run" / "identity.json").unlink()
        with pytest.raises(UserError, match="task is 'pretrain' there and 'vqa' here"):
            run_folder.claim(other, identity_of(other, {}))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 5, "inputs": {}}', '{"inputs": {}}', "[" * 99999])
def test_a_damaged_identity_is_made_up_from_the_config(text: str, data: Path) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    (data / "run" / "identity.json").write_text(text)
    run_folder.claim(config, of(config))
    assert json.loads((data / "run" / "identity.json").read_text()) == of(config).tree()
    (data / "run" / "identity.json").write_text(text)
    (data / "run" / "config.yaml").write_text("model: 5")
    with pytest.raises(UserError, match=r"config\.yaml: not the readable config of a run"):
        run_folder.claim(config, of(config))


def test_a_checkpoint_of_an_older_version_is_known_by_its_hashes() -> None:
    stored = {"configuration": "x", "tokenizer": "aa", "training data": "bb"}
    now = identity_of(PretrainConfig(), {"tokenizer": Input("/t", "aa"), "training data": Input("/d", "cc", "3 rows")})
    found = Identity.from_tree(stored).differences(now)
    assert found == ["training data is one (SHA-256 bb) there and /d (3 rows, SHA-256 cc) here"]


def test_a_message_tells_some_differences() -> None:
    assert summarized(["a"]) == "a" and summarized(["a", "b"]) == "a; b"
    assert summarized([str(i) for i in range(SHOWN + 3)]).endswith("; and 3 more")


def test_a_run_folder_takes_the_same_run_alone(tmp_path: Path) -> None:
    config = PretrainConfig(output_dir=str(tmp_path / "run"))
    run_folder.claim(config, identity_of(config, {}))
    other = changed(config, "optimizer.lr", 1.0)
    run_folder.claim(other, identity_of(other, {}))  # nothing has run yet: a start that failed leaves its config alone
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    run_folder.claim(other, identity_of(other, {}))
    assert config_tree.load_model_config(tmp_path / "run" / "config.yaml") == other.model
    again = changed(other, "checkpoint.resume", False)
    with pytest.raises(UserError, match="resume is false"):
        run_folder.claim(again, identity_of(again, {}))  # type: ignore[arg-type]


def test_a_run_that_is_further_than_it_shall_go_is_refused(data: Path) -> None:
    config = pretraining(data)
    begun(data / "run", config)
    (data / "run" / "checkpoints" / "step_00000006").mkdir(parents=True)
    (data / "run" / "checkpoints" / "step_00000006" / "complete.json").write_text("{}")
    before = (data / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"run: the run is at step 6, and is to have 5 in all; raise optimizer\.total_"):
        run_folder.claim(config, of(config), 5)
    assert (data / "run" / "config.yaml").read_bytes() == before
    run_folder.claim(config, of(config), 6)


def test_a_dry_run_claims_nothing(data: Path) -> None:
    config = pretraining(data)
    config.dry_run = True
    run_folder.claim(config, of(config), 5)
    assert not (data / "run").exists()
    config.output_dir = str(data / "captions")
    with pytest.raises(UserError, match="holds files but no run"):
        run_folder.claim(config, of(config), 5)


def test_a_dry_run_tells_that_a_folder_cannot_be_written_to(data: Path) -> None:
    closed = data / "closed"
    closed.mkdir(mode=0o555)
    config = pretraining(data, closed / "runs" / "run")
    config.dry_run = True
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(closed)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root writes anywhere, but on a read-only file system, and may mount none here")
    try:
        with pytest.raises(UserError, match=rf"--output_dir {closed}/runs/run: {closed} is no folder that can be wri"):
            run_folder.claim(config, of(config), 5)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(closed)], check=True)
    (data / "file").touch()
    (data / "file").chmod(0o777)
    config.output_dir = str(data / "file" / "run")
    with pytest.raises(UserError, match=f"{data}/file is no folder"):
        run_folder.claim(config, of(config), 5)


def test_what_a_killed_export_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    config = PretrainConfig(output_dir=str(tmp_path / "run"))
    run_folder.claim(config, identity_of(config, {}))
    model, kept = tmp_path / "run/model", {"model.safetensors", "predictions_test.npz", ".report.html.0123abcd"}
    script = (
        "import os, sys; from preprocessing.local_files import write_atomic\n"
        "os.replace = lambda *paths: os._exit(9)\nwrite_atomic(sys.argv[1], b'half')"
    )
    theirs = {
        ".config.old.yaml",
        ".notes.2026.txt",
        ".README.markdown",
        ".tokenizer.json.backup01",
        ".predictions_test.npz.mine",
    }
    kept |= theirs
    averaged = tmp_path / "run/model_ema/model.safetensors"
    for path in (model / "model.safetensors", model / "config.yaml", averaged, tmp_path / "run/predictions_test.npz"):
        assert subprocess.run([sys.executable, "-c", script, path]).returncode == 9
        assert list(path.parent.glob(f".{path.name}.*"))
    for name in kept:
        (model.parent if name.startswith("p") or ".npz" in name or ".html" in name else model).joinpath(name).touch()
    config.dry_run = True
    run_folder.claim(config, identity_of(config, {}))
    assert len(list((tmp_path / "run").rglob(".*.*"))) == 5 + len(theirs), "a dry run deletes nothing"
    config.dry_run = False
    run_folder.claim(config, identity_of(config, {}))
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == kept | {run_folder.CONFIG, run_folder.IDENTITY, run_folder.LOCK}


def test_a_branch_keeps_what_its_tensors_need(data: Path) -> None:
    before = of(pretraining(data))
    free = changed(changed(pretraining(data), "optimizer.lr", 1.0), "engine.global_batch_size", 8)
    free = changed(changed(free, "data.flip", False), "model.drop_path", 0.5)
    free = changed(changed(free, "objective.mode", "joint"), "objective.pixel_target", "raw")
    free = changed(changed(free, "objective.image_masking", "blockwise"), "objective.word_masking", "whole_words")
    free = changed(free, "objective.mask_replacement", [0.8, 0.1, 0.1])
    assert before.for_a_branch().differences(of(free).for_a_branch()) == []
    for key, value in (
        ("model.dim", 96),
        ("model.top_k", 1),
        ("objective.decoder_dim", 8),
        ("objective.mode", "mlm"),
        ("objective.word_head", "mlp"),
        ("engine.precision", "fp32"),
    ):
        found = before.for_a_branch().differences(of(changed(pretraining(data), key, value)).for_a_branch())
        assert len(found) == 1 and found[0].startswith(f"{key} is ")
    train_tokenizer(["words of another kind"], 280).save(data / "tokenizer")
    (found,) = before.for_a_branch().differences(of(pretraining(data)).for_a_branch())
    assert found.startswith("tokenizer is ")


def test_a_branch_needs_a_folder_of_its_own(data: Path) -> None:
    begun(data / "run", pretraining(data))
    (data / "run" / "checkpoints" / "step_00000006").mkdir(parents=True)
    (data / "run" / "checkpoints" / "step_00000006" / "complete.json").write_text("{}")
    config = pretraining(data, data / "branch")
    for place in (data / "run", data / "run" / "checkpoints" / "step_00000006"):
        config.resume_from = str(place)
        run_folder.claim(config, of(config), 9)
        within = dataclasses.replace(config, output_dir=str(data / "run"))
        with pytest.raises(UserError, match=rf"--resume_from {place}: lies in --output_dir itself"):
            run_folder.claim(within, of(within), 9)
    assert of(config).inputs["resume_from"] == Input(str(place), of(config).inputs["resume_from"].hash, "step 6")  # type: ignore[union-attr]
    config.resume_from = str(data / "nothing")
    with pytest.raises(
        UserError, match=r"--resume_from .*nothing: no complete checkpoint; give RUN/checkpoints/step_N"
    ):
        of(config)
