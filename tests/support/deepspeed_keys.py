"""What a DeepSpeed file may say beyond the shipped ones: unusual values of every key that is taken, by ZeRO stage."""

from __future__ import annotations

from typing import Any

_ANY_STAGE: dict[str, Any] = {
    "reduce_bucket_size": 20_000,  # several buckets a pass; the largest tensor of the tests has 16,384
    "allgather_bucket_size": 1000,
    "sub_group_size": 1000,
    "ignore_unused_parameters": False,
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
    "parameter_alignment": True,
    "overlap_comm": False,
}
_STAGES_1_AND_2: dict[str, Any] = {
    "allgather_partitions": False,
    "use_multi_rank_bucket_allreduce": False,
}
_STAGE_3: dict[str, Any] = {
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "offload_param": {"device": "cpu", "pin_memory": False, "buffer_count": 5, "buffer_size": 1000, "max_in_cpu": 1000},
}
ZERO: dict[int, dict[str, Any]] = {
    1: _ANY_STAGE | _STAGES_1_AND_2 | {"offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 4}},
    2: _ANY_STAGE | _STAGES_1_AND_2 | {"overlap_comm": True},
    3: _ANY_STAGE | _STAGE_3,
}
FILE: dict[str, Any] = {
    "steps_per_print": 2,
    "dump_state": True,
    "disable_python_gc": True,
    "timers": {"throughput": {"enabled": False, "synchronized": False}},
    "log_level": "error",
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": None},
    "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "wall_clock_breakdown": False,
    "wandb": {"enabled": False, "project": "x"},
    "flops_profiler": {"enabled": False, "profile_step": 3},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "fp16": {"enabled": False, "loss_scale": 0},
    "torch_autocast": {},
}
