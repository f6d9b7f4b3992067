"""The tasks, each with its loss, samples, metrics and predictions in one file, and the loading of trained ones."""

from eve_ds.tasks.base import Task, TaskOutput
from eve_ds.tasks.registry import load_task_model
from eve_ds.tasks.spec import FinetuneSpec, Objective, PretrainSpec, TaskSpec

__all__ = ["FinetuneSpec", "Objective", "PretrainSpec", "Task", "TaskOutput", "TaskSpec", "load_task_model"]
