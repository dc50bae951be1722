"""What objects keep inside tiles, as rings in pixels of the tile: the outlines behind the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

CHUNK_VERTICES = 2_000_000  # vertices turned into pixels at a time, which bounds memory


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
    steps = np.flatnonzero(np.diff(np.cumsum(shapely.get_num_coordinates(pieces)) // CHUNK_VERTICES)) + 1
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
