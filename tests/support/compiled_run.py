"""``eve_ds.pretrain`` whose compiled blocks are traced but not generated as C++, which takes minutes on a CPU.

python -m tests.support.compiled_run OPTIONS

The last line of the output is GRAPHS n BREAKS m, of rank 0.
"""

from __future__ import annotations

import functools
import os

from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command


def main() -> int:
    prepare_environment()
    from torch._dynamo.utils import counters

    from eve_ds import pretrain
    from eve_ds.engine import compilation
    from eve_ds.model.compiled import compile_parts

    compilation.compile_parts = functools.partial(compile_parts, backend="aot_eager")
    code = pretrain.main()
    if os.environ["RANK"] == "0":
        breaks = sum(counters["graph_break"].values())
        print(f"GRAPHS {counters['stats']['unique_graphs']} BREAKS {breaks}", flush=True)
    return code


if __name__ == "__main__":
    run_command(main)
