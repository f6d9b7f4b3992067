"""Tiny models, tasks and batches: every task at a size where a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE
from eve_ds.tasks import Task
from eve_ds.tasks.itc_itm import ItcItm
from eve_ds.tasks.itc_itm_mlm import ItcItmMlm
from eve_ds.tasks.itc_itm_mlm_mim import ItcItmMlmMim
from eve_ds.tasks.itc_mlm_mim import ItcMlmMim
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.mlm_mim_codes import MaskedCodes
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.rivals import RivalConfig
from eve_ds.tasks.vqa import VQA

Batch = dict[str, Tensor]

CLS, SEP, MASK = 2, 3, 4
NUM_ANSWERS = 7
NUM_CODES = 11
PER_TOKEN = ("text_ids", "text_mask")

OBJECTIVE = ObjectiveConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2, seed=5)
JOINT = ObjectiveConfig(mode="joint", decoder_dim=16, decoder_depth=1, decoder_heads=2, seed=5)
RIVAL = RivalConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2, seed=5, embed_dim=16, word_head="mlp")


def _amplified(task: MaskedModeling) -> MaskedModeling:
    """With LayerScale at 1 and a decoder that amplifies: else the loss hardly tells what the backbone's branches do."""
    with torch.no_grad():
        task.pixel_decoder.embed.weight.mul_(4)
        task.pixel_decoder.head.weight.mul_(2)
        for block in task.backbone.blocks:
            block.attention_scale.fill_(1)
            block.mlp_scale.fill_(1)
    return task


def _masked_otherwise(backbone: Backbone) -> MaskedModeling:
    """Every setting at other than its default value; every third token continues a word."""
    objective = replace(
        OBJECTIVE,
        image_masking="blockwise",
        word_masking="whole_words",
        mask_replacement=[0.8, 0.1, 0.1],
        pixel_target="raw",
        word_head="mlp",
    )
    task = MaskedModeling(backbone, objective, MASK)
    task.continues[1::3] = True
    return _amplified(task)


TASKS: dict[str, Callable[[Backbone], Task]] = {
    "pretrain": lambda backbone: MaskedModeling(backbone, OBJECTIVE, MASK),
    "pretrain_joint": lambda backbone: MaskedModeling(backbone, JOINT, MASK),
    "pretrain_mim": lambda backbone: _amplified(MaskedModeling(backbone, replace(OBJECTIVE, mode="mim"), MASK)),
    "pretrain_mlm": lambda backbone: MaskedModeling(backbone, replace(OBJECTIVE, mode="mlm"), MASK),
    "pretrain_masked_otherwise": _masked_otherwise,
    "pretrain_codes": lambda backbone: MaskedCodes(backbone, OBJECTIVE, MASK, NUM_CODES),
    "retrieval": lambda backbone: Retrieval(backbone, embed_dim=16, seed=5),
    "vqa": lambda backbone: VQA(backbone, NUM_ANSWERS),
    "nlvr_plain": lambda backbone: NLVR(backbone),
    "nlvr_biattn": lambda backbone: NLVR(backbone, biattn=True, head_dropout=0.0),
    "itc_itm": lambda backbone: ItcItm(backbone, RIVAL, MASK),
    "itc_itm_mlm": lambda backbone: ItcItmMlm(backbone, RIVAL, MASK),
    "itc_itm_mlm_mim": lambda backbone: ItcItmMlmMim(backbone, RIVAL, MASK),
    "itc_mlm_mim": lambda backbone: ItcMlmMim(backbone, RIVAL, MASK),
}
RIVALS = [name for name in TASKS if name.startswith("itc_")]
CONTRASTING = ["retrieval", *RIVALS]


def tiny_config(drop_path: float = 0.0) -> ModelConfig:
    """Three blocks, the last one soft with four experts; without drop path nothing is drawn at random in training."""
    return ModelConfig(
        image_size=32,
        patch_size=8,
        dim=32,
        depth=3,
        num_heads=4,
        mlp_hidden=64,
        vocab_size=50,
        max_text_length=12,
        text_positions=16,
        soft_layers=[2],
        num_experts=4,
        drop_path=drop_path,
        aux_loss_weight=0.1,
    )


def tiny_task(name: str, seed: int = 0, moe_layer: Callable[..., MoE] = MoE, drop_path: float = 0.0) -> Task:
    """A task with the same weights every time; a backbone with larger ones than usual, so that experts differ."""
    torch.manual_seed(seed)
    task = TASKS[name](Backbone(tiny_config(drop_path), moe_layer=moe_layer))
    with torch.no_grad():
        for parameter in task.backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return task


def tiny_batch(rows: int, seed: int = 0) -> Batch:
    """All columns that any task reads. Two rows in a row show the same image; texts have 3 to 12 tokens."""
    draw = torch.Generator().manual_seed(seed)
    length = torch.randint(3, 13, (rows,), generator=draw)
    length[rows // 2] = 12
    position = torch.arange(12)
    text_mask = position < length[:, None]
    text_ids = torch.randint(5, 50, (rows, 12), generator=draw)
    text_ids[:, 0] = CLS
    text_ids[position == length[:, None] - 1] = SEP
    images = torch.randn((rows + 1) // 2, 3, 32, 32, generator=draw)
    label = torch.randint(0, 2, (rows,), generator=draw)
    label[0] = -1
    return {
        "images": images.repeat_interleave(2, dim=0)[:rows],
        "images_0": torch.randn(rows, 3, 32, 32, generator=draw),
        "images_1": torch.randn(rows, 3, 32, 32, generator=draw),
        "text_ids": text_ids * text_mask,
        "text_mask": text_mask,
        "sample_id": torch.arange(rows) * 7919 + 2**40,
        "image_index": torch.arange(rows) // 2 + 100,
        "question_id": torch.arange(rows) + 9000,
        "question_index": torch.arange(rows) + 10,
        "answer_targets": torch.rand(rows, NUM_ANSWERS, generator=draw) * (torch.rand(rows, 1, generator=draw) < 0.7),
        "label": label,
        "codes": torch.randint(0, NUM_CODES, (rows, 16), generator=draw),
    }


def rows_of(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some rows, their texts padded only as far as they need."""
    part = {name: value[rows] for name, value in batch.items()}
    width = max(int(part["text_mask"].sum(dim=1).max()), 1) if len(part["sample_id"]) else 1
    return part | {name: part[name][:, :width] for name in PER_TOKEN}


PREDICTING = [name for name in TASKS if not name.startswith("pretrain") and name not in RIVALS]


def predictions(task: Task, batch: Batch) -> dict[str, Tensor]:
    """What the task tells of each sample, [B, ...] by name, in evaluation mode."""
    text = (batch["text_ids"], batch["text_mask"])
    task.eval()
    with torch.no_grad():
        if isinstance(task, Retrieval):
            vectors = {"image": task.encode_image(batch["images"]), "text": task.encode_text(*text)}
            return vectors | {"match": task.match(batch["images"], *text)}
        if isinstance(task, NLVR):
            return {"logits": task.predict((batch["images_0"], batch["images_1"]), *text)}
        assert isinstance(task, VQA)
        return {"logits": task.predict(batch["images"], *text)}
