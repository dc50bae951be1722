"""Work on a Dask cluster, through the same kind of executor."""

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
from tiling.jobs.outcome import DIED, STOPS, Job, Outcome, describe_error, guarded, timed_out

ANSWER_S = 10.0  # how long a scheduler may take to answer
WINDOW = 2000  # items the scheduler knows of at a time: more than a cluster has threads, and never a whole large cohort


def run_dask(job: Job, scheduler: str, stopped: Callable[[], bool] = lambda: False) -> None:
    """Work off `job.todo` on the cluster of a scheduler (its address, or its scheduler file), until `stopped`.

    What a worker was at when it died is given to another by the scheduler, a few times. What is still with the scheduler when
    the work is stopped is taken back, and nothing is said of it. Raises UserError where the
    scheduler cannot be reached; where it goes away in mid-run, the items left fail with a line that says so.
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
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it says in tracebacks, we say in a line
    with client:
        if not client.nthreads():
            print(f"--scheduler {scheduler}: no worker has joined it yet: waiting for one", file=sys.stderr, flush=True)
        executor = client.get_executor(pure=False, retries=0)
        try:
            died = _feed(executor, job, scheduler, stopped)
            # Items that only waited on workers that others brought down are blamed with them: on its own each is told apart.
            for index in died:
                one = replace(job, todo=deque([index]))
                alone = _feed(executor, one, scheduler, stopped) if len(died) > 1 else [index]
                for _ in alone:
                    job.fail(index, DIED)
        finally:
            if client.status == "running":
                executor.shutdown(wait=False)  # takes back what has not come
            else:
                client.close(timeout=1)  # the scheduler is gone: no answer is waited for


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


def _feed(executor: Executor, job: Job, scheduler: str, stopped: Callable[[], bool]) -> list[int]:
    """Submit `job.todo`, a window of it at a time; returns the items whose workers died again and again."""
    running: dict[Future, int] = {}
    died: list[int] = []
    gone = f"--scheduler {scheduler}: the scheduler went away: start it and run the same command again"
    while (job.todo or running) and not stopped():
        while job.todo and len(running) < WINDOW:
            index = job.todo.popleft()
            try:
                running[executor.submit(guarded_within, job.timeout, job.work, job.items[index], job.names[index])] = index
            except Exception:  # the client's connection is closed
                job.done(index, Outcome(job.names[index], ok=False, message=gone, info={STOPS: True}))
                return died
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            index = running.pop(future)
            try:
                outcome = future.result()
            except CancelledError:
                job.done(index, Outcome(job.names[index], ok=False, message=gone, info={STOPS: True}))
                return died
            except Exception as error:
                if type(error).__name__ == "KilledWorker":
                    died.append(index)
                    continue
                outcome = Outcome(job.names[index], ok=False, message=describe_error(error))
            job.done(index, outcome)
    return died


def guarded_within(timeout: float | None, work: Callable[[Any], dict | None], item: Any, name: str) -> Outcome:
    """`guarded`, given up after `timeout` seconds: the cluster's worker goes on, its thread is left to itself."""
    if timeout is None:
        return guarded(work, item, name)
    answer: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(guarded(work, item, name)), daemon=True).start()
    try:
        return answer.get(timeout=timeout)
    except queue.Empty:
        return Outcome(name, ok=False, message=timed_out(timeout), seconds=timeout)


WRITTEN = "written"  # key of Outcome.info: path and time (mtime, ns) of the file an item is in, as its worker sees it


PATIENCE_S = 10.0  # what a network mount may take to show a file of another machine


SLACK_NS = 2 * 10**9  # file systems keep times more or less finely


UNSEEN = "the worker wrote it where this machine does not see it: is --out on a shared disk?"


def work_and_stat(item: Any, work: Callable[[Any], dict | None], wrote: Callable[[Any], Path]) -> dict[str, Any]:
    """`work` on an item, and what its worker sees of the file it wrote or found done (runs in the worker)."""
    info = dict(work(item) or {})
    path = wrote(item)
    return {**info, WRITTEN: (str(path), _time_ns(path))}


class SharedStorageCheck:
    """Looks for the files of items that are done; waits for one that is not there, and after one that never came no longer."""

    def __init__(self) -> None:
        self.until: float | None = None

    def check(self, outcome: Outcome) -> Outcome:
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
