"""The commands of an installed package (pyproject.toml, ``project.scripts``): each is ``python -m MODULE``."""

from __future__ import annotations

import functools
import runpy


def _run(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)


pretrain = functools.partial(_run, "eve_ds.pretrain")
finetune = functools.partial(_run, "eve_ds.finetune")
convert = functools.partial(_run, "eve_ds.convert")
plan = functools.partial(_run, "eve_ds.plan")
predict = functools.partial(_run, "eve_ds.predict")
doctor = functools.partial(_run, "eve_ds.doctor")
report = functools.partial(_run, "eve_ds.report")
sweep = functools.partial(_run, "eve_ds.sweep")
dashboard = functools.partial(_run, "eve_ds.dashboard")
demo = functools.partial(_run, "eve_ds.demo")
launching = functools.partial(_run, "eve_ds.launching")
preprocessing = functools.partial(_run, "preprocessing")
retrieval = functools.partial(_run, "evaluation.retrieval")
vqa = functools.partial(_run, "evaluation.vqa")
nlvr = functools.partial(_run, "evaluation.nlvr")
submission = functools.partial(_run, "evaluation.submission")
baselines = functools.partial(_run, "evaluation.baselines")
