"""The run that every launcher does, and what it must show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

STEPS = 4


@dataclass(frozen=True)
class TinyRun:
    """Args:
    data: prepared caption data set.
    tokenizer: folder with tokenizer.json.
    """

    data: Path
    tokenizer: Path

    def arguments(self, output: Path) -> list[str]:
        """Options of eve_ds.pretrain, as README has them, typed in the checkout."""
        return [
            "--config=tests/cluster/tiny.yaml",
            "--deepspeed_config=ds_configs/zero2.json",
            f"--data.path={self.data}",
            f"--data.tokenizer={self.tokenizer}",
            f"--output_dir={output}",
        ]


def losses(output: Path) -> list[dict[str, float]]:
    """What was learned at each training step: all losses and the gradient norm, from metrics.jsonl."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "lr" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    return [
        {key: value for key, value in record.items() if key.endswith("loss") or key == "grad_norm"} for record in steps
    ]
