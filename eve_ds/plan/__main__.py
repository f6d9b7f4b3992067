"""What a run will need, before any machine is asked for: parameters, memory, traffic, speed and what limits it.

    python -m eve_ds.plan --config eve_ds/configs/pretrain_base.yaml --world_size 8

Nothing is trained and no process group is joined: a rank's step is acted out on tensors without values. What a run
would refuse at its start is refused here, in the same words.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Some are not used here: jsonargparse looks up the types of inherited fields in this module.
from eve_ds.config import (  # noqa: F401
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    FinetuneConfig,
    FinetuneObjective,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    parse,
)
from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command
from eve_ds.finetune_options import expand_options
from eve_ds.options import values_of
from eve_ds.plan.devices import CardName
from eve_ds.recipes import read_yaml, split_options
from eve_ds.tasks.mlm_mim_codes import BEIT_V2_CODES
from eve_ds.tasks.registry import PRETRAIN, find_spec
from eve_ds.tasks.spec import PretrainSpec
from preprocessing.local_files import write_json

PROGRAM = "python -m eve_ds.plan"


@dataclass
class PlanOptions:
    """Options of the plan.

    Args:
        world_size: ranks.
        expert_parallel_size: in place of engine.expert_parallel_size.
        micro_batch_size: in place of engine.micro_batch_size.
        zero: in place of deepspeed_config: ds_configs/zero1.json, zero2.json or zero3.json.
        device: gpu (fused attention, all reserved memory counts) or cpu (what is resident).
        card: h100, h200, a100 or a100_40gb: the GPU whose memory, peak and links count.
        device_memory: of one device, as in 80GiB or 24e9; null takes the card's, on the CPU 80GiB.
        text_length: tokens of a text; null takes the longest, model.max_text_length.
        num_answers: classes of the head where the data tell them: VQA's answers; the codes of --task mlm_mim_codes
            (8192 in pre-training).
        pairs: samples that the whole run sees (pairs, questions or statements), for the days; null: those of its steps.
        mfu: share of the devices' peak that the model's operations reach; null takes what was measured
            (eve_ds/plan/devices.py).
        peak_tflops: of one device, dense, for the run's precision; null takes the card's in bf16, on the CPU none.
        json: file to write all figures to, in bytes and operations.
    """

    world_size: int = 8
    expert_parallel_size: int | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    zero: int | None = None
    device: Literal["gpu", "cpu"] = "gpu"
    card: CardName = "h100"
    device_memory: str | None = None
    text_length: int | None = None
    num_answers: int = 3128
    pairs: float | None = None
    mfu: float | None = None
    peak_tflops: float | None = None
    json: str | None = None


@dataclass
class PretrainPlan(PlanOptions, PretrainConfig):
    """The plan of a pre-training run."""

    num_answers: int = BEIT_V2_CODES


@dataclass
class FinetunePlan(PlanOptions, FinetuneConfig):
    """The plan of a fine-tuning run."""


def main() -> None:
    argv = sys.argv[1:]
    defaults: dict[str, Any] = {}
    root = _root(argv)
    if root is FinetunePlan:
        argv, defaults = expand_options(argv)
    options = parse(root, argv, PROGRAM, defaults)
    prepare_environment()
    # DeepSpeed takes seconds to import: after --help and bad options.
    from eve_ds.plan.figures import make_plan
    from eve_ds.plan.table import as_text

    plan = make_plan(options)
    print(as_text(plan))
    if options.json:
        write_json(Path(options.json), plan)


def _root(argv: list[str]) -> Any:
    """The kind of run that the options and the recipes are of, by the task that they name."""
    recipes, _ = split_options(argv)
    trees = [read_yaml(path, "--config") for path in recipes]
    named = [tree["task"] for tree in trees if isinstance(tree, dict) and "task" in tree]
    named += [typed for name, typed in values_of(argv) if name == "task"]
    if not named or not isinstance(named[-1], str) or named[-1] in PRETRAIN:
        return PretrainPlan  # whose parser says what is wrong with a name that is no text
    if ":" in named[-1] and isinstance(find_spec(named[-1]), PretrainSpec):
        return PretrainPlan
    return FinetunePlan  # which refuses a task that there is not


if __name__ == "__main__":
    run_command(main)
