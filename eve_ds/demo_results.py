"""What the demo found: its summary, from the files of its stages, and the table and the lines that it ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOSS_WINDOW = 20  # steps over which the first and last pre-training loss are averaged
LABELED_IMAGES = 600  # of the 6,000 training images: pre-training sees all captions, VQA the questions of these
# Suffix of folders and files of the baseline runs: the same fine-tuning from initial values, without pre-training.
FIRST_VALUES = "first_values"
TASK_FOLDERS = {"retrieval": "itr", "vqa": "vqa", "nlvr": "nlvr"}
RERANKED_SCORES = "retrieval_reranked"  # the scores after re-ranking


def run_folder(root: Path, task: str, run: str) -> Path:
    """The folder of a fine-tuning; ``run`` is "" or FIRST_VALUES."""
    return root / f"{TASK_FOLDERS[task]}{run and f'_{run}'}"


def scores_file(root: Path, task: str, run: str) -> Path:
    """The file that the evaluation command writes; ``run`` is "" or FIRST_VALUES."""
    return root / f"scores_{task}{run and f'_{run}'}.json"


def metrics(root: Path, world_size: int) -> dict[str, Any]:
    """The demo's summary, from the files of its stages. Retrieval and VQA in percent; NLVR and the masked words as
    fractions of 1."""

    def read(name: str) -> Any:
        return json.loads((root / name).read_text(encoding="utf-8"))

    def scores(task: str) -> dict[str, Any]:
        own, rival = (read(scores_file(root, task, run).name) for run in ("", FIRST_VALUES))
        return {**own, "from_first_values": rival}

    def retrieval() -> dict[str, Any]:
        found = scores("retrieval")
        for run, part in (("", found), (FIRST_VALUES, found["from_first_values"])):
            part["reranked"] = read(scores_file(root, RERANKED_SCORES, run).name)
            part["intervals"]["reranked"] = part["reranked"].pop("intervals")
            trained = read(f"{run_folder(root, 'retrieval', run).name}/scores_test.json")  # by the fine-tuning itself
            part["matching"], part["intervals"]["matching"] = trained["matching"], trained["intervals"]["matching"]
        return found

    lines = [
        json.loads(line) for line in (root / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [line for line in lines if "samples_per_second" in line]
    examples = read("data/captions/test/manifest.json")
    words = read("words.json") if (root / "words.json").is_file() else []
    accuracies = {
        "words_accuracy": "accuracy",
        "words_accuracy_other_image": "shuffled",
        "words_accuracy_oracle": "oracle",
    }
    chance = 100 / examples["rows"]
    return {
        "pretrain": {
            "loss_first": mean(steps[:LOSS_WINDOW], "loss"),
            "loss_last": mean(steps[-LOSS_WINDOW:], "loss"),
            "samples_per_second": mean(steps, "samples_per_second"),
            **{name: row[key] for row in words if row["words"] == "all" for name, key in accuracies.items()},
        },
        "retrieval": {
            **retrieval(),
            "chance_txt_r1": chance,
            "chance_img_r1": chance,
            "pool": examples["rows"],
        },
        "vqa": {**scores("vqa"), **read("baselines_vqa.json"), "labeled_images": LABELED_IMAGES},
        "nlvr": {**scores("nlvr"), "chance": 0.5},
        "world_size": world_size,
        "expert_parallel_size": 2 if world_size % 2 == 0 else 1,
        "zero_stage": 2,
    }


def table(result: dict[str, Any]) -> str:
    """The scores beside those without pre-training and by chance, as text."""
    pretrain, retrieval, vqa, nlvr = (result[name] for name in ("pretrain", "retrieval", "vqa", "nlvr"))
    rows = [
        ("", "pre-trained", "no pre-training", "for comparison"),
        ("pre-training loss", f"{pretrain['loss_last']:.3f}", "", f"{pretrain['loss_first']:.3f} at the start"),
    ]
    if "words_accuracy" in pretrain:
        own, other, oracle = (
            f"{100 * pretrain[f'words_accuracy{name}']:.1f} %" for name in ("", "_other_image", "_oracle")
        )
        rows.append(("masked words", own, "", f"{other} with another image, {oracle} by an oracle"))
    for title, part, key, factor, beside in (
        ("text retrieval R@1", retrieval, "txt_r1", 1, f"{retrieval['chance_txt_r1']:.1f} % by chance"),
        ("    re-ranked", retrieval, "reranked/txt_r1", 1, ""),
        ("image retrieval R@1", retrieval, "img_r1", 1, f"{retrieval['chance_img_r1']:.1f} % by chance"),
        ("    re-ranked", retrieval, "reranked/img_r1", 1, ""),
        (
            "matching accuracy",
            retrieval,
            "matching/accuracy",
            1,
            f"{retrieval['matching']['prior']:.1f} % by one answer to all",
        ),
        ("VQA accuracy", vqa, "overall", 1, f"{vqa['text_only_baseline']:.1f} % from the words alone"),
        ("NLVR accuracy", nlvr, "accuracy", 100, f"{100 * nlvr['chance']:.1f} % by chance"),
        ("NLVR consistency", nlvr, "consistency", 100, ""),
    ):
        own, rival = (f"{factor * value_of(scores, key):.1f} %" for scores in (part, part["from_first_values"]))
        rows.append((title, own, rival, beside))
    return "\n".join(f"  {name:<20}{own:>12}{rival:>19}   {beside}".rstrip() for name, own, rival, beside in rows)


def answers(result: dict[str, Any]) -> str:
    """The requests with what came out, as text."""
    lines = []
    for one in result["predict"]:
        lines += [
            f"$ {one['command']}",
            *(f"    {line}" for line in one["output"].splitlines()),
            f"    ({one['right']})",
        ]
    return "\n".join(f"  {line}" for line in lines)


def value_of(scores: dict[str, Any], key: str) -> float:
    """``scores["a"]["b"]`` of "a/b"."""
    group, _, name = key.rpartition("/")
    value: float = (scores[group] if group else scores)[name]
    return value


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)
