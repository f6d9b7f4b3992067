"""The JPEG files that `bench loader` loads: 640 x 480 views of scikit-image's sample photos, made once."""

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
_GRAINS = (8, 40, 160)  # pixels of the coarser side of a drawn image's textures


def made_once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, a folder; `write` fills it the first time. It stands under its name only once it is whole."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            partial.mkdir()
            write(partial)
            partial.rename(target)
    return target


def write_images(folder: Path, count: int) -> None:
    """Write `count` JPEGs, captions.json ([file, caption] each) and about.json (where the photos come from).

    A view is a random box of a photo, of the shape of the image and half to all of the photo's height, mirrored or
    not. Where scikit-image is not installed the photos are drawn, and about.json says so.
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
    """A random box of the photo as an image of `SIZE`."""
    whole = min(photo.width / SIZE[0], photo.height / SIZE[1])
    scale = whole * (0.5 + 0.5 * draw.random())
    width, height = int(SIZE[0] * scale), int(SIZE[1] * scale)
    left = int(draw.random() * (photo.width - width + 1))
    top = int(draw.random() * (photo.height - height + 1))
    image = photo.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


def read_files(folder: Path) -> list[bytes]:
    """The JPEG files' bytes, in the order of their numbers."""
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def copy_names(source: Path, target: Path, copies: int) -> None:
    """Every JPEG of `source` in `target` under `copies` names, which share its bytes, with captions.json."""
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
    """(name, photo) of each, and where they come from."""
    if importlib.util.find_spec("skimage") is None:
        drawn = [(f"drawing {index}", _drawing(index)) for index in range(len(PHOTOS))]
        return drawn, "drawn, since scikit-image is not installed"
    import skimage.data

    photos = [(name, Image.fromarray(getattr(skimage.data, name)())) for name in PHOTOS]
    return photos, f"scikit-image {importlib.metadata.version('scikit-image')}"


def _drawing(seed: int) -> Image.Image:
    """Soft color noise of three grains, whose JPEG files are about as large as those of photos."""
    noise = np.random.default_rng(seed)
    total = np.zeros((SIZE[1], SIZE[0], 3))
    for grain in _GRAINS:
        coarse = Image.fromarray(noise.integers(0, 256, (grain, grain, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)) / len(_GRAINS)
    return Image.fromarray(total.astype(np.uint8))
