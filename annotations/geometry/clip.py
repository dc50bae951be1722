"""Objects cut to tiles: the box of each piece, in pixels of its tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import shapely

from annotations.geometry.rings import polygon_parts

TILE_POLYGON_VERTICES = 2_000_000  # vertices turned into pixels at a time, which bounds memory


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
        """The datasets of the group /boxes/polygon of a slide file."""
        return {"xy": self.xy, "ring_offsets": self.ring_offsets, "offsets": self.offsets}


def rings_in_tiles(
    pieces: np.ndarray, shift_l0: np.ndarray, corner_l0: np.ndarray, scale: float, patch_px: int
) -> TilePolygons:
    """The rings of pieces of objects, in target pixels of their tiles.

    pieces: (M,) object, Polygons or MultiPolygons, in level-0 pixels once moved by shift_l0, (M, 2)
    corner_l0: (M, 2) float64, top-left (x, y) of the tile of each; scale: target pixels a level-0 pixel

    Every position goes through the very steps that the corners of its box go through. None of them changes an order, so
    that the box of the rounded positions is the rounded box.
    """
    xy, vertices, rings = [np.empty((0, 2), np.float32)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    steps = np.flatnonzero(np.diff(np.cumsum(shapely.get_num_coordinates(pieces)) // TILE_POLYGON_VERTICES)) + 1
    for rows in np.split(np.arange(len(pieces)), steps) if len(pieces) else ():
        parts, row_of_part = shapely.get_parts(pieces[rows], return_index=True)
        ring, part_of_ring = shapely.get_rings(parts, return_index=True)
        row_of_ring, length = row_of_part[part_of_ring], shapely.get_num_coordinates(ring)
        row = rows[np.repeat(row_of_ring, length)]
        px = ((shapely.get_coordinates(ring) + shift_l0[row]) - corner_l0[row]) * scale
        px = np.clip(px, 0, patch_px).astype(np.float32)
        xy.append(np.delete(px, np.cumsum(length) - 1, axis=0))
        vertices.append(length.astype(np.int64) - 1)
        rings.append(np.bincount(row_of_ring, minlength=len(rows)))
    return TilePolygons(np.concatenate(xy), _offsets(vertices), _offsets(rings))


def concatenate_polygons(pieces: Sequence[TilePolygons], order: np.ndarray) -> TilePolygons:
    """The outlines of several pieces as one, with box order[i] of all of them at i."""
    rings = np.concatenate([np.diff(piece.offsets) for piece in pieces])  # of each box
    vertices = np.concatenate([np.diff(piece.ring_offsets) for piece in pieces])  # of each ring
    ring = _runs(np.cumsum(rings) - rings, rings, order)
    vertex = _runs(np.cumsum(vertices) - vertices, vertices, ring)
    xy = np.concatenate([piece.xy for piece in pieces])[vertex]
    return TilePolygons(xy, _offsets([vertices[ring]]), _offsets([rings[order]]))


def _runs(start: np.ndarray, length: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows start[i]:start[i] + length[i] for every i of order, one run behind the other."""
    start, length = start[order], length[order]
    before = np.cumsum(length) - length
    return np.arange(int(length.sum())) + np.repeat(start - before, length)


def _offsets(counts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)


HEAVY_VERTICES = 50_000  # vertices times tiles of one object above which it is cut coarsely first
CHUNK_VERTICES = 2_000_000  # vertices moved at a time, which bounds memory
MANY_TILES = 16  # an object over this many tiles is prepared once, to find the tiles it fills or misses without cutting


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
    """Cut every object to every tile it lies in.

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
        return replace(boxes, polygons=rings_in_tiles(none.astype(object), none, none, 1.0, patch_px)) if polygons else boxes

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
    cut = np.empty(len(crossing), dtype=object) if polygons else None
    extent[crossing], area[crossing] = _cut(geometry, obj[crossing], corner[tile[crossing]], size_l0, cut)
    present = np.ones(len(obj), dtype=bool)
    present[missed] = False
    present[crossing] = area[crossing] > 0  # a line or a point may be all they share

    px = (extent[present] - np.tile(low[present], 2)) * (patch_px / size_l0)
    visible = area[present] / whole[obj[present]]
    boxes, kept = _boxes(px, visible, obj[present], tile[present], len(corner), len(geometry), patch_px)
    if cut is None:
        return boxes
    pieces, shift = geometry[obj], np.zeros_like(low)
    pieces[filled] = tiles[tile[filled]]
    pieces[crossing], shift[crossing] = cut, low[crossing]
    rows = np.flatnonzero(present)[kept]
    return replace(boxes, polygons=rings_in_tiles(pieces[rows], shift[rows], low[rows], patch_px / size_l0, patch_px))


def concatenate_boxes(pieces: Sequence[TileBoxes], n_objects: Sequence[int], n_tiles: int) -> TileBoxes:
    """Boxes in the same tiles of objects that follow one another: n_objects[i] of them are behind pieces[i]."""
    first = np.concatenate([[0], np.cumsum(n_objects)])
    tile = np.concatenate([np.repeat(np.arange(n_tiles), np.diff(piece.offsets)) for piece in pieces])
    order = np.argsort(tile, kind="stable")
    obj = np.concatenate([piece.object.astype(np.int64) + start for piece, start in zip(pieces, first, strict=False)])
    counts: dict[str, int] = {}
    for piece in pieces:
        for name, n in piece.counts.items():
            counts[name] = counts.get(name, 0) + n
    polygons = [piece.polygons for piece in pieces if piece.polygons is not None]
    return TileBoxes(
        xyxy=np.concatenate([piece.xyxy for piece in pieces])[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(tile, minlength=n_tiles))]).astype(np.int64),
        object=obj[order].astype(np.int32),
        visible=np.concatenate([piece.visible for piece in pieces])[order],
        counts=counts,
        polygons=concatenate_polygons(polygons, order) if polygons else None,
    )


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


def _cut(
    geometry: np.ndarray, obj: np.ndarray, corner: np.ndarray, size_l0: float, pieces: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(P, 4) bounds and (P,) area of what object obj[i] has in the tile at corner[i], level-0 pixels; NaN and 0 for nothing.

    pieces: (P,) object, filled with what it has there, in level-0 pixels from that corner
    """
    bounds, area = np.full((len(obj), 4), np.nan), np.zeros(len(obj))
    vertices = shapely.get_num_coordinates(geometry)
    heavy = (vertices * np.bincount(obj, minlength=len(geometry)) > HEAVY_VERTICES)[obj]
    light = np.flatnonzero(~heavy)
    steps = np.flatnonzero(np.diff(np.cumsum(vertices[obj[light]]) // CHUNK_VERTICES)) + 1
    for rows in np.split(light, steps) if len(light) else ():
        bounds[rows], area[rows], cut = _cut_pairs(geometry[obj[rows]], corner[rows], size_l0)
        if pieces is not None:
            pieces[rows] = cut
        del cut  # or two chunks are in memory at a time
    pairs = np.flatnonzero(heavy)
    for index in np.unique(obj[pairs]):
        rows = pairs[obj[pairs] == index]
        bounds[rows], area[rows], cut = _cut_heavy(geometry[index], corner[rows], size_l0)
        if pieces is not None:
            pieces[rows] = cut
    return bounds, area


def _cut_pairs(geometry: np.ndarray, corner: np.ndarray, size_l0: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds, area and piece pair by pair, in one call: every object is moved so that its tile is the same rectangle.

    clip_by_rect is several times faster than intersection, and wrong where an edge runs through a corner of the
    rectangle; its result is not valid then, which is how such pairs are found and cut by intersection.
    """
    shift = np.repeat(corner, shapely.get_num_coordinates(geometry), axis=0)
    moved = shapely.set_coordinates(geometry.copy(), shapely.get_coordinates(geometry) - shift)
    try:
        pieces = np.asarray(shapely.clip_by_rect(moved, 0.0, 0.0, size_l0, size_l0), dtype=object)
        wrong = ~shapely.is_valid(pieces)
    except shapely.GEOSException:  # of one pair, and who knows which
        pieces, wrong = moved.copy(), np.ones(len(moved), dtype=bool)
    if wrong.any():
        pieces[wrong] = shapely.intersection(moved[wrong], shapely.box(0.0, 0.0, size_l0, size_l0))
    pieces = polygon_parts(pieces)
    return shapely.bounds(pieces) + np.tile(corner, 2), shapely.area(pieces), pieces


def _cut_heavy(polygon: shapely.Geometry, corner: np.ndarray, size_l0: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for one object of many vertices in many tiles: it is halved along with them, and no tile is cut from the
    whole of it.
    """
    bounds, area = np.full((len(corner), 4), np.nan), np.zeros(len(corner))
    pieces = np.full(len(corner), shapely.Polygon(), dtype=object)
    stack = [(polygon, np.arange(len(corner)))]
    while stack:
        piece, rows = stack.pop()
        if piece.is_empty or not len(rows):
            continue
        if len(rows) <= 2 or len(rows) * shapely.get_num_coordinates(piece) <= HEAVY_VERTICES:
            same = np.full(len(rows), piece, dtype=object)
            bounds[rows], area[rows], pieces[rows] = _cut_pairs(same, corner[rows], size_l0)
            continue
        axis = int(np.ptp(corner[rows], axis=0).argmax())
        ordered = rows[np.argsort(corner[rows, axis], kind="stable")]
        for half in np.array_split(ordered, 2):
            around = shapely.box(*corner[half].min(axis=0), *(corner[half].max(axis=0) + size_l0))
            stack.append((polygon_parts(np.array([shapely.intersection(piece, around)], dtype=object))[0], half))
    return bounds, area, pieces


def _boxes(
    px: np.ndarray, visible: np.ndarray, obj: np.ndarray, tile: np.ndarray, n_tiles: int, n_objects: int, patch_px: int
) -> tuple[TileBoxes, np.ndarray]:
    """Rows rounded to float32, degenerate ones left out, ordered by (tile, object); and which of the given each is."""
    xyxy = np.clip(px, 0, patch_px).astype(np.float32)
    good = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1]) & (visible > 0)  # NaN compares false
    counts = {"degenerate": int((~good).sum())}
    xyxy, visible, obj, tile = xyxy[good], visible[good], obj[good], tile[good]
    order = np.lexsort((obj, tile))
    counts["outside"] = n_objects - len(np.unique(obj))
    boxes = TileBoxes(
        xyxy=xyxy[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(tile, minlength=n_tiles))]).astype(np.int64),
        object=obj[order].astype(np.int32),
        visible=np.minimum(visible[order], 1).astype(np.float32),
        counts=counts,
    )
    return boxes, np.flatnonzero(good)[order]
