"""Values of recipes, for every key of the config tree: nothing, null, dates, tags, aliases, depth. JSON as deep."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.common import InputError
from eve_ds.callbacks.metrics import MetricsFile
from eve_ds.config import FinetuneConfig, PretrainConfig, load_model_config, parse
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import MAX_DEPTH, MAX_NODES, section_of
from eve_ds.report.run_files import read_run
from eve_ds.tasks.masked_modeling import ObjectiveConfig
from eve_ds.tasks.vqa import read_answer_list
from preprocessing.errors import UserError
from preprocessing.shards.schema import read_manifest
from preprocessing.text.tokenizer import Tokenizer

DEEP = 100_000
Leaf = tuple[type, str, Any, Any]


def leaves(root: type, kind: type, prefix: str = "") -> Iterator[Leaf]:
    """(root, dotted key, type, default) of every setting below a dataclass."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(root, typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            factory = item.default_factory
            default = item.default if isinstance(factory, type(dataclasses.MISSING)) else factory()
            yield root, f"{prefix}{item.name}", hint, default


LEAVES = [leaf for root in (PretrainConfig, FinetuneConfig) for leaf in leaves(root, root)]
EACH = list({(key, str(hint)): (root, key, hint, default) for root, key, hint, default in reversed(LEAVES)}.values())
IDS = [f"{root.__name__}.{key}" for root, key, *_ in LEAVES]


def optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def recipe(folder: Path, key: str, value: str) -> str:
    """A recipe with this one key."""
    *sections, name = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    return written(folder, "\n".join([*lines, f"{'  ' * len(sections)}{name}: {value}".rstrip()]) + "\n")


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def tree_of(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def refusal(root: type, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(root, list(argv), "program")  # type: ignore[type-var]
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_number_of_settings() -> None:
    assert len(LEAVES) >= 122


@pytest.mark.parametrize("leaf", LEAVES, ids=IDS)
def test_nothing_dates_and_tags_are_errors_that_name_the_key(leaf: Leaf, tmp_path: Path) -> None:
    root, key, *_ = leaf
    where = f"recipe.yaml: {key} in line {key.count('.') + 1}"
    assert f"{where} has no value" in refusal(root, "--config", recipe(tmp_path, key, ""))
    assert f"{where}: 2024-01-01 is a date" in refusal(root, "--config", recipe(tmp_path, key, "2024-01-01"))
    assert f"{where}: values of kind 'binary'" in refusal(root, "--config", recipe(tmp_path, key, "!!binary aGk="))


@pytest.mark.parametrize("leaf", [leaf for leaf in EACH if not optional(leaf[2])], ids=str)
def test_null_is_an_error_that_names_the_key(leaf: Leaf, tmp_path: Path) -> None:
    root, key, _, _ = leaf
    assert key in refusal(root, "--config", recipe(tmp_path, key, "null"))


@pytest.mark.parametrize("root", [PretrainConfig, FinetuneConfig])
def test_null_is_taken_where_the_type_has_it_and_so_is_every_default(root: type, tmp_path: Path) -> None:
    mine = [leaf for leaf in LEAVES if leaf[0] is root]
    for values in (
        {key: None for _, key, hint, _ in mine if optional(hint)},
        {key: value for _, key, _, value in mine},
    ):
        config = parse(root, ["--config", written(tmp_path, yaml.safe_dump(tree_of(values)))], "program")  # type: ignore[type-var]
        assert {key: value_of(config, key) for key in values} == values
    for option in ("--optimizer.lr", "--checkpoint.every", "--data.flip", "--model.soft_layers"):
        assert option[2:] in refusal(root, option, "null")


def test_control_characters_are_errors_that_name_the_key(tmp_path: Path) -> None:
    for key in ("output_dir", "data.path", "logging.wandb_project"):
        assert f"{key} holds the control character" in refusal(
            PretrainConfig, "--config", recipe(tmp_path, key, '"a\\0b"')
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {path: 2024-01-01}", ["data.path", "2024-01-01 is a date to YAML; put it in quotes"]),
        ("optimizer: {total_steps: 12:30}", ["optimizer.total_steps", "12:30 is a time to YAML"]),
        ("data: {path: !!set {a}}", ["data.path", "'set'"]),
        ("data: {path: !foo x}", ["data.path", "'!foo'"]),
        ("data: {path: !!python/object/apply:os.system [id]}", ["data.path", "python/object"]),
        ("dry_run: !!bool x", ["not valid YAML", "does not fit the tag"]),
        ("data: {num_workers: !!int ''}", ["not valid YAML", "does not fit the tag"]),
        ("optimizer: {betas: [0.9, null]}", ["optimizer.betas"]),
        ("optimizer:\n  betas:\n    - 0.9\n    -\n", ["optimizer.betas[1] in line 4 has no value"]),
        ("data: {sources: [{path: }]}", ["data.sources[0].path", "no value"]),
        ("optimizer:\n", ["optimizer in line 1 has no value"]),
        ("model: null", ["'model' is a section, give a mapping, not null"]),
        ("model: &a {dim: *a}", ["'model' is nested deeper than 20 levels (or holds itself)"]),
        ("model: " + "{a: " * DEEP + "1" + "}" * DEEP, [f"nested deeper than {MAX_DEPTH} levels"]),
        ("model: {soft_layers: " + "[" * DEEP + "]" * DEEP + "}", [f"nested deeper than {MAX_DEPTH} levels"]),
        ("x: " + "[" * 30 + "]" * 30, ["'x", "nested deeper"]),
        ("model: {dim: 1, dim: 2}", ["'dim' stands in line 1 already"]),
        ("--- {}\n--- {}", ["not valid YAML at line 2"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_valid_yaml_that_recipes_refuse(text: str, words: list[str], tmp_path: Path) -> None:
    found = refusal(PretrainConfig, "--config", written(tmp_path, text))
    assert all(word in found for word in words), found


def test_aliases_are_taken_unless_they_multiply(tmp_path: Path) -> None:
    shared = "data: {sources: [&a {path: one, weight: 2}, {<<: *a, path: two}]}"
    sources = parse(PretrainConfig, ["--config", written(tmp_path, shared)], "program").data.sources
    assert sources is not None and [(s.path, s.weight) for s in sources] == [("one", 2), ("two", 2)]
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    found = refusal(PretrainConfig, "--config", written(tmp_path, "\n".join(lines)))
    assert f"more than {MAX_NODES} values" in found and found.count("--config") == 1


def test_values_too_deep_on_the_command_line() -> None:
    for value in ("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 30 + "]" * 30):
        for argv in (["--model.soft_layers", value], [f"--model.soft_layers={value}"], ["--model", value]):
            assert f"nested deeper than {MAX_DEPTH} levels" in refusal(PretrainConfig, *argv)
    assert "model.soft_layers" in refusal(PretrainConfig, "--model.soft_layers", "[[[1]]]")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dim": None}, ["model: dim: expected an integer, got null"]),
        ({"dim": "96"}, ["dim: expected an integer, got '96'"]),
        ({"dim": True}, ["dim: expected an integer, got true"]),
        ({"soft_layers": [1, "x"]}, ["soft_layers[1]: expected an integer, got 'x'"]),
        ({"activation": "relu"}, ["activation: expected one of gelu, quick_gelu, got 'relu'"]),
        ({"dims": 1}, ["unknown key", "dim"]),
    ],
)
def test_a_stored_model_of_wrong_types_is_named(values: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": values}))
    with pytest.raises(UserError) as error:
        load_model_config(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_param": 3}, "not a config_vlmo JSON file, the object 'moe_param' is missing"),
        ({"moe_param": {"num_experts": 4}}, "not a config_vlmo JSON file, 'topk' is missing"),
        ({"moeffn_layers": 3}, "moeffn_layers=3 is no list of whole numbers"),
        ({"moeffn_layers": [1, "x"]}, "moeffn_layers=[1, 'x'] is no list of whole numbers"),
        ({"vision_width": "x"}, "dim is 'x', not a whole number"),
        ({"vision_width": True}, "dim is True, not a whole number"),
        ({"drop_path_rate": None}, "drop_path is None, not a number"),
    ],
)
def test_a_vlmo_config_of_wrong_types_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path, assets: Path
) -> None:
    path = tmp_path / "config_vlmo.json"
    path.write_text(json.dumps(json.loads((assets / "vlmo_config.json").read_text()) | changes))
    with pytest.raises(UserError) as error:
        ModelConfig.from_vlmo(path)
    assert str(error.value) == f"{path}: {words}"


def test_a_stored_section_of_right_types_is_taken() -> None:
    assert section_of(ModelConfig, {"dim": 96, "drop_path": 0, "capacity_factor": None}, "x").dim == 96
    assert section_of(ObjectiveConfig, {"mode": "joint"}, "x") == ObjectiveConfig(mode="joint")
    with pytest.raises(UserError, match="x: expected a mapping"):
        section_of(ModelConfig, [1], "x")


@pytest.mark.parametrize("text", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "1" * 5000, "{", ""])
def test_json_however_deep_or_long_ends_in_one_line(text: str, tmp_path: Path) -> None:
    readers: list[tuple[str, Any]] = [
        ("answer_list.json", read_answer_list),
        ("manifest.json", read_manifest),
        ("config_vlmo.json", lambda folder: ModelConfig.from_vlmo(folder / "config_vlmo.json")),
        ("tokenizer.json", Tokenizer.load),
        ("metrics.json", read_run),
    ]
    for name, read in readers:
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises((UserError, InputError)) as error:
            read(folder)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_lines_of_metrics_that_are_too_deep_are_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = '{"step": 1, "loss": 2.0}\n'
    bad = ["[" * DEEP + "]" * DEEP, '{"step": "x"}', '{"step": 1' + "0" * 400 + "}", "[]", "1"]
    (tmp_path / "metrics.jsonl").write_text(good + "\n".join(bad) + "\n")
    state: Any = types.SimpleNamespace(output_dir=tmp_path, start_step=1, is_main=True, evaluation_due=False)
    callback = MetricsFile()
    callback.fit_start(state)
    callback.close(state)
    assert sum("is not a record with a step" in message for message in caplog.messages) == len(bad)
    assert (tmp_path / "metrics.jsonl").read_text() == good
