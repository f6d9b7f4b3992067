"""The ablations of the EVE paper (Chen et al., AAAI 2024) as data: options of ``eve_ds.pretrain``, the paper's scores.

The paper's scores are those of EVE-Base after 25 epochs. Its figures 4 and 5 (mask ratios, number of experts) tell no
numbers, so those tables have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Paper(NamedTuple):
    """Percent: accuracy on NLVR2 test-P, Flickr30k text and image R@1, accuracy on VQA dev; None where it says none."""

    accuracy: float | None
    txt_r1: float
    img_r1: float
    soft_accuracy: float


class Measure(NamedTuple):
    """A score of a fine-tuning: its key in scores_SPLIT.json (and in Paper), factor to percent, our and its title."""

    key: str
    to_percent: float
    title: str
    paper_title: str


_RETRIEVAL = (
    Measure("txt_r1", 1, "text R@1", "Flickr30k text R@1"),
    Measure("img_r1", 1, "image R@1", "Flickr30k image R@1"),
)
MEASURES = {
    "itr_coco": _RETRIEVAL,
    "itr_flickr": _RETRIEVAL,
    "vqa": (Measure("soft_accuracy", 1, "VQA", "VQA dev"),),
    "nlvr": (Measure("accuracy", 100, "NLVR", "NLVR2 test-P"),),
}  # by the fine-tuning's --task


class Row(NamedTuple):
    """A pre-training.

    Attributes:
        name: of the row, and of its folder.
        options: of ``eve_ds.pretrain``. {last} stands for the recipe's ``model.soft_layers``, {later} for the same one
            block later, {deeper} for ``model.depth`` + 1.
        paper: the paper's scores.
    """

    name: str
    options: str
    paper: Paper | None = None


@dataclass(frozen=True)
class Table:
    """An ablation: rows, the one that the others are compared with, and what a reader of the scores must know."""

    title: str
    reference: str
    rows: tuple[Row, ...]
    note: str = ""


_EVE = Paper(80.7, 94.4, 81.2, 77.4)  # MIM + MLM, soft blocks, modality routing
_SHARED = "--model.soft_layers [] --model.shared_layers"
_IMAGE, _TEXT = "--objective.image_mask_ratio", "--objective.text_mask_ratio"

TABLES = {
    "objective": Table("masked patches, masked words, or both", "separate", (
        Row("mim", "--objective.mode mim", Paper(57.4, 30.4, 22.9, 60.9)),
        Row("mlm", "--objective.mode mlm", Paper(79.3, 92.2, 79.2, 77.0)),
        Row("joint", f"--objective.mode joint {_IMAGE} 0.5 {_TEXT} 0.5", Paper(75.7, 88.6, 74.2, 74.6)),
        Row("separate", "--objective.mode separate", Paper(80.1, 93.9, 80.7, 77.3)),
    )),
    "mask_ratio": Table("share of the patches and of the words that is masked", "recipe", (
        *(Row(f"image_{share}", f"{_IMAGE} {share}") for share in (0.5, 0.625, 0.875)),
        *(Row(f"text_{share}", f"{_TEXT} {share}") for share in (0.25, 0.4, 0.6, 0.75)),
        Row("recipe", f"{_IMAGE} 0.75 {_TEXT} 0.5"),
    )),
    "pixel_target": Table("target of masked patches: raw pixels, or normalized patch by patch", "normalized", (
        Row("raw", "--objective.pixel_target raw"),
        Row("normalized", "--objective.pixel_target normalized"),
    ), "The paper says raw pixels and compares no targets."),
    "last_blocks": Table("feed-forward networks of the last blocks", "soft", (
        Row("shared", f"{_SHARED} {{last}}", Paper(80.1, 93.5, 80.1, 77.0)),
        Row("shared_deeper", f"--model.depth {{deeper}} {_SHARED} {{later}}", Paper(80.2, 93.9, 80.6, 77.1)),
        Row("hard", "--model.soft_layers []", Paper(80.1, 93.2, 79.3, 77.0)),
        Row("soft_no_aux_loss", "--model.aux_loss_weight 0", Paper(80.0, 93.6, 79.7, 77.1)),
        Row("soft", "--model.soft_layers {last}", _EVE),
    ), "shared_deeper has a block more than the others."),
    "modality_routing": Table("whether the router sees the modality of a token", "on", (
        Row("off", "--model.modality_routing false", Paper(80.0, 93.7, 80.8, 77.3)),
        Row("on", "--model.modality_routing true", _EVE),
    )),
    "experts": Table("number of experts, and how many of them a token visits", "32_top_2", tuple(
        Row(f"{count}_top_{k}", f"--model.num_experts {count} --model.top_k {k}")
        for k in (1, 2) for count in (4, 8, 16, 32)
    ), "In the paper more experts help with two for a token, not with one."),
    "rivals": Table("EVE's objective and those with contrast (ITC) and matching (ITM)", "pretrain", (
        Row("itc_itm", "--task itc_itm"),
        Row("itc_itm_mlm", "--task itc_itm_mlm"),
        Row("itc_itm_mlm_mim", "--task itc_itm_mlm_mim", Paper(None, 94.2, 80.8, 77.1)),
        Row("itc_mlm_mim", "--task itc_mlm_mim", Paper(None, 94.0, 80.0, 76.8)),
        Row("pretrain", "--task pretrain", Paper(None, 94.4, 81.2, 77.4)),
    ), "The paper compares at equal GPU hours, this table at equal steps: see the minutes. Fine-tuning takes the "
       "backbone alone."),
}  # fmt: skip
