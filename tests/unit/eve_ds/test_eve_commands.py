"""EVE's command lines and YAML files here, and docs/from_eve.md and docs/targets.md: every command is parsed."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path

import pytest
import yaml

from eve_ds.config import FinetuneConfig, PretrainConfig, parse, save
from eve_ds.eve_options import model_shape
from eve_ds.finetune_options import expand_options
from eve_ds.model.model_config import ModelConfig
from preprocessing.__main__ import COMMANDS
from preprocessing.__main__ import main as preprocess
from preprocessing.errors import UserError

DOCS = Path(__file__).resolve().parents[3] / "docs"
FROM_EVE, TARGETS = ((DOCS / name).read_text(encoding="utf-8") for name in ("from_eve.md", "targets.md"))
ROWS = re.findall(r"^\| `(--task=\S+ [^`]*)` \| `([^`]*)` \|", FROM_EVE, re.MULTILINE)
LINES = re.findall(r"^ {4}(\S.*)$", FROM_EVE + TARGETS, re.MULTILINE)
SHAPES = {"Base": "config_vlmoB_base64k.json", "Large": "config_vlmoL_base64k.json"}
# EVE's files, as far as they are read; as PyYAML writes 5e-5.
COMMON = {"image_res": 384, "vlmo_config": "configs/config_vlmoB_base64.json", "text_encoder": "x", "patch_size": 16}
NLVR_YAML = COMMON | {
    "train_file": ["nlvr_train.json"],
    "batch_size": 16,
    "augmentation": None,
    "optimizer": {"opt": "adamW", "lr": 5e-5, "weight_decay": 0.02, "lr_mult": 2},
    "schedular": {"sched": "cos", "lr": 5e-5, "epochs": 7, "num_warmup_steps": 300},
    "accelerator": {"SYNCBN": False, "FP16_LOSS_SCALE": None, "CLIP_GRAD_NORM": 2.0},
}
VQA_YAML = NLVR_YAML | {"vqa_root": "images/coco/", "image_res": 480, "max_tokens": 30, "augmentation": "color"}


@pytest.fixture(autouse=True)
def beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("C").touch()  # a bare file of weights, which is not read here


def finetune(line: str) -> FinetuneConfig:
    rest, defaults = expand_options(shlex.split(line))
    return parse(FinetuneConfig, rest, "finetune", defaults)


def refusal(line: str) -> str:
    with pytest.raises(UserError) as error:
        finetune(line)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(tree: object, name: str = "eve.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(tree))
    return name


def test_the_page_has_the_four_lines_of_the_readme() -> None:
    assert [theirs.split()[0] for theirs, _ in ROWS] == [
        "--task=itr_coco",
        "--task=itr_flickr",
        "--task=vqa",
        "--task=NLVR_vit_lrtest_5e-5=",
    ]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[ours.split()[1] for _, ours in ROWS])
def test_a_line_of_the_readme_is_our_line_of_the_table(
    theirs: str, ours: str, size: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = re.sub(r" --vlmo_config=\S+", "", theirs).replace("_hdfs=H", "_hdfs=hdfs://host/H")
    if size == "Large" and "itr_coco" in theirs:
        theirs = theirs.replace("--lr=3e-5", "--lr=5e-5")
    shape = f" --vlmo_config={SHAPES[size]}"
    caplog.set_level(logging.INFO)
    mine = finetune(ours + shape)
    assert f"for EVE-{size}" in next(message for message in caplog.messages if message.startswith("no --config: takes"))
    from_eve = finetune(theirs + shape)
    from_eve.data.path, from_eve.checkpoint = mine.data.path, mine.checkpoint  # --data, and --output_hdfs
    assert from_eve == mine
    assert mine.model == ModelConfig(**vars(model_shape(SHAPES[size])) | {"image_size": mine.model.image_size})


VALUES = {  # peak lr of Base and Large, head, batch, augmentation, image, warm-up, schedule, clipping
    "itr_coco": (3e-5, 5e-5, 10, 256, "color", 384, 0.1, "linear", 1.0),
    "itr_flickr": (1e-5, 1e-5, 5, 128, "color", 384, 0.1, "linear", 1.0),
    "vqa": (3e-5, 3e-5, 10, 128, "rand", 480, 0.1, "linear", 3.0),
    "nlvr": (3.5e-5, 3.5e-5, 15, 128, "rand", 384, 0.2, "cosine", 3.0),
}


@pytest.mark.parametrize("task", VALUES)
def test_recipes_have_eves_values(task: str) -> None:
    *rates, head, batch, augmentation, image, warmup, schedule, clipping = VALUES[task]
    for lr, (size, shape) in zip(rates, SHAPES.items(), strict=True):
        config = finetune(f"--task {task} --checkpoint C --vlmo_config {shape}")
        one = config.optimizer
        assert (one.lr, one.head_lr_mult, one.warmup, one.schedule) == (lr, head, warmup, schedule)
        assert (one.gradient_clipping, one.eps, one.betas, one.weight_decay) == (clipping, 1e-8, [0.9, 0.98], 0.01)
        assert (one.epochs, config.engine.global_batch_size) == (10, batch)
        assert (config.data.augmentation, config.model.image_size) == (augmentation, image)
        assert config.objective.biattn == (task == "nlvr")
        if task.startswith("itr"):
            assert config.objective.embed_dim == {"Base": 768, "Large": 1024}[size]


def test_a_shape_is_known_by_its_published_name_and_a_file_wins(assets: Path) -> None:
    large = model_shape("configs/config_vlmoL_base64k.json")
    assert (large.dim, large.depth, large.num_heads, large.mlp_hidden) == (1024, 24, 16, 4096)
    assert large.soft_layers == [21, 22, 23] and not large.checkpoint_activations
    assert model_shape("config_vlmoB_base64k") == ModelConfig()
    Path("configs").mkdir()
    Path("configs/config_vlmoB_base64k.json").write_text((assets / "vlmo_config.json").read_text())
    assert model_shape("config_vlmoB_base64k.json").dim == 64
    assert "no such file; known by name are config_vlmoB" in refusal("--task vqa --checkpoint C --vlmo_config my.json")
    assert "elsewhere/config_vlmoB_base64k.json: no such file" in refusal(
        "--task vqa --checkpoint C --vlmo_config elsewhere/config_vlmoB_base64k.json"
    )


def test_no_recipe_is_taken_where_none_is_eves() -> None:
    """Other widths, a run that is scored, and a recipe or a width that is named."""
    for name, model in (("tiny", ModelConfig(dim=96, num_heads=4)), ("base", ModelConfig(image_size=224))):
        save(PretrainConfig(model=model), Path(name) / "model" / "config.yaml")
        (Path(name) / "model" / "model.safetensors").touch()
    own = FinetuneConfig().optimizer
    assert finetune("--task vqa --checkpoint tiny").optimizer == own
    assert finetune("--task vqa --checkpoint base").optimizer.eps == 1e-8
    scored = finetune("--task vqa --checkpoint base --evaluate")
    assert (scored.optimizer, scored.model.image_size) == (own, 224)
    zeroshot = finetune("--task itr_coco --checkpoint base --zeroshot")
    assert (zeroshot.optimizer, zeroshot.model.image_size) == (own, 224)
    assert finetune("--task vqa --checkpoint C --evaluate").model.image_size == 480  # a bare file has no own
    assert finetune("--task vqa --checkpoint base --config tiny_shapes_vqa").optimizer.eps == own.eps
    assert finetune("--task vqa --checkpoint C --model.dim 96").optimizer == own
    assert finetune("--task vqa").optimizer == own


def test_options_that_run_py_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = finetune("--task vqa_480 --checkpoint C --warmup 500 --epoch 3 --weight_decay .05 --auto_resume --dist f4")
    assert (config.task, config.optimizer.warmup, config.optimizer.epochs) == ("vqa", 500, 3)
    assert config.optimizer.weight_decay == 0.05 and config.checkpoint.resume
    assert any("--dist f4 has no effect: the launcher" in message for message in caplog.messages)
    assert finetune("--task vqa --config tiny_shapes_vqa --epoch 3").optimizer.total_steps is None
    for none in ("None", "none", "null", "''"):
        assert finetune(f"--task itr_coco --checkpoint C --augmentation {none}").data.augmentation == "none"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--task itr_2_tasks", "--task itr_2_tasks: trains two models; give two commands, with --task itr_coco and"),
        ("--task BPretrain_base", "deepspeed --module eve_ds.pretrain --config pretrain_base"),
        ("--task refcoco_bbox", "EVE has no such task; choose one of itr_coco"),
        ("--task vqa --dist 8", "--dist 8: expected all, 1, f4 or gpu0 to gpu8"),
        ("--task vqa --fs", "--fs: states are sharded by ZeRO"),
        ("--task vqa --load_ckpt_from x", "--load_ckpt_from: name the weights with --checkpoint"),
        ("--task vqa --vlmo_ckpt=x", "--vlmo_ckpt: name the weights with --checkpoint"),
        ("--task vqa --mitm_ratio 1", "--mitm_ratio: is of pre-training"),
        ("--task vqa --mitc_ratio 1", "--mitc_ratio: is of pre-training"),
        ("--task vqa --mitc_detach", "--mitc_detach: is of pre-training"),
        ("--task vqa --decoder_depth 2", "--objective.decoder_depth of eve_ds.pretrain"),
    ],
)
def test_what_has_no_like_is_refused_with_its_replacement(typed: str, told: str) -> None:
    assert told in refusal(typed)


def test_a_yaml_file_of_eves_is_laid_over_the_recipe_and_options_over_both(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = finetune(f"--task nlvr --checkpoint C --config {written(NLVR_YAML)} --lr 1e-4")
    one = config.optimizer
    assert (one.lr, one.head_lr_mult, one.weight_decay, one.epochs, one.warmup) == (1e-4, 2, 0.02, 7, 300)
    assert (one.schedule, one.gradient_clipping, one.eps) == ("cosine", 2.0, 1e-8)
    assert (config.data.augmentation, config.engine.global_batch_size) == ("none", 128)
    (line,) = (message for message in caplog.messages if "is a YAML file of EVE's" in message)
    for unused in ("train_file (raw data: --data names", "batch_size (per GPU; --bs is the total)", "text_encoder ("):
        assert unused in line
    assert "what the YAML file of EVE's leaves open is as in the recipe nlvr" in caplog.messages
    assert "accelerator.SYNCBN" in line and "schedular.lr" not in line
    vqa = finetune(f"--task vqa --checkpoint C --config {written(VQA_YAML)}")
    assert (vqa.model.image_size, vqa.model.max_text_length, vqa.data.augmentation) == (480, 30, "rand")


def test_the_last_of_several_configs_wins_with_a_yaml_file_of_eves_among_them() -> None:
    mine = written({"optimizer": {"lr": 7e-5}, "data": {"augmentation": "color"}}, "mine.yaml")
    for line, lr, augmentation in (
        (f"--config {written(NLVR_YAML)} --config {mine}", 7e-5, "color"),
        (f"--config={mine} --config={written(NLVR_YAML)}", 5e-5, "none"),
    ):
        config = finetune(f"--task nlvr --checkpoint C {line}")
        assert (config.optimizer.lr, config.data.augmentation) == (lr, augmentation)
        assert (config.optimizer.weight_decay, config.optimizer.eps) == (0.02, 1e-8)  # theirs, and the recipe's


def test_a_yaml_file_of_the_readme_that_is_not_there_is_the_recipe_of_the_model_s_size(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    save(PretrainConfig(model=model_shape(SHAPES["Large"])), Path("large/model/config.yaml"))
    Path("large/model/model.safetensors").touch()
    for given, recipe, lr, width in (
        (f"C --vlmo_config {SHAPES['Base']}", "itr_coco", 3e-5, 768),
        (f"C --vlmo_config {SHAPES['Large']}", "itr_coco_large", 5e-5, 1024),
        ("large", "itr_coco_large", 5e-5, 1024),
    ):
        caplog.clear()
        config = finetune(f"--task itr_coco --config configs/Retrieval_coco_ft.yaml --checkpoint {given}")
        assert (config.optimizer.lr, config.objective.embed_dim, config.model.dim) == (lr, width, width)
        line = f"--config configs/Retrieval_coco_ft.yaml is not here: takes the recipe {recipe}, which has EVE's hyper"
        assert any(message.startswith(line) for message in caplog.messages)
    mine = written({"optimizer": {"lr": 7e-5}}, "mine.yaml")
    late = finetune(f"--task itr_coco --checkpoint large --config {mine} --config Retrieval_coco_ft.yaml")
    assert late.optimizer.lr == 5e-5


def test_a_yaml_file_gives_the_shape_of_a_bare_file_of_weights() -> None:
    large = written(VQA_YAML | {"vlmo_config": "configs/config_vlmoL_base64k.json"})
    assert finetune(f"--task vqa --checkpoint C --config {large}").model.dim == 1024
    base = finetune(f"--task vqa --checkpoint C --config {large} --vlmo_config config_vlmoB_base64k.json")
    assert base.model.dim == 768


@pytest.mark.parametrize(
    ("changes", "task", "told"),
    [
        ({}, "nlvr", "is EVE's file for vqa (vqa), and --task is nlvr; leave --config out"),
        ({}, None, "is a YAML file of EVE's, which names no task; give --task one of itr_coco, itr_flickr, vqa, nlvr"),
        ({}, "mine.tasks:SPEC", "--config eve.yaml: is a YAML file of EVE's, which names no task; give --task one of"),
        ({"image_res": "x"}, "vqa", "eve.yaml: image_res: expected an integer, got 'x'"),
        ({"optimizer": {"opt": "sgd"}}, "vqa", "optimizer.opt='sgd': there is AdamW alone"),
        ({"schedular": {"sched": "step"}}, "vqa", "schedular.sched='step' is none of EVE's (linear, cos)"),
        ({"schedular": 3}, "vqa", "eve.yaml: schedular: expected a mapping, got 3"),
    ],
)
def test_a_yaml_file_that_fits_nothing_is_one_line(changes: dict[str, object], task: str | None, told: str) -> None:
    line = f"--checkpoint C --config {written(VQA_YAML | changes)}" + (f" --task {task}" if task else "")
    assert told in refusal(line)


def test_commands_of_both_pages_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module, _ in COMMANDS.values():
        monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    trained = 0
    for line in LINES:
        words = shlex.split(line)
        if words[:3] == ["python", "-m", "preprocessing"]:
            assert preprocess(words[3:]) == 0
        elif "--task" in words:
            given = words[words.index("eve_ds.finetune") + 1 :]
            at = given.index("--checkpoint")
            config = finetune(shlex.join([*given[: at + 1], "C", *given[at + 2 :]]))
            assert config.output_dir.startswith("runs/") and config.optimizer.eps == 1e-8
            trained += 1
        else:
            assert line == "deepspeed --num_gpus 8 --module eve_ds.finetune"
    assert (len(seen), trained) == (11, 6)
