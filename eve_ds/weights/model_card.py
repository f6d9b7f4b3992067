"""The card of an exported model, README.md as the Hugging Face Hub shows it: task, data, training, scores, use.

Loading ignores it, and its owner may edit it: an edited card is not written again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eve_ds.weights.model_folder import CARD, CONFIG, exported_step
from preprocessing.errors import printable
from preprocessing.local_files import load_json, write_text

_ABOUT = {
    "vqa": ("visual question answering", "visual-question-answering"),
    "nlvr": ("whether a statement is true of two images", "visual-question-answering"),
    "retrieval": ("image-text retrieval", "feature-extraction"),
}
_PRETRAINING = ("pre-training", "feature-extraction")
_USE = {
    "vqa": 'print(eve.answer("photo.jpg", "what color is the square?", top=3))',
    "nlvr": 'print(eve.judge("left.jpg", "right.jpg", "both images have a circle"))',
    "retrieval": 'print(eve.match("photo.jpg", ["a red square", "two dogs"]))\n'
    'vectors = eve.image_features(["photo.jpg"]) @ eve.text_features(["a red square"]).T',
}
_SIZES = {"depth": "layers", "dim": "wide", "num_heads": "heads", "num_experts": "experts", "image_size": "pixels"}
_SIGNED = "\n<!-- written by EVE-DS; SHA-256 of the text above: {} -->\n"
log = logging.getLogger(__name__)
Tree = Mapping[str, Any]


def write_card(folder: Path, step: int, scores: Mapping[str, Tree] | None = None) -> None:
    """Write the card of the model in ``folder``, from its config.yaml and, of a run's model, what the run recorded.

    A card that its owner has edited stays, with a warning: its last line has the hash of what is above.

    Args:
        folder: as ``export_model`` writes it: RUN/model, or RUN/model_ema.
        step: optimizer steps of the weights.
        scores: {split: metrics} of these weights.
    """
    path = folder / CARD
    if path.is_file() and not _is_own(path.read_bytes()):
        log.warning("%s was edited and stays as it is; delete it to have it written again", path)
        return
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    inputs = _json(folder.parent / "identity.json").get("inputs", {})
    text = card(config, step, inputs, scores or {}, printable(folder.parent.resolve().name))
    write_text(path, text + _SIGNED.format(hashlib.sha256(text.encode()).hexdigest()))


def renew_card(folder: Path, step: int, scores: Mapping[str, Tree]) -> None:
    """Write the card of an exported model again, with its scores; nothing if it has none or is of another step."""
    if (folder / CARD).is_file() and exported_step(folder) == step:
        write_card(folder, step, scores)


def _is_own(content: bytes) -> bool:
    """Whether a card is as ``write_card`` wrote it."""
    text, _, last = content.rstrip(b"\n").rpartition(b"\n")
    return last == _SIGNED.format(hashlib.sha256(text).hexdigest()).strip().encode()


def card(config: Tree, step: int, inputs: Tree, scores: Mapping[str, Tree], name: str) -> str:
    """The text.

    Args:
        config: the tree of config.yaml.
        step: optimizer steps.
        inputs: {name: {"place", "hash", "size"}} of identity.json; {} if unknown.
        scores: {split: metrics}; {} if unknown.
        name: of the model.
    """
    task = _kind(str(config.get("task", "")))
    title, tag = _ABOUT.get(task, _PRETRAINING)
    data = _data_name(config)
    front: dict[str, Any] = {
        "library_name": "eve-ds",
        "pipeline_tag": tag,
        "license": "unknown",
        "tags": ["vision-language", "mixture-of-experts", "eve"],
    }
    if measured := {split: numbers for split, own in scores.items() if (numbers := _numbers(own))}:
        front["model-index"] = [
            {"name": name, "results": [_result(tag, title, data, *each) for each in measured.items()]}
        ]
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {name}", ""]
    lines += [
        f"EVE (Chen et al., AAAI 2024, arXiv 2308.11971): one Transformer for images and texts, trained for {title}.",
        "",
        "The license of the data decides what this model may be used for: its owner fills in `license` above.",
        "",
        "## Training",
        "",
        *_training(config, step, data, inputs),
    ]
    if measured:
        lines += ["", "## Scores", "", "| split | metric | value |", "|---|---|---|"]
        lines += [f"| {split} | {key} | {value:.4g} |" for split, own in measured.items() for key, value in own.items()]
    if task in _USE:
        lines += ["", "## Use", "", "```python", "from eve_ds.predict import EVE", ""]
        lines += ['eve = EVE.from_pretrained(".")  # this folder; on a GPU if there is one', _USE[task], "```"]
    return "\n".join(lines) + "\n"


def _kind(task: str) -> str:
    return "retrieval" if task.startswith("itr_") else task


def _training(config: Tree, step: int, data: str, inputs: Tree) -> list[str]:
    model, optimizer, engine = (config.get(name) or {} for name in ("model", "optimizer", "engine"))
    lines = [f"- task: `{config.get('task', 'unknown')}`", f"- data: `{data}`"]
    for what, found in sorted(inputs.items()):
        if isinstance(found, Mapping) and found.get("hash"):
            more = f", {found['size']}" if found.get("size") else ""
            lines.append(f"- {what}: SHA-256 `{str(found['hash'])[:16]}`{more}")
    batch = engine.get("global_batch_size")
    lines.append(f"- steps: {step}" + (f" of {batch} samples" if batch else ""))
    shown = {"lr": optimizer.get("lr"), "weight decay": optimizer.get("weight_decay"), "seed": engine.get("seed")}
    lines += [f"- {key}: {value}" for key, value in shown.items() if value is not None]
    size = [f"{model[key]} {word}" for key, word in _SIZES.items() if model.get(key) is not None]
    return [*lines, f"- model: {', '.join(size)}"] if size else lines


def _data_name(config: Tree) -> str:
    """The names of the data's folders, without the places on the machine that trained."""
    data = config.get("data") or {}
    paths = [source.get("path", "") for source in data.get("sources") or []] or [data.get("path", "")]
    return ", ".join(printable(Path(str(path)).name) for path in paths if path).replace("`", "'") or "unknown"


def _numbers(scores: Tree) -> dict[str, float]:
    """The finite metrics, those of a group by GROUP/NAME."""
    found: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": number for name, number in _numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[key] = float(value)
    return found


def _result(tag: str, title: str, data: str, split: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """An entry of the Hub's model-index."""
    return {
        "task": {"type": tag, "name": title},
        "dataset": {"name": data, "type": data.lower().replace(" ", "-"), "split": split},
        "metrics": [{"type": key, "value": value} for key, value in scores.items()],
    }


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is none, or a damaged one: no card is worth a failed export."""
    try:
        found = load_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
