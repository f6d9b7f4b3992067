"""DeepSpeed settings, schedule, parameter groups, run folders: what is decided before a rank trains."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eve_ds.config import DataConfig, FinetuneConfig, PretrainConfig
from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.data.data_config import DataSource
from eve_ds.engine import batches, distributed, run_folder, setup
from eve_ds.engine.deepspeed_config import _invalid, batch_shape, load_deepspeed_config
from eve_ds.engine.identity import identity_of
from eve_ds.engine.optim import parameter_groups
from eve_ds.engine.schedule import lr_factor
from eve_ds.errors import RankError
from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.model_folder import metadata
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import train_tokenizer
from tests.support.shards import make_vqa_set, tiny_tokenizer
from tests.support.tiny import masked_task


def settings(tree: object, folder: Path, **engine: object) -> dict[str, object]:
    path = folder / "ds.json"
    path.write_text(json.dumps(tree))
    return load_deepspeed_config(
        str(path), EngineConfig(global_batch_size=32, precision="bf16", **engine), OptimizerConfig(), 2
    )


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_shipped_settings_are_filled_in(name: str) -> None:
    micro = 16 if name == "zero2_offload" else 4  # several micro-batches a step are refused there
    engine = EngineConfig(global_batch_size=32, micro_batch_size=micro, precision="bf16")
    filled = load_deepspeed_config(f"ds_configs/{name}.json", engine, OptimizerConfig(gradient_clipping=2.0), 2)
    assert (filled["train_batch_size"], filled["train_micro_batch_size_per_gpu"]) == (32, micro)
    assert (filled["gradient_accumulation_steps"], filled["gradient_clipping"], filled["bf16"]["enabled"]) == (
        16 // micro,
        2.0,
        True,
    )
    assert "auto" not in json.dumps(filled)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"zero_optimization": {"stage": 0}}, ["stage=0", "stage 1"]),
        ({}, ["stage=0"]),
        ({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, ["contiguous_gradients"]),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": False}}, ["reduce_scatter"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "1, 2 or 3"]),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, ["fp16.enabled=True", 'write "auto"']),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, ["optimizer"]),
        ({"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR"}}, ["scheduler", "optimizer.schedule"]),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}, ["bf16.enabled=False", "True"]),
        ({"zero_optimization": {"stage": 1}, "train_batch_size": 64}, ["train_batch_size=64", "32"]),
        ({"zero_optimization": {"stage": 1}, "wall_clock_breakdown": "auto"}, ["wall_clock_breakdown"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}, ['"auto"', "zero_hpz_partition_size"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": None}}, ["zero_hpz_partition_size"]),
        ({"zero_optimization": {"stage": 1, "contiguous_gradients": "false"}}, ["contiguous_gradients"]),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": 0}}, ["reduce_scatter"]),
        ({"zero_optimization": True}, ["zero_optimization=true", "JSON object"]),
        ({"zero_optimization": "auto"}, ["zero_optimization"]),
        ({"zero_optimization": {"stage": 2}, "fp16": True}, ["fp16=true", "JSON object"]),
        ({"zero_optimization": {"stage": 2}, "bf16": True}, ["bf16=true", "JSON object"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": True}}, ["offload_optimizer=true", "JSON object"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}}, ["offload_optimizer=null", "JSON object"]),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, ['offload_param="cpu"', "JSON object"]),
        ({"zero_optimization": {"stage": 2}, "flops_profiler": True}, ["flops_profiler=true", "JSON object"]),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            ['zero_optimization.reduce_bucket_size="big": must be a valid integer'],
        ),
        ({"zero_optimization": {"stage": 2}, "nebula": {}}, ["DeepSpeed does not take it", "Nebula"]),
        ([], ["must be a JSON object"]),
    ],
)
def test_settings_that_train_wrongly_or_disagree_are_refused(tree: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        settings(tree, tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), str(error.value)


def test_a_section_may_be_auto(tmp_path: Path) -> None:
    assert settings({"zero_optimization": {"stage": 1}, "bf16": "auto"}, tmp_path)["bf16"] == {"enabled": True}


def test_unreadable_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "twice.json").write_text('{"fp16": {}, "fp16": {}}')
    for name, word in (("none", "No such file"), ("bad", "not valid JSON"), ("twice", "'fp16' stands twice")):
        path = tmp_path / f"{name}.json"
        with pytest.raises(UserError, match=word):
            load_deepspeed_config(str(path), EngineConfig(), OptimizerConfig(), 1)


def test_the_global_batch_is_shared_evenly() -> None:
    assert batch_shape(EngineConfig(global_batch_size=64, micro_batch_size=8), 4) == (8, 2)
    assert batch_shape(EngineConfig(global_batch_size=64), 4) == (16, 1)
    for total, micro in ((62, None), (64, 7), (0, None)):
        with pytest.raises(UserError, match="global_batch_size"):
            batch_shape(EngineConfig(global_batch_size=total, micro_batch_size=micro), 4)


@pytest.mark.parametrize("epochs", [math.inf, math.nan, 1e308])
def test_a_run_without_end_is_refused(epochs: float) -> None:
    with pytest.raises(UserError, match=r"optimizer\.epochs=.*finite"):
        setup.total_steps(PretrainConfig(optimizer=OptimizerConfig(epochs=epochs)), count=1000)
    assert setup.total_steps(PretrainConfig(optimizer=OptimizerConfig(epochs=1.5)), count=1000) == 6


def test_expert_parallel_size_must_divide_ranks_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    distributed.check_world(3, 12)
    cases = ((4, 8, "world size 6"), (12, 12, "world size 6"), (6, 8, "num_experts=8"), (0, 8, "at least 1"))
    for ep_size, experts, word in cases:
        with pytest.raises(UserError, match=word):
            distributed.check_world(ep_size, experts)


def test_slurm_counts_only_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert distributed.launched_world() == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert distributed.launched_world() == (3, 8, 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    config = OptimizerConfig(warmup=0.1, schedule=schedule, min_lr_ratio=0.1)  # type: ignore[arg-type]
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert 0 < factors[0] < factors[5] < factors[10] == 1.0
    assert factors[11:] == sorted(factors[11:], reverse=True)
    assert factors[-1] == (1.0 if schedule == "constant" else pytest.approx(0.1, abs=0.01))
    assert lr_factor(55, 100, config) == pytest.approx({"constant": 1.0}.get(schedule, 0.55), abs=1e-9)


def test_no_decay_on_biases_norms_scales_tokens_and_positions() -> None:
    task = masked_task()
    groups = parameter_groups(task, OptimizerConfig(lr=0.1, head_lr_mult=3, weight_decay=0.5))
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] > 0 for group in groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    for name, decay in decays.items():
        small = name.endswith(("bias", "experts.w3")) or "norm" in name or "vector" in name or "scale" in name
        small = small or "position" in name or "class" in name or "modality" in name
        if small:
            assert not decay, name
    assert decays["backbone.blocks.1.moe.experts.w1"] and decays["backbone.text_embedding.words.weight"]
    peaks = {names[id(p)].startswith("backbone."): group["peak_lr"] for group in groups for p in group["params"]}
    assert peaks == {True: 0.1, False: pytest.approx(0.3)}
    undecayed = sum(p.numel() for g in groups if not g["weight_decay"] for p in g["params"])
    assert 0 < undecayed < sum(p.numel() for p in task.parameters()) / 2
    assert all(isinstance(p, torch.nn.Parameter) for g in groups for p in g["params"])


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for path, word in ((tmp_path, "no run"), (tmp_path / "thesis.tex", "is a file"), ("", "missing")):
        with pytest.raises(UserError, match=word):
            run_folder.claim(PretrainConfig(output_dir=str(path)), identity_of(PretrainConfig(), {}))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_head_goes_with_its_own_answer_list_alone(tmp_path: Path) -> None:
    model, data = tmp_path / "run" / "model", tmp_path / "data"
    for folder in (model, data):
        folder.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"")
    config = FinetuneConfig(init_from=str(tmp_path / "run"), data=DataConfig(path=str(data)))
    (data / "answer_list.json").write_text('["yes", "no"]')
    setup.check_head(config)  # published weights come without a list
    (model / "answer_list.json").write_text('["yes", "no"]')
    setup.check_head(config)
    for other, words in (('["no", "yes"]', "answer 0: 'no' and 'yes'"), ('["yes"]', "their lengths")):
        (model / "answer_list.json").write_text(other)
        with pytest.raises(UserError, match=words):
            setup.check_head(config)


def test_weights_come_with_their_own_tokenizer_alone(tmp_path: Path) -> None:
    model, other = tmp_path / "run" / "model", tmp_path / "other"
    own = tiny_tokenizer(model)
    (model / "model.safetensors").write_bytes(b"")
    train_tokenizer(["words of another kind"], 280).save(other)
    tree = ModelConfig(vocab_size=own.vocab_size)
    config = FinetuneConfig(init_from=str(tmp_path / "run"), model=tree, data=DataConfig(tokenizer=str(other)))
    with pytest.raises(UserError, match=r"is not the tokenizer that .*run was trained with .*: the one has"):
        setup.build_tokenizer(config)
    same = dataclasses.replace(config, data=DataConfig(tokenizer=str(model)))
    assert setup.build_tokenizer(same).vocab_size == own.vocab_size
    assert setup.build_tokenizer(dataclasses.replace(config, data=DataConfig())).vocab_size == own.vocab_size
    (model / "tokenizer.json").unlink()  # published weights come without
    with pytest.raises(UserError, match=rf"other: has \d+ entries, the model {own.vocab_size}"):
        setup.build_tokenizer(config)
    pretraining = PretrainConfig(init_from=config.init_from, model=tree, data=config.data)
    with pytest.raises(UserError, match=rf"other: has \d+ entries, the model {own.vocab_size}"):
        setup.build_tokenizer(pretraining)
    save_file({"a": torch.zeros(1)}, model / "model.safetensors", metadata(initial_words=True))  # as from BEiT
    for begun in (config, pretraining):
        assert setup.build_tokenizer(begun).vocab_size < own.vocab_size * 15 // 16
    first_values = dataclasses.replace(config, init_from=None)  # nothing was trained with another tokenizer
    assert setup.build_tokenizer(first_values).vocab_size < own.vocab_size * 15 // 16
    with pytest.raises(UserError, match=r"--data\.tokenizer is missing"):
        setup.build_tokenizer(dataclasses.replace(config, data=DataConfig()))


def test_sources_answer_by_the_same_list(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_vqa_set(tmp_path / name, rows=3)
    sources = [DataSource(str(tmp_path / name)) for name in ("one", "two")]
    config = FinetuneConfig(task="vqa", data=DataConfig(sources=sources))
    joined = setup.build_dataset(config, "train", tiny_tokenizer(), train=True)
    assert len(joined) == 12 and batches.source_names(config.data) == ["one", "two"]
    assert len(setup.build_dataset(config, "train", tiny_tokenizer(), train=False)) == 6  # held out: the first one's
    (tmp_path / "two" / "answer_list.json").write_text('["no", "yes"]')
    with pytest.raises(UserError, match=r"two/answer_list\.json and .*one/answer_list\.json differ"):
        setup.build_dataset(config, "train", tiny_tokenizer(), train=True)


def test_a_split_goes_with_the_answers_that_it_was_labeled_by(tmp_path: Path) -> None:
    manifest = make_vqa_set(tmp_path, rows=3) / "manifest.json"
    config = FinetuneConfig(task="vqa", data=DataConfig(path=str(tmp_path)))
    answers = json.loads((tmp_path / "answer_list.json").read_text())
    known = {"answer_list_sha256": hashlib.sha256(json.dumps(answers).encode()).hexdigest()}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | known))
    assert len(setup.build_dataset(config, "train", tiny_tokenizer(), train=True)) == 6
    (tmp_path / "answer_list.json").write_text(json.dumps([*answers, "maybe"]))
    with pytest.raises(
        UserError, match=r"answer_list\.json: is not the list that .*train was labeled by; put that one"
    ):
        setup.build_dataset(config, "train", tiny_tokenizer(), train=True)


def test_names_of_sources() -> None:
    for paths, names in ((["a/x", "b/y/"], ["x", "y"]), (["a/x", "b/x"], ["a/x", "b/x"])):
        sources = [DataSource(path) for path in paths]
        assert batches.source_names(DataConfig(sources=sources)) == names
    assert batches.source_names(DataConfig(path="a/x")) == ["x"]


def test_a_loader_is_not_more_patient_than_the_ranks_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(data=DataConfig(timeout_seconds=301), engine=EngineConfig(timeout_seconds=300))
    batches.check_batch(config, rows=99)  # alone it has nobody to wait for it
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^data\.timeout_seconds=301 is above engine\.timeout_seconds=300, .*; lower"):
        batches.check_batch(config, rows=99)
    for seconds in (300, None):
        config.data.timeout_seconds = seconds
        batches.check_batch(config, rows=99)
    assert batches.loader_seconds(config) == 150, "who reads tells before those who wait"


def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **place}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankError, match=rf"127\.0\.0\.1:{place['MASTER_PORT']}.* is taken, .*another port"):
            distributed.start()
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    told = distributed._unreachable(torch.distributed.DistNetworkError("no address for that name\nmore"))
    assert told.startswith("the ranks cannot meet at no-such-host.invalid:") and "(no address for that name)" in told


@pytest.mark.parametrize("port", ["65536", "123456", "0", "-1", "", "http"])
def test_what_is_no_port(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^MASTER_PORT={port}: is no port from 1 to 65535; .*--master_port"):
        distributed.start()


def test_what_deepspeed_says_of_a_value_keeps_its_reason() -> None:
    """Its own validators speak in sentences; what lies at the root has no key."""
    config = {"zero_optimization": {"stage": 7}}
    fault = {"type": "value_error", "loc": ("stage",), "input": 7, "msg": "Value error, no such stage, take 3"}
    assert _invalid(config, fault) == "zero_optimization.stage=7: Value error, no such stage, take 3"
    assert _invalid(config, fault | {"loc": (), "input": config, "msg": "Assertion failed, a"}) == "Assertion failed, a"
    number = fault | {"msg": "Input should be a valid integer, unable to parse"}
    assert _invalid(config, number) == "zero_optimization.stage=7: must be a valid integer"
