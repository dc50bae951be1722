"""The global heaps in which HDF5 keeps texts, the one structure of a file that it reads without a checksum, and trusts.

A damaged size in one makes HDF5 loop for ever. So a file of ours lists its heaps with their CRC-32, and they are looked at
before any text is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from tiling.storage.checksums import crc32

MAGIC = b"GCOL\x01\x00\x00\x00"  # signature, version, three bytes that are reserved
HEADER_BYTES = OBJECT_BYTES = 16
LARGEST_BYTES = 1 << 20  # written at once: what is larger is pixels


def heaps_in(data: bytes, address: int) -> Iterator[int]:
    """Yield the addresses of heaps that begin in a piece of a file, which lies at `address`."""
    at = data.find(MAGIC)
    while at >= 0:
        yield address + at
        at = data.find(MAGIC, at + len(MAGIC))


def heap_table(descriptor: int, addresses: Iterable[int]) -> np.ndarray:
    """Collect address, bytes and CRC-32 of the heaps of a file, those that lie end to end in one row: uint64 (k, 3)."""
    runs: list[list[int]] = []
    for address in sorted(addresses):
        size = int.from_bytes(os.pread(descriptor, 8, address + 8), "little")
        if runs and sum(runs[-1]) == address:
            runs[-1][1] += size
        elif not runs or address > sum(runs[-1]):
            runs.append([address, size])
    rows = [(address, size, crc32(os.pread(descriptor, size, address))) for address, size in runs]
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def heaps_are_sound(descriptor: int, table: np.ndarray) -> bool:
    """Tell whether the heaps of a file are as they were written or, where a program added texts, at least well formed."""
    for address, size, total in table.tolist():
        data = os.pread(descriptor, size, address)
        if crc32(data) != total and not _is_well_formed(data, size):
            return False
    return True


def _is_well_formed(data: bytes, size: int) -> bool:
    """Tell whether objects fill heaps that lie end to end exactly, as HDF5 goes from one to the next by their sizes."""
    at = 0
    while at < size:
        heap = int.from_bytes(data[at + 8 : at + 16], "little")
        if not data.startswith(MAGIC, at) or not HEADER_BYTES < heap <= size - at:
            return False
        end, at = at + heap, at + HEADER_BYTES
        while at + OBJECT_BYTES <= end:
            number, length = int.from_bytes(data[at : at + 2], "little"), int.from_bytes(data[at + 8 : at + 16], "little")
            # Object 0 is the free rest, its own header included.
            at += length if number == 0 else OBJECT_BYTES + -(-length // 8) * 8
            if at > end or (number == 0 and length < OBJECT_BYTES):
                return False
        at = end
    return True
