"""The outcome of one item of a cohort, and the guard that turns any exception into one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotations.errors import UserError, one_line
from tiling.storage.atomic import DiskFullError
from tiling.storage.locks import FileLockedError
from tiling.storage.paths import restore_slashes

DIED = "the worker process died (out of memory, or killed from outside)"
SHOWN_IDS = 5  # annotations that a note names by their ids


@dataclass(frozen=True)
class Note:
    """A remark on an item that went well: "3 points skipped", "1 left out, no area (annotation a7)".

    text: its words, by which notes of several items are one. count: the number in front of them, 0 where they have none.
    ids: the annotations it is about, as far as they are known.
    """

    text: str
    count: int = 0
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        number = f"{self.count} " if self.count else ""
        names = ", ".join([*self.ids[:SHOWN_IDS], *(["..."] if len(self.ids) > SHOWN_IDS else [])])
        return f"{number}{self.text}{f' (annotation {names})' if names else ''}"


def notes_of(*notes: Note | str) -> list[Note]:
    """Notes, and texts as notes without a number; empty texts are left out."""
    return [note if isinstance(note, Note) else Note(note) for note in notes if note]


def joined(notes: Iterable[Note | str]) -> str:
    """Notes in one line."""
    return "; ".join(str(note) for note in notes if note)


@dataclass
class ItemResult:
    """What the work on one item returns.

    info: numbers for the summary, and other small picklable values for the command. redone: why an item that was there was
    made anew. skipped: it was done already.
    """

    info: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    redone: str = ""
    skipped: bool = False


Work = Callable[[Any], ItemResult | None]  # what is done with one item of a cohort


@dataclass
class Outcome:
    """The outcome of one item of a cohort.

    item: its name as shown. ok: it worked or was skipped. error: why it failed, one line. seconds: time spent on it.
    skipped, notes, redone, info: as `ItemResult` has them.
    """

    item: str
    ok: bool
    skipped: bool = False
    error: str = ""
    notes: list[Note] = field(default_factory=list)
    redone: str = ""
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    # For the run alone: the lock that another run holds on the item; the disk was full; no item is to be tried any more; the
    # file a cluster's worker wrote, and its mtime in ns as seen there.
    lock: Path | None = field(default=None, repr=False)
    disk_full: bool = field(default=False, repr=False)
    ends_run: bool = field(default=False, repr=False)
    written: tuple[Path, int] | None = field(default=None, repr=False)

    @property
    def message(self) -> str:
        """The failure and the notes in one line; empty where there are none."""
        return joined([self.error, *self.notes])


@dataclass
class Job:
    """One pass over some items: `work` on items[i], called names[i], for every i of `todo` (taken from its front).

    done: called with index and outcome of each item as they come. timeout: seconds an item may take, or None. wrote: the file
    in which an item that is done is, asked of a cluster's workers; None: not asked.
    """

    items: Sequence[Any]
    names: Sequence[str]
    work: Work
    todo: deque[int]
    done: Callable[[int, Outcome], None]
    timeout: float | None = None
    wrote: Callable[[Any], Path] | None = None

    def fail(self, index: int, error: str, seconds: float = 0.0) -> None:
        self.done(index, Outcome(self.names[index], ok=False, error=error, seconds=seconds))


def describe_error(error: BaseException) -> str:
    """An exception in one line: a `UserError` speaks for itself, anything else is shown with its type."""
    text = restore_slashes(one_line(error))
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def timed_out(timeout: float) -> str:
    """The message for an item that took longer than `timeout` seconds."""
    return f"no result after {timeout:g} s (--timeout): its reader hangs, or it needs more time"


def guarded(work: Work, item: Any, name: str) -> Outcome:
    """Run `work` on one item and turn whatever happens into an `Outcome` (runs in the worker)."""
    begin = time.perf_counter()
    try:
        result = work(item) or ItemResult()
        outcome = Outcome(name, True, result.skipped, notes=result.notes, redone=result.redone, info=result.info)
    except FileLockedError as locked:
        outcome = Outcome(name, ok=False, error="another run works on it", lock=locked.lock)
    except Exception as error:  # a bad item must not stop the cohort
        outcome = Outcome(name, ok=False, error=describe_error(error), disk_full=isinstance(error, DiskFullError))
    outcome.seconds = time.perf_counter() - begin
    return outcome
