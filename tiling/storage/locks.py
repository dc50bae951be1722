"""Locks on files that end with their process, so that several runs may share one folder.

A lock is the kernel's (flock) on a small file beside the one that is worked on. A process that is killed, however, gives
it up in that moment; nothing has to be timed out or cleaned by hand. Where a mount knows no locks, runs are not kept apart:
every file is still written whole (tiling.storage.atomic), only some of the work is done twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from tiling.storage.atomic import sweep_temporaries

try:
    import fcntl
except ImportError:  # a system without flock
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".odis-lock"
SETTLE_S = 5.0  # longer than another run takes to write down its settings


class FileLockedError(Exception):
    """Another run works on a file. `lock`: the lock it holds."""

    def __init__(self, lock: Path) -> None:
        super().__init__(str(lock))
        self.lock = lock


def lock_path(path: Path) -> Path:
    """Return the lock file of a file that is worked on."""
    return path.parent / f".{path.name}{SUFFIX}"


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Work on `path` alone within the block. Raises FileLockedError, at once, where another run (or thread) does."""
    lock = lock_path(path)
    descriptor = _take(lock, shared=False)
    try:
        yield
    finally:
        if descriptor is not None:
            _drop(lock, descriptor)


def is_locked(lock: Path) -> bool:
    """Tell whether a process holds this lock now."""
    if fcntl is None or not os.path.lexists(lock):
        return False
    try:
        descriptor = _take(lock, shared=False)
    except FileLockedError:
        return True
    except UserError:  # no lock at all: whoever wants to take it is told
        return False
    if descriptor is not None:
        _drop(lock, descriptor)
    return False


@contextmanager
def lock_settings(folder: Path, command: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Let other runs of `command` on `folder` join within the block if they have the same settings (JSON-able).

    Raises UserError where a live run has others: the folder would end as a mixture of the two.
    """
    lock = folder / f".{command}{SUFFIX}"
    text = json.dumps(dict(settings), sort_keys=True, default=str)
    descriptor = _join(lock, text)
    if descriptor is None:
        yield
        return
    try:
        held_text = os.pread(descriptor, 1 << 20, 0).decode()
        if held_text != text:
            changes = describe_changes(json.loads(held_text), json.loads(text))
            raise UserError(
                f"{folder}: another run of odis-path {command} is at work here with other settings ({changes}): wait for it, "
                "or give another folder"
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the last one out
            lock.unlink(missing_ok=True)
        _close(descriptor)


def _join(lock: Path, text: str) -> int | None:
    """Take a shared hold on `lock`, whose file says the settings of the runs that hold it: `text` where this is the first.

    Returns its descriptor, None where there are no locks. Raises UserError where a run holds it without settings.
    """
    end = time.monotonic() + SETTLE_S
    while time.monotonic() < end:
        try:
            descriptor = _take(lock, shared=False)
            if descriptor is not None and _is_read_only(descriptor):  # a killed run of another user left it
                _drop(lock, descriptor)
                descriptor = _take(lock, shared=False)
            if descriptor is None or not _write_settings(descriptor, text):
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except FileLockedError:
            time.sleep(0.02)
            try:
                descriptor = _take(lock, shared=True)
            except FileLockedError:
                continue
        assert descriptor is not None
        with contextlib.suppress(OSError):
            # While a lock changes hands its file may be swept away, and another, empty one come.
            if os.path.samestat(os.lstat(lock), os.fstat(descriptor)) and os.fstat(descriptor).st_size:
                return descriptor
        _close(descriptor)
    raise UserError(f"{lock}: is held by a run that does not go on: end that run, or give another folder")


def _write_settings(descriptor: int, text: str) -> bool:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError:  # a full disk: the work itself will say so
        _close(descriptor)
        return False
    return True


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe how two sets of parameters differ: "mpp 1.0, now 1.5; quality 90, now 70"."""
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return "; ".join(f"{key} {_short(old.get(key))}, now {_short(new.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sweep(folder: Path) -> None:
    """Remove what killed runs left in a folder: temporary files without a writer, lock files that no process holds."""
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        sweep_temporaries(folder)
        with os.scandir(folder) as entries:
            locks = [Path(entry.path) for entry in entries if entry.name.endswith(SUFFIX) and entry.name.startswith(".")]
        for lock in locks:
            is_locked(lock)


def _take(lock: Path, *, shared: bool) -> int | None:
    """Take the lock and return the file descriptor that holds it; None where there are no locks.

    Raises FileLockedError where it is held, UserError where something else has its name.
    """
    if fcntl is None:
        return None
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(lock)
        except OSError:
            return None  # a folder that cannot be written to: the work itself will say so, if it has to write
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            _close(descriptor)
            raise FileLockedError(lock) from None
        except OSError:
            with contextlib.suppress(OSError):
                if not _is_read_only(descriptor):  # else another user's, who may hold it
                    lock.unlink()
            _close(descriptor)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(lock), os.fstat(descriptor)):
                return descriptor
        _close(descriptor)  # its last holder removed the file meanwhile: take the new one


def _open(lock: Path) -> int:
    """Open the lock file, made where there is none. Another user's may be for reading only, which is enough to lock it.

    Raises UserError where something else has its name: that is neither followed nor written to.
    """
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # its last holder removed it meanwhile: make it anew
                return _reopen(lock)
        except PermissionError:
            return _reopen(lock)
        else:
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o666)  # whatever the umask: others who may write here take this lock, too
            return descriptor


def _reopen(lock: Path) -> int:
    """Open a lock file that is there. Raises OSError where there is none, UserError where something else has its name."""
    _check_plain_file(lock, os.lstat(lock))
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # it may be replaced after the look
    try:
        descriptor = os.open(lock, os.O_RDWR | flags)
    except PermissionError:
        descriptor = os.open(lock, os.O_RDONLY | flags)
    try:
        _check_plain_file(lock, os.fstat(descriptor))
    except UserError:
        os.close(descriptor)
        raise
    return descriptor


def _check_plain_file(lock: Path, status: os.stat_result) -> None:
    """Raises UserError for what is no plain file with this name alone."""
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISREG, ""))
    what = next((name for is_kind, name in kinds if is_kind(status.st_mode)), "no plain file")
    if not what and status.st_nlink > 1:
        what = "a second name of another file"
    if what:
        raise UserError(f"{lock}: is {what}, not a lock of odis-path: nothing was written to it; take it away, then run again")


def _is_read_only(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # what network mounts may say of a file to which nothing is written
        os.close(descriptor)


def _drop(lock: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        lock.unlink()
    _close(descriptor)
