"""The identity of a run: everything that changes its result. A run resumes only with an equal identity.

Settings are compared by value; one that an older version did not store has its default. Inputs that the config names
(data, tokenizer, first weights) are compared by content, not by path. ``identity.json`` in the run folder and
``complete.json`` of each checkpoint hold the identity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.tasks.registry import find_spec
from eve_ds.tasks.spec import PretrainSpec

Config = PretrainConfig | FinetuneConfig
MUTABLE_ON_RESUME = (  # sections and keys that do not change what is learned, and the length of the run
    "logging",
    "checkpoint",
    "output_dir",
    "split",
    "dry_run",
    "deepspeed_config",
    "optimizer.total_steps",
    "optimizer.epochs",
    "optimizer.stop_on_divergence",
    "optimizer.ema",
    "engine.expert_parallel_size",
    "engine.micro_batch_size",
    "engine.eval_batch_size",
    "engine.compile",
    "engine.deterministic",
    "model.checkpoint_activations",
    "data.num_workers",
    "data.max_corrupt",
    "data.timeout_seconds",
    "engine.timeout_seconds",
    "data.allow_overlap",
    "data.verify",
    "data.max_pixels",
    "data.val_split",
    "objective.rerank",
    "objective.k_test",
    "objective.rerank_score",
)
# Paths; compared by the content of what lies there.
PLACES = ("data.path", "data.tokenizer", "data.train_split", "init_from", "resume_from")
WEIGHTS = ("init_from", "resume_from")  # read once, when the run begins: the same path is enough, too
PRETRAIN = "pretrain"  # name of its task
FREE_IN_A_BRANCH = (  # beside MUTABLE_ON_RESUME: settings that do not change names or shapes of tensors
    "optimizer",
    "data",
    "engine.global_batch_size",
    "engine.seed",
    "load_head",
    "model.max_text_length",
    "model.capacity_factor",
    "model.drop_path",
    "model.layer_scale",
    "model.init_std",
    "model.position_std",
    "model.aux_loss_weight",
    "model.router_z_loss_weight",
    "model.router_jitter",
    "objective.mode",  # but for those of ONE_DECODER
    "objective.image_mask_ratio",
    "objective.text_mask_ratio",
    "objective.image_masking",
    "objective.word_masking",
    "objective.mask_replacement",
    "objective.pixel_target",
    "objective.seed",
    "objective.temperature",
    "objective.even_negatives",
    "objective.matching_weight",
)
ONE_DECODER = ("mim", "mlm")  # values of objective.mode
FREE_INPUTS = ("training data", "data of split", *WEIGHTS)  # a branch must keep all other inputs
SHOWN = 4  # differences in a message, at most


@dataclass(frozen=True)
class Input:
    """An input of a run.

    Attributes:
        place: its absolute path; "" if unknown.
        hash: SHA-256 of its content; "" where that is gone: then the place must be the same.
        size: for messages, as in "400 rows".
    """

    place: str
    hash: str
    size: str = ""

    def __str__(self) -> str:
        if not self.hash:
            return f"{self.place} (no such file or folder)"
        details = f"SHA-256 {self.hash[:12]}"
        return f"{self.place or 'one'} ({f'{self.size}, ' if self.size else ''}{details})"


@dataclass(frozen=True)
class Identity:
    """Settings and inputs that must be equal.

    Attributes:
        settings: by dotted key.
        inputs: by name; None if the run has no such input. A missing one is unknown and equals any other.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, Input | None]

    def differences(self, now: Identity) -> list[str]:
        """The differences of this stored identity from that of the run ``now``, as in "KEY is 1 there and 2 here"."""
        # For settings that an older version did not store.
        defaults = _defaults(str(now.settings.get("task", PRETRAIN)))
        old = {key: self.settings.get(key, defaults.get(key)) for key in now.settings} if self.settings else {}
        found = [
            f"{key} is {value!r} there and {now.settings[key]!r} here"
            for key, value in old.items()
            if value != now.settings[key]
        ]
        for name, new in now.inputs.items():
            known = self.inputs.get(name, new)
            if not _same(name, known, new):
                mend = f" (give --{name} {known.place})" if known and new and not new.hash else ""
                found.append(f"{name} is {_described(known)} there and {_described(new)} here{mend}")
        return found

    def for_a_branch(self) -> Identity:
        """The part that a branch must have in common with the run that it starts from."""
        kept = {key: value for key, value in self.settings.items() if not _within(key, FREE_IN_A_BRANCH)}
        if "objective.mode" in self.settings:
            mode = self.settings["objective.mode"]
            kept["objective.mode"] = mode if mode in ONE_DECODER else "one with both decoders"
        kept.pop("weights of data.sources", None)
        kept.pop("modalities of data.sources", None)
        return Identity(kept, {name: value for name, value in self.inputs.items() if not name.startswith(FREE_INPUTS)})

    def merged(self, now: Identity) -> Identity:
        """``now``, with the inputs that only this identity knows."""
        known = {name: value for name, value in now.inputs.items() if value is None or value.hash}
        return Identity(now.settings, {**self.inputs, **known})

    def tree(self) -> dict[str, Any]:
        """The tree for JSON."""
        inputs = {name: value and vars(value) for name, value in self.inputs.items()}
        return {"settings": dict(self.settings), "inputs": inputs}

    @classmethod
    def from_tree(cls, tree: Any) -> Identity:
        """The identity in ``tree``, or in the tree of older checkpoints: {"tokenizer": hash, "training data": hash}.

        Raises:
            ValueError: ``tree`` is neither.
        """
        try:
            if "settings" not in tree:
                old = {str(name): Input("", value) for name, value in tree.items() if name != "configuration"}
                if not all(isinstance(value.hash, str) for value in old.values()):
                    raise TypeError("hashes are texts")
                return cls({}, old)
            inputs = {str(name): Input(**value) if value else None for name, value in tree["inputs"].items()}
            return cls(dict(tree["settings"]), inputs)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no identity ({error!r})") from error

    @classmethod
    def from_config(cls, tree: Any) -> Identity:
        """The settings of a resolved config. Its inputs are unknown.

        Raises:
            ValueError: ``tree`` is not the config of a run.
        """
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise ValueError("no config of a run")
        return cls(_bound(tree), {})


def summarized(differences: list[str]) -> str:
    """The first ``SHOWN`` differences, for a message."""
    more = len(differences) - SHOWN
    return "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def identity_of(config: Config, inputs: Mapping[str, Input | None]) -> Identity:
    """The identity of a run with these inputs."""
    return Identity(Identity.from_config(dataclasses.asdict(config)).settings, inputs)


@functools.cache
def _defaults(task: str) -> dict[str, Any]:
    spec = find_spec(task)
    kind = PretrainConfig if isinstance(spec, PretrainSpec) else FinetuneConfig
    return _bound(dataclasses.asdict(kind()) | {"objective": dataclasses.asdict(spec.objective())})


def _bound(tree: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in _flat(tree) if key not in PLACES}
    flat.setdefault("task", PRETRAIN)
    sources = flat.pop("data.sources", None)
    listed = sources if isinstance(sources, list) else []
    weights = [source.get("weight") for source in listed if isinstance(source, dict)]
    flat["weights of data.sources"] = weights if any(weight is not None for weight in weights) else None
    kinds = [source.get("modality", "pairs") for source in listed if isinstance(source, dict)]
    flat["modalities of data.sources"] = kinds if any(kind != "pairs" for kind in kinds) else None
    if flat.get("objective.head_hidden", 0) is None and isinstance(flat.get("model.dim"), int):
        flat["objective.head_hidden"] = 2 * flat["model.dim"]  # the default of the heads
    return flat


def _within(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in MUTABLE_ON_RESUME:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _same(name: str, old: Input | None, new: Input | None) -> bool:
    if old is None or new is None:
        return old is new
    return old.hash == new.hash or (name in WEIGHTS and old.place == new.place)


def _described(value: Input | None) -> str:
    return "null" if value is None else str(value)


def place(path: str | Path) -> str:
    """A path in the form of ``Input.place``."""
    return str(Path(path).resolve())
