"""Codes of masked patches: the loss against a slow reference, what leaks, the data that it needs, and its head."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from eve_ds.config import PretrainConfig, parse
from eve_ds.data.batch_reader import collate
from eve_ds.data.data_config import DataConfig
from eve_ds.data.loader import build_loader
from eve_ds.data.shards import RowError
from eve_ds.data.sources import JoinedSplit, open_split
from eve_ds.engine import setup
from eve_ds.model.backbone import Backbone
from eve_ds.plan.__main__ import PretrainPlan
from eve_ds.plan.memory import Batch as PlanBatch
from eve_ds.plan.memory import Rehearsal
from eve_ds.plan.meta_model import build as meta_task
from eve_ds.plan.meta_model import count_parameters
from eve_ds.plan.zero_states import Zero
from eve_ds.tasks import load_task_model
from eve_ds.tasks.base import measuring_held_out
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.masking import choose_words, split_patches
from eve_ds.tasks.mlm_mim_codes import BEIT_V2_CODES, SPEC, CodeSamples, MaskedCodes
from eve_ds.weights.save import write_weights
from preprocessing.errors import UserError
from preprocessing.shards.schema import CodeGrid
from tests.support.paper import DECODER_DIM, HEADS, PLACES, balance, encode, rebuild, window, word_scores
from tests.support.shards import (
    EVAL,
    FLIP,
    GRID,
    code_of,
    make_caption_set,
    make_code_set,
    shard_record,
    tiny_tokenizer,
    write_manifest,
)
from tests.support.tiny import MASK_ID, caption_batch, model_config
from tests.support.tiny_tasks import MASK, NUM_CODES, OBJECTIVE, Batch, tiny_batch, tiny_config, tiny_task

ROWS, SEED, AUX_WEIGHT, CODES = 3, 3, 0.001, 7
MODES = ["separate", "joint", "mim"]


@dataclasses.dataclass
class Case:
    """A task and a batch; by the reference: losses, scores of the masked patches in order, gradients."""

    task: MaskedCodes
    batch: Batch
    masked: list[list[int]]
    losses: dict[str, float]
    accuracy: float
    loss: float
    scores: Tensor
    gradients: dict[str, Tensor]


@functools.cache
def made(mode: Any) -> Case:
    """Float64, one sample and one token at a time (tests/support/paper.py), with weights so large that all tells."""
    torch.manual_seed(0)
    objective = ObjectiveConfig(mode, decoder_dim=DECODER_DIM, decoder_depth=1, decoder_heads=HEADS, seed=SEED)
    backbone = Backbone(model_config(soft_layers=[2], aux_loss_weight=AUX_WEIGHT))
    task = MaskedCodes(backbone, objective, MASK_ID, CODES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    batch = caption_batch(ROWS, seed=1, longest=8)
    batch["codes"] = torch.randint(0, CODES, (ROWS, PLACES), generator=generator)
    kept, masked = (one.tolist() for one in split_patches(SEED, batch["sample_id"], PLACES, 0.75))
    words = choose_words(SEED, batch["sample_id"], batch["text_mask"], 0.5)
    hidden = batch["text_ids"].masked_fill(words, MASK_ID)
    w = {key: value.detach().double().requires_grad_() for key, value in task.state_dict().items()}
    named = {key.replace("code_decoder.", "pixel_decoder."): value for key, value in w.items()}
    codes, texts, scores, right = [], [], [], 0
    passes: list[Any] = [[] for _ in range(2 if mode == "separate" else 1)]
    for row, image in enumerate(batch["images"].double()):
        length = int(batch["text_mask"][row].sum())
        seen, whole = hidden[row, :length].tolist(), batch["text_ids"][row, :length].tolist()
        states, gates = encode(named, image, kept[row], seen if mode == "joint" else whole)
        passes[0].append(gates)
        for place, found in zip(masked[row], rebuild(named, states[:5], kept[row], masked[row]), strict=True):
            truth = int(batch["codes"][row, place])
            codes.append(-found.log_softmax(0)[truth])
            scores.append(found)
            right += int(found.argmax()) == truth
        if mode == "separate":
            states, gates = encode(named, image, list(range(PLACES)), seen)
            passes[1].append(gates)
        for place in words[row].nonzero().flatten().tolist() if mode != "mim" else []:
            texts.append(-word_scores(named, states[len(states) - length + place]).log_softmax(0)[whole[place]])
    losses = {"mim_code_loss": torch.stack(codes).mean()} | ({"mlm_loss": torch.stack(texts).mean()} if texts else {})
    loss = sum(losses.values()) + AUX_WEIGHT * balance(passes)
    loss.backward()
    gradients = {key: value.grad for key, value in w.items() if value.grad is not None}
    found = {key: value.item() for key, value in losses.items()}
    return Case(task, batch, masked, found, right / len(codes), loss.item(), torch.stack(scores), gradients)


@pytest.fixture(params=MODES)
def case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


def test_loss_accuracy_and_gradients_are_those_of_the_reference(case: Case) -> None:
    output = case.task(case.batch)
    found = {key: float(total / count) for key, (total, count) in output.metrics.items()}
    words = {"mlm_accuracy"} if "mlm_loss" in case.losses else set()
    assert found.keys() == case.losses.keys() | {"aux_loss", "mim_code_accuracy"} | words
    assert {key: found[key] for key in case.losses} == pytest.approx(case.losses, abs=1e-5)
    assert found["mim_code_accuracy"] == pytest.approx(case.accuracy)
    assert output.loss.item() == pytest.approx(case.loss, abs=1e-5)
    assert int(output.metrics["mim_code_loss"][1]) == ROWS * 12
    named = dict(case.task.named_parameters())
    assert named.keys() == case.gradients.keys()
    for key, found in zip(named, torch.autograd.grad(output.loss, list(named.values())), strict=True):
        largest = float(case.gradients[key].abs().max())
        assert largest > 1e-6, key
        assert float((found - case.gradients[key]).abs().max()) < 2e-5 * largest + 1e-7, key


def test_each_place_gets_its_own_prediction_and_its_own_code(case: Case) -> None:
    codes, _, _ = case.task._predict(case.batch)
    assert torch.allclose(codes.scores.flatten(0, 1).double(), case.scores, rtol=0, atol=2e-5)
    assert codes.truth.tolist() == [case.batch["codes"][row][case.masked[row]].tolist() for row in range(ROWS)]


def test_no_code_and_no_masked_pixel_leaks(case: Case) -> None:
    """Codes are targets alone: those of masked patches change the truth, those of visible patches nothing at all."""
    before, words, _ = case.task._predict(case.batch)
    images = case.batch["images"].clone()
    hidden = torch.zeros(ROWS, PLACES, dtype=torch.bool)
    for row, places in enumerate(case.masked):
        hidden[row, places] = True
        for place in places:
            images[row][window(place)] = float(place)
    other = (case.batch["codes"] + 1) % CODES
    after, same, _ = case.task._predict(case.batch | {"codes": torch.where(hidden, other, case.batch["codes"])})
    assert torch.equal(before.scores, after.scores) and not (before.truth == after.truth).any()
    assert words is None or torch.equal(words.scores, same.scores)
    loss, unseen = (
        case.task(case.batch | changed).loss
        for changed in ({}, {"codes": torch.where(hidden, case.batch["codes"], other)})
    )
    assert torch.equal(loss, unseen)
    assert torch.equal(before.scores, case.task._predict(case.batch | {"images": images})[0].scores)


def test_validation_tells_what_codes_owe_to_the_text() -> None:
    """With another pair's text, of the rows that have another pair."""
    task, batch = tiny_task("pretrain_codes").eval(), tiny_batch(5)
    with torch.no_grad(), measuring_held_out(task):
        found = task(batch).metrics
    assert {"mim_code_loss_shuffled", "mim_code_accuracy_shuffled", "mlm_loss_no_image"} <= found.keys()
    other = torch.tensor([2, 2, 4, 4, 0])  # of pairs of rows with one image
    swapped = task.encode(
        batch["images"], batch["text_ids"][other], batch["text_mask"][other], task.draw_masks(batch).kept
    )
    expected = task.rebuild(swapped, batch, task.draw_masks(batch)).metrics()["mim_code_loss"][0]
    assert float(found["mim_code_loss_shuffled"][0]) == pytest.approx(expected.item(), rel=1e-5)
    batch["image_index"][:] = 1
    with torch.no_grad(), measuring_held_out(task):
        assert task(batch).metrics["mim_code_loss_shuffled"][1] == 0


def test_the_reports_images_show_what_was_right() -> None:
    task, batch = tiny_task("pretrain_codes").eval(), tiny_batch(3)
    found = task._predict(batch)[0]
    right = found.scores.argmax(dim=-1) == found.truth
    batch["codes"].scatter_(1, found.masked[:, :4], found.scores.argmax(dim=-1)[:, :4])  # at least four a row
    right[:, :4] = True
    shown = task.reconstruct(batch | {"valid": torch.tensor([True, True, False])})
    assert list(shown) == ["original", "masked", "right"] and shown["right"].shape == (2, 32, 32, 3)
    for row in range(2):
        for place, hit in zip(found.masked[row].tolist(), right[row].tolist(), strict=True):
            y, x = (slice(8 * at, 8 * at + 8) for at in divmod(place, 4))
            assert (shown["right"][row, y, x] == shown["original" if hit else "masked"][row, y, x]).all()
            assert (shown["masked"][row, y, x] == 128).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images with a 4 x 4 grid of codes in train, six in val; `plain` has none."""
    root = tmp_path_factory.mktemp("codes")
    make_code_set(root / "coded", rows=10)
    make_code_set(root / "coded", rows=6, split="val")
    make_caption_set(root / "plain", rows=5)
    return root


def opened(folder: Path, transform: Any = EVAL) -> CodeSamples:
    return CodeSamples(folder / "train", tiny_tokenizer(), transform, 12)


def test_batches_have_the_codes_of_their_images(data: Path) -> None:
    samples = opened(data / "coded")
    assert samples.num_classes == 11 and samples.grid == GRID
    batch = collate([samples[index, 0] for index in (3, 0, 7)], samples.pad_id, 12)
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].tolist() == [code_of(index // 2) for index in (3, 0, 7)]
    loader = build_loader(samples, 4, seed=1, num_workers=1)
    batch = next(iter(loader))
    assert batch["codes"].tolist() == [code_of(index) for index in batch["image_index"].tolist()]


def test_what_moves_the_image_is_refused(data: Path) -> None:
    def config(**changes: Any) -> PretrainConfig:
        model = dataclasses.replace(tiny_config(), vocab_size=400)
        return PretrainConfig(task=SPEC.name, model=model, data=DataConfig(path=str(data / "coded"), **changes))

    for options, mend in (
        ({}, "give --data.crop_scale null --data.flip false"),
        ({"crop_scale": None}, "give --data.flip false"),
        ({"flip": False}, "give --data.crop_scale null"),
        ({"crop_scale": None, "flip": False, "augmentation": "color"}, "give --data.augmentation none"),
    ):
        with pytest.raises(UserError, match=f"whole image.* {mend}$"):
            setup.build_dataset(config(**options), "train", tiny_tokenizer(), train=True)
    fixed = config(crop_scale=None, flip=False)
    training = setup.build_dataset(fixed, "train", tiny_tokenizer(), train=True)
    assert len(training) == 20 and not training.transform.is_random
    held_out = setup.build_dataset(config(), "val", tiny_tokenizer(), train=False)  # never moved
    setup.check_classes(training, held_out)
    held_out.num_classes = 12
    with pytest.raises(UserError, match=r"coded/val: has 12 classes, \S+coded/train has 11; .*--data.val_split null"):
        setup.check_classes(training, held_out)
    setup.check_classes(training, None)
    fixed.model.image_size = 48
    with pytest.raises(
        UserError, match=r"has 4 x 4 codes below 11, the model 6 x 6 patches; set model.image_size to 32"
    ):
        setup.build_dataset(fixed, "train", tiny_tokenizer(), train=True)
    with pytest.raises(UserError, match=r"give --data.flip false"):
        opened(data / "coded", FLIP)


def test_sources_without_codes_or_with_others_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"plain/train/shard-00000.arrow: has no column 'codes', which --task mlm_mim_codes"
    ):
        opened(data / "plain")
    make_code_set(tmp_path / "other", rows=5, grid=CodeGrid(4, 12))
    own, plain, other = (open_split(root, "train") for root in (data / "coded", data / "plain", tmp_path / "other"))
    build = functools.partial(CodeSamples, tokenizer=tiny_tokenizer(), transform=EVAL, max_text_length=12)
    with pytest.raises(UserError, match=r"plain/train/shard-00000.arrow: has no column 'codes'.* add codes with"):
        build(JoinedSplit([own, plain]))
    with pytest.raises(
        UserError, match=r"other/train: has 4 x 4 codes below 12, \S+coded/train has 4 x 4 codes below 11"
    ):
        build(JoinedSplit([own, other]))
    assert build(JoinedSplit([own, own]))[25, 0]["codes"].tolist() == code_of(2)


@pytest.mark.parametrize(
    ("codes", "fault"),
    [
        ([0] * 15, "codes has 15 entries, the grid 4 x 4"),
        ([0] * 15 + [11], "codes holds 11, which is not from 0 to 10"),
        ([0] * 15 + [None], "codes is null, or holds a null"),
        (None, "codes is null, or holds a null"),
    ],
)
def test_a_row_with_other_codes_is_corrupt(tmp_path: Path, codes: Any, fault: str) -> None:
    make_code_set(tmp_path, rows=4, changed={2: codes})
    samples = opened(tmp_path)
    assert samples[3, 0]["codes"].tolist() == code_of(1)
    with pytest.raises(RowError, match=rf"shard-00000.arrow: row 2: {fault}; add codes with"):
        samples[4, 0]


def test_a_shard_with_another_grid_is_refused(tmp_path: Path) -> None:
    """Two shards of one split, of two tokenizers."""
    (tmp_path / "both/train").mkdir(parents=True)
    shards = []
    for number, grid in enumerate((GRID, CodeGrid(4, 12))):
        made = make_code_set(tmp_path / f"{number}", rows=8, grid=grid) / "shard-00000.arrow"
        shards.append(shard_record(made.rename(tmp_path / f"both/train/shard-0000{number}.arrow"), 8, 16))
    samples = opened(write_manifest(tmp_path / "both/train", "caption", "train", shards).parent)
    assert samples[15, 0]["codes"].tolist() == code_of(7)
    with pytest.raises(UserError, match=r"shard-00001.arrow: has 4 x 4 codes below 12, other shards have 4 x 4"):
        samples[16, 0]


def test_the_head_is_as_wide_as_the_vocabulary() -> None:
    backbone = Backbone(tiny_config())
    for known, width in ((11, 11), (0, BEIT_V2_CODES)):
        task = SPEC.build(backbone, OBJECTIVE, mask_id=MASK, num_classes=known, seed=2)
        assert task.code_decoder.head.weight.shape == (width, OBJECTIVE.decoder_dim)
        assert task.objective.seed == OBJECTIVE.seed + 2
        assert not any(key.startswith("pixel_decoder") for key in task.state_dict())
    with pytest.raises(UserError, match=r"objective.mode='mlm' masks no patch: use it with --task pretrain"):
        MaskedCodes(backbone, dataclasses.replace(OBJECTIVE, mode="mlm"), MASK, 11)


def test_weights_load_by_the_tasks_name_and_as_pretrain(tmp_path: Path) -> None:
    task = tiny_task("pretrain_codes", seed=3)
    write_weights(tmp_path / "model.safetensors", task.state_dict(), {})
    tree = {"task": SPEC.name, "model": dataclasses.asdict(tiny_config()), "objective": dataclasses.asdict(OBJECTIVE)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    found = load_task_model(SPEC.name, tmp_path)
    assert isinstance(found, MaskedCodes) and found.num_codes == NUM_CODES and found.objective == OBJECTIVE
    assert all(torch.equal(value, task.state_dict()[key]) for key, value in found.state_dict().items())
    masked = load_task_model("pretrain", tmp_path)  # its words; the pixel decoder has initial values
    assert isinstance(masked, MaskedModeling) and torch.equal(
        masked.word_decoder.dense.weight, task.word_decoder.dense.weight
    )
    write_weights(tmp_path / "model.safetensors", tiny_task("pretrain").state_dict(), {})
    with pytest.raises(UserError, match=r"no head for task mlm_mim_codes: 'code_decoder.head.weight' is missing"):
        load_task_model(SPEC.name, tmp_path)


def test_a_loaded_task_masks_the_words_of_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    model = dataclasses.replace(tiny_config(), vocab_size=400)
    objective = dataclasses.replace(OBJECTIVE, mask_replacement=[0.5, 0.5, 0.0])
    write_weights(tmp_path / "model.safetensors", MaskedCodes(Backbone(model), objective, MASK, 5).state_dict(), {})
    tree = {"task": SPEC.name, "model": dataclasses.asdict(model), "objective": dataclasses.asdict(objective)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert load_task_model(SPEC.name, tmp_path).ordinary.tolist() == tokenizer.ordinary_ids()


def test_the_planner_knows_the_decoders_head() -> None:
    """BEiT v2's K unless told another one; the rehearsal runs without values."""
    options = parse(PretrainPlan, ["--task=mlm_mim_codes"], "test")
    assert options.num_answers == BEIT_V2_CODES
    config = PretrainConfig(task=SPEC.name, model=tiny_config(), objective=OBJECTIVE)
    config.engine.precision = "fp32"
    many, few = (meta_task(config, codes) for codes in (BEIT_V2_CODES, 100))
    width = OBJECTIVE.decoder_dim + 1
    assert count_parameters(many).heads - count_parameters(few).heads == (BEIT_V2_CODES - 100) * width
    zero = Zero(2, 8, 2, 4, 1, {}, whole_buffers=False)
    assert Rehearsal(config, zero, 100, on_gpu=True).memory(PlanBatch(4, 12)).forward > 4 * 12 * 100 * 4
