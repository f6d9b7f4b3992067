"""The tasks, each with its loss, samples, metrics and predictions in one file, and the loading of trained ones."""

from eve_ds.tasks.base import Task, TaskOutput
from eve_ds.tasks.load_task import load_task_model
from eve_ds.tasks.masked_modeling import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.spec import FinetuneSpec, Objective, PretrainSpec, TaskSpec
from eve_ds.tasks.vqa import VQA

__all__ = [
    "NLVR",
    "VQA",
    "FinetuneSpec",
    "MaskedModeling",
    "Objective",
    "ObjectiveConfig",
    "PretrainSpec",
    "Retrieval",
    "Task",
    "TaskOutput",
    "TaskSpec",
    "load_task_model",
]
