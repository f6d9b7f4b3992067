"""The dynamic loss scale of an fp16 run: DeepSpeed's scaler, seen by the trainer.

The loss is multiplied by the scale before the backward pass, so that small gradients are not rounded to zero in fp16.
Where gradients overflow, DeepSpeed leaves the step out and, after ``fp16.hysteresis`` of them, halves the scale; after
``fp16.loss_scale_window`` steps without, it doubles it. Such steps are no fault of the data: they are counted as
skipped, but neither stored as suspects nor taken for divergence, unless the scale is at ``fp16.min_loss_scale``
already. Checkpoints hold the scaler.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler


def scaler_of(engine: Any) -> DynamicLossScaler | None:
    """The engine's scaler; None in bf16 and fp32. A load replaces it, so it is asked for anew each time."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not isinstance(scaler, DynamicLossScaler):
        return None
    scaler.raise_error_at_min_scale = False  # the trainer ends such a run, with a message of its own
    return scaler


def scale_of(engine: Any) -> float | None:
    """The factor on the loss of the next step; None in bf16 and fp32."""
    scaler = scaler_of(engine)
    return None if scaler is None else float(scaler.cur_scale)


def can_fall(engine: Any) -> bool:
    """Whether an overflow in the next step may be the scale's fault rather than the gradient's."""
    scaler = scaler_of(engine)
    return scaler is not None and scaler.cur_scale > scaler.min_scale


def keep_settings(engine: Any, own: Any) -> None:
    """After a load: the scale and its counts are the checkpoint's, the settings those of ``own``, the scaler before."""
    if (loaded := scaler_of(engine)) is not None:
        for name in ("scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis"):
            setattr(loaded, name, getattr(own, name))
