"""Micro-batches of pairs, images alone and texts alone against a slow reference that takes each row by itself.

The reference is ``tests/support/paper.py``: float64, one token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eve_ds.config import PretrainConfig, parse
from eve_ds.data.data_config import DataSource
from eve_ds.data.samples import CaptionImages
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.batch_parts import Part, parts_of
from eve_ds.tasks.masked_modeling import SPEC, MaskedModeling, MaskedSpec, ObjectiveConfig
from eve_ds.tasks.registry import PRETRAIN, finetune_spec, pretrain_spec
from preprocessing.errors import UserError
from tests.support.paper import (
    DECODER_DIM,
    HEADS,
    PLACES,
    Weights,
    balance,
    encode,
    normalized,
    rebuild,
    window,
    word_scores,
)
from tests.support.tiny import MASK_ID, caption_batch, draw_weights, mixed, model_config

AUX_WEIGHT, SEED = 0.1, 3
ABSENT = {"has_image": "t", "has_text": "i"}  # a run without such a source has no such column


@dataclass
class Expected:
    """What one row after another gives: summed errors and how many they are; the mean balance; gradients."""

    squares: list[Tensor]
    entropies: list[Tensor]
    aux: Tensor
    gradients: Weights

    @property
    def loss(self) -> float:
        return float(mean(self.squares) + mean(self.entropies) + AUX_WEIGHT * self.aux)


def mean(errors: list[Tensor]) -> Tensor:
    """0 of none."""
    return torch.stack(errors).mean() if errors else torch.zeros((), dtype=torch.float64)


def task_of(mode: str, drop_path: float = 0.0) -> MaskedModeling:
    objective = ObjectiveConfig(mode=mode, decoder_dim=DECODER_DIM, decoder_depth=1, decoder_heads=HEADS, seed=SEED)
    config = model_config(aux_loss_weight=AUX_WEIGHT, drop_path=drop_path)
    task = MaskedModeling(Backbone(config), objective, MASK_ID)
    draw_weights(task)
    return task


def batch_of(kinds: str, sources: str = "") -> dict[str, Tensor]:
    """A row for each letter; of a run with ``sources`` of these kinds, which are those of the rows if not given."""
    batch = mixed(caption_batch(len(kinds), seed=1, longest=10), kinds)
    return {name: value for name, value in batch.items() if ABSENT.get(name, "p") in (sources or kinds) + "p"}


def row_by_row(task: MaskedModeling, batch: dict[str, Tensor], kinds: str, passes: int) -> Expected:
    """Each row by itself, with what it has; ``passes`` that a step takes, over which the balance is a mean."""
    w = {key: value.detach().double().requires_grad_() for key, value in task.state_dict().items()}
    masks, mode = task.draw_masks(batch), task.objective.mode
    squares, entropies = [], []
    gates: dict[str, list[list[list[Tensor]]]] = {"patches": [], "words": [], "alone": []}
    for row, (kind, image) in enumerate(zip(kinds, batch["images"].double(), strict=True)):
        ids = batch["text_ids"][row][batch["text_mask"][row]].tolist()
        seen = masks.text_ids[row].tolist()[: len(ids)]
        kept, hidden = masks.kept[row].tolist(), masks.masked[row].tolist()
        states: list[Tensor] = []
        if kind in "pi" and mode != "mlm":
            states, found = encode(w, image, kept, seen if mode == "joint" else ids)
            gates["patches"].append(found)
            rebuilt = rebuild(w, states[: 1 + len(kept)], kept, hidden)
            targets = [normalized(image[window(place)].flatten()) for place in hidden]
            squares += [(one - target).square().mean() for one, target in zip(rebuilt, targets, strict=True)]
        if kind == "p" and mode in ("separate", "mlm"):
            states, found = encode(w, image, list(range(PLACES)), seen)
            gates["words"].append(found)
        if kind == "t":
            states, found = encode(w, None, [], seen)
            gates["alone"].append(found)
        for place in masks.words[row].nonzero().flatten().tolist() if mode != "mim" else []:
            entropies.append(-word_scores(w, states[len(states) - len(ids) + place]).log_softmax(0)[ids[place]])
    with_rows = [rows for rows in gates.values() if rows]
    aux = balance(with_rows) * len(with_rows) / passes
    (mean(squares) + mean(entropies) + AUX_WEIGHT * aux).backward()
    gradients = {key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in w.items()}
    return Expected([one.detach() for one in squares], [one.detach() for one in entropies], aux.detach(), gradients)


@pytest.mark.parametrize(
    ("mode", "kinds", "sources", "passes"),
    [
        ("separate", "pitpt", "pit", 3),
        ("joint", "tpip", "pit", 2),
        ("mim", "ipi", "pi", 1),
        ("mlm", "tpt", "pt", 2),
        ("separate", "ii", "pit", 3),  # what a rank may get of them: no text,
        ("separate", "tt", "pit", 3),  # no image,
        ("joint", "t", "pit", 2),
        ("mlm", "p", "pt", 2),  # no text alone
    ],
)
def test_loss_and_gradients(mode: str, kinds: str, sources: str, passes: int) -> None:
    """Means over the masked patches of rows with an image, and over the masked words of rows with a text."""
    task, batch = task_of(mode), batch_of(kinds, sources)
    expected = row_by_row(task, batch, kinds, passes)
    output = task(batch)
    assert output.loss.item() == pytest.approx(expected.loss, abs=2e-5)
    counts = {"mim_loss": expected.squares, "mlm_loss": expected.entropies}
    for name, errors in counts.items():
        if name in output.metrics:
            assert output.metrics[name][1] == len(errors)
            assert float(output.metrics[name][0]) == pytest.approx(float(sum(errors)), abs=1e-4)
        else:
            assert not errors and mode == {"mim_loss": "mlm", "mlm_loss": "mim"}[name]
    output.loss.backward()
    for key, parameter in task.named_parameters():
        assert parameter.grad is not None, key  # ZeRO reduces every parameter on every rank
        right = expected.gradients[key]
        assert float((parameter.grad - right).abs().max()) < 2e-5 * max(float(right.abs().max()), 1e-2), key


def test_the_modality_that_a_row_lacks_tells_nothing() -> None:
    """Not by a bit: pixels of a text alone, token ids behind the padding of an image alone."""
    task, batch = task_of("separate", drop_path=0.2).train(), batch_of("pitpt")
    other = {name: value.clone() for name, value in batch.items()}
    other["images"][[2, 4]] = torch.randn(2, 3, 32, 32)
    other["text_ids"][1] = 17
    found = []
    for one in (batch, other):
        output = task(one)
        gradients = torch.autograd.grad(output.loss, list(task.parameters()))
        found.append([output.loss.detach(), *(part for pair in output.metrics.values() for part in pair), *gradients])
    assert all(torch.equal(one, same) for one, same in zip(*found, strict=True))
    for row, column in ((0, "images"), (1, "images"), (0, "text_ids"), (2, "text_ids")):
        other = {name: value.clone() for name, value in batch.items()}
        other[column][row] = other[column][row].flip(0)
        assert not torch.equal(task(other).loss.detach(), found[0][0])


def test_a_pairs_part_in_the_loss_does_not_depend_on_the_other_rows() -> None:
    """Drop path and masks belong to the sample: alone in its micro-batch each row gives the same sums."""
    task, batch = task_of("separate", drop_path=0.3).train(), batch_of("pitpt")
    parts = [task({name: value[row : row + 1] for name, value in batch.items()}).metrics for row in range(5)]
    for name, pair in task(batch).metrics.items():
        if name != "aux_loss":
            alone = torch.stack([torch.stack(part[name]) for part in parts]).sum(dim=0)
            assert torch.allclose(torch.stack(pair), alone, rtol=1e-4), name


def test_pairs_alone_are_left_as_they_are() -> None:
    batch = caption_batch(3)
    masks = task_of("separate").draw_masks(batch)
    with_image, pairs, texts = parts_of(batch, masks)
    assert with_image is pairs and with_image.batch is batch and with_image.masks is masks and texts is None


@pytest.mark.parametrize(("sources", "rows"), [("pit", [[0, 1, 3], [0, 3], [2, 4]]), ("pi", [[0, 1], [0], None])])
def test_the_rows_of_each_part(sources: str, rows: list[list[int] | None]) -> None:
    batch = batch_of("pitpt" if "t" in sources else "pi", sources)
    masks = task_of("separate").draw_masks(batch)
    for part, chosen in zip(parts_of(batch, masks), rows, strict=True):
        if chosen is None:
            assert part is None
            continue
        assert isinstance(part, Part)
        for found, whole in ((part.batch, batch), (vars(part.masks), vars(masks))):
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], whole[name][chosen]) for name in whole)


class OwnSamples(MaskedSpec):
    """A dataset that knows no modalities."""

    name, samples = "with own samples", CaptionImages


@pytest.mark.parametrize("modality", ["image", "text"])
def test_sources_that_a_task_cannot_learn_from(modality: str) -> None:
    sources = [DataSource("b"), DataSource("a", modality=modality)]
    words = {f"task {name} learns from pairs alone": pretrain_spec(name) for name in PRETRAIN if name != "pretrain"}
    words |= {f"task {name} learns from pairs alone": finetune_spec(name) for name in ("vqa", "nlvr")}
    words |= {"task with own samples learns from pairs alone": OwnSamples()}
    blind = {"image": "mlm", "text": "mim"}[modality]
    for message, spec in {**words, f"objective.mode={blind} predicts nothing of it": SPEC}.items():
        objective = ObjectiveConfig(mode=blind) if spec is SPEC else spec.objective()
        with pytest.raises(UserError, match=f"^data.sources: a has modality: {modality}, and {message}; leave it out"):
            spec.check_sources(objective, sources)
        spec.check_sources(objective, sources[:1])
    for mode in {"separate", "joint", "mim", "mlm"} - {blind}:
        SPEC.check_sources(ObjectiveConfig(mode=mode), sources)


def test_the_command_line_is_refused_before_anything_is_read() -> None:
    options = ["--data.sources", "[{path: b}, {path: a, modality: image}]"]
    assert parse(PretrainConfig, options, "program").data.sources == [DataSource("b"), DataSource("a", None, "image")]
    with pytest.raises(UserError, match="task itc_mlm_mim learns from pairs alone"):
        parse(PretrainConfig, [*options, "--task=itc_mlm_mim"], "program")
