"""The JPEG files that ``bench loader`` loads: 640 x 480 crops of scikit-image's sample photos, created once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (640, 480)
QUALITY = 90
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina", "immunohistochemistry")
CAPTIONS, ABOUT = "captions.json", "about.json"
_GRAINS = (8, 40, 160)  # side of the noise grids of a synthetic photo, pixels


def create_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder ``target``; the first call creates it with ``write``. It appears only when it is complete."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            partial.mkdir()
            write(partial)
            partial.rename(target)
    return target


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs, captions.json ([file, caption] each) and about.json (where the photos come from).

    An image is a random crop of a photo with the aspect ratio of ``SIZE``, between half and all of the largest such
    crop, and possibly mirrored. Without scikit-image the photos are synthetic, which about.json records.
    """
    photos, source = _photos()
    captions = []
    for index in range(count):
        draw = random.Random(index)
        name, photo = photos[index % len(photos)]
        file = f"{index:06d}.jpg"
        view(photo, draw).save(folder / file, "JPEG", quality=QUALITY)
        captions.append([file, f"view {index} of the photo {name.replace('_', ' ')}"])
    (folder / CAPTIONS).write_text(json.dumps(captions), encoding="utf-8")
    names = [name for name, _ in photos]
    (folder / ABOUT).write_text(json.dumps({"photos": source, "names": names}), encoding="utf-8")


def view(photo: Image.Image, draw: random.Random) -> Image.Image:
    """A random crop of the photo, resized to ``SIZE``."""
    whole = min(photo.width / SIZE[0], photo.height / SIZE[1])
    scale = whole * (0.5 + 0.5 * draw.random())
    width, height = int(SIZE[0] * scale), int(SIZE[1] * scale)
    left = int(draw.random() * (photo.width - width + 1))
    top = int(draw.random() * (photo.height - height + 1))
    image = photo.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


def read_files(folder: Path) -> list[bytes]:
    """The bytes of the JPEG files, in the order of their numbers."""
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def copy_names(source: Path, target: Path, copies: int) -> None:
    """Link every JPEG of ``source`` into ``target`` under ``copies`` names, and write captions.json."""
    captions = json.loads((source / CAPTIONS).read_text(encoding="utf-8"))
    named = []
    for copy in range(copies):
        for file, caption in captions:
            name = f"{copy:03d}-{file}"
            _link(source / file, target / name)
            named.append([name, caption])
    (target / CAPTIONS).write_text(json.dumps(named), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _photos() -> tuple[list[tuple[str, Image.Image]], str]:
    """[(name, photo)], and their source."""
    if importlib.util.find_spec("skimage") is None:
        drawn = [(f"drawing {index}", _drawing(index)) for index in range(len(PHOTOS))]
        return drawn, "drawn, since scikit-image is not installed"
    import skimage.data

    photos = [(name, Image.fromarray(getattr(skimage.data, name)())) for name in PHOTOS]
    return photos, f"scikit-image {importlib.metadata.version('scikit-image')}"


def _drawing(seed: int) -> Image.Image:
    """Smooth color noise at three scales; its JPEG files are about as large as those of photos."""
    noise = np.random.default_rng(seed)
    total = np.zeros((SIZE[1], SIZE[0], 3))
    for grain in _GRAINS:
        coarse = Image.fromarray(noise.integers(0, 256, (grain, grain, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)) / len(_GRAINS)
    return Image.fromarray(total.astype(np.uint8))
