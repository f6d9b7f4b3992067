"""What is learned: an objective a file over the one backbone, and the loading of trained ones."""

from eve_ds.tasks.base import TASKS, Task, TaskOutput
from eve_ds.tasks.load_task import load_task_model
from eve_ds.tasks.masked import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA

__all__ = [
    "NLVR",
    "TASKS",
    "VQA",
    "MaskedModeling",
    "ObjectiveConfig",
    "Retrieval",
    "Task",
    "TaskOutput",
    "load_task_model",
]
