"""Retrieval recalls: upstream's numbers, equality with sorting, ties, memory, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import retrieval
from evaluation.common import InputError, run

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "tests" / "assets"


def upstream() -> dict[str, float]:
    return json.loads((ASSETS / "retrieval_upstream_scores.json").read_text())


def test_upstream_scores() -> None:
    with np.load(ASSETS / "retrieval_scores.npz") as arrays:
        assert retrieval.recalls(**arrays) == upstream()


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation.retrieval", "--scores", str(ASSETS / "retrieval_scores.npz")]
    done = subprocess.run([*command, "--out", str(tmp_path / "m.json")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "m.json").read_text()) == upstream()


@settings(max_examples=50)
@given(st.integers(1, 15), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_ranks_equal_sorting(images: int, more_texts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, more_texts)]))
    scores = rng.permutation(images * len(index)).reshape(images, len(index)).astype(np.float32)  # no ties
    order = np.argsort(-scores, axis=1)
    expected = [next(rank for rank, text in enumerate(order[i]) if index[text] == i) for i in range(images)]
    assert retrieval.text_ranks(scores, index).tolist() == expected
    order = np.argsort(-scores.T, axis=1)
    expected = [list(order[t]).index(index[t]) for t in range(len(index))]
    assert retrieval.image_ranks(scores.T, index).tolist() == expected


def test_a_transposed_array_is_ranked_and_checked_as_a_copy_of_it() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 50, (300, 700)).astype(np.float32)  # more than a block, with ties
    index = rng.permutation(np.arange(700) % 300)
    for ranks, own in ((retrieval.image_ranks, scores.T), (retrieval.text_ranks, np.asfortranarray(scores))):
        assert not own.flags.c_contiguous
        np.testing.assert_array_equal(ranks(own, index), ranks(np.ascontiguousarray(own), index))
        own[123, 45], own[200, 3] = np.nan, np.inf
        for array in (own, np.ascontiguousarray(own)):
            with pytest.raises(InputError, match=r"\[123, 45\] is nan"):
                ranks(array, index)


def test_ties_count_against_the_model() -> None:
    index = np.repeat(np.arange(20), 5)
    scores = np.zeros((20, 100))
    assert set(retrieval.recalls(scores, scores.T, index).values()) == {0.0}
    assert (
        retrieval.text_ranks(scores, index).tolist() == [95] * 20
    )  # behind the 95 wrong texts, not behind the other right ones
    never_scored = np.where(index == np.arange(20)[:, None], 1.0, -np.inf)
    assert set(retrieval.recalls(never_scored, never_scored.T, index).values()) == {100.0}


def test_memory_stays_at_a_row() -> None:
    scores = np.random.default_rng(0).random((400, 2000), dtype=np.float32)
    index = np.arange(2000) % 400
    tracemalloc.start()
    retrieval.recalls(scores, scores.T, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < scores.nbytes / 10


def arrays(**changes: object) -> dict[str, np.ndarray]:
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    good = {"image_to_text": scores, "text_to_image": scores.T, "text_image_index": np.array([0, 1, 2, 2])}
    return good | {name: np.asarray(value) for name, value in changes.items()}


NAN = np.where(np.eye(3, 4) > 0, np.nan, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_to_text": np.zeros(4)}, "image_to_text must be real numbers of shape [I, T], got float64 [4]"),
        (
            {"text_to_image": np.zeros((4, 3), complex)},
            "text_to_image must be real numbers of shape [T, I], got complex128",
        ),
        (
            {"image_to_text": np.zeros((4, 3))},
            "image_to_text [4, 3] has 4 images and 3 texts, but text_image_index has 4 texts",
        ),
        ({"text_to_image": np.zeros((4, 5))}, "text_image_index: image 3 has no text"),
        ({"text_image_index": [0, 1, 2, 3]}, "text_image_index[3] = 3, but image_to_text [3, 4] has images 0 to 2"),
        ({"text_image_index": [0, -1, 1, 2]}, "text_image_index[1] = -1"),
        ({"text_image_index": [0, 1, 1, 1]}, "image 2 has no text"),
        ({"text_image_index": [0.0, 1, 2, 2]}, "text_image_index must be whole numbers of shape [T], got float64 [4]"),
        ({"text_image_index": np.zeros((4, 1), int)}, "text_image_index must be whole numbers"),
        (
            {"image_to_text": np.zeros((3, 4), "m8[s]")},
            "image_to_text must be real numbers of shape [I, T], got timedelta64[s] [3, 4]",
        ),
        (
            {"text_image_index": np.array([0, 1, 2, 2], "m8[s]")},
            "text_image_index must be whole numbers of shape [T], got timedelta64[s] [4]",
        ),
        ({"image_to_text": NAN}, "image_to_text[0, 0] is nan"),
        ({"text_to_image": np.full((4, 3), np.inf)}, "text_to_image[0, 0] is inf"),
        (
            {
                "image_to_text": np.zeros((3, 0)),
                "text_to_image": np.zeros((0, 3)),
                "text_image_index": np.zeros(0, int),
            },
            "has 3 images and 0 texts",
        ),
        ({"image_to_text": np.zeros((0, 0)), "text_image_index": np.zeros(0, int)}, "has 0 images and 0 texts"),
    ],
)
def test_bad_arrays_name_the_fault(tmp_path: Path, capsys, changes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        retrieval.recalls(**arrays(**changes))
    assert words in str(caught.value)
    np.savez(tmp_path / "s.npz", **arrays(**changes))
    assert run(retrieval.main, ["--scores", str(tmp_path / "s.npz"), "--out", str(tmp_path / "m.json")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"{tmp_path}/s.npz: " in error
    assert error.count("\n") == 1


def test_bad_files_exit_with_2_and_one_line(tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "few.npz", image_to_text=np.zeros((3, 4)), text_image_index=np.array([0, 1, 2, 2]))
    np.savez(tmp_path / "object.npz", **arrays(image_to_text=np.array([["a", None]], object)))
    np.save(tmp_path / "bare.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "whole.npz", **arrays())
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[150:160] = b"damage" * 2
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "short.npz").write_bytes(damaged[:200])
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        for name in retrieval.ARRAYS:
            archive.writestr(name, "no array")
    expected = {
        "absent.npz": "No such file or directory",
        "few.npz": "array 'text_to_image' is missing, found 'image_to_text', 'text_image_index'; needed",
        "object.npz": "array 'image_to_text' cannot be read",
        "bare.npy": "one bare array",
        "foreign.npz": "array 'text_image_index' is no NumPy array",
        "text.npz": "not a NumPy .npz file",
        "damaged.npz": "array 'image_to_text' cannot be read",
        "short.npz": "not a NumPy .npz file",
    }
    for name, words in expected.items():
        assert run(retrieval.main, ["--scores", str(tmp_path / name), "--out", str(tmp_path / "m.json")]) == 2
        error = capsys.readouterr().err
        assert f"{name}: " in error
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(12,)", b"(12"),  # tokens end in the middle
        (b"(12,)", b"(" * 60),
        (b"(12,)", b"(599999999999994,)"),
        (b"'<i8'", b"'<q9'"),
        (b"False", b"__import__('os')"),
    ],
)
def test_broken_headers_of_arrays_are_reported(tmp_path: Path, capsys, old: bytes, new: bytes) -> None:
    np.savez(tmp_path / "whole.npz", **arrays())
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "s.npz", "w") as damaged:
        for name in whole.namelist():
            part = whole.read(name)
            header, content = part[:128], part[128:]
            if name == "text_image_index.npy":
                shape = b"(%d,)" % len(arrays()["text_image_index"])
                header = header.replace(shape if old == b"(12,)" else old, new)[:128].ljust(128)
                assert new[:4] in header
            damaged.writestr(name, header + content)
    assert run(retrieval.main, ["--scores", str(tmp_path / "s.npz"), "--out", str(tmp_path / "m.json")]) == 2
    assert "array 'text_image_index' cannot be read" in capsys.readouterr().err
