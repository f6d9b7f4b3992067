"""A flipped bit in a model folder is not loaded in silence; folders without hashes load as they did."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from eve_ds.tasks import load_task_model
from eve_ds.weights.model_folder import CONFIG, HASHED, HASHES, WEIGHTS, ModelFolder, write_hashes
from preprocessing.errors import UserError
from preprocessing.local_files import write_json
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER
from tests.support.model_folder import write_model_folder
from tests.support.tiny_tasks import tiny_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path, tiny_task("retrieval"))
    write_json(tmp_path / ANSWER_LIST, ["yes", "no"])
    write_hashes(tmp_path, HASHED)
    return tmp_path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_any_flipped_bit_of_any_file_is_named(folder: Path) -> None:
    whole = load_task_model("retrieval", folder).state_dict()
    assert all(torch.equal(whole[name], value) for name, value in tiny_task("retrieval").state_dict().items())
    rng = random.Random(0)
    for name in HASHED:
        for _ in range(20):
            path = folder / name
            place = rng.randrange(path.stat().st_size)
            flip(path, place)
            with pytest.raises(UserError, match=str(path)):
                load_task_model("retrieval", folder)
            flip(path, place)
    load_task_model("retrieval", folder)


def test_folders_and_files_without_hashes_load(folder: Path, tmp_path: Path) -> None:
    (folder / HASHES).unlink()
    flip(folder / WEIGHTS, -1)  # of a weight; nobody can know
    load_task_model("retrieval", folder)


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, ANSWER_LIST])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: No such file or directory, but {HASHES} names it"):
        ModelFolder.find(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config.yaml": "0"}', '{"model.safetensors": 1}', "[" * 100_000])
def test_damaged_hashes_are_refused(folder: Path, content: str) -> None:
    (folder / HASHES).write_text(content)
    with pytest.raises(UserError, match=f"{HASHES}: is damaged; copy the folder again, or delete that file"):
        load_task_model("retrieval", folder)
