"""Positions of many polygons, JSON text -> flat arrays, without a Python object per position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import msgspec
import numpy as np

BATCH_BYTES = 8 << 20  # bounds the list of Python floats that is alive at a time
NOT_IN_NUMBERS = b"[] \n\t\r"
NOT_BRACKETS = b"0123456789.eE+- \n\t\r"
POLYGON, RING, POSITION = 2, 3, 4  # depth of their opening brackets in a list of polygons

Ring = list[tuple[float, float]]
Rings = tuple[np.ndarray, np.ndarray, np.ndarray]
_floats = msgspec.json.Decoder(list[float])
_polygons = msgspec.json.Decoder(list[list[Ring]])


class IrregularPositionError(ValueError):
    """Somewhere there is no pair of numbers where a position belongs."""


def rings_from_json(raws: Sequence[msgspec.Raw]) -> Rings:
    """`coordinates` of P polygons as JSON -> xy float64 (V, 2), length int64 (R,) positions of each ring, and int64 (P,)
    rings of each polygon. Raises IrregularPositionError where a polygon is not a list of lists of pairs of numbers.
    """
    parts = [_regular(batch) or _any_pairs(batch) for batch in _batches(raws)]
    if not parts:
        return np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0, np.int64)
    xy, length, rings = zip(*parts, strict=True)
    return np.concatenate(xy), np.concatenate(length), np.concatenate(rings)


def rings_from_lists(polygons: Sequence[list[Ring]]) -> Rings:
    """The same from lists of rings of (x, y)."""
    ring_count = np.fromiter(map(len, polygons), np.int64, len(polygons))
    rings = list(chain.from_iterable(polygons))
    length = np.fromiter(map(len, rings), np.int64, len(rings))
    flat = chain.from_iterable(chain.from_iterable(rings))
    return np.fromiter(flat, np.float64, 2 * int(length.sum())).reshape(-1, 2), length, ring_count


def _batches(raws: Sequence[msgspec.Raw]) -> Iterator[bytes]:
    """Lists of polygons, as JSON, of about BATCH_BYTES each."""
    size = np.array([memoryview(raw).nbytes for raw in raws], dtype=np.int64)
    cuts = (np.flatnonzero(np.diff(np.cumsum(size) // BATCH_BYTES)) + 1).tolist()
    for start, stop in pairwise([0, *cuts, len(raws)]):
        if stop > start:
            yield b"[" + b",".join(raws[start:stop]) + b"]"


def _regular(text: bytes) -> Rings | None:
    """Numbers and brackets read apart; None where something is empty, or no pair of numbers."""
    try:
        numbers = _floats.decode(b"[" + text.translate(None, NOT_IN_NUMBERS) + b"]")
    except msgspec.DecodeError:
        return None
    skeleton = text.translate(None, NOT_BRACKETS)
    pairs = skeleton.count(b"[,]")
    if len(numbers) != 2 * pairs:
        return None
    characters = np.frombuffer(skeleton, np.uint8)
    brackets = characters[characters != ord(",")]
    is_open = brackets == ord("[")
    depth = np.cumsum(np.where(is_open, np.int8(1), np.int8(-1)), dtype=np.int8)[is_open]
    at = [np.flatnonzero(depth == level) for level in (POLYGON, RING, POSITION)]
    if len(at[2]) != pairs or 1 + sum(map(len, at)) != len(depth):
        return None
    ends = len(depth)
    length = np.diff(np.searchsorted(at[2], np.append(at[1], ends)))
    rings = np.diff(np.searchsorted(at[1], np.append(at[0], ends)))
    return np.array(numbers, dtype=np.float64).reshape(-1, 2), length.astype(np.int64), rings.astype(np.int64)


def _any_pairs(text: bytes) -> Rings:
    try:
        return rings_from_lists(_polygons.decode(text))
    except msgspec.DecodeError as error:
        raise IrregularPositionError(str(error)) from None
