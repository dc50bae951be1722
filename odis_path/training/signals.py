"""Signals by which a scheduler ends a run."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """Whether a signal asked the run to save and stop; `release` gives the signals back when the run has ended."""

    requested: bool = False
    handlers_before: dict[int, Any] = field(default_factory=dict)

    def release(self) -> None:
        """Handle signals as before the run: a program that trains several networks can be ended between them."""
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.handlers_before.clear()


def watch_signals() -> StopRequest:
    """Note SIGTERM and SIGUSR1 (a scheduler's warning): the loop saves and stops after the step."""
    stop = StopRequest()

    def note(_number: int, _frame: FrameType | None) -> None:
        stop.requested = True

    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            number = getattr(signal, name)
            try:
                stop.handlers_before[number] = signal.signal(number, note)
            except ValueError:  # not the main thread: whoever embeds this loop stops it in their own way
                break
    return stop
