"""EVE's pre-training (arXiv 2308.11971) against a slow reference: float64, one sample and one token at a time.

The reference takes the weights by name and calls no module of the project. Which patches and words are masked comes
from ``masking.py``, whose choices are tested here too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eve_ds.config import PretrainConfig, parse
from eve_ds.tasks.masked import MaskedModelling
from eve_ds.tasks.masking import choose_words, split_patches
from tests.support.tiny import MASK_ID, caption_batch, masked_task

PATCH, SIDE, HEADS, DECODER_DIM, EPS = 8, 4, 4, 32, 1e-6  # as tests/support/tiny.py has them
PLACES, WIDTH, AUX_WEIGHT = SIDE * SIDE, 10, 0.001
CASES = ["soft", "hard", "router_only", "joint"]
MODES = ["soft", "joint"]
Weights = dict[str, Tensor]


# The reference: x is one token [D], w all weights by name.


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean()
    return centered / (centered.square().mean() + EPS).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def softmax(scores: Tensor) -> Tensor:
    exponential = (scores - scores.max()).exp()
    return exponential / exponential.sum()


def attention(w: Weights, name: str, tokens: list[Tensor]) -> list[Tensor]:
    """No mask: padding is not among the tokens."""
    dim, q_bias = len(tokens[0]), w[f"{name}.qkv.q_bias"]
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), w[f"{name}.qkv.v_bias"]])
    rows = torch.stack([w[f"{name}.qkv.weight"] @ x + bias for x in tokens])
    width, out = dim // HEADS, []
    for row in rows:
        heads = []
        for start in range(0, dim, width):
            query, keys, values = (part[..., start : start + width] for part in (row[:dim], *rows.split(dim, 1)[1:]))
            heads.append(softmax(keys @ query / math.sqrt(width)) @ values)
        out.append(linear(w, f"{name}.proj", torch.cat(heads)))
    return out


def mixture(w: Weights, name: str, x: Tensor, kind: str, to_experts: bool) -> tuple[Tensor, Tensor]:
    """The two best of the experts, weighted by their gates; and all gates."""
    seen = x + w[f"{name}.{kind}_vector"]
    gates = softmax(w[f"{name}.router.weight"] @ seen)
    best = gates.argsort(descending=True).tolist()
    assert gates[best[1]] - gates[best[2]] > 1e-5  # else float32 could choose another expert
    total, hidden = gates[best[0]] + gates[best[1]], w[f"{name}.experts.w1"].shape[1]
    out = torch.zeros_like(x)
    for expert in best[:2]:
        w1, w2, biases = (w[f"{name}.experts.{part}"][expert] for part in ("w1", "w2", "w3"))
        middle = quick_gelu(w1 @ (seen if to_experts else x) + biases[0, :hidden])
        out = out + gates[expert] / total * (w2 @ middle + biases[0, hidden:])
    return out, gates


def pixels(image: Tensor, place: int) -> Tensor:
    y, x = divmod(place, SIDE)
    return image[:, PATCH * y : PATCH * (y + 1), PATCH * x : PATCH * (x + 1)].flatten()


def encode(
    w: Weights, image: Tensor, keep: list[int], ids: list[int], to_experts: bool = True
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """States of the class token, the patches in ``keep`` and the words; gates of each token in each soft layer."""
    name = "backbone.image_embedding"
    positions, projection = w[f"{name}.positions"], w[f"{name}.projection.weight"].flatten(1)
    tokens = [w[f"{name}.class_token"] + positions[0] + w[f"{name}.type_vector"]]
    for place in keep:
        patch = projection @ pixels(image, place) + w[f"{name}.projection.bias"]
        tokens.append(patch + positions[1 + place] + w[f"{name}.type_vector"])
    name = "backbone.text_embedding"
    for place, word in enumerate(ids):
        vector = norm(w, f"{name}.norm", w[f"{name}.words.weight"][word])
        tokens.append(vector + w[f"{name}.positions"][place] + w[f"{name}.type_vector"])
    tokens = [norm(w, "backbone.embedding_norm", x) for x in tokens]
    kinds = ["image"] * (1 + len(keep)) + ["text"] * len(ids)
    routed = []
    for name in (f"backbone.blocks.{layer}" for layer in range(3)):
        attended = attention(w, f"{name}.attention", [norm(w, f"{name}.attention_norm", x) for x in tokens])
        tokens = [x + w[f"{name}.attention_scale"] * y for x, y in zip(tokens, attended, strict=True)]
        branches, gates = [], []
        for x, kind in zip(tokens, kinds, strict=True):
            if f"{name}.moe_norm.weight" in w:
                branch, gate = mixture(w, f"{name}.moe", norm(w, f"{name}.moe_norm", x), kind, to_experts)
                gates.append(gate)
            else:
                middle = quick_gelu(linear(w, f"{name}.{kind}_mlp.fc1", norm(w, f"{name}.{kind}_norm", x)))
                branch = linear(w, f"{name}.{kind}_mlp.fc2", middle)
            branches.append(branch)
        tokens = [x + w[f"{name}.mlp_scale"] * y for x, y in zip(tokens, branches, strict=True)]
        if gates:
            routed.append(gates)
    return [norm(w, "backbone.norm", x) for x in tokens], routed


def grid_position(place: int) -> Tensor:
    """Sine and cosine of the row, then of the column (MAE's decoder)."""
    quarter = DECODER_DIM // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    return torch.cat([f(axis * frequency) for axis in divmod(place, SIDE) for f in (torch.sin, torch.cos)])


def rebuild(w: Weights, visible: list[Tensor], keep: list[int], masked: list[int]) -> list[Tensor]:
    """Pixels of each masked patch, from the class token, the visible patches and a mask token for each."""
    tokens = [linear(w, "pixel_decoder.embed", x) for x in visible]
    tokens[1:] = [x + grid_position(place) for x, place in zip(tokens[1:], keep, strict=True)]
    tokens += [w["pixel_decoder.mask_token"] + grid_position(place) for place in masked]
    name = "pixel_decoder.blocks.0"
    attended = attention(w, f"{name}.attention", [norm(w, f"{name}.attention_norm", x) for x in tokens])
    tokens = [x + y for x, y in zip(tokens, attended, strict=True)]
    middle = [gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.mlp_norm", x))) for x in tokens]
    tokens = [x + linear(w, f"{name}.mlp.fc2", y) for x, y in zip(tokens, middle, strict=True)]
    return [linear(w, "pixel_decoder.head", norm(w, "pixel_decoder.norm", x)) for x in tokens[len(visible) :]]


def word_scores(w: Weights, state: Tensor) -> Tensor:
    hidden = norm(w, "word_decoder.norm", gelu(linear(w, "word_decoder.dense", state)))
    return w["backbone.text_embedding.words.weight"] @ hidden + w["word_decoder.bias"]


def balance(passes: list[list[list[list[Tensor]]]]) -> Tensor:
    """Mean over passes and layers of E x sum over experts of (mean gate) x (share of first choices).

    Gates are passes[pass][row][layer][token]; the means are over all tokens of the batch.
    """
    losses = []
    for layer in (layer for rows in passes for layer in zip(*rows, strict=True)):
        gates = torch.stack([gate for row in layer for gate in row])
        first = gates.argmax(dim=1).tolist()
        shares = torch.tensor([first.count(expert) / len(first) for expert in range(gates.shape[1])])
        losses.append(gates.shape[1] * (gates.mean(dim=0) * shares).sum())
    return torch.stack(losses).mean() if losses else torch.zeros(())


class Choice(NamedTuple):
    """What is masked in one sample: places of patches and of words."""

    kept: list[int]
    masked: list[int]
    words: list[int]


class Expected(NamedTuple):
    """Errors by (row, place) and predictions in that order; aux; gradients of the loss by name."""

    patch_errors: dict[tuple[int, int], float]
    word_errors: dict[tuple[int, int], float]
    patches: Tensor
    scores: Tensor
    aux: float
    gradients: Weights


class Case(NamedTuple):
    task: MaskedModelling
    batch: dict[str, Tensor]
    choices: list[Choice]


@functools.cache
def case(name: str) -> Case:
    """Weights so large that everything tells in the loss; texts of 3 to 10 tokens; half of one image is uniform."""
    soft = [] if name == "hard" else [1, 2]
    task = masked_task(soft_layers=soft, modality_to_experts=name != "router_only", aux_loss_weight=AUX_WEIGHT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    task.objective = dataclasses.replace(task.objective, mode="joint" if name == "joint" else "separate", seed=3)
    batch = caption_batch(4, longest=WIDTH)
    batch["images"] = 0.3 * batch["images"] + 0.2
    batch["images"][0, :, : 2 * PATCH] = 0.5
    kept, masked = split_patches(3, batch["sample_id"], PLACES, 0.75)
    words = choose_words(3, batch["sample_id"], batch["text_mask"], 0.5)
    places = [row.nonzero().flatten().tolist() for row in words]
    return Case(task, batch, [Choice(*row) for row in zip(kept.tolist(), masked.tolist(), places, strict=True)])


@functools.cache
def expected(name: str) -> Expected:
    task, batch, choices = case(name)
    w = {key: value.detach().double().requires_grad_() for key, value in task.state_dict().items()}
    squares, entropies, patches, scores = {}, {}, [], []
    image_gates, text_gates = [], []
    for row, choice in enumerate(choices):
        image, ids, with_masks = batch["images"][row].double(), *words_of(batch, row, choice)
        to_experts = name != "router_only"
        states, gates = encode(w, image, choice.kept, with_masks if name == "joint" else ids, to_experts)
        rebuilt = rebuild(w, states[: 1 + len(choice.kept)], choice.kept, choice.masked)
        image_gates.append(gates)
        if name != "joint":
            states, gates = encode(w, image, list(range(PLACES)), with_masks, to_experts)
            text_gates.append(gates)
        for place, prediction in zip(choice.masked, rebuilt, strict=True):
            true = pixels(image, place)
            true = (true - true.mean()) / ((true - true.mean()).square().mean() + EPS).sqrt()
            squares[row, place] = (prediction - true).square().mean()
            patches.append(prediction.detach())
        for place in choice.words:
            score = word_scores(w, states[len(states) - len(ids) + place])
            entropies[row, place] = -softmax(score)[ids[place]].log()
            scores.append(score.detach())
    aux = balance([image_gates] if name == "joint" else [image_gates, text_gates])
    mim, mlm = (torch.stack(list(errors.values())).mean() for errors in (squares, entropies))
    (mim + mlm + AUX_WEIGHT * aux).backward()
    return Expected(
        {key: float(error.detach()) for key, error in squares.items()},
        {key: float(error.detach()) for key, error in entropies.items()},
        torch.stack(patches),
        torch.stack(scores),
        float(aux.detach()),
        {key: value.grad for key, value in w.items() if value.grad is not None},
    )


def words_of(batch: dict[str, Tensor], row: int, choice: Choice) -> tuple[list[int], list[int]]:
    """A text without its padding; and with [MASK] in the places chosen."""
    ids = batch["text_ids"][row][batch["text_mask"][row]].tolist()
    return ids, [MASK_ID if place in choice.words else word for place, word in enumerate(ids)]


def mean(values: dict[tuple[int, int], float]) -> float:
    return sum(values.values()) / len(values)


# What is masked.


def masks(sample_id: Tensor, length: int = 12) -> tuple[Tensor, Tensor]:
    """Indicators [n, 16] of masked patches and [n, length - 2] of masked words between [CLS] and [SEP]."""
    masked = split_patches(3, sample_id, PLACES, 0.75)[1]
    patches = torch.zeros(len(sample_id), PLACES).scatter_(1, masked, 1)
    words = choose_words(3, sample_id, torch.ones(len(sample_id), length, dtype=torch.bool), 0.5)
    return patches, words[:, 1:-1].float()


def test_three_quarters_of_the_patches_at_random() -> None:
    kept, masked = split_patches(3, torch.arange(5000), PLACES, 0.75)
    assert torch.equal(torch.cat([kept, masked], dim=1).sort().values, torch.arange(PLACES).expand(5000, -1))
    assert masked.shape[1] == 12
    patches = masks(torch.arange(5000))[0]
    both = patches.T @ patches / 5000  # of two places: neither blocks nor stripes
    assert torch.allclose(both, torch.full((16, 16), 12 * 11 / (16 * 15)).fill_diagonal_(0.75), atol=0.035)


def test_half_of_the_words_at_random_and_nothing_else() -> None:
    words = masks(torch.arange(5000))[1]
    both = words.T @ words / 5000
    assert torch.allclose(both, torch.full((10, 10), 5 * 4 / (10 * 9)).fill_diagonal_(0.5), atol=0.035)
    lengths = torch.arange(600) % 11 + 2
    position = torch.arange(12)
    chosen = choose_words(3, torch.arange(600), position < lengths[:, None], 0.5)
    assert not (chosen & ((position == 0) | (position >= lengths[:, None] - 1))).any()
    assert torch.equal(chosen.sum(dim=1), (lengths - 1) // 2)  # of an odd number of words the larger half


@pytest.mark.parametrize("pairs", [4000, 2**31 + 11])
def test_epochs_and_kinds_are_independent(pairs: int) -> None:
    """A pair's sample_id is epoch x pairs + its number."""
    number = torch.arange(4000)
    first, second = masks(number), masks(number + pairs)
    for a, b in ((first[0], first[1]), (first[0], second[0]), (first[1], second[1])):
        a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
        assert float((a.T @ b / 4000).abs().max()) < 0.08  # five deviations of chance
    for a, b in zip(first, second, strict=True):
        assert float((a == b).all(dim=1).double().mean()) < 0.01


# What is learned.


@pytest.mark.parametrize("name", CASES)
def test_loss_and_its_parts(name: str) -> None:
    """Means over all masked patches and all masked words, added with equal weights, and 0.001 of the balance."""
    task, batch, _ = case(name)
    right = expected(name)
    output = task(batch)
    found = {key: float(total / count) for key, (total, count) in output.metrics.items()}
    mim, mlm = mean(right.patch_errors), mean(right.word_errors)
    assert found["mim_loss"] == pytest.approx(mim, abs=1e-5)
    assert found["mlm_loss"] == pytest.approx(mlm, abs=1e-5)
    assert found["aux_loss"] == pytest.approx(right.aux, abs=1e-5)
    assert float(output.loss.detach()) == pytest.approx(mim + mlm + AUX_WEIGHT * right.aux, abs=1e-5)
    assert [int(output.metrics[key][1]) for key in ("mim_loss", "mlm_loss")] == [4 * 12, 1 + 2 + 3 + 4]
    rows = [[error for (row, _), error in right.word_errors.items() if row == r] for r in range(4)]
    assert abs(mlm - sum(sum(row) / len(row) for row in rows) / 4) > 1e-2  # not the mean of the texts' means
    assert (right.aux > 0) == (name != "hard")


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    """Of every weight, and none is left without: both decoders teach the encoder."""
    task, batch, _ = case(name)
    right = expected(name).gradients
    named = dict(task.named_parameters())
    assert named.keys() == right.keys()
    for (key, parameter), found in zip(
        named.items(), torch.autograd.grad(task(batch).loss, list(named.values())), strict=True
    ):
        largest = float(right[key].abs().max())
        assert largest > 1e-6, key
        assert torch.allclose(found.double(), right[key], atol=2e-5 * largest + 1e-7), (key, parameter.shape)


@pytest.mark.parametrize("name", CASES)
def test_each_place_gets_its_own_prediction(name: str) -> None:
    """Mask tokens carry the position of the place that they rebuild, and its pixels are the target."""
    task, batch, choices = case(name)
    picture, words, _ = task._predict(batch)
    right = expected(name)
    assert torch.allclose(picture.predicted.flatten(0, 1).double(), right.patches, atol=2e-5)
    assert torch.allclose(words.scores.double(), right.scores, atol=2e-5)
    errors = (picture.predicted - picture.target).square().mean(-1)
    for (row, place), error in right.patch_errors.items():
        assert float(errors[row, choices[row].masked.index(place)]) == pytest.approx(error, abs=1e-5)
    assert float(torch.cdist(picture.predicted, picture.predicted)[:, ~torch.eye(12, dtype=torch.bool)].min()) > 0.1


@pytest.mark.parametrize("name", MODES)
def test_masked_pixels_change_the_target_alone(name: str) -> None:
    task, batch, choices = case(name)
    images, generator = batch["images"].clone(), torch.Generator().manual_seed(0)
    for row, choice in enumerate(choices):
        y, x = divmod(choice.masked[row], SIDE)
        window = images[row, :, PATCH * y : PATCH * (y + 1), PATCH * x : PATCH * (x + 1)]
        window.copy_(torch.randn(window.shape, generator=generator))
    (before, words, _), (after, other, _) = task._predict(batch), task._predict(batch | {"images": images})
    assert torch.equal(before.predicted, after.predicted)
    changed = before.target != after.target
    assert torch.equal(changed.any(dim=-1), torch.eye(4, 12, dtype=torch.bool))
    assert torch.equal(words.scores, other.scores) == (name == "joint")  # in a pass of its own the image is whole


@pytest.mark.parametrize("name", MODES)
def test_masked_words_change_the_truth_alone(name: str) -> None:
    task, batch, choices = case(name)
    ids = batch["text_ids"].clone()
    for row, choice in enumerate(choices):
        ids[row, choice.words[-1]] = 5 + (ids[row, choice.words[-1]] - 4) % 45
    (patches, before, _), (other, after, _) = task._predict(batch), task._predict(batch | {"text_ids": ids})
    assert torch.equal(before.scores, after.scores)
    assert (before.truth != after.truth).nonzero().flatten().tolist() == [0, 2, 5, 9]
    assert torch.equal(patches.predicted, other.predicted) == (
        name == "joint"
    )  # in a pass of its own the text is whole


@pytest.mark.parametrize("name", MODES)
def test_what_each_pass_sees(name: str) -> None:
    """By gradients: pixels are told by visible patches and the whole text, words by visible words and all patches."""
    task, batch, choices = case(name)
    table = task.backbone.text_embedding.words.weight
    for row, choice in enumerate(choices):
        images = batch["images"][row : row + 1].clone().requires_grad_()
        one = {key: value[row : row + 1] for key, value in batch.items()} | {"images": images}
        patches, words, _ = task._predict(one)
        to_image, to_words = torch.autograd.grad(patches.predicted.square().sum(), [images, table], retain_graph=True)
        ids, with_masks = words_of(batch, row, choice)
        assert seen_places(to_image) == choice.kept
        assert to_words.any(dim=1).nonzero().flatten().tolist() == sorted(set(with_masks if name == "joint" else ids))
        to_image = torch.autograd.grad(words.scores.square().sum(), images)[0]
        assert seen_places(to_image) == (choice.kept if name == "joint" else list(range(PLACES)))


def seen_places(gradient: Tensor) -> list[int]:
    return [place for place in range(PLACES) if pixels(gradient[0], place).any()]


@pytest.mark.parametrize("name", MODES)
def test_what_the_decoders_see(name: str) -> None:
    """Pixels: class token and visible patches, no state of the text. Words: each the state at its own place."""
    task, batch, choices = case(name)
    states: list[Tensor] = []
    handle = task.backbone.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    try:
        picture, words, _ = task._predict(batch)
    finally:
        handle.remove()
    gradient = torch.autograd.grad(picture.predicted.square().sum(), states[0], retain_graph=True)[0]
    assert torch.equal(gradient.any(dim=-1), (torch.arange(1 + 4 + WIDTH) < 1 + 4).expand(4, -1))
    places = [(row, place) for row, choice in enumerate(choices) for place in choice.words]
    for scores, place in zip(words.scores, places, strict=True):
        gradient = torch.autograd.grad(scores.square().sum(), states[-1], retain_graph=True)[0]
        assert gradient[:, -WIDTH:].any(dim=-1).nonzero().tolist() == [list(place)]
        assert not gradient[:, :-WIDTH].any()


# What a token carries.


@pytest.mark.parametrize("name", ["soft", "hard"])
@pytest.mark.parametrize("keep", [[5], [14, 3, 9, 0]])
def test_visible_patches_carry_their_places_and_the_modality(name: str, keep: list[int]) -> None:
    """Even a single one, and in any order: the states are the reference's, and permuted as the patches are."""
    task, batch, _ = case(name)
    one = {key: value[3:] for key, value in batch.items()}
    text = (one["text_ids"], one["text_mask"])
    hidden = task.encode(one["images"], *text, torch.tensor([keep])).hidden
    w = {key: value.double() for key, value in task.state_dict().items()}
    right = encode(w, one["images"][0].double(), keep, one["text_ids"][0].tolist())[0]
    assert torch.allclose(hidden[0].double(), torch.stack(right), atol=2e-5)

    def rebuilt(kept: list[int]) -> Tensor:
        output = task.encode(one["images"], *text, torch.tensor([kept]))
        masked = torch.tensor([[place for place in range(PLACES) if place not in kept]])
        return task.pixel_decoder(output.hidden[:, : output.num_image_tokens], torch.tensor([kept]), masked)

    assert torch.allclose(rebuilt(keep), rebuilt(sorted(keep)), atol=1e-5)


@pytest.mark.parametrize(("soft", "part"), [([], "mlp"), ([0], "vector")])
def test_a_single_patch_is_routed_as_image(soft: list[int], part: str) -> None:
    """With one block, each token's state has a gradient to its own modality's weights alone."""
    task, batch, _ = case("hard")
    task = masked_task(depth=1, soft_layers=soft)
    one = {key: value[3:] for key, value in batch.items()}
    named = {
        kind: [value for key, value in task.backbone.named_parameters() if f"{kind}_{part}" in key]
        for kind in ("image", "text")
    }
    hidden = task.encode(one["images"], one["text_ids"], one["text_mask"], torch.tensor([[5]])).hidden[0]
    assert len(hidden) == 2 + WIDTH
    for place, state in enumerate(hidden):
        for kind, parameters in named.items():
            gradients = torch.autograd.grad(state.pow(3).sum(), parameters, retain_graph=True, allow_unused=True)
            reached = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
            assert reached == (kind == ("image" if place < 2 else "text")), (place, kind)


@pytest.mark.parametrize("name", CASES)
def test_padding_and_the_rest_of_the_batch_change_nothing(name: str) -> None:
    task, batch, _ = case(name)
    with torch.no_grad():
        picture, words, _ = task._predict(batch)
        before = task(batch)
        padded = batch | {key: torch.nn.functional.pad(batch[key], (0, 2)) for key in ("text_ids", "text_mask")}
        padded["text_ids"] = padded["text_ids"].masked_fill(~padded["text_mask"], 17)  # whatever stands there
        after = task(padded)
        alone = [task._predict({key: value[r : r + 1] for key, value in batch.items()}) for r in range(4)]
    assert after.loss.item() == pytest.approx(before.loss.item(), abs=1e-5)
    for key, (total, count) in before.metrics.items():
        assert torch.allclose(torch.stack(after.metrics[key]), torch.stack([total, count]), rtol=1e-5), key
    assert torch.allclose(torch.cat([one[0].predicted for one in alone]), picture.predicted, atol=2e-5)
    assert torch.allclose(torch.cat([one[1].scores for one in alone]), words.scores, atol=2e-5)


@pytest.mark.parametrize(("recipe", "soft"), [("base", [10, 11]), ("large", [21, 22, 23])])
def test_recipes_have_the_figures_of_the_paper(recipe: str, soft: list[int], repository: Path) -> None:
    path = repository / f"eve_ds/configs/pretrain_{recipe}.yaml"
    config = parse(PretrainConfig, ["--config", str(path)], "program")
    model, objective = config.model, config.objective
    assert (model.soft_layers, model.num_experts, model.top_k, model.aux_loss_weight) == (soft, 32, 2, AUX_WEIGHT)
    assert (objective.mode, objective.image_mask_ratio, objective.text_mask_ratio) == ("separate", 0.75, 0.5)
    assert objective.decoder_dim < model.dim  # "narrower hidden widths"
