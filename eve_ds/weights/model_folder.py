"""What a user may mean by "this checkpoint": a run folder, a model folder, or a single file of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from preprocessing.schema import ANSWER_LIST, DataError
from preprocessing.tokenizer import FILE_NAME as TOKENIZER

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
FILES = (WEIGHTS, CONFIG, TOKENIZER, ANSWER_LIST)  # all that a model folder may hold


@dataclass(frozen=True)
class ModelFolder:
    """Where the parts of a model lie; config and tokenizer are None for a bare file of weights."""

    weights: Path
    config: Path | None
    tokenizer: Path | None

    @classmethod
    def find(cls, path: str | Path) -> ModelFolder:
        """Look for weights at ``path``, in it, or in its folder ``model``.

        Raises:
            DataError: nothing there that holds weights.
        """
        path = Path(path)
        if path.is_file():
            return cls._beside(path)
        for folder in (path, path / "model"):
            if (folder / WEIGHTS).is_file():
                return cls._beside(folder / WEIGHTS)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give a run folder, a model folder or a weights file")
        raise DataError(f"{path}: no {WEIGHTS} here or in its folder model; give a finished run or a weights file")

    @classmethod
    def _beside(cls, weights: Path) -> ModelFolder:
        config, tokenizer = weights.parent / CONFIG, weights.parent / TOKENIZER
        return cls(weights, config if config.is_file() else None, tokenizer if tokenizer.is_file() else None)
