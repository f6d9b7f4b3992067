from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from eve_ds.config import FinetuneConfig, PretrainConfig, load_model_config, parse, save
from eve_ds.finetune_options import expand_options
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import find_shipped, known_keys
from preprocessing.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "eve_ds" / "configs").glob("*.yaml"))


def pretrain(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, list(argv), "pretrain")


def written(folder: Path, tree: object) -> str:
    path = folder / "recipe.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_is_read_whole(path: Path) -> None:
    root = FinetuneConfig if "task:" in path.read_text() else PretrainConfig
    config = dataclasses.asdict(parse(root, ["--config", str(path)], "program"))
    for section, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else []:
            found = config[section][key]
            if key == "sources":  # which may leave the weight out
                found = [{name: one[name] for name in asked} for one, asked in zip(found, value, strict=True)]
            assert found == value


def test_there_are_recipes_for_all_that_the_readme_names() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"tiny_shapes", "pretrain_base", "pretrain_large", "itr_coco", "itr_flickr", "vqa", "nlvr"}


def test_command_line_wins_over_recipe_and_recipe_over_default(tmp_path: Path) -> None:
    recipe = written(tmp_path, {"optimizer": {"lr": 0.5, "weight_decay": 0.25}})
    config = pretrain("--config", recipe, "--optimizer.lr", "0.125", "--output_dir=out")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.output_dir) == (0.125, 0.25, "out")
    assert config.optimizer.betas == PretrainConfig().optimizer.betas


def test_the_command_line_wins_wherever_the_recipe_stands(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    recipe = written(tmp_path, {"optimizer": {"lr": 0.5, "eps": 0.25}})
    other = written(tmp_path / "other", {"optimizer": {"lr": 0.75}})
    for last in (["--config", recipe], [f"--config={recipe}"]):
        assert pretrain("--optimizer.lr", "0.125", *last).optimizer.lr == 0.125
    for both in (["--config", recipe, f"--config={other}"], [f"--config={recipe}", "--config", other]):
        config = pretrain("--optimizer.weight_decay=0.5", *both)  # of two recipes the later one wins
        assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (0.75, 0.25, 0.5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optimizer.lrr", "1"], ["--optimizer.lrr", "did you mean --optimizer.lr?"]),
        (["--engine.expert_paralel_size=2"], ["did you mean --engine.expert_parallel_size?"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr", "fast"]),
        (["--engine.precision", "fp8"], ["engine.precision", "fp8"]),
        (["--model.num_heads", "7"], ["model.dim=768", "model.num_heads=7"]),
        (["--model.top_k", "33"], ["model.top_k=33", "model.num_experts=32"]),
        (["--model.soft_layers", "[12]"], ["model.soft_layers", "model.depth=12"]),
        (["--optimizer.lr", "0"], ["optimizer.lr=0"]),
        (["--optimizer.betas", "[0.9]"], ["optimizer.betas=[0.9]"]),
        (["--optimizer.warmup", "1.5"], ["optimizer.warmup=1.5"]),
        (["--optimizer.warmup", "-1"], ["optimizer.warmup=-1"]),
        (["--optimizer.ema", "1"], ["optimizer.ema=1.0"]),
        (["--optimizer.ema", "-0.1"], ["optimizer.ema=-0.1"]),
        (["--data.num_workers", "-1"], ["data.num_workers=-1"]),
        (["--data.shuffle_window", "15"], ["data.shuffle_window=15", "at least 16"]),
        (["--data.max_corrupt", "1"], ["data.max_corrupt=1"]),
        (["--objective.text_mask_ratio", "1"], ["objective.text_mask_ratio=1"]),
        (["--config", "no/such.yaml"], ["--config no/such.yaml", "No such file"]),
        (["--config"], ["--config: no file follows"]),
        (["--config", "--optimizer.lr", "1"], ["--config: no file follows"]),
        (["--optimizer.lr", "1e400"], ["optimizer.lr=inf"]),
        (["--optimizer.gradient_clipping", ".nan"], ["optimizer.gradient_clipping=nan"]),
        (["--engine.global_batch_size", "0"], ["engine.global_batch_size=0", "at least 1"]),
        (["--engine.micro_batch_size", "0"], ["engine.micro_batch_size=0", "at least 1 or null"]),
        (["--engine.expert_parallel_size", "0"], ["engine.expert_parallel_size=0", "at least 1"]),
        (["--engine.global_batch_size", str(2**20 + 1)], ["engine.global_batch_size=", "at most 1048576"]),
        (["--engine.timeout_seconds", "10000000000"], ["engine.timeout_seconds=", "at most 2592000"]),
        (["--data.timeout_seconds", "10000000000"], ["data.timeout_seconds=", "from 1 to 2592000"]),
        (["--data.shuffle_window", "9" * 23], ["data.shuffle_window=", "at most 2**40"]),
        (["--model.text_positions", "9" * 23], ["model.text_positions=", "at most 1048576"]),
        (["--objective.decoder_dim", "4" + "0" * 18], ["objective.decoder_dim=", "at most 1048576"]),
        (["--model.norm_eps", ".nan"], ["model.norm_eps=nan", "above 0"]),
        (["--model.norm_eps", "-1"], ["model.norm_eps=-1", "above 0"]),
        (["--model.init_std", "-1"], ["model.init_std=-1", "above 0"]),
        (["--model.init_std", "0"], ["model.init_std=0", "above 0"]),
        (["--model.position_std", ".inf"], ["model.position_std=inf", "finite"]),
        (["--model.layer_scale", ".nan"], ["model.layer_scale=nan", "0 or more"]),
        (["--model.aux_loss_weight", ".inf"], ["model.aux_loss_weight=inf", "0 or more"]),
        (["--model.capacity_factor", ".nan"], ["model.capacity_factor=nan", "or null"]),
        (["--engine.seed", "-1"], ["engine.seed=-1", "at least 0"]),
        (["--engine.seed", str(2**64)], [f"engine.seed={2**64}", "below 2**63"]),
        (["--checkpoint.every", "-1"], ["checkpoint.every=-1", "at least 0"]),
        (["--checkpoint.every", "each epoch"], ["checkpoint.every=each epoch", "a whole number of steps, or epochs"]),
        (["--logging.eval_every", "0 epochs"], ["logging.eval_every=0 epochs", "a whole number of steps, or epochs"]),
        (["--engine.eval_batch_size", "0"], ["engine.eval_batch_size=0", "at least 1 or null"]),
        (["--checkpoint.best", "loss"], ["checkpoint.best=loss", "must begin with val/ or val_ema/"]),
        (["--checkpoint.patience", "2"], ["checkpoint.patience is about a metric", "checkpoint.best"]),
        (
            ["--checkpoint.best", "val/loss", "--checkpoint.patience", "0"],
            ["checkpoint.patience=0", "at least 1 or null"],
        ),
        (["--checkpoint.keep", "0"], ["checkpoint.keep=0", "at least 1"]),
        (["--logging.eval_every", "-2"], ["logging.eval_every=-2", "at least 0"]),
        (["--logging.eval_samples", "0"], ["logging.eval_samples=0", "at least 1 or null"]),
        (["--logging.eval_samples", "-1"], ["logging.eval_samples=-1", "at least 1 or null"]),
        (["--logging.detail_every", "-1"], ["logging.detail_every=-1", "at least 0"]),
        (["--logging.images_every", "-1"], ["logging.images_every=-1", "at least 0"]),
        (["--logging.images_every", "2", "--logging.samples", "0"], ["logging.images_every=2", "logging.samples=0"]),
        (["--logging.peak_tflops", "0"], ["logging.peak_tflops=0", "positive number or null"]),
        (["--logging.samples", "-1"], ["logging.samples=-1", "at least 0"]),
    ],
)
def test_a_bad_option_is_named_in_one_line(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        pretrain(*argv)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"optimizer": {"learning_rate": 1}}, ["'optimizer.learning_rate'"]),
        ({"optimiser": {"lr": 1}}, ["'optimiser'", "did you mean optimizer?"]),
        ({"model": 3}, ["'model' is a section"]),
        ([1, 2], ["mapping"]),
        ("model: {dim: 3", ["line 1"]),
        ("optimizer: {lr: 0.5}\nmodel: {dim: 96}\noptimizer: {total_steps: 7}", ["line 3", "'optimizer'", "line 1"]),
        ("optimizer:\n  lr: 0.5\n  eps: 1\n  lr: 0.25", ["line 4", "'lr'", "line 2"]),
        ({"optimizer.lr": 0.5, "optimizer": {"eps": 0.5}}, ["'optimizer.lr'", "write optimizer: {lr: 0.5}"]),
    ],
)
def test_a_bad_recipe_is_named_with_its_key(tree: object, words: list[str], tmp_path: Path) -> None:
    recipe = written(tmp_path, tree)
    with pytest.raises(UserError) as error:
        pretrain("--config", recipe)
    assert all(word in str(error.value) for word in [recipe, *words]), str(error.value)


def test_a_recipe_may_merge_mappings_and_write_1e_3(tmp_path: Path) -> None:
    recipe = written(tmp_path, "model:\n  <<: {dim: 96, num_heads: 4, norm_eps: 1e-3}\n  dim: 128\n")
    assert load_model_config(Path(recipe)) == ModelConfig(dim=128, num_heads=4, norm_eps=1e-3)
    assert pretrain("--config", recipe).model.dim == 128


def test_the_launchers_local_rank_is_ignored() -> None:
    assert pretrain("--local_rank=1", "--engine.seed", "3").engine.seed == 3
    assert pretrain("--local_rank", "1", "--engine.seed", "3").engine.seed == 3


def test_print_config_and_help_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--print_config", "--help"):
        with pytest.raises(SystemExit) as stop:
            pretrain(option)
        assert stop.value.code == 0
    assert "expert_parallel_size" in capsys.readouterr().out


def test_a_stored_config_reads_back_equal(tmp_path: Path) -> None:
    config = pretrain("--model.dim", "96", "--model.num_heads", "4", "--model.capacity_factor", "1.5")
    save(config, tmp_path / "config.yaml")
    assert pretrain("--config", str(tmp_path / "config.yaml")) == config
    assert load_model_config(tmp_path / "config.yaml") == config.model


def test_known_keys_reach_every_leaf() -> None:
    assert {"model", "model.dim", "objective.mode", "checkpoint.keep", "output_dir"} <= set(known_keys(PretrainConfig))


def test_short_options_stand_for_the_tree(assets: Path) -> None:
    argv = [
        "--task",
        "vqa",
        "--bs",
        "64",
        "--lr",
        "0.5",
        "--lr_mult",
        "7",
        "--biattn",
        "--seed",
        "5",
        "--data",
        "D",
        "--evaluate",
    ]
    argv += [
        "--augmentation",
        "rand",
        "--split",
        "val",
        "--checkpoint",
        str(assets / "vqa.safetensors"),
        "--load_head",
        "--gc",
    ]
    rest, defaults = expand_options([*argv, "--vlmo_config", str(assets / "vlmo_config.json")])
    config = parse(FinetuneConfig, rest, "finetune", defaults)
    assert (config.task, config.split, config.init_from) == ("vqa", "val", str(assets / "vqa.safetensors"))
    assert (config.engine.global_batch_size, config.engine.seed, config.data.path) == (64, 5, "D")
    assert (config.optimizer.lr, config.optimizer.head_lr_mult, config.data.augmentation) == (0.5, 7, "rand")
    assert config.evaluate and config.load_head and config.model.checkpoint_activations and config.objective.biattn
    assert (config.model.dim, config.model.depth) == (64, 4)


def test_the_checkpoints_model_is_the_default_and_options_win(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    save(PretrainConfig(model=ModelConfig(dim=96, num_heads=4)), folder / "config.yaml")
    (folder / "model.safetensors").write_bytes(b"")
    rest, defaults = expand_options(["--checkpoint", str(tmp_path / "run"), "--model.image_size", "384"])
    config = parse(FinetuneConfig, rest, "finetune", defaults)
    assert (config.model.dim, config.model.num_heads, config.model.image_size) == (96, 4, 384)


def exported(folder: Path, **model: int) -> str:
    """A run folder as far as its config is asked for."""
    save(PretrainConfig(model=ModelConfig(**model)), folder / "model" / "config.yaml")  # type: ignore[arg-type]
    (folder / "model" / "model.safetensors").write_bytes(b"")
    return str(folder)


def finetune(*argv: str) -> FinetuneConfig:
    rest, defaults = expand_options(list(argv))
    return parse(FinetuneConfig, rest, "finetune", defaults)


def test_a_checkpoint_named_in_a_recipe_gives_its_model_too(tmp_path: Path) -> None:
    run, other = exported(tmp_path / "run", dim=96, num_heads=4), exported(tmp_path / "other", dim=128, num_heads=8)
    recipe = written(tmp_path, {"init_from": run, "model": {"image_size": 384}})
    config = finetune("--config", recipe)
    assert (config.init_from, config.model.dim, config.model.num_heads, config.model.image_size) == (run, 96, 4, 384)
    for option in ("--checkpoint", "--init_from"):
        config = finetune(option, other, f"--config={recipe}")
        assert (config.init_from, config.model.dim, config.model.num_heads) == (other, 128, 8)
    config = finetune("--init_from", "null", "--config", recipe)
    assert (config.init_from, config.model.dim) == (None, ModelConfig().dim)


def test_two_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--checkpoint and --init_from name the same thing"):
        finetune("--checkpoint", exported(tmp_path / "a"), "--init_from", exported(tmp_path / "b"))


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (["--lr", "1e-4"], ["--optimizer.lr=5"]),
        (["--bs=8"], ["--engine.global_batch_size", "16"]),
        (["--rerank"], ["--objective.rerank=false"]),
    ],
)
def test_a_short_option_and_its_full_name_are_refused(short: list[str], full: list[str]) -> None:
    told = f"{short[0].partition('=')[0]} and {full[0].partition('=')[0]} name the same thing"
    for options in (short + full, full + short):
        with pytest.raises(UserError, match=told):
            finetune("--task", "itr_coco", *options)


def test_recipes_and_deepspeed_files_that_come_along_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_shapes", "tiny_shapes.yaml", "eve_ds/configs/tiny_shapes.yaml"):
        assert pretrain("--config", name).model.vocab_size == 512
        assert pretrain(f"--config={name}").model.vocab_size == 512
    for name in ("zero2", "zero2.json", "ds_configs/zero2.json"):
        assert find_shipped(name, "ds_configs", ".json").is_file()
    (tmp_path / "tiny_shapes").write_text("model: {vocab_size: 300}")  # what lies here wins
    assert pretrain("--config", "tiny_shapes").model.vocab_size == 300
    with pytest.raises(UserError, match=r"--config tiny_shape: No such file or directory; did you mean tiny_shapes\?"):
        pretrain("--config", "tiny_shape")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dry_run"], True),
        (["--dry_run", "--optimizer.lr=1e-3"], True),
        (["--dry_run", "--local_rank", "1"], True),
        (["--dry_run", "false"], False),
        (["--dry_run=true"], True),
        ([], False),
    ],
)
def test_a_dry_run_is_asked_for_with_or_without_a_value(options: list[str], expected: bool) -> None:
    assert parse(PretrainConfig, options, "test").dry_run is expected
    argv, defaults = expand_options(options)
    assert parse(FinetuneConfig, argv, "test", defaults).dry_run is expected
