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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from annotations.errors import UserError
from tiling.jobs.dask import SharedStorageCheck, work_and_stat
from tiling.jobs.outcome import BUSY, DIED, FULL, STOPS, Job, Outcome, describe_error, guarded
from tiling.jobs.summary import NOT_TRIED, Outcomes, Result, _Progress
from tiling.storage.locks import is_locked, sweep

if TYPE_CHECKING:
    pass


__all__ = ["DIED", "Outcome", "Outcomes", "Result", "available_cpus", "describe_error", "run_cohort"]

Item = TypeVar("Item")
MOST_FULL = 2  # so many items for which the disk was full end the run: after one, a smaller item may still fit
POLL_S = 0.5  # how often the locks of other runs are looked at, in the end


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
        work = partial(work_and_stat, work=work, wrote=wrote)
    shared_storage = SharedStorageCheck()

    def done(index: int, outcome: Outcome) -> None:
        if BUSY in outcome.info:
            locked[index] = Path(outcome.info[BUSY])
            return
        outcomes[index] = outcome = shared_storage.check(outcome)
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
        from tiling.jobs.dask import run_dask

        run_dask(job, scheduler, stopped)
    elif wanted > 1 or job.timeout is not None:
        from tiling.jobs.process_pool import run_in_processes

        run_in_processes(job, wanted)
    else:
        while job.todo:
            index = job.todo.popleft()
            job.done(index, guarded(job.work, job.items[index], job.names[index]))


def _freed(locked: dict[int, Path], title: str) -> list[int]:
    """Wait until other runs have let go of some of the `locked` items; take those out and return them."""
    said = False
    while locked:
        time.sleep(POLL_S)
        if free := [index for index, lock in locked.items() if not is_locked(lock)]:
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
