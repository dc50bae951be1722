"""Signals by which a scheduler ends a run."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether a signal asked the run to save and stop."""

    requested: bool = False


def watch_signals() -> StopRequest:
    """Note SIGTERM and SIGUSR1 (a scheduler's warning): the loop saves and stops after the step."""
    stop = StopRequest()

    def note(_number: int, _frame: FrameType | None) -> None:
        stop.requested = True

    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            try:
                signal.signal(getattr(signal, name), note)
            except ValueError:  # not the main thread: whoever embeds this loop stops it in their own way
                break
    return stop
