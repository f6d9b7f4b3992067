"""``eve_ds.pretrain`` whose compiled blocks are traced but not generated as C++, which takes minutes on a CPU.

python -m tests.support.compiled_run OPTIONS

The last two lines of the output are of rank 0: STEPS and the graphs compiled up to the end of each, and GRAPHS n
BREAKS m.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command


def main() -> int:
    prepare_environment()
    from torch._dynamo.utils import counters

    from eve_ds import pretrain
    from eve_ds.engine import compilation
    from eve_ds.engine.trainer import Trainer
    from eve_ds.model.compiled import compile_parts

    train_step, graphs = Trainer._train_step, []

    def noted(trainer: Trainer, *arguments: Any) -> Any:
        record = train_step(trainer, *arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return record

    Trainer._train_step = noted  # type: ignore[method-assign]
    compilation.compile_parts = functools.partial(compile_parts, backend="aot_eager")
    code = pretrain.main()
    if os.environ["RANK"] == "0":
        breaks = sum(counters["graph_break"].values())
        print("STEPS", *graphs)
        print(f"GRAPHS {counters['stats']['unique_graphs']} BREAKS {breaks}", flush=True)
    return code


if __name__ == "__main__":
    run_command(main)
