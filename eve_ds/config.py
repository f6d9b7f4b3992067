"""The configuration tree: dataclasses read from YAML with ``--a.b value`` overrides, every key checked.

A recipe (``eve_ds/configs/*.yaml``) fills the tree, options on the command line win over it, and the resolved tree is
stored beside the run. Keys that do not exist and values of the wrong type are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from eve_ds.config_sections import CheckpointConfig, EngineConfig, LoggingConfig, OptimizerConfig
from eve_ds.data.data_config import DataConfig
from eve_ds.model.model_config import ModelConfig
from eve_ds.options import (
    as_one_line,
    check_options,
    check_secrets,
    explain_parse_error,
    inline_section_files,
    join_negative_numbers,
    values_of,
)
from eve_ds.recipes import (
    check_keys,
    check_values,
    format_location,
    read_run_config,
    read_yaml,
    section_of,
    split_options,
)
from eve_ds.tasks.masked_modeling import ObjectiveConfig
from eve_ds.tasks.registry import finetune_spec, pretrain_spec
from eve_ds.tasks.spec import FinetuneObjective, FinetuneSpec, PretrainSpec
from preprocessing.errors import UserError


@dataclass
class _Common:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    output_dir: str = ""
    resume_from: str | None = None
    dry_run: bool = False
    deepspeed_config: str = "ds_configs/zero2.json"

    @property
    def trains(self) -> bool:
        """Whether the run trains; else it scores alone."""
        return True


@dataclass
class PretrainConfig(_Common):
    """A pre-training run.

    Args:
        task: pretrain, which is EVE's masked modeling; itc_itm, itc_itm_mlm, itc_itm_mlm_mim, itc_mlm_mim or
            mlm_mim_codes, its rivals (docs/objectives.md); or the import path of your own objective, as in
            my_package.my_objective:SPEC.
        init_from: backbone to start from: a run folder, a model folder (``eve_ds.convert`` makes one of BEiT v2), or a
            file in EVE's or our naming; null for initial values. Of an unfinished run, its newest checkpoint.
        output_dir: folder of the run: checkpoints, metrics, samples, resolved config.
        resume_from: branch: RUN/checkpoints/step_N of another run, to go on from in a new ``output_dir`` with its
            optimizer and its step, but another learning rate, length, batch or data; RUN is its newest checkpoint.
        dry_run: build and check everything, say what would run, write nothing.
        deepspeed_config: DeepSpeed JSON file, or the name of one that comes with EVE-DS (zero2); its "auto" values are
            filled in from this tree.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    task: str = "pretrain"
    init_from: str | None = None

    @property
    def spec(self) -> PretrainSpec:
        return pretrain_spec(self.task)


@dataclass
class FinetuneConfig(_Common):
    """A fine-tuning run.

    Args:
        task: itr_coco, itr_flickr, vqa or nlvr (retrieval on COCO or Flickr30k, visual question answering, NLVR2), or
            the import path of your own task, as in my_package.my_task:SPEC (docs/extending.md).
        init_from: pre-trained or fine-tuned weights: a run folder, a model folder, or a file in EVE's or our naming. Of
            an unfinished run, its newest checkpoint.
        load_head: take the task head from there too.
        evaluate: score ``split`` and train nothing.
        zeroshot: retrieval: evaluate a model that was not trained for this data set: a pre-trained one with contrastive
            heads, or one that was fine-tuned on another.
        published: with ``evaluate``: score as EVE's published code does, for scores to compare with the paper's. The
            vectors of retrieval come from before the final norm, texts are padded to ``model.max_text_length``, and
            padding is routed to experts and counts for their capacity (``model.capacity_factor``; published: 1.0).
        split: folder under ``data.path`` that is scored at the end.
        output_dir: folder of the run.
        resume_from: branch: RUN/checkpoints/step_N of another run, to go on from in a new ``output_dir`` with its
            optimizer and its step, but another learning rate, length, batch or data; RUN is its newest checkpoint.
        dry_run: build and check everything, say what would run, write nothing.
        deepspeed_config: DeepSpeed JSON file, or the name of one that comes with EVE-DS (zero2); its "auto" values are
            filled in from this tree.
    """

    objective: FinetuneObjective = field(default_factory=FinetuneObjective)
    task: str = "vqa"
    init_from: str | None = None
    load_head: bool = False
    evaluate: bool = False
    zeroshot: bool = False
    published: bool = False
    split: str = "test"

    @property
    def trains(self) -> bool:
        return not (self.evaluate or self.zeroshot)

    @property
    def spec(self) -> FinetuneSpec:
        return finetune_spec(self.task)


ConfigType = TypeVar("ConfigType", PretrainConfig, FinetuneConfig)


def parse(
    root: type[ConfigType], argv: list[str], program: str, defaults: dict[str, Any] | None = None, epilog: str = ""
) -> ConfigType:
    """Read the command line (and the YAML files that it names) into a checked tree.

    ``--help`` and ``--print_config`` print and exit 0, as usual.

    Args:
        root: PretrainConfig or FinetuneConfig.
        argv: the command line without the program's name.
        program: how the user started it, for messages.
        defaults: {dotted key: value} that recipe and command line win over.
        epilog: more text for ``--help``.

    Raises:
        UserError: unknown key, ill-typed value, unreadable file, or a model that cannot be built.
    """
    recipes: list[str]
    options: list[str]
    root, recipes, options = _checked(root, argv)
    make_parser: Any = _parser.__wrapped__ if defaults else _parser
    parser: ArgumentParser = make_parser(root, program, epilog)
    parser.set_defaults(defaults or {})
    try:
        # The last one wins: recipes come first, wherever they stood.
        parsed = parser.parse_args([*map(_as_option, recipes), *inline_section_files(root, options)])
        built = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(explain_parse_error(root, recipes, options, error)) from error
    values = {key: value for key, value in vars(built).items() if key in {f.name for f in dataclasses.fields(root)}}
    config = root(**values)
    check_values(config)
    check_secrets(dataclasses.asdict(config))
    try:
        config.model.check()
        config.data.check()
    except (ValueError, UserError) as error:
        raise UserError(str(error)) from error
    config.optimizer.check()
    if config.optimizer.schedule == "cooldown" and not config.resume_from:
        raise UserError(
            "optimizer.schedule cooldown goes on from a checkpoint; name it: --resume_from RUN/checkpoints/step_N"
        )
    config.engine.check(config.trains)
    config.checkpoint.check()
    config.logging.check()
    config.objective.check()
    config.spec.check_sources(config.objective, config.data.sources or ())
    return config


def save(config: _Common, path: Path) -> None:
    """Write the resolved tree as YAML, atomically."""
    from preprocessing.local_files import write_text

    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def load_model_config(path: Path) -> ModelConfig:
    """Read the ``model`` section of a stored config."""
    section = read_run_config(path, "model")["model"]
    check_keys({"model": section}, PretrainConfig, str(path))
    return section_of(ModelConfig, section, f"{path}: model")


def _checked(root: type[ConfigType], argv: list[str]) -> tuple[type[ConfigType], list[str], list[str]]:
    """The tree of the task that a command line names, its recipes and its other options, all keys known ones."""
    recipes, options = split_options(_as_flag("--dry_run", _without_local_rank(join_negative_numbers(argv))))
    trees = [(path, read_yaml(path, "--config")) for path in recipes]
    for path, tree in trees:
        check_secrets(tree, source=path)  # before --print_config shows it
    root = _for_task(root, trees, options)
    for path, tree in trees:
        check_keys(tree, root, path)
    check_options(root, options)
    return root, recipes, options


def _for_task(root: type[ConfigType], trees: list[tuple[str, Any]], options: list[str]) -> type[ConfigType]:
    """``root`` with the section ``objective`` of the task that is named last.

    Raises:
        UserError: there is no such task; the message names the option or the file that asks for it.
    """
    named = [
        (format_location(path, "task"), tree["task"])
        for path, tree in trees
        if isinstance(tree, dict) and "task" in tree
    ]
    named += [(f"--{name}", typed) for name, typed in values_of(options) if name == "task"]
    where, task = named[-1] if named else ("task", root().task)
    if not isinstance(task, str):
        return root  # the parser says what is wrong
    find = finetune_spec if issubclass(root, FinetuneConfig) else pretrain_spec
    objective = find(task, where).objective
    if objective is type(root().objective):
        return root
    return _with_objective(cast(Any, root), cast(Any, objective))  # hashable, as all classes are


@functools.lru_cache(maxsize=8)
def _with_objective(root: type, objective: type) -> Any:
    own = field(default_factory=objective)
    body = {"__annotations__": {"objective": objective}, "objective": own, "__module__": root.__module__}
    return dataclass(type(root.__name__, (root,), body | {"__doc__": root.__doc__}))


@functools.lru_cache(maxsize=8)  # made in 25 ms, and a sweep parses each of its runs
def _parser(root: type, program: str, epilog: str) -> ArgumentParser:
    description = (root.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=program, exit_on_error=False, description=description, epilog=epilog)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML recipe: a file, or the name of one that comes with EVE-DS, as tiny_shapes",
    )
    parser.add_class_arguments(root)
    return parser


def _as_option(recipe: str) -> str:
    """For the parser: a recipe's file, or what it holds where that cannot be read again, as ``<(command)``."""
    return f"--config={recipe if Path(recipe).is_file() else as_one_line(read_yaml(recipe))}"


def _as_flag(name: str, argv: list[str]) -> list[str]:
    """``name`` without a value behind it is true."""
    following = [*argv, "--"][1:]
    return [f"{name}=true" if (a, b[:2]) == (name, "--") else a for a, b in zip(argv, following, strict=True)]


def _without_local_rank(argv: list[str]) -> list[str]:
    """The deepspeed launcher adds --local_rank=N; the rank comes from the environment."""
    kept, skip = [], False
    for option in argv:
        if skip:
            skip = False
        elif option in ("--local_rank", "--local-rank"):
            skip = True
        elif not option.startswith(("--local_rank=", "--local-rank=")):
            kept.append(option)
    return kept
