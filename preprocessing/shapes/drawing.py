"""Scenes -> images: 64x64 RGB, anti-aliased shapes on a gray, shaded, slightly noisy ground; and PNG bytes."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from preprocessing.shapes.scenes import GRID, SHAPES, SIZES, Scene

CELL = 16  # pixels a side: the patch size of the tiny model, so that an object is inside one patch
SIDE = GRID * CELL
_RGB = {
    "red": (214, 40, 40),
    "green": (34, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (150, 50, 180),
    "black": (30, 30, 30),
}
_RADIUS = {"small": 5.0, "large": 7.5}  # of the ring, in pixels
_SHIFT = {"small": 1, "large": 0}  # how far an object may sit off the middle of its cell
_COLOR_JITTER = 10
_SHADE = 16  # how much lighter or darker an edge is than the middle: masked patches can be inferred from visible ones
_NOISE = 2
_SUPERSAMPLE = 8


def _coverage(shape: str, radius: float, dx: int, dy: int) -> np.ndarray:
    """How much of each pixel of a cell the shape covers: [CELL, CELL] float32 in 0..1."""
    ticks = (np.arange(CELL * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - CELL / 2
    y, x = np.meshgrid(ticks - dy, ticks - dx, indexing="ij")
    if shape == "ring":
        inside = ((0.5 * radius) ** 2 <= x**2 + y**2) & (x**2 + y**2 <= radius**2)
    elif shape == "square":
        half = 0.9 * radius
        inside = (np.abs(x) <= half) & (np.abs(y) <= half)
    else:  # triangle
        inside = (y <= 0.9 * radius) & (np.abs(x) <= (y + radius) * 0.55)
    cells = inside.reshape(CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE)
    covered: np.ndarray = cells.mean(axis=(1, 3), dtype=np.float32)
    return covered


def _sprites() -> np.ndarray:
    """Coverage of every [shape, size, vertical shift, horizontal shift]: [3, 2, 3, 3, CELL, CELL] float32."""
    return np.stack(
        [
            [
                [
                    [_coverage(shape, _RADIUS[size], dx * _SHIFT[size], dy * _SHIFT[size]) for dx in (-1, 0, 1)]
                    for dy in (-1, 0, 1)
                ]
                for size in SIZES
            ]
            for shape in SHAPES
        ]
    )


def draw(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """Images of `scenes`: [len(scenes), SIDE, SIDE, 3] uint8. `rng` sets ground, noise, shifts and color jitter."""
    count = len(scenes)
    ground = rng.integers(118, 139, size=(count, 1, 1, 1)) + rng.integers(-6, 7, size=(count, 1, 1, 3))
    angle = rng.uniform(0, 2 * np.pi, size=(count, 1, 1, 1))
    ticks = np.linspace(-1, 1, SIDE)
    shade = _SHADE * (np.cos(angle) * ticks[None, None, :, None] + np.sin(angle) * ticks[None, :, None, None])
    # Noise in blocks of 2x2 pixels, alike in the three channels: files stay a quarter the size.
    noise = rng.integers(-_NOISE, _NOISE + 1, size=(count, SIDE // 2, SIDE // 2, 1), dtype=np.int8)
    images = (ground + shade).astype(np.float32) + noise.repeat(2, axis=1).repeat(2, axis=2)

    owner = np.array([index for index, scene in enumerate(scenes) for _ in scene])
    things = [thing for scene in scenes for thing in scene]
    row, column = np.divmod(np.array([thing.cell for thing in things]), GRID)
    shape = np.array([SHAPES.index(thing.shape) for thing in things])
    size = np.array([SIZES.index(thing.size) for thing in things])
    shift = rng.integers(0, 3, size=(2, len(things)))
    color = np.array([_RGB[thing.color] for thing in things], dtype=np.float32)
    color = np.clip(color + rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, size=color.shape), 0, 255)

    cover = _sprites()[shape, size, shift[0], shift[1]][..., None]  # [things, CELL, CELL, 1]
    cells = images.reshape(count, GRID, CELL, GRID, CELL, 3)  # a view: writing to it draws
    under = cells[owner, row, :, column]
    cells[owner, row, :, column] = under + cover * (color[:, None, None, :] - under)
    return (images + 0.5).astype(np.uint8)  # the ground stays within 87..170, and what is mixed with it in 0..255


def to_png(image: np.ndarray) -> bytes:
    """PNG bytes of one [SIDE, SIDE, 3] uint8 image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
