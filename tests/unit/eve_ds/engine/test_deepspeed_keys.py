"""Every key that DeepSpeed reads is decided: taken, or refused with the reason and the name of the file."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.engine.deepspeed_keys import RULES
from preprocessing.errors import UserError
from tests.support.deepspeed_keys import FILE, ZERO


def settings(folder: Path, tree: dict[str, Any], micro: int = 8, precision: str = "fp32") -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | tree))
    engine = EngineConfig(global_batch_size=32, micro_batch_size=micro, precision=precision)  # type: ignore[arg-type]
    return load_deepspeed_config(str(folder / "ds.json"), engine, OptimizerConfig(), 2)


class Asked(dict[str, Any]):
    """A dict that remembers for which keys it was asked; the copy that DeepSpeed makes writes into the same memory."""

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:  # DeepSpeed writes `name in config.keys()`
        return self


def test_every_key_that_deepspeed_asks_for_is_decided() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked = Asked({"train_batch_size": 4})
    copies: list[Asked] = []

    def remembered(entries: Asked) -> Asked:
        copies.append(Asked(entries))
        copies[-1].names = entries.names
        return copies[-1]

    asked.__class__.__copy__ = remembered  # type: ignore[attr-defined]
    DeepSpeedConfig(copy.copy(asked))
    assert len(asked.names) > 40, asked.names
    roots = {key.split(".")[0] for key in RULES}
    assert asked.names - roots - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) == set()
    for prefix, model in (
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_param", offload_config.DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.offload_optimizer", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
    ):
        names = {f"{prefix}.{name}" for name in model.model_fields}
        assert names - {"zero_optimization.offload_param", "zero_optimization.offload_optimizer"} <= set(RULES)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_was_tried_is_taken(stage: int, tmp_path: Path) -> None:
    found = settings(tmp_path, {**FILE, "zero_optimization": {"stage": stage, **ZERO[stage]}})
    assert found["zero_optimization"]["reduce_bucket_size"] == 20_000


def test_values_that_stand_at_deepspeeds_defaults_are_taken(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stated = json.loads(DeepSpeedZeroConfig(stage=2).model_dump_json())
    old = ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save")
    entries = {key: value for key, value in stated.items() if value is not None and key not in (*old, "leaf_module")}
    assert len(entries) > 30
    assert settings(tmp_path, {"zero_optimization": entries})["zero_optimization"] == entries


def test_the_loss_scale_of_fp16_is_the_files(tmp_path: Path) -> None:
    scaling = {"initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 1, "min_loss_scale": 2}
    found = settings(tmp_path, {"fp16": {"enabled": "auto", **scaling}}, precision="fp16")
    assert found["fp16"] == {"enabled": True, **scaling} and found["bf16"] == {"enabled": False}
    off = {"enabled": False, "loss_scale": 128, "auto_cast": True}  # of no effect, so of no harm
    assert settings(tmp_path, {"fp16": off})["fp16"] == off
    for key, value, words in (
        ("loss_scale", 128, "fp16.loss_scale=128: a fixed scale"),
        ("auto_cast", True, "fp16.auto_cast=true: the model casts by itself"),
        ("min_loss_scale", 0, "fp16.min_loss_scale must be > 0"),
        ("hysteresis", 0, "fp16.hysteresis=0: must be a number of steps, 1 or more"),
        ("scale_window", 500, "'fp16.scale_window'"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            settings(tmp_path, {"fp16": {"enabled": "auto", key: value}}, precision="fp16")


@pytest.mark.parametrize("steps", [1, 1000.0, 1e9, None])
def test_how_often_deepspeed_prints_is_any_whole_number_of_steps(steps: float | None, tmp_path: Path) -> None:
    assert settings(tmp_path, {"steps_per_print": steps})["steps_per_print"] == steps


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"prescale_gradients": True}, ["prescale_gradients=true", "asserts"]),
        ({"prescale_gradients": "false"}, ['prescale_gradients="false"']),
        ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor=2.0", "asserts"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "engine.precision"]),
        ({"wandb": {"enabled": True, "project": "x"}}, ["wandb", "logging.wandb"]),
        ({"tensorboard": {"enabled": True}}, ["tensorboard", "metrics.jsonl"]),
        ({"flops_profiler": {"enabled": True}}, ["flops_profiler", "eve_ds.bench step"]),
        ({"wall_clock_breakdown": True}, ["wall_clock_breakdown=true", "timer is not started"]),
        ({"checkpoint": {"load_universal": True}}, ["checkpoint.load_universal=true", "by itself"]),
        ({"checkpoint": {"writer": {"type": "fast"}}}, ["checkpoint.writer", "not whole"]),
        ({"expert_parallel": {"enabled": True}}, ["expert_parallel", "engine.expert_parallel_size"]),
        ({"gradient_allreduce_op": "sum"}, ['gradient_allreduce_op="sum"']),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation=false"]),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size=2"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ["model.checkpoint_activations"]),
        ({"log_level": "loud"}, ['log_level="loud"']),
        ({"steps_per_print": "x"}, ['steps_per_print="x": must be a number of steps']),
        ({"steps_per_print": 0}, ["steps_per_print=0"]),
        ({"steps_per_print": 0.5}, ["steps_per_print=0.5: must be a number of steps, 1 or more"]),
        ({"steps_per_print": -1000.0}, ["steps_per_print=-1000.0"]),
        ({"timers": 3}, ["timers=3 must be a JSON object"]),
        ({"timers": {"throughput": {"enabled": "x"}}}, ['timers.throughput.enabled="x": must be a valid boolean']),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow=false"]),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, ["round_robin_gradients=true"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ['"offload_optimizer": {"device": "cpu"}']),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}, ["NVMe", "use cpu"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "below stage 3"]),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, ["overlap_comm=true", "use false"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, ["stage 3", "use stage 1"]),
        ({"gradient_cliping": 1.0}, ["'gradient_cliping'", "did you mean gradient_clipping?"]),
        ({"_comment": "mine"}, ["'_comment'"]),
        ({"checkpoint": {"tag_validaton": "Warn"}}, ["did you mean checkpoint.tag_validation?"]),
        ({"zero_optimization": {"stage": 2, "typo": 1}}, ["unknown key 'zero_optimization.typo'; leave it out"]),
        (
            {"zero_optimization": {"stage": 2, "prefetch_bucket_size": 8, "stage3_prefetch_bucket_size": 8}},
            ["'zero_optimization.prefetch_bucket_size' and its other name, with stage3_, both stand there"],
        ),
        (
            {"zero_optimization": {"stage": 2, "contiguous_gradients": "true"}},
            ['gradients="true": must be true or false'],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "CPU"}}},
            ['device="CPU": must be "none" or "cpu"'],
        ),
        ({"zero_optimization": {"stage": 2, "stge": 2}}, ["did you mean zero_optimization.stage?"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_breaks_or_changes_a_run_is_refused(tree: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        settings(tmp_path, tree)
    assert all(word in str(error.value) for word in [str(tmp_path / "ds.json"), *words]), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [30, 900, 100_000])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_a_file_nested_too_deep_is_told_in_one_line(start: str, end: str, depth: int, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"timers": ' + start * depth + "1" + end * depth + "}")
    with pytest.raises(UserError, match=r"ds\.json: .*nested (too deep|deeper than 20 levels)"):
        load_deepspeed_config(str(path), EngineConfig(), OptimizerConfig(), 1)


def test_what_is_wrong_with_several_micro_batches_alone_is_taken_with_one(tmp_path: Path) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    for zero in ({"stage": 1, "overlap_comm": True}, {"stage": 2, **offload}, {"stage": 3, **offload}):
        assert settings(tmp_path, {"zero_optimization": zero}, micro=16)["gradient_accumulation_steps"] == 1
        with pytest.raises(UserError, match="several micro-batches a step"):
            settings(tmp_path, {"zero_optimization": zero}, micro=8)
    grads = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert settings(tmp_path, grads, precision="bf16")["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(UserError, match="at stage 1 the gradient's norm"):
        settings(tmp_path, grads | {"zero_optimization": {"stage": 1}}, precision="bf16")
    with pytest.raises(UserError, match='communication_data_type="bf16"'):
        settings(tmp_path, {"communication_data_type": "bf16"})
