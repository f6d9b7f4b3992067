"""What the own reader of JPEG headers accepts, Pillow accepts with the same size; the rest it leaves to Pillow."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing.images.decoding import BadImage, open_image, size_of_image
from preprocessing.images.jpeg_header import jpeg_size
from tests.unit.preprocessing.helpers import image_of

_SIZE = (48, 32)


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (_SIZE[1], _SIZE[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segment(marker: int, content: bytes) -> bytes:
    """A JPEG file with one more segment behind its first."""
    return _BASELINE[:20] + segment(marker, content) + _BASELINE[20:]


_BASELINE = jpeg()
_EXIF = Image.Exif()
_EXIF[0x0112] = 6
COMMON = {
    "baseline": _BASELINE,
    "gray": jpeg("L"),
    "CMYK": jpeg("CMYK"),
    "progressive": jpeg(progressive=True),
    "optimized": jpeg(optimize=True),
    "no subsampling": jpeg(subsampling=0, quality=95),
    "resolution": jpeg(dpi=(300, 300)),
    "ICC profile of two segments": jpeg(icc_profile=bytes(70_000)),
    "comment": jpeg(comment=b"of no interest"),
    "restart markers": jpeg(restart_marker_rows=1),
    "XMP": jpeg(xmp=b"<x:xmpmeta/>"),
    "16-bit tables": jpeg(qtables=[[300] * 64, [400] * 64]),
    "unknown application": with_segment(0xEB, b"anything"),
}
LEFT = {  # opened by Pillow or not, but never decided here
    "EXIF": jpeg(exif=_EXIF),
    "broken EXIF": with_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "Photoshop": with_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\x00\x00" + struct.pack(">I", 16) + bytes(16)),
    "broken Photoshop": with_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "broken MPO": with_segment(0xE2, b"MPF\0II*\0"),
    "short JFIF": b"\xff\xd8" + segment(0xE0, b"JFIF\0\1") + _BASELINE[20:],
    "short Adobe": with_segment(0xEE, b"Adobe\0"),
    "short ICC": with_segment(0xE2, b"ICC_PROFILE\0\1"),
    "bad table": with_segment(0xDB, bytes(64)),
    "12 bits": _BASELINE.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "no width": _BASELINE.replace(struct.pack(">BHH", 8, 32, 48), struct.pack(">BHH", 8, 32, 0)),
    "two components": _BASELINE.replace(b"\x00\x20\x00\x30\x03", b"\x00\x20\x00\x30\x02"),
    "fill bytes": _BASELINE[:20] + b"\xff" + _BASELINE[20:],
    "junk": _BASELINE[:20] + b"junk" + _BASELINE[20:],
    "two frames": with_segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"\1\x11\0"),
    "arithmetic coding": _BASELINE.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),
    "PNG": image_of(1, "PNG"),
    "GIF": image_of(1, "GIF"),
    "no image": b"<html>404</html>",
    "nothing": b"",
}


def seen(data: bytes | memoryview, size_of: Any = size_of_image) -> Any:
    """The size, or the words of the refusal."""
    try:
        return size_of(data)
    except BadImage as error:
        return str(error)


def seen_by_pillow(data: bytes) -> Any:
    return seen(data, lambda file: open_image(file).size)


@pytest.mark.parametrize("kind", COMMON)
def test_common_files_need_no_pillow(kind: str) -> None:
    assert jpeg_size(COMMON[kind]) == jpeg_size(memoryview(COMMON[kind])) == _SIZE == seen_by_pillow(COMMON[kind])


@pytest.mark.parametrize("kind", LEFT)
def test_the_unusual_is_left_to_pillow(kind: str) -> None:
    assert jpeg_size(LEFT[kind]) is None
    assert seen(LEFT[kind]) == seen(memoryview(LEFT[kind])) == seen_by_pillow(LEFT[kind])


@pytest.mark.parametrize("kind", [*COMMON, *LEFT])
def test_a_file_cut_anywhere_is_judged_as_by_pillow(kind: str) -> None:
    """After every byte of the header, but for the inside of long segments."""
    data = (COMMON | LEFT)[kind]
    for end in [*range(min(len(data), 720)), *range(720, len(data), 997)]:
        assert seen(data[:end]) == seen_by_pillow(data[:end]), end


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([*COMMON.values(), *LEFT.values()]), st.data())
def test_a_file_with_changed_bytes_is_judged_as_by_pillow(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3)) if data else 0):
        place = draw.draw(st.integers(0, min(len(changed), 700) - 1))
        what = draw.draw(st.sampled_from(["set", "insert", "delete"]))
        new = draw.draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xff\xe1", b"\xff\xda", b"\xff\xc0"]))
        changed[place : place + {"set": len(new), "insert": 0, "delete": 4}[what]] = b"" if what == "delete" else new
    assert seen(bytes(changed)) == seen_by_pillow(bytes(changed))


def test_the_bounds_of_size() -> None:
    large = _BASELINE.replace(struct.pack(">BHH", 8, 32, 48), struct.pack(">BHH", 8, 60_000, 60_000))
    assert jpeg_size(large) == (60_000, 60_000)
    with warnings.catch_warnings(record=True):
        assert seen(large) == seen_by_pillow(large) == "has too many pixels"
    assert size_of_image(_BASELINE, 48 * 32) == _SIZE
    with pytest.raises(BadImage, match="has too many pixels"):
        size_of_image(_BASELINE, 48 * 32 - 1)
