"""Masked modeling: what is hidden is hidden, what is asked is asked, and it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from eve_ds.config import PretrainConfig
from eve_ds.config_sections import EngineConfig
from eve_ds.engine.setup import build_task
from eve_ds.model.backbone import Backbone
from eve_ds.model.decoders import PixelDecoder, WordDecoder, WordMLP, grid_positions, unpatchify
from eve_ds.model.embeddings import patches
from eve_ds.tasks import load_task_model
from eve_ds.tasks.masked_examples import rebuilt_images
from eve_ds.tasks.masked_modeling import SPEC, MaskedModeling, ObjectiveConfig
from eve_ds.tasks.masked_parts import PixelOutput
from eve_ds.tasks.masking import choose_words, split_blocks, split_patches
from eve_ds.tasks.spec import Pass
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import train_tokenizer
from tests.support.tiny_tasks import JOINT, MASK, OBJECTIVE, Batch, rows_of, tiny_batch, tiny_config, tiny_task


def masked_task(name: str = "pretrain") -> MaskedModeling:
    task = tiny_task(name)
    assert isinstance(task, MaskedModeling)
    return task


def losses(task: MaskedModeling, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(total / count) for name, (total, count) in task(batch).metrics.items()}


@pytest.mark.parametrize("name", ["pretrain", "pretrain_joint"])
def test_loss_is_the_formula(name: str) -> None:
    """Recomputed from the backbone and the decoders, sample by sample."""
    task, batch = masked_task(name), tiny_batch(4)
    joint = name == "pretrain_joint"
    squares, entropies, aux = [], [], []
    for row in range(4):
        one = rows_of(batch, slice(row, row + 1))
        kept, masked = split_patches(5, one["sample_id"], 16, 0.75)
        chosen = choose_words(5, one["sample_id"], one["text_mask"], 0.5)
        masked_ids = one["text_ids"].masked_fill(chosen, MASK)
        image_out = task.backbone(one["images"], masked_ids if joint else one["text_ids"], one["text_mask"], kept)
        text_out = image_out if joint else task.backbone(one["images"], masked_ids, one["text_mask"])
        predicted = task.pixel_decoder(image_out.hidden[:, :5], kept, masked)[0]
        for patch, place in zip(predicted, masked[0].tolist(), strict=True):
            y, x = divmod(place, 4)
            truth = one["images"][0, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten()
            squares.append(F.mse_loss(patch, (truth - truth.mean()) / (truth.var(correction=0) + 1e-6).sqrt()))
        words = text_out.hidden[0, text_out.num_image_tokens :][chosen[0]]
        scores = task.word_decoder(words, task.backbone.text_embedding.words.weight)
        entropies += list(F.cross_entropy(scores, one["text_ids"][chosen], reduction="none"))
        aux.append(text_out.num_image_tokens)
    assert set(aux) == {5 if joint else 17}
    output = task(batch)
    mim, mlm = torch.stack(squares).mean(), torch.stack(entropies).mean()
    aux_sum, aux_count = output.metrics["aux_loss"]
    assert float(aux_count) == 1
    assert torch.allclose(output.loss, mim + mlm + 0.1 * aux_sum, atol=1e-5)
    found = losses(task, batch)
    assert found["mim_loss"] == pytest.approx(mim.item(), abs=1e-5)
    assert found["mlm_loss"] == pytest.approx(mlm.item(), abs=1e-5)


def test_masked_pixels_and_words_are_not_seen() -> None:
    """Change them all: no prediction moves."""
    task, batch = masked_task(), tiny_batch(4)
    _, masked = split_patches(5, batch["sample_id"], 16, 0.75)
    chosen = choose_words(5, batch["sample_id"], batch["text_mask"], 0.5)
    pixels = patches(batch["images"], 8)
    noise = torch.randn(4, 12, 192)
    hidden = unpatchify(pixels.scatter(1, masked[:, :, None].expand(-1, -1, 192), noise), 8)
    with torch.no_grad():
        image = task._predict(batch)[0].predicted
        assert torch.allclose(task._predict(batch | {"images": hidden})[0].predicted, image, atol=1e-6)
        words = task._predict(batch)[1].scores
        other = batch["text_ids"].masked_fill(chosen, 7)
        assert torch.allclose(task._predict(batch | {"text_ids": other})[1].scores, words, atol=1e-6)
        assert not torch.allclose(task._predict(batch | {"text_ids": other})[0].predicted, image, atol=1e-6)


def test_repeated_rows_do_not_count() -> None:
    task, batch = masked_task(), tiny_batch(5)
    valid = torch.tensor([True, False, True, True, False])
    assert losses(task, batch | {"valid": valid}) == pytest.approx(losses(task, rows_of(batch, valid)), abs=1e-5)


def test_the_same_masks_whatever_the_padding_and_the_global_state() -> None:
    task, batch = masked_task(), tiny_batch(4)
    padded = batch | {name: F.pad(batch[name], (0, 4)) for name in ("text_ids", "text_mask")}
    first = losses(task, batch)
    torch.manual_seed(123)
    assert losses(task, padded) == pytest.approx(first, abs=1e-5)


def test_it_learns_the_batch() -> None:
    task, batch = masked_task(), tiny_batch(4)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    first = losses(task, batch)
    for _ in range(60):
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
    last = losses(task, batch)
    assert last["mlm_loss"] < 0.3 * first["mlm_loss"]
    assert last["mim_loss"] < 0.9 * first["mim_loss"]


def test_images_for_the_report() -> None:
    task, batch = masked_task(), tiny_batch(3)
    batch["images"] = batch["images"].clamp(-1, 1)
    shown = task.reconstruct(batch)
    assert {name: (value.shape, str(value.dtype)) for name, value in shown.items()} == dict.fromkeys(
        ("original", "masked", "rebuilt"), ((3, 32, 32, 3), "uint8")
    )
    assert task.training
    kept, _ = split_patches(5, batch["sample_id"], 16, 0.75)
    y, x = divmod(int(kept[0, 0]), 4)
    window = (0, slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
    assert (shown["rebuilt"][window] == shown["original"][window]).all()
    assert (shown["masked"] == 128).mean() > 0.7


def test_words_for_the_report() -> None:
    task, batch = masked_task(), tiny_batch(3)
    for row, found in enumerate(task.predict_words(batch)):
        text = batch["text_ids"][row][batch["text_mask"][row]].tolist()
        assert found["text_ids"] == text
        assert found["truth"] == [text[place] for place in found["positions"]]
        assert len(found["predicted"]) == len(found["truth"]) >= 1
        assert found["sample_id"] == int(batch["sample_id"][row])


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "mim", "pixel_target": "raw"},
        {"mode": "mlm"},
        {"mode": "mlm", "word_head": "mlp"},
        {"word_head": "mlp"},
    ],
)
def test_a_pretrained_model_comes_back_with_the_decoders_it_has(changes: dict[str, str], tmp_path: Path) -> None:
    objective = dataclasses.replace(OBJECTIVE, **changes)
    task = MaskedModeling(Backbone(tiny_config()), objective, MASK)
    save_file({key: value.contiguous() for key, value in task.state_dict().items()}, tmp_path / "model.safetensors")
    stored = {"model": dataclasses.asdict(tiny_config()), "objective": dataclasses.asdict(objective)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    loaded = load_task_model("pretrain", tmp_path)
    assert isinstance(loaded, MaskedModeling) and loaded.objective == objective
    state, batch = task.state_dict(), tiny_batch(3)
    assert loaded.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(loaded(batch).loss, task.eval()(batch).loss)


def test_the_word_decoder_of_another_objective_does_not_need_its_settings(tmp_path: Path) -> None:
    state = tiny_task("pretrain").state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("pixel_decoder.")}
    save_file(state, tmp_path / "model.safetensors")
    stored = {"task": "own:SPEC", "model": dataclasses.asdict(tiny_config()), "objective": {"rate": 0.3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    loaded = load_task_model("pretrain", tmp_path)
    assert torch.equal(loaded.state_dict()["word_decoder.dense.weight"], state["word_decoder.dense.weight"])


def test_images_for_the_report_from_raw_pixels() -> None:
    """What is predicted is shown as it is; a perfect prediction of either target gives the image back."""
    batch = tiny_batch(3)
    batch["images"] = batch["images"].clamp(-1, 1)
    for target in ("normalized", "raw"):
        task = MaskedModeling(Backbone(tiny_config()), dataclasses.replace(OBJECTIVE, pixel_target=target), MASK)
        masks = task.draw_masks(batch)
        truth = task.rebuild(task.encode(batch["images"], patch_keep=masks.kept), batch, masks).target
        output = PixelOutput(truth, truth, masks.masked)
        shown = rebuilt_images(batch["images"], output, 8, target)
        assert (abs(shown["rebuilt"].astype(int) - shown["original"]) <= 1).all()
        flat = rebuilt_images(batch["images"], PixelOutput(truth * 0, truth, masks.masked), 8, target)["rebuilt"]
        y, x = divmod(int(masks.masked[0, 0]), 4)
        patch = (0, slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
        mean = shown["original"][patch].mean(axis=(0, 1), dtype=float).mean() if target == "normalized" else 128
        assert abs(flat[patch].astype(float) - mean).max() <= 1


@pytest.mark.parametrize(("mode", "left"), [("mim", {"images"}), ("mlm", {"words"}), ("joint", {"images", "words"})])
def test_examples_are_those_of_the_mode(mode: str, left: set[str]) -> None:
    class Captions:
        tokenizer = train_tokenizer(["a b"], 300)

        def text(self, sample: int) -> str:
            return f"caption {sample}"

    task = MaskedModeling(Backbone(tiny_config()), dataclasses.replace(OBJECTIVE, mode=mode), MASK)  # type: ignore[arg-type]
    examples = SPEC.held_out_examples(task, tiny_batch(2), Captions(), [4, 7])  # type: ignore[arg-type]
    assert examples.tree.keys() == left
    assert len(examples.images) == (6 if "images" in left else 0)
    assert all(len(entries) == 2 for entries in examples.tree.values())


@pytest.mark.parametrize("mode", ["separate", "joint", "mim", "mlm"])
def test_the_planner_is_told_what_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = dataclasses.replace(OBJECTIVE, mode=mode)  # type: ignore[arg-type]
    task, batch, seen = MaskedModeling(Backbone(tiny_config()), objective, MASK), tiny_batch(4), []
    batch["text_mask"] = torch.ones(4, 12, dtype=torch.bool)

    def encode(images: Tensor, text_ids: Tensor, text_mask: Tensor, keep: Tensor | None = None, noise: None = None):  # type: ignore[no-untyped-def]
        seen.append(Pass(4, 16 if keep is None else keep.shape[1], text_ids.shape[1]))
        return task.backbone(images, text_ids, text_mask, keep, noise)

    monkeypatch.setattr(task, "encode", encode)
    words = task._predict(batch)[1]
    assert SPEC.passes(tiny_config(), objective, 4, 12) == seen
    assert SPEC.selected_rows(objective, 4, 12) == (len(words.truth) if words else 0)


def test_a_run_masks_the_words_of_its_tokenizer(tmp_path: Path) -> None:
    """Training takes them from the tokenizer, and so does who loads the model; without one each token is a word."""
    tokenizer = train_tokenizer(["a red circle and another one"] * 3, 290)
    model = dataclasses.replace(tiny_config(), vocab_size=300)
    whole = dataclasses.replace(OBJECTIVE, word_masking="whole_words", mask_replacement=[0.5, 0.5, 0.0])
    engine = EngineConfig(expert_parallel_size=1)
    task = build_task(PretrainConfig(model=model, objective=whole, engine=engine), tokenizer)
    assert isinstance(task, MaskedModeling)
    assert task.continues.tolist() == tokenizer.continues_word() + [False] * (300 - tokenizer.vocab_size)
    assert task.continues.any() and task.ordinary.tolist() == tokenizer.ordinary_ids()
    small = MaskedModeling(Backbone(dataclasses.replace(model, vocab_size=280)), whole, MASK)
    small.use_tokenizer(tokenizer)  # the data set refuses it
    assert small.continues.tolist() == tokenizer.continues_word()[:280]
    ids = torch.tensor([tokenizer.encode("red anothers circles", 12)] * 40)
    batch = {"text_ids": ids, "text_mask": torch.ones_like(ids), "sample_id": torch.arange(40)}
    masks = task.draw_masks(batch)
    for row, word in enumerate(masks.words):
        kinds = zip(word.tolist()[2:-1], word.tolist()[1:-2], task.continues[ids[row]].tolist()[2:-1], strict=True)
        assert all(mine == before for mine, before, continues in kinds if continues)
    seen = set(masks.text_ids[masks.words].tolist())
    assert MASK in seen and len(seen) > 2 and seen <= {MASK, *tokenizer.ordinary_ids()}
    save_file(task.state_dict(), tmp_path / "model.safetensors")
    stored = {"model": dataclasses.asdict(model), "objective": dataclasses.asdict(whole)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    loaded = load_task_model("pretrain", tmp_path)
    assert not loaded.continues.any() and loaded.ordinary.tolist() == list(range(5, 300))  # type: ignore[union-attr]
    tokenizer.save(tmp_path)
    loaded = load_task_model("pretrain", tmp_path)
    assert torch.equal(loaded.continues, task.continues) and torch.equal(loaded.ordinary, task.ordinary)  # type: ignore[arg-type]


def test_the_engines_seed_is_added_to_that_of_the_masks() -> None:
    task = SPEC.build(Backbone(tiny_config()), OBJECTIVE, mask_id=MASK, num_classes=0, seed=7)
    assert (OBJECTIVE.seed, task.objective.seed) == (5, 12)


def test_blocks_are_masked_where_asked() -> None:
    objective, batch = dataclasses.replace(OBJECTIVE, image_masking="blockwise"), tiny_batch(3)
    masks = MaskedModeling(Backbone(tiny_config()), objective, MASK).draw_masks(batch)
    kept, masked = split_blocks(5, batch["sample_id"], 16, 0.75)
    assert torch.equal(masks.kept, kept) and torch.equal(masks.masked, masked)


def test_an_image_of_a_single_patch_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.image_size=32 gives a single patch"):
        MaskedModeling(Backbone(dataclasses.replace(tiny_config(), patch_size=32)), OBJECTIVE, MASK)


def test_the_papers_word_head_adds_a_table_of_its_own() -> None:
    tied, own = WordDecoder(8, 50), WordMLP(8, 50)
    counts = [sum(parameter.numel() for parameter in head.parameters()) for head in (tied, own)]
    assert counts == [8 * 8 + 8 + 2 * 8 + 50, 8 * 8 + 8 + 50 * (8 + 1)]
    large = WordMLP(256, 2000)
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.02) for layer in (large.dense, large.projection))
    assert not large.dense.bias.any() and not large.projection.bias.any()


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 4]))
@settings(max_examples=10)
def test_unpatchify_undoes_patches(batch: int, side: int, patch: int) -> None:
    images = torch.randn(batch, 3, side * patch, side * patch)
    assert torch.equal(unpatchify(patches(images, patch), patch), images)


def test_grid_positions_tell_places_apart() -> None:
    positions = grid_positions(16, 4)
    assert positions.shape == (17, 16)
    distance = torch.cdist(positions, positions) + torch.eye(17)
    assert float(distance.min()) > 0.1


def test_pixel_decoder_does_not_mind_the_order_of_patches() -> None:
    torch.manual_seed(0)
    decoder = PixelDecoder(8, 16, 4, 16, 1, 2)
    kept, masked = split_patches(0, torch.arange(2), 16, 0.75)
    encoded = torch.randn(2, 5, 8)
    flipped = torch.cat([encoded[:, :1], encoded[:, 1:].flip(1)], dim=1)
    a, b = decoder(encoded, kept, masked), decoder(flipped, kept.flip(1), masked.flip(1))
    assert torch.allclose(a, b.flip(1), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_mask_ratio": 1.0}, "objective.image_mask_ratio=1.0"),
        ({"text_mask_ratio": 0.0}, "objective.text_mask_ratio=0.0"),
        ({"decoder_dim": 18}, "objective.decoder_dim=18"),
        ({"decoder_dim": 20, "decoder_heads": 8}, "objective.decoder_dim=20 must be a multiple of 4 and of"),
        ({"decoder_depth": 0}, "objective.decoder_depth=0"),
        ({"decoder_depth": 1 << 21}, "objective.decoder_depth=2097152 must be at least 1 and at most 1048576"),
        ({"mode": "both"}, "objective.mode='both' must be separate, joint, mim or mlm"),
        ({"pixel_target": "hog"}, "objective.pixel_target='hog'"),
        ({"word_head": "bert"}, "objective.word_head='bert'"),
        ({"image_masking": "stripes"}, "objective.image_masking='stripes' must be random or blockwise"),
        ({"word_masking": "spans"}, "objective.word_masking='spans'"),
        ({"mask_replacement": [0.8, 0.1]}, r"objective.mask_replacement=\[0.8, 0.1\] must be three shares"),
        ({"mask_replacement": [0.8, 0.3, -0.1]}, "must be three shares from 0 to 1 whose sum is 1"),
        ({"mask_replacement": [0.8, 0.1, 0.2]}, "must be three shares from 0 to 1 whose sum is 1"),
        ({"mask_replacement": [0.0, 0.0, 1.0]}, "hides no word"),
    ],
)
def test_an_impossible_objective_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        dataclasses.replace(OBJECTIVE, **change).check()


def test_defaults_are_the_papers() -> None:
    objective = ObjectiveConfig()
    objective.check()
    assert (objective.image_mask_ratio, objective.text_mask_ratio, objective.mode) == (0.75, 0.5, "separate")
    assert JOINT.mode == "joint"
