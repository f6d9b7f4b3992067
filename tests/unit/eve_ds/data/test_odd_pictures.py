"""Whatever kind of file went into a shard untouched, in training it is RGB and upright."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from eve_ds.data.transforms import build_transform
from preprocessing.image_policy import ImagePolicy
from tests.unit.preprocessing.test_image_policy import odd_pictures


@pytest.mark.parametrize("kind", list(odd_pictures()))
def test_odd_files_come_out_rgb_and_upright(kind: str) -> None:
    data, seen = odd_pictures()[kind]
    stored = ImagePolicy().apply(data)
    assert stored == data
    out = build_transform(48, train=False)(stored, sample_id=0)
    assert out.shape == (48, 48, 3) and out.dtype == np.uint8
    expected = np.asarray(seen.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(out.astype(int) - expected).mean() < 3
    turned = np.asarray(seen.transpose(Image.Transpose.ROTATE_180).resize((48, 48))).astype(int)
    assert np.abs(turned - expected).mean() > 10  # so the bound above does tell
