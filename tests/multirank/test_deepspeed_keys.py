"""DeepSpeed files: the keys that are taken train as one process does, and those refused for being wrong are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.deepspeed_keys import FILE, ZERO
from tests.support.distributed import RankFailedError, run_distributed_test
from tests.support.matrix import Case, compare, references

# Small buckets: a pass fills several, as that of a large model does.
SMALL = ("reduce_bucket_size", 20_000)
OFFLOAD = ("offload_optimizer", {"device": "cpu"})


def case(stage: int, **changes: Any) -> Case:
    return Case(**{"stage": stage, "ep_size": 2, "world_size": 2, "accumulation": 2, **changes})


def run(cases: list[Case]) -> None:
    run_distributed_test(compare, 2, args=(cases, references(cases)), timeout=120 + 60 * len(cases))


def test_all_that_is_taken_equals_one_process() -> None:
    cases = [case(stage, zero=tuple(zero.items()), file=tuple(FILE.items())) for stage, zero in ZERO.items()]
    cases += [
        case(1, zero=(SMALL, ("overlap_comm", True)), accumulation=1),
        case(2, zero=(SMALL, OFFLOAD), accumulation=1),
        case(3, zero=(SMALL, OFFLOAD), accumulation=1),
        case(2, precision="bf16", file=(("data_types", {"grad_accum_dtype": "fp32"}),)),
        case(2, precision="bf16", file=(("communication_data_type", "fp32"),)),
    ]
    run(cases)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_key_that_is_taken_equals_one_process(stage: int) -> None:
    run(
        [case(stage, zero=(item,)) for item in ZERO[stage].items()]
        + [case(stage, file=(item,)) for item in FILE.items()]
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (case(1, zero=(SMALL, ("overlap_comm", True))), "loss of step 1"),
        (case(2, zero=(SMALL, OFFLOAD)), "loss of step 1"),
        (case(3, zero=(SMALL, OFFLOAD)), "loss of step 1"),
        (case(2, zero=(("round_robin_gradients", True),)), "differs by"),
        (case(1, precision="bf16", file=(("data_types", {"grad_accum_dtype": "fp32"}),)), "gradient norm of step 0"),
        (case(2, file=(("gradient_allreduce_op", "sum"),)), "gradient norm of step 0"),
        (case(2, file=(("managed_gradient_accumulation", False),)), "loss of step 0"),
        (case(2, file=(("prescale_gradients", True),)), "pre-scale gradients is not yet supported"),
        (case(2, file=(("gradient_predivide_factor", 2.0),)), "gradient_predivide_factor != 1.0 is not yet"),
        (case(2, file=(("wall_clock_breakdown", True),)), "timer is not started"),
        (case(2, file=(("flops_profiler", {"enabled": True}),)), "timer is not started"),
        (case(2, file=(("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),)), "have the same dtype"),
        (case(3, zero=(("stage3_module_granularity_threshold", 1000),)), "Cannot reduce scatter gradients"),
    ],
    ids=lambda value: str(value),
)
def test_what_is_refused_for_being_wrong_is_wrong(wrong: Case, words: str) -> None:
    with pytest.raises(RankFailedError, match=words):
        run([wrong])
