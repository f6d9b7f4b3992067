"""Grounding in validation: what words lose without their image, and pixels without their text."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from eve_ds.tasks.base import measuring_held_out
from eve_ds.tasks.masked_modeling import MaskedModeling, another_image
from eve_ds.tasks.masking import choose_words, split_patches
from tests.support.tiny import draw_weights
from tests.support.tiny_tasks import CLS, MASK, SEP, Batch, rows_of, tiny_batch, tiny_task

SHUFFLED = {"mlm_loss_shuffled", "mlm_accuracy_shuffled", "mim_loss_shuffled"}
NO_IMAGE = {"mlm_loss_no_image", "mlm_accuracy_no_image"}
MODES = ["pretrain", "pretrain_joint"]
ALONE = {"pretrain_mim": "mim", "pretrain_mlm": "mlm"}


def masked_task(name: str = "pretrain") -> MaskedModeling:
    """With large weights, LayerScale at 1 and a pixel decoder that amplifies, so that what one modality says moves the
    other one."""
    task = tiny_task(name)
    assert isinstance(task, MaskedModeling)
    draw_weights(task)
    with torch.no_grad():
        for block in task.backbone.blocks:
            block.attention_scale.fill_(1)
            block.mlp_scale.fill_(1)
        if task.objective.predicts_pixels:
            task.pixel_decoder.embed.weight.mul_(4)
            task.pixel_decoder.head.weight.mul_(2)
    return task.eval()


def held_out(task: MaskedModeling, batch: Batch) -> dict[str, tuple[float, float]]:
    """(sum, count) of each metric in validation."""
    with torch.no_grad(), measuring_held_out(task):
        return {name: (float(total), float(count)) for name, (total, count) in task(batch).metrics.items()}


def means(task: MaskedModeling, batch: Batch) -> dict[str, float]:
    return {name: total / count for name, (total, count) in held_out(task, batch).items() if count}


def next_other(image_index: list[int], row: int) -> int | None:
    """By walking, what ``another_image`` computes."""
    for step in range(1, len(image_index)):
        other = (row + step) % len(image_index)
        if image_index[other] != image_index[row]:
            return other
    return None


def word_scores(task: MaskedModeling, one: Batch, images: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and truth of one row's masked words beside ``images``, of which joint masking hides the same patches."""
    chosen = choose_words(5, one["sample_id"], one["text_mask"], 0.5)
    kept = split_patches(5, one["sample_id"], 16, 0.75)[0] if task.objective.mode == "joint" else None
    keep = kept if images is not None else None
    output = task.backbone(images, one["text_ids"].masked_fill(chosen, MASK), one["text_mask"], keep)
    words = output.hidden[0, output.num_image_tokens :][chosen[0]]
    return task.word_decoder(words, task.backbone.text_embedding.words.weight), one["text_ids"][chosen]


def patch_errors(task: MaskedModeling, one: Batch, other: Batch) -> list[torch.Tensor]:
    """Squared error of each of one row's masked patches beside another row's text, which joint masking masks, too."""
    text_ids = other["text_ids"]
    if task.objective.mode == "joint":
        text_ids = text_ids.masked_fill(choose_words(5, other["sample_id"], other["text_mask"], 0.5), MASK)
    kept, masked = split_patches(5, one["sample_id"], 16, 0.75)
    output = task.backbone(one["images"], text_ids, other["text_mask"], kept)
    predicted = task.pixel_decoder(output.hidden[:, :5], kept, masked)[0]
    errors = []
    for patch, place in zip(predicted, masked[0].tolist(), strict=True):
        y, x = divmod(place, 4)
        truth = one["images"][0, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten()
        errors.append(F.mse_loss(patch, (truth - truth.mean()) / (truth.var(correction=0) + 1e-6).sqrt()))
    return errors


@torch.no_grad()
def reference(task: MaskedModeling, batch: Batch) -> dict[str, float]:
    """Row by row, in batches of one."""
    sums: dict[str, list[torch.Tensor]] = {}
    rows = [rows_of(batch, slice(row, row + 1)) for row in range(len(batch["sample_id"]))]
    for row, one in enumerate(rows):
        other = next_other(batch["image_index"].tolist(), row)
        inputs: dict[str, torch.Tensor | None] = {"no_image": None}
        if other is not None:
            inputs["shuffled"] = rows[other]["images"]
            sums.setdefault("mim_loss_shuffled", []).extend(patch_errors(task, one, rows[other]))
        for suffix, images in inputs.items():
            scores, truth = word_scores(task, one, images)
            sums.setdefault(f"mlm_loss_{suffix}", []).extend(F.cross_entropy(scores, truth, reduction="none"))
            sums.setdefault(f"mlm_accuracy_{suffix}", []).extend((scores.argmax(dim=1) == truth).float())
    return {name: float(torch.stack(values).mean()) for name, values in sums.items()}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("image_index", [[0, 0, 1, 1, 2], [0, 0, 1, 2, 0], [3, 2, 1, 0, 4]])
def test_values_are_those_of_plain_loops(name: str, image_index: list[int]) -> None:
    task, batch = masked_task(name), tiny_batch(5)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batch |= {"image_index": torch.tensor(image_index), "images": images[image_index]}
    expected = reference(task, batch)
    assert expected.keys() == SHUFFLED | NO_IMAGE
    found = means(task, batch)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    for key in ("mlm_loss_shuffled", "mlm_loss_no_image", "mim_loss_shuffled"):
        true = found[key.removesuffix("_shuffled").removesuffix("_no_image")]
        assert abs(found[key] - true) > 1e-3  # a hundred times what the comparison forgives


@pytest.mark.parametrize("name", list(ALONE))
def test_a_single_pass_has_the_values_of_that_pass(name: str) -> None:
    """With the decoder and the backbone of the mode with two passes, and nothing of the other decoder's."""
    both, alone, batch = masked_task(), masked_task(name), tiny_batch(5)
    alone.load_state_dict({key: both.state_dict()[key] for key in alone.state_dict()})
    expected = {key: value for key, value in means(both, batch).items() if key.startswith(ALONE[name])}
    found = means(alone, batch)
    assert f"{ALONE[name]}_loss_shuffled" in expected and found.pop("aux_loss") > 0
    assert found == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.integers(0, 3), max_size=9))
def test_rows_of_one_image_never_pair(image_index: list[int]) -> None:
    row, found = another_image(torch.tensor(image_index, dtype=torch.int64))
    walked = [next_other(image_index, place) for place in range(len(image_index))]
    assert found.tolist() == [other is not None for other in walked]
    assert row.tolist() == [place if other is None else other for place, other in enumerate(walked)]


@pytest.mark.parametrize("name", MODES)
def test_a_batch_of_one_image_has_no_shuffled_value(name: str) -> None:
    task, batch = masked_task(name), tiny_batch(2)
    assert batch["image_index"].unique().numel() == 1
    found = held_out(task, batch)
    assert {key: found[key] for key in SHUFFLED} == dict.fromkeys(SHUFFLED, (0.0, 0.0))
    assert all(found[key][1] == found["mlm_loss"][1] > 0 for key in NO_IMAGE)


@pytest.mark.parametrize("name", MODES)
def test_repeated_rows_neither_count_nor_lend_their_image(name: str) -> None:
    task, batch = masked_task(name), tiny_batch(6)
    valid = torch.tensor([True, False, False, True, False, True])
    assert means(task, batch | {"valid": valid}) == pytest.approx(means(task, rows_of(batch, valid)), abs=1e-5)
    nothing = held_out(task, batch | {"valid": torch.zeros(6, dtype=torch.bool)})
    assert {key: nothing[key] for key in SHUFFLED | NO_IMAGE} == dict.fromkeys(SHUFFLED | NO_IMAGE, (0.0, 0.0))


@pytest.mark.parametrize("name", MODES)
def test_the_other_metrics_and_the_loss_stay_what_they_are(name: str) -> None:
    task, batch = masked_task(name), tiny_batch(5)
    with torch.no_grad():
        plain = task(batch)
        with measuring_held_out(task):
            more = task(batch)
    assert not task.held_out
    assert torch.equal(plain.loss, more.loss)
    assert more.metrics.keys() - plain.metrics.keys() == SHUFFLED | NO_IMAGE
    assert all(torch.equal(torch.stack(pair), torch.stack(more.metrics[key])) for key, pair in plain.metrics.items())
    assert not any(key.endswith("_loss") for key in SHUFFLED | NO_IMAGE)  # or val/loss would count it


def test_words_that_only_the_image_tells_are_lost_without_it() -> None:
    """Each of eight images has a word of its own, which is all that its text says."""
    task, batch = masked_task(), tiny_batch(8)
    draw = torch.Generator().manual_seed(0)
    batch |= {
        "images": torch.randn(8, 3, 32, 32, generator=draw),
        "image_index": torch.arange(8),
        "text_ids": torch.stack([torch.full((8,), CLS), torch.arange(8) + 10, torch.full((8,), SEP)], dim=1),
        "text_mask": torch.ones(8, 3, dtype=torch.bool),
    }
    before = means(task, batch)
    assert before["mlm_loss_shuffled"] == pytest.approx(before["mlm_loss"], rel=0.1)  # nothing is learned yet
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
    found = means(task, batch)
    assert found["mlm_accuracy"] == 1
    assert found["mlm_accuracy_shuffled"] == 0  # it names what the other image shows
    assert found["mlm_accuracy_no_image"] <= 1 / 8
    assert found["mlm_loss_shuffled"] > found["mlm_loss"] + 2
    assert found["mlm_loss_no_image"] > found["mlm_loss"] + 1
