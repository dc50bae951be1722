"""Rings -> valid polygons, in bulk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from annotations.table import objects

POLYGON, MULTIPOLYGON = 3, 6
LEAST_DISTINCT = 3  # vertices that span an area


@dataclass(frozen=True)
class Built:
    """n geometries. geometry: object (n,), valid and of positive area, None where nothing of that kind could be made.

    repaired: bool (n,), it had to be changed to become valid. empty: bool (n,), there was nothing to begin with.
    """

    geometry: np.ndarray
    repaired: np.ndarray
    empty: np.ndarray


def build_polygons(xy: np.ndarray, ring_sizes: np.ndarray, polygon_rings: np.ndarray) -> Built:
    """Polygons from vertices.

    xy: float64 (V, 2). ring_sizes: int64 (R,) vertices per ring, summing to V; rings need not be closed.
    polygon_rings: int64 (n,) rings per polygon, the shell first, summing to R. A polygon with a vertex that is not
    finite, or without area, is None. Rings that cross themselves keep all the area they enclose.
    """
    count = len(polygon_rings)
    polygon_of_ring = np.repeat(np.arange(count), polygon_rings)
    ring_of_vertex = np.repeat(np.arange(len(ring_sizes)), ring_sizes)
    usable = _spans_area(xy, ring_sizes)
    is_shell = np.ones(len(ring_sizes), bool)
    is_shell[1:] = polygon_of_ring[1:] != polygon_of_ring[:-1]
    lost = np.zeros(count, bool)
    lost[polygon_of_ring[is_shell & ~usable]] = True
    finite = np.isfinite(xy).all(axis=1)
    lost[polygon_of_ring[ring_of_vertex[~finite]]] = True

    repaired = np.zeros(count, bool)
    repaired[polygon_of_ring[~usable]] = True  # a hole without area is left out
    keep = usable & ~lost[polygon_of_ring]
    geometry = np.full(count, None, dtype=object)
    if keep.any():
        rings = shapely.linearrings(xy[np.repeat(keep, ring_sizes)], indices=np.repeat(np.arange(keep.sum()), ring_sizes[keep]))
        owners, index = np.unique(polygon_of_ring[keep], return_inverse=True)
        geometry[owners] = shapely.polygons(rings, indices=index)
    fixed, changed = repair(geometry)
    empty = np.bincount(polygon_of_ring[ring_sizes > 0], minlength=count) == 0
    return Built(fixed, (repaired | changed) & (fixed != None), empty)  # noqa: E711


def join_parts(parts: Built, part_counts: np.ndarray) -> Built:
    """MultiPolygons from the polygons of n geometries, part_counts: int64 (n,) each; a single part stays a Polygon."""
    count = len(part_counts)
    owner = np.repeat(np.arange(count), part_counts)
    there = parts.geometry != None  # noqa: E711
    geometry = np.full(count, None, dtype=object)
    if there.any():
        owners, index = np.unique(owner[there], return_inverse=True)
        single = np.bincount(index)[index] == 1
        geometry[owner[there][single]] = parts.geometry[there][single]
        if not single.all():
            several, several_index = np.unique(index[~single], return_inverse=True)
            geometry[owners[several]] = shapely.multipolygons(parts.geometry[there][~single], indices=several_index)
    repaired = np.zeros(count, bool)
    repaired[owner[parts.repaired | (~there & ~parts.empty)]] = True
    fixed, changed = repair(geometry)
    empty = np.bincount(owner[~parts.empty], minlength=count) == 0
    return Built(fixed, (repaired | changed) & (fixed != None), empty)  # noqa: E711


def repair(geometry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Valid polygonal geometries of positive area, and bool (n,) which were changed; None where nothing is left.

    geometry: object (n,), Polygon, MultiPolygon or None.
    """
    missing = shapely.is_missing(geometry)
    bad = ~missing & ~shapely.is_valid(geometry)
    fixed = geometry.copy()
    if bad.any():
        # "structure" keeps what a hand-drawn loop encloses; "linework" would punch holes where it crosses itself.
        fixed[bad] = polygonal(shapely.make_valid(geometry[bad], method="structure", keep_collapsed=False))
    fixed[~missing & ~(shapely.area(fixed) > 0)] = None
    return fixed, bad & ~shapely.is_missing(fixed)


def polygonal(geometry: np.ndarray) -> np.ndarray:
    """The polygons of each geometry, lines and points left out: object (n,), Polygon, MultiPolygon or None."""
    kinds = shapely.get_type_id(geometry)
    out = objects(geometry)
    mixed = np.flatnonzero((kinds != POLYGON) & (kinds != MULTIPOLYGON))
    if not len(mixed):
        return out
    out[mixed] = None
    parts, owner = shapely.get_parts(geometry[mixed], return_index=True)
    leaves, leaf_of = shapely.get_parts(parts, return_index=True)
    areal = shapely.get_type_id(leaves) == POLYGON
    if areal.any():
        owners, index = np.unique(owner[leaf_of][areal], return_inverse=True)
        out[mixed[owners]] = shapely.multipolygons(leaves[areal], indices=index)
    return out


def _spans_area(xy: np.ndarray, ring_sizes: np.ndarray) -> np.ndarray:
    """bool (R,): the ring has at least three vertices, not counting a closing one."""
    stop = np.cumsum(ring_sizes)
    start = stop - ring_sizes
    distinct = ring_sizes.copy()
    filled = ring_sizes > 1
    distinct[filled] -= (xy[start[filled]] == xy[stop[filled] - 1]).all(axis=1)
    return distinct >= LEAST_DISTINCT
