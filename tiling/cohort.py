"""One function over many items: a process pool or a Dask cluster, one progress bar, a table of failures.

The work is written once against `concurrent.futures.Executor`. A bad item becomes a failed `Outcome` and the rest go
on; a worker process that dies takes only its own item with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from annotations.errors import UserError

Item = TypeVar("Item")

DIED = "the worker process died (out of memory, or killed from outside)"
PLAIN_LINE_EVERY_S = 30.0


@dataclass
class Outcome:
    """What became of one item.

    item: its name as shown. ok: it worked or was skipped. skipped: it was done already. message: one line, the
    failure or a remark. seconds: time spent on it. info: what else the work function returned.
    """

    item: str
    ok: bool
    skipped: bool = False
    message: str = ""
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)


def available_cpus() -> int:
    """CPUs this process may use (its affinity, not the size of the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def one_line(error: BaseException) -> str:
    """An exception in one line: a `UserError` speaks for itself, anything else is shown with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _guarded(work: Callable[[Any], dict | None], item: Any, name: str) -> Outcome:
    """Run `work` on one item and turn whatever happens into an `Outcome` (runs in the worker)."""
    begin = time.perf_counter()
    try:
        info = dict(work(item) or {})
    except Exception as error:  # a bad item must not stop the cohort
        return Outcome(name, ok=False, message=one_line(error), seconds=time.perf_counter() - begin)
    skipped, message = bool(info.pop("skipped", False)), str(info.pop("message", ""))
    return Outcome(name, True, skipped, message, time.perf_counter() - begin, info)


def run_cohort(
    items: Iterable[Item],
    work: Callable[[Item], dict | None],
    *,
    title: str,
    workers: int | None = None,
    scheduler: str | None = None,
    name: Callable[[Item], str] = str,
) -> list[Outcome]:
    """Apply `work` to every item; return one `Outcome` per item, in the order of the items.

    `work` returns a dict of small picklable values; its keys `skipped` (bool) and `message` (str) are taken out.
    With more than one worker or a scheduler, `work` and the items must be picklable (a module-level function or a
    `functools.partial` of one). workers None: one per available CPU. scheduler: address of a Dask scheduler, or a
    path to its scheduler file. Raises UserError where the scheduler cannot be reached.
    """
    work_list = list(items)
    names = [name(item) for item in work_list]
    outcomes: list[Outcome | None] = [None] * len(work_list)
    workers = min(available_cpus() if workers is None else max(1, workers), max(1, len(work_list)))
    with _Progress(title, len(work_list)) as progress:

        def done(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            progress.advance(outcome)

        if scheduler:
            _run_dask(work_list, names, work, scheduler, done)
        elif workers <= 1:
            for index, item in enumerate(work_list):
                done(index, _guarded(work, item, names[index]))
        else:
            _run_pool(work_list, names, work, workers, done)
    return [outcome for outcome in outcomes if outcome is not None]


Done = Callable[[int, Outcome], None]


def _run_pool(items: Sequence[Any], names: Sequence[str], work: Callable, workers: int, done: Done) -> None:
    """A spawn pool; when it breaks, its unfinished items are tried alone, then the rest goes on in a new pool."""
    todo = list(range(len(items)))
    while todo:
        with _pool(workers) as pool:
            suspects = _drain(pool, todo, items, names, work, workers, done)
        for index in suspects:
            done(index, _alone(items[index], names[index], work))


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _drain(
    executor: Executor, todo: list[int], items: Sequence[Any], names: Sequence[str], work: Callable, window: int, done: Done
) -> list[int]:
    """Feed `todo` (consumed from the front) to the executor, `window` at a time; return what a broken pool left."""
    running: dict[Future, int] = {}
    broken: list[int] = []
    while running or (todo and not broken):
        while todo and len(running) < window and not broken:
            try:
                future = executor.submit(_guarded, work, items[todo[0]], names[todo[0]])
            except BrokenProcessPool:
                broken.append(todo.pop(0))
                break
            running[future] = todo.pop(0)
        if not running:
            break
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            index = running.pop(future)
            try:
                done(index, future.result())
            except BrokenProcessPool:
                broken.append(index)
            except Exception as error:  # e.g. an item that cannot be pickled, a Dask worker that was killed
                done(index, Outcome(names[index], ok=False, message=one_line(error)))
    return sorted(broken)


def _alone(item: Any, name: str, work: Callable) -> Outcome:
    """Run one suspect in a process of its own, so that a death there has one possible culprit."""
    with _pool(1) as pool:
        try:
            return pool.submit(_guarded, work, item, name).result()
        except BrokenProcessPool:
            return Outcome(name, ok=False, message=DIED)
        except Exception as error:
            return Outcome(name, ok=False, message=one_line(error))


def _run_dask(items: Sequence[Any], names: Sequence[str], work: Callable, scheduler: str, done: Done) -> None:
    try:
        from distributed import Client
    except ImportError:
        raise UserError(f"--scheduler {scheduler}: needs the package distributed: pip install 'odis-path[cluster]'") from None
    is_file = "://" not in scheduler and Path(scheduler).is_file()
    try:
        client = Client(scheduler_file=scheduler) if is_file else Client(scheduler, timeout="10s")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--scheduler {scheduler}: no Dask scheduler answers there ({one_line(error)})") from None
    with client:
        executor = client.get_executor(pure=False, retries=0)
        try:
            # The scheduler queues for its workers itself; the window only bounds what it has to remember.
            _drain(executor, list(range(len(items))), items, names, work, 10_000, done)
        finally:
            executor.shutdown()


class _Progress:
    """One bar with an ETA on a terminal, a line now and then elsewhere; both on stderr."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.count = self.failed = 0
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
        remark = f"{self.failed} failed" if self.failed else ""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, remark=remark)
        elif time.monotonic() - self.last_line > PLAIN_LINE_EVERY_S:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / self.count * (self.total - self.count)
            print(f"{self.title}: {self.count}/{self.total} {remark} ETA {left:.0f} s", file=sys.stderr, flush=True)


def finish(outcomes: Sequence[Outcome], title: str, out: Path | str, columns: Sequence[str] = ()) -> int:
    """Print a summary, a table of failures and where the output is; return the exit code (1 where an item failed).

    columns: keys of `Outcome.info`, numbers to be summed over the items. Off a terminal a failure stays on one line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    failures = [outcome for outcome in outcomes if not outcome.ok]
    widest = max((len(outcome.item) + len(outcome.message) + 20 for outcome in failures), default=0)
    console = Console(width=None if sys.stdout.isatty() else max(160, widest))
    skipped = sum(outcome.skipped for outcome in outcomes)
    summary = Table(title=title, title_justify="left")
    values = {"done": len(outcomes) - skipped - len(failures), "skipped": skipped, "failed": len(failures)}
    sums = {key: sum(outcome.info.get(key, 0) for outcome in outcomes) for key in columns}
    for head in [*values, *sums, "seconds"]:
        summary.add_column(head, justify="right")
    seconds = sum(outcome.seconds for outcome in outcomes)
    numbers = [*values.values(), *sums.values()]
    shown = [f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in numbers]
    summary.add_row(*shown, f"{seconds:.1f}")
    console.print(summary)
    for outcome in outcomes:
        if outcome.ok and outcome.message:
            console.print(f"note: {outcome.item}: {outcome.message}", markup=False, highlight=False, soft_wrap=True)
    if failures:
        table = Table("item", "problem", title="failures", title_justify="left")
        for outcome in failures:
            table.add_row(Text(outcome.item), Text(outcome.message))
        console.print(table)
    console.print(f"output: {out}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0
