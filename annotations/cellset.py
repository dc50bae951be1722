"""Whether the polygons of a MultiPolygon are the cells of a class, as CellViT writes them, or one region in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from annotations.positions import IrregularPositionError, Ring, rings_from_json, rings_from_lists

CELL_SIDE_L0 = 256.0  # 64 um at 40x; no cell is longer
CELL_SHARE = 0.9  # of the area: a few of a detector's cells run together, and a region has specks around it
SAMPLED = 1000


def are_cells(polygons: Sequence[msgspec.Raw] | Sequence[list[Ring]]) -> bool:
    """True where nearly all of the area is in pieces no longer than a cell, level-0 pixels.

    polygons: the coordinates of a MultiPolygon, JSON or lists; of many a sample is looked at.
    """
    some: Any = polygons[:: max(1, len(polygons) // SAMPLED)]
    if not len(some):
        return False
    try:
        xy, length, ring_count = rings_from_json(some) if isinstance(some[0], msgspec.Raw) else rings_from_lists(some)
    except IrregularPositionError:
        return False
    outline = np.zeros(len(length), dtype=bool)
    outline[(np.cumsum(ring_count) - ring_count)[ring_count > 0]] = True
    some_of = np.flatnonzero(length)
    if not len(some_of):
        return False
    start = (np.cumsum(length) - length)[some_of]
    with np.errstate(invalid="ignore", over="ignore"):
        sides = np.maximum.reduceat(xy, start) - np.minimum.reduceat(xy, start)
        sides = sides[outline[some_of] & np.isfinite(sides).all(axis=1)]
        area = sides.prod(axis=1)
        return bool(area[sides.max(axis=1, initial=0) <= CELL_SIDE_L0].sum() > CELL_SHARE * area.sum())
