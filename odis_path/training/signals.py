"""Signals by which a scheduler ends a run."""

from __future__ import annotations

import signal
from typing import Any


def watch_signals() -> dict[str, bool]:
    """Note SIGTERM and SIGUSR1 (a scheduler's warning): the loop saves and stops after the step."""
    asked = {"asked": False}

    def note(_number: int, _frame: Any) -> None:
        asked["asked"] = True

    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            try:
                signal.signal(getattr(signal, name), note)
            except ValueError:  # not the main thread: whoever embeds this loop stops it in their own way
                break
    return asked
