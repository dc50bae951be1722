"""Tell whether something touched a file since it was written: its time ends in a mark that no other program gives it.

To read all pixels of a cohort only to find that it is done takes as long as its disks do. A file with the mark was not written
to since; one that was, or was copied without its times, or in which damage was found, is read whole.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

MARK_NS = 271_828_000  # the part of a second; whole microseconds, as some file systems keep no less
SECOND_NS = 10**9


def mark_untouched(path: Path) -> None:
    """Give a file that was just written the time of now, with the mark. One that cannot have it counts as touched."""
    at = time.time_ns() // SECOND_NS * SECOND_NS + MARK_NS
    with contextlib.suppress(OSError):
        os.utime(path, ns=(at, at))


def was_touched(path: Path) -> bool:
    """Tell whether a file may have changed since it was written."""
    return path.stat().st_mtime_ns % SECOND_NS != MARK_NS


def touch(path: Path) -> None:
    """Take the mark away, where there is one and this user may."""
    with contextlib.suppress(OSError):
        if not was_touched(path):
            os.utime(path)
