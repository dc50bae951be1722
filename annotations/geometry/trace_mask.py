"""Trace the outlines of the values of a label image, along the borders of its pixels, exactly and in bulk."""

from __future__ import annotations

import numpy as np
import shapely

BLOCK_PIXELS = 1 << 23  # looked at a time, which bounds memory
RIGHT, DOWN, LEFT, UP = range(4)  # a quarter turn clockwise on the screen adds one


def trace_outlines(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trace whole numbers (height, width): returns the values above 0 (n,), ascending, and the outline of each (n,).

    Pixel (column, row) is the square from (column, row) to (column + 1, row + 1). An outline has holes where the value has,
    and its area is the number of pixels. A value in several patches (that share no pixel side) is a MultiPolygon.
    """
    from skimage import measure

    patches = measure.label(np.where(mask > 0, mask, 0), background=0, connectivity=1)
    patch, start, stop, direction = _sides(patches)
    if not len(patch):
        return np.zeros(0, dtype=mask.dtype), np.zeros(0, dtype=object)
    polygons, number = polygons_of_sides(patch, start, stop, direction, patches.shape)
    return by_value(polygons, _value_of_patches(mask, patch, start, direction)[number])


def polygons_of_sides(
    patch: np.ndarray, start: np.ndarray, stop: np.ndarray, direction: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a polygon for each patch, object (n,), and the patch of each, from all straight pieces of their outlines.

    patch (S,): whole numbers above 0, one for pixels that hang together by their sides; start, stop (S, 2): where each piece
    begins and ends, x and y of corners of pixels; direction (S,): the way it goes, its patch to the right, as far as it goes
    straight; shape: height and width, in pixels, that all of them lie in.
    """
    ring, order = _rings(_following(patch, start, stop, direction, shape))
    xy, ring, patch_of = start[order].astype(np.float64), ring[order], patch[order]
    first = np.flatnonzero(np.append(True, ring[1:] != ring[:-1]))
    return _polygons(xy, first, patch_of[first])


def _sides(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return straight pieces of the outlines of all patches, the patch to the right of the way they go.

    Returns the patch (S,), where each starts and stops (S, 2) as x, y, and its direction (S,).
    """
    sides = []
    for across, ways in ((patches, (LEFT, RIGHT)), (patches.T, (DOWN, UP))):
        for block in range(0, len(across) + 1, step := max(1, BLOCK_PIXELS // max(1, across.shape[1]))):
            stop_row = min(block + step, len(across) + 1)
            above, below = _rows(across, block - 1, stop_row - 1), _rows(across, block, stop_row)
            for inside, way in zip((above, below), ways, strict=True):
                patch, fixed, low, high = _runs(np.where(above != below, inside, 0))
                fixed = fixed + block
                begin, end = (low, high) if way in (RIGHT, DOWN) else (high, low)
                flat = way in (RIGHT, LEFT)
                starts = np.stack((begin, fixed) if flat else (fixed, begin), axis=1)
                stops = np.stack((end, fixed) if flat else (fixed, end), axis=1)
                sides.append((patch, starts, stops, np.full(len(patch), way)))
    patch, start, stop, direction = (np.concatenate(arrays) for arrays in zip(*sides, strict=True))
    return patch, start, stop, direction


def _rows(array: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Return rows first:stop, zeros for those outside of the array."""
    inside = array[max(first, 0) : min(stop, len(array))]
    return np.pad(inside, ((max(-first, 0), max(stop - len(array), 0)), (0, 0)))


def _runs(sides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return runs of one number above 0 along the rows of an array: the number, row, first column, column behind the last."""
    padded = np.pad(sides, ((0, 0), (1, 1)))
    change = padded[:, 1:] != padded[:, :-1]
    row, start = np.nonzero(change & (padded[:, 1:] != 0))
    _, stop = np.nonzero(change & (padded[:, :-1] != 0))
    return sides[row, start], row, start, stop


def _following(
    patch: np.ndarray, start: np.ndarray, stop: np.ndarray, direction: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the piece that follows each piece, int64 (S,).

    Where a patch meets itself at a corner two pieces go on. The left one keeps the two sides of the background apart, so
    that no ring meets itself.
    """
    width = shape[1] + 1
    corners = width * (shape[0] + 1)
    key = ((patch.astype(np.int64) * corners) + start[:, 1] * width + start[:, 0]) * 4
    at = np.argsort(key + direction, kind="stable")
    known = (key + direction)[at]
    ends = ((patch.astype(np.int64) * corners) + stop[:, 1] * width + stop[:, 0]) * 4
    to_left = ends + (direction + 3) % 4
    place = np.minimum(np.searchsorted(known, to_left), len(known) - 1)
    turns_left = known[place] == to_left
    place[~turns_left] = np.searchsorted(known, (ends + (direction + 1) % 4)[~turns_left])
    return np.asarray(at[place])


def _rings(following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each piece that those of a ring share, and the pieces ring by ring, in the order they follow."""
    n = len(following)
    ring, jump = np.arange(n), following.copy()
    while True:  # twice as far each time: the ring is named by its first piece
        smaller = np.minimum(ring, ring[jump])
        if (smaller == ring).all():
            break
        ring, jump = smaller, jump[jump]
    is_first = ring == np.arange(n)
    steps, jump = np.where(is_first, 0, 1), np.where(is_first, np.arange(n), following)
    while (jump != ring).any():
        steps, jump = steps + steps[jump], jump[jump]
    steps[is_first] = n  # back to the first piece; it comes first itself
    return ring, np.lexsort((-steps, ring))


def _polygons(xy: np.ndarray, first: np.ndarray, patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Build from rings laid end to end from xy[first[i]], each of patch[i]: one polygon a patch, and the patch of each.

    A patch has one ring that runs clockwise on the screen, its outline; the others are its holes.
    """
    length = np.diff(np.append(first, len(xy)))
    number = np.repeat(np.arange(len(first)), length)
    after = np.arange(1, len(xy) + 1)
    after[first + length - 1] = first
    twice = np.bincount(number, xy[:, 0] * xy[after, 1] - xy[after, 0] * xy[:, 1])
    order = np.lexsort((twice < 0, patch))
    rows = np.concatenate([np.arange(first[i], first[i] + length[i] + 1) for i in order.tolist()])
    ends = np.cumsum(length[order] + 1)
    rows[ends - 1] = first[order]  # close it
    names, per_patch = np.unique(patch, return_counts=True)
    offsets = np.concatenate([[0], ends]), np.concatenate([[0], np.cumsum(per_patch)])
    return np.asarray(shapely.from_ragged_array(shapely.GeometryType.POLYGON, xy[rows], offsets), dtype=object), names


def _value_of_patches(mask: np.ndarray, patch: np.ndarray, start: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the value of patch i at index i; a top side that goes right starts at the corner of a pixel of it."""
    top = direction == RIGHT
    values = np.zeros(int(patch.max()) + 1, dtype=mask.dtype)
    values[patch[top]] = mask[start[top, 1], start[top, 0]]
    return values


def by_value(polygons: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values (n,), ascending, and the polygons of each as one outline, (n,)."""
    order = np.argsort(value, kind="stable")
    polygons, value = polygons[order], value[order]
    values, row, count = np.unique(value, return_inverse=True, return_counts=True)
    outlines = np.empty(len(values), dtype=object)
    single = count[row] == 1
    outlines[row[single]] = polygons[single]
    several = np.flatnonzero(count > 1)
    if len(several):
        outlines[several] = shapely.multipolygons(polygons[~single], indices=np.searchsorted(several, row[~single]))
    return values, outlines
