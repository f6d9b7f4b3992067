"""Contrast and matching: positives by image, negatives that are negatives, a temperature that stays in its range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eve_ds.model.backbone import BackboneOutput
from eve_ds.model.counter_random import random_bits
from eve_ds.tasks.contrast import TEMPERATURE_RANGE, contrastive_sum, hard_negatives
from eve_ds.tasks.retrieval import SPEC, Retrieval
from eve_ds.tasks.spec import FinetuneObjective
from preprocessing.errors import UserError
from tests.support.tiny_tasks import Batch, rows_of, tiny_batch, tiny_task


def retrieval_task() -> Retrieval:
    task = tiny_task("retrieval")
    assert isinstance(task, Retrieval)
    return task


def vectors(task: Retrieval, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return task.encode_image(batch["images"]), task.encode_text(batch["text_ids"], batch["text_mask"])


def test_contrast_is_cross_entropy_when_every_image_is_another() -> None:
    logits = torch.randn(5, 5)
    expected = F.cross_entropy(logits, torch.arange(5), reduction="sum")
    assert torch.allclose(contrastive_sum(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_contrast_weighs_captions_of_one_image_equally() -> None:
    logits = torch.randn(1, 4)
    same = torch.tensor([[True, False, True, False]])
    log = logits.log_softmax(dim=1)[0]
    assert torch.allclose(contrastive_sum(logits, same), -(log[0] + log[2]) / 2)


def test_negatives_follow_the_similarities() -> None:
    """Gumbel noise draws from softmax + 1e-5 without the positives, over many seeds."""
    logits, same = torch.tensor([[3.0, 1.0, 0.0, 2.0]]), torch.tensor([[True, False, False, False]])
    rows = torch.arange(20000)
    bits = random_bits(0, 3, rows[:, None], torch.arange(4))
    column, found = hard_negatives(logits.expand(20000, 4), same.expand(20000, 4), bits)
    assert found.all()
    share = torch.bincount(column, minlength=4) / 20000
    weight = torch.tensor([0.0, 1.0, 0.0, 2.0]).exp() * torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert torch.allclose(share, weight / weight.sum(), atol=0.015)


def test_a_share_of_the_negatives_is_drawn_with_equal_chances() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    same = torch.tensor([[True, False, False, False]])
    bits = random_bits(0, 9, torch.arange(20000)[:, None], torch.arange(4))
    hard = torch.tensor([0.0, 1.0, 0.0, 2.0]).exp() * torch.tensor([0.0, 1.0, 1.0, 1.0])
    even = torch.tensor([0.0, 1.0, 1.0, 1.0]) / 3
    for share in (0.25, 1.0):
        column, found = hard_negatives(logits.expand(20000, 4), same.expand(20000, 4), bits, share)
        assert found.all()
        expected = (1 - share) * hard / hard.sum() + share * even
        assert torch.allclose(torch.bincount(column, minlength=4) / 20000, expected, atol=0.015)


def test_the_objective_sets_that_share() -> None:
    """With equal chances alone the negatives do not follow the similarities."""
    batch, drawn = tiny_batch(6), []
    for share in (0.0, 1.0):
        objective = FinetuneObjective(embed_dim=8, even_negatives=share)
        task = SPEC.build(retrieval_task().backbone, objective, mask_id=4, num_classes=0, seed=0)
        contrast = task.contrast(batch)
        contrast.to_text *= 1000  # the most similar one is drawn, unless chances are equal
        drawn.append(task._draw_negatives(batch["sample_id"], contrast)[0].tolist())
    assert drawn[0] == contrast.to_text.masked_fill(contrast.same, -torch.inf).argmax(dim=1).tolist() != drawn[1]


def test_the_matching_loss_has_its_weight() -> None:
    batch, found = tiny_batch(6), []
    for weight in (1.0, 3.0):
        objective = FinetuneObjective(embed_dim=8, matching_weight=weight)
        torch.manual_seed(0)
        task = SPEC.build(retrieval_task().backbone, objective, mask_id=4, num_classes=0, seed=0)
        found.append(task(batch))
    first, other = found
    total, count = first.metrics["itm_loss"]
    assert torch.allclose(other.loss - first.loss, 2 * total / count, atol=1e-5)
    assert torch.equal(other.metrics["itm_loss"][0], total)  # what is measured is without the weight


@pytest.mark.parametrize("even", [0.0, 0.5])
def test_no_negative_among_captions_of_one_image(even: float) -> None:
    same = torch.tensor([[True, True], [True, False]])
    column, found = hard_negatives(torch.zeros(2, 2), same, torch.zeros(2, 2, dtype=torch.int64), even)
    assert found.tolist() == [False, True]
    assert int(column[1]) == 1


def test_vectors_are_unit_and_a_function_of_the_sample_alone() -> None:
    task, batch = retrieval_task().eval(), tiny_batch(4)
    image, text = vectors(task, batch)
    assert torch.allclose(image.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(text.norm(dim=1), torch.ones(4), atol=1e-5)
    image_alone, text_alone = vectors(task, rows_of(batch, slice(2, 3)))
    assert torch.allclose(image[2:3], image_alone, atol=1e-5)
    assert torch.allclose(text[2:3], text_alone, atol=1e-5)


def test_contrastive_loss_is_the_formula() -> None:
    """Rows 0 and 1 show one image, 2 and 3 another, 4 a third."""
    task, batch = retrieval_task(), tiny_batch(5)
    image, text = vectors(task, batch)
    logits = image @ text.t() / 0.07
    targets = torch.block_diag(torch.full((2, 2), 0.5), torch.full((2, 2), 0.5), torch.ones(1, 1))
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
    total, count = task(batch).metrics["itc_loss"]
    assert torch.allclose(total / count, expected, atol=1e-4)


def test_matching_loss_is_the_formula() -> None:
    """Recomputed pair by pair from the drawn negatives."""
    task, batch = retrieval_task().eval(), tiny_batch(5)
    image, text = vectors(task, batch)
    logits, same = image @ text.t() / 0.07, batch["image_index"][:, None] == batch["image_index"]
    ids = batch["sample_id"]
    texts, _ = hard_negatives(logits, same, random_bits(5, 3, ids[:, None], ids))
    images, _ = hard_negatives(logits.t(), same, random_bits(5, 4, ids[:, None], ids))
    assert (batch["image_index"][texts] != batch["image_index"]).all()
    losses = []
    for row in range(5):
        for image, caption, label in ((row, row, 1), (row, int(texts[row]), 0), (int(images[row]), row, 0)):
            one = rows_of(batch, slice(caption, caption + 1))
            scores = task.match(batch["images"][image : image + 1], one["text_ids"], one["text_mask"])
            losses.append(F.cross_entropy(scores, torch.tensor([label])))
    total, count = task(batch).metrics["itm_loss"]
    assert float(count) == 15
    assert torch.allclose(total / count, torch.stack(losses).mean(), atol=1e-5)


def test_one_image_has_no_negatives_and_they_do_not_count() -> None:
    task, batch = retrieval_task(), tiny_batch(2)
    output = task(batch)
    assert float(output.metrics["itm_loss"][1]) == 2
    scores = task.match(batch["images"], batch["text_ids"], batch["text_mask"])
    expected = F.cross_entropy(scores, torch.ones(2, dtype=torch.int64), reduction="sum")
    assert torch.allclose(output.metrics["itm_loss"][0], expected, atol=1e-5)
    for answer in (0, 1):
        with torch.no_grad():
            task.itm_head.bias[answer] += 100
        assert [float(value) for value in task(batch).metrics["itm_accuracy"]] == [2 * answer, 2]
        task.itm_head.bias.data[answer] -= 100


def test_a_row_without_a_negative_takes_its_own_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are as long as the longest of the batch, whatever its padding."""
    task, batch, seen = retrieval_task(), tiny_batch(2), []
    batch["images"] = torch.randn_like(batch["images"])  # two crops of one image
    batch["text_mask"][:, 8:] = False
    original = task.encode

    def encode(*given: torch.Tensor, **named: Any) -> BackboneOutput:
        seen.append(given)
        return original(*given, **named)

    monkeypatch.setattr(task, "encode", encode)
    task(batch)
    ((images, text_ids, text_mask),) = [given for given in seen if len(given) == 3]
    assert torch.equal(images, batch["images"].repeat(3, 1, 1, 1))
    assert torch.equal(text_ids, batch["text_ids"].repeat(3, 1)[:, :8])
    assert torch.equal(text_mask, batch["text_mask"].repeat(3, 1)[:, :8])


def test_the_order_of_the_rows_does_not_matter() -> None:
    task, batch = retrieval_task().eval(), tiny_batch(6)
    shuffled = rows_of(batch, torch.tensor([3, 0, 5, 1, 4, 2]))
    with torch.no_grad():
        assert torch.allclose(task(batch).loss, task(shuffled).loss, atol=1e-5)


def test_the_temperature_is_clamped_and_can_come_back() -> None:
    task, batch = retrieval_task(), tiny_batch(4)
    for value, clamped in ((-0.1, 0.001), (0.9, 0.5)):
        with torch.no_grad():
            task.itc_temp.fill_(value)
        task.zero_grad()
        assert task.temperature().item() == pytest.approx(clamped, rel=1e-4)
        task(batch).loss.backward()
        assert task.itc_temp.grad is not None
        assert float(task.itc_temp.grad) != 0


def test_a_first_temperature_that_the_clamp_would_replace_is_refused() -> None:
    for value in TEMPERATURE_RANGE:
        FinetuneObjective(temperature=value).check()
    for value in (0.0009, 0.501, 7.0):
        with pytest.raises(UserError, match=f"^objective.temperature={value} is out of range: .* 0.001 and 0.5$"):
            FinetuneObjective(temperature=value).check()


def test_contrast_learns_the_batch() -> None:
    task = retrieval_task()
    batch = rows_of(tiny_batch(10), torch.arange(0, 10, 2))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    for _ in range(60):  # it has learned after 45
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
    image, text = vectors(task.eval(), batch)
    assert (image @ text.t()).argmax(dim=1).tolist() == list(range(5))
