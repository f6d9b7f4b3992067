"""``python -m eve_ds.plan``: its figures against counts and sums made in another way, and its refusals."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds.config import FinetuneConfig, FinetuneObjective, PretrainConfig, parse
from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.engine.deepspeed_config import batch_shape
from eve_ds.engine.distributed import check_world
from eve_ds.model.flops import count_flops
from eve_ds.model.model_config import ModelConfig
from eve_ds.plan import figures
from eve_ds.plan.__main__ import PretrainPlan, main
from eve_ds.plan.figures import make_plan, parse_bytes
from eve_ds.plan.fit import largest
from eve_ds.plan.live_bytes import LiveBytes, WithoutValues
from eve_ds.plan.memory import Batch, Memory, Rehearsal, with_checkpointing
from eve_ds.plan.meta_model import build, count_parameters
from eve_ds.plan.work import days, flops_per_sample, traffic
from eve_ds.plan.zero_states import Zero, groups_of, steady
from eve_ds.tasks.masked_modeling import ObjectiveConfig
from preprocessing.errors import UserError
from tests.support.tiny import model_config

ANSWERS = 7


def zero(stage: int = 2, world: int = 8, ep: int = 2, itemsize: int = 2, accumulation: int = 1) -> Zero:
    return Zero(stage, world, ep, itemsize, accumulation, {}, whole_buffers=False)


def finetune(task: str, biattn: bool = False) -> FinetuneConfig:
    model = model_config(dim=64, mlp_hidden=128, num_experts=4)
    config = FinetuneConfig(model=model, task=task, objective=FinetuneObjective(biattn=biattn))  # type: ignore[arg-type]
    return dataclasses.replace(config, engine=EngineConfig(precision="fp32"))


def test_base_has_the_parameters_of_the_formula() -> None:
    """Base, by hand: D 768, H 3072, 12 blocks of which 2 route softly among 32 experts, V 64,000, 196 patches."""
    dim, hidden, words, patches = 768, 3072, 64_000, 196
    mlp = 2 * dim * hidden + hidden + dim
    attention = 4 * dim * dim + 3 * dim  # biases of queries, values and output
    block = attention + 2 * dim + 2 * dim  # its norm, two LayerScales
    soft = 2 * dim + 32 * dim + 2 * dim  # norm, router, modality vectors
    image = (3 * 16**2 + 1) * dim + (1 + patches) * dim + 2 * dim
    text = words * dim + 196 * dim + dim + 2 * dim
    hard = 2 * (mlp + 2 * dim)
    backbone = image + text + 2 * dim + 12 * block + 10 * hard + 2 * soft + 2 * dim
    decoder, side = 512, 3 * 16**2
    decoder_block = 4 * decoder**2 + 3 * decoder + 2 * 4 * decoder**2 + 5 * decoder + 4 * decoder
    pixels = dim * decoder + decoder + decoder + 4 * decoder_block + 2 * decoder + decoder * side + side
    word_head = dim * dim + dim + 2 * dim + words
    found = count_parameters(build(PretrainConfig(), ANSWERS))
    assert found.experts == 2 * 32 * mlp
    assert found.heads == pixels + word_head
    assert found.dense == backbone + pixels + word_head
    visited = (3 * 16**2 + 1) * dim + 2 * dim + 2 * dim + 12 * block + 10 * (mlp + 2 * dim) + 2 * dim
    assert found.active == visited + 2 * (soft - dim + 2 * mlp)


@pytest.mark.parametrize("changes", [{}, {"shared_layers": [0]}, {"modality_routing": False}])
def test_parameters_equal_those_of_the_model(changes: dict[str, Any]) -> None:
    from eve_ds.model.backbone import Backbone
    from eve_ds.tasks.vqa import VQA

    config = finetune("vqa")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    real = VQA(Backbone(config.model), ANSWERS)
    assert count_parameters(build(config, ANSWERS)).total == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize(
    ("task", "biattn"), [("vqa", False), ("nlvr", False), ("nlvr", True), ("itr_coco", False), ("pretrain", False)]
)
def test_operations_by_hand(task: str, biattn: bool) -> None:
    """A sample, of texts of 12 tokens and 16 patches: D 64, H 128, 3 blocks of which 2 route softly to 2 experts."""
    config: Any = PretrainConfig(model=finetune("vqa").model) if task == "pretrain" else finetune(task, biattn)
    dim, hidden, text, patches, side = 64, 128, 12, 16, 3 * 8 * 8

    def block(tokens: int, dim: int, hidden: int, visits: int = 1) -> int:
        return 2 * tokens * (4 * dim**2 + 2 * tokens * dim + 2 * visits * dim * hidden)

    def encode(seen: int, text: int) -> float:
        tokens = text + (1 + seen if seen else 0)
        soft = block(tokens, dim, hidden, visits=2) + 2 * tokens * dim * 4
        # Backward takes twice as much; patches have no gradient.
        return 2 / 3 * 2 * seen * side * dim + block(tokens, dim, hidden) + 2 * soft

    whole, tokens = encode(patches, text), 1 + patches + text
    if task == "pretrain":
        wide, kept, words = 512, 4, 5
        pixels = 2 * (1 + kept) * dim * wide + 4 * block(1 + patches, wide, 4 * wide) + 2 * (16 - kept) * wide * side
        expected = encode(kept, text) + whole + pixels + 2 * words * (dim**2 + dim * config.model.vocab_size)
    elif task == "vqa":
        expected = whole + 2 * (dim * 2 * dim + 2 * dim * ANSWERS)
    elif task == "nlvr":
        attend = tokens * (4 * dim**2 + 2 * tokens * dim) + tokens * (2 * dim * dim + dim) + tokens * dim
        head = 2 * attend + 2 * dim * 2 if biattn else 2 * dim * 2 * dim + 2 * dim * 2
        expected = 2 * whole + 2 * head
    else:
        rows = 64 * 4  # similarities of either kind with all rows of the batch that is counted
        expected = encode(patches, 0) + encode(0, text) + 3 * whole + 2 * (2 * dim * 256 + 2 * 256 * rows + 3 * dim * 2)
    found = flops_per_sample(config, build(config, ANSWERS), text, ANSWERS)
    assert found == pytest.approx(3 * expected, rel=0.005)  # a few sums are written as products


def test_live_bytes_follow_tensors() -> None:
    with torch.device("meta"):
        weight = torch.empty(10, 10, requires_grad=True)
        with LiveBytes([weight], selected=3, scalar=7) as meter:
            first = torch.ones(25) * 2  # two of 100 bytes, one of them for a moment
            assert (meter.live, meter.peak) == (100, 200)
            view = first.view(5, 5)
            assert meter.live == 100
            del first
            assert meter.live == 100, "the view still holds it"
            picked = view[torch.empty(5, dtype=torch.bool)]
            assert picked.shape == (3, 5)
            assert int(view.sum()) == 7
            del view, picked
            (weight @ weight).sum().backward()
            assert weight.grad is not None
            assert meter.live == 400, "the gradient"
            meter.hold(50, "kept")
            meter.spike(10_000)
            assert (meter.live, meter.peak, meter.held_at_peak) == (450, 10_450, {"kept": 50})


@pytest.mark.parametrize("fused", [False, True])
def test_results_of_the_same_form_are_not_worked_out_again(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views keep their storage, results have their own, and integers divided are not what floats are."""
    with torch.device("meta"), LiveBytes([], selected=3, scalar=7) as meter:
        for _ in range(2):
            first = torch.empty(4, 6)
            assert first.t().stride() == (1, 6) and (first.t() * 2).stride() == (1, 6)
            assert meter.live == 96
            assert [(torch.empty(5, dtype=torch.int64) * each).dtype for each in (1, 1.0)] == [
                torch.int64,
                torch.float32,
            ]
            values, places = first.topk(2)
            assert (values.shape, places.dtype) == ((4, 2), torch.int64) and meter.live == 96 + 32 + 64
            taken, grown = torch.empty(4, 6), torch.empty(0)
            assert torch.exp(first, out=taken) is taken and first.exp_() is first and first.add_(taken) is first
            assert torch.exp(first, out=grown) is grown and grown.shape == (4, 6), "a result that grows is made anew"
            del first, values, places, taken, grown
            assert meter.live == 0
            assert (torch.ones(2, 2, device="cpu") * 3).tolist() == [[3, 3], [3, 3]], "elsewhere there are values"
        square = torch.empty(4, 4)
        assert [count_flops(lambda: (square @ square) @ square) for _ in range(2)] == [256, 256], "within"
    with torch.device("meta"):

        def products() -> None:
            with WithoutValues(selected=3, scalar=7):
                for _ in range(2):
                    square @ square

        assert count_flops(products) == 256, "outside"
    config = PretrainConfig(model=model_config(checkpoint_activations=True))

    def of(rows: int) -> Memory:
        return Rehearsal(config, zero(ep=2), ANSWERS, fused).memory(Batch(rows, text_length=12))

    remembered = of(5)
    monkeypatch.setattr(WithoutValues, "_run", lambda _, func, args, kwargs: func(*args, **kwargs))
    assert of(5) == remembered


def test_memory_is_the_same_whatever_was_rehearsed_before() -> None:
    """What the first rehearsal made and kept, the second one did not count."""
    rehearsal = Rehearsal(PretrainConfig(model=model_config(drop_path=0.37)), zero(), ANSWERS, on_gpu=True)
    first, second = (rehearsal.memory(Batch(5, text_length=12)) for _ in range(2))
    assert first == second


@given(st.integers(0, 10**6), st.integers(0, 10**5), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 600))
@settings(max_examples=60)
def test_largest_finds_the_last_that_fits(limit: int, base: int, row: int, bend: int, start: int) -> None:
    def peak(rows: int) -> int:
        return base + max(row * rows, 2 * row * (rows - bend))

    found = largest(peak, limit, 512, start)
    exact = max((rows for rows in range(1, 513) if peak(rows) <= limit), default=0)
    assert exact - exact // 64 <= found <= exact


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steady_memory_by_hand(stage: int) -> None:
    """bf16: 2 bytes a weight, 12 a master copy with moments; dense parts over 8 ranks, experts over the 4 copies."""
    config = PretrainConfig(model=model_config())
    task = build(config, ANSWERS, ep_size=2)
    parameters = count_parameters(build(config, ANSWERS))
    dense, experts = parameters.dense, parameters.experts // 2
    held = steady(groups_of(task, config.optimizer, zero(stage)), zero(stage))
    part = dense / 8 + experts / 4
    assert held["optimizer"] == pytest.approx(12 * part, rel=1e-3)
    weights, gradients = 2 * (dense + experts), 0.0
    if stage == 3:  # gathered weights and the rank's own part
        weights, gradients = weights + 2 * part, 2 * part
    assert held["weights"] == pytest.approx(weights, rel=1e-3)
    assert held["gradients"] == pytest.approx(gradients, rel=1e-3)
    assert held["communication"] == 0  # gradients that wait for their reduction count in the backward pass
    averaging = dataclasses.replace(zero(stage), averages=True)
    more = steady(groups_of(task, config.optimizer, zero(stage)), averaging)
    assert more["optimizer"] == pytest.approx(16 * part, rel=1e-3) and more | {"optimizer": 0} == held | {
        "optimizer": 0
    }


def test_memory_moves_as_it_must() -> None:
    light = ObjectiveConfig(decoder_dim=32, decoder_depth=1, decoder_heads=4)
    config = PretrainConfig(model=model_config(depth=2, soft_layers=[1]), objective=light)  # nine are rehearsed

    def of(changed: PretrainConfig = config, rows: int = 8, fused: bool = False, **changes: int) -> Memory:
        return Rehearsal(changed, zero(**changes), ANSWERS, fused).memory(Batch(rows, text_length=12))

    plain = of()
    assert of(with_checkpointing(config, True)).forward < 0.5 * plain.forward
    assert of(fused=True).forward < plain.forward
    assert of(rows=16).forward == pytest.approx(2 * plain.forward, rel=0.05)
    assert of(world=64).optimizer < 0.2 * plain.optimizer
    assert of(ep=4).weights < plain.weights
    assert of(stage=1, accumulation=2).gradients > of(stage=1).gradients
    deep = dataclasses.replace(config, model=model_config(depth=4, soft_layers=[1]))
    assert of(deep).forward > 1.4 * plain.forward


def test_traffic_by_hand() -> None:
    config = PretrainConfig(model=model_config())
    batch = Batch(8, 12)
    task = build(config, ANSWERS, ep_size=2)
    parameters = count_parameters(build(config, ANSWERS))
    for stage, reduced, gathered in ((1, 2, 1), (2, 2 * 3, 1), (3, 3, 3)):
        settings = zero(stage, accumulation=3)
        sent = [one.size for one in traffic(config, settings, groups_of(task, config.optimizer, settings), batch)]
        dense = parameters.dense * 2 * 7 / 8
        experts = parameters.experts / 2 * 2 * 3 / 4
        expected = [reduced * dense, gathered * dense, reduced * experts, gathered * experts]
        assert sent[1:] == pytest.approx(expected, abs=4)
        tokens = 8 * (1 + 4 + 12) + 8 * (1 + 16 + 12)  # 16 patches, 4 of them visible in the first pass
        one_way = tokens * 2 * config.model.dim * 2 / 2  # two experts a token, bf16, half of the experts elsewhere
        assert sent[0] == one_way * 4 * 2 * 3  # there and back, twice; two soft layers; three micro-batches


def test_days() -> None:
    assert days(1e9, 1e12, world_size=10, peak_tflops=100, mfu=0.5) == pytest.approx(2e6 / 86400)


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24e9", 24 * 10**9), ("1.5 gb", 1_500_000_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "80 giga", "-1GiB", "1e", ".", "80"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="--device_memory"):
        parse_bytes(text)


def options(root: Any, *argv: str) -> Any:
    return parse(root, list(argv), "python -m eve_ds.plan")


def test_refusals_are_those_of_a_run(repository: Path) -> None:
    recipe = str(repository / "eve_ds/configs/tiny_shapes.yaml")

    def refused(*argv: str) -> str:
        with pytest.raises(UserError) as told:
            make_plan(options(PretrainPlan, "--config", recipe, *argv))
        return str(told.value)

    assert "--zero 4: the stages" in refused("--zero", "4")
    with pytest.raises(UserError) as world:
        check_world(3, 4, 8)
    assert refused("--world_size", "8", "--expert_parallel_size", "3") == str(world.value)
    with pytest.raises(UserError) as experts:
        check_world(8, 4, 8)
    assert refused("--world_size", "8", "--expert_parallel_size", "8") == str(experts.value)
    with pytest.raises(UserError) as batch:
        batch_shape(EngineConfig(global_batch_size=128), 48)
    assert refused("--world_size", "48") == str(batch.value)
    assert "micro_batch_size=3 does not divide" in refused("--micro_batch_size", "3")
    assert "objective.decoder_dim" in refused_by_parse(recipe, "--objective.decoder_dim", "6")
    assert "--mfu=40.0 is out of range" in refused("--mfu", "40")
    assert "--text_length=33 must lie between" in refused("--text_length", "33")


@pytest.mark.parametrize("task", ["[vqa]", "{vqa: 1}", "3"])
def test_a_recipe_with_a_task_of_a_wrong_type_is_refused(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"task: {task}\n")
    monkeypatch.setattr(sys, "argv", ["plan", "--config", str(recipe)])
    with pytest.raises(UserError, match="task: expected"):
        main()


def refused_by_parse(recipe: str, *argv: str) -> str:
    with pytest.raises(UserError) as told:
        options(PretrainPlan, "--config", recipe, *argv)
    return str(told.value)


@pytest.mark.parametrize("task", ["pretrain", "itr_flickr", "vqa", "nlvr"])
def test_every_task_can_be_rehearsed(task: str) -> None:
    """Twice by the same rehearsal, with the same result."""
    config: Any = PretrainConfig(model=model_config()) if task == "pretrain" else finetune(task)
    rehearsal = Rehearsal(config, zero(), ANSWERS, on_gpu=True)
    memory = rehearsal.memory(Batch(4, 12))
    assert memory.peak >= memory.weights + memory.optimizer + memory.forward
    assert min(memory.forward, memory.activations, memory.step) > 0
    assert rehearsal.memory(Batch(4, 12)) == memory


def test_optimizer_groups_are_the_engines() -> None:
    """Experts apart, those without weight decay apart."""
    config = PretrainConfig(model=model_config(), optimizer=OptimizerConfig())
    groups = groups_of(build(config, ANSWERS, ep_size=2), config.optimizer, zero())
    assert sorted((group.experts, group.ranks) for group in groups) == [(False, 8), (False, 8), (True, 4), (True, 4)]
    assert ModelConfig().num_experts % 2 == 0


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_texts_are_as_long_as_asked_and_a_gpu_has_a_reserve(device: str) -> None:
    argv = ["--config", "pretrain_base", "--text_length", "7", "--device_memory", "9GiB", "--device", device]
    _, _, batch, limit = figures._prepared(parse(PretrainPlan, argv, "test"))
    assert batch.text_length == 7
    assert limit == 9 * 2**30 - (figures.GPU_RESERVE if device == "gpu" else 0)
