"""One function over many items: worker processes or a Dask cluster, one progress bar, a table of failures.

A bad item becomes a failed `Outcome` and the rest go on; so does one that hangs or whose worker process dies. Several runs
may share a folder: what another run is at is left to it, and looked at again in the end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from annotations.errors import UserError
from tiling.claim import is_claimed, sweep
from tiling.outcome import BUSY, DIED, FULL, STOPS, Job, Outcome, guarded, one_line
from tiling.sight import Sight, witnessed

__all__ = ["DIED", "Outcome", "available_cpus", "finish", "one_line", "run_cohort"]

Item = TypeVar("Item")

PLAIN_LINE_EVERY_S = 30.0
MOST_FULL = 2  # so many items for which the disk was full end the run: after one, a smaller item may still fit
POLL_S = 0.5  # how often the locks of other runs are looked at, in the end
NOT_TRIED = "not tried: stopped before it"


def available_cpus() -> int:
    """CPUs this process may use (its affinity, not the size of the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def run_cohort(
    items: Iterable[Item],
    work: Callable[[Item], dict | None],
    *,
    title: str,
    workers: int | None = None,
    scheduler: str | None = None,
    name: Callable[[Item], str] = str,
    timeout: float | None = None,
    folder: Path | None = None,
    wrote: Callable[[Item], Path] | None = None,
) -> list[Outcome]:
    """Apply `work` to every item; return one `Outcome` per item, in the order of the items.

    `work` returns a dict of small picklable values; its keys `skipped` (bool) and `message` (str) are taken out.
    With more than one worker, a scheduler or a timeout, `work` and the items must be picklable (a module-level function or
    a `functools.partial` of one). workers None: one per available CPU; with 1, and no timeout, the work is done in this
    process. scheduler: address of a Dask scheduler, or a path to its scheduler file. timeout: seconds after which an item
    is given up. folder: where `work` writes; what killed runs left there is removed. wrote: the file in which an item that
    is done is (picklable): one that a cluster's worker says it wrote, but this machine does not see, is a failure.
    Raises UserError where the scheduler cannot be reached, for a timeout that cannot be, and where worker processes
    cannot start.
    """
    if timeout is not None and not timeout > 0:
        raise UserError(f"--timeout {timeout:g}: is a number of seconds above 0")
    work_list = list(items)
    names = [name(item) for item in work_list]
    outcomes: list[Outcome | None] = [None] * len(work_list)
    locked: dict[int, Path] = {}
    full: list[int] = []
    todo: deque[int] = deque(range(len(work_list)))
    stop = threading.Event()
    if scheduler and wrote is not None:
        work = partial(witnessed, work=work, wrote=wrote)
    sight = Sight()

    def done(index: int, outcome: Outcome) -> None:
        if BUSY in outcome.info:
            locked[index] = Path(outcome.info[BUSY])
            return
        outcomes[index] = outcome = sight.judged(outcome)
        progress.advance(outcome)
        full.extend([index] * outcome.info.pop(FULL, False))
        if outcome.info.pop(STOPS, False) or len(full) >= MOST_FULL:
            stop.set()
            todo.clear()  # whatever comes next would fail as well
            locked.clear()

    with _Progress(title, len(work_list)) as progress:
        _swept(folder)
        job = Job(work_list, names, work, todo, done, timeout)
        while todo:
            _run(job, workers, scheduler, stop.is_set)
            todo.extend(_freed(locked, title))
        _swept(folder)
    return [each or Outcome(names[i], ok=False, message=NOT_TRIED) for i, each in enumerate(outcomes)]


def _run(job: Job, workers: int | None, scheduler: str | None, stopped: Callable[[], bool]) -> None:
    wanted = min(available_cpus() if workers is None else max(1, workers), len(job.todo))
    if scheduler:
        from tiling.cluster import run_dask

        run_dask(job, scheduler, stopped)
    elif wanted > 1 or job.timeout is not None:
        from tiling.lanes import run_lanes

        run_lanes(job, wanted)
    else:
        while job.todo:
            index = job.todo.popleft()
            job.done(index, guarded(job.work, job.items[index], job.names[index]))


def _freed(locked: dict[int, Path], title: str) -> list[int]:
    """Wait until other runs have let go of some of the `locked` items; take those out and return them."""
    said = False
    while locked:
        time.sleep(POLL_S)
        if free := [index for index, lock in locked.items() if not is_claimed(lock)]:
            for index in free:
                del locked[index]
            return free
        if not said:
            said = True
            print(f"{title}: waiting for another run that works on the last {len(locked)} here", file=sys.stderr, flush=True)
    return []


def _swept(folder: Path | None) -> None:
    if folder is not None:
        sweep(folder)


class _Progress:
    """One bar with an ETA on a terminal, a line now and then elsewhere; both on stderr."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.count = self.failed = 0
        self.worked, self.worked_s, self.seconds = 0, 0.0, 0.0  # items that were not skipped, and their time; that of all
        self.last_failed = ""
        self.bar: Any = None
        self.task: Any = None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> _Progress:
        if self.total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            more = (TextColumn("ETA"), Remaining(), TextColumn("{task.fields[remark]}"))
            self.bar = Progress(*columns, *more, console=Console(stderr=True))
            self.task = self.bar.add_task(self.title, total=self.total, remark="")
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, outcome: Outcome) -> None:
        self.count += 1
        self.failed += not outcome.ok
        self.seconds += outcome.seconds
        if not outcome.skipped:
            self.worked += 1
            self.worked_s += outcome.seconds
        if not outcome.ok:
            self.last_failed = outcome.item
        remark = f"{self.failed} failed (last: {self.last_failed})" if self.failed else ""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, remark=remark)
        elif time.monotonic() - self.last_line > PLAIN_LINE_EVERY_S:
            self.last_line = time.monotonic()
            print(f"{self.title}: {self.count}/{self.total} {remark} {self._eta()}", file=sys.stderr, flush=True)

    def _eta(self) -> str:
        """What is left takes as long as what was not skipped did, in its share of the time since the start."""
        if not self.worked:
            return ""
        share = self.worked_s / self.seconds if self.seconds else 1.0
        each = (time.monotonic() - self.started) * share / self.worked
        return f"ETA {each * (self.total - self.count):.0f} s"


def finish(
    outcomes: Sequence[Outcome], title: str, out: Path | str, columns: Sequence[str] = (), wall_s: float | None = None
) -> int:
    """Print a summary, a table of failures and where the output is; return the exit code (1 where an item failed).

    columns: keys of `Outcome.info`, numbers to be summed over the items. wall_s: seconds by the clock on the wall, which
    several workers share; theirs are summed in a column of their own. Off a terminal a failure stays on one line.
    """
    from rich.console import Console
    from rich.table import Table

    untried = [outcome for outcome in outcomes if outcome.message == NOT_TRIED]
    failures = [outcome for outcome in outcomes if not outcome.ok and outcome.message != NOT_TRIED]
    console = Console(width=None if sys.stdout.isatty() else 160)
    skipped = sum(outcome.skipped for outcome in outcomes)
    summary = Table(title=title, title_justify="left")
    values = {"done": len(outcomes) - skipped - len(failures) - len(untried), "skipped": skipped, "failed": len(failures)}
    if untried:
        values["not tried"] = len(untried)
    sums = {key: sum(outcome.info.get(key, 0) for outcome in outcomes) for key in columns}
    times = {} if wall_s is None else {"seconds": float(wall_s)}
    times["worker seconds"] = float(sum(outcome.seconds for outcome in outcomes))
    shown = {**values, **sums, **times}
    for head in shown:
        summary.add_column(head, justify="right")
    summary.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in shown.values()))
    for line in _notes(outcomes):  # before the rest: there may be thousands
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(summary)
    show_failures(failures)
    if untried:
        line = f"not tried: {len(untried)}, from {untried[0].item} on: put right what stopped the run, then run it again"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"output: {out}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures or untried else 0


def show_failures(failures: Sequence[Outcome], title: str = "failures") -> int:
    """Print a table of failures, each on one line where the output is no terminal; return their number."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if failures:
        longest = max(len(outcome.item) for outcome in failures) + max(len(outcome.message) for outcome in failures)
        table = Table("item", "problem", title=title, title_justify="left")
        for outcome in failures:
            table.add_row(Text(outcome.item), Text(outcome.message))
        Console(width=None if sys.stdout.isatty() else max(160, longest + 20)).print(table)
    return len(failures)


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Why items were made anew, and what is remarked on them: one line a reason and a remark, however many items have it."""
    fine = [outcome for outcome in outcomes if outcome.ok]
    anew = _grouped((outcome.item, str(outcome.info.get("redone") or "")) for outcome in fine)
    remarks = _grouped((outcome.item, outcome.message) for outcome in fine)
    return [f"note: made anew: {line}" for line in anew] + [f"note: {line}" for line in remarks]


def _grouped(said: Iterable[tuple[str, str]]) -> list[str]:
    """(item, text) -> lines "item and 3 more: text", in the order of the first items; empty texts are left out."""
    items: dict[str, list[str]] = {}
    for item, text in said:
        if text:
            items.setdefault(text, []).append(item)
    return [f"{who[0]}{f' and {len(who) - 1} more' if len(who) > 1 else ''}: {text}" for text, who in items.items()]
