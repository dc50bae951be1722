"""Clip objects to tiles: their boxes and outlines, in pixels of each tile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import shapely

from annotations.geometry.rings import polygon_parts

TILE_POLYGON_VERTICES = 2_000_000  # vertices turned into pixels at a time, which bounds memory
HEAVY_VERTICES = 50_000  # vertices times tiles of one object above which it is cut coarsely first
CHUNK_VERTICES = 2_000_000  # vertices moved at a time, which bounds memory
MANY_TILES = 16  # an object over this many tiles is prepared once, to find the tiles it fills or misses without cutting


@dataclass(frozen=True)
class TilePolygons:
    """Outlines of M boxes, in the order of the boxes, ragged.

    xy: (P, 2) float32, target pixels of the tile, within [0, patch_px]; a ring is stored open, its first position is not
        repeated at its end
    ring_offsets: (R + 1,) int64, positions of ring r are rows ring_offsets[r]:ring_offsets[r + 1] of xy
    offsets: (M + 1,) int64, rings of box i are offsets[i]:offsets[i + 1]: outlines, holes and parts alike, filled by the
        even-odd rule; their bounding box is the box, to the bit
    """

    xy: np.ndarray
    ring_offsets: np.ndarray
    offsets: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the datasets of the group /boxes/polygon of a slide file."""
        return {"xy": self.xy, "ring_offsets": self.ring_offsets, "offsets": self.offsets}


def tile_polygons(
    clipped: np.ndarray, shift_l0: np.ndarray, corner_l0: np.ndarray, scale: float, patch_px: int
) -> TilePolygons:
    """Return the rings of clipped objects, in target pixels of their tiles.

    clipped: (M,) object, Polygons or MultiPolygons, in level-0 pixels once moved by shift_l0, (M, 2)
    corner_l0: (M, 2) float64, top-left (x, y) of the tile of each; scale: target pixels a level-0 pixel

    Every position goes through the very steps that the corners of its box go through. None of them changes an order, so
    that the box of the rounded positions is the rounded box.
    """
    xy, vertices, rings = [np.empty((0, 2), np.float32)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    steps = np.flatnonzero(np.diff(np.cumsum(shapely.get_num_coordinates(clipped)) // TILE_POLYGON_VERTICES)) + 1
    for rows in np.split(np.arange(len(clipped)), steps) if len(clipped) else ():
        parts, row_of_part = shapely.get_parts(clipped[rows], return_index=True)
        ring, part_of_ring = shapely.get_rings(parts, return_index=True)
        row_of_ring, length = row_of_part[part_of_ring], shapely.get_num_coordinates(ring)
        row = rows[np.repeat(row_of_ring, length)]
        px = ((shapely.get_coordinates(ring) + shift_l0[row]) - corner_l0[row]) * scale
        px = np.clip(px, 0, patch_px).astype(np.float32)
        xy.append(np.delete(px, np.cumsum(length) - 1, axis=0))
        vertices.append(length.astype(np.int64) - 1)
        rings.append(np.bincount(row_of_ring, minlength=len(rows)))
    return TilePolygons(np.concatenate(xy), _offsets(vertices), _offsets(rings))


def concatenate_polygons(polygons: Sequence[TilePolygons], order: np.ndarray) -> TilePolygons:
    """Join outlines, with box order[i] of all of them at i."""
    rings = np.concatenate([np.diff(part.offsets) for part in polygons])  # of each box
    vertices = np.concatenate([np.diff(part.ring_offsets) for part in polygons])  # of each ring
    ring = _runs(np.cumsum(rings) - rings, rings, order)
    vertex = _runs(np.cumsum(vertices) - vertices, vertices, ring)
    xy = np.concatenate([part.xy for part in polygons])[vertex]
    return TilePolygons(xy, _offsets([vertices[ring]]), _offsets([rings[order]]))


def _runs(start: np.ndarray, length: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return rows start[i]:start[i] + length[i] for every i of order, one run behind the other."""
    start, length = start[order], length[order]
    run_start = np.cumsum(length) - length
    return np.asarray(np.arange(int(length.sum())) + np.repeat(start - run_start, length))


def _offsets(counts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)


@dataclass(frozen=True)
class TileBoxes:
    """Boxes of N tiles, M rows ordered by (tile, object).

    xyxy: (M, 4) float32, x0, y0, x1, y1 in target pixels of the tile, within [0, patch_px], x1 > x0, y1 > y0;
        the bounding box of the clipped polygon
    offsets: (N + 1,) int64, rows of tile i are offsets[i]:offsets[i + 1]
    object: (M,) int32, row of the object in the geometry given
    visible: (M,) float32 in (0, 1], clipped area / whole area
    counts: "outside" objects without a row; "degenerate" pieces too thin for float32, left out
    polygons: the outlines behind the boxes, where they were asked for
    """

    xyxy: np.ndarray
    offsets: np.ndarray
    object: np.ndarray
    visible: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)
    polygons: TilePolygons | None = None


def clip_to_tiles(
    geometry: np.ndarray, coords_l0: np.ndarray, size_l0: float, patch_px: int, *, polygons: bool = False
) -> TileBoxes:
    """Clip every object to every tile it lies in.

    geometry: (n,) object, valid Polygons or MultiPolygons with area, level-0 pixels
    coords_l0: (N, 2) top-left (x, y) of each tile, level-0 pixels, in any arrangement, overlapping or not
    size_l0: side of a tile, level-0 pixels, may be fractional; patch_px: the same side in target pixels
    polygons: keep the clipped outlines too, which takes longer; the boxes are the same

    Only pairs in which the outline crosses the tile's border are cut.
    """
    if not (np.isfinite(size_l0) and size_l0 > 0 and patch_px > 0):
        raise ValueError(f"size_l0 {size_l0}, patch_px {patch_px}: both must be above 0")
    geometry = np.asarray(geometry, dtype=object)
    corner = np.asarray(coords_l0, dtype=np.float64).reshape(-1, 2)
    if not len(geometry) or not len(corner):
        none = np.empty(0, dtype=np.int64)
        boxes, _ = _boxes(np.empty((0, 4)), np.empty(0), none, none, len(corner), len(geometry), patch_px)
        return replace(boxes, polygons=tile_polygons(none.astype(object), none, none, 1.0, patch_px)) if polygons else boxes

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
    extent[crossing], area[crossing], cut = _cut(geometry, obj[crossing], corner[tile[crossing]], size_l0, keep=polygons)
    present = np.ones(len(obj), dtype=bool)
    present[missed] = False
    present[crossing] = area[crossing] > 0  # a line or a point may be all they share

    px = (extent[present] - np.tile(low[present], 2)) * (patch_px / size_l0)
    visible = area[present] / whole[obj[present]]
    boxes, kept = _boxes(px, visible, obj[present], tile[present], len(corner), len(geometry), patch_px)
    if not polygons:
        return boxes
    clipped, shift = geometry[obj], np.zeros_like(low)
    clipped[filled] = tiles[tile[filled]]
    clipped[crossing], shift[crossing] = cut, low[crossing]
    rows = np.flatnonzero(present)[kept]
    return replace(boxes, polygons=tile_polygons(clipped[rows], shift[rows], low[rows], patch_px / size_l0, patch_px))


def concatenate_boxes(parts: Sequence[TileBoxes], n_objects: Sequence[int], n_tiles: int) -> TileBoxes:
    """Join boxes in the same tiles of objects that follow one another: n_objects[i] of them are behind parts[i]."""
    first = np.concatenate([[0], np.cumsum(n_objects)])
    tile = np.concatenate([np.repeat(np.arange(n_tiles), np.diff(part.offsets)) for part in parts])
    order = np.argsort(tile, kind="stable")
    obj = np.concatenate([part.object.astype(np.int64) + start for part, start in zip(parts, first, strict=False)])
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    polygons = [part.polygons for part in parts if part.polygons is not None]
    return TileBoxes(
        xyxy=np.concatenate([part.xyxy for part in parts])[order],
        offsets=_offsets([np.bincount(tile, minlength=n_tiles)]),
        object=obj[order].astype(np.int32),
        visible=np.concatenate([part.visible for part in parts])[order],
        counts=dict(counts),
        polygons=concatenate_polygons(polygons, order) if polygons else None,
    )


def _without_cutting(
    geometry: np.ndarray, tiles: np.ndarray, obj: np.ndarray, tile: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort pairs: those of large objects that fill the tile, those to cut (of small objects too), those that miss it."""
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


def _cut(
    geometry: np.ndarray, obj: np.ndarray, corner: np.ndarray, size_l0: float, *, keep: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut object obj[i] to the tile at corner[i]: bounds (P, 4) and area (P,), level-0 pixels; NaN and 0 for nothing.

    keep: return what it has there too, (P,) object, in level-0 pixels from that corner; else an empty array.
    """
    bounds, area = np.full((len(obj), 4), np.nan), np.zeros(len(obj))
    clipped = np.empty(len(obj) if keep else 0, dtype=object)
    vertices = shapely.get_num_coordinates(geometry)
    heavy = (vertices * np.bincount(obj, minlength=len(geometry)) > HEAVY_VERTICES)[obj]
    light = np.flatnonzero(~heavy)
    steps = np.flatnonzero(np.diff(np.cumsum(vertices[obj[light]]) // CHUNK_VERTICES)) + 1
    for rows in np.split(light, steps) if len(light) else ():
        bounds[rows], area[rows], part = _cut_pairs(geometry[obj[rows]], corner[rows], size_l0)
        if keep:
            clipped[rows] = part
        del part  # or two chunks are in memory at a time
    pairs = np.flatnonzero(heavy)
    for index in np.unique(obj[pairs]):
        rows = pairs[obj[pairs] == index]
        bounds[rows], area[rows], part = _cut_heavy(geometry[index], corner[rows], size_l0)
        if keep:
            clipped[rows] = part
    return bounds, area, clipped


def _cut_pairs(geometry: np.ndarray, corner: np.ndarray, size_l0: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut pair by pair, in one call, to bounds, area and outline: every object is moved so that its tile is the same rectangle.

    clip_by_rect is several times faster than intersection, and wrong where an edge runs through a corner of the
    rectangle; its result is not valid then, which is how such pairs are found and cut by intersection.
    """
    shift = np.repeat(corner, shapely.get_num_coordinates(geometry), axis=0)
    moved = shapely.set_coordinates(geometry.copy(), shapely.get_coordinates(geometry) - shift)
    try:
        clipped = np.asarray(shapely.clip_by_rect(moved, 0.0, 0.0, size_l0, size_l0), dtype=object)
        wrong = ~shapely.is_valid(clipped)
    except shapely.GEOSException:  # of one pair, and who knows which
        clipped, wrong = moved.copy(), np.ones(len(moved), dtype=bool)
    if wrong.any():
        clipped[wrong] = shapely.intersection(moved[wrong], shapely.box(0.0, 0.0, size_l0, size_l0))
    clipped = polygon_parts(clipped)
    return shapely.bounds(clipped) + np.tile(corner, 2), shapely.area(clipped), clipped


def _cut_heavy(polygon: shapely.Geometry, corner: np.ndarray, size_l0: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut one object of many vertices in many tiles: it is halved along with them, no tile is cut from the whole."""
    bounds, area = np.full((len(corner), 4), np.nan), np.zeros(len(corner))
    clipped = np.full(len(corner), shapely.Polygon(), dtype=object)
    stack = [(polygon, np.arange(len(corner)))]
    while stack:
        piece, rows = stack.pop()
        if piece.is_empty or not len(rows):
            continue
        if len(rows) <= 2 or len(rows) * shapely.get_num_coordinates(piece) <= HEAVY_VERTICES:
            same = np.full(len(rows), piece, dtype=object)
            bounds[rows], area[rows], clipped[rows] = _cut_pairs(same, corner[rows], size_l0)
            continue
        axis = int(np.ptp(corner[rows], axis=0).argmax())
        ordered = rows[np.argsort(corner[rows, axis], kind="stable")]
        for half in np.array_split(ordered, 2):
            around = shapely.box(*corner[half].min(axis=0), *(corner[half].max(axis=0) + size_l0))
            stack.append((polygon_parts(np.array([shapely.intersection(piece, around)], dtype=object))[0], half))
    return bounds, area, clipped


def _boxes(
    px: np.ndarray, visible: np.ndarray, obj: np.ndarray, tile: np.ndarray, n_tiles: int, n_objects: int, patch_px: int
) -> tuple[TileBoxes, np.ndarray]:
    """Round rows to float32, leave degenerate ones out, order by (tile, object); returns which of the given each is too."""
    xyxy = np.clip(px, 0, patch_px).astype(np.float32)
    good = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1]) & (visible > 0)  # NaN compares false
    counts = {"degenerate": int((~good).sum())}
    xyxy, visible, obj, tile = xyxy[good], visible[good], obj[good], tile[good]
    order = np.lexsort((obj, tile))
    counts["outside"] = n_objects - len(np.unique(obj))
    boxes = TileBoxes(
        xyxy=xyxy[order],
        offsets=_offsets([np.bincount(tile, minlength=n_tiles)]),
        object=obj[order].astype(np.int32),
        visible=np.minimum(visible[order], 1).astype(np.float32),
        counts=counts,
    )
    return boxes, np.flatnonzero(good)[order]
