"""Run-length masks as COCO has them -> outlines, straight from the runs: no mask is unpacked to pixels.

A mask is its pixels column by column, told as the lengths of runs that are off and on in turn, the first one off. Lengths
are a list of numbers, or a text. In the text every length from the fourth on is written as what it is more than the one two
before it; a number is written in digits of five bits, the lowest first, each a character 48 places up in ASCII; bit 5 of a
digit says that more follow, bit 4 of the last one that the number is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from annotations.geometry.trace_mask import DOWN, LEFT, RIGHT, UP, by_value, polygons_of_sides

MAX_SIDE = 1 << 20  # pixels; no slide is as wide, and a line of a file could ask for any number of columns
FIRST_CHARACTER, MORE, NEGATIVE, BITS, MAX_DIGITS = 48, 32, 16, 5, 12

Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def lengths_of(text: str) -> np.ndarray:
    """Decode the lengths, int64, that a text stands for. Raises ValueError where it is none."""
    digits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - FIRST_CHARACTER
    if not len(digits):
        return digits
    if digits.min() < 0 or digits.max() >= 2 * MORE or digits[-1] & MORE:
        raise ValueError("no run lengths, or cut short")
    last = np.flatnonzero((digits & MORE) == 0)
    first = np.append(0, last[:-1] + 1)
    size = last - first + 1
    if size.max() > MAX_DIGITS:
        raise ValueError("a run length beyond any mask")
    place = np.arange(len(digits)) - np.repeat(first, size)
    numbers = np.add.reduceat((digits & (MORE - 1)) << (BITS * place), first)
    numbers[(digits[last] & NEGATIVE) > 0] -= (1 << (BITS * size))[(digits[last] & NEGATIVE) > 0]
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return numbers


def runs_of(mask: Any) -> tuple[Runs, tuple[int, int]]:
    """Decode a mask {"size": [height, width], "counts": list or text} -> its runs, and its width and height.

    Runs: int64 (n,) each, the column, the first row and the row behind the last. Raises ValueError where it is no mask.
    """
    try:
        height, width = (int(side) for side in mask["size"])
        counts = mask["counts"]
        lengths = lengths_of(counts) if isinstance(counts, str) else np.array(counts, dtype=np.int64).reshape(-1)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no mask: {error}") from None
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE) or (lengths < 0).any() or (lengths > height * width).any():
        raise ValueError(f"a mask of {width} x {height} that does not hold its runs")
    stop = np.cumsum(lengths)
    if (stop[-1] if len(stop) else 0) != height * width:
        raise ValueError(f"runs that do not fill {width} x {height}")
    return _columns(*_joined((stop - lengths)[1::2], stop[1::2]), height), (width, height)


def _joined(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join runs that touch: returns runs with something in between; empty ones are left out."""
    filled = stop > start
    start, stop = start[filled], stop[filled]
    apart = start[1:] > stop[:-1]
    return start[np.append(True, apart)[: len(start)]], stop[np.append(apart, True)[: len(stop)]]


def _columns(start: np.ndarray, stop: np.ndarray, height: int) -> Runs:
    """Split runs along all pixels into columns."""
    first, last = start // height, (stop - 1) // height
    pieces = last - first + 1
    column = np.repeat(first, pieces)
    column += np.arange(len(column)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    top = np.where(column == np.repeat(first, pieces), np.repeat(start, pieces) - column * height, 0)
    bottom = np.where(column == np.repeat(last, pieces), np.repeat(stop, pieces) - column * height, height)
    return column, top, bottom


def outlines_of(masks: Sequence[Runs]) -> tuple[np.ndarray, np.ndarray]:
    """Return which masks hold anything, ascending (n,), and the outline of each, along the borders of its pixels, (n,).

    The pixel (column, row) is the square from there to (column + 1, row + 1). An outline has holes where the mask has; patches
    that share no side of a pixel are parts of a MultiPolygon.
    """
    mask = np.repeat(np.arange(len(masks)), [len(column) for column, _, _ in masks])
    if not len(mask):
        return np.zeros(0, np.int64), np.zeros(0, dtype=object)
    column, top, bottom = (np.concatenate(arrays) for arrays in zip(*masks, strict=True))
    height, width = int(bottom.max()), int(column.max()) + 1
    patch = _patches(mask * (width + 2) + column, top, bottom, height)
    across = _across(patch, column, top, RIGHT), _across(patch, column, bottom, LEFT)
    sides = *across, _down(mask * (width + 2) + column, column, top, bottom, patch, height)
    patches, start, stop, direction = (np.concatenate(arrays) for arrays in zip(*sides, strict=True))
    polygons, number = polygons_of_sides(patches, start, stop, direction, (height, width))
    mask_of_patch = np.zeros(int(patch.max()) + 1, np.int64)
    mask_of_patch[patch] = mask
    return by_value(polygons, mask_of_patch[number])


def _patches(line: np.ndarray, top: np.ndarray, bottom: np.ndarray, height: int) -> np.ndarray:
    """Number runs (n,) from 1, the same for runs that hang together; line: the column, counted over all masks."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, step = len(line), height + 1
    beside = (line + 1) * step
    low = np.searchsorted(line * step + bottom, beside + top, side="right")
    high = np.searchsorted(line * step + top, beside + bottom, side="left")
    many = np.maximum(high - low, 0)
    run = np.repeat(np.arange(n), many)
    beside_it = np.arange(len(run)) + np.repeat(low - (np.cumsum(many) - many), many)
    links = coo_array((np.ones(len(run), dtype=bool), (run, beside_it)), shape=(n, n))
    return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64) + 1


def _across(
    patch: np.ndarray, column: np.ndarray, row: np.ndarray, way: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join upper (RIGHT) or lower (LEFT) sides of runs as far as they go straight: patch, start, stop, direction."""
    order = np.lexsort((column, row, patch))
    patch, column, row = patch[order], column[order], row[order]
    goes_on = (patch[1:] == patch[:-1]) & (row[1:] == row[:-1]) & (column[1:] == column[:-1] + 1)
    first, last = np.flatnonzero(np.append(True, ~goes_on)), np.flatnonzero(np.append(~goes_on, True))
    left, right = (np.stack([x, row[first]], axis=1) for x in (column[first], column[last] + 1))
    start, stop = (left, right) if way == RIGHT else (right, left)
    return patch[first], start, stop, np.full(len(first), way)


def _down(
    line: np.ndarray, column: np.ndarray, top: np.ndarray, bottom: np.ndarray, patch: np.ndarray, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the sides of runs along columns, where no run is beside them: patch, start, stop, direction.

    Between two columns the ends of the runs of both, in order, are where what is on one side starts or stops to differ
    from what is on the other; so that every second piece between them is a side.
    """
    n = len(line)
    run = np.tile(np.arange(n), 4)
    is_left = np.repeat([True, True, False, False], n)  # of the border in question
    row = np.concatenate([top, bottom, top, bottom])
    border = line[run] + is_left
    order = np.lexsort((row, border))
    run, is_left, row = run[order], is_left[order], row[order]
    at = np.arange(4 * n)
    latest = [run[np.maximum.accumulate(np.where(on_side, at, 0))] for on_side in (is_left, ~is_left)]
    inside_left = np.cumsum(is_left) % 2 == 1
    start, stop = row[::2], row[1::2]
    owner = np.where(inside_left, *latest)[::2]
    x = column[owner] + inside_left[::2]
    filled = stop > start
    owner, x, start, stop, down = owner[filled], x[filled], start[filled], stop[filled], inside_left[::2][filled]
    upper, lower = np.stack([x, start], axis=1), np.stack([x, stop], axis=1)
    turned = down[:, None]
    return patch[owner], np.where(turned, upper, lower), np.where(turned, lower, upper), np.where(down, DOWN, UP)
