"""Apply a function to every item of a cohort: in this process, in worker processes or on a Dask cluster.

A bad item becomes a failed `Outcome` and the others go on; so does one that hangs or whose worker process dies. Several runs
may share a folder: items that another run works on are left to it, and tried again at the end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from annotations.errors import UserError
from tiling.jobs.dask import SharedStorageCheck, run_dask
from tiling.jobs.outcome import ItemResult, Job, Outcome, guarded
from tiling.jobs.process_pool import run_in_processes
from tiling.jobs.summary import NOT_TRIED, ProgressBar
from tiling.storage.locks import is_locked, sweep

Item = TypeVar("Item")
MAX_DISK_FULL = 2  # items for which the disk may be full before the run ends: after one, a smaller item may still fit
POLL_S = 0.5  # how often the locks of other runs are looked at, at the end


def available_cpus() -> int:
    """CPUs this process may use (its affinity, not the size of the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def run_cohort(
    items: Iterable[Item],
    work: Callable[[Item], ItemResult | None],
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

    With more than one worker, a scheduler or a timeout, `work` and the items must be picklable (a module-level function or
    a `functools.partial` of one). workers None: one per available CPU; with 1, and no timeout, the work is done in this
    process. scheduler: address of a Dask scheduler, or a path to its scheduler file. timeout: seconds after which an item
    is given up. folder: where `work` writes; what killed runs left there is removed. wrote: the file of an item that is done
    (picklable): where a cluster's worker wrote it, but this machine does not see it, the item has failed.
    Raises UserError where the scheduler cannot be reached, for a timeout that cannot be, and where worker processes
    cannot start.
    """
    if timeout is not None and not timeout > 0:
        raise UserError(f"--timeout {timeout:g}: is a number of seconds above 0")
    work_list = list(items)
    names = [name(item) for item in work_list]
    outcomes: list[Outcome | None] = [None] * len(work_list)
    locked: dict[int, Path] = {}
    disk_full = 0
    todo: deque[int] = deque(range(len(work_list)))
    stop = threading.Event()
    shared_storage = SharedStorageCheck()

    def done(index: int, outcome: Outcome) -> None:
        nonlocal disk_full
        if outcome.lock is not None:
            locked[index] = outcome.lock
            return
        outcomes[index] = outcome = shared_storage.check(outcome)
        progress.advance(outcome)
        disk_full += outcome.disk_full
        if outcome.ends_run or disk_full >= MAX_DISK_FULL:
            stop.set()
            todo.clear()  # the items left would fail as well
            locked.clear()

    with ProgressBar(title, len(work_list)) as progress:
        _sweep(folder)
        job = Job(work_list, names, work, todo, done, timeout, wrote)
        while todo:
            _run(job, workers, scheduler, stop.is_set)
            todo.extend(_wait_for_free(locked, title))
        _sweep(folder)
    return [outcome or Outcome(names[i], ok=False, error=NOT_TRIED) for i, outcome in enumerate(outcomes)]


def _run(job: Job, workers: int | None, scheduler: str | None, stopped: Callable[[], bool]) -> None:
    processes = min(available_cpus() if workers is None else max(1, workers), len(job.todo))
    if scheduler:
        run_dask(job, scheduler, stopped)
    elif processes > 1 or job.timeout is not None:
        run_in_processes(job, processes)
    else:
        while job.todo:
            index = job.todo.popleft()
            job.done(index, guarded(job.work, job.items[index], job.names[index]))


def _wait_for_free(locked: dict[int, Path], title: str) -> list[int]:
    """Wait until other runs have let go of some of the `locked` items; take those out and return them."""
    announced = False
    while locked:
        time.sleep(POLL_S)
        if free := [index for index, lock in locked.items() if not is_locked(lock)]:
            for index in free:
                del locked[index]
            return free
        if not announced:
            announced = True
            print(f"{title}: waiting for another run that works on the last {len(locked)} here", file=sys.stderr, flush=True)
    return []


def _sweep(folder: Path | None) -> None:
    if folder is not None:
        sweep(folder)
