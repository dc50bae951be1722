"""HDF5 files of ours with a checksum of all that is in them, compared when it is read.

A dataset has the CRC-32 of its values in its attribute `crc32`. What is read piece by piece has a checksum a piece beside it:
`/pixels/crc32` of the tiles, `/boxes/polygon/crc32` of the outlines. An object with attributes of text has theirs in
`attrs_crc32`, and what HDF5 keeps texts in is listed in `heaps` of the root. All else (numbers in attributes, these checksums,
names, shapes, places) HDF5 guards itself, in the format of its version 1.10. What an HDF5 program deletes or sets anew is taken
as it is. A file of an earlier version has no checksums, and is read unchecked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from annotations.errors import UserError
from tiling.storage.checksums import DamagedError, value_crc32
from tiling.storage.heaps import heaps_are_sound
from tiling.storage.touched import touch

CRC_ATTR = "crc32"  # uint32, of the values of a dataset
HEAPS_ATTR = "heaps"  # uint64 (k, 3), of the root, see tiling.storage.heaps
TEXTS_ATTR = "attrs_crc32"  # uint32 (n,): at i that of the attribute that was the i-th to be made, 0 where it is no text
OWN_ATTRS = (CRC_ATTR, TEXTS_ATTR, HEAPS_ATTR)
MOST_PACKED = 64  # a dataset is at most so many times as large as the file it is in
Node: TypeAlias = h5py.Group | h5py.Dataset


def write_attr_checksums(node: Node, kept: dict[str, int] | None = None) -> None:
    """Write `attrs_crc32` of an object whose attributes are complete, once; kept: those of attributes that were copied."""
    if TEXTS_ATTR in node.attrs:
        return
    sums = {
        _creation_index(node, key): (kept or {}).get(key, value_crc32(value))
        for key, value in node.attrs.items()
        if _is_text(value)
    }
    if sums:
        array = np.zeros(max(sums) + 1, np.uint32)
        array[list(sums)] = list(sums.values())
        node.attrs[TEXTS_ATTR] = array


def attr_checksums(node: Node, values: dict[str, Any]) -> dict[str, int]:
    """Return the stored CRC-32 of each attribute of text; one that was set anew since has a number beyond the end of the list.

    values: all attributes of the object.
    """
    sums = values.get(TEXTS_ATTR)
    if sums is None:
        return {}
    numbers = {key: _creation_index(node, key) for key, value in values.items() if _is_text(value)}
    return {key: int(sums[number]) for key, number in numbers.items() if 0 <= number < len(sums) and sums[number]}


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes) or (isinstance(value, np.ndarray) and value.dtype.kind in "OSU")


def _creation_index(node: Node, key: str) -> int:
    """Return the number of attributes an object had been given before this one; -1 where HDF5 does not keep it."""
    info = h5py.h5a.get_info(node.id, key.encode())
    return int(info.corder) if info.corder_valid else -1


class CheckedFile:
    """An HDF5 file of ours, open for reading; a context manager. What is read through it matches its checksum.

    remedy: says for an object of the file ("" for the file itself) what to do where it is damaged. All methods raise
    DamagedError, one line with the file, what is damaged and the remedy, where HDF5 cannot read something or it does not match.
    """

    def __init__(self, path: Path, remedy: Callable[[str], str], **options: Any) -> None:
        """Raises OSError (FileNotFoundError where there is none) where HDF5 does not open the file."""
        self.path, self._remedy = path, remedy
        # Files are replaced by renaming, never written in place, so no lock is needed (and none works on some network mounts).
        self.h5 = h5py.File(path, "r", locking=False, **options)
        try:
            self._check_heaps()
        except BaseException:
            self.close()
            raise

    def _check_heaps(self) -> None:
        """Raises DamagedError where HDF5 might never come back from reading a text."""
        with self.reading("", "its texts"):
            table = self.h5.attrs.get(HEAPS_ATTR)
            if table is not None and not heaps_are_sound(self.h5.id.get_vfd_handle(), table):
                raise self.damaged("", "the texts in it do not match their checksum")

    def close(self) -> None:
        self.h5.close()

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        with self.reading(name, f"/{name}"):
            return name in self.h5

    def array(self, name: str) -> np.ndarray:
        """Read a dataset as a whole; texts are bytes."""
        with self.reading(name, f"/{name}"):
            node = self.h5[name]
            if node.nbytes > MOST_PACKED * max(os.path.getsize(self.path), 1 << 20):
                raise ValueError("a damaged shape, which may ask for any amount of memory")
            value: np.ndarray = node[...]
            stored = node.attrs.get(CRC_ATTR)
        if stored is not None and value_crc32(value) != stored:
            raise self.damaged(name, f"/{name} does not match its checksum")
        return value

    def texts(self, name: str) -> np.ndarray:
        """Read a dataset of texts: object (str) (n,)."""
        value = self.array(name)
        with self.reading(name, f"/{name}"):
            return np.array([text.decode() for text in value.tolist()], dtype=object)

    def attrs(self, name: str = "") -> dict[str, Any]:
        """Read the attributes of an object, of the root where none is named; without the checksums."""
        with self.reading(name, f"the attributes of /{name}"):
            node = self.h5[name] if name else self.h5
            values = dict(node.attrs)
            sums = attr_checksums(node, values)
        for key, stored in sums.items():
            if value_crc32(values[key]) != stored:
                raise self.damaged(name, f"the attribute {key} of /{name} does not match its checksum")
        return {key: value for key, value in values.items() if key not in OWN_ATTRS}

    def check(self, choose: Callable[[str], bool] = lambda _: True) -> None:
        """Read all objects for which `choose` says so ("" is the root); raises DamagedError for the first that is damaged."""
        names: list[str] = [""]
        with self.reading("", "its groups"):
            self.h5.visit(names.append)
        for name in filter(choose, names):
            self.attrs(name)
            with self.reading(name, f"/{name}"):
                is_array = bool(name) and isinstance(self.h5[name], h5py.Dataset)
            if is_array:
                self.array(name)

    def damaged(self, name: str, what: str) -> DamagedError:
        """Make the error for a damaged object. What wrote the file will look through all of it when it runs again."""
        touch(self.path)
        return DamagedError(f"{self.path}: damaged ({what}): {self._remedy(name)}", what)

    @contextmanager
    def reading(self, name: str, what: str) -> Iterator[None]:
        """Turn whatever HDF5, NumPy and Python raise while an object is read into a DamagedError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            why = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            raise self.damaged(name, f"{what} cannot be read{why}") from None
