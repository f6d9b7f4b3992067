"""EVE's pre-training (arXiv 2308.11971) against a slow reference: float64, one sample and one token at a time.

The reference is ``tests/support/paper.py``. Which patches and words are masked comes from ``masking.py``, whose choices
are tested here too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.config import PretrainConfig, parse
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.masking import choose_words, hide_words, split_blocks, split_patches
from tests.support.paper import (
    DECODER_DIM,
    HEADS,
    PATCH,
    PLACES,
    Weights,
    balance,
    encode,
    normalized,
    rebuild,
    window,
    word_scores,
)
from tests.support.tiny import MASK_ID, caption_batch, masked_task, model_config, rows_of

ROWS, KEPT, WIDTH, AUX_WEIGHT, SEED = 4, 4, 10, 0.001, 3


@dataclass
class Case:
    """A task, a batch and its masks (a list a row); errors by (row, place), predictions in that order, gradients."""

    mode: str
    task: MaskedModeling
    batch: dict[str, Tensor]
    kept: list[list[int]]
    masked: list[list[int]]
    words: list[list[int]]
    seen: list[list[int]]  # texts as the pass with masked words sees them, padding included
    squares: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    entropies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    patches: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    aux: float = 0.0
    gradients: Weights = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        return self.mode == "joint"

    def text(self, row: int) -> tuple[list[int], list[int]]:
        """A text without its padding; and with what stands in the places chosen."""
        ids = self.batch["text_ids"][row][self.batch["text_mask"][row]].tolist()
        return ids, self.seen[row][: len(ids)]


OPTIONS: dict[str, dict[str, Any]] = {  # of the objective, by the name of a case
    "joint": {"mode": "joint"},
    "mim": {"mode": "mim"},
    "mlm": {"mode": "mlm", "word_head": "mlp"},
    "masked_otherwise": {
        "image_masking": "blockwise",
        "word_masking": "whole_words",
        "mask_replacement": [0.5, 0.3, 0.2],
    },
    "as_written": {"pixel_target": "raw", "word_head": "mlp"},
}


@functools.cache
def made(name: str) -> Case:
    """Weights so large that everything tells in the loss; texts of 3 to 10 tokens; half of one image is uniform."""
    to_experts, soft = name != "router_only", [] if name == "hard" else [1, 2]
    objective = ObjectiveConfig(
        decoder_dim=DECODER_DIM, decoder_depth=1, decoder_heads=HEADS, seed=SEED, **OPTIONS.get(name, {})
    )
    torch.manual_seed(0)
    config = model_config(soft_layers=soft, modality_to_experts=to_experts, aux_loss_weight=AUX_WEIGHT)
    task = MaskedModeling(Backbone(config), objective, MASK_ID)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    batch = caption_batch(ROWS, seed=1, longest=WIDTH)
    batch["images"] = 0.3 * batch["images"] + 0.2
    batch["images"][0, :, : 2 * PATCH] = 0.5
    kept, masked = split_patches(SEED, batch["sample_id"], PLACES, 0.75)
    words = choose_words(SEED, batch["sample_id"], batch["text_mask"], 0.5)
    seen = batch["text_ids"].masked_fill(words, MASK_ID)
    if name == "masked_otherwise":
        task.continues[::3], task.ordinary = True, torch.arange(20, 40)
        kept, masked = split_blocks(SEED, batch["sample_id"], PLACES, 0.75)
        words = choose_words(SEED, batch["sample_id"], batch["text_mask"], 0.5, batch["text_ids"] % 3 == 0)
        ids, shares = batch["text_ids"], objective.mask_replacement
        seen = hide_words(SEED, batch["sample_id"], ids, words, MASK_ID, shares, torch.arange(20, 40))
    places = [row.nonzero().flatten().tolist() for row in words]
    case = Case(objective.mode, task, batch, kept.tolist(), masked.tolist(), places, seen.tolist())

    w = {key: value.detach().double().requires_grad_() for key, value in task.state_dict().items()}
    passes: list[list[list[list[Tensor]]]] = [[] for _ in range(2 if case.mode == "separate" else 1)]
    for row, image in enumerate(batch["images"].double()):
        ids, with_masks = case.text(row)
        if case.mode != "mlm":
            states, gates = encode(w, image, case.kept[row], with_masks if case.joint else ids, to_experts)
            passes[0].append(gates)
            rebuilt = rebuild(w, states[: 1 + KEPT], case.kept[row], case.masked[row])
            for place, patch in zip(case.masked[row], rebuilt, strict=True):
                pixels = image[window(place)].flatten()
                target = pixels if objective.pixel_target == "raw" else normalized(pixels)
                case.squares[row, place] = (patch - target).square().mean()
                case.patches.append(patch)
        if case.mode in ("separate", "mlm"):
            states, gates = encode(w, image, list(range(PLACES)), with_masks, to_experts)
            passes[-1].append(gates)
        for place in case.words[row] if case.mode != "mim" else []:
            case.scores.append(word_scores(w, states[len(states) - len(ids) + place]))
            case.entropies[row, place] = -case.scores[-1].log_softmax(0)[ids[place]]
    aux = balance(passes)
    case.aux = float(aux.detach())
    (sum(mean(errors) for errors in (case.squares, case.entropies) if errors) + AUX_WEIGHT * aux).backward()
    case.gradients = {key: value.grad for key, value in w.items() if value.grad is not None}
    return case


@pytest.fixture(params=["soft", "hard", "router_only", *OPTIONS])
def case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


@pytest.fixture(params=["soft", "hard", "router_only", "joint", "as_written"])
def both(request: pytest.FixtureRequest) -> Case:
    """One with pixels and words."""
    return made(request.param)


def mean(errors: dict[tuple[int, int], Tensor]) -> Tensor:
    return torch.stack(list(errors.values())).mean()


def close(found: Tensor, right: Tensor) -> bool:
    return torch.allclose(found.double(), right.double(), rtol=0, atol=2e-5)


def masks(sample_id: Tensor) -> tuple[Tensor, Tensor]:
    """Indicators of masked patches [n, 16], and of masked words [n, 10] between [CLS] and [SEP]."""
    masked = split_patches(SEED, sample_id, PLACES, 0.75)[1]
    words = choose_words(SEED, sample_id, torch.ones(len(sample_id), 12), 0.5)
    return torch.zeros(len(sample_id), PLACES).scatter_(1, masked, 1), words[:, 1:-1].float()


def test_three_quarters_of_patches_and_half_of_words_at_random() -> None:
    """Of two places both as often as chance has it: neither blocks nor stripes."""
    for chosen, count in zip(masks(torch.arange(5000)), (12, 5), strict=True):
        places = chosen.shape[1]
        assert (chosen.sum(dim=1) == count).all()
        both = torch.full((places, places), count * (count - 1) / places / (places - 1))
        assert torch.allclose(chosen.T @ chosen / 5000, both.fill_diagonal_(count / places), atol=0.035)


def test_kept_and_masked_are_all_patches_and_no_special_token_is_masked() -> None:
    both = torch.cat(split_patches(SEED, torch.arange(500), PLACES, 0.75), dim=1)
    assert torch.equal(both.sort().values, torch.arange(PLACES).expand(500, -1))
    lengths, position = torch.arange(600) % 11 + 2, torch.arange(12)
    chosen = choose_words(SEED, torch.arange(600), position < lengths[:, None], 0.5)
    assert not (chosen & ((position == 0) | (position >= lengths[:, None] - 1))).any()
    assert torch.equal(chosen.sum(dim=1), (lengths - 1) // 2)  # of an odd number of words the larger half


@pytest.mark.parametrize("pairs", [4000, 2**32])
def test_epochs_and_kinds_are_independent(pairs: int) -> None:
    """A pair's sample_id is epoch x pairs + its number."""
    first, second = masks(torch.arange(4000)), masks(torch.arange(4000) + pairs)
    for a, b in ((first[0], first[1]), (first[0], second[0]), (first[1], second[1])):
        correlation = ((a - a.mean(0)) / a.std(0)).T @ ((b - b.mean(0)) / b.std(0)) / 4000
        assert float(correlation.abs().max()) < 0.08  # five deviations of chance
    for a, b in zip(first, second, strict=True):
        assert float((a == b).all(dim=1).double().mean()) < 0.01


def test_loss_and_its_parts(case: Case) -> None:
    """Means over all masked patches and all masked words, added with equal weights, and 0.001 of the balance."""
    output = case.task(case.batch)
    errors = {"mim_loss": case.squares, "mlm_loss": case.entropies}
    expected = {key: mean(found).item() for key, found in errors.items() if found}
    found = {key: float(total / count) for key, (total, count) in output.metrics.items()}
    assert found.keys() - {"mlm_accuracy"} == expected.keys() | {"aux_loss"}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    assert found["aux_loss"] == pytest.approx(case.aux, abs=1e-5)
    assert output.loss.item() == pytest.approx(sum(expected.values()) + AUX_WEIGHT * case.aux, abs=1e-5)
    words = sum(map(len, case.words)) if case.task.objective.word_masking == "whole_words" else 1 + 2 + 3 + 4
    counts = {"mim_loss": 4 * 12, "mlm_loss": words}
    assert {key: int(output.metrics[key][1]) for key in expected} == {key: counts[key] for key in expected}


@pytest.mark.parametrize("name", ["soft", "hard", "router_only", "joint"])
def test_the_mean_is_not_that_of_the_texts_means(name: str) -> None:
    case = made(name)
    texts = [mean({key: error for key, error in case.entropies.items() if key[0] == row}) for row in range(ROWS)]
    assert abs(mean(case.entropies).item() - torch.stack(texts).mean().item()) > 1e-2


def test_gradients(case: Case) -> None:
    """Of every weight, and none is left without: both decoders teach the encoder."""
    named = dict(case.task.named_parameters())
    assert named.keys() == case.gradients.keys()
    gradients = torch.autograd.grad(case.task(case.batch).loss, list(named.values()))
    for key, found in zip(named, gradients, strict=True):
        largest = float(case.gradients[key].abs().max())
        assert largest > 1e-6, key
        assert float((found - case.gradients[key]).abs().max()) < 2e-5 * largest + 1e-7, key


def test_each_place_gets_its_own_prediction(case: Case) -> None:
    """Mask tokens carry the position of the place that they rebuild, and its pixels are the target."""
    patches, words, _ = case.task._predict(case.batch)
    assert (patches is None, words is None) == (case.mode == "mlm", case.mode == "mim")
    if words is not None:
        assert close(words.scores, torch.stack(case.scores))
    if patches is not None:
        assert close(patches.predicted.flatten(0, 1), torch.stack(case.patches))
        errors = (patches.predicted - patches.target).square().mean(dim=-1)
        assert close(errors.flatten(), torch.stack(list(case.squares.values())))
        other = ~torch.eye(12, dtype=torch.bool)
        assert torch.cdist(patches.predicted, patches.predicted)[:, other].min().item() > 0.1


def test_replaced_words_leak_nothing_and_those_left_are_seen() -> None:
    """By design a share of the words to predict stays as it is; the others could be any word of the same kind."""
    case = made("masked_otherwise")
    ids, seen = case.batch["text_ids"], torch.tensor(case.seen)
    words = torch.zeros_like(ids, dtype=torch.bool)
    for row, places in enumerate(case.words):
        words[row, places] = True
    left = words & (seen == ids)
    assert left.any() and (words & (seen == MASK_ID)).any() and (words & ~left & (seen != MASK_ID)).any()
    other = 5 + (ids - 5 + 3) % 45  # continues a word if that did
    before = case.task._predict(case.batch)[1]
    for change, unseen in ((words & ~left, True), (left, False)):
        after = case.task._predict(case.batch | {"text_ids": torch.where(change, other, ids)})[1]
        assert before is not None and after is not None
        assert torch.equal(before.scores, after.scores) == unseen
        assert torch.equal(before.truth != after.truth, change[words])


def test_nothing_masked_leaks_in_a_single_pass() -> None:
    """In mim the text is whole, in mlm the image: all that is masked changes, and no prediction, not by a bit."""
    pixels, words = made("mim"), made("mlm")
    images = pixels.batch["images"].clone()
    for row, places in enumerate(pixels.masked):
        for place in places:
            images[row][window(place)] = float(place)
    before, after = (pixels.task._predict(pixels.batch | changed)[0] for changed in ({}, {"images": images}))
    assert before is not None and after is not None and torch.equal(before.predicted, after.predicted)
    ids = words.batch["text_ids"].clone()
    for row, places in enumerate(words.words):
        ids[row, places] = 5 + (ids[row, places] - 4) % 45
    first, second = (words.task._predict(words.batch | changed)[1] for changed in ({}, {"text_ids": ids}))
    assert first is not None and second is not None and torch.equal(first.scores, second.scores)
    assert not (first.truth == second.truth).any()
    assert not torch.equal(before.predicted, pixels.task._predict(pixels.batch | {"text_ids": ids})[0].predicted)


def test_masked_pixels_change_the_target_alone(both: Case) -> None:
    images, generator = both.batch["images"].clone(), torch.Generator().manual_seed(0)
    for row in range(ROWS):
        images[row][window(both.masked[row][row])] = torch.randn(3, PATCH, PATCH, generator=generator)
    before, words, _ = both.task._predict(both.batch)
    after, other, _ = both.task._predict(both.batch | {"images": images})
    assert torch.equal(before.predicted, after.predicted)
    assert torch.equal((before.target != after.target).any(dim=-1), torch.eye(ROWS, 12, dtype=torch.bool))
    assert torch.equal(words.scores, other.scores) == both.joint  # in a pass of its own the image is whole


def test_masked_words_change_the_truth_alone(both: Case) -> None:
    ids = both.batch["text_ids"].clone()
    for row, places in enumerate(both.words):
        ids[row, places[-1]] = 5 + (ids[row, places[-1]] - 4) % 45
    patches, before, _ = both.task._predict(both.batch)
    other, after, _ = both.task._predict(both.batch | {"text_ids": ids})
    assert torch.equal(before.scores, after.scores)
    assert (before.truth != after.truth).nonzero().flatten().tolist() == [0, 2, 5, 9]
    assert torch.equal(patches.predicted, other.predicted) == both.joint  # in a pass of its own the text is whole


def test_what_each_pass_sees(both: Case) -> None:
    """By gradients: pixels are told by visible patches and the whole text, words by visible words and all patches."""
    for row in range(ROWS):
        one = rows_of(both.batch, row, row + 1)
        images = one["images"].clone().requires_grad_()
        patches, words, _ = both.task._predict(one | {"images": images})
        leaves = [images, both.task.backbone.text_embedding.words.weight]
        to_image, to_words = torch.autograd.grad(patches.predicted.square().sum(), leaves, retain_graph=True)
        assert [place for place in range(PLACES) if to_image[0][window(place)].any()] == both.kept[row]
        ids = both.text(row)[both.joint]
        assert to_words.any(dim=1).nonzero().flatten().tolist() == sorted(set(ids))
        (to_image,) = torch.autograd.grad(words.scores.square().sum(), images)
        seen = both.kept[row] if both.joint else list(range(PLACES))
        assert [place for place in range(PLACES) if to_image[0][window(place)].any()] == seen


def test_what_the_decoders_see(both: Case) -> None:
    """Pixels: class token and visible patches, no state of the text. Words: each the state at its own place."""
    states: list[Tensor] = []
    handle = both.task.backbone.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    patches, words, _ = both.task._predict(both.batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(patches.predicted.square().sum(), states[0], retain_graph=True)
    assert torch.equal(gradient.any(dim=-1), (torch.arange(1 + KEPT + WIDTH) < 1 + KEPT).expand(ROWS, -1))
    first_word = states[-1].shape[1] - WIDTH
    for scores, (row, place) in zip(words.scores, both.entropies, strict=True):
        (gradient,) = torch.autograd.grad(scores.square().sum(), states[-1], retain_graph=True)
        assert gradient.any(dim=-1).nonzero().tolist() == [[row, first_word + place]]


@pytest.mark.parametrize("name", ["soft", "hard"])
@pytest.mark.parametrize("keep", [[5], [14, 3, 9, 0]])
def test_visible_patches_carry_their_places_and_the_modality(name: str, keep: list[int]) -> None:
    """Even a single one; and their order changes nothing."""
    task, one, (ids, _) = made(name).task, rows_of(made(name).batch, 3, 4), made(name).text(3)
    masked = torch.tensor([[place for place in range(PLACES) if place not in keep]])
    rebuilt = []
    for kept in (keep, sorted(keep)):
        index = torch.tensor([kept])
        hidden = task.encode(one["images"], one["text_ids"], one["text_mask"], index).hidden
        w = {key: value.double() for key, value in task.state_dict().items()}
        assert close(hidden[0], torch.stack(encode(w, one["images"][0].double(), kept, ids)[0]))
        rebuilt.append(task.pixel_decoder(hidden[:, : 1 + len(kept)], index, masked))
    assert close(*rebuilt)


@pytest.mark.parametrize(("soft", "part"), [([], "mlp"), ([0], "vector")])
def test_a_single_patch_is_routed_as_image(soft: list[int], part: str) -> None:
    """With one block, each token's state has a gradient to the weights of its own modality alone."""
    backbone, one = masked_task(depth=1, soft_layers=soft).backbone, rows_of(caption_batch(ROWS), 1, 2)
    hidden = backbone(one["images"], one["text_ids"], one["text_mask"], torch.tensor([[5]])).hidden[0]
    for place, state in enumerate(hidden):
        reached = set()
        for kind in ("image", "text"):
            own = [value for key, value in backbone.named_parameters() if f"{kind}_{part}" in key]
            gradients = torch.autograd.grad(state.pow(3).sum(), own, retain_graph=True, materialize_grads=True)
            reached |= {kind} if any(gradient.any() for gradient in gradients) else set()
        assert reached == {"image" if place < 2 else "text"}, place


def test_padding_and_the_rest_of_the_batch_change_nothing(case: Case) -> None:
    padded = case.batch | {key: F.pad(case.batch[key], (0, 2)) for key in ("text_ids", "text_mask")}
    padded["text_ids"] = padded["text_ids"].masked_fill(~padded["text_mask"], 17)  # whatever stands there
    before, after = case.task(case.batch), case.task(padded)
    assert after.loss.item() == pytest.approx(before.loss.item(), abs=1e-5)
    for key, values in before.metrics.items():
        assert torch.allclose(torch.stack(after.metrics[key]), torch.stack(values), rtol=1e-5), key
    patches, words, _ = case.task._predict(case.batch)
    alone = [case.task._predict(rows_of(case.batch, row, row + 1)) for row in range(ROWS)]
    if patches is not None:
        assert close(torch.cat([one[0].predicted for one in alone]), patches.predicted)
    if words is not None:
        assert close(torch.cat([one[1].scores for one in alone]), words.scores)


@pytest.mark.parametrize(("recipe", "soft"), [("base", [10, 11]), ("large", [21, 22, 23])])
def test_recipes_have_the_figures_of_the_paper(recipe: str, soft: list[int], repository: Path) -> None:
    path = repository / f"eve_ds/configs/pretrain_{recipe}.yaml"
    config = parse(PretrainConfig, ["--config", str(path)], "program")
    model, objective = config.model, config.objective
    assert (model.soft_layers, model.num_experts, model.top_k, model.aux_loss_weight) == (soft, 32, 2, AUX_WEIGHT)
    assert (objective.mode, objective.image_mask_ratio, objective.text_mask_ratio) == ("separate", 0.75, 0.5)
    assert objective.word_head == "mlp"  # "a two-layer MLP with a softmax layer"
    assert objective.decoder_dim < model.dim  # "narrower hidden widths"
