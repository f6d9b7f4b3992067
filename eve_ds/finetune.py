"""Fine-tuning and scoring on image-text retrieval, VQA and NLVR2.

deepspeed --module eve_ds.finetune --config C.yaml --task vqa --checkpoint RUN --data DIR --output_dir OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from eve_ds.config import FinetuneConfig, parse
from eve_ds.engine.signals import StopRequest
from eve_ds.environment import late_imports
from eve_ds.errors import STOPPED, run_command
from eve_ds.finetune_options import expand_options, help_text
from eve_ds.weights.model_folder import MODEL
from preprocessing.errors import UserError


def main() -> int:
    with StopRequest().handling() as stop:
        return run(stop)


def run(stop: StopRequest) -> int:
    """Train and score, while requests to stop are handled; returns the exit code."""
    argv, defaults = expand_options(sys.argv[1:])
    config = parse(FinetuneConfig, argv, "python -m eve_ds.finetune", defaults, help_text())
    _check_evaluate(config)
    stop.saves = not config.dry_run
    with late_imports():  # DeepSpeed takes seconds to import: after --help and bad options
        from eve_ds.callbacks import MemoryCheck, SecondCopy, standard_callbacks
        from eve_ds.engine import batches, dry_run, first_weights, run_folder, setup, verification, watchdog
        from eve_ds.engine.distributed import check_world, joined, launched_world
        from eve_ds.engine.loaded_head import settle_head
        from eve_ds.engine.scoring import Scorer
        from eve_ds.engine.trainer import Trainer
        from eve_ds.engine.whole_weights import export_model
        from eve_ds.plan.auto import settle
        from eve_ds.plan.forecast import memory_gauge

    check_world(config.engine.expert_parallel_size, config.model.num_experts)
    callbacks, second = standard_callbacks(config), SecondCopy(config, stop)
    tokenizer = setup.build_tokenizer(config)
    splits = [config.split] if config.evaluate or not config.data.val_split else [config.split, config.data.val_split]
    scored = {split: setup.build_dataset(config, split, tokenizer, train=False) for split in splits}
    training = None if config.evaluate else setup.build_dataset(config, config.data.train_split, tokenizer, train=True)
    setup.check_apart(config, training, scored)
    batches.check_batch(config, (training or scored[config.split]).rows)
    settle_head(config, argv, scored[config.split].num_classes)
    with joined(config.engine.timeout_seconds, config.engine.deterministic) as device, second:
        settle(config, scored[config.split].num_classes, device)
        steps = setup.total_steps(config, len(training)) if training is not None else None
        identity = run_folder.claim(config, setup.identity(config, training or scored[config.split]), steps)
        if not config.dry_run:
            watchdog.start(Path(config.output_dir), *launched_world()[:2], config.engine.timeout_seconds)
            setup.store_companions(config, tokenizer)
            second.begin(identity, steps)
        shards = [shard for samples in (training, *scored.values()) if samples for shard in samples.split.hashed_shards]
        checks = verification.before_and_while(config.data.verify, shards, trains=training is not None)
        gauge = memory_gauge(config, scored[config.split].num_classes, device)
        task = setup.build_task(config, tokenizer, scored[config.split].num_classes)
        files = first_weights.load_first_weights(task, config, config.load_head or config.evaluate)
        scorer = Scorer(config, scored, device, stop, files)
        if training is None or steps is None:
            if config.dry_run:
                return dry_run.describe_scoring(config, task, scored[config.split])
            setup.join_expert_groups(task)
            scorer.score(task.to(device), config.split, Path(config.output_dir))
            return second.finish(0)
        evaluate = scorer.while_training if config.data.val_split else None
        callbacks = [*checks, *callbacks, second, MemoryCheck(gauge)]  # checks first: a stop must not hide damaged data
        trainer = Trainer(config, task, steps, device, identity, callbacks, evaluate, stop)
        if config.dry_run:
            return dry_run.describe_training(config, trainer, training, gauge)
        trainer.fit(batches.TrainingBatches(config, training, trainer.resume(), device, trainer.compiled))
        if trainer.stopped_early:
            return second.finish(STOPPED)
        if config.checkpoint.export:
            companions = config.spec.companions(config.data.home)
            export_model(task, config, tokenizer, Path(config.output_dir) / MODEL, trainer.step, companions)
        with trainer.whole_weights():
            scorer.score_trained(task, config.split, Path(config.output_dir), trainer.step)
        return second.finish(0)


def _check_evaluate(config: FinetuneConfig) -> None:
    if config.zeroshot:
        if not config.spec.zeroshot:
            raise UserError(f"--zeroshot is for retrieval; score a model that was tuned for {config.task}: --evaluate")
        config.evaluate = True
    if config.evaluate and not config.init_from:
        raise UserError("--evaluate needs --checkpoint: a fine-tuned run, a model folder or a file of weights")
    if config.evaluate and config.resume_from:
        raise UserError(f"--evaluate trains nothing; score a checkpoint with --checkpoint {config.resume_from}")
    if config.published and not config.evaluate:
        raise UserError("--published is EVE's evaluation, which its training differs from; add --evaluate")


if __name__ == "__main__":
    run_command(main)
