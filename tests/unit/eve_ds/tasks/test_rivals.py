"""EVE's rivals: each loss is the one of the task that it is taken from, and their weights go where such weights go."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from eve_ds.config import PretrainConfig, parse
from eve_ds.engine.first_weights import load_initial
from eve_ds.model.backbone import Backbone
from eve_ds.plan.memory import Batch as PlanBatch
from eve_ds.plan.memory import Rehearsal
from eve_ds.plan.work import passes
from eve_ds.plan.zero_states import Zero
from eve_ds.tasks import Task, load_task_model
from eve_ds.tasks.itc_itm_mlm import ItcItmMlm
from eve_ds.tasks.masked_modeling import MaskedModeling
from eve_ds.tasks.registry import pretrain_spec
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.rivals import RivalConfig
from eve_ds.weights.save import write_weights
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import train_tokenizer
from tests.support.tiny_tasks import CLS, MASK, OBJECTIVE, RIVAL, RIVALS, Batch, tiny_batch, tiny_config, tiny_task

ROWS = 5
EVERY = pytest.mark.parametrize("name", RIVALS)
LOSSES = {name: name.split("_") for name in RIVALS}


def measured(task: Task, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(total / count) for name, (total, count) in task(batch).metrics.items()}


def with_weights_of(task: Task, other: Task) -> Task:
    own = {key: value for key, value in other.state_dict().items() if key in task.state_dict()}
    task.load_state_dict(own)
    return task.eval()


@EVERY
def test_each_loss_is_that_of_the_task_it_is_taken_from(name: str) -> None:
    """Contrast and matching are retrieval's, words and pixels are EVE's, with the same masks, negatives and weights."""
    rival, batch = tiny_task(name).eval(), tiny_batch(ROWS)
    found = measured(rival, batch)
    assert {key for key in found if key.endswith("_loss")} == {f"{loss}_loss" for loss in (*LOSSES[name], "aux")}
    whole = tiny_task("itc_itm_mlm_mim", seed=1)
    with_weights_of(rival, whole)
    found = measured(rival, batch)
    expected = measured(with_weights_of(tiny_task("retrieval"), whole), batch)
    masked = MaskedModeling(Backbone(tiny_config()), dataclasses.replace(OBJECTIVE, word_head=RIVAL.word_head), MASK)
    expected |= measured(with_weights_of(masked, whole), batch)
    for key in found.keys() - {"aux_loss"}:
        assert found[key] == pytest.approx(expected[key], abs=1e-6), key
    assert {"itm": "itm_accuracy" in found, "mlm": "mlm_accuracy" in found} == {
        loss: loss in LOSSES[name] for loss in ("itm", "mlm")
    }


@EVERY
def test_losses_are_summed_with_weight_one(name: str) -> None:
    task, batch = tiny_task(name).eval(), tiny_batch(ROWS)
    found = measured(task, batch)
    with torch.no_grad():
        loss = float(task(batch).loss)
    assert loss == pytest.approx(
        sum(found[f"{part}_loss"] for part in LOSSES[name]) + task.config.aux_loss_weight * found["aux_loss"], rel=1e-5
    )


@EVERY
def test_the_planner_knows_every_pass(name: str) -> None:
    """What ``passes`` says is what ``forward`` encodes, and the rehearsal without values runs."""
    task, batch = tiny_task(name).eval(), tiny_batch(ROWS)
    batch["text_mask"][:] = True
    batch["text_ids"][:, 1:] = batch["text_ids"][:, 1:].clamp(min=5)
    batch["text_ids"][:, 0] = CLS
    seen: list[tuple[int, int]] = []
    task.backbone.register_forward_hook(lambda _, __, output: seen.append(tuple(output.hidden.shape[:2])))
    task(batch)
    config = PretrainConfig(model=tiny_config(), objective=RIVAL, task=name)
    said = passes(config, PlanBatch(ROWS, 12))
    assert sorted(seen) == sorted((one.samples, one.tokens // one.samples) for one in said)
    zero = Zero(2, 8, 2, 4, 1, {}, whole_buffers=False)
    assert Rehearsal(config, zero, 0, on_gpu=True).memory(PlanBatch(4, 12)).forward > 0
    spec = pretrain_spec(name)
    assert bool(spec.gathered_values(config.model, 4)) == ("itm" in LOSSES[name])


def test_drop_path_of_every_pass_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    task, uses = tiny_task("itc_itm_mlm_mim", drop_path=0.2).train(), []
    original = task.drop_path_noise

    def noise(sample_id: torch.Tensor, *of: int) -> torch.Tensor | None:
        uses.extend(of)
        return original(sample_id, *of)

    monkeypatch.setattr(task, "drop_path_noise", noise)
    task(tiny_batch(ROWS))
    assert sorted(uses) == list(range(7))


def stored(name: str, folder: Path) -> Path:
    """A model folder as a run exports it."""
    folder.mkdir()
    write_weights(folder / "model.safetensors", tiny_task(name, seed=3).state_dict(), {})
    objective = dataclasses.asdict(RIVAL)
    tree = {"task": name, "model": dataclasses.asdict(tiny_config()), "objective": objective}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


@EVERY
def test_weights_load_by_the_tasks_name_and_as_others(name: str, tmp_path: Path) -> None:
    folder = stored(name, tmp_path / "model")
    expected = tiny_task(name, seed=3).state_dict()
    found = load_task_model(name, folder)
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    assert measured(found, tiny_batch(ROWS)).keys() == measured(tiny_task(name).eval(), tiny_batch(ROWS)).keys()
    masked = load_task_model("pretrain", folder)  # as bench probe and bench words do
    assert isinstance(masked, MaskedModeling) and masked.config == tiny_config()
    assert all(torch.equal(value, expected[key]) for key, value in masked.state_dict().items() if key in expected)


def test_a_loaded_rival_masks_the_words_of_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red circle and another one"] * 3, 290)
    model = dataclasses.replace(tiny_config(), vocab_size=300)
    objective = dataclasses.replace(RIVAL, word_masking="whole_words", mask_replacement=[0.5, 0.5, 0.0])
    write_weights(tmp_path / "model.safetensors", ItcItmMlm(Backbone(model), objective, MASK).state_dict(), {})
    tree = {"task": "itc_itm_mlm", "model": dataclasses.asdict(model), "objective": dataclasses.asdict(objective)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    tokenizer.save(tmp_path)
    loaded = load_task_model("itc_itm_mlm", tmp_path)
    assert isinstance(loaded, ItcItmMlm) and loaded.ordinary.tolist() == tokenizer.ordinary_ids()
    assert loaded.continues.tolist() == tokenizer.continues_word() + [False] * (300 - tokenizer.vocab_size)


@EVERY
def test_retrieval_starts_from_a_rivals_heads(name: str, tmp_path: Path) -> None:
    """``--load_head`` takes them; a rival without a matching head is told so."""
    folder, task = stored(name, tmp_path / "model"), Retrieval(Backbone(tiny_config()), embed_dim=16)
    if "itm" not in LOSSES[name]:
        with pytest.raises(UserError, match=r"missing: itm_head\.bias"):
            load_initial(task, folder, load_head=True)
        return
    load_initial(task, folder, load_head=True)
    expected = tiny_task(name, seed=3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in task.state_dict().items())


def test_weights_without_contrastive_heads_are_refused(tmp_path: Path) -> None:
    folder = stored("itc_itm", tmp_path / "model")
    write_weights(folder / "model.safetensors", tiny_task("pretrain").state_dict(), {})
    with pytest.raises(UserError, match="no head for task itc_itm: 'itc_vision_proj_head"):
        load_task_model("itc_itm", folder)


def test_contrastive_heads_of_another_task_have_their_width(tmp_path: Path) -> None:
    """Its settings are not a rival's: those of the heads that it lacks are the defaults."""
    folder = stored("itc_itm", tmp_path / "model")
    tree = yaml.safe_load((folder / "config.yaml").read_text()) | {"task": "own:SPEC", "objective": {"rate": 0.3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    loaded, expected = load_task_model("itc_itm", folder), tiny_task("itc_itm", seed=3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


@EVERY
def test_the_engines_seed_is_added_to_the_objectives(name: str) -> None:
    task = pretrain_spec(name).build(Backbone(tiny_config()), RIVAL, mask_id=MASK, num_classes=0, seed=7)
    assert task.seed == RIVAL.seed + 7 == 12
    if isinstance(task, MaskedModeling):
        assert task.objective.seed == 12


@EVERY
def test_negatives_are_drawn_with_both_seeds_as_masks_are(name: str) -> None:
    """Whatever ``seed`` the run gives the task for drop path."""

    def losses(objective_seed: int, seed: int) -> dict[str, float]:
        torch.manual_seed(0)
        objective = dataclasses.replace(RIVAL, seed=objective_seed)
        task = pretrain_spec(name).build(Backbone(tiny_config()), objective, mask_id=MASK, num_classes=0, seed=seed)
        task.seed = seed  # as engine/setup.py does
        return measured(task.eval(), tiny_batch(ROWS))

    first = losses(0, 3)
    assert losses(3, 0) == losses(1, 2) == first
    other = losses(1, 3)
    assert all(other[f"{loss}_loss"] != first[f"{loss}_loss"] for loss in LOSSES[name] if loss != "itc")
    assert other["itc_loss"] == first["itc_loss"]


def test_without_masks_there_are_no_examples() -> None:
    spec, task = pretrain_spec("itc_itm"), tiny_task("itc_itm")
    examples = spec.held_out_examples(task, tiny_batch(2), None, [0, 1])
    assert not examples.images and not examples.tree


@EVERY
def test_the_recipe_of_eve_serves_its_rivals(name: str) -> None:
    config = parse(PretrainConfig, ["--config", "pretrain_base", "--task", name], "test")
    plain = parse(PretrainConfig, ["--config", "pretrain_base"], "test").objective
    assert config.objective == RivalConfig(**dataclasses.asdict(plain))
    assert config.spec.losses == tuple(LOSSES[name])  # type: ignore[attr-defined]
    for option, message in (
        (("mode", "joint"), r"objective\.mode='joint' is for --task pretrain"),
        (("embed_dim", "0"), r"objective\.embed_dim=0 must be a positive number"),
        (("temperature", "-1"), r"objective\.temperature=-1\.0 must be a positive number"),
        (("temperature", "0.51"), r"objective\.temperature=0\.51 is out of range: .* stays within 0\.001 and 0\.5"),
        (("image_mask_ratio", "1"), r"objective\.image_mask_ratio=1\.0 must lie between"),
    ):
        with pytest.raises(UserError, match=message):
            parse(PretrainConfig, ["--task", name, f"--objective.{option[0]}", option[1]], "test")
