"""The configuration tree: dataclasses read from YAML with ``--a.b value`` overrides, every key checked.

A recipe (``eve_ds/configs/*.yaml``) fills the tree, options on the command line win over it, and the resolved tree is
stored beside the run. Keys that do not exist and values of the wrong type are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from eve_ds.data.config import DataConfig
from eve_ds.errors import UserError
from eve_ds.model.config import ModelConfig
from eve_ds.tasks.masked import ObjectiveConfig
from preprocessing.schema import DataError

TaskName = Literal["itr_coco", "itr_flickr", "vqa", "nlvr"]


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. Biases, norms, LayerScale, tokens and position embeddings have no weight decay.

    Args:
        lr: peak learning rate.
        head_lr_mult: factor on it for parameters outside the backbone.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        total_steps: optimizer steps of the run; null takes ``epochs``.
        epochs: passes over the training split, if ``total_steps`` is null.
        warmup: share of the steps over which the learning rate rises from zero.
        schedule: what follows: a cosine or a line down to ``min_lr_ratio``, or constant.
        min_lr_ratio: last learning rate as a share of the peak.
        gradient_clipping: largest global gradient norm; 0 for none.
    """

    lr: float = 5e-4
    head_lr_mult: float = 1.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.05
    total_steps: int | None = None
    epochs: float | None = None
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.0
    gradient_clipping: float = 3.0

    def check(self) -> None:
        """Raise UserError naming the first setting that no optimizer takes."""
        ranges = {
            "lr": self.lr > 0,
            "head_lr_mult": self.head_lr_mult > 0,
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup < 1,
            "min_lr_ratio": 0 <= self.min_lr_ratio <= 1,
            "gradient_clipping": self.gradient_clipping >= 0,
        }
        for name, fits in ranges.items():
            if not fits:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is out of range; see --help")


@dataclass
class EngineConfig:
    """How the work is spread.

    Args:
        global_batch_size: samples per optimizer step, over all ranks and accumulation steps.
        micro_batch_size: most samples per rank and forward pass; null takes the whole share at once. What is missing
            to the global batch is accumulated.
        expert_parallel_size: ranks over which the experts of a block are spread; divides the world size and
            ``model.num_experts``.
        precision: bf16 (weights bf16, master copy and Adam fp32), fp32, or auto: bf16 where the device multiplies such
            matrices by itself, else fp32; a resumed run keeps what it began with.
        seed: of initial weights, sample order, masks, augmentation, drop path.
    """

    global_batch_size: int = 256
    micro_batch_size: int | None = None
    expert_parallel_size: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0


@dataclass
class CheckpointConfig:
    """What is kept.

    Args:
        every: steps between checkpoints; 0 saves at the end and on SIGTERM alone.
        keep: newest checkpoints kept.
        resume: go on from the newest whole checkpoint when ``output_dir`` holds this run; false refuses such a folder.
        export: write ``output_dir/model`` (safetensors, config, tokenizer) at the end.
    """

    every: int = 1000
    keep: int = 2
    resume: bool = True
    export: bool = True


@dataclass
class LoggingConfig:
    """What is told.

    Args:
        wandb: log to Weights & Biases; offline unless WANDB_API_KEY is set.
        wandb_project: its project.
        eval_every: steps between evaluations on ``data.val_split``; 0 evaluates at the end alone.
        eval_samples: samples of that split looked at while training; null for all.
        samples: pictures, words and answers stored for the report.
    """

    wandb: bool = True
    wandb_project: str = "eve-ds"
    eval_every: int = 1000
    eval_samples: int | None = None
    samples: int = 8


@dataclass
class FinetuneObjective:
    """What a fine-tuning task needs beyond the backbone.

    Args:
        biattn: NLVR: bi-attention head in place of the plain one.
        embed_dim: retrieval: width of the contrastive vectors.
        temperature: retrieval: first value of the learned temperature.
        head_hidden: VQA and NLVR: hidden width of the head; null takes twice the backbone's.
    """

    biattn: bool = False
    embed_dim: int = 256
    temperature: float = 0.07
    head_hidden: int | None = None

    def check(self) -> None:
        """Raise UserError naming the first setting that makes no head."""
        for name in ("embed_dim", "temperature", "head_hidden"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"objective.{name}={value} must be positive")


@dataclass
class _Common:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    output_dir: str = ""
    deepspeed_config: str = "ds_configs/zero2.json"


@dataclass
class PretrainConfig(_Common):
    """A pre-training run.

    Args:
        init_from: backbone to start from: a run folder, a model folder (``eve_ds.convert`` makes one of BEiT v2), or a
            file in EVE's or our naming; null for first values.
        output_dir: folder of the run: checkpoints, metrics, samples, resolved config.
        deepspeed_config: DeepSpeed JSON file; its "auto" values are filled in from this tree.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    init_from: str | None = None


@dataclass
class FinetuneConfig(_Common):
    """A fine-tuning run.

    Args:
        task: retrieval on COCO or Flickr30k, visual question answering, or NLVR2.
        init_from: pre-trained or fine-tuned weights: a run folder, a model folder, or a file in EVE's or our naming.
        load_head: take the task head from there too.
        evaluate: score ``split`` and train nothing.
        split: folder under ``data.path`` that is scored at the end.
        output_dir: folder of the run.
        deepspeed_config: DeepSpeed JSON file; its "auto" values are filled in from this tree.
    """

    objective: FinetuneObjective = field(default_factory=FinetuneObjective)
    task: TaskName = "vqa"
    init_from: str | None = None
    load_head: bool = False
    evaluate: bool = False
    split: str = "test"


ConfigType = TypeVar("ConfigType", PretrainConfig, FinetuneConfig)


def known_keys(root: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass tree, sections included."""
    keys = []
    hints = typing.get_type_hints(root)
    for item in dataclasses.fields(root):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += known_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
    return keys


def check_keys(raw: Any, root: type, source: str) -> None:
    """Raise UserError naming the first unknown key in a YAML tree, and the nearest known one."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a config is a YAML mapping of sections, this is a {type(raw).__name__}")
    known = known_keys(root)
    sections = {key for key in known if any(other.startswith(key + ".") for other in known)}

    def visit(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if path not in known:
                raise UserError(f"{source}: unknown key {path!r}{_nearest(path, known)}")
            if path in sections:
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {path!r} is a section, give a mapping in place of {value!r}")
                visit(value, path + ".")

    visit(raw, "")


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
    description = (root.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=program, exit_on_error=False, description=description, epilog=epilog)
    parser.add_argument("--config", action="config", help="YAML recipe, for example eve_ds/configs/tiny_shapes.yaml")
    parser.add_class_arguments(root)
    parser.set_defaults(defaults or {})
    argv = _without_local_rank(argv)
    for path in _config_files(argv):
        check_keys(_read_yaml(path), root, path)
    for option in argv:
        if option.startswith("--"):
            key = option[2:].split("=")[0].rstrip("+")
            if key not in ("config", "help", "print_config", *known_keys(root)):
                raise UserError(f"unknown option --{key}{_nearest(key, known_keys(root), '--')}")
    try:
        parsed = parser.parse_args(argv)
        built = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(_one_line(error)) from error
    values = {key: value for key, value in vars(built).items() if key in {f.name for f in dataclasses.fields(root)}}
    config = root(**values)
    try:
        config.model.check()
        config.data.check()
    except (ValueError, DataError) as error:
        raise UserError(str(error)) from error
    config.optimizer.check()
    config.objective.check()
    return config


def save(config: _Common, path: Path) -> None:
    """Write the resolved tree as YAML, atomically."""
    from eve_ds.files import write_text

    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def load_model_config(path: Path) -> ModelConfig:
    """Read the ``model`` section of a stored config."""
    raw = _read_yaml(str(path))
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise UserError(f"{path}: no 'model' section; expected the config.yaml that a run stores")
    check_keys({"model": raw["model"]}, PretrainConfig, str(path))
    return ModelConfig(**raw["model"])


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


def _config_files(argv: list[str]) -> list[str]:
    files = [argv[i + 1] for i, option in enumerate(argv[:-1]) if option == "--config"]
    return files + [option.split("=", 1)[1] for option in argv if option.startswith("--config=")]


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"--config {path}: not valid YAML{place}: {getattr(error, 'problem', error)}") from error


def _nearest(key: str, known: list[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        tails = {item.rsplit(".", 1)[-1]: item for item in known}
        near = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.6)]
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) < 400 else text[:400] + " …"
