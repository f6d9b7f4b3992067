"""What happens to an image's bytes: untouched, checked, made smaller, kept out."""

import argparse
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocessing.errors import UserError
from preprocessing.images.decoding import BadImage
from preprocessing.images.policy import ExcludedImage, ImagePolicy, add_image_arguments, image_policy
from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def scene(seed: int, width: int = 320, height: int = 240, spots: tuple[int, int] = (9, 12)) -> Image.Image:
    """A smooth image, so that perceptual hashes mean something."""
    coarse = np.random.default_rng(seed).integers(0, 256, (*spots, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def policy(*words: object) -> ImagePolicy:
    parser = argparse.ArgumentParser()
    add_image_arguments(parser)
    return image_policy(parser.parse_args([str(word) for word in words]))


def odd_images() -> dict[str, tuple[bytes, Image.Image]]:
    """One file of each odd kind, and the image a person sees in it (60 x 40, upright, RGB)."""
    upright = scene(5, 60, 40, (2, 3))  # so smooth that JPEG changes little
    gray = upright.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run upward
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    half = Image.new("L", upright.size, 128)
    over_white = Image.blend(Image.new("RGB", upright.size, "white"), upright, 128 / 255)
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    palette = upright.quantize(256)
    clear = upright.quantize(255)
    clear.info["transparency"] = 255  # no pixel has it
    frames = [upright.quantize(256), scene(6, 60, 40).quantize(256)]
    return {
        "EXIF orientation": (encode(turned, "PNG", exif=exif), upright),
        "CMYK": (encode(upright.convert("CMYK"), "TIFF"), upright),
        "CMYK JPEG": (encode(upright.convert("CMYK"), "JPEG", quality=95, subsampling=0), upright),
        "palette": (encode(palette, "PNG"), palette.convert("RGB")),
        "palette with a clear color": (encode(clear, "GIF"), clear.convert("RGB")),
        "16-bit": (encode(wide, "PNG"), gray.convert("RGB")),
        "alpha": (encode(Image.merge("RGBA", (*upright.split(), half)), "PNG"), over_white),
        "gray with alpha": (
            encode(Image.merge("LA", (gray, half)), "PNG"),
            Image.blend(Image.new("L", gray.size, 255), gray, 128 / 255).convert("RGB"),
        ),
        "animated": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0].convert("RGB")),
    }


@pytest.mark.parametrize("check", ["full", "header"])
def test_bytes_pass_untouched_whatever_they_show(check: str) -> None:
    for data, _ in odd_images().values():
        assert policy("--check", check).apply(data) == data
        assert policy("--check", check, "--max-side", 60).apply(data) == data  # not larger


@pytest.mark.parametrize("kind", list(odd_images()))
def test_smaller_images_are_upright_and_rgb(kind: str) -> None:
    data, seen = odd_images()[kind]
    out = Image.open(io.BytesIO(policy("--max-side", 48, "--quality", 95).apply(data)))
    assert (out.format, out.mode, out.size) == ("JPEG", "RGB", (48, 32))
    expected = np.asarray(seen.resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(out).astype(int) - expected).mean() < 4


def test_quality_and_the_longer_side() -> None:
    data = encode(scene(1, 200, 400), "PNG")
    large, small = (policy("--max-side", 100, "--quality", q).apply(data) for q in (90, 20))
    assert Image.open(io.BytesIO(large)).size == (50, 100) and len(small) < len(large) / 2
    assert policy("--max-side", 100).apply(data) == large


def test_header_checks_see_less() -> None:
    cut = encode(scene(1), "JPEG")[:-400]
    with pytest.raises(BadImage, match="does not decode"):
        policy().apply(cut)
    assert policy("--check", "header").apply(cut) == cut
    with pytest.raises(BadImage, match="does not decode"):
        policy("--check", "header", "--max-side", 64).apply(cut)
    for words in ([], ["--check", "header"]):
        with pytest.raises(BadImage, match="is of no known format"):
            policy(*words).apply(b"<html>404</html>")
        with pytest.raises(BadImage, match="has too many pixels"):
            policy("--max-pixels", 76_799, *words).apply(encode(scene(1), "PNG"))


def prepare(folder: Path, images: dict[str, bytes], *more: object, out: str = "out") -> Path:
    """A caption set of these files; gives its train split."""
    for name, data in images.items():
        (folder / name).write_bytes(data)
    records = [{"image": name, "caption": f"about {name}", "image_id": name} for name in images]
    annotations = write_json(folder / f"{out}.json", records)
    convert("json", "--task", "retrieval", "--annotations", annotations, "--images", folder, "--split", "train",
            "--out", folder / out, *more)  # fmt: skip
    return folder / out / "train"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """A prepared set of two images."""
    (tmp_path / "test").mkdir()
    return prepare(tmp_path / "test", {"e1.png": encode(scene(1), "PNG"), "e2.jpg": encode(scene(2), "JPEG")})


def test_images_of_other_sets_are_excluded(
    tmp_path: Path, evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {
        "same.jpg": encode(scene(2), "JPEG"),
        "smaller.jpg": encode(scene(1).resize((160, 120)), "JPEG", quality=60),
        "other.jpg": encode(scene(3), "JPEG"),
    }
    exact = prepare(tmp_path, images, "--exclude-images-of", evaluation, out="exact")
    assert [row["image_id"] for row in rows_of(exact)] == ["smaller.jpg", "other.jpg"]
    assert read_manifest(exact)["dropped"] == {"image is in a set of --exclude-images-of": 1}  # no fault of the data
    told = f"images of {evaluation}: 1 rows left out that have the same file, 0 that look alike\n"
    assert told in capsys.readouterr().out
    convert("duplicates", "hash", evaluation, "--out", tmp_path / "e.npz")
    for listed in (evaluation.parent, tmp_path / "e.npz"):
        near = prepare(tmp_path, images, "--near-duplicates-of", listed, "--overwrite", out="near")
        assert [row["image_id"] for row in rows_of(near)] == ["other.jpg"]
    assert read_manifest(near)["dropped_items"] == [
        {"item": "same.jpg", "reason": "image is in a set of --exclude-images-of"},
        {"item": "smaller.jpg", "reason": "image nearly duplicates one of --near-duplicates-of"},
    ]


def test_sets_made_smaller_by_the_same_options_are_compared_as_they_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"a.png": encode(scene(1), "PNG"), "b.png": encode(scene(2), "PNG")}
    small = prepare(tmp_path, {"a.png": data["a.png"]}, "--max-side", 100, out="small")
    rest = prepare(tmp_path, data, "--max-side", 100, "--exclude-images-of", small, out="rest")
    assert [row["image_id"] for row in rows_of(rest)] == ["b.png"] and "warning" not in capsys.readouterr().out
    full = prepare(tmp_path, data, "--exclude-images-of", small, out="full")
    assert [row["image_id"] for row in rows_of(full)] == ["a.png", "b.png"]
    assert "warning: --exclude-images-of found no file: a set prepared with another --max" in capsys.readouterr().out


def test_the_policy_can_be_pickled(evaluation: Path) -> None:
    copy = pickle.loads(pickle.dumps(policy("--near-duplicates-of", evaluation)))  # noqa: S301  # our own bytes
    with pytest.raises(ExcludedImage):
        copy.apply(encode(scene(2), "JPEG"))
    assert copy.apply(image_of(9)) == image_of(9)


@pytest.mark.parametrize(
    "words",
    [
        ["--max-pixels", 0],
        ["--max-side", 8],
        ["--quality", 0],
        ["--near-distance", 65],
        ["--exclude-images-of", "/nowhere"],
        ["--near-duplicates-of", "/nowhere/x.npz"],
    ],
)
def test_bad_options_are_named(words: list[object]) -> None:
    with pytest.raises(UserError, match=str(words[1])):
        policy(*words)


def test_a_broken_hash_list_is_named(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"x\.npz: is no list of hashes"):
        policy("--exclude-images-of", tmp_path / "x.npz")
    assert "must end in .npz" in refuse("duplicates", "hash", tmp_path, "--out", tmp_path / "x.json")
