"""Worker processes of this machine, each behind an executor of its own, so that a crash or a hang costs one item.

A pool of many workers breaks as a whole when one of them dies, and cannot stop one that hangs. With one executor per worker
the item that a worker died of is known, and the others never notice.
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
from tiling.jobs.outcome import DIED, Job, Outcome, describe_error, guarded, timed_out

TIMEOUT_CHECK_S = 0.5  # how often the time of running items is checked
KILL_WAIT_S = 5.0  # how long a killed process may take to end
MAX_FALSE_STARTS = 3  # workers in a row that die before their first item: something is wrong with all of them


class Worker:
    """One worker process and the item it works on."""

    def __init__(self) -> None:
        self.executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin_worker)
        with _interrupts_held():  # a child inherits the mask: Ctrl-C while it starts goes to the parent alone
            self.pid = self.executor.submit(os.getpid)
        self.index = -1
        self.begun: float | None = None  # None until the process is up

    @property
    def ready(self) -> bool:
        return self.pid.done() and self.pid.exception() is None

    def start(self, job: Job, index: int) -> Future[Outcome]:
        """Submit an item. Raises BrokenProcessPool where the worker died while it was idle."""
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
            _kill_group(self.pid.result())
        self.executor.shutdown(wait=False, cancel_futures=True)


def run_in_processes(job: Job, workers: int) -> None:
    """Work off `job.todo` in `workers` processes. An item that a process died of is tried once more at the end, alone.

    Raises UserError where worker processes cannot start at all.
    """
    died = WorkerPool(job).run(workers)
    for index in died:
        for _ in WorkerPool(replace(job, todo=deque([index]))).run(1):
            job.fail(index, DIED)


class WorkerPool:
    """The workers of a job: idle ones, and busy ones by their futures."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.idle: list[Worker] = []
        self.busy: dict[Future[Outcome], Worker] = {}
        self.died: list[int] = []
        self.false_starts = 0

    def run(self, workers: int) -> list[int]:
        """Work off the items; return the indexes of those that a worker died of."""
        kill = True
        try:
            self.idle = [Worker() for _ in range(min(workers, len(self.job.todo)))]
            while self._feed():
                timeout = None if self.job.timeout is None else min(TIMEOUT_CHECK_S, self.job.timeout / 4)
                finished, _ = wait(self.busy, timeout, FIRST_COMPLETED)
                for future in finished:
                    self._take(future, self.busy.pop(future))
                self._kill_overdue(future for future, worker in list(self.busy.items()) if worker.overdue(self.job.timeout))
            kill = False
        finally:
            for worker in [*self.idle, *self.busy.values()]:
                worker.close(kill)
        return self.died

    def _feed(self) -> bool:
        """Give every idle worker an item; return whether anything is running."""
        while self.job.todo and self.idle:
            worker, index = self.idle.pop(), self.job.todo[0]
            try:
                self.busy[worker.start(self.job, index)] = worker
            except BrokenProcessPool:
                self._replace(worker)
                continue
            self.job.todo.popleft()
        return bool(self.busy)

    def _take(self, future: Future[Outcome], worker: Worker) -> None:
        try:
            outcome = future.result()
        except BrokenProcessPool:
            self._replace(worker)
            if worker.ready:
                self.died.append(worker.index)
            else:
                self.job.todo.appendleft(worker.index)
            return
        except Exception as error:  # e.g. an item that cannot be pickled
            self.job.fail(worker.index, describe_error(error))
        else:
            self.false_starts = 0
            self.job.done(worker.index, outcome)
        self.idle.append(worker)

    def _kill_overdue(self, overdue: Iterable[Future[Outcome]]) -> None:
        for future in overdue:
            worker = self.busy.pop(future)
            assert self.job.timeout is not None
            self._replace(worker)
            wait([future], KILL_WAIT_S)  # once it is gone its locks are free and its temporary files can be swept
            self.job.fail(worker.index, timed_out(self.job.timeout), self.job.timeout)

    def _replace(self, worker: Worker) -> None:
        worker.close(kill=True)
        if not worker.ready:
            self.false_starts += 1
            if self.false_starts >= MAX_FALSE_STARTS:
                raise UserError(
                    "worker processes die as they start (their output stands above): take --workers 1; a script that "
                    'calls this keeps its work under if __name__ == "__main__"'
                )
        self.idle.append(Worker())


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Start a worker, which leaves Ctrl-C to its parent and ends, with its children, when the parent ends or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _kill_group(os.getpid())
        os._exit(1)


def _kill_group(pid: int) -> None:
    """Kill a worker and the processes it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
