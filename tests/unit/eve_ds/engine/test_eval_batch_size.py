"""Predictions do not depend on the batch size of an evaluation, nor on the ranks that share it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from eve_ds.config import FinetuneConfig
from eve_ds.engine import batches, setup
from eve_ds.engine.evaluation import EvaluationFeed
from eve_ds.engine.signals import StopRequest
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import Task
from eve_ds.tasks.feed import joined
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA
from tests.support.shards import make_caption_set, make_nlvr_set, make_vqa_set, tiny_tokenizer
from tests.support.tiny_tasks import tiny_config

ROWS = 7  # 14 samples: neither 3 nor 5 nor 2 ranks of 4 divide them
MAKERS = {"itr_coco": make_caption_set, "vqa": make_vqa_set, "nlvr": make_nlvr_set}


@pytest.mark.parametrize("task", MAKERS)
def test_an_evaluation_finds_the_same_with_any_batch_size_and_ranks(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MAKERS[task](tmp_path, rows=ROWS, split="test")
    config = FinetuneConfig(task=task, model=tiny_config())
    config.model.vocab_size, config.data.path = 512, str(tmp_path)
    config.engine.global_batch_size = 4
    samples = setup.build_dataset(config, "test", tiny_tokenizer(), train=False)
    torch.manual_seed(0)
    backbone = Backbone(config.model)
    heads = {"itr_coco": Retrieval, "nlvr": NLVR, "vqa": lambda backbone: VQA(backbone, samples.num_classes)}
    made: Task = heads[task](backbone).eval()
    sizes: set[int] = set()

    def found(size: int | None, world_size: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        config.engine.eval_batch_size = size
        parts = []
        for rank in range(world_size):
            monkeypatch.setattr(batches, "launched_world", lambda rank=rank: (rank, world_size, rank))
            read = list(batches.evaluation_batches(config, samples))
            sizes.update(len(batch["valid"]) for batch in read)
            if world_size == 1:
                feed = EvaluationFeed(config, torch.device("cpu"), StopRequest())
                part = config.spec.predict(made, samples, feed)
            else:
                part = joined([made.predict_batch(batch) for batch in read])
            assert part is not None
            parts.append(part)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        scores = config.spec.metrics(arrays, samples)
        if task == "itr_coco":  # its features are of images and of texts: the scores of all pairs tell the same
            buffer = io.BytesIO()
            config.spec.predictions(arrays, samples)[1](buffer)
            buffer.seek(0)
            arrays = dict(np.load(buffer))
        else:
            order = np.argsort(arrays["question_id" if task == "vqa" else "question_index"])
            arrays = {name: array[order] for name, array in arrays.items()}
        return arrays, scores

    expected, scores = found(None, 1)
    assert max(sizes) == config.engine.global_batch_size  # of training, by default
    alone, shared = [(1, 1), (3, 1), (14, 1)], [(3, 2), (5, 2), (100, 2)]
    # Retrieval gathers from all ranks at once: tests/multirank/test_retrieval_ranks.py has two of them.
    for size, world_size in alone if task == "itr_coco" else [*alone, *shared]:
        sizes.clear()
        arrays, again = found(size, world_size)
        assert max(sizes) == min(size, 14 // world_size)
        assert again == pytest.approx(scores, abs=1e-5), (size, world_size)
        for name, array in expected.items():
            np.testing.assert_allclose(arrays[name], array, atol=1e-5, err_msg=f"{name}, {size}, {world_size}")
