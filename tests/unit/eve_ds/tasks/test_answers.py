"""VQA and NLVR: losses by their formulas, predictions for evaluation, and learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eve_ds.tasks import Task
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.vqa import VQA
from tests.support.tiny_tasks import Batch, rows_of, tiny_batch, tiny_task

NLVR_HEADS = pytest.mark.parametrize("name", ["nlvr_plain", "nlvr_biattn"])


def learn(task: Task, batch: Batch) -> None:
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()


def vqa_task() -> VQA:
    task = tiny_task("vqa")
    assert isinstance(task, VQA)
    return task


def nlvr_task(name: str) -> NLVR:
    task = tiny_task(name)
    assert isinstance(task, NLVR)
    return task


def images(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["images_0"], batch["images_1"]


def test_vqa_loss_is_bce_mean_times_the_number_of_answers() -> None:
    task, batch = vqa_task(), tiny_batch(4)
    output = task(batch)
    logits = task.predict(batch["images"], batch["text_ids"], batch["text_mask"])
    expected = F.binary_cross_entropy_with_logits(logits, batch["answer_targets"]) * 7
    total, count = output.metrics["vqa_loss"]
    assert torch.allclose(total / count, expected, atol=1e-5)
    assert torch.allclose(output.loss, expected + 0.1 * output.metrics["aux_loss"][0], atol=1e-5)
    best = batch["answer_targets"][torch.arange(4), logits.argmax(dim=1)]
    assert torch.allclose(output.metrics["vqa_score"][0], best.sum())


def test_vqa_predictions() -> None:
    task, batch = vqa_task(), tiny_batch(4) | {"valid": torch.tensor([True, True, False, True])}
    found = task.predict_batch(batch)
    assert found["question_id"].tolist() == [9000, 9001, 9003]
    with torch.no_grad():
        logits = task.predict(batch["images"], batch["text_ids"], batch["text_mask"])[batch["valid"]]
    assert found["answer"].tolist() == logits.argmax(dim=1).tolist()
    assert found["probability"] == pytest.approx(logits.sigmoid().max(dim=1).values.numpy())
    best = batch["answer_targets"][batch["valid"]][torch.arange(3), logits.argmax(dim=1)]
    assert found["score"] == pytest.approx(best.numpy())


def test_vqa_learns_the_batch() -> None:
    task, batch = vqa_task(), tiny_batch(6)
    batch["answer_targets"] = F.one_hot(torch.arange(6), 7).float()
    learn(task, batch)
    assert task.predict_batch(batch)["answer"].tolist() == list(range(6))


@NLVR_HEADS
def test_nlvr_loss_leaves_out_unknown_labels(name: str) -> None:
    task, batch = nlvr_task(name), tiny_batch(5)
    known = batch["label"] >= 0
    output = task(batch)
    logits = task.predict(images(batch), batch["text_ids"], batch["text_mask"])
    total, count = output.metrics["nlvr_loss"]
    assert float(count) == int(known.sum()) == 4
    assert torch.allclose(total / count, F.cross_entropy(logits[known], batch["label"][known]), atol=1e-5)


@NLVR_HEADS
def test_nlvr_predictions(name: str) -> None:
    task, batch = nlvr_task(name), tiny_batch(4)
    found = task.predict_batch(batch)
    with torch.no_grad():
        logits = task.predict(images(batch), batch["text_ids"], batch["text_mask"])
    assert found["question_index"].tolist() == [10, 11, 12, 13]
    assert found["prediction"].tolist() == logits.argmax(dim=1).tolist()
    assert found["probability"] == pytest.approx(logits.softmax(dim=1)[:, 1].numpy(), abs=1e-6)
    assert found["label"].tolist() == batch["label"].tolist()


@NLVR_HEADS
def test_nlvr_output_of_a_sample_depends_on_it_alone(name: str) -> None:
    task, batch = nlvr_task(name).eval(), tiny_batch(4)
    alone = rows_of(batch, slice(1, 2))
    with torch.no_grad():
        whole = task.predict(images(batch), batch["text_ids"], batch["text_mask"])
        one = task.predict(images(alone), alone["text_ids"], alone["text_mask"])
        swapped = task.predict(images(batch)[::-1], batch["text_ids"], batch["text_mask"])
    assert torch.allclose(whole[1:2], one, atol=1e-5)
    assert not torch.allclose(whole, swapped, atol=1e-5)


@NLVR_HEADS
def test_nlvr_learns_the_batch(name: str) -> None:
    task, batch = nlvr_task(name), tiny_batch(6)
    batch["label"] = torch.tensor([0, 1, 1, 0, 1, 0])
    learn(task, batch)
    assert task.predict_batch(batch)["prediction"].tolist() == batch["label"].tolist()


def test_biattn_attention_is_torchs() -> None:
    """The same numbers as ``nn.MultiheadAttention`` from the same parameters, padding masked."""
    task = nlvr_task("nlvr_biattn").eval()
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    reference.load_state_dict(task.attn1.state_dict())
    own, other = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    with torch.no_grad():
        expected = reference(own, other, other, key_padding_mask=~mask, need_weights=False)[0]
        assert torch.allclose(task.attn1(own, other, mask), expected, atol=1e-5)


def test_biattn_dropout_is_random_in_training_alone() -> None:
    torch.manual_seed(0)
    task = NLVR(nlvr_task("nlvr_biattn").backbone, biattn=True, head_dropout=0.5)
    batch = tiny_batch(4)
    with torch.no_grad():
        training = [float(task(batch).loss) for _ in range(2)]
        task.eval()
        evaluation = [float(task(batch).loss) for _ in range(2)]
    assert training[0] != training[1]
    assert evaluation[0] == evaluation[1]
