"""Objects cut to tiles: the box of each piece, in pixels of its tile."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import shapely

from annotations.rings import polygon_parts

MANY_TILES = 16  # an object over this many tiles is prepared once, to find the tiles it fills or misses without cutting


@dataclass(frozen=True)
class TileBoxes:
    """Boxes of N tiles, M rows ordered by (tile, object).

    xyxy: (M, 4) float32, x0, y0, x1, y1 in target pixels of the tile, within [0, patch_px], x1 > x0, y1 > y0;
        the bounding box of the clipped polygon
    offsets: (N + 1,) int64, rows of tile i are offsets[i]:offsets[i + 1]
    object: (M,) int32, row of the object in the geometry given
    visible: (M,) float32 in (0, 1], clipped area / whole area
    counts: "outside" objects without a row; "degenerate" pieces without area, or too thin for float32, left out
    """

    xyxy: np.ndarray
    offsets: np.ndarray
    object: np.ndarray
    visible: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


def clip_to_tiles(geometry: np.ndarray, coords_l0: np.ndarray, size_l0: float, patch_px: int) -> TileBoxes:
    """Cut every object to every tile it lies in.

    geometry: (n,) object, valid Polygons or MultiPolygons with area, level-0 pixels
    coords_l0: (N, 2) top-left (x, y) of each tile, level-0 pixels, in any arrangement, overlapping or not
    size_l0: side of a tile, level-0 pixels, may be fractional; patch_px: the same side in target pixels

    Only pairs in which the outline crosses the tile's border are cut.
    """
    if not (np.isfinite(size_l0) and size_l0 > 0 and patch_px > 0):
        raise ValueError(f"size_l0 {size_l0}, patch_px {patch_px}: both must be above 0")
    geometry = np.asarray(geometry, dtype=object)
    corner = np.asarray(coords_l0, dtype=np.float64).reshape(-1, 2)
    if not len(geometry) or not len(corner):
        none = np.empty(0, dtype=np.int64)
        return _boxes(np.empty((0, 4)), np.empty(0), none, none, len(corner), len(geometry), patch_px)

    tiles = shapely.box(corner[:, 0], corner[:, 1], corner[:, 0] + size_l0, corner[:, 1] + size_l0)
    bounds, whole = shapely.bounds(geometry), shapely.area(geometry)
    obj, tile = shapely.STRtree(tiles).query(geometry)
    low, high = corner[tile], corner[tile] + size_l0
    extent = bounds[obj]
    overlap = (extent[:, :2] < high).all(axis=1) & (extent[:, 2:] > low).all(axis=1)
    obj, tile, low, high, extent = obj[overlap], tile[overlap], low[overlap], high[overlap], extent[overlap]
    area = whole[obj]

    crossing = np.flatnonzero((extent[:, :2] < low).any(axis=1) | (extent[:, 2:] > high).any(axis=1))
    filled, crossing, missed = _without_cutting(geometry, tiles, obj, tile, crossing)
    extent[filled] = np.concatenate([low[filled], high[filled]], axis=1)
    area[filled] = size_l0 * size_l0
    pieces, apart = _cut(geometry[obj[crossing]], tiles[tile[crossing]])
    extent[crossing] = shapely.bounds(pieces)  # NaN where a line or a point is all they share
    area[crossing] = shapely.area(pieces)
    present = np.ones(len(obj), dtype=bool)
    present[missed] = False
    present[crossing[apart]] = False

    obj, tile = obj[present], tile[present]
    px = (extent[present] - np.tile(low[present], 2)) * (patch_px / size_l0)
    return _boxes(px, area[present] / whole[obj], obj, tile, len(corner), len(geometry), patch_px)


def _without_cutting(
    geometry: np.ndarray, tiles: np.ndarray, obj: np.ndarray, tile: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of large objects sorted: tiles they cover whole, pairs to cut (small objects' too), tiles they miss."""
    many = np.bincount(obj[pairs], minlength=len(geometry)) > MANY_TILES
    large = pairs[many[obj[pairs]]]
    if not len(large):
        return large, pairs, large
    shapely.prepare(geometry[many])
    try:
        filled = shapely.covers(geometry[obj[large]], tiles[tile[large]])
        touched = shapely.intersects(geometry[obj[large]], tiles[tile[large]])
    finally:
        shapely.destroy_prepared(geometry[many])
    rest = np.concatenate([pairs[~many[obj[pairs]]], large[touched & ~filled]])
    return large[filled], rest, large[~touched]


def _cut(geometry: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersections pair by pair, polygon parts only; and bool, the pairs that share no point at all."""
    pieces = np.asarray(shapely.intersection(geometry, boxes), dtype=object)
    return polygon_parts(pieces), shapely.is_empty(pieces)


def _boxes(
    px: np.ndarray, visible: np.ndarray, obj: np.ndarray, tile: np.ndarray, n_tiles: int, n_objects: int, patch_px: int
) -> TileBoxes:
    """Rows rounded to float32, degenerate ones left out, ordered by (tile, object)."""
    xyxy = np.clip(px, 0, patch_px).astype(np.float32)
    good = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1]) & (visible > 0)  # NaN compares false
    counts = {"degenerate": int((~good).sum())}
    xyxy, visible, obj, tile = xyxy[good], visible[good], obj[good], tile[good]
    order = np.lexsort((obj, tile))
    counts["outside"] = n_objects - len(np.unique(obj))
    return TileBoxes(
        xyxy=xyxy[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(tile, minlength=n_tiles))]).astype(np.int64),
        object=obj[order].astype(np.int32),
        visible=np.minimum(visible[order], 1).astype(np.float32),
        counts=counts,
    )
