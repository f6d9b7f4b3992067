"""The benchmarks at tiny sizes, through the same code: they compare like with like, and their figures add up."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eve_ds.bench import __main__ as bench
from eve_ds.bench import machine, references, step
from eve_ds.bench.gemm import Product, expert_products
from eve_ds.bench.references import DeepSpeedMoE, ReferenceAttention, einsum_moe, plain_core, sdpa_core
from eve_ds.bench.timing import Candidate, extra_bytes, in_turn
from eve_ds.config import PretrainConfig, parse
from eve_ds.engine.deepspeed_config import multiplies_bf16
from eve_ds.errors import exit_code
from eve_ds.model.backbone import Backbone
from eve_ds.model.block import Attention, key_bias
from eve_ds.model.moe import MoE
from eve_ds.tasks.masked_modeling import MaskedModeling
from eve_ds.tasks.masking import choose_words
from preprocessing.errors import UserError

CPU = torch.device("cpu")
MODEL = ["--dim", "32", "--hidden", "64", "--experts", "4"]
QUICK = ["--repeats", "3", "--warmup", "1", "--threads", "1", "--device", "cpu"]
RECIPE = """
model: {image_size: 32, patch_size: 8, dim: 32, depth: 2, num_heads: 4, mlp_hidden: 64, vocab_size: 50,
        max_text_length: 12, text_positions: 12, soft_layers: [1], num_experts: 4, drop_path: 0.0}
objective: {decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}
engine: {precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def bench_rows(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    file = tmp_path / "figures.json"
    bench.main([*arguments, *QUICK, "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8"))


def moe_layer(**settings: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(**{"dim": 16, "hidden": 24, "num_experts": 4, "top_k": 2} | settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)  # experts that differ, and some load on each
    return layer


def outcome(layer: nn.Module, x: Tensor, *inputs: Any) -> dict[str, Tensor]:
    """Output, auxiliary loss and the gradient of the input of a layer, of a function of both outputs."""
    x = x.clone().requires_grad_()
    y, aux = layer(x, *inputs)
    (y.pow(2).sum() + 3 * aux).backward()
    return {"y": y.detach(), "aux": aux.detach(), "dx": x.grad}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_the_einsum_reference_equals_our_layer(top_k: int, capacity_factor: float | None, padded: bool) -> None:
    ours = moe_layer(top_k=top_k, capacity_factor=capacity_factor, activation="gelu" if padded else "quick_gelu")
    einsum = einsum_moe(moe_layer(top_k=top_k, activation="gelu" if padded else "quick_gelu"), capacity_factor or 4.0)
    x, modality = torch.randn(3, 20, 16), torch.arange(20) // 12
    valid = torch.arange(20) < torch.tensor([[20], [15], [13]]) if padded else None
    expected, found = outcome(ours, x, modality, valid), outcome(einsum, x, modality, valid)
    if capacity_factor:
        assert ours.last_load.sum() < 60 * top_k - (12 * top_k if padded else 0)  # some choices were dropped
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    pairs = {"w1_EHD": "experts.w1", "w2_EDH": "experts.w2", "w3_E1B": "experts.w3", "router_weight": "router.weight"}
    for name, our_name in pairs.items():
        torch.testing.assert_close(einsum.get_parameter(name).grad, gradients[our_name], rtol=1e-4, atol=1e-4)


def without_modality(layers: list[MoE]) -> None:
    """DeepSpeed's layer has no vectors for it."""
    with torch.no_grad():
        for layer in layers:
            layer.image_vector.zero_()
            layer.text_vector.zero_()


@pytest.mark.parametrize("drop_tokens", [True, False])
def test_deepspeed_computes_the_same_on_our_weights(drop_tokens: bool) -> None:
    ours = moe_layer(capacity_factor=1.0 if drop_tokens else None)
    without_modality([ours])
    x, modality = torch.randn(3, 20, 16), torch.zeros(20, dtype=torch.int64)
    expected, found = (outcome(layer, x, modality) for layer in (ours, DeepSpeedMoE(ours, drop_tokens=drop_tokens)))
    assert (ours.last_load.sum() < 120) == drop_tokens
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
    if not drop_tokens:
        torch.testing.assert_close(found["dx"], expected["dx"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("core", [plain_core, sdpa_core])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_references_equal_our_attention(core: references.AttentionCore, masked: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(32, 4), torch.randn(2, 9, 32)
    bias = key_bias(torch.arange(9) < torch.tensor([[9], [6]]), x.dtype) if masked else None
    torch.testing.assert_close(ReferenceAttention(layer, core)(x, bias), layer(x, bias))


def test_the_plain_model_computes_the_same(recipe: str) -> None:
    config = parse(PretrainConfig, ["--config", recipe], "test")
    torch.manual_seed(0)
    task = MaskedModeling(Backbone(config.model), config.objective, step.MASK_ID)
    batch = step.make_batch(config, 2, CPU)
    plain = step.plain_version(task, capacity_factor=4.0)
    kinds = [type(part) for part in plain.modules()]
    assert Attention not in kinds and MoE not in kinds and kinds.count(ReferenceAttention) == 3
    torch.testing.assert_close(plain(batch).loss, task(batch).loss)


def test_the_model_with_deepspeeds_experts_computes_the_same(recipe: str) -> None:
    config = parse(PretrainConfig, ["--config", recipe], "test")
    torch.manual_seed(0)
    task = MaskedModeling(Backbone(config.model), config.objective, step.MASK_ID)
    without_modality(task.backbone.moe_layers())
    other = step.deepspeed_version(task)
    assert MoE not in [type(part) for part in other.modules()]
    batch = step.make_batch(config, 2, CPU)
    found, expected = other(batch).metrics, task(batch).metrics
    for name in ("mlm_loss", "mim_loss"):
        torch.testing.assert_close(found[name][0], expected[name][0])


def test_masked_words_are_as_many_as_the_flops_count(recipe: str) -> None:
    config = parse(PretrainConfig, ["--config", recipe], "test")
    batch = step.make_batch(config, 3, CPU)
    chosen = choose_words(0, batch["sample_id"], batch["text_mask"], config.objective.text_mask_ratio)
    assert chosen.sum() == 3 * step.masked_words(config.model.max_text_length, config.objective.text_mask_ratio)


def test_candidates_run_in_turn_each_prepared() -> None:
    calls: list[str] = []
    candidates = {
        name: Candidate(lambda name=name: calls.append(name), lambda name=name: calls.append(f"prepare {name}"))
        for name in "ab"
    }
    taken = in_turn(candidates, CPU, repeats=2, warmup=1)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 3
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}
    assert min(taken["a"] + taken["b"]) > 0


def test_extra_bytes_of_known_allocations() -> None:
    kept: list[Tensor] = []
    parameter = nn.Parameter(torch.ones(2**20))  # 4 MiB

    def run() -> None:
        first = torch.ones(10 * 2**20, dtype=torch.uint8)
        del first
        second = torch.ones(20 * 2**20, dtype=torch.uint8)
        third = torch.ones(3 * 2**20, dtype=torch.uint8)
        del second, third
        kept.append(torch.ones(2 * 2**20, dtype=torch.uint8))
        parameter.grad = torch.ones_like(parameter)
        fourth = torch.ones(20 * 2**20, dtype=torch.uint8)  # with what is kept 22 MiB, and the gradient does not count
        del fourth

    def prepare() -> None:
        kept.clear()
        parameter.grad = None

    for _ in range(2):  # what was freed before is not used again unseen
        assert extra_bytes(Candidate(run, prepare), lambda: [parameter.grad], CPU) == 23 * 2**20


def test_extra_bytes_see_inside_operations() -> None:
    x = torch.ones(2**20)
    # softmax of a transposed matrix makes it contiguous first: a second matrix beside the result.
    found = extra_bytes(Candidate(lambda: x.view(2**10, 2**10).t().softmax(dim=1)), lambda: [], CPU)
    assert 2 * 4 * 2**20 <= found < 2 * 4 * 2**20 + 2**16


def test_products_of_experts_are_all_of_their_work() -> None:
    products = expert_products(tokens=64, num_experts=4, top_k=2, dim=32, hidden=48)
    assert 4 * sum(product.flops for product in products) == 6 * 2 * 128 * 32 * 48
    assert str(products[0]) == "[32x32] x [32x48]'"
    assert Product(2, 3, 5, batch=7).flops == 2 * 7 * 2 * 3 * 5


def test_moe_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*MODEL, "--squares", "64", "--tokens", "64", "474", "--rivals_up_to", "100"]
    small, large = bench_rows(tmp_path, "moe", *options)
    assert (small["tokens"], large["tokens"]) == (64, 474)
    assert small["flops"] == 6 * 2 * 128 * 32 * 64
    for name in ("ours", "einsum", "deepspeed", "deepspeed_dropless"):
        assert small[f"{name}_ms"] == statistics.median(small["all_ms"][name])
        assert len(small["all_ms"][name]) == 3
        assert small[f"{name}_extra_bytes"] > 64 * 32 * 2  # the output at the least
    assert small["einsum_over_ours"] == pytest.approx(small["einsum_ms"] / small["ours_ms"])
    for name in ("deepspeed", "deepspeed_dropless"):
        assert small[f"{name}_over_ours"] == pytest.approx(small[f"{name}_ms"] / small["ours_ms"])
    reached = small["flops"] / small["ours_ms"] * 1000 / 1e12
    assert small["share_of_peak"] == pytest.approx(reached / small["peak_tflops"])
    assert small["peak_tflops"] >= max(one["tflops"] for one in small["products"])
    assert small["machine"]["threads"] == 1 and small["machine"]["torch"] == torch.__version__
    assert large["ours_ms"] > 0 and large["einsum_ms"] is None and large["deepspeed_extra_bytes"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["tokens", "ours", "ms"] and lines[3].split()[2] == "-"


def test_attention_rows(tmp_path: Path) -> None:
    options = ["--dim", "32", "--heads", "4", "--batch", "2", "--tokens", "50", "--squares", "64"]
    rows = bench_rows(tmp_path, "attention", *options)
    dtypes = ["bf16", "fp32"] if multiplies_bf16("cpu") else ["fp32"]
    assert [(row["dtype"], row["masked"]) for row in rows] == [(d, masked) for d in dtypes for masked in (False, True)]
    for row in rows:
        assert row["sdpa_over_ours"] == pytest.approx(row["sdpa_ms"] / row["ours_ms"])
        assert 0 < row["share_of_peak"] < 1.5 and row["ours_extra_bytes"] > 0


def test_step_rows(tmp_path: Path, recipe: str) -> None:
    (row,) = bench_rows(tmp_path, "step", "--config", recipe, "--pairs", "2", "--squares", "64", "--copy_bytes", "4096")
    assert row["pairs"] == 2 and row["dtype"] == "fp32"
    for rival in ("plain", "deepspeed"):
        assert row[f"{rival}_over_ours"] == pytest.approx(row[f"{rival}_ms"] / row["ours_ms"])
        assert row[f"{rival}_extra_bytes"] > 0
    assert 2e6 < row["flops"] / 2 < 2e7
    assert row["optimizer_bytes"] == 28 * row["parameters"]
    reached = row["optimizer_bytes"] / row["optimizer_ms"] * 1000
    assert row["optimizer_share_of_bandwidth"] == pytest.approx(reached / row["copy_bytes_per_second"])


def test_step_alone(tmp_path: Path, recipe: str) -> None:
    options = ["--config", recipe, "--pairs", "1", "--squares", "64", "--no_plain", "--no_deepspeed", "--no_optimizer"]
    (row,) = bench_rows(tmp_path, "step", *options)
    assert row["ours_ms"] > 0 and row["plain_ms"] is row["deepspeed_ms"] is row["optimizer_ms"] is None


def test_gemm_rows(tmp_path: Path) -> None:
    rows = bench_rows(tmp_path, "gemm", *MODEL, "--squares", "64", "--tokens", "64", "--dtypes", "fp32")
    assert [row["product"] for row in rows[:2]] == ["[64x64] x [64x64]", "[32x32] x [32x64]'"]
    assert max(row["share_of_peak"] for row in rows) == 1
    assert rows[0]["tflops"] == pytest.approx(2 * 64**3 / rows[0]["ms"] * 1000 / 1e12)


def test_a_copy_counts_what_is_read_and_written() -> None:
    candidate, size = machine.copy_candidate(CPU, size=2**12)
    assert size == 2**13 and candidate.run().sum() == 2**10


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ([], "benchmark"),
        (["speed"], "'speed'"),
        (["moe", "--tokens", "0"], "tokens"),
        (["moe", "--token", "4"], "--token"),
        (["moe", "--experts", "2", "--top_k", "3"], "--top_k 3"),
        (["moe", "--device", "abacus"], "--device abacus"),
        (["attention", "--heads", "7"], "--heads 7"),
        (["step", "--config", "none.yaml"], "none.yaml"),
        (["gemm", "--json", "/"], "--json /"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], culprit: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code(lambda: bench.main([*arguments, *(["--threads", "1"] if len(arguments) > 1 else [])]))
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and culprit in error


def test_a_file_that_cannot_be_written_is_noticed_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (
        ("pipe", "is not a regular file"),
        ("file/x.json", "cannot be written"),
        ("x" * 250, "too long"),
        ("new/" + "x" * 250, "too long"),
        ("new/" + "x" * 300 + "/x.json", "too long"),
    ):
        code = exit_code(lambda name=name: bench.main(["gemm", "--json", str(tmp_path / name), "--threads", "1"]))
        printed = capsys.readouterr()
        assert code == 2 and printed.out == "" and printed.err.count("\n") == 1 and told in printed.err
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2


def test_no_folder_is_made_before_all_else_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["moe", "--json", str(tmp_path / "new" / "further" / "moe.json"), "--threads", "1"]
    for wrong in (["--experts", "2", "--top_k", "3"], ["--device", "abacus"]):
        assert exit_code(lambda wrong=wrong: bench.main([*words, *wrong])) == 2
    assert "--top_k 3" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_the_tests_folder_the_reference_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(references, "EINSUM_FILE", tmp_path / "einsum_moe.py")
    with pytest.raises(UserError, match=r"einsum_moe\.py: .*clone.*--rivals deepspeed"):
        einsum_moe(moe_layer())
