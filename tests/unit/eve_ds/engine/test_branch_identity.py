"""What a branch of a fine-tuning may change."""

from __future__ import annotations

from eve_ds.engine.identity import Identity


def test_a_branch_may_draw_and_weigh_negatives_otherwise() -> None:
    """As docs/evaluation.md advises where the matching head stays at its prior."""
    settings: dict[str, object] = {"embed_dim": 8, "even_negatives": 0.0, "matching_weight": 1.0}

    def branch(**other: object) -> Identity:
        return Identity({f"objective.{key}": value for key, value in {**settings, **other}.items()}, {}).for_a_branch()

    assert branch().differences(branch(even_negatives=0.5, matching_weight=3.0)) == []
    assert len(branch().differences(branch(embed_dim=16))) == 1
