"""Helpers of these tests: run the command line, make images, read rows back."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.__main__ import main
from preprocessing.shards.reader import read_rows
from preprocessing.shards.schema import read_manifest

ROOT = Path(__file__).parents[3]
IMAGES = {"train": 60, "val": 16, "test": 24}  # of the shapes world that the fixture `raw` makes


def convert(*arguments: object) -> None:
    """Run a command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m preprocessing …` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "preprocessing", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a split folder."""
    manifest = read_manifest(folder)
    return [row for shard in manifest["shards"] for row in read_rows(folder / shard["file"], manifest["kind"])]


def image_of(seed: int = 0, image_format: str = "JPEG", side: int = 40) -> bytes:
    """An image file's bytes; another seed, another image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format)
    return buffer.getvalue()


def png_with(kind: bytes, content: bytes, behind: bool) -> bytes:
    """A PNG that has a chunk before or behind its pixels; of `image(1, "PNG")`."""
    data = image_of(1, "PNG")
    place = data.index(b"IEND" if behind else b"IDAT") - 4
    body = kind + content
    return data[:place] + struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)) + data[place:]


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as JSON; gives the path."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
