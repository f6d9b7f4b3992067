"""What of ``data.sources`` makes a run another one."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from eve_ds.config import PretrainConfig
from eve_ds.data.data_config import DataConfig, DataSource
from eve_ds.engine.identity import Identity


@pytest.mark.parametrize("known", [True, False])
def test_another_modality_of_the_same_data(known: bool) -> None:
    """Also where the run is of a version that knew no modalities; a branch may change them."""
    one, other = (
        asdict(PretrainConfig(data=DataConfig(sources=[DataSource("a", modality=modality), DataSource("b")])))
        for modality in ("pairs", "image")
    )
    if not known:
        for source in one["data"]["sources"]:
            del source["modality"]
    before, now = Identity.from_config(one), Identity.from_config(other)
    assert before.differences(now) == ["modalities of data.sources is None there and ['image', 'pairs'] here"]
    assert before.for_a_branch().differences(now.for_a_branch()) == []
    stored = Identity({key: value for key, value in before.settings.items() if "modalities" not in key}, {})
    assert stored.differences(now) == before.differences(now) and stored.differences(before) == []
