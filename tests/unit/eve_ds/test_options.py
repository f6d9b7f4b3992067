"""Wrong values, in recipes and on command lines: one line with place and key, what is expected, what was given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eve_ds.bench.__main__ import parse as parse_bench
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.doctor import __main__ as doctor
from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.finetune_options import expand_options
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import describe_type, format_value, has_type, hint_of, known_keys, section_of
from preprocessing import local_files
from preprocessing.errors import UserError, printable, shortened

NOISE = ("<class", "Parser", "typing.", "Union", "Subtypes", "NoneType", "class_path", "\n")


def refusal(root: type, argv: list[str]) -> str:
    with pytest.raises(UserError) as error:
        parse(root, argv, "program")  # type: ignore[type-var]
    text = str(error.value)
    assert not [noise for noise in NOISE if noise in text], text
    return text


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def wrong(hint: Any) -> Any:
    """A value that is none of this type."""
    return next(value for value in ("moon", 1.5, {"a": 1}) if not has_type(value, hint))


def test_every_setting_names_its_type(tmp_path: Path) -> None:
    roots = {key: root for root in (FinetuneConfig, PretrainConfig) for key in known_keys(root)}
    leaves = [key for key in roots if not any(other.startswith(key + ".") for other in roots)]
    for key in leaves:
        root, hint = roots[key], hint_of(roots[key], key)
        *sections, name = key.split(".")
        tree: dict[str, Any] = {name: wrong(hint)}
        for section in reversed(sections):
            tree = {section: tree}
        recipe = written(tmp_path, yaml.safe_dump(tree))
        told_of = f"{key}: expected {describe_type(hint)}, got {wrong(hint)!r}"
        assert refusal(root, [f"--config={recipe}"]) == f"{recipe}: {told_of}"
        if not has_type("moon", hint):
            assert refusal(root, [f"--{key}=moon"]) == f"--{key}: expected {describe_type(hint)}, got 'moon'"
    assert len(leaves) > 50


SOURCE = "(path, weight, modality)"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.lr", "moon"], "--optimizer.lr: expected a number, got 'moon'"),
        (["--optimizer.total_steps", "1.5"], "--optimizer.total_steps: expected an integer or null, got 1.5"),
        (["--optimizer.lr="], "--optimizer.lr: expected a number, got ''"),
        (["--optimizer.lr", "2024-01-01"], "--optimizer.lr: expected a number, got 2024-01-01"),
        (["--optimizer.betas", "[0.9, a]"], "--optimizer.betas: optimizer.betas[1]: expected a number, got 'a'"),
        (["--optimizer.betas", "[0.9,"], "--optimizer.betas: expected a list of numbers, got '[0.9,'"),
        (["--optimizer.betas+", "a"], "--optimizer.betas+: optimizer.betas[0]: expected a number, got 'a'"),
        (["--data.flip", "1"], "--data.flip: expected true or false, got 1"),
        (["--model", "{dim: x}"], "--model: model.dim: expected an integer, got 'x'"),
        (["--model", "{dims: 3}"], "--model: unknown key 'model.dims'; did you mean model.dim?"),
        (["--data", "DIR"], "--data: is a section; give a key of it and a value, as in --data.KEY 'DIR'"),
        (["--optimizer.lr", "-1e-3"], "optimizer.lr=-0.001 is out of range; see --help"),
        (["--model.dim"], "--model.dim: no value follows"),
        (["--model.dim", "--optimizer.lr", "1"], "--model.dim: no value follows"),
        (["--output_dir", "my", "run"], "run: no option takes this; see --help"),
        (
            ["--data.sources", "a"],
            "--data.sources: expected a list of mappings (path, weight, modality) or null, got 'a'",
        ),
        (
            ["--data.sources", "[[1]]"],
            "--data.sources: data.sources[0]: expected a mapping (path, weight, modality), got [1]",
        ),
        (["--data.sources", "[{weight: 2}]"], "--data.sources: data.sources[0]: has no key 'path'"),
    ],
)
def test_invalid_option_values(argv: list[str], message: str) -> None:
    assert refusal(PretrainConfig, argv) == message


def test_the_invalid_value_is_named(tmp_path: Path) -> None:
    """One in quotes is taken for the number in it; a later option does not hide an earlier recipe's fault."""
    recipe = written(tmp_path, 'optimizer: {lr: "0.5"}')
    assert parse(PretrainConfig, [f"--config={recipe}"], "program").optimizer.lr == 0.5
    recipe = written(tmp_path, 'optimizer: {lr: "0.5", eps: x}\n')
    for argv in ([f"--config={recipe}"], ["--optimizer.eps=1", "--config", recipe]):
        assert refusal(PretrainConfig, argv) == f"{recipe}: optimizer.eps: expected a number, got 'x'"
    recipe = written(tmp_path, 'optimizer: {lr: "0.5"}\n')
    assert refusal(PretrainConfig, ["--config", recipe, "stray"]) == "stray: no option takes this; see --help"


def test_sources_are_checked_before_a_class_path_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eve_ds_test_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    listed = "[{class_path: eve_ds_test_module.A}]"
    for sources in (listed, f"'{listed}'", f"['{listed[1:-1]}']", "[eve_ds_test_module.A]"):
        recipe = written(tmp_path, f"data: {{sources: {sources}}}\n")
        section = tmp_path / "data.yaml"
        section.write_text(f"sources: {sources}")
        for argv in (
            ["--config", recipe],
            ["--data.sources", sources],
            ["--data", f"{{sources: {sources}}}"],
            ["--data", str(section)],
        ):
            with pytest.raises(UserError, match=r"data\.sources"):
                parse(PretrainConfig, argv, "program")
    assert not (tmp_path / "ran").exists()


def test_short_options_and_benchmarks_have_the_same_messages() -> None:
    for argv, message in (
        (["moe", "--repeats", "x"], "--repeats: expected an integer above 0, got 'x'"),
        (["moe", "--warmup=-1"], "--warmup: expected an integer, 0 or more, got '-1'"),
        (["moe", "--tokens", "3", "x"], "--tokens: expected an integer above 0, got 'x'"),
        (["moe", "--threads", "x"], "--threads: expected an integer above 0 or null, got 'x'"),
        (["loader", "--timeout", "0"], "--timeout: expected a number above 0, got '0'"),
        (["moe", "--json"], "--json: no value follows"),
        (["moe", "--foo", "3"], "--foo 3: no option takes this"),
    ):
        with pytest.raises(UserError) as error:
            parse_bench(argv)
        assert str(error.value) == f"{message} (--help lists the options)"
    for argv, message in (
        (["--lr"], "--lr: no value follows"),
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--bs", "-1e-3"], "--bs: expected an integer, got -0.001"),
        (["--bs=1.5"], "--bs: expected an integer, got 1.5"),
        (["--augmentation", "much"], "--augmentation: expected one of none, color, rand, got 'much'"),
    ):
        with pytest.raises(UserError) as error:
            expand_options(argv)
        assert str(error.value) == message
    typed = ["--lr", "6e-5", "--bs", "64", "--lr_mult", ".5", "--seed", "3", "--data", "7", "--augmentation", "none"]
    config = parse(FinetuneConfig, expand_options(typed)[0], "program")
    assert (config.optimizer.lr, config.optimizer.head_lr_mult, config.data.path) == (6e-5, 0.5, "7")


def test_mistyped_file_names_get_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "{}")
    for name, mend in (
        ("pretrain_bas", "did you mean pretrain_base?"),
        ("nowhere/tiny_shape.yaml", "did you mean tiny_shapes?"),
        ("recipes.yaml", "did you mean recipe.yaml?"),
        (str(tmp_path / "recpe.yaml"), f"did you mean {tmp_path / 'recipe.yaml'}?"),
        ("zzz", "EVE-DS comes with easy_vqa, easy_vqa_pretrain, emoji,"),
    ):
        assert refusal(PretrainConfig, ["--config", name]).startswith(
            f"--config {name}: No such file or directory; {mend}"
        )
    config = PretrainConfig()
    for name, mend in (
        ("zer2", "did you mean zero2?"),
        ("zzz.json", "EVE-DS comes with zero1, zero2, zero2_offload, zero3"),
    ):
        with pytest.raises(UserError) as error:
            load_deepspeed_config(name, config.engine, config.optimizer, 1)
        assert str(error.value) == f"--deepspeed_config {name}: No such file or directory; {mend}"


@pytest.fixture
def opened() -> Iterator[Callable[[str], str]]:
    """What ``<(command)`` hands over, for what it prints."""
    readers = []

    def pipe(text: str) -> str:
        reader, writer = os.pipe()
        readers.append(reader)
        os.write(writer, text.encode())
        os.close(writer)
        return f"/dev/fd/{reader}"

    yield pipe
    for reader in readers:
        os.close(reader)


def test_a_recipe_from_a_pipe_is_read_once(opened: Callable[[str], str]) -> None:
    one = opened("optimizer: {lr: 1e-3, betas: [0.5, 0.75]}\nmodel: {dim: 96}")
    rest, defaults = expand_options(["--config", one, f"--config={opened('optimizer: {lr: 2e-3}')}", "--seed", "3"])
    config = parse(FinetuneConfig, rest, "program", defaults)
    assert (config.optimizer.lr, config.optimizer.betas, config.model.dim) == (2e-3, [0.5, 0.75], 96)
    wrong = opened("optimizer: {lr: x}")
    assert refusal(PretrainConfig, ["--config", wrong]) == f"{wrong}: optimizer.lr: expected a number, got 'x'"


SECRET = "wJalrXUtnFEMI%2FK7MDENG%2FbPxRfiCYEXAMPLEKEY" * 3
ADDRESS = (
    f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/data"  # cut before its @, it looks like no address with a password
)


def test_passwords_are_hidden_in_values_that_are_cut(tmp_path: Path) -> None:
    texts = ["data: '%s'", "data: {sources: ['%s']}", "data: {sources: '%s'}", "optimizer: {lr: '%s'}", "['%s']", "%s"]
    lines = [["--data.sources", "%s"], ["--data", "%s"], ["--optimizer.lr", "%s"], ["--model=%s"], ["--data=path=%s"]]
    lines += [["--optimizer", "{lr: '%s'}"], ["stray", "%s"]]
    for argv in [["--config", text] for text in texts] + lines:
        *names, text = (word.replace("%s", ADDRESS) for word in argv)
        told_of = printable(refusal(PretrainConfig, [*names, written(tmp_path, text) if "--config" in argv else text]))
        assert "s3://***@bucket/data" in told_of and SECRET[:8] not in told_of, argv
    assert SECRET[:8] not in refusal(PretrainConfig, [f"--data={'[' * 21}{ADDRESS}"])
    for parse_options, argv in ((expand_options, ["--bs", ADDRESS]), (parse_bench, ["moe", "--repeats", ADDRESS])):
        with pytest.raises(UserError) as error:
            parse_options(argv)
        assert "got 's3://***@bucket/data'" in str(error.value)
    with pytest.raises(UserError, match=r"this is 's3://\*\*\*@bucket/data'"):
        section_of(ModelConfig, ADDRESS, "x")


def test_passwords_are_refused_before_print_config_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = tmp_path / "data.yaml"
    section.write_text(f"path: '{ADDRESS}'")
    recipe = written(tmp_path, f"data: {{sources: [{{path: '{ADDRESS}'}}]}}")
    for argv, key in (
        (["--config", recipe], f"{recipe}: data.sources.0.path"),
        (["--data.path", ADDRESS], "--data.path"),
        (["--data", f"{{path: '{ADDRESS}'}}"], "--data={path: 's3://***@bucket/data'}: holds"),
        (["--data", str(section)], f"--data {section}: data.path"),
        ([f"--output_dir={ADDRESS.replace('//', '/')}"], "--output_dir"),
    ):
        told_of = refusal(PretrainConfig, [*argv, "--print_config"])
        assert told_of.startswith(key) and "holds a user, a password or a key" in told_of and SECRET[:8] not in told_of
    assert SECRET[:8] not in capsys.readouterr().out


def test_values_are_hidden_first_and_then_cut() -> None:
    for value in (ADDRESS, [ADDRESS], {"a": ADDRESS}):
        texts = (
            format_value(value),
            local_files.json_excerpt(value),
            shortened(repr(value)),
            shortened(repr(value), 15),
        )
        for text in texts:
            assert "AKIA" not in text and "wJal" not in text, text
    assert format_value("a" * 80) == f"'{'a' * 59} …" and format_value("a" * 58) == f"'{'a' * 58}'"


def test_a_section_may_be_given_by_a_file(tmp_path: Path, opened: Callable[[str], str]) -> None:
    recipe = written(tmp_path, "dim: 96\ndrop_path: 1e-3\n")
    for argv in (["--model", recipe], [f"--model={recipe}"], ["--model", opened("{dim: 96, drop_path: 1e-3}")]):
        model = parse(PretrainConfig, ["--config", "tiny_shapes", "--model.depth=4", *argv], "program").model
        assert (model.dim, model.drop_path, model.depth) == (96, 1e-3, 4)
    data = parse(PretrainConfig, ["--data", written(tmp_path, "path: a\nsources: [{path: b}]")], "program").data
    assert data.path == "a" and data.sources is not None and data.sources[0].path == "b"
    assert parse(PretrainConfig, ["--optimizer", written(tmp_path, "lr: 1e-3")], "program").optimizer.lr == 1e-3
    for text, told_of in (
        ("dims: 3", "unknown key 'model.dims'; did you mean model.dim?"),
        ("dim: x", "model.dim: expected an integer, got 'x'"),
        ("[1]", "expected a mapping with the keys of model, this is [1]"),
        ("dim:", "dim in line 1 has no value; write one (null, if that is meant), or leave the key out"),
    ):
        recipe = written(tmp_path, text)
        assert refusal(PretrainConfig, ["--model", recipe]) == f"--model {recipe}: {told_of}"
    assert "is a section" in refusal(PretrainConfig, ["--model", str(tmp_path)])


def test_quoted_values_in_sources(tmp_path: Path) -> None:
    for text in ("[{path: '7', weight: '2'}]", "\"[{path: '7', weight: 2}]\""):
        for argv in (["--config", written(tmp_path, f"data: {{sources: {text}}}")], [f"--data={{sources: {text}}}"]):
            (source,) = parse(PretrainConfig, argv, "program").data.sources or ()
            assert (source.path, source.weight) == ("7", 2.0)
    twice = "'path' stands in line 1 already; put all of it in one place"
    for typed in ("[{path: a, path: b}]", "{path: a, path: b}"):
        assert refusal(PretrainConfig, ["--data.sources", typed]) == f"--data.sources: {twice}"
    recipe = written(tmp_path, "data: {sources: '[{path: a, path: b}]'}")
    assert refusal(PretrainConfig, ["--config", recipe]) == f"{recipe}: data.sources: {twice}"


@pytest.mark.parametrize("command", ["demo --out", "finetune --checkpoint", "plan --config", "launching"])
def test_secrets_in_paths_are_hidden_in_messages(command: str, tmp_path: Path) -> None:
    """It has one slash of two."""
    module, *words = command.split()
    (tmp_path / f"{ADDRESS}").mkdir(parents=True)  # no file may take its place
    line = [sys.executable, "-m", f"eve_ds.{module}", *words, ADDRESS.replace("//", "/")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    run = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and SECRET[:8] not in run.stdout + run.stderr
    assert "s3:/***@bucket/data" in run.stderr


def test_the_doctor_hides_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(ADDRESS).mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["doctor", "--json", ADDRESS])
    monkeypatch.setattr(doctor, "examine", lambda ranks: {"faults": []})  # takes seconds, and tells of the machine
    monkeypatch.setattr(doctor, "screen", str)
    with pytest.raises(SystemExit):
        doctor.main()
    assert "error: --json s3:/***@bucket/data: is no regular file" in capsys.readouterr().err
