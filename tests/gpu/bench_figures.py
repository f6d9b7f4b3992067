"""A benchmark of ``eve_ds.bench``, and its figures as a JSON line.

python -m tests.gpu.bench_figures moe --tokens 9480 30336 ...      (options as of eve_ds.bench)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from eve_ds.bench import __main__ as bench
from eve_ds.errors import run_command

ROW_NAMES = ("tokens", "pairs", "dtype", "masked")  # what tells a benchmark's rows apart
LEFT_OUT = ("all_", "products", "machine", "settings", "versions", "photos", "config", "not_measured")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        bench.main([*sys.argv[1:], "--json", str(file)])
        found = json.loads(file.read_text(encoding="utf-8"))
    print(json.dumps({name_of(row): figures(row) for row in found} if isinstance(found, list) else figures(found)))


def name_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in ROW_NAMES if name in row)


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Without the single times, and what was not measured."""
    kept = {key: value for key, value in row.items() if value is not None and key not in ROW_NAMES}
    return {key: value for key, value in kept.items() if not key.startswith(LEFT_OUT)}


if __name__ == "__main__":
    run_command(main)
