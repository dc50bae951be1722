"""Files that appear under their final name only when they are complete; what killed writers left is swept up."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from annotations.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the quota, the limit on one file
TEMPORARY = re.compile(r"^\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-\d+\.tmp$")
ABANDONED_S = 7 * 24 * 3600.0  # a temporary file of another machine that nobody touched for so long has no writer

_numbers = itertools.count()


class DiskFullError(UserError):
    """No space (or quota) is left where a file was to be written; whatever is tried next would fail as well."""


@lru_cache(maxsize=1)
def machine() -> str:
    """Return eight hex digits for the machine and its space of process ids: only within it does a pid tell who is alive."""
    parts = [socket.gethostname()]
    for path, read in (("/proc/sys/kernel/random/boot_id", Path.read_text), ("/proc/self/ns/pid", os.readlink)):
        with contextlib.suppress(OSError):
            parts.append(read(Path(path)))
    return f"{zlib.crc32('|'.join(parts).encode()):08x}"


def _fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk; a folder that cannot be opened for it (some network mounts) is left."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_file():
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Give a temporary name beside `final`; rename it to `final` when the block ends well, remove it when it does not.

    The file and its folder are flushed to disk before and after the rename, so a crash at any moment leaves
    the old file or the new one. The folder is made when it is missing. Raises DiskFullError where there is no space,
    UserError where the file cannot be opened or put in its place for another reason.
    """
    final = Path(final)
    temporary = _temporary(final)
    try:
        yield temporary
        _put_in_place(temporary, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.errno in FULL or error.filename == str(temporary)):
            raise write_error(final, error) from error
        raise


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give a temporary name beside `final` for a folder that the block makes; it becomes `final` when the block ends well.

    All its files are on the disk before. An older folder of the name goes only then: a crash between the two renames leaves
    neither under the name, but never half of one. Raises as `atomic_path` does.
    """
    final = Path(final)
    temporary, replaced = _temporary(final), _temporary(final)
    try:
        yield temporary
        for place, _, names in os.walk(temporary):
            for name in names:
                _fsync_path(Path(place, name))
            _fsync_path(Path(place))
        if os.path.lexists(final):
            os.rename(final, replaced)
        os.rename(temporary, final)
        _fsync_path(final.parent)
    except BaseException as error:
        if replaced.exists() and not os.path.lexists(final):
            os.rename(replaced, final)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(final, error) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def check_writable(final: Path) -> None:
    """Raises UserError where `final` cannot be written: for work that would find it out in the end. Leaves nothing behind."""
    temporary = _temporary(final)
    try:
        temporary.touch()
    except OSError as error:
        raise write_error(final, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(final: Path) -> Path:
    """Choose a name beside `final`, whose folder is made. Raises UserError where it cannot be.

    No part of it ends like the final one: a folder listing for *.h5 never meets it. No two writers share one: not two
    threads, not two machines on one network mount.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(final, error) from error
    return final.parent / f".{final.name}.{machine()}-{os.getpid()}-{next(_numbers)}.tmp"


def _put_in_place(temporary: Path, final: Path) -> None:
    try:
        _fsync_path(temporary)
        os.replace(temporary, final)
        _fsync_path(final.parent)
    except OSError as error:
        raise write_error(final, error) from error


def write_error(final: Path, error: OSError) -> UserError:
    """Make the error for a file that cannot be written: a DiskFullError where there is no space."""
    if error.errno in FULL:
        return DiskFullError(
            f"{final}: cannot be written: {os.strerror(error.errno or 0)}: make room, then run the same command again "
            "(what is done is kept)"
        )
    return UserError(f"{final}: cannot be written: {error.strerror or error}: check the folder, or give another")


def sweep_temporaries(folder: Path) -> int:
    """Remove temporary files (and folders) of `folder` whose writer is dead; return their number.

    A writer on this machine is dead when its process is; one on another machine when the file lay untouched for a week.
    """
    removed = 0
    with os.scandir(folder) as entries:
        temporaries = [(entry, match) for entry in entries if (match := TEMPORARY.match(entry.name))]
    for entry, match in temporaries:
        with contextlib.suppress(OSError):
            if match["machine"] == machine():
                dead = not _alive(int(match["pid"]))
            else:
                dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S
            if dead:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
                removed += 1
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # a system that does not say
        return True
    return state not in "ZX"  # ended, its parent has not waited for it yet
