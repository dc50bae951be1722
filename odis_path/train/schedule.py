"""Schedules as pure functions of the step."""

from __future__ import annotations

from math import cos, pi
from typing import NamedTuple

from odis_path.train.config import PretrainConfig


class StepValues(NamedTuple):
    """What changes from step to step."""

    lr: float
    weight_decay: float
    ema: float
    teacher_temperature: float
    last_layer_frozen: bool
    backbone_frozen: bool


def cosine(start: float, end: float, at: float) -> float:
    """From `start` at 0 to `end` at 1 along half a cosine."""
    return end + 0.5 * (start - end) * (1 + cos(pi * min(1.0, max(0.0, at))))


def step_values(config: PretrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> StepValues:
    """All scheduled values at a step (0-based), as in DINO's recipe: warm-up then cosine, per step, not per epoch."""
    o, loss = config.optim, config.loss
    peak = o.lr * o.batch_size / 256
    warm = min(int(o.warmup_epochs * steps_per_epoch), total_steps - 1)
    if step < warm:
        lr = peak * (step + 1) / warm
    else:
        lr = cosine(peak, min(o.min_lr, peak), (step - warm) / max(1, total_steps - warm))
    at = step / max(1, total_steps)
    heat = loss.teacher_temperature_epochs * steps_per_epoch
    low, high = loss.teacher_temperature
    temperature = high if heat <= 0 else low + (high - low) * min(1.0, step / heat)
    return StepValues(
        lr,
        cosine(*o.weight_decay, at),
        cosine(*o.ema, at),
        temperature,
        step < o.freeze_last_layer_epochs * steps_per_epoch,
        step < o.freeze_backbone_epochs * steps_per_epoch,
    )
