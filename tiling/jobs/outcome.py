"""The outcome of one item of a cohort, and the guard that turns any exception into one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from annotations.errors import UserError, one_line
from tiling.storage.atomic import DiskFullError
from tiling.storage.locks import FileLockedError
from tiling.storage.paths import with_slashes

DIED = "the worker process died (out of memory, or killed from outside)"
# Keys of Outcome.info: the lock another run holds; the disk was full; nothing more is to be tried.
BUSY, FULL, STOPS = "busy", "full", "stops"


@dataclass
class Outcome:
    """The outcome of one item of a cohort.

    item: its name as shown. ok: it worked or was skipped. skipped: it was done already. message: one line, the
    failure or a remark. seconds: time spent on it. info: what else the work function returned; its key `redone` says why
    an item that was there was made anew.
    """

    item: str
    ok: bool
    skipped: bool = False
    message: str = ""
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """One pass over some items: `work` on items[i], called names[i], for every i of `todo` (taken from its front).

    timeout: seconds an item may take, or None. done: is told index and outcome of each item as they come.
    """

    items: Sequence[Any]
    names: Sequence[str]
    work: Callable[[Any], dict | None]
    todo: deque[int]
    done: Callable[[int, Outcome], None]
    timeout: float | None = None

    def fail(self, index: int, message: str, seconds: float = 0.0) -> None:
        self.done(index, Outcome(self.names[index], ok=False, message=message, seconds=seconds))


def describe_error(error: BaseException) -> str:
    """An exception in one line: a `UserError` speaks for itself, anything else is shown with its type."""
    text = with_slashes(one_line(error))
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def timed_out(timeout: float) -> str:
    """The message for an item that took longer than `timeout` seconds."""
    return f"no result after {timeout:g} s (--timeout): its reader hangs, or it needs more time"


def guarded(work: Callable[[Any], dict | None], item: Any, name: str) -> Outcome:
    """Run `work` on one item and turn whatever happens into an `Outcome` (runs in the worker)."""
    begin = time.perf_counter()
    info: dict[str, Any] = {}
    try:
        info = dict(work(item) or {})
        ok, skipped, message = True, bool(info.pop("skipped", False)), str(info.pop("message", ""))
    except FileLockedError as busy:
        ok, skipped, message, info = False, False, "another run works on it", {BUSY: str(busy.lock)}
    except Exception as error:  # a bad item must not stop the cohort
        ok, skipped, message = False, False, describe_error(error)
        info = {FULL: True} if isinstance(error, DiskFullError) else {}
    return Outcome(name, ok, skipped, message, time.perf_counter() - begin, info)
