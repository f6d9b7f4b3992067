"""DeepSpeed ZeRO with expert parallelism against one plain PyTorch process on the same global batch.

The promises of DeepSpeed's private expert API that engine/moe_deepspeed.py relies on are held here: reduction of dense
and expert gradients, clipping over both, accumulation, recomputation, weight decay groups. What is compared, and how
closely, is in tests/support/matrix.py. One spawn runs many cases: a spawn takes as long as ten of them.
"""

from __future__ import annotations

import pytest

from tests.support.distributed import RankFailedError, run_distributed_test
from tests.support.matrix import FACTORS, Case, all_cases, compare, pairwise_cases, references
from tests.support.pairwise import pairs_of

# Dense parameters and experts that keep their values, whatever share of them a rank holds.
FREEZE = ("backbone.text_embedding.*", "backbone.blocks.0.*", "*.experts.*")
FROZEN = [Case(stage=stage, ep_size=2, world_size=2, freeze=FREEZE) for stage in (1, 2, 3)]
# Images and pairs on one rank, texts on the other: of the three passes each rank has one or two without a row.
MIXED = [Case(stage=stage, ep_size=2, world_size=2, kinds="ip" * 8 + "t" * 16) for stage in (2, 3)]


def run(cases: list[Case]) -> None:
    run_distributed_test(compare, cases[0].world_size, args=(cases, references(cases)), timeout=120 + 60 * len(cases))


def test_the_short_list_is_short_and_holds_every_pair() -> None:
    short, whole = ([vars(case) for case in cases] for cases in (pairwise_cases(), all_cases()))
    assert len(short) <= 16 and len(whole) == 240
    assert set().union(*map(pairs_of, short)) == set().union(*map(pairs_of, whole))


@pytest.mark.parametrize("world_size", FACTORS["world_size"])
def test_every_pair_of_settings_equals_one_process(world_size: int) -> None:
    fp16 = [Case(stage, ep_size=2, world_size=2, precision="fp16") for stage in (1, 2, 3)]
    cases = [case for case in (*pairwise_cases(), *fp16) if case.world_size == world_size]
    run([*cases, *((*FROZEN, *MIXED) if world_size == 2 else ())])


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("stage", FACTORS["stage"])
@pytest.mark.parametrize("world_size", FACTORS["world_size"])
def test_every_setting_equals_one_process(world_size: int, stage: int) -> None:
    run([case for case in all_cases() if (case.world_size, case.stage) == (world_size, stage)])


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case(stage=1, ep_size=2, world_size=2, zero=(("stage", 0),)),
        Case(stage=1, ep_size=2, world_size=2, zero=(("contiguous_gradients", False),)),
    ],
    ids=["stage 0", "contiguous_gradients false"],
)
def test_what_is_refused_for_being_wrong_is_wrong(case: Case) -> None:
    """The reasons given by ``engine.deepspeed_config.refuse`` hold for this DeepSpeed, and the comparison sees them."""
    with pytest.raises(RankFailedError, match="differs by"):
        run([case])
