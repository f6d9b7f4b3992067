"""EVE's pre-training (arXiv 2308.11971) against a slow reference: float64, one sample and one token at a time.

The reference takes the weights by name and calls no module of the project. Which patches and words are masked comes
from ``masking.py``, whose choices are tested here too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.config import PretrainConfig, parse
from eve_ds.tasks.masked_modeling import MaskedModeling
from eve_ds.tasks.masking import choose_words, split_patches
from tests.support.tiny import MASK_ID, caption_batch, masked_task, rows_of

PATCH, SIDE, PLACES, LAYERS, HEADS, DECODER_DIM, EPS = 8, 4, 16, 3, 4, 32, 1e-6  # as tests/support/tiny.py has them
ROWS, KEPT, WIDTH, AUX_WEIGHT, SEED = 4, 4, 10, 0.001, 3
Weights = dict[str, Tensor]  # all weights by name; x is one token [D]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return normalized(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + EPS).sqrt()


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def attention(w: Weights, block: str, tokens: list[Tensor]) -> list[Tensor]:
    """What each token adds to itself. Nothing is hidden: padding is not among the tokens."""
    name, dim = f"{block}.attention", len(tokens[0])
    bias = torch.cat([w[f"{name}.qkv.q_bias"], torch.zeros(dim), w[f"{name}.qkv.v_bias"]])
    rows = torch.stack([w[f"{name}.qkv.weight"] @ norm(w, f"{name}_norm", x) + bias for x in tokens])
    out = []
    for row in rows:
        heads = []
        for head in torch.arange(dim).chunk(HEADS):
            query, keys, values = row[head], rows[:, dim + head], rows[:, 2 * dim + head]
            heads.append((keys @ query / math.sqrt(len(head))).softmax(0) @ values)
        out.append(linear(w, f"{name}.proj", torch.cat(heads)))
    return out


def mixture(w: Weights, name: str, x: Tensor, kind: str, to_experts: bool) -> tuple[Tensor, Tensor]:
    """The two best of the experts, weighted by their gates; and all gates."""
    seen = x + w[f"{name}.{kind}_vector"]
    gates = (w[f"{name}.router.weight"] @ seen).softmax(0)
    best = gates.argsort(descending=True).tolist()
    assert gates[best[1]] - gates[best[2]] > 1e-5  # else float32 could choose another expert
    out, total = torch.zeros_like(x), gates[best[0]] + gates[best[1]]
    for expert in best[:2]:
        w1, w2, biases = (w[f"{name}.experts.{part}"][expert] for part in ("w1", "w2", "w3"))
        middle = quick_gelu(w1 @ (seen if to_experts else x) + biases[0, : len(w1)])
        out = out + gates[expert] / total * (w2 @ middle + biases[0, len(w1) :])
    return out, gates


def window(place: int) -> tuple[slice, slice, slice]:
    y, x = divmod(place, SIDE)
    return slice(None), slice(PATCH * y, PATCH * (y + 1)), slice(PATCH * x, PATCH * (x + 1))


def encode(
    w: Weights, image: Tensor, keep: list[int], ids: list[int], to_experts: bool = True
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """States of the class token, the patches in ``keep`` and the words; gates[soft layer][token]."""
    name = "backbone.image_embedding"
    tokens = [w[f"{name}.class_token"] + w[f"{name}.positions"][0] + w[f"{name}.type_vector"]]
    for place in keep:
        pixels = image[window(place)].flatten()
        patch = w[f"{name}.projection.weight"].flatten(1) @ pixels + w[f"{name}.projection.bias"]
        tokens.append(patch + w[f"{name}.positions"][1 + place] + w[f"{name}.type_vector"])
    name = "backbone.text_embedding"
    for place, word in enumerate(ids):
        vector = norm(w, f"{name}.norm", w[f"{name}.words.weight"][word])
        tokens.append(vector + w[f"{name}.positions"][place] + w[f"{name}.type_vector"])
    tokens = [norm(w, "backbone.embedding_norm", x) for x in tokens]
    kinds = ["image"] * (1 + len(keep)) + ["text"] * len(ids)
    routed = []
    for name in (f"backbone.blocks.{layer}" for layer in range(LAYERS)):
        branches = attention(w, name, tokens)
        tokens = [x + w[f"{name}.attention_scale"] * y for x, y in zip(tokens, branches, strict=True)]
        if f"{name}.moe_norm.weight" in w:
            pairs = zip(kinds, tokens, strict=True)
            both = [mixture(w, f"{name}.moe", norm(w, f"{name}.moe_norm", x), kind, to_experts) for kind, x in pairs]
            branches = [branch for branch, _ in both]
            routed.append([gates for _, gates in both])
        else:
            own = [f"{name}.{kind}" for kind in kinds]
            pairs = zip(own, tokens, strict=True)
            middle = [quick_gelu(linear(w, f"{part}_mlp.fc1", norm(w, f"{part}_norm", x))) for part, x in pairs]
            branches = [linear(w, f"{part}_mlp.fc2", y) for part, y in zip(own, middle, strict=True)]
        tokens = [x + w[f"{name}.mlp_scale"] * y for x, y in zip(tokens, branches, strict=True)]
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
    tokens = [x + y for x, y in zip(tokens, attention(w, name, tokens), strict=True)]
    middle = [F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.mlp_norm", x))) for x in tokens]
    tokens = [x + linear(w, f"{name}.mlp.fc2", y) for x, y in zip(tokens, middle, strict=True)]
    return [linear(w, "pixel_decoder.head", norm(w, "pixel_decoder.norm", x)) for x in tokens[len(visible) :]]


def word_scores(w: Weights, state: Tensor) -> Tensor:
    hidden = norm(w, "word_decoder.norm", F.gelu(linear(w, "word_decoder.dense", state)))
    return w["backbone.text_embedding.words.weight"] @ hidden + w["word_decoder.bias"]


def balance(passes: list[list[list[list[Tensor]]]]) -> Tensor:
    """Mean over passes and layers of E x sum of an expert's mean gate x its share of first choices; over all tokens.

    Gates are passes[pass][row][layer][token].
    """
    losses = [torch.zeros(0)]
    for layer in (layer for rows in passes for layer in zip(*rows, strict=True)):
        gates = torch.stack([gate for row in layer for gate in row])
        shares = F.one_hot(gates.argmax(dim=1), gates.shape[1]).double().mean(dim=0)
        losses.append(gates.shape[1] * (gates.mean(dim=0) * shares).sum()[None])
    return torch.cat(losses).sum() / max(1, len(losses) - 1)


@dataclass
class Case:
    """A task, a batch and its masks (a list a row); errors by (row, place), predictions in that order, gradients."""

    joint: bool
    task: MaskedModeling
    batch: dict[str, Tensor]
    kept: list[list[int]]
    masked: list[list[int]]
    words: list[list[int]]
    squares: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    entropies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    patches: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    aux: float = 0.0
    gradients: Weights = field(default_factory=dict)

    def text(self, row: int) -> tuple[list[int], list[int]]:
        """A text without its padding; and with [MASK] in the places chosen."""
        ids = self.batch["text_ids"][row][self.batch["text_mask"][row]].tolist()
        return ids, [MASK_ID if place in self.words[row] else word for place, word in enumerate(ids)]


@functools.cache
def made(name: str) -> Case:
    """Weights so large that everything tells in the loss; texts of 3 to 10 tokens; half of one image is uniform."""
    to_experts, soft = name != "router_only", [] if name == "hard" else [1, 2]
    task = masked_task(soft_layers=soft, modality_to_experts=to_experts, aux_loss_weight=AUX_WEIGHT)
    task.objective.mode, task.objective.seed = "joint" if name == "joint" else "separate", SEED
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    batch = caption_batch(ROWS, seed=1, longest=WIDTH)
    batch["images"] = 0.3 * batch["images"] + 0.2
    batch["images"][0, :, : 2 * PATCH] = 0.5
    kept, masked = split_patches(SEED, batch["sample_id"], PLACES, 0.75)
    words = choose_words(SEED, batch["sample_id"], batch["text_mask"], 0.5)
    places = [row.nonzero().flatten().tolist() for row in words]
    case = Case(name == "joint", task, batch, kept.tolist(), masked.tolist(), places)

    w = {key: value.detach().double().requires_grad_() for key, value in task.state_dict().items()}
    passes: list[list[list[list[Tensor]]]] = [[]] if case.joint else [[], []]
    for row, image in enumerate(batch["images"].double()):
        ids, with_masks = case.text(row)
        states, gates = encode(w, image, case.kept[row], with_masks if case.joint else ids, to_experts)
        rebuilt = rebuild(w, states[: 1 + KEPT], case.kept[row], case.masked[row])
        passes[0].append(gates)
        if not case.joint:
            states, gates = encode(w, image, list(range(PLACES)), with_masks, to_experts)
            passes[1].append(gates)
        for place, patch in zip(case.masked[row], rebuilt, strict=True):
            case.squares[row, place] = (patch - normalized(image[window(place)].flatten())).square().mean()
            case.patches.append(patch)
        for place in case.words[row]:
            case.scores.append(word_scores(w, states[len(states) - len(ids) + place]))
            case.entropies[row, place] = -case.scores[-1].log_softmax(0)[ids[place]]
    aux = balance(passes)
    case.aux = float(aux.detach())
    (mean(case.squares) + mean(case.entropies) + AUX_WEIGHT * aux).backward()
    case.gradients = {key: value.grad for key, value in w.items() if value.grad is not None}
    return case


@pytest.fixture(params=["soft", "hard", "router_only", "joint"])
def case(request: pytest.FixtureRequest) -> Case:
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
    output, mim, mlm = case.task(case.batch), mean(case.squares).item(), mean(case.entropies).item()
    found = {key: float(total / count) for key, (total, count) in output.metrics.items()}
    assert [found[key] for key in ("mim_loss", "mlm_loss", "aux_loss")] == pytest.approx([mim, mlm, case.aux], abs=1e-5)
    assert output.loss.item() == pytest.approx(mim + mlm + AUX_WEIGHT * case.aux, abs=1e-5)
    assert [int(output.metrics[key][1]) for key in ("mim_loss", "mlm_loss")] == [4 * 12, 1 + 2 + 3 + 4]
    texts = [mean({key: error for key, error in case.entropies.items() if key[0] == row}) for row in range(ROWS)]
    assert abs(mlm - torch.stack(texts).mean().item()) > 1e-2  # not the mean of the texts' means


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
    assert close(patches.predicted.flatten(0, 1), torch.stack(case.patches))
    assert close(words.scores, torch.stack(case.scores))
    errors = (patches.predicted - patches.target).square().mean(dim=-1)
    assert close(errors.flatten(), torch.stack(list(case.squares.values())))
    other = ~torch.eye(12, dtype=torch.bool)
    assert torch.cdist(patches.predicted, patches.predicted)[:, other].min().item() > 0.1


def test_masked_pixels_change_the_target_alone(case: Case) -> None:
    images, generator = case.batch["images"].clone(), torch.Generator().manual_seed(0)
    for row in range(ROWS):
        images[row][window(case.masked[row][row])] = torch.randn(3, PATCH, PATCH, generator=generator)
    before, words, _ = case.task._predict(case.batch)
    after, other, _ = case.task._predict(case.batch | {"images": images})
    assert torch.equal(before.predicted, after.predicted)
    assert torch.equal((before.target != after.target).any(dim=-1), torch.eye(ROWS, 12, dtype=torch.bool))
    assert torch.equal(words.scores, other.scores) == case.joint  # in a pass of its own the image is whole


def test_masked_words_change_the_truth_alone(case: Case) -> None:
    ids = case.batch["text_ids"].clone()
    for row, places in enumerate(case.words):
        ids[row, places[-1]] = 5 + (ids[row, places[-1]] - 4) % 45
    patches, before, _ = case.task._predict(case.batch)
    other, after, _ = case.task._predict(case.batch | {"text_ids": ids})
    assert torch.equal(before.scores, after.scores)
    assert (before.truth != after.truth).nonzero().flatten().tolist() == [0, 2, 5, 9]
    assert torch.equal(patches.predicted, other.predicted) == case.joint  # in a pass of its own the text is whole


def test_what_each_pass_sees(case: Case) -> None:
    """By gradients: pixels are told by visible patches and the whole text, words by visible words and all patches."""
    for row in range(ROWS):
        one = rows_of(case.batch, row, row + 1)
        images = one["images"].clone().requires_grad_()
        patches, words, _ = case.task._predict(one | {"images": images})
        leaves = [images, case.task.backbone.text_embedding.words.weight]
        to_image, to_words = torch.autograd.grad(patches.predicted.square().sum(), leaves, retain_graph=True)
        assert [place for place in range(PLACES) if to_image[0][window(place)].any()] == case.kept[row]
        ids = case.text(row)[case.joint]
        assert to_words.any(dim=1).nonzero().flatten().tolist() == sorted(set(ids))
        (to_image,) = torch.autograd.grad(words.scores.square().sum(), images)
        seen = case.kept[row] if case.joint else list(range(PLACES))
        assert [place for place in range(PLACES) if to_image[0][window(place)].any()] == seen


def test_what_the_decoders_see(case: Case) -> None:
    """Pixels: class token and visible patches, no state of the text. Words: each the state at its own place."""
    states: list[Tensor] = []
    handle = case.task.backbone.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    patches, words, _ = case.task._predict(case.batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(patches.predicted.square().sum(), states[0], retain_graph=True)
    assert torch.equal(gradient.any(dim=-1), (torch.arange(1 + KEPT + WIDTH) < 1 + KEPT).expand(ROWS, -1))
    first_word = states[-1].shape[1] - WIDTH
    for scores, (row, place) in zip(words.scores, case.entropies, strict=True):
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
    assert close(torch.cat([one[0].predicted for one in alone]), patches.predicted)
    assert close(torch.cat([one[1].scores for one in alone]), words.scores)


@pytest.mark.parametrize(("recipe", "soft"), [("base", [10, 11]), ("large", [21, 22, 23])])
def test_recipes_have_the_figures_of_the_paper(recipe: str, soft: list[int], repository: Path) -> None:
    path = repository / f"eve_ds/configs/pretrain_{recipe}.yaml"
    config = parse(PretrainConfig, ["--config", str(path)], "program")
    model, objective = config.model, config.objective
    assert (model.soft_layers, model.num_experts, model.top_k, model.aux_loss_weight) == (soft, 32, 2, AUX_WEIGHT)
    assert (objective.mode, objective.image_mask_ratio, objective.text_mask_ratio) == ("separate", 0.75, 0.5)
    assert objective.decoder_dim < model.dim  # "narrower hidden widths"
