"""Work in processes of this machine that may die or hang: each is alone behind an executor of its own.

One pool of many workers breaks as a whole when one of them dies, and cannot stop one that hangs. Executors of one worker
each do not share that fate: what a worker was at when it died is known, and the others never notice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from annotations.errors import UserError
from tiling.jobs.outcome import DIED, Job, guarded, one_line, timed_out

TICK_S = 0.5  # how often the time of running items is looked at
GONE_S = 5.0  # how long a killed process may take to be gone
FALSE_STARTS = 3  # so many workers in a row that die before their first item: something is wrong with all of them


class Lane:
    """One worker process, and the item it is at."""

    def __init__(self) -> None:
        self.executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_settle)
        with _interrupts_held():  # a process keeps what its parent holds back: Ctrl-C while it starts is not for it
            self.pid = self.executor.submit(os.getpid)
        self.index = -1
        self.begun: float | None = None  # None until the process is up

    @property
    def ready(self) -> bool:
        return self.pid.done() and self.pid.exception() is None

    def start(self, job: Job, index: int) -> Future:
        """Raises BrokenProcessPool where the worker died while it was idle."""
        self.index, self.begun = index, None
        return self.executor.submit(guarded, job.work, job.items[index], job.names[index])

    def overdue(self, timeout: float | None) -> bool:
        if timeout is None or not self.ready:
            return False
        if self.begun is None:
            self.begun = time.monotonic()
        return time.monotonic() - self.begun > timeout

    def close(self, kill: bool = False) -> None:
        if kill and self.ready:
            _end(self.pid.result())
        self.executor.shutdown(wait=False, cancel_futures=True)


def run_lanes(job: Job, workers: int) -> None:
    """Work off `job.todo` in `workers` processes. What a process died of is tried once more at the end, alone.

    Raises UserError where worker processes cannot start at all.
    """
    died = _Pass(job).run(workers)
    for index in died:
        for _ in _Pass(replace(job, todo=deque([index]))).run(1):
            job.fail(index, DIED)


class _Pass:
    """Lanes over a job's items: idle ones, and busy ones by what they will return."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.idle: list[Lane] = []
        self.busy: dict[Future, Lane] = {}
        self.died: list[int] = []
        self.false_starts = 0

    def run(self, workers: int) -> list[int]:
        """Returns the indexes at which a worker died."""
        kill = True
        try:
            self.idle = [Lane() for _ in range(min(workers, len(self.job.todo)))]
            while self._feed():
                timeout = None if self.job.timeout is None else min(TICK_S, self.job.timeout / 4)
                finished, _ = wait(self.busy, timeout, FIRST_COMPLETED)
                for future in finished:
                    self._take(future, self.busy.pop(future))
                self._kill(future for future, lane in list(self.busy.items()) if lane.overdue(self.job.timeout))
            kill = False
        finally:
            for lane in [*self.idle, *self.busy.values()]:
                lane.close(kill)
        return self.died

    def _feed(self) -> bool:
        """Give every idle lane an item; whether anything is running."""
        while self.job.todo and self.idle:
            lane, index = self.idle.pop(), self.job.todo[0]
            try:
                self.busy[lane.start(self.job, index)] = lane
            except BrokenProcessPool:
                self._replace(lane)
                continue
            self.job.todo.popleft()
        return bool(self.busy)

    def _take(self, future: Future, lane: Lane) -> None:
        try:
            outcome = future.result()
        except BrokenProcessPool:
            self._replace(lane)
            if lane.ready:
                self.died.append(lane.index)
            else:
                self.job.todo.appendleft(lane.index)
            return
        except Exception as error:  # e.g. an item that cannot be pickled
            self.job.fail(lane.index, one_line(error))
        else:
            self.false_starts = 0
            self.job.done(lane.index, outcome)
        self.idle.append(lane)

    def _kill(self, overdue: Iterable[Future]) -> None:
        for future in overdue:
            lane = self.busy.pop(future)
            assert self.job.timeout is not None
            self._replace(lane)
            wait([future], GONE_S)  # what it held is free, and what it left can be swept, when it is gone
            self.job.fail(lane.index, timed_out(self.job.timeout), self.job.timeout)

    def _replace(self, lane: Lane) -> None:
        lane.close(kill=True)
        if not lane.ready:
            self.false_starts += 1
            if self.false_starts >= FALSE_STARTS:
                raise UserError(
                    "worker processes die as they start (what they said stands above): take --workers 1; a script that "
                    'calls this keeps its work under if __name__ == "__main__"'
                )
        self.idle.append(Lane())


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C comes when this is over."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle() -> None:
    """Begin a worker: it leaves Ctrl-C to its parent, and ends when its parent does (killed, too), with what it started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _end(os.getpid())
        os._exit(1)


def _end(pid: int) -> None:
    """Kill a worker and the processes it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
