"""Retrieval over a tiny split: a pass as the engine makes it, and a slow one, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eve_ds.config import FinetuneConfig
from eve_ds.data.samples import CaptionSamples
from eve_ds.engine.evaluation import EvaluationFeed
from eve_ds.engine.signals import StopRequest
from eve_ds.model.backbone import Backbone
from eve_ds.model.moe import MoE
from eve_ds.tasks.retrieval import SPEC, Retrieval
from eve_ds.tasks.spec import Arrays
from tests.support.shards import EVAL, caption_rows, tiny_tokenizer, write_split
from tests.support.tiny_tasks import tiny_config

CAPTIONS = (2, 5, 0, 1, 3, 1, 4, 2, 0)  # of each image: two have none


def uneven_split(root: Path) -> Path:
    """Images of CAPTIONS, in three shards, in root/test. Returns that folder."""
    rows = caption_rows(len(CAPTIONS), "test", max(CAPTIONS))
    rows = [row | {"caption": row["caption"][:count]} for row, count in zip(rows, CAPTIONS, strict=True)]
    return write_split(root / "test", "caption", rows, shard_rows=4)


def retrieval_task(moe_layer: Any = MoE, **objective: Any) -> Retrieval:
    """With the same weights every time; larger ones than usual, so that scores differ."""
    torch.manual_seed(0)
    config = tiny_config()
    config.vocab_size = 512
    config.max_text_length = config.text_positions = 40
    settings = SPEC.objective(embed_dim=16, **objective)  # type: ignore[call-arg]
    task = SPEC.build(Backbone(config, moe_layer=moe_layer), settings, mask_id=4, num_classes=0, seed=0)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return task.eval()


def caption_samples(folder: Path) -> CaptionSamples:
    return CaptionSamples(folder, tiny_tokenizer(), EVAL, 40)


def arrays_of(
    task: Retrieval,
    folder: Path,
    batch_size: int = 4,
    limit: int | None = None,
    workers: int = 0,
    device: str = "cpu",
) -> Arrays | None:
    """What scoring makes of a split, over all ranks; ``batch_size`` is that of the ranks together."""
    config = FinetuneConfig()
    config.data.num_workers = workers
    config.engine.global_batch_size = batch_size
    feed = EvaluationFeed(config, torch.device(device), StopRequest())
    return SPEC.predict(task, caption_samples(folder), feed, limit)


def slow_scores(task: Retrieval, folder: Path, k: int, limit: int | None = None, rule: str = "matching") -> Arrays:
    """cosine [I, T], logits [I, T, 2], and both directions' scores after re-ranking, [I, T] and [T, I]: one image, one
    text at a time."""
    dataset = caption_samples(folder)
    samples = [dataset[index, 0] for index in range(limit or len(dataset))]
    rows = sorted({sample["image_index"] for sample in samples})
    pixels = {sample["image_index"]: sample["images"] for sample in samples}
    images = [torch.tensor(pixels[row]).permute(2, 0, 1)[None].float() / 127.5 - 1 for row in rows]
    texts = [(torch.from_numpy(one["text_ids"])[None], torch.ones(1, len(one["text_ids"])).bool()) for one in samples]
    with torch.no_grad():
        vectors = torch.cat([task.encode_image(image) for image in images])
        cosine = (vectors @ torch.cat([task.encode_text(*text) for text in texts]).t()).numpy()
        logits = np.array([[task.match(image, *text)[0].tolist() for text in texts] for image in images])
    score = {
        "matching": logits[..., 1],
        "sum": logits[..., 1] + cosine,
        "odds": logits[..., 1] - logits[..., 0] + cosine / task.itc_temp.item(),
    }[rule]
    found = {"cosine": cosine, "logits": logits}
    for name, similar, own in (("text", cosine, score), ("image", cosine.T, score.T)):
        kept = similar >= np.sort(similar, axis=1)[:, -min(k, similar.shape[1]), None]
        found[name] = np.where(kept, own, -np.inf)
    return found
