"""The tasks that come with EVE-DS by their short names, and a user's own by import path."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from eve_ds.import_path import import_object
from eve_ds.tasks import masked_modeling, nlvr, retrieval, vqa
from eve_ds.tasks.spec import FinetuneSpec, PretrainSpec, TaskSpec
from preprocessing.errors import UserError

FINETUNE: dict[str, FinetuneSpec] = {
    "itr_coco": retrieval.SPEC,
    "itr_flickr": retrieval.SPEC,
    "vqa": vqa.SPEC,
    "nlvr": nlvr.SPEC,
}
PRETRAIN: dict[str, PretrainSpec] = {"pretrain": masked_modeling.SPEC}
BY_NAME: dict[str, TaskSpec] = {spec.name: spec for spec in (masked_modeling.SPEC, nlvr.SPEC, retrieval.SPEC, vqa.SPEC)}


def finetune_spec(name: str, option: str = "--task") -> FinetuneSpec:
    """The fine-tuning task that ``--task`` names: a key of FINETUNE, or ``module:name`` of a FinetuneSpec.

    Raises:
        UserError: there is none; the message names ``option``, which is where the name stands.
    """
    return FINETUNE[name] if name in FINETUNE else _imported(name, FinetuneSpec, FINETUNE, option)


def pretrain_spec(name: str, option: str = "--task") -> PretrainSpec:
    """The pre-training objective of that name, as ``finetune_spec``."""
    return PRETRAIN[name] if name in PRETRAIN else _imported(name, PretrainSpec, PRETRAIN, option)


def find_spec(name: str) -> TaskSpec:
    """Any task: by a short name of ``--task``, by the name that ``load_task_model`` takes, or by import path.

    Raises:
        UserError: there is none.
    """
    known: dict[str, TaskSpec] = {**FINETUNE, **PRETRAIN, **BY_NAME}
    if name not in known and ":" not in name:
        raise UserError(
            f"unknown task {name!r}: choose one of {', '.join(sorted(BY_NAME))}, or module:name of your own"
        )
    return known[name] if name in known else _imported(name, TaskSpec, BY_NAME, "task")


def _imported(name: str, kind: type, short: Collection[str], option: str) -> Any:
    if ":" not in name:
        raise UserError(
            f"{option}: expected one of {', '.join(short)}, or the import path of your own task, as in "
            f"my_package.my_task:SPEC, got {name!r}"
        )
    found = import_object(name, option)
    if not isinstance(found, kind):
        raise UserError(
            f"{option} {name}: expected an instance of eve_ds.tasks.{kind.__name__}, this is of type "
            f"{type(found).__name__}; see docs/extending.md"
        )
    return found
