"""Whatever kind of file went into a shard untouched, in training it is RGB and upright."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from eve_ds.data.transforms import build_transform, decode_image
from preprocessing.errors import UserError
from preprocessing.images.policy import ImagePolicy
from preprocessing.shards.schema import MAX_PIXELS
from tests.unit.preprocessing.images.test_policy import odd_images


@pytest.mark.parametrize("kind", list(odd_images()))
def test_unusual_files_are_decoded_to_upright_rgb(kind: str) -> None:
    data, seen = odd_images()[kind]
    stored = ImagePolicy().apply(data)
    assert stored == data
    out = build_transform(48, train=False)(stored, sample_id=0)
    assert out.shape == (48, 48, 3) and out.dtype == np.uint8
    expected = np.asarray(seen.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(out.astype(int) - expected).mean() < 3
    turned = np.asarray(seen.transpose(Image.Transpose.ROTATE_180).resize((48, 48))).astype(int)
    assert np.abs(turned - expected).mean() > 10  # so the bound above does tell


@pytest.mark.parametrize("train", [True, False])
def test_images_above_max_pixels_are_not_decoded(train: bool) -> None:
    """Ten thousand by six thousand black pixels are a PNG of 60 kB, and would be 180 MB."""
    buffer = io.BytesIO()
    Image.new("L", (10_000, 6_000)).save(buffer, "PNG")
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"10000 x 6000 pixels, data.max_pixels={MAX_PIXELS}"):
        build_transform(16, train)(buffer.getvalue(), 0)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert decode_image(buffer.getvalue(), 60_000_000).size == (10_000, 6_000)
    assert build_transform(16, train, max_pixels=60_000_000)(buffer.getvalue(), 0).shape == (16, 16, 3)
