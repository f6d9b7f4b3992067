"""A row that one rank alone reads, and cannot: that rank says so in one line, rank 0 or not, and no rank hangs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from eve_ds.data.sampler import Shuffle, TrainOrder
from tests.support import ranks
from tests.support.shards import image_of, tiny_tokenizer, write_split

ROWS, MICRO, WORLD = 12, 2, 2


def row_of_rank_one() -> int:
    """The first row that rank 1 reads for the second optimizer step (of two micro-batches each), and nobody before."""
    batches = TrainOrder(Shuffle(ROWS, seed=0), MICRO, WORLD, rank=1).micro_batches()
    return int(next(islice(batches, 2, None)).samples[0])


def test_the_rank_that_cannot_read_a_row_names_it(tmp_path: Path) -> None:
    bad = row_of_rank_one()
    rows = [
        {"image": image_of(i), "caption": [f"image {i}"], "image_id": f"image-{i}", "split": "train"}
        for i in range(ROWS)
    ]
    rows[bad]["image"] = image_of(bad)[:100]
    write_split(tmp_path / "data" / "train", "caption", rows, shard_rows=5)
    tiny_tokenizer(tmp_path / "tokenizer")
    options = {
        "config": "tests/e2e/tiny.yaml",
        "data.path": tmp_path / "data",
        "data.tokenizer": tmp_path / "tokenizer",
        "data.val_split": "null",
        "data.max_corrupt": 0,
        "engine.micro_batch_size": MICRO,
        "logging.wandb": "false",
        "output_dir": tmp_path / "run",
    }
    started = ranks.start("eve_ds.pretrain", [f"--{name}={value}" for name, value in options.items()], WORLD)
    outputs = [rank.communicate(timeout=ranks.LIMIT)[0] for rank in started]
    errors = [line for line in outputs[1].splitlines() if line.startswith("error:")]
    assert started[1].returncode == 2 and "Traceback" not in outputs[1], outputs[1]
    assert len(errors) == 1, outputs[1]
    words = ["rank 1", f"shard-{bad // 5:05d}.arrow", f"row {bad % 5}"]
    assert all(word in errors[0] for word in words), errors[0]
    assert started[0].returncode == 3 and "Traceback" not in outputs[0], outputs[0]
    told = [line for line in outputs[0].splitlines() if line.startswith("rank 0: another rank has ended; its message")]
    assert len(told) == 1, outputs[0]
    assert not (tmp_path / "run" / "model").exists()
