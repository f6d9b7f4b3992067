"""Reads a DeepSpeed JSON file for ``deepspeed.initialize``: fills in "auto", and refuses settings known to be wrong.

A run computes in bf16 where the device multiplies such matrices by itself, else in fp32; in fp16 where it is asked to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.config_sections import EngineConfig, LoggingConfig, OptimizerConfig
from eve_ds.engine.deepspeed_keys import RULES, refuse_keys, refuse_unknown
from eve_ds.engine.distributed import decide, gather
from eve_ds.engine.run_folder import holds_run
from eve_ds.recipes import MAX_DEPTH, find_shipped, suggest_file, suggest_key
from eve_ds.weights.model_folder import run_of, stored_setting
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import check_regular, load_json, unique_keys

Precision = Literal["bf16", "fp16", "fp32"]
_log = logging.getLogger(__name__)
# Keys that DeepSpeed 0.19.8 reads as JSON objects. It fails without a clear message on other values.
SECTIONS = (
    "bf16", "fp16", "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
    "activation_checkpointing", "aio", "autotuning", "checkpoint", "comet", "comms_logger", "compile", "csv_monitor",
    "data_efficiency", "data_types", "expert_parallel", "flops_profiler", "hybrid_engine", "pipeline", "tensorboard",
    "tensor_parallel", "timers", "timers.throughput", "torch_autocast", "wandb", "weight_quantization",
)  # fmt: skip


def multiplies_bf16(device: str) -> bool:
    """Whether products of bf16 matrices run in the device's own instructions, or in emulation that is about as quick.

    A GPU needs compute capability 8.0 (A100). A CPU needs AVX-512, with which oneDNN takes them; on others torch walks
    through them in a plain loop (seen on an AMD EPYC with AVX2: 1 to 20 GFLOP/s, where fp32 reaches 140).

    Args:
        device: "cuda" or "cpu".
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def best_precision(device: str | None = None) -> Precision:
    """What ``engine.precision: auto`` means on ``device``; by default where ranks run: GPUs if there are any."""
    return "bf16" if multiplies_bf16(device or ("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"


def precision_of(engine: EngineConfig) -> Precision:
    """``engine.precision``, and for auto what it means here."""
    return best_precision() if engine.precision == "auto" else engine.precision


def settle_precision(config: PretrainConfig | FinetuneConfig, rank: int) -> None:
    """Put a precision in the place of ``engine.precision: auto``: that of the run in ``output_dir``, if it holds one,
    or of the run that this one branches from.

    A run goes on in the numbers that it began with, whatever machine it is moved to. A new one takes bf16 if it is
    quick on the devices of all ranks. Rank 0 warns of bf16 that was asked for where it is slow. Called by all ranks.

    A run that scores alone computes in fp32 whatever is asked for: nothing is refused there, and nothing warned of.

    Raises:
        UserError: fp16, and a rank's device does not compute in it.
    """
    if config.engine.precision == "auto":
        stored = stored_in_run(config, "precision", lambda value: value in ("bf16", "fp16", "fp32"))
        config.engine.precision = stored or _best_of_all_ranks()
    if not config.trains:
        return
    if config.engine.precision == "fp16" and not all(gather(_takes_fp16())):
        raise UserError(
            "engine.precision=fp16: needs GPUs from the V100 on, or CPUs with AVX512-FP16, on all ranks; set "
            "engine.precision=fp32"
        )
    if rank == 0 and config.engine.precision == "bf16" and best_precision() == "fp32":
        _log.warning(
            "engine.precision=bf16: this device has no products of bf16 matrices, which run many times slower than "
            "those of fp32; --engine.precision auto takes what is quick"
        )


def _best_of_all_ranks() -> Precision:
    return "fp32" if "fp32" in gather(best_precision()) else "bf16"


def _takes_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this rank's device."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def stored_in_run(config: PretrainConfig | FinetuneConfig, key: str, valid: Callable[[Any], bool]) -> Any:
    """What the run in ``output_dir``, or else the one that this run branches from, has stored as ``engine.KEY``; None
    if neither is a run that stored a valid value. Called by all ranks, with one result."""
    run = Path(config.resume_from or "")
    folders = [Path(config.output_dir or "."), *([run_of(run) or run] if config.resume_from else [])]

    def read() -> Any:
        # Of a config that cannot be read run_folder.claim tells.
        found = (stored_setting(folder, "engine", key) for folder in folders if holds_run(folder))
        return next((value for value in found if valid(value)), None)

    return decide(read)


def share_of_rank(engine: EngineConfig, world_size: int) -> int:
    """Samples of a rank in an optimizer step.

    Raises:
        UserError: the global batch is not equal on all ranks.
    """
    total = engine.global_batch_size
    if total < 1 or total % world_size:
        raise UserError(f"engine.global_batch_size={total} is not a positive multiple of the world size {world_size}")
    return total // world_size


def batch_shape(engine: EngineConfig, world_size: int) -> tuple[int, int]:
    """(micro batch size, gradient accumulation steps) of each rank. Of ``auto``, ``plan.auto`` makes a number before.

    Raises:
        UserError: the global batch cannot be made of equal micro-batches on all ranks.
    """
    share, micro = share_of_rank(engine, world_size), engine.micro_batch_size
    if micro == "auto":
        raise ValueError("engine.micro_batch_size: auto is not settled yet")
    micro = share if micro is None else min(share, micro)
    if micro < 1 or share % micro:
        raise UserError(
            f"engine.micro_batch_size={micro} does not divide a rank's share {share} of global_batch_size="
            f"{engine.global_batch_size} over {world_size} ranks"
        )
    return micro, share // micro


def load_deepspeed_config(
    path: str, engine: EngineConfig, optimizer: OptimizerConfig, world_size: int
) -> dict[str, Any]:
    """Read ``path`` and fill in its "auto" values from the config.

    A value other than "auto" must equal that of the config.

    Raises:
        UserError: the file is unreadable, a value differs from the config, or a setting trains silently wrong
            (``refuse``) or is not accepted by DeepSpeed.
    """
    file = find_shipped(path, "ds_configs", ".json")
    check_regular(file, streams=True)
    try:
        raw = load_json(file.read_text(encoding="utf-8"), pairs=unique_keys)
    except OSError as error:
        raise UserError(
            f"--deepspeed_config {path}: {error.strerror}{suggest_file(path, 'ds_configs', '.json')}"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}: not valid JSON: {error}") from error
    if _deeper(raw, MAX_DEPTH):
        raise UserError(f"--deepspeed_config {path}: is nested deeper than {MAX_DEPTH} levels")
    _check_sections(raw, path)
    micro, accumulation = batch_shape(engine, world_size)
    ours = {
        "train_batch_size": engine.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        **{name: {"enabled": precision_of(engine) == name} for name in ("bf16", "fp16")},
    }
    filled = _fill(raw, ours, path)
    if left := _unfilled(filled):
        raise UserError(
            f'--deepspeed_config {path}: nothing fills in "auto" for {left[0]}; write a value or leave it out'
        )
    filled.setdefault("zero_allow_untested_optimizer", True)
    filled.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW works in host memory, too
    filled.setdefault("steps_per_print", 10**9)
    refuse(filled, path)
    _try(filled, path)
    refuse_unknown(filled, path)  # after DeepSpeed's own messages on keys of older versions
    return filled


def offloads_optimizer(settings: dict[str, Any], logging: LoggingConfig) -> bool:
    """Whether a file that has been read keeps the optimizer's states in host memory.

    Raises:
        UserError: it does, and gradient norms by kind are asked for.
    """
    offloads = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if offloads and logging.grad_norms_every:
        raise UserError(
            "logging.grad_norms_every: with offload_optimizer gradients are not at hand by parameter; set it to 0"
        )
    return offloads


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper than ``most`` levels, too deep for recursion."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


def _check_sections(raw: Any, path: str) -> None:
    """Raise UserError if the file or one of its sections is no JSON object ("auto" is refused later)."""
    if not isinstance(raw, dict):
        raise UserError(f"--deepspeed_config {path}: must be a JSON object, {{...}}")
    for section in SECTIONS:
        holder, _, name = section.rpartition(".")
        node = raw.get(holder, {}) if holder else raw
        value = node.get(name, {}) if isinstance(node, dict) else {}
        if not isinstance(value, dict) and value != "auto":
            raise UserError(
                f"--deepspeed_config {path}: {section}={json.dumps(value)} must be a JSON object, {{...}}; "
                "write one or leave it out"
            )


def _fill(raw: dict[str, Any], ours: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    filled = dict(raw)
    for key, value in ours.items():
        given = raw.get(key, "auto")
        if isinstance(value, dict):
            filled[key] = _fill(given if isinstance(given, dict) else {}, value, path, f"{prefix}{key}.")
        elif given == "auto":
            filled[key] = value
        elif given != value:
            raise UserError(
                f'--deepspeed_config {path}: {prefix}{key}={given} but the config gives {value}; write "auto" there'
            )
    return filled


def _unfilled(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a tree whose value is "auto"."""
    left = []
    for key, value in tree.items():
        if isinstance(value, dict):
            left += _unfilled(value, f"{prefix}{key}.")
        elif value == "auto":
            left.append(f"{prefix}{key}")
    return left


def refuse(config: dict[str, Any], path: str) -> None:
    """Raise UserError for settings that DeepSpeed 0.19.8 accepts but handles wrongly, or fails on with an assertion."""
    zero = config.get("zero_optimization", {})
    stage, accumulates = zero.get("stage", 0), config["gradient_accumulation_steps"] > 1
    stage = stage if isinstance(stage, int) else -1  # refuse_keys names it
    offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"  # refuse_keys names others
    bf16, in_fp32 = config["bf16"]["enabled"], config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    halves = bf16 or config["fp16"]["enabled"]
    reasons = {
        "zero_optimization.stage=0: with experts its clipping norm is wrong (DeepSpeed#8475); use stage 1": stage == 0,
        "zero_optimization.overlap_comm=true: at stage 1 with several micro-batches a step, all gradients but those of "
        "the last bucket are silently wrong; use false, or stage 2": stage == 1
        and bool(zero.get("overlap_comm"))
        and accumulates,
        f"zero_optimization.offload_optimizer: at stage {stage} with several micro-batches a step, gradients are "
        "silently wrong; use stage 1, or a greater engine.micro_batch_size": stage > 1 and offloads and accumulates,
        "zero_optimization.offload_param: has no effect below stage 3; leave it out": stage != 3
        and zero.get("offload_param", {}).get("device", "none") != "none",
        'data_types.grad_accum_dtype="fp32": at stage 1 the gradient\'s norm is wrong with experts; use stage 2': stage
        == 1
        and halves
        and in_fp32,
        'communication_data_type="bf16": loses bits of fp32 gradients; leave it out': not bf16
        and config.get("communication_data_type") == "bf16",
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"--deepspeed_config {path}: {reason}")
    refuse_keys(config, path)


def _try(config: dict[str, Any], path: str) -> None:
    """Raise UserError, with DeepSpeed's own reason, for a setting that it does not accept."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        # It computes train_batch_size itself, for the world size of the process group.
        DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})
    except ValidationError as error:
        raise UserError(f"--deepspeed_config {path}: {_invalid(config, error.errors(include_url=False)[0])}") from error
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, AssertionError) as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise UserError(f"--deepspeed_config {path}: DeepSpeed does not take it: {reason}") from error


def _invalid(config: dict[str, Any], fault: Mapping[str, Any]) -> str:
    """The message for a fault found by pydantic, which names the key only within its section."""
    name, value = ".".join(map(str, fault["loc"])), fault["input"]
    key = next((key for key, given in _entries(config) if f".{key}".endswith(f".{name}") and given == value), name)
    if fault["type"] == "extra_forbidden":
        if key in RULES:  # a key with two names, given under both
            return f"{key!r} and its other name, with stage3_, both stand there; leave one of them out"
        return f"unknown key {key!r}{suggest_key(key, list(RULES)) or '; leave it out'}"
    message = fault["msg"]
    if message.startswith("Input should be "):
        message = f"must be {message.removeprefix('Input should be ').partition(',')[0]}"
    return f"{key}={json.dumps(value)}: {message}" if key else message


def _entries(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that a tree holds, sections included."""
    for name, value in tree.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{name}.")
