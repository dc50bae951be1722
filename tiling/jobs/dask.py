"""Work on a Dask cluster, and the check that this machine sees the files its workers write."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from tiling.jobs.outcome import DIED, Job, Outcome, Work, describe_error, guarded, timed_out

ANSWER_S = 10.0  # how long a scheduler may take to answer
MAX_SUBMITTED = 2000  # items the scheduler knows of at a time: more than a cluster has threads, less than a large cohort
PATIENCE_S = 10.0  # how long a network mount may take to show a file of another machine
MTIME_TOLERANCE_NS = 2 * 10**9  # file systems keep times with different precision
UNSEEN = "the worker wrote it where this machine does not see it: is --out on a shared disk?"


def run_dask(job: Job, scheduler: str, stopped: Callable[[], bool] = lambda: False) -> None:
    """Work off `job.todo` on the cluster of a scheduler (its address, or its scheduler file), until `stopped`.

    The scheduler gives an item whose worker died to another one, a few times. Items that are with the scheduler when the work
    is stopped are taken back without an outcome. Raises UserError where the scheduler cannot be reached; where it goes away
    in mid-run, the items left fail with a line that says so.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError(f"--scheduler {scheduler}: needs the package distributed: pip install 'odis-path[cluster]'") from None
    is_file = "://" not in scheduler and os.path.isfile(scheduler)
    address = _address_in(scheduler) if is_file else scheduler
    try:
        client = Client(address, timeout=ANSWER_S)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--scheduler {scheduler}: no Dask scheduler answers there ({describe_error(error)})") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # its tracebacks are our one-line errors
    with client:
        if not client.nthreads():
            print(f"--scheduler {scheduler}: no worker has joined it yet: waiting for one", file=sys.stderr, flush=True)
        executor = client.get_executor(pure=False, retries=0)
        try:
            died = _submit(executor, job, scheduler, stopped)
            if len(died) > 1:  # some only shared a worker with the item it died of: each is tried alone
                died = [i for index in died for i in _submit(executor, replace(job, todo=deque([index])), scheduler, stopped)]
            for index in died:
                job.fail(index, DIED)
        finally:
            if client.status == "running":
                executor.shutdown(wait=False)  # cancels the items that are still there
            else:
                client.close(timeout=1)  # the scheduler is gone and will not answer


def _address_in(scheduler_file: str) -> str:
    try:
        address = json.loads(Path(scheduler_file).read_bytes())["address"]
    except OSError as error:
        raise UserError(f"--scheduler {scheduler_file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        address = None
    if not isinstance(address, str):
        raise UserError(
            f"--scheduler {scheduler_file}: names no scheduler: give the file of dask scheduler --scheduler-file, or an address"
        )
    return address


def _submit(executor: Executor, job: Job, scheduler: str, stopped: Callable[[], bool]) -> list[int]:
    """Work off `job.todo`, MAX_SUBMITTED items at a time; return the indexes of those whose workers died again and again."""
    running: dict[Future[Outcome], int] = {}
    died: list[int] = []
    gone = f"--scheduler {scheduler}: the scheduler went away: start it and run the same command again"
    while (job.todo or running) and not stopped():
        while job.todo and len(running) < MAX_SUBMITTED:
            index = job.todo.popleft()
            item, name = job.items[index], job.names[index]
            try:
                running[executor.submit(work_within, job.timeout, job.work, item, name, job.wrote)] = index
            except Exception:  # the client's connection is closed
                job.done(index, Outcome(name, ok=False, error=gone, ends_run=True))
                return died
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            index = running.pop(future)
            try:
                outcome = future.result()
            except CancelledError:
                job.done(index, Outcome(job.names[index], ok=False, error=gone, ends_run=True))
                return died
            except Exception as error:
                if type(error).__name__ == "KilledWorker":
                    died.append(index)
                    continue
                outcome = Outcome(job.names[index], ok=False, error=describe_error(error))
            job.done(index, outcome)
    return died


def work_within(timeout: float | None, work: Work, item: Any, name: str, wrote: Callable[[Any], Path] | None = None) -> Outcome:
    """Run `work` on one item in a cluster's worker, given up after `timeout` seconds: its thread is left to itself.

    wrote: the file of an item that is done, whose time becomes `Outcome.written`.
    """

    def outcome() -> Outcome:
        outcome = guarded(work, item, name)
        if outcome.ok and wrote is not None:
            path = wrote(item)
            outcome.written = path, _mtime_ns(path)
        return outcome

    if timeout is None:
        return outcome()
    answer: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(outcome()), daemon=True).start()
    try:
        return answer.get(timeout=timeout)
    except queue.Empty:
        return Outcome(name, ok=False, error=timed_out(timeout), seconds=timeout)


class SharedStorageCheck:
    """Looks for the files that a cluster's workers wrote. One that comes late is waited for, unless one before never came."""

    def __init__(self) -> None:
        self.deadline: float | None = None

    def check(self, outcome: Outcome) -> Outcome:
        """The outcome; a failure where the file its worker wrote is not seen from here."""
        if outcome.written is None:
            return outcome
        path, mtime_ns = outcome.written
        while _mtime_ns(path) < max(0, mtime_ns - MTIME_TOLERANCE_NS):  # an older file of that name is not the one
            self.deadline = self.deadline or time.monotonic() + PATIENCE_S
            if time.monotonic() > self.deadline:
                return Outcome(outcome.item, ok=False, error=f"{path}: {UNSEEN}", seconds=outcome.seconds, info=outcome.info)
            time.sleep(0.2)
        self.deadline = None
        return replace(outcome, written=None)


def _mtime_ns(path: Path) -> int:
    """mtime in ns of the opened file, which network mounts do not answer from memory; -1 where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return -1
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
