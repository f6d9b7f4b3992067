"""Fingerprints of images: SHA-256 of the file for exact duplicates, two perceptual hashes for near ones.

dHash compares neighboring pixels of a 9x8 image; pHash the lowest 8x8 frequencies of a 32x32 one with their median
(Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). Each has 64 bits. Two images are
near duplicates when both hashes differ in few bits: a single hash also matches plain skies and walls.
"""

import hashlib
import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from preprocessing.errors import UserError
from preprocessing.images.decoding import upright_rgb
from preprocessing.running.storage import StoragePath, open_input, write_whole

NEAR_DISTANCE = 6  # bits of 64
_SIDE, _LOW = 32, 8
_DRAFT = (4 * _SIDE, 4 * _SIDE)  # a JPEG is decoded at a fraction of its size, but not below this one
# DCT-II, its rows without the usual scale: comparing with the median needs none.
_DCT = np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))


def content_key(data: bytes | memoryview) -> int:
    """The first 64 bits of the file's SHA-256: with 12 M files against 12 M, one false match in 100,000 runs."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def perceptual_hashes(image: Image.Image) -> tuple[int, int]:
    """(dHash, pHash) of an image just opened or decoded, upright and in gray. Raises what the decoder raises."""
    image.draft("L", _DRAFT)  # only affects a JPEG that is not decoded yet
    gray = upright_rgb(image).convert("L")
    small = np.asarray(gray.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    square = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.BOX)).astype(np.float64)
    low = (_DCT @ square @ _DCT.T).round(3)  # rounded, so that rounding errors of the sums do not matter
    return _pack(small[:, 1:] > small[:, :-1]), _pack(low > np.median(low))


def _pack(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")


@dataclass(frozen=True)
class HashList:
    """Fingerprints of many images. Attributes have one entry an image: keys, dhash, phash [n] uint64, names [n] str."""

    keys: np.ndarray
    dhash: np.ndarray
    phash: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, entries: Iterable[tuple[int, int, int, str]]) -> "HashList":
        """From (key, dHash, pHash, name) an image."""
        rows = list(entries)
        keys, dhash, phash = (np.array([row[column] for row in rows], dtype=np.uint64) for column in range(3))
        return cls(keys, dhash, phash, np.array([row[3] for row in rows], dtype=str))

    @classmethod
    def joined(cls, lists: Iterable["HashList"]) -> "HashList":
        """All entries of several lists."""
        lists = [cls.of([]), *lists]
        return cls(*(np.concatenate([getattr(one, name) for one in lists]) for name in _ARRAYS))

    @classmethod
    def load(cls, path: StoragePath) -> "HashList":
        """Read what `save` wrote. Raises UserError naming the file."""
        try:
            with open_input(path) as file, np.load(file, allow_pickle=False) as arrays:
                return cls(*(arrays[name] for name in _ARRAYS))._checked()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; make it with `python -m preprocessing duplicates hash`") from None
        except NPZ_DAMAGE as error:
            message = " ".join(str(error).split())
            raise UserError(f"{path}: is no list of hashes ({message}); make it again") from None

    def _checked(self) -> "HashList":
        """Return self. Raises ValueError unless the arrays have one length and the documented types."""
        if {column.shape for column in (self.dhash, self.phash, self.names)} != {(len(self.keys),)}:
            raise ValueError("its columns differ in length")
        if {column.dtype for column in (self.keys, self.dhash, self.phash)} != {np.dtype(np.uint64)}:
            raise ValueError("its hashes are not of 64 bits")
        if self.names.dtype.kind != "U":
            raise ValueError("its names are no text")
        return self

    def save(self, path: StoragePath) -> None:
        """Write a .npz file, atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: getattr(self, name) for name in _ARRAYS})
        write_whole(path, buffer.getvalue())

    def near(self, dhash: int, phash: int, distance: int) -> Iterator[tuple[int, int]]:
        """(index, greater of the two distances in bits) of each entry within `distance` of an image, nearest first."""
        far = np.maximum(
            np.bitwise_count(self.dhash ^ np.uint64(dhash)), np.bitwise_count(self.phash ^ np.uint64(phash))
        )
        found = np.flatnonzero(far <= distance)
        yield from ((int(index), int(far[index])) for index in found[np.argsort(far[found], kind="stable")])


_ARRAYS = ("keys", "dhash", "phash", "names")
NPZ_DAMAGE = (  # what NumPy and zipfile raise on a damaged .npz file, or on a file that is none
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    MemoryError,
    RuntimeError,  # NotImplementedError is one
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
