"""The fine-tuning tasks with all that their models predict in the file of predictions: for ``--task module:NAME``."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from eve_ds.tasks.nlvr import NlvrSpec
from eve_ds.tasks.retrieval import RetrievalSpec
from eve_ds.tasks.spec import Arrays
from eve_ds.tasks.vqa import VqaSpec


class _Recorded:
    def predictions(self, arrays: Arrays, dataset: Any) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return "npz", buffer.getvalue()


class RecordedRetrieval(_Recorded, RetrievalSpec):
    pass


class RecordedVqa(_Recorded, VqaSpec):
    pass


class RecordedNlvr(_Recorded, NlvrSpec):
    pass


RETRIEVAL, VQA, NLVR = RecordedRetrieval(), RecordedVqa(), RecordedNlvr()
