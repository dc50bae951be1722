"""Nested JSON coordinate arrays -> flat arrays with counts, without a Python step per vertex."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

BATCH_BYTES = 8 << 20  # bounds the list of Python floats that is alive at a time
OPEN, CLOSE = ord("["), ord("]")
NOT_NUMBERS = b"[] \n\t\r"

_floats = msgspec.json.Decoder(list[float])


@dataclass(frozen=True)
class Nested:
    """The coordinates of n geometries whose arrays are nested equally deep.

    xy: float64 (V, 2). sizes: one array per level from the outside in; sizes[0] is int64 (n,), how many children each
    geometry has; sizes[1] how many children each of those has; ... the last level counts vertices, so it sums to V.
    A Point (depth 1) has no level, a MultiPoint (depth 2) one, a Polygon (depth 3) two, a MultiPolygon (depth 4) three.
    """

    xy: np.ndarray
    sizes: tuple[np.ndarray, ...]


def flatten(raws: Sequence[bytes], depth: int) -> Nested:
    """Parse JSON arrays of numbers nested `depth` deep (a vertex is the innermost array; z and m are left out).

    Anything that is not a finite number, or not an array where one belongs, becomes a NaN vertex in its geometry; an
    empty array becomes a count of 0.
    """
    parts = [part for batch in _batches(raws) for part in _batch(batch, depth)]
    if not parts:
        return Nested(np.zeros((0, 2)), tuple(np.zeros(0, np.int64) for _ in range(depth - 1)))
    sizes = tuple(np.concatenate([part.sizes[level] for part in parts]) for level in range(depth - 1))
    return Nested(np.concatenate([part.xy for part in parts]), sizes)


def _batches(raws: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    start = total = 0
    for stop, raw in enumerate(raws):
        total += len(raw)
        if total > BATCH_BYTES and stop > start:
            yield raws[start:stop]
            start, total = stop, len(raw)
    if start < len(raws):
        yield raws[start:]


def _batch(raws: Sequence[bytes], depth: int) -> list[Nested]:
    """A batch in one go; where that fails, each of its geometries alone, the odd ones by hand."""
    found = _regular(raws, depth)
    if found is not None:
        return [found]
    if len(raws) == 1:
        return [_by_hand(raws[0], depth)]
    half = len(raws) // 2
    return _batch(raws[:half], depth) + _batch(raws[half:], depth)


def _regular(raws: Sequence[bytes], depth: int) -> Nested | None:
    """Numbers and brackets read apart; None where they do not add up to vertices of one dimension."""
    text = b"[" + b",".join(raws) + b"]"
    try:
        numbers = np.array(_floats.decode(b"[" + text.translate(None, NOT_NUMBERS) + b"]"), dtype=np.float64)
    except (msgspec.ValidationError, msgspec.DecodeError):
        return None
    characters = np.frombuffer(text, np.uint8)
    brackets = characters[(characters == OPEN) | (characters == CLOSE)]
    is_open = brackets == OPEN
    level = np.cumsum(np.where(is_open, 1, -1).astype(np.int8), dtype=np.int32)[is_open]
    vertices = int((level == depth + 1).sum())
    if not vertices or level.max() != depth + 1 or len(numbers) % vertices or len(numbers) < 2 * vertices:
        return None
    sizes = []
    for inner in range(3, depth + 2):
        # Every opening bracket of a level belongs to the last opening bracket of the level above it.
        parents = np.cumsum(level == inner - 1)[level == inner] - 1
        sizes.append(np.bincount(parents, minlength=int((level == inner - 1).sum())).astype(np.int64))
    return Nested(numbers.reshape(vertices, -1)[:, :2], tuple(sizes))


def _by_hand(raw: bytes, depth: int) -> Nested:
    """One geometry of any shape, step by step."""
    sizes: list[list[int]] = [[] for _ in range(depth - 1)]
    xy: list[tuple[float, float]] = []

    def walk(node: Any, level: int) -> None:
        if level == depth - 1:
            is_vertex = isinstance(node, list) and len(node) >= 2
            xy.append((_number(node[0]), _number(node[1])) if is_vertex else (np.nan, np.nan))
            return
        children = node if isinstance(node, list) else [None]
        sizes[level].append(len(children))
        for child in children:
            walk(child, level + 1)

    walk(msgspec.json.decode(raw), 0)
    arrays = tuple(np.array(values, dtype=np.int64) for values in sizes)
    return Nested(np.array(xy, dtype=np.float64).reshape(-1, 2), arrays)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan
