"""Whether what a cluster's workers write is where this machine sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiling.outcome import Outcome

WRITTEN = "written"  # key of Outcome.info: path and time (mtime, ns) of the file an item is in, as its worker sees it
PATIENCE_S = 10.0  # what a network mount may take to show a file of another machine
SLACK_NS = 2 * 10**9  # file systems keep times more or less finely
UNSEEN = "the worker wrote it where this machine does not see it: is --out on a shared disk?"


def witnessed(item: Any, work: Callable[[Any], dict | None], wrote: Callable[[Any], Path]) -> dict[str, Any]:
    """`work` on an item, and what its worker sees of the file it wrote or found done (runs in the worker)."""
    info = dict(work(item) or {})
    path = wrote(item)
    return {**info, WRITTEN: (str(path), _time_ns(path))}


class Sight:
    """Looks for the files of items that are done; waits for one that is not there, and after one that never came no longer."""

    def __init__(self) -> None:
        self.until: float | None = None

    def judged(self, outcome: Outcome) -> Outcome:
        """The outcome, a failure where the file its worker wrote is not seen from here. Others stay as they are."""
        written = outcome.info.pop(WRITTEN, None)
        if written is None or not outcome.ok:
            return outcome
        path, time_ns = Path(written[0]), written[1]
        while _time_ns(path) < max(0, time_ns - SLACK_NS):  # an old one of that name is not what was written
            self.until = self.until or time.monotonic() + PATIENCE_S
            if time.monotonic() > self.until:
                return replace(outcome, ok=False, skipped=False, message=f"{path}: {UNSEEN}")
            time.sleep(0.2)
        self.until = None
        return outcome


def _time_ns(path: Path) -> int:
    """mtime in ns, asked of an open file, which network mounts do not answer from memory; -1 where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return -1
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
