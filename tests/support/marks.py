"""An entry point that writes down what its watchdog is told: FILE.N has the lines of rank N.

python -m tests.support.marks FILE MODULE OPTIONS
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command


def main() -> int:
    path, module = Path(f"{sys.argv[1]}.{os.environ['RANK']}"), sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    prepare_environment()
    from eve_ds.engine.watchdog import Watchdog

    mark = Watchdog.mark

    def noted(watchdog: Watchdog, doing: str) -> None:
        mark(watchdog, doing)
        with path.open("a", encoding="utf-8") as file:
            print(watchdog.doing, file=file)

    Watchdog.mark = noted  # type: ignore[method-assign]
    return int(importlib.import_module(module).main())


if __name__ == "__main__":
    run_command(main)
