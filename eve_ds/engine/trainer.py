"""The training loop. What cuts across it (logging, progress, samples) is a callback; what is learned is a task."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import checkpoint, first_weights, soundness
from eve_ds.engine.batches import TrainingBatches
from eve_ds.engine.callback import Callback
from eve_ds.engine.checkpoint_record import Manifest, Topology
from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.engine.divergence import SUSPECTS, LossRange
from eve_ds.engine.evaluation import stop_agreed
from eve_ds.engine.identity import Identity
from eve_ds.engine.optim import build_optimizer
from eve_ds.engine.schedule import lr_factor
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark
from eve_ds.errors import StopError, UserError
from eve_ds.tasks.base import Task
from eve_ds.weights.model_folder import newest_checkpoint

Batch = dict[str, Tensor]
Evaluate = Callable[["Trainer"], dict[str, float]]
MOST_UNSOUND = 10  # steps in a row without a finite loss and gradient, before the run counts as diverged
_OUTSIDE = -1  # no module's number in ZeRO 3's book of parameters in use


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class Trainer:
    """Trains ``task`` under DeepSpeed ZeRO for ``total_steps`` optimizer steps.

    Every task returns its share of the loss, such that the ranks' shares add up to the loss of the global micro-batch;
    DeepSpeed averages gradients over ranks, so each share is multiplied by the world size before the backward pass.

    Args:
        config: the resolved tree.
        task: the module to train, in fp32; DeepSpeed casts it.
        total_steps: optimizer steps of the whole run.
        device: this rank's.
        identity: of the run and of what it reads; a checkpoint of another one is refused.
        callbacks: told of steps, evaluations, checkpoints.
        evaluate: called every ``logging.eval_every`` steps and at the end; returns scalars for the log.
        stop: looked at between steps and between batches of an evaluation.
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
        self.stop = stop or StopRequest()
        self.task_name = getattr(config, "task", "pretrain")
        self.output_dir = Path(config.output_dir)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.step = self.start_step = 0
        self.stopped_early = False  # on request, and saved: something is left to do
        self.evaluation_due = False  # a request to stop came before it, or in it
        self.skipped_steps = 0  # whose gradients were not finite: DeepSpeed lets them move no weight
        self._unsound = 0  # steps in a row, up to now, whose loss or gradient was not finite
        self._range = LossRange()
        self.identity = identity
        self._counts: dict[str, float] = {}  # of all ranks, since the run began
        self._counts_before: dict[str, float] = {}  # before this process
        settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, self.world_size)
        self.accumulation_steps = settings["gradient_accumulation_steps"]
        self.micro_batch_of_all_ranks = settings["train_micro_batch_size_per_gpu"] * self.world_size  # samples
        zero = settings["zero_optimization"]
        self.topology = Topology(self.world_size, config.engine.expert_parallel_size, zero["stage"])
        offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        optimizer = build_optimizer(task, config.optimizer, offload, device)
        mark("the set-up of DeepSpeed")
        self.engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings)

    @property
    def checkpoint_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    def resume(self) -> int:
        """Load the newest sound checkpoint of this run, or that which it branches from; returns the step to go on from.

        The ranks, the expert-parallel size and the ZeRO stage may be others than those that wrote it.
        """
        found = soundness.sound(self.checkpoint_dir)
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
            self._tell_changes(path, manifest)
        return self.start_step

    def _tell_changes(self, path: Path, manifest: Manifest) -> None:
        if not self.is_main:
            return
        if differences := manifest.topology.differences(self.topology):
            print(f"{path}: written with {differences}; converted", file=sys.stderr, flush=True)
        before, now = manifest.state.get("micro_batch_of_all_ranks"), self.micro_batch_of_all_ranks
        if before not in (None, now):
            print(
                f"a micro-batch of all ranks had {before} samples and has {now} now: each step sees the same samples, "
                f"but means are taken over other sets of them; engine.micro_batch_size x ranks = {before} keeps them",
                file=sys.stderr,
                flush=True,
            )

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """In it the task's weights are whole on this rank (but for other ranks' experts), for calls past the engine."""
        if self.topology.zero_stage < 3:
            yield
            return
        parameters: list[Any] = list(self.task.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:  # in use by a module that never ends: else the next one to end lets them go
                parameter.ds_active_sub_modules.add(_OUTSIDE)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_OUTSIDE)

    def fit(self, batches: TrainingBatches) -> None:
        """Train from ``start_step`` to ``total_steps`` on micro-batches that begin with the next sample to be seen."""
        try:
            with self.stop.deferred():
                self._tell("fit_start")
                self._evaluate()
                while self.step < self.total_steps and not self.stopped_early:
                    record = self._train_step(batches)
                    self._tell("step_end", record)
                    self._check_sound()
                    self._check_range(record["loss"], batches)
                    self._between_steps()
                if self.stopped_early:
                    self.stop.acted_on()
                mark(f"the end, after step {self.step}")
                self._tell("fit_end")
        finally:
            batches.close()
            for callback in self.callbacks:
                callback.close(self)

    def _train_step(self, batches: TrainingBatches) -> dict[str, float]:
        """One optimizer step; returns its record: means over the global batch."""
        began = time.perf_counter()
        seed = (self.config.engine.seed * 1_000_003 + self.step) * 65_536 + self.rank
        torch.manual_seed(seed % 2**63)  # dropout (of NLVR's head alone): a resumed run on as many ranks repeats it
        lr = self._set_lr()
        self.engine.train()
        totals: dict[str, Tensor] = {}
        waited = 0.0
        for _ in range(self.accumulation_steps):
            asked = time.perf_counter()
            mark(f"step {self.step + 1}, reading a batch")
            batch = to_device(next(batches), self.device)
            waited += time.perf_counter() - asked
            mark(f"step {self.step + 1}, computing")
            output = self.engine(batch)
            self.engine.backward(output.loss * self.world_size)
            self.engine.step()
            share = torch.stack(
                [output.loss.detach().double(), torch.ones((), dtype=torch.float64, device=self.device)]
            )
            share[1] /= self.world_size
            for name, pair in {"loss": share, **output.metrics}.items():
                value = torch.stack(
                    [torch.as_tensor(x, dtype=torch.float64, device=self.device).detach() for x in pair]
                )
                totals[name] = totals[name] + value if name in totals else value
        counts = batches.counts()
        # The ranks' mean: of one rank's slow disk, the others see nothing but a slow collective.
        for name, number in {"waited": waited / self.world_size, **counts}.items():
            totals[name] = torch.tensor([number, 1 / self.world_size], dtype=torch.float64, device=self.device)
        means, self.stopped_early = self._reduce(totals)
        waited = means.pop("waited")
        self._counts = {name: self._counts_before.get(name, 0.0) + means.pop(name) for name in counts}
        self.step += 1
        seconds = time.perf_counter() - began
        samples = self.config.engine.global_batch_size
        norm = self._judge(means["loss"])
        self.stopped_early = self.stopped_early and not self._unsound  # the next sound step saves, and stops
        return {
            "step": self.step,
            "samples": self.step * samples,
            **means,
            "lr": lr,
            "grad_norm": norm,
            "samples_per_second": samples / seconds,
            "step_seconds": seconds,
            "data/wait_fraction": waited / seconds,
            **self._counts,
            **({"skipped_steps": self.skipped_steps} if self.skipped_steps else {}),
        }

    def _judge(self, loss: float) -> float:
        """Count a step whose loss or gradient is not finite; returns the gradient's norm. The same on every rank."""
        found = self.engine.get_global_grad_norm()
        norm = float(found) if found is not None else 0.0
        applied = self.engine.was_step_applied()
        self.skipped_steps += not applied
        sound = applied and math.isfinite(loss) and math.isfinite(norm)
        self._unsound = 0 if sound else self._unsound + 1
        if not sound and self.is_main:
            print(f"step {self.step}: the loss or its gradient is not finite; left out", file=sys.stderr, flush=True)
        return norm

    def _check_sound(self) -> None:
        """Raise UserError when the run has diverged: before it is saved over what was still sound."""
        if self._unsound < (MOST_UNSOUND if self.step < self.total_steps else 1):
            return
        raise UserError(
            f"the run has diverged: since step {self.step - self._unsound + 1} no loss or gradient was finite; nothing "
            f"was saved since, {self._what_to_do()}"
        )

    def _check_range(self, loss: float, batches: TrainingBatches) -> None:
        """Tell, or raise UserError if that is wished, when the loss is finite but far out of its recent range."""
        found = self._range.add(loss)
        if found is None:
            return
        if self.is_main:
            samples = batches.samples_of(self.step)
            with open(self.output_dir / SUSPECTS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **vars(found), "samples": samples}) + "\n")
            shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
            print(
                f"WARNING: step {self.step}: {found}; its samples are {shown} (all {len(samples)}: "
                f"{self.output_dir / SUSPECTS})",
                file=sys.stderr,
                flush=True,
            )
        if found.lasting and self.config.optimizer.stop_on_divergence:
            raise UserError(
                f"the run has diverged: step {self.step}: {found}; {self._what_to_do()} (it ends by "
                "optimizer.stop_on_divergence)"
            )

    def _what_to_do(self) -> str:
        last = newest_checkpoint(self.checkpoint_dir)
        return (
            f"the last checkpoint is {last.name if last else 'none'}; lower optimizer.lr or "
            "optimizer.gradient_clipping, or lengthen optimizer.warmup, in another output_dir"
        )

    def _set_lr(self) -> float:
        factor = lr_factor(self.step, self.total_steps, self.config.optimizer)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.config.optimizer.lr * factor

    def _reduce(self, totals: dict[str, Tensor]) -> tuple[dict[str, float], bool]:
        """Sum the (sum, count) pairs over ranks in one collective; any rank's wish to stop stops all."""
        names = sorted(totals)
        flag = torch.tensor([float(self.stop.requested), 0.0], dtype=torch.float64, device=self.device)
        packed = torch.stack([totals[name] for name in names] + [flag])
        dist.all_reduce(packed)
        values = packed.tolist()
        means = {name: total / count for name, (total, count) in zip(names, values, strict=False) if count > 0}
        return means, values[-1][0] > 0

    def _between_steps(self) -> None:
        """Evaluate and save when it is time, at the end, and on a request to stop."""
        last = self.step == self.total_steps
        every = self.config.logging.eval_every
        self.evaluation_due = last or (every > 0 and self.step % every == 0)
        self._evaluate()
        every = self.config.checkpoint.every
        if not self._unsound and (last or self.stopped_early or (every and self.step % every == 0)):
            self._save()
            self.stopped_early = self.stopped_early or stop_agreed(self.stop, self.device)

    def _evaluate(self) -> None:
        """Evaluate, if it is due; a run that is to stop leaves it to the one that goes on."""
        if self.evaluate is None or not self.evaluation_due or self.stopped_early:
            return
        self.engine.eval()
        mark(f"the evaluation after step {self.step}")
        try:
            found = self.evaluate(self)
        except StopError:
            self.stopped_early = not self._unsound
            return
        self.evaluation_due = False
        self._tell("evaluation_end", {"step": self.step, **found})

    def _save(self) -> None:
        state = {"step": self.step, "micro_batch_of_all_ranks": self.micro_batch_of_all_ranks}
        state |= {"counts": self._counts, "skipped_steps": self.skipped_steps, "identity": self.identity.tree()}
        state |= {"evaluation_due": self.evaluation_due, "loss_range": self._range.state()}
        mark(f"saving step {self.step}")
        path = checkpoint.save(self.engine, self.checkpoint_dir, self.step, self.topology, state)
        if self.is_main:
            checkpoint.prune(self.checkpoint_dir, self.config.checkpoint.keep)
        self._tell("checkpoint_saved", path)

    def _tell(self, event: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)
