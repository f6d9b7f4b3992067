"""Pre-training: masked prediction of pixels and words on image-text pairs.

deepspeed --module eve_ds.pretrain --config eve_ds/configs/X.yaml --data.path DIR --data.tokenizer T --output_dir RUN
"""

from __future__ import annotations

import sys
from pathlib import Path

from eve_ds.config import PretrainConfig, parse
from eve_ds.engine.signals import StopRequest
from eve_ds.environment import late_imports
from eve_ds.errors import STOPPED, run_command
from eve_ds.weights.model_folder import MODEL


def main() -> int:
    with StopRequest().handling() as stop:
        return run(stop)


def run(stop: StopRequest) -> int:
    """Train, while ``stop`` collects stop requests. Returns the exit code."""
    config = parse(PretrainConfig, sys.argv[1:], "python -m eve_ds.pretrain")
    stop.saves = not config.dry_run
    with late_imports():  # DeepSpeed takes seconds to import: after --help and bad options
        from eve_ds.callbacks import MemoryCheck, SecondCopy, standard_callbacks
        from eve_ds.callbacks.pretrain_examples import PretrainExamples
        from eve_ds.engine import batches, dry_run, first_weights, run_folder, setup, verification, watchdog
        from eve_ds.engine.distributed import check_world, joined, launched_world
        from eve_ds.engine.evaluation import held_out_metrics
        from eve_ds.engine.trainer import Trainer
        from eve_ds.engine.whole_weights import export_model
        from eve_ds.plan.auto import settle
        from eve_ds.plan.forecast import memory_gauge

    check_world(config.engine.expert_parallel_size, config.model.num_experts)
    callbacks, second = standard_callbacks(config), SecondCopy(config, stop)
    tokenizer = setup.build_tokenizer(config)
    training = setup.build_dataset(config, config.data.train_split, tokenizer, train=True)
    batches.check_batch(config, training.rows)
    steps = setup.total_steps(config, len(training))
    val_split = config.data.val_split
    held_out = setup.build_dataset(config, val_split, tokenizer, train=False) if val_split else None
    setup.check_apart(config, training, {} if held_out is None else {str(val_split): held_out})
    setup.check_classes(training, held_out)

    with joined(config.engine.timeout_seconds, config.engine.deterministic) as device, second:
        settle(config, training.num_classes, device)
        identity = run_folder.claim(config, setup.identity(config, training), steps)
        if not config.dry_run:
            watchdog.start(Path(config.output_dir), *launched_world()[:2], config.engine.timeout_seconds)
            setup.store_companions(config, tokenizer)
            second.begin(identity, steps)
        shards = [shard for samples in (training, held_out) if samples for shard in samples.split.hashed_shards]
        checks = verification.before_and_while(config.data.verify, shards)
        gauge = memory_gauge(config, training.num_classes, device)
        task = setup.build_task(config, tokenizer, training.num_classes)
        first_weights.load_first_weights(task, config, load_head=False)
        callbacks = [*checks, *callbacks, second, MemoryCheck(gauge)]  # checks first: a stop must not hide damaged data
        if held_out is not None and config.logging.samples > 0:
            shown = config.logging.samples, config.logging.images_every
            callbacks.append(PretrainExamples(config.spec, held_out, *shown))

        def evaluate(trainer: Trainer, limit: int | None = None) -> dict[str, float]:
            limit = limit or config.logging.eval_samples
            found = batches.evaluation_batches(config, held_out, limit, device=device) if held_out else iter(())
            return held_out_metrics(trainer, found)

        trainer = Trainer(config, task, steps, device, identity, callbacks, evaluate if held_out else None, stop)
        if config.dry_run:
            return dry_run.describe_training(config, trainer, training, gauge)
        start = trainer.resume()
        trainer.fit(batches.TrainingBatches(config, training, start, device, trainer.compiled))
        if trainer.stopped_early:
            return second.finish(STOPPED)
        if config.checkpoint.export:
            companions = config.spec.companions(config.data.home)
            export_model(task, config, tokenizer, Path(config.output_dir) / MODEL, trainer.step, companions)
        return second.finish(0)


if __name__ == "__main__":
    run_command(main)
