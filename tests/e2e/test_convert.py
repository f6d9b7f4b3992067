"""``eve_ds.convert`` as users type it: to and from other formats bit for bit; mistakes in one line; no DeepSpeed."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from eve_ds.config import load_model_config
from eve_ds.convert.__main__ import main
from eve_ds.errors import exit_code
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks import load_task_model
from eve_ds.weights.load import load_weights
from tests.support import ranks
from tests.support.shards import make_caption_set, make_vqa_set, tiny_tokenizer
from tests.support.tiny_tasks import OBJECTIVE, RIVAL, RIVALS, tiny_config, tiny_task

ASSETS = Path("tests/assets")
VLMO = str(ASSETS / "vlmo_config.json")
TINY = "tests/e2e/tiny.yaml"
GOLDEN = {"vqa": "vqa", "nlvr_plain": "nlvr", "nlvr_biattn": "nlvr", "retrieval": "retrieval"}


class Ended(NamedTuple):
    """What a command printed, and its exit code."""

    code: object
    output: str
    errors: str


Convert = Callable[..., Ended]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """``python -m eve_ds.convert``, in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        try:
            code: object = exit_code(main)
        except SystemExit as ended:  # --help
            code = ended.code
        return Ended(code, *capsys.readouterr())

    return run


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = found[name].dtype == value.dtype and found[name].shape == value.shape and torch.equal(found[name], value)
        assert same, name


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_file_round_trip(name: str, convert: Convert, tmp_path: Path) -> None:
    published = load_file(ASSETS / f"{name}.safetensors")
    torch.save({"model": published, "epoch": 3}, tmp_path / "eve.th")
    for source in (ASSETS / f"{name}.safetensors", tmp_path / "eve.th"):
        out = tmp_path / f"from-{source.suffix[1:]}"
        told = convert("from-published", "--checkpoint", source, "--vlmo_config", VLMO, "--out", out)
        assert told.code == 0 and f"with the head of {GOLDEN[name]}" in told.output, told
        for back in ("back.safetensors", "back.th"):
            assert convert("to-published", "--checkpoint", out, "--out", out / ".." / back, "--overwrite").code == 0
            assert_equal(load_weights(tmp_path / back), published)
    direct = load_task_model(GOLDEN[name], ASSETS / f"{name}.safetensors", VLMO)
    assert_equal(load_task_model(GOLDEN[name], out).state_dict(), direct.state_dict())
    assert load_model_config(out / "config.yaml") == direct.config  # what finetune --checkpoint reads


def test_unknown_names_are_listed_and_can_be_dropped(convert: Convert, tmp_path: Path) -> None:
    state = load_file(ASSETS / "retrieval.safetensors")
    del state["itm_head.bias"]  # the head is not whole: its other parts have no place either
    save_file(state | {"mim_head.weight": torch.zeros(2)}, tmp_path / "eve.safetensors")
    command = ["from-published", "--checkpoint", tmp_path / "eve.safetensors", "--vlmo_config", VLMO]
    told = convert(*command, "--out", tmp_path / "out")
    assert told.code == 2 and told.errors.count("\n") == 1 and not (tmp_path / "out").exists()
    heads = ("itc_temp", "itc_text_proj_head.weight", "itc_vision_proj_head.weight", "itm_head.weight")
    assert all(name in told.errors for name in ("eve.safetensors", "mim_head.weight", "--drop", *heads))
    told = convert(*command, "--out", tmp_path / "out", "--drop", "mim_,itc_,itm_")
    assert told.code == 0 and "without a task's head" in told.output
    assert load_task_model("pretrain", tmp_path / "out").config.image_size == 32


def test_a_pretrained_model_with_decoders_round_trip(convert: Convert, tmp_path: Path) -> None:
    run, eve = tmp_path / "run", tmp_path / "eve.th"
    run.mkdir()
    state = tiny_task("pretrain").state_dict()
    save_file(state, run / "model.safetensors")
    sections = {"model": dataclasses.asdict(tiny_config()), "objective": dataclasses.asdict(OBJECTIVE)}
    (run / "config.yaml").write_text(yaml.safe_dump(sections))
    assert convert("to-published", "--checkpoint", run, "--out", eve).code == 0
    back = ["from-published", "--checkpoint", eve, "--config", run / "config.yaml", "--out", tmp_path / "back"]
    told = convert(*back)
    assert told.code == 0 and "head of pretrain" in told.output
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), state)
    assert_equal(load_task_model("pretrain", tmp_path / "back").state_dict(), state)
    sections["objective"]["pixel_ratio"] = sections["objective"].pop(next(iter(sections["objective"])))
    (run / "config.yaml").write_text(yaml.safe_dump(sections))
    told = convert(*back, "--overwrite")
    assert told.code == 2 and "config.yaml" in told.errors and "pixel_ratio" in told.errors
    slim = ["--out", tmp_path / "slim.th", "--drop", "pixel_decoder.,word_decoder."]
    assert convert("to-published", "--checkpoint", run, *slim).code == 0
    assert all(name.startswith("backbone.") for name in load_weights(tmp_path / "slim.th"))


def beit_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """What unilm's pre-training saves, for the model of tiny.yaml: relative positions, a head, the script's options."""
    dim, hidden, patch, blocks = 32, 64, 8, 2
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "mask_token": (1, 1, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for index in range(blocks):
        own: dict[str, tuple[int, ...]] = {"attn.qkv.weight": (3 * dim, dim), "attn.proj.weight": (dim, dim)}
        own |= {"mlp.fc1.weight": (hidden, dim), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (dim, hidden)}
        vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"]
        vectors += ["attn.proj.bias", "mlp.fc2.bias", "gamma_1", "gamma_2"]
        own |= dict.fromkeys(vectors, (dim,))
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in own.items()}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "lm_head.weight": (50, dim), "lm_head.bias": (50,)}
    shapes |= {"rel_pos_bias.relative_position_bias_table": (52, 4)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    state["rel_pos_bias.relative_position_index"] = torch.arange(17 * 17).view(17, 17)
    options = argparse.Namespace(model="beit_base_patch16_224_8k_vocab_cls_pt")
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 299, "args": options}, folder / "beit.pth")
    return folder / "beit.pth", state


@pytest.mark.parametrize("name", [*RIVALS, "mlm_mim_codes"])
def test_a_rivals_heads_are_named_by_its_task_alone(name: str, convert: Convert, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    own, objective = (name, RIVAL) if name in RIVALS else ("pretrain_codes", OBJECTIVE)
    state = tiny_task(own).state_dict()
    save_file(state, run / "model.safetensors")
    sections = {"task": name, "model": dataclasses.asdict(tiny_config()), "objective": dataclasses.asdict(objective)}
    (run / "config.yaml").write_text(yaml.safe_dump(sections))
    assert convert("to-published", "--checkpoint", run, "--out", tmp_path / "eve.th").code == 0
    back = tmp_path / "back"
    told = convert(
        "from-published", "--checkpoint", tmp_path / "eve.th", "--config", run / "config.yaml", "--out", back
    )
    same = "retrieval" if name == "itc_itm" else name
    assert told.code == 0 and told.output.endswith(f"with the head of {same}\n"), told
    assert_equal(load_task_model(name, back).state_dict(), state)


def test_beit_initializes_a_model_and_lists_all_tensors(convert: Convert, tmp_path: Path) -> None:
    source, state = beit_file(tmp_path)
    command = ["from-beit", "--checkpoint", source, "--config", TINY]
    told = convert(*command, "--out", tmp_path / "initial")
    assert told.code == 0, told.errors
    lines = told.output.splitlines()
    assert all(any(line.startswith(f"  {name}") for line in lines) for name in state)
    assert lines[-1].endswith("35 tensors taken, 5 left, 12 new")
    found = load_task_model("pretrain", tmp_path / "initial").backbone.state_dict()
    assert torch.equal(found["blocks.0.text_mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    experts = found["blocks.1.moe.experts.w2"]
    assert len(experts) == 4 and all(torch.equal(expert, state["blocks.1.mlp.fc2.weight"]) for expert in experts)
    torch.manual_seed(0)
    fresh = Backbone(ModelConfig(**yaml.safe_load(Path(TINY).read_text())["model"])).state_dict()
    assert torch.equal(found["text_embedding.words.weight"], fresh["text_embedding.words.weight"])
    assert convert(*command, "--out", tmp_path / "other", "--seed", 1).code == 0
    other = load_file(tmp_path / "other" / "model.safetensors")["backbone.text_embedding.words.weight"]
    assert not torch.equal(other, fresh["text_embedding.words.weight"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_caption_set(root / "captions", rows=12, split="train")
    make_vqa_set(root / "vqa", rows=12, split="train")
    make_vqa_set(root / "vqa", rows=4, split="test")
    tiny_tokenizer(root / "tokenizer")
    return root


def train(module: str, recipe: str | Path, output: Path, stage: int, *options: str) -> Path:
    common = [f"--config={recipe}", f"--output_dir={output}", f"--deepspeed_config=ds_configs/zero{stage}.json"]
    common += ["--data.val_split=null", "--logging.wandb=false", "--logging.eval_every=0"]
    ranks.run(module, [*common, *options])
    return output


def pretrain(data: Path, output: Path, stage: int, *options: str) -> Path:
    where = [f"--data.path={data / 'captions'}", f"--data.tokenizer={data / 'tokenizer'}"]
    return train("eve_ds.pretrain", TINY, output, stage, *where, *options)


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, the experts spread over both, ZeRO 2; checkpoints at steps 2 and 4."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    return pretrain(data, output, 2, "--checkpoint.every=2", "--optimizer.total_steps=4")


def assert_same_folder(found: Path, expected: Path) -> None:
    """But for the model card, which training alone writes."""
    names = {path.name for path in expected.iterdir()} - {"README.md"}
    assert {path.name for path in found.iterdir()} == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_deepspeed_checkpoint_converts_to_the_exported_model(
    pretrained: Path, convert: Convert, tmp_path: Path
) -> None:
    last, first = (pretrained / "checkpoints" / f"step_0000000{step}" for step in (4, 2))
    for source, out in ((pretrained, "run"), (last, "last"), (pretrained / "checkpoints", "all")):
        told = convert("from-deepspeed", "--checkpoint", source, "--out", tmp_path / out)
        assert told.code == 0 and str(last) in told.output, told
        assert_same_folder(tmp_path / out, pretrained / "model")
    assert convert("from-deepspeed", "--checkpoint", first, "--out", tmp_path / "first").code == 0
    earlier, later = (load_task_model("pretrain", tmp_path / step).state_dict() for step in ("first", "last"))
    assert earlier.keys() == later.keys() and not all(torch.equal(earlier[name], later[name]) for name in later)


def test_pretraining_starts_from_beit_and_zero_3_converts(data: Path, convert: Convert, tmp_path: Path) -> None:
    source, _ = beit_file(tmp_path)
    assert convert("from-beit", "--checkpoint", source, "--config", TINY, "--out", tmp_path / "initial").code == 0
    still = ["--optimizer.lr=1e-9", "--optimizer.total_steps=1", "--engine.precision=fp32"]
    run = pretrain(data, tmp_path / "run", 3, f"--init_from={tmp_path / 'initial'}", *still)
    assert convert("from-deepspeed", "--checkpoint", run, "--out", tmp_path / "model").code == 0
    assert_same_folder(tmp_path / "model", run / "model")
    initial, trained = (load_file(f / "model.safetensors") for f in (tmp_path / "initial", tmp_path / "model"))
    for name, value in initial.items():
        assert torch.allclose(trained[name], value, atol=1e-7), name


def test_a_fine_tuned_checkpoint_keeps_its_answers(
    data: Path, pretrained: Path, convert: Convert, tmp_path: Path
) -> None:
    output, recipe = tmp_path / "run", tmp_path / "tiny.yaml"
    sections = yaml.safe_load(Path(TINY).read_text())
    del sections["objective"]
    recipe.write_text(yaml.safe_dump(sections))
    where = ["--task=vqa", f"--data={data / 'vqa'}", f"--checkpoint={pretrained}"]
    train("eve_ds.finetune", recipe, output, 1, *where, "--optimizer.total_steps=1", "--engine.expert_parallel_size=1")
    shutil.move(output / "model", tmp_path / "exported")  # answers and tokenizer are found where the run found them
    command = ["from-deepspeed", "--checkpoint", output, "--out", tmp_path / "model"]
    assert convert(*command).code == 0
    assert_same_folder(tmp_path / "model", tmp_path / "exported")
    config = yaml.safe_load((output / "config.yaml").read_text())
    config["data"]["path"] = config["init_from"] = str(tmp_path / "gone")
    (output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert convert(*command, "--overwrite").code == 0  # the run's folder has its own
    for name in ("tokenizer.json", "answer_list.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
        (output / name).unlink()  # as earlier versions left the folder
    told = convert(*command, "--overwrite")
    assert told.code == 2 and "--tokenizer" in told.errors and "gone" not in told.output
    told = convert(*command, "--overwrite", "--tokenizer", data / "tokenizer")
    assert told.code == 2 and "answer_list.json" in told.errors and "--answer_list" in told.errors
    named = ["--tokenizer", data / "tokenizer", "--answer_list", data / "vqa"]
    assert convert(*command, "--overwrite", *named).code == 0
    assert (tmp_path / "model" / "answer_list.json").read_bytes() == (
        tmp_path / "exported" / "answer_list.json"
    ).read_bytes()


def test_incomplete_and_damaged_checkpoints_are_refused(pretrained: Path, convert: Convert, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    damaged, incomplete = (run / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    victim = max(damaged.glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (incomplete / "complete.json").unlink()
    for source, word in ((damaged, victim.name), (run, victim.name), (incomplete, "complete.json")):
        told = convert("from-deepspeed", "--checkpoint", source, "--out", tmp_path / "out")
        assert told.code == 2 and told.errors.count("\n") == 1 and word in told.errors, told
    assert not (tmp_path / "out").exists()


VQA = ASSETS / "vqa.safetensors"
MISTAKES = {
    "nothing": ([], "from-beit"),
    "no such file": (["from-published", "--checkpoint", "none.th", "--vlmo_config", VLMO], "none.th: no such"),
    "no shape": (["from-published", "--checkpoint", VQA], "--vlmo_config"),
    "two shapes": (["from-beit", "--checkpoint", "{beit}", "--vlmo_config", VLMO, "--config", TINY], "one of"),
    "no JSON": (["from-published", "--checkpoint", VQA, "--vlmo_config", TINY], TINY),
    "BEiT as EVE": (["from-published", "--checkpoint", "{beit}", "--config", TINY], "published naming"),
    "EVE as BEiT": (["from-beit", "--checkpoint", VQA, "--config", TINY], "BEiT v2"),
    "EVE of another size": (
        ["from-published", "--checkpoint", VQA, "--config", TINY],
        "unknown",
    ),
    "a wider EVE": (
        ["from-published", "--checkpoint", "{wide}", "--vlmo_config", VLMO],
        "backbone.norm.weight is [65]",
    ),
    "published already": (["to-published", "--checkpoint", VQA], "already"),
    "no suffix": (["to-published", "--checkpoint", ASSETS, "--out", "eve"], ".safetensors or"),
    "no model": (["to-published", "--checkpoint", "tests"], "no model.safetensors"),
    "no run": (["from-deepspeed", "--checkpoint", "tests"], "no complete checkpoint"),
    "no folder": (["from-deepspeed", "--checkpoint", "none"], "none: no such folder"),
    "ill-typed shape": (["from-beit", "--checkpoint", "{beit}", "--config", "{typo}"], "typo.yaml"),
    "nothing to drop": (
        ["from-published", "--checkpoint", VQA, "--vlmo_config", VLMO, "--drop", "x"],
        "--drop x",
    ),
    "no tokenizer": (
        ["from-beit", "--checkpoint", "{beit}", "--config", TINY, "--tokenizer", "none"],
        "none: no such file",
    ),
    "unknown option": (["from-beit", "--chekpoint", "x"], "--chekpoint"),
    "existing": (["from-beit", "--checkpoint", "{beit}", "--config", TINY, "--out", "{kept}"], "--overwrite"),
    "onto itself": (
        ["to-published", "--checkpoint", "{wide}", "--out", "{kept}/../wide.safetensors", "--overwrite"],
        "is the file to convert",
    ),
    "no room of ours": (["from-beit", "--checkpoint", "{beit}", "--config", TINY, "--out", "{beit}/x"], "beit.pth/x"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(case: str, convert: Convert, tmp_path: Path) -> None:
    arguments, word = MISTAKES[case]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.yaml").write_text("model: {}\n")
    (tmp_path / "typo.yaml").write_text("model: {dim: wide}\n")
    wide = load_file(ASSETS / "vqa.safetensors") | {"backbone.norm.weight": torch.zeros(65)}
    save_file(wide, tmp_path / "wide.safetensors")
    places = {"beit": beit_file(tmp_path)[0], "wide": tmp_path / "wide.safetensors", "typo": tmp_path / "typo.yaml"}
    options = [str(argument).format(kept=kept, **places) for argument in arguments]
    if options and "--out" not in options:
        options += ["--out", str(tmp_path / ("out.th" if options[0] == "to-published" else "out"))]
    before = sorted(tmp_path.iterdir())
    told = convert(*options)
    assert told.code == 2, told
    assert told.errors.startswith("error: ") and told.errors.count("\n") == 1 and word in told.errors, told.errors
    assert sorted(tmp_path.iterdir()) == before and (kept / "config.yaml").read_text() == "model: {}\n"


WITHOUT_DEEPSPEED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from eve_ds.config import load_model_config
from eve_ds.convert.__main__ import main
from eve_ds.errors import run_command
from eve_ds.tasks import load_task_model

commands, folders = eval(sys.argv[1])
for command in commands:
    sys.argv[1:] = command
    main()
for task, folder in folders:
    load_task_model(task, folder)
sys.argv[1:] = ["from-deepspeed", "--checkpoint", "tests", "--out", "none"]
run_command(main)
"""


def test_only_deepspeed_checkpoints_need_deepspeed(pretrained: Path, tmp_path: Path) -> None:
    model, initial = str(tmp_path / "model"), str(tmp_path / "initial")
    vqa = ["--checkpoint", str(ASSETS / "vqa.safetensors"), "--vlmo_config", VLMO]
    beit = ["--checkpoint", str(beit_file(tmp_path)[0]), "--config", TINY]
    commands = [["from-published", *vqa, "--out", model], ["from-beit", *beit, "--out", initial]]
    commands += [["to-published", "--checkpoint", model, "--out", str(tmp_path / "back.th")]]
    folders = [("vqa", model), ("pretrain", initial), ("pretrain", str(pretrained / "model"))]
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, repr((commands, folders))]
    ended = subprocess.run(command, cwd=ranks.REPOSITORY, capture_output=True, text=True, timeout=ranks.LIMIT)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "needs DeepSpeed" in ended.stderr and ended.stderr.count("error:") == 1
    assert_equal(load_weights(tmp_path / "back.th"), load_file(ASSETS / "vqa.safetensors"))


@pytest.mark.parametrize("command", [[], ["from-published"], ["to-published"], ["from-deepspeed"], ["from-beit"]])
def test_help_shows_an_example(command: list[str], convert: Convert) -> None:
    told = convert(*command, "--help")
    assert told.code == 0 and "examples:\n  python -m eve_ds.convert " in told.output
