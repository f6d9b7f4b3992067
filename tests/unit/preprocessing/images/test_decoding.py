import functools
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from eve_ds.data.transforms import decode_image as trained_on
from preprocessing.images.decoding import BadImage, decode_image, open_image, read_image
from preprocessing.images.image_refs import FileImage
from tests.unit.preprocessing.helpers import ROOT, image_of, png_with


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_bytes_pass_untouched(tmp_path: Path, image_format: str) -> None:
    data = image_of(1, image_format)
    (tmp_path / "a").write_bytes(data)
    assert read_image(FileImage(str(tmp_path / "a"))) == data
    assert decode_image(data).size == (40, 40)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated_files_are_bad(image_format: str, share: float) -> None:
    data = image_of(2, image_format)
    with pytest.raises(BadImage, match=r"does not decode|is of no known format"):
        decode_image(data[: int(share * len(data))])


def test_a_flipped_byte_of_a_png_is_seen() -> None:
    data = bytearray(image_of(3, "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage, match="does not decode"):
        decode_image(bytes(data))


@functools.cache
def zeros(mebibytes: int) -> bytes:
    """So many, compressed."""
    return zlib.compress(bytes(mebibytes << 20))


@pytest.mark.parametrize("kind", [b"zTXtComment\0\0", b"iTXtComment\0\1\0\0\0", b"iCCPprofile\0\0"])
@pytest.mark.parametrize("behind", [False, True])
def test_texts_and_profiles_of_megabytes_are_no_fault_of_a_png(kind: bytes, behind: bool) -> None:
    sound = png_with(kind[:4], kind[4:] + zeros(3), behind)
    for image in (decode_image(sound), open_image(sound)):
        assert image.convert("RGB").tobytes() == decode_image(image_of(1, "PNG")).tobytes()
    assert trained_on(sound).tobytes() == trained_on(image_of(1, "PNG")).tobytes()
    bomb = png_with(kind[:4], kind[4:] + zeros(100), behind)
    with pytest.raises(BadImage):
        decode_image(bomb)


@pytest.mark.parametrize("module", ["preprocessing.images.decoding", "eve_ds.data.transforms"])
def test_each_reader_sets_the_bound_of_png_texts(module: str) -> None:
    code = f"import {module}; from PIL import PngImagePlugin; print(PngImagePlugin.MAX_TEXT_CHUNK)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{64 << 20}\n"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>"])
def test_what_is_no_image_is_bad(data: bytes) -> None:
    with pytest.raises(BadImage, match="is of no known format"):
        decode_image(data)


@pytest.mark.parametrize("read", [decode_image, open_image])
def test_pixel_bound(read: Callable[..., Image.Image]) -> None:
    data = image_of(4, side=40)
    assert read(data, max_pixels=1600).size == read(memoryview(data), max_pixels=1600).size == (40, 40)
    with pytest.raises(BadImage, match="too many pixels"):
        read(data, max_pixels=1599)


@pytest.mark.parametrize("side", [9_000, 60_000])
@pytest.mark.parametrize("read", [decode_image, open_image])
def test_the_size_in_the_header_is_refused_before_a_pixel_is_decoded(
    read: Callable[..., Image.Image], side: int
) -> None:
    frame = struct.pack(">BHH", 8, 40, 40)
    data = image_of(4, side=40)
    assert data.count(frame) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="too many pixels"):
            read(data.replace(frame, struct.pack(">BHH", 8, side, side)))


def test_a_header_cut_anywhere_is_refused_or_has_the_size() -> None:
    data = image_of(4, side=40)
    for end in range(min(len(data), 720)):
        with suppress(BadImage):
            assert open_image(data[:end]).size == (40, 40)


def test_a_decompression_bomb_is_never_decoded() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + bytes(4)
        + b"IDAT"
        + bytes(4)
    )
    with pytest.raises(BadImage, match="too many pixels"):
        decode_image(data)


@pytest.mark.parametrize("room", [None, memoryview(bytearray(100))])
def test_a_file_that_cannot_be_read(tmp_path: Path, room: memoryview | None) -> None:
    with pytest.raises(BadImage, match="is missing"):
        read_image(FileImage(str(tmp_path / "a.jpg")), room)
    os.mkfifo(tmp_path / "pipe")  # to open one waits for its writer
    for other in (tmp_path, tmp_path / "pipe"):
        assert not FileImage(str(other)).exists()
        with pytest.raises(BadImage, match="is no regular file"):
            read_image(FileImage(str(other)), room)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 5000])
def test_files_are_read_into_memory_where_they_fit(tmp_path: Path, size: int) -> None:
    room = memoryview(bytearray(100))
    (tmp_path / "a").write_bytes(bytes(range(1, 101))[:size] + bytes(max(0, size - 100)))
    data = read_image(FileImage(str(tmp_path / "a")), room)
    assert data == (tmp_path / "a").read_bytes()
    assert (isinstance(data, memoryview) and room[:size] == data) == (size < 100)
