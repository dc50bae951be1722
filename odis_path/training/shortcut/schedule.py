"""Schedules that do not fit the length of a run."""

from __future__ import annotations

from math import exp, log

from odis_path.config import PretrainConfig
from odis_path.training.optim import ema_ends, start_left, warmup_epochs

MOST_OF_START = 0.05  # of the teacher's start weights at the end of the run
MOST_WARMUP = 1 / 3  # of the run
_LEAST_OF_START = 0.01  # what the proposed momentum leaves


def schedule_warnings(config: PretrainConfig, steps_per_epoch: int, total_steps: int) -> list[str]:
    """List what in the schedules does not fit a run of that many steps, each with the keys to change."""
    o = config.optim
    warnings = []
    ema, epochs = ema_ends(o, total_steps), warmup_epochs(o)
    left = start_left(ema, total_steps)
    if left > MOST_OF_START:
        warnings.append(
            f"after {total_steps} steps the teacher still holds {left:.0%} of its start weights: "
            f"{_quicker(ema, total_steps)} (now [{ema[0]:g}, {ema[1]:g}]), or train longer (optim.epochs)"
        )
    warm = epochs * steps_per_epoch
    if warm > MOST_WARMUP * total_steps:
        cut = f", cut to {total_steps - 1}" if warm > total_steps - 1 else ""
        fitting = 0.1 * total_steps / steps_per_epoch
        warnings.append(
            f"the warm-up takes {warm:.0f} of {total_steps} steps{cut}: lower optim.warmup_epochs (now {epochs:g}) to "
            f"{fitting:.2g}, a tenth of the run, or train longer (optim.epochs)"
        )
    return warnings


def _quicker(ema: tuple[float, float], total_steps: int) -> str:
    """Propose a pair of momenta that leaves _LEAST_OF_START: a lower start, and a lower end where that is not enough."""
    mean = exp(log(_LEAST_OF_START) / total_steps)  # of the momentum over the run, which half a cosine averages
    start = 2 * mean - ema[1]
    if start < 0.5:
        return f"set optim.ema=[{mean:.2g},{mean:.2g}]"
    return f"set optim.ema=[{int(start * 1000) / 1000:g},{ema[1]:g}]"
