"""New HDF5 files that survive a full disk: written whole or not at all, without crashing the process.

When a write fails under HDF5's own file driver, the file cannot be closed any more: its space stays taken, the next file
fails with it, and the process crashes. Here the bytes go through `_Sink`, which notes the first failed write and lets
HDF5 finish as if nothing had happened; then the file is thrown away and the failure is raised.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tiling.storage.atomic import atomic_path
from tiling.storage.checked_file import HEAPS_ATTR, write_attr_checksums
from tiling.storage.heaps import LARGEST_BYTES, heap_table, heaps_in
from tiling.storage.touched import mark_untouched

# The first format of HDF5 whose own structures have checksums; every HDF5 since 1.10 (2016) reads it.
FORMAT_VERSIONS = ("v110", "v110")


class NewFile(h5py.File):  # type: ignore[misc, unused-ignore]  # h5py has no types
    """An HDF5 file being written by `new_h5`."""

    sink: _Sink

    def check(self) -> None:
        """Raises the OSError of a write that failed, so that work for a lost file ends early."""
        if self.sink.error is not None:
            raise self.sink.error

    def checked(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield `values`, as long as what was written before them arrived."""
        for value in values:
            self.check()
            yield value


@contextmanager
def new_h5(final: Path, *, mark: bool = True) -> Iterator[NewFile]:
    """Open an HDF5 file for writing, which appears as `final`, its attributes with checksums, when the block ends well.

    mark: as not touched since it was written (see `tiling.storage.touched`); False where something unchecked is copied into it.
    Raises DiskFullError where there is no space, OSError where writing fails otherwise.
    """
    with atomic_path(final) as temporary:
        sink = _Sink(temporary)
        try:
            with NewFile(sink, "w", libver=FORMAT_VERSIONS, track_order=True) as file:
                file.sink = sink
                yield file
                write_attr_checksums(file)
                file.visititems(lambda _, node: write_attr_checksums(node))
                file.flush()  # from here on no text is written
                file.attrs[HEAPS_ATTR] = sink.heap_table()
        except Exception:
            # What HDF5 makes of a lost write is no news; the write is.
            if sink.error is not None:
                raise sink.error from None
            raise
        finally:
            sink.close()
        if sink.error is not None:
            raise sink.error
        if mark:
            mark_untouched(temporary)


class _Sink:
    """The file object HDF5 writes to; after a failed write nothing more is written."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._at = 0
        self._end = 0
        self._heaps: set[int] = set()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def read(self, size: int = -1) -> bytes:
        """HDF5 asks whether there is such a method, and then reads through `readinto`."""
        raise NotImplementedError

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = os.pread(self._descriptor, len(view), self._at)
        view[: len(data)] = data
        view[len(data) :] = bytes(len(view) - len(data))
        self._at += len(view)
        return len(view)

    def write(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._heaps.update(heaps_in(view.tobytes(), self._at) if len(view) < LARGEST_BYTES else ())
        done = 0
        try:
            while done < len(view) and self.error is None:
                done += os.pwrite(self._descriptor, view[done:], self._at + done)
        except OSError as error:
            self.error = error
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def heap_table(self) -> np.ndarray:
        """The heaps of texts in what was written so far, see `tiling.storage.heaps`."""
        return heap_table(self._descriptor, () if self.error else self._heaps)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self._end = self._at if size is None else size
        try:
            if self.error is None:
                os.ftruncate(self._descriptor, self._end)
        except OSError as error:
            self.error = error
        return self._end

    def flush(self) -> None:
        """Nothing is held back here; atomic_path brings the file to the disk."""

    def close(self) -> None:
        os.close(self._descriptor)
