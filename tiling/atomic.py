"""Files that appear under their final name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk; a folder that cannot be opened for it (some network mounts) is left."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
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
    the old file or the new one. The folder is made when it is missing.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    # No part of the temporary name ends like the final one: a folder listing for *.h5 never meets it.
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        _fsync_path(temporary)
        os.replace(temporary, final)
        _fsync_path(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
