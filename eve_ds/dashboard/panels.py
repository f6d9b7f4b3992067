"""What the dashboard shows: a section for each group of docs/metrics.md, whose panels belong together."""

from __future__ import annotations

from dataclasses import dataclass

# As in eve_ds/callbacks/metric_groups.py and in the section ``logging``: to import those would import torch.
AXIS, PROJECT = "step", "eve-ds"
KINDS = ("original", "masked", "rebuilt", "right")  # of a held-out image; right for codes, in place of rebuilt
SHOWN = 8  # of the held-out images: as many as ``logging.samples`` asks for by default


@dataclass(frozen=True)
class Panel:
    """Curves in one chart over the optimizer step, or images.

    Attributes:
        title: above it.
        metrics: names as dashboards have them, with their group.
        pattern: a regular expression (RE2) of further names; "" for none.
        images: the metrics are images.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    images: bool = False


def _panel(title: str, *metrics: str, pattern: str = "") -> Panel:
    return Panel(title, metrics, pattern)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "train": (
        _panel("loss", "train/loss"),
        _panel("masked patches and words", "train/mim_loss", "train/mlm_loss"),
        _panel("masked words predicted", "train/mlm_accuracy"),
        _panel("codes of masked patches", "train/mim_code_loss", "train/mim_code_accuracy"),
        _panel("contrast and matching", "train/itc_loss", "train/itm_loss"),
        _panel("pairs judged right", "train/itm_accuracy"),
        _panel("VQA", "train/vqa_loss", "train/vqa_score"),
        _panel("NLVR2", "train/nlvr_loss", "train/nlvr_accuracy"),
        _panel("routers", "train/aux_loss", "train/router_z_loss"),
        _panel("samples", "train/samples"),
    ),
    "eval": (
        _panel("loss", "val/loss"),
        _panel("masked patches", "val/mim_loss", "val/mim_loss_shuffled"),
        _panel("masked words", "val/mlm_loss", "val/mlm_loss_shuffled", "val/mlm_loss_no_image"),
        _panel("masked words predicted", "val/mlm_accuracy", "val/mlm_accuracy_shuffled", "val/mlm_accuracy_no_image"),
        _panel("codes of masked patches", "val/mim_code_loss", "val/mim_code_loss_shuffled", "val/mim_code_accuracy"),
        _panel("retrieval", pattern="^val/(txt|img)_r"),
        _panel("retrieval, mean recall", "val/r_mean"),
        _panel("VQA and NLVR2", "val/soft_accuracy", "val/accuracy", "val/consistency"),
        _panel("averages of the weights", pattern="^val_ema/"),
        _panel("all", pattern="^val/"),
    ),
    "optim": (
        _panel("learning rate", "optim/lr"),
        _panel("gradient norm", "optim/grad_norm"),
        _panel("gradient norm by kind", pattern="^optim/grad_norm/"),
        _panel("loss scale", "optim/loss_scale"),
        _panel("skipped steps", "optim/skipped_steps"),
    ),
    "moe": (
        _panel("load imbalance", "moe/load_imbalance", "moe/load_imbalance_image", "moe/load_imbalance_text"),
        _panel("dead experts", "moe/dead_experts"),
        _panel("router entropy", "moe/router_entropy"),
        _panel("router entropy, share of the most", "moe/router_entropy_share"),
        _panel("load imbalance by layer", pattern="^moe/layer_[0-9]+/load_imbalance"),
        _panel("dead experts by layer", pattern="^moe/layer_[0-9]+/dead_experts$"),
        _panel("router entropy by layer", pattern="^moe/layer_[0-9]+/router_entropy$"),
        Panel("choices by layer, modality and expert", ("moe/expert_load",), images=True),
    ),
    "data": (
        _panel("share of the step spent waiting", "data/wait_fraction"),
        _panel("samples by source", pattern="^data/samples/"),
        _panel("corrupt samples replaced", "data/replaced"),
    ),
    "perf": (
        _panel("samples per second", "perf/samples_per_second"),
        _panel("tokens per second", "perf/tokens_per_second"),
        _panel("seconds a step", "perf/step_seconds", "perf/step_seconds_p50", "perf/step_seconds_max"),
        _panel("a rank's own seconds", "perf/own_seconds_p50", "perf/own_seconds_max"),
        _panel("slowest rank", "perf/slowest_rank"),
        _panel("share of padding", "perf/padding_share"),
        _panel("host memory, GiB", "perf/cpu_rss_gib"),
    ),
    "gpu": (
        _panel("TFLOP/s of a device", "perf/tflops_per_device"),
        _panel("share of the peak", "perf/mfu"),
        _panel("memory, GiB", "perf/gpu_allocated_gib", "perf/gpu_reserved_gib"),
    ),
    "samples": tuple(
        Panel(f"held-out image {place}", tuple(f"samples/p{place}_{kind}" for kind in KINDS), images=True)
        for place in range(SHOWN)
    ),
}
