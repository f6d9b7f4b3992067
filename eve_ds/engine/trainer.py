"""The training loop. The task defines the loss; logging, progress and the like are callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import checkpoint, first_weights, resume, schedule
from eve_ds.engine.attention_guard import guard_attention
from eve_ds.engine.batches import TrainingBatches
from eve_ds.engine.callback import HOOKS, Callback, collect_states, overridden, restore_states
from eve_ds.engine.checkpoint_record import Manifest, Topology
from eve_ds.engine.compilation import compile_task
from eve_ds.engine.deepspeed_config import load_deepspeed_config, offloads_optimizer
from eve_ds.engine.distributed import gather
from eve_ds.engine.divergence import NOT_FINITE, LossRange, add_suspect, not_finite
from eve_ds.engine.evaluation import stop_agreed
from eve_ds.engine.identity import Identity
from eve_ds.engine.initialize import initialize
from eve_ds.engine.loss_scale import can_fall, scale_of
from eve_ds.engine.optim import build_optimizer
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark
from eve_ds.engine.whole_weights import gathered
from eve_ds.errors import StopError
from eve_ds.intervals import Interval
from eve_ds.tasks.base import Task
from eve_ds.weights.model_folder import newest_checkpoint
from preprocessing.errors import UserError

Batch = dict[str, Tensor]
Evaluate = Callable[..., dict[str, float]]
MAX_NONFINITE_STREAK = 10  # consecutive steps without a finite loss and gradient before the run counts as diverged
_log = logging.getLogger(__name__)


class Trainer:
    """Trains ``task`` under DeepSpeed ZeRO for ``total_steps`` optimizer steps.

    Every task returns its share of the loss, such that the ranks' shares add up to the loss of the global micro-batch;
    DeepSpeed averages gradients over ranks, so each share is multiplied by the world size before the backward pass.

    Args:
        config: the resolved tree.
        task: the module to train, in fp32; DeepSpeed casts it.
        total_steps: optimizer steps of the whole run.
        device: this rank's.
        identity: of the run and its inputs; a checkpoint with another identity is refused.
        callbacks: their hooks are called in this order.
        evaluate: called at each ``logging.eval_every`` and at the end with this trainer; returns scalars for the log. A
            second argument, if given, is the most samples to look at.
        stop: checked between steps and between the batches of an evaluation.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        task: Task,
        total_steps: int,
        device: torch.device,
        identity: Identity,
        callbacks: Sequence[Callback] = (),
        evaluate: Evaluate | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.task, self.device, self.evaluate = config, task, device, evaluate
        self.callbacks, self.total_steps = list(callbacks), total_steps
        self._hooks = {hook: overridden(self.callbacks, hook) for hook in HOOKS}
        self.stop = stop or StopRequest()
        self.task_name = config.task
        self.output_dir = Path(config.output_dir)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.step = self.start_step = 0
        self.lr = self.lr_factor = 0.0  # of the current step
        self._cooldown: schedule.Cooldown | None = None  # where it began
        self.stopped_early = False  # stopped on request and saved, with steps or an evaluation left to do
        self.ended = False  # finished before ``total_steps``, as a callback wished
        self._kept: dict[str, int] = {}  # who wishes it: step whose checkpoint is kept beside the newest ones
        self.evaluation_due = False  # also after a resume, if a stop request prevented the evaluation
        self.skipped_steps = 0  # steps with non-finite gradients, in which DeepSpeed left the weights unchanged
        self.nonfinite_streak = 0  # consecutive steps, up to the last one, with a non-finite loss or gradient
        self._range = LossRange()
        self.identity = identity
        self._counts: dict[str, float] = {}  # the loader's counts, summed over ranks, since the run began
        self._counts_before: dict[str, float] = {}  # the part of them from before this process
        config.logging.check_steps(total_steps)  # here, so that a dry run tells it and nothing is written
        schedule.check_steps(total_steps, config.optimizer)
        settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, self.world_size)
        self.accumulation_steps = settings["gradient_accumulation_steps"]
        self.micro_batch_of_all_ranks = settings["train_micro_batch_size_per_gpu"] * self.world_size  # samples
        if task.in_batch_negatives and self.accumulation_steps > 1 and self.is_main:
            _log.warning(
                "negatives come from one micro-batch of all ranks, %d of the %d samples of a step; "
                "engine.micro_batch_size=%d, where memory allows it, takes them from all",
                self.micro_batch_of_all_ranks,
                config.engine.global_batch_size,
                config.engine.global_batch_size // self.world_size,
            )
        stage = settings["zero_optimization"]["stage"]
        self.topology = Topology(self.world_size, config.engine.expert_parallel_size, stage)
        offload = offloads_optimizer(settings, config.logging)
        guard_attention(task, device)
        self.compiled = compile_task(task, config, stage, device, total_steps * self.accumulation_steps)
        optimizer = build_optimizer(task, config.optimizer, offload, device)
        mark("the set-up of DeepSpeed")
        self.engine = initialize(task, optimizer, settings)

    @property
    def checkpoint_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    def resume(self) -> int:
        """Load the newest sound checkpoint of this run, or else the one it branches from. Returns the step reached.

        World size, expert-parallel size and ZeRO stage may differ from those of the run that wrote it.
        """
        found = resume.sound(self.checkpoint_dir)
        branch = None if found else first_weights.branch_point(self.config, self.identity, self.total_steps)
        if begins := found or branch:
            path, manifest = begins
            own = self.identity if found else None
            checkpoint.load(self.engine, path, manifest, self.topology, own, self.checkpoint_dir)
            self.step = self.start_step = manifest.step
            self.skipped_steps = manifest.skipped_steps
            if found:
                self.evaluation_due = manifest.state.get("evaluation_due", False)
                self._counts_before = manifest.state.get("counts", {})
                self._range = LossRange(manifest.state.get("loss_range"))
            for name in restore_states(self.callbacks, checkpoint.load_callback_states(path, manifest)):
                _log.info("%s: holds a state of callback %s, which this run does not have; dropped", path, name)
            self._call_hooks("checkpoint_loaded", path, manifest)
            self._log_changes(path, manifest)
            self._resume_schedule(path, manifest.state.get("schedule", {}), own=found is not None)
        return self.start_step

    def _log_changes(self, path: Path, manifest: Manifest) -> None:
        if differences := manifest.topology.differences(self.topology):
            _log.info("%s: written with %s; converted", path, differences)
        before, now = manifest.state.get("micro_batch_of_all_ranks"), self.micro_batch_of_all_ranks
        if before not in (None, now):
            _log.info(
                "a micro-batch of all ranks had %s samples and has %s now: each step sees the same samples, but means "
                "are taken over other sets of them; engine.micro_batch_size x ranks = %s keeps them",
                before,
                now,
                before,
            )

    def _resume_schedule(self, path: Path, state: dict[str, Any], own: bool) -> None:
        options = self.config.optimizer
        self._cooldown = schedule.cooldown_of(state, self.step, options, own)
        following = self._scheduled_factor()
        if (found := schedule.jump(state, following, self.total_steps, options)) and self.step < self.total_steps:
            _log.warning("%s: %s", path, found)

    def _scheduled_factor(self) -> float:
        return schedule.lr_factor(self.step, self.total_steps, self.config.optimizer, self._cooldown)

    def whole_weights(self) -> AbstractContextManager[None]:
        """While open, this rank holds the full weights (of the experts, its own), for use without the engine.

        A collective under ZeRO 3; does nothing below it.
        """
        return gathered(self.task, self.topology.zero_stage)

    def fit(self, batches: TrainingBatches) -> None:
        """Train from ``start_step`` to ``total_steps``. ``batches`` starts with the first sample not yet seen."""
        lengths = batches.samples_per_epoch, self.config.engine.global_batch_size
        self._evaluations = Interval(self.config.logging.eval_every, *lengths)
        self._checkpoints = Interval(self.config.checkpoint.every, *lengths)
        try:
            with self.stop.deferred():
                self._call_hooks("fit_start")
                self._evaluate()
                while self.step < self.total_steps and not (self.stopped_early or self._ends):
                    record = self._train_step(batches)
                    self._call_hooks("step_end", record)
                    self._raise_if_diverged()
                    self._check_range(record["loss"], batches)
                    self._between_steps()
                if self.stopped_early:
                    self.stop.acted_on()
                mark(f"the end, after step {self.step}")
                self._call_hooks("fit_end")
        finally:
            try:
                batches.close()  # raises, too, where the GPU has failed
            finally:
                self._call_hooks("close")

    def set_lr_factor(self, factor: float) -> None:
        """Set the learning rate of the next step to ``factor * optimizer.lr``, and likewise that of the head.

        For a callback's ``step_start``. The configured schedule sets it again before each step.
        """
        self.lr, self.lr_factor = self.config.optimizer.lr * factor, factor
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def keep_checkpoint(self, step: int, by: str) -> None:
        """Keep the checkpoint of ``step`` beside the newest ones, until the same caller ``by`` names another; if it is
        the present step, save it after this evaluation. On every rank."""
        self._kept[by] = step

    def end(self) -> None:
        """End the training before its next step, as a finished run, evaluated and saved; while losses are not finite,
        after the next that is. On every rank."""
        self.ended = True

    @property
    def _ends(self) -> bool:
        return self.step == self.total_steps or (self.ended and not self.nonfinite_streak)

    def show_images(self, images: dict[str, np.ndarray]) -> None:
        """Hand images of this step, uint8 [H, W, 3] by name, to the callbacks that show them. On rank 0 alone."""
        self._call_hooks("images_made", images)

    def _train_step(self, batches: TrainingBatches) -> dict[str, float]:
        """One optimizer step. Returns its record: means over the global batch."""
        began = time.perf_counter()
        self.set_lr_factor(self._scheduled_factor())
        self._call_hooks("step_start")
        seed = (self.config.engine.seed * 1_000_003 + self.step) * 65_536 + self.rank
        torch.manual_seed(seed % 2**63)  # dropout (only NLVR's head has it) repeats in a run resumed on as many ranks
        self.engine.train()
        scale, may_overflow = scale_of(self.engine), can_fall(self.engine)
        waited = -batches.wait_seconds
        totals = self._accumulate(batches)
        waited += batches.wait_seconds
        counts = batches.counts()
        # The mean over ranks: one rank's slow disk shows on the others as a slow collective only.
        for name, number in {"waited": waited / self.world_size, **counts}.items():
            totals[name] = torch.tensor([number, 1 / self.world_size], dtype=torch.float64, device=self.device)
        means, self.stopped_early = self._reduce(totals)
        waited = means.pop("waited")
        self._counts = {name: self._counts_before.get(name, 0.0) + means.pop(name) for name in counts}
        self.step += 1
        seconds = time.perf_counter() - began
        samples = self.config.engine.global_batch_size
        share = float(totals["loss"][0])
        norm = self._record_finiteness(means["loss"], may_overflow)
        if self.nonfinite_streak:
            self._tell_nonfinite(means, share, batches)
        self.stopped_early = self.stopped_early and not self.nonfinite_streak  # the next finite step saves and stops
        return {
            "step": self.step,
            "samples": self.step * samples,
            **means,
            "lr": self.lr,
            "grad_norm": norm,
            "samples_per_second": samples / seconds,
            "step_seconds": seconds,
            "data/wait_fraction": waited / seconds,
            **self._counts,
            **({"optim/loss_scale": scale} if scale is not None else {}),
            **({"skipped_steps": self.skipped_steps} if self.skipped_steps else {}),
        }

    def _accumulate(self, batches: TrainingBatches) -> dict[str, Tensor]:
        """Forward and backward passes of one step. Returns {metric: [sum, count] of this rank, float64}."""
        totals: dict[str, Tensor] = {}
        for _ in range(self.accumulation_steps):
            mark(f"step {self.step + 1}, reading a batch")
            batch = next(batches)
            mark(f"step {self.step + 1}, computing")
            output = self.engine(batch)
            self.engine.backward(output.loss * self.world_size)
            self._call_hooks("backward_end")
            if batches.reads_ahead and not self.stop.requested:
                mark(f"step {self.step + 1}, reading the next batch")
                batches.look_ahead()  # while the device computes what was launched
                mark(f"step {self.step + 1}, computing")
            self.engine.step()
            one = torch.full((), 1 / self.world_size, dtype=torch.float64, device=self.device)
            for name, pair in {"loss": (output.loss, one), **output.metrics}.items():
                value = torch.stack(
                    [torch.as_tensor(x, dtype=torch.float64, device=self.device).detach() for x in pair]
                )
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _record_finiteness(self, loss: float, may_overflow: bool) -> float:
        """Update ``skipped_steps`` and ``nonfinite_streak``. Returns the gradient norm. The same on every rank.

        ``may_overflow``: gradients that are not finite, of a finite loss, are how a loss scale finds its height.
        """
        found = self.engine.get_global_grad_norm()
        norm = float(found) if found is not None else 0.0
        applied = self.engine.was_step_applied()
        self.skipped_steps += not applied
        finite = math.isfinite(loss) and ((applied and math.isfinite(norm)) or may_overflow)
        self.nonfinite_streak = 0 if finite else self.nonfinite_streak + 1
        return norm

    def _tell_nonfinite(self, means: dict[str, float], share: float, batches: TrainingBatches) -> None:
        """Log the last step, which is not finite, and store its samples (a dry run stores nothing).

        ``share``: this rank's, of the loss.
        """
        found = not_finite(means, gather(share))
        if self.is_main:
            shown = f"not finite: {', '.join(found['not_finite'])}"
            if not self.config.dry_run:
                shown = add_suspect(self.output_dir, self.step, NOT_FINITE, batches.samples_of(self.step), found)
            _log.warning("step %d: the loss or its gradient is not finite; left out; %s", self.step, shown)

    def _raise_if_diverged(self) -> None:
        """Raise UserError after too many non-finite steps, before a checkpoint of them replaces a finite one."""
        if self.nonfinite_streak < (MAX_NONFINITE_STREAK if self.step < self.total_steps else 1):
            return
        raise UserError(
            f"the run has diverged: since step {self.step - self.nonfinite_streak + 1} no loss or gradient was "
            f"finite; nothing was saved since, {self._advice()}"
        )

    def _check_range(self, loss: float, batches: TrainingBatches) -> None:
        """Log a loss that is finite but far out of its recent range; raise UserError if it stays there and
        ``optimizer.stop_on_divergence`` is set."""
        found = self._range.add(loss)
        if found is None:
            return
        if self.is_main:
            shown = add_suspect(self.output_dir, self.step, "loss", batches.samples_of(self.step), vars(found))
            _log.warning("step %d: %s; %s", self.step, found, shown)
        self._call_hooks("alert", "suspect loss", f"step {self.step}: {found}")
        if found.lasting and self.config.optimizer.stop_on_divergence:
            raise UserError(
                f"the run has diverged: step {self.step}: {found}; {self._advice()} (it ends by "
                "optimizer.stop_on_divergence)"
            )

    def _advice(self) -> str:
        last = newest_checkpoint(self.checkpoint_dir)
        return (
            f"the last checkpoint is {last.name if last else 'none'}; lower optimizer.lr or "
            "optimizer.gradient_clipping, or lengthen optimizer.warmup, in another output_dir"
        )

    def _reduce(self, totals: dict[str, Tensor]) -> tuple[dict[str, float], bool]:
        """Sum the (sum, count) pairs over ranks in one collective. Returns the means, and whether to stop."""
        names = sorted(totals)
        flag = torch.tensor([float(self.stop.requested), 0.0], dtype=torch.float64, device=self.device)
        packed = torch.stack([totals[name] for name in names] + [flag])
        dist.all_reduce(packed)
        values = packed.tolist()
        means = {name: total / count for name, (total, count) in zip(names, values, strict=False) if count > 0}
        return means, values[-1][0] > 0

    def _between_steps(self) -> None:
        """Evaluate and save: at their intervals, at the end, and on a stop request."""
        self.evaluation_due = self._ends or self._evaluations.due(self.step)
        self._evaluate()
        due = self._ends or self.stopped_early or self._checkpoints.due(self.step)
        if not self.nonfinite_streak and (due or self.step in self._kept.values()):
            self._save()
            self.stopped_early = self.stopped_early or stop_agreed(self.stop, self.device)

    def _evaluate(self) -> None:
        """Evaluate if it is due. A run that stops leaves it to the process that resumes."""
        if self.evaluate is None or not self.evaluation_due or self.stopped_early:
            return
        self.engine.eval()
        mark(f"the evaluation after step {self.step}")
        try:
            found = self.evaluate(self)
            self._call_hooks("evaluating", found)
        except StopError:
            self.stopped_early = not self.nonfinite_streak
            return
        self.evaluation_due = False
        self._call_hooks("evaluation_end", {"step": self.step, **found})

    def _save(self) -> None:
        state = {"step": self.step, "micro_batch_of_all_ranks": self.micro_batch_of_all_ranks}
        state |= {"counts": self._counts, "skipped_steps": self.skipped_steps, "identity": self.identity.tree()}
        state |= {"evaluation_due": self.evaluation_due, "loss_range": self._range.state()}
        state["schedule"] = schedule.stored(self.lr_factor, self.total_steps, self.config.optimizer, self._cooldown)
        mark(f"saving step {self.step}")
        states = collect_states(self.callbacks)
        files = {name: content for callback in self.callbacks for name, content in callback.rank_files().items()}
        path = checkpoint.save(self.engine, self.checkpoint_dir, self.step, self.topology, state, states, files)
        if self.is_main:
            checkpoint.prune(self.checkpoint_dir, self.config.checkpoint.keep, self._kept.values())
        self._call_hooks("checkpoint_saved", path)

    def _call_hooks(self, hook: str, *details: Any) -> None:
        for method in self._hooks[hook]:
            method(self, *details)
