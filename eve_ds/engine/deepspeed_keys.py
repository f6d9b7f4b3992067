"""The keys of a DeepSpeed file that a run accepts, and the reasons against the others.

DeepSpeed 0.19.8 reads some eighty keys. With the accepted ones, training equals a plain loop at every stage
(tests/multirank/test_deepspeed_keys.py). The others are refused with a reason, except at their default values and in
sections that are switched off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from eve_ds.recipes import suggest_key
from preprocessing.errors import UserError, shortened

Accepts = Callable[[Any], bool]
Rule = tuple[Accepts, str]


def anything(value: Any) -> bool:
    """Any value: DeepSpeed checks it."""
    return True


def only(*values: Any) -> Accepts:
    """One of ``values``, compared as in JSON: "false" and 0 are not false."""
    return lambda value: any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def steps(value: Any) -> bool:
    """None, or an integer of at least 1, also written as a float: 1e9 is often used to keep DeepSpeed silent."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return value is None or (whole and not isinstance(value, bool) and value > 0)


def off(value: Any) -> bool:
    """A section that is empty or says ``"enabled": false``."""
    return isinstance(value, dict) and (not value or value.get("enabled") is False)


def idle(value: Any) -> bool:
    """A section in which nothing is switched on."""
    return isinstance(value, dict) and not any(value.values())


_LOGS = "the run logs by itself (metrics.jsonl, logging.wandb), and a second log of the same process breaks that one"
_NOTHING = "has no effect here"
_TIMERS = "DeepSpeed ends the first step with 'timer is not started'; use python -m eve_ds.bench step"
_OLD_OFFLOAD = 'an old name; write "offload_optimizer": {"device": "cpu"}'
_QUANTIZED = "values are rounded to few bits on their way between ranks, so the run is no longer the one that is tested"
_MOMENTS = "checkpoints would be loaded otherwise than they were saved; resume would no longer be exact"

_TOP: dict[str, Rule] = {
    "train_batch_size": (anything, ""),  # these five must equal the config
    "train_micro_batch_size_per_gpu": (anything, ""),
    "gradient_accumulation_steps": (anything, ""),
    "gradient_clipping": (anything, ""),
    "bf16.enabled": (anything, ""),
    "steps_per_print": (steps, "must be a number of steps, 1 or more"),
    "dump_state": (only(True, False), "must be true or false"),
    "disable_python_gc": (only(True, False), "must be true or false"),
    "timers": (anything, ""),
    "log_level": (only("debug", "info", "warning", "error", "critical"), "must be one of DeepSpeed's levels"),
    "zero_allow_untested_optimizer": (only(True), "the engine makes its own optimizer, which DeepSpeed does not know"),
    "zero_force_ds_cpu_optimizer": (only(False), "the engine makes its own optimizer, which takes host memory, too"),
    "communication_data_type": (only(None, "fp32", "bf16"), 'gradients overflow in it; write "fp32" or leave it out'),
    "seq_parallel_communication_data_type": (only("fp32"), _NOTHING),
    "prescale_gradients": (only(False), "DeepSpeed asserts at ZeRO 2 and 3"),
    "gradient_predivide_factor": (only(1), "DeepSpeed asserts at ZeRO 2 and 3"),
    "gradient_allreduce_op": (only("mean"), "gradients and their norm grow with the number of ranks"),
    "managed_gradient_accumulation": (only(True), "every micro-batch would be an optimizer step"),
    "disable_allgather": (only(False), _NOTHING),
    "dataloader_drop_last": (only(False), _NOTHING),
    "vocabulary_size": (only(None), _NOTHING),
    "use_data_before_expert_parallelism": (only(False), "experts are placed by engine.expert_parallel_size"),
    "sequence_parallel_size": (only(1), "ranks share no sequence"),
    "data_parallel_size": (only(None), "the launcher decides"),
    "wall_clock_breakdown": (only(False), _TIMERS),
    "memory_breakdown": (only(False), "slows a step tenfold and shows nothing; use python -m eve_ds.plan"),
    "expert_parallel": (off, "experts are placed by engine.expert_parallel_size"),
    "tensor_parallel": (idle, "the model is not split that way"),
    "pipeline": (idle, "the model is not split that way"),
    "torch_autocast": (off, "DeepSpeed mixes dtypes within a product and fails; use engine.precision"),
    "flops_profiler": (off, _TIMERS),
    "autotuning": (off, _TIMERS),
    "comms_logger": (off, "slows every collective and shows nothing; use a profiler of the device"),
    "wandb": (off, _LOGS),
    "tensorboard": (off, _LOGS),
    "csv_monitor": (off, _LOGS),
    "comet": (off, _LOGS),
    "data_efficiency": (off, "changes which samples and tokens are seen, and a resumed run would not repeat it"),
    "hybrid_engine": (off, "is for text generation"),
    "weight_quantization": (idle, "is for inference"),
    "activation_checkpointing": (idle, "has no effect here; use model.checkpoint_activations"),
    "compile": (idle, "was not made for experts"),
    "aio": (idle, "is for NVMe offload, whose checkpoints are not whole"),
    "datastates_ckpt": (only(False), "another writer of checkpoints, which are not whole"),
    "bfloat16": (off, "an old name; write bf16"),
    "fp16": (off, ""),  # as below, unless it is off
    "fp16.enabled": (anything, ""),  # must equal the config, as bf16.enabled must
    "fp16.loss_scale": (only(0), "a fixed scale skips steps without end once gradients outgrow it; use 0, dynamic"),
    "fp16.initial_scale_power": (anything, ""),
    "fp16.loss_scale_window": (anything, ""),
    "fp16.hysteresis": (steps, "must be a number of steps, 1 or more"),
    "fp16.consecutive_hysteresis": (only(True, False), "must be true or false"),
    "fp16.min_loss_scale": (anything, ""),
    "fp16.auto_cast": (only(False), "the model casts by itself; targets of the losses stay in fp32"),
    "fp16.fp16_master_weights_and_grads": (only(False), "needs an optimizer that the engine does not make"),
    "optimizer": (only(), "the engine makes its own (config section optimizer)"),
    "scheduler": (only(), "the engine has its own (optimizer.schedule)"),
    "bf16.immediate_grad_update": (only(False), _NOTHING),
    "bf16.check_grad_overflow": (only(True), "a step whose gradients are not finite would move the weights"),
    "bf16.bf16_master_weights_and_grads": (only(False), "needs an optimizer that the engine does not make"),
    "bf16.bf16_optimizer_states": (only(False), "needs an optimizer that the engine does not make"),
    "checkpoint.tag_validation": (anything, ""),
    "checkpoint.load_universal": (only(False), "the engine converts by itself when ranks or stage have changed"),
    "checkpoint.use_node_local_storage": (only(False), "other nodes' files would be missing at a resume"),
    "checkpoint.parallel_write": (only({"pipeline_stage": False}, {}), "the model has no pipeline"),
    "checkpoint.checkpoint_serialization": (only(True), _MOMENTS),
    "checkpoint.writer": (only(None), "it fails without CUDA, and checkpoints are not whole when it returns"),
    "data_types.grad_accum_dtype": (only(None, "fp32", "bf16"), "gradients overflow in it"),
    "data_types.param_dtype": (only(None), "engine.precision decides"),
    "data_types.buffer_dtype": (only(None), "engine.precision decides"),
    "data_types.keep_in_fp32_modules": (only(), "engine.precision decides"),
}  # fmt: skip

_FREE_ZERO = (
    "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "parameter_alignment", "ignore_unused_parameters", "memory_efficient_linear",
    "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "gather_16bit_weights_on_model_save",
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip

_ZERO: dict[str, Rule] = {
    **dict.fromkeys(_FREE_ZERO, (anything, "")),
    "overlap_comm": (only(None, True, False), "must be true or false"),
    "stage": (only(1, 2, 3), "must be 1, 2 or 3"),
    "contiguous_gradients": (only(True), "gradients are silently wrong; use true"),
    "reduce_scatter": (only(True), "DeepSpeed asserts with experts; use true"),
    "zero_hpz_partition_size": (only(1), "DeepSpeed asserts with experts; leave it out"),
    "round_robin_gradients": (only(False), "weights are put together in the wrong order at the export"),
    "compute_grad_norm": (only(True), "steps whose gradients are not finite are found by the norm"),
    "legacy_stage1": (only(False), "DeepSpeed no longer has it"),
    "elastic_checkpoint": (only(False), _MOMENTS),
    "load_from_fp32_weights": (only(True), _MOMENTS),
    "pipeline_loading_checkpoint": (only(False), _MOMENTS),
    "module_granularity_threshold": (only(0), "DeepSpeed fails in the first backward pass with experts"),
    "leaf_module": (idle, "some choices of modules fail in the first backward pass"),
    "zero_quantized_weights": (only(False), _QUANTIZED),
    "zero_quantized_nontrainable_weights": (only(False), _QUANTIZED),
    "zero_quantized_gradients": (only(False), _QUANTIZED),
    "save_muon_momentum_buffer_in_memory": (only(False), _NOTHING),
    "zenflow": (only(None), "updates weights late, so the run is no longer the one that is tested"),
    "cpu_offload": (only(None, False), _OLD_OFFLOAD),
    "cpu_offload_param": (only(None, False), 'an old name; write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": (only(None), 'an old name; write pin_memory into "offload_optimizer"'),
    "stage3_gather_fp16_weights_on_model_save": (anything, ""),
}  # fmt: skip

_OFFLOAD: dict[str, Rule] = {
    "device": (
        only("none", "cpu"),
        'must be "none" or "cpu" (checkpoints of what lies on NVMe are not whole; use cpu)',
    ),
    "pin_memory": (anything, ""),
    "buffer_count": (anything, ""),
    "buffer_size": (anything, ""),
    "max_in_cpu": (anything, ""),
    "nvme_path": (only(None), "checkpoints of what lies on NVMe are not whole; use cpu"),
    "pipeline_read": (only(False), "is for NVMe"),
    "pipeline_write": (only(False), "is for NVMe"),
    "fast_init": (only(False), "is for NVMe"),
    "ratio": (only(1), "needs an optimizer that the engine does not make"),
    "super_offload": (only(False), "needs an optimizer that the engine does not make"),
    "cpuadam_cores_perc": (anything, ""),
}

RULES: dict[str, Rule] = {
    **_TOP,
    **{f"zero_optimization.{name}": rule for name, rule in _ZERO.items()},
    **{
        f"zero_optimization.{section}.{name}": rule
        for section in ("offload_optimizer", "offload_param")
        for name, rule in _OFFLOAD.items()
    },
}
_SECTIONS = {key.rpartition(".")[0] for key in RULES if "." in key}


def refuse_keys(config: dict[str, Any], path: str) -> None:
    """Raise UserError for the first key whose value is not accepted, with the reason."""
    for key, value in _entries(config):
        accepts, reason = RULES.get(key, (anything, ""))
        if not accepts(value):
            flag = accepts(True) or accepts(False)
            if flag and isinstance(value, str | int | float) and not isinstance(value, bool):
                reason = "must be true or false, without quotes"
            mend = "" if ";" in reason or reason.startswith("must") else "; leave it out"
            raise UserError(f"--deepspeed_config {path}: {key}={_short(value)}: {reason}{mend}")


def refuse_unknown(config: dict[str, Any], path: str) -> None:
    """Raise UserError for the first unknown key, which DeepSpeed would silently ignore."""
    for key, _ in _entries(config):
        if key not in RULES:
            near = suggest_key(key, list(RULES))
            raise UserError(f"--deepspeed_config {path}: unknown key {key!r}{near or '; leave it out'}")


def _entries(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of all keys, those of ``_SECTIONS`` by their entries."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in RULES and key.startswith("zero_optimization.stage3_"):
            key = key.replace(".stage3_", ".")  # DeepSpeed accepts both names
        opened = key in _SECTIONS and isinstance(value, dict) and not (key in RULES and off(value))
        found += _entries(value, f"{key}.") if opened else [(key, value)]
    return found


def _short(value: Any) -> str:
    return shortened(json.dumps(value))
