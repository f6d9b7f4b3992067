"""Sections of the configuration that say how a run is optimized, spread, kept and logged, each with its checks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from eve_ds.data.data_config import MOST_SECONDS
from eve_ds.intervals import check_interval
from eve_ds.model.model_config import MOST
from preprocessing.errors import UserError

EVALUATED = ("val/", "val_ema/")  # how the names of metrics begin that evaluations find
MOST_PROFILED = 50  # steps: a trace holds every operation, megabytes a step


def _check_least(section: str, settings: Any, least: dict[str, int]) -> None:
    """Raise UserError naming the first of ``settings`` that is below its least value."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        if isinstance(value, int) and value < lowest:
            null = " or null" if getattr(type(settings), name) is None else ""
            raise UserError(f"{section}.{name}={value} must be at least {lowest}{null}; see --help")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. Biases, norms, LayerScale, tokens and position embeddings have no weight decay.

    Args:
        lr: peak learning rate.
        head_lr_mult: factor on it for parameters outside the backbone.
        layer_decay: the learning rate of block i of n is multiplied by layer_decay ** (n - i), that of the embeddings
            by layer_decay ** (n + 1) (BEiT); 1 for one rate in the whole backbone.
        freeze: patterns of names of parameters that keep their values, [backbone.text_embedding.*]; in memory and time
            they cost what trained ones do.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        total_steps: optimizer steps of the run; null takes ``epochs``.
        epochs: passes over the training split, if ``total_steps`` is null.
        warmup: over how long the learning rate rises from zero: a share of the steps, below 1, or a whole number of
            steps, from 1 on.
        schedule: what follows: a cosine or a line down to ``min_lr_ratio``, or constant; wsd: constant, then down over
            the last steps; cooldown: no warm-up, down from the learning rate of the checkpoint in ``resume_from``.
        decay: share of the steps over which wsd falls; null for 0.2.
        min_lr_ratio: last learning rate as a share of the peak.
        gradient_clipping: largest global gradient norm; 0 for none.
        stop_on_divergence: end the run, before it saves again, when the loss has left its recent range by far and
            stays there (eve_ds/engine/divergence.py); false tells it alone.
        ema: decay of a moving average of the weights, as 0.9999, which is evaluated (val_ema/) and exported (model_ema)
            beside them, for 4 bytes a parameter over all ranks (docs/optimization.md); 0 for none.
    """

    lr: float = 5e-4
    head_lr_mult: float = 1.0
    layer_decay: float = 1.0
    freeze: list[str] = field(default_factory=list)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.05
    total_steps: int | None = None
    epochs: float | None = None
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant", "wsd", "cooldown"] = "cosine"
    decay: float | None = None
    min_lr_ratio: float = 0.0
    gradient_clipping: float = 3.0
    stop_on_divergence: bool = False
    ema: float = 0.0

    @property
    def wsd_decay(self) -> float:
        """``decay``, or its default."""
        return 0.2 if self.decay is None else self.decay

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of ``warmup`` in a run of so many."""
        return round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)

    def check(self) -> None:
        """Raise UserError naming the first setting that no optimizer takes."""
        ranges = {
            "lr": 0 < self.lr < math.inf,
            "head_lr_mult": 0 < self.head_lr_mult < math.inf,
            "layer_decay": 0 < self.layer_decay <= 1,
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "eps": 0 < self.eps < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup < 1 or (1 <= self.warmup <= MOST and self.warmup == int(self.warmup)),
            "decay": self.decay is None or 0 < self.decay <= 1,
            "min_lr_ratio": 0 <= self.min_lr_ratio <= 1,
            "gradient_clipping": 0 <= self.gradient_clipping < math.inf,
            "ema": 0 <= self.ema < 1,
        }
        for name, fits in ranges.items():
            if not fits:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is out of range; see --help")
        if self.decay is not None and self.schedule != "wsd":
            raise UserError(f"optimizer.decay={self.decay} is of schedule wsd; leave it out with {self.schedule}")
        if self.schedule == "wsd" and self.warmup < 1 < self.warmup + self.wsd_decay:
            raise UserError(
                f"optimizer.warmup={self.warmup} and decay={self.wsd_decay} are more than the whole run; lower one"
            )


@dataclass
class EngineConfig:
    """How the work is spread.

    Args:
        global_batch_size: samples per optimizer step, over all ranks and accumulation steps.
        micro_batch_size: most samples per rank and forward pass; null takes the whole share at once, auto as much of it
            as the plan forecasts to fit (docs/planning.md); a resumed run keeps what auto came to. What is missing to
            the global batch is accumulated.
        eval_batch_size: samples per rank and forward pass in evaluations and scoring, which keep no gradients; null
            takes the micro-batch. Predictions do not depend on it.
        expert_parallel_size: ranks over which the experts of a block are spread; divides the world size and
            ``model.num_experts``.
        precision: of a run that trains, its scores included (``evaluate`` alone computes in fp32): bf16 (weights bf16,
            master copy and Adam fp32), fp16 (likewise, with dynamic loss scaling: for V100 and T4, which have no bf16),
            fp32, or auto: bf16 where the device multiplies such matrices by itself, else fp32; a resumed run keeps what
            it began with.
        compile: on: the model's blocks run compiled by torch.compile in training: fewer and larger operations, other
            roundings, a minute more to the first step; auto: on GPUs at ZeRO 1 and 2, in runs of 2,000 micro-batches
            and more over pairs; off.
        deterministic: on GPUs too, the same run gives the same bits, also after a resume; slower, and not compiled.
        timeout_seconds: after so long without progress a rank says whom it waits for, writes its stacks, and ends.
        seed: of initial weights, sample order, masks, augmentation, drop path.
    """

    global_batch_size: int = 256
    micro_batch_size: int | Literal["auto"] | None = None
    eval_batch_size: int | None = None
    expert_parallel_size: int = 1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    timeout_seconds: int = 600
    seed: int = 0

    def check(self, trains: bool = True) -> None:
        """Raise UserError naming the first setting that spreads no work, or that a run that ``trains`` cannot keep."""
        sizes = ("global_batch_size", "micro_batch_size", "eval_batch_size", "expert_parallel_size")
        _check_least("engine", self, dict.fromkeys((*sizes, "timeout_seconds"), 1) | {"seed": 0})
        for name, most in {"global_batch_size": MOST, "timeout_seconds": MOST_SECONDS}.items():
            if getattr(self, name) > most:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at most {most}")
        if self.seed >= 2**63:
            raise UserError(f"engine.seed={self.seed} must be below 2**63")
        if trains and self.deterministic and self.compile == "on":
            raise UserError(
                "engine.compile=on: the first micro-batch of a process is not compiled, so a resumed run has other "
                "bits; set engine.compile=off, or engine.deterministic=false"
            )


@dataclass
class CheckpointConfig:
    """What is kept.

    Args:
        every: steps between checkpoints, or epochs, as '1 epoch' or '0.5 epochs': at the step that completes each; 0
            saves at the end and on SIGTERM alone.
        keep: newest checkpoints kept, at least 1.
        best: metric of the evaluations, as val/soft_accuracy or val_ema/loss: its best value so far saves a checkpoint,
            which is kept beside the newest ones, and exports its weights as ``output_dir/model_best``; fine-tuning
            scores those at the end (docs/optimization.md). Null for none.
        best_mode: max or min, what is best; null takes min for losses, and max for all else.
        patience: evaluations in a row without a new best after which training ends, as a finished run; null for none.
        resume: go on from the newest whole checkpoint when ``output_dir`` holds this run; false refuses such a folder.
        export: write ``output_dir/model`` (safetensors, config, tokenizer) at the end.
        second_place: URI of a folder (hdfs://, s3://, gs://, file:///FOLDER) that gets a copy of the run in the
            background, and from which a run whose disk was lost goes on (docs/checkpoints.md); null for none.
    """

    every: int | str = 1000
    keep: int = 2
    best: str | None = None
    best_mode: Literal["max", "min"] | None = None
    patience: int | None = None
    resume: bool = True
    export: bool = True
    second_place: str | None = None

    def check(self) -> None:
        """Raise UserError naming the first setting that keeps nothing."""
        check_interval("checkpoint.every", self.every)
        _check_least("checkpoint", self, {"keep": 1, "patience": 1})
        if self.best is not None and not self.best.startswith(EVALUATED):
            raise UserError(f"checkpoint.best={self.best} must begin with {' or '.join(EVALUATED)}, as in val/loss")
        if self.best is None and (self.patience or self.best_mode):
            name = "patience" if self.patience else "best_mode"
            raise UserError(f"checkpoint.{name} is about a metric; name it: checkpoint.best, as in val/loss")
        if self.second_place is not None:
            from preprocessing.running.storage import place_of  # here: few runs need pyarrow's file systems

            try:
                place_of(self.second_place)
            except UserError as error:
                raise UserError(f"checkpoint.second_place (--output_hdfs): {error}") from error


@dataclass
class LoggingConfig:
    """What is logged.

    Args:
        wandb: log to Weights & Biases; offline unless WANDB_API_KEY is set.
        wandb_project: its project.
        wandb_entity: the user or team there; null takes the account's default.
        wandb_group: the group that the run belongs to there, such as the seeds of one experiment.
        wandb_tags: its tags there.
        wandb_notes: its description there.
        wandb_mode: online, offline or disabled; null takes WANDB_MODE, or else online if WANDB_API_KEY is set.
        tensorboard: write the same curves and images for TensorBoard, into ``output_dir/tensorboard``.
        eval_every: steps between evaluations on ``data.val_split``, or epochs, as '1 epoch' or '0.5 epochs': at the
            step that completes each; 0 evaluates at the end alone.
        eval_samples: samples of that split looked at while training; null for all.
        detail_every: steps between two records with expert load and speed in detail (``moe/``, ``perf/``); 0 for none.
        peak_tflops: of one device, dense, in the run's precision, for ``perf/mfu``; null takes that of a GPU known to
            eve_ds/callbacks/performance.py, and on others there is no such figure.
        samples: images, words and answers stored for the report.
        images_every: pre-training: steps between two looks at the same held-out images, rebuilt, of which the newest
            five stay in ``output_dir/samples``; 0 looks at the end alone.
        grad_norms_every: steps between logs of the gradient norm by kind of parameter; 0 for none.
        callbacks: import paths of your own callbacks, [my_package.mine:MyCallback] (docs/extending.md).
        profile: steps to trace with torch.profiler, as in 10:20, both included and 50 at most: a trace per rank and a
            summary go to ``output_dir/profile`` (docs/troubleshooting.md); null for none.
        memory_snapshot: record a GPU's allocations, and write them to ``output_dir/profile`` when memory runs out. It
            slows every step down.
    """

    wandb: bool = True
    wandb_project: str = "eve-ds"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    wandb_notes: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    tensorboard: bool = False
    eval_every: int | str = 1000
    eval_samples: int | None = None
    detail_every: int = 50
    peak_tflops: float | None = None
    samples: int = 8
    images_every: int = 0
    grad_norms_every: int = 0
    callbacks: list[str] = field(default_factory=list)
    profile: str | None = None
    memory_snapshot: bool = False

    @property
    def profiled(self) -> range:
        """The steps to trace; empty without ``profile``.

        Raises:
            UserError: they are no such range.
        """
        if self.profile is None:
            return range(0)
        match = re.fullmatch(r"\s*(\d{1,12}):(\d{1,12})\s*", self.profile)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last < first + MOST_PROFILED:
            raise UserError(
                f"logging.profile={self.profile} must be FIRST:LAST, two steps as in 10:20, from 1 on and "
                f"{MOST_PROFILED} at most"
            )
        return range(first, last + 1)

    def check_steps(self, total_steps: int) -> None:
        """Raise UserError if the steps to trace are all behind the end of the run."""
        if (steps := self.profiled) and steps[0] > total_steps:
            raise UserError(
                f"logging.profile={self.profile}: the run ends with step {total_steps}; name steps before that"
            )

    def check(self) -> None:
        """Raise UserError naming the first setting that makes no log."""
        _ = self.profiled
        check_interval("logging.eval_every", self.eval_every)
        steps = ("detail_every", "samples", "images_every", "grad_norms_every")
        _check_least("logging", self, dict.fromkeys(steps, 0) | {"eval_samples": 1})
        if self.images_every and not self.samples:
            raise UserError(f"logging.images_every={self.images_every}: logging.samples=0 shows no image; raise it")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"logging.peak_tflops={self.peak_tflops} must be a positive number or null; see --help")
