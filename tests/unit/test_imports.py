"""The house's rules that a machine can hold: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("eve_ds", "preprocessing", "evaluation")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60

# Each imports itself and those of a lower number. All other modules of eve_ds are entry points and their helpers.
LAYERS = {
    "eve_ds.parallel": 0,
    "eve_ds.environment": 0,
    "eve_ds.kernels": 1,
    "eve_ds.model": 2,
    "eve_ds.data": 2,
    "eve_ds.weights": 3,
    "eve_ds.rank_failure": 3,
    "eve_ds.errors": 4,
    "eve_ds.intervals": 5,
    "eve_ds.recipes": 5,
    "eve_ds.options": 6,
    "eve_ds.tasks": 7,
    "eve_ds.config_sections": 7,
    "eve_ds.config": 8,
    "eve_ds.engine": 9,
    "eve_ds.callbacks": 10,
}
ENTRY_POINTS = 11
LEAVES = (
    "preprocessing.errors",
    "preprocessing.local_files",
    "preprocessing.running.storage",
    "preprocessing.shards.schema",
    "preprocessing.text.tokenizer",
    "evaluation",
)
PLAIN_LEAVES = tuple(name for name in LEAVES if name not in ("preprocessing.text.tokenizer", "evaluation"))
WORLD, WORLD_USERS = "preprocessing.shapes", ("eve_ds.bench",)  # whose truth probes are scored by
LAZY_DEEPSPEED = ("eve_ds.kernels", "eve_ds.bench", "eve_ds.doctor")  # in functions alone
WITHOUT_ENGINE = ("eve_ds.predict",)  # runs where DeepSpeed is not installed
PRIVATE_API = ("deepspeed.module_inject", "deepspeed.checkpoint.autoep")
PRIVATE_API_USER = "eve_ds.engine.moe_deepspeed"

Import = tuple[str, bool]  # what is imported, and whether at the module's top level


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below ``node``, in any depth; not what their expressions are made of, which is most of a tree.

    Trees are not kept: those of all files are a million objects, which each garbage collection would walk.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from statements(child)


def imports(source: str) -> Iterator[Import]:
    """All absolute imports of a module: ``from a import b`` counts as a.b, which may be a module."""
    tree = ast.parse(source)
    top_level = {id(node) for node in tree.body}
    for node in statements(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top_level
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import: write it in full"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top_level


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def layer(name: str) -> tuple[str, int]:
    for package, number in LAYERS.items():
        if within(name, package):
            return package, number
    return "entry points", ENTRY_POINTS


def violations(module: str, source: str) -> list[str]:
    """The import rules, by the tables above, that ``source`` breaks as the module of that name."""
    broken = []
    for name, top_level in imports(source):
        outside = not within(name, *PACKAGES) and name.split(".")[0] not in sys.stdlib_module_names
        if within(module, "eve_ds") and within(name, "eve_ds"):
            broken += _layering(module, name)
        known = (*LEAVES, WORLD) if within(module, *WORLD_USERS) else LEAVES
        if within(module, "eve_ds") and within(name, "preprocessing") and not within(name, *known):
            broken.append(f"{module} imports {name}: it is none of the leaves, {', '.join(LEAVES)}")
        if within(name, "deepspeed"):
            broken += _deepspeed(module, name, top_level)
        if within(name, "mpi4py") and top_level:
            broken.append(f"{module} imports mpi4py at its top level: it fails where no MPI library is")
        if within(module, "preprocessing") and within(name, "torch", "eve_ds", "evaluation"):
            broken.append(f"{module} imports {name}: preprocessing runs without torch and eve_ds")
        if within(module, *LEAVES) and within(name, *PACKAGES) and not within(name, *LEAVES):
            broken.append(f"{module} imports {name}: it is a leaf")
        if within(module, *PLAIN_LEAVES) and outside and not within(name, "numpy", "pyarrow"):
            broken.append(f"{module} imports {name}: numpy, pyarrow and the standard library are enough")
        foreign = outside and not within(name, "numpy")
        if within(module, "evaluation") and (foreign or within(name, "eve_ds", "preprocessing")):
            broken.append(f"{module} imports {name}: evaluation works on files alone, with numpy")
        if within(module, "eve_ds.parallel") and outside and not within(name, "torch"):
            broken.append(f"{module} imports {name}: torch.distributed only")
    return broken


def _layering(module: str, name: str) -> list[str]:
    if within(module, *WITHOUT_ENGINE) and within(name, "eve_ds.engine", "eve_ds.callbacks"):
        return [f"{module} imports {name}: it runs without DeepSpeed"]
    (own, number), (other, other_number) = layer(module), layer(name)
    if own == other or other_number < number:
        return []
    return [f"{module} imports {name}: {own} comes before {other}"]


def _deepspeed(module: str, name: str, top_level: bool) -> list[str]:
    if name.startswith(PRIVATE_API):
        return [] if module == PRIVATE_API_USER else [f"{module} imports {name}: only {PRIVATE_API_USER} may"]
    if within(module, "eve_ds.engine") or (within(module, *LAZY_DEEPSPEED) and not top_level):
        return []
    return [f"{module} imports {name}: deepspeed is imported in eve_ds/engine alone"]


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    assert found
    return found


def test_modules_import_what_the_design_lets_them() -> None:
    assert [line for name, path in modules() for line in violations(name, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("eve_ds.model.moe", "from eve_ds.tasks import masked"),
        ("eve_ds.model.moe", "def f():\n    import deepspeed"),
        ("eve_ds.model.block", "from eve_ds import engine"),
        ("eve_ds.data.loader", "from eve_ds.model.model_config import ModelConfig"),
        ("eve_ds.engine.trainer", "from eve_ds.callbacks.metrics import MetricsFile"),
        ("eve_ds.engine.trainer", "from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer"),
        ("eve_ds.engine.trainer", "from preprocessing.shards.writer import ShardWriter"),
        ("eve_ds.engine.distributed", "from mpi4py import MPI"),
        ("eve_ds.bench", "import deepspeed"),
        ("eve_ds.predict", "import deepspeed"),
        ("eve_ds.predict.eve", "from eve_ds.engine import trainer"),
        ("eve_ds.parallel.collectives", "import numpy"),
        ("preprocessing.sources.coco", "import torch.nn"),
        ("preprocessing.text.tokenizer", "from preprocessing.shards.writer import ShardWriter"),
        ("preprocessing.shards.schema", "import PIL"),
        ("evaluation.vqa", "from preprocessing.errors import UserError"),
        ("evaluation.vqa", "import torch"),
        ("evaluation.vqa", "import pandas"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("eve_ds.bench", "def f():\n    import deepspeed"),
        ("eve_ds.engine.distributed", "def f():\n    from mpi4py import MPI"),
        ("eve_ds.engine.moe_deepspeed", "from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer"),
        ("eve_ds.tasks.vqa", "from eve_ds.model.backbone import Backbone"),
        ("eve_ds.data.shards", "from preprocessing.errors import UserError"),
        ("eve_ds.tasks.vqa", "from evaluation import vqa"),
        ("eve_ds.engine.scoring", "from evaluation import vqa"),
    ],
)
def test_what_the_design_allows_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_files_and_functions_are_short() -> None:
    too_long = []
    for folder in (*PACKAGES, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if source.count("\n") > LONGEST_FILE:
                too_long.append(f"{path.relative_to(ROOT)}: {source.count(chr(10))} lines")
            for node in statements(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    if length > LONGEST_FUNCTION:
                        too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert too_long == []


# A file that is run as a command, and files that are about one thing in two rooms.
SAME_NAME = {"__init__", "__main__"}
SAME_THING = {
    "attention",  # the layer, and its benchmark
    "compare",  # files of predictions, and runs in a page
    "errors",  # the one class of a user's mistake, and what a command makes of it
    "loader",  # training's, and its benchmark
    "moe",  # the layer, and its benchmark
    "nlvr",  # the task, and its metrics
    "progress",  # a bar on a terminal, of a conversion and of training
    "retrieval",  # the task, and its metrics
    "vqa",  # the task, and its metrics
}


def test_no_two_modules_of_one_name_mean_different_things() -> None:
    names = [path.stem for _, path in modules() if path.stem not in SAME_NAME]
    assert sorted({name for name in names if names.count(name) > 1} - SAME_THING) == []
