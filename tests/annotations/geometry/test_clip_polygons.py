"""The outlines behind the boxes against shapely, one pair at a time."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import clip_to_tiles
from annotations.geometry import clip
from tests.annotations.geometry.test_clip import objects

COLUMNS = ("xyxy", "offsets", "object", "visible")


def rings_of(polygons, row):
    rings = range(polygons.offsets[row], polygons.offsets[row + 1])
    return [polygons.xy[polygons.ring_offsets[r] : polygons.ring_offsets[r + 1]] for r in rings]


def filled(rings):
    """Even-odd, by geometry that knows of no holes: what lies in an odd number of rings."""
    rings = [shapely.make_valid(shapely.Polygon(ring.astype(float))) for ring in rings]
    return reduce(shapely.symmetric_difference, rings)


def agrees(geometry, coords, size_l0, patch_px):
    """Outlines are what each object shares with each tile, and their boxes are the boxes, to the bit."""
    plain = clip_to_tiles(geometry, coords, size_l0, patch_px)
    boxes = clip_to_tiles(geometry, coords, size_l0, patch_px, polygons=True)
    assert plain.polygons is None
    assert plain.counts == boxes.counts
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(plain, name), getattr(boxes, name))
    polygons = boxes.polygons
    assert (polygons.xy.dtype, polygons.ring_offsets.dtype, polygons.offsets.dtype) == (np.float32, np.int64, np.int64)
    assert len(polygons.offsets) == len(boxes.object) + 1
    assert polygons.ring_offsets[-1] == len(polygons.xy)
    assert polygons.offsets[-1] == len(polygons.ring_offsets) - 1
    tile = np.repeat(np.arange(len(coords)), np.diff(boxes.offsets))
    scale = patch_px / size_l0
    for row, (t, o) in enumerate(zip(tile, boxes.object, strict=True)):
        rings = rings_of(polygons, row)
        points = np.concatenate(rings)
        np.testing.assert_array_equal(boxes.xyxy[row], np.concatenate([points.min(0), points.max(0)]))
        assert all(len(ring) >= 3 for ring in rings)
        assert all((ring[0] != ring[-1]).any() for ring in rings if np.ptp(ring, axis=0).min() > 1e-3), "rings are open"
        x, y = (float(v) for v in coords[t])
        piece = geometry[o].intersection(shapely.box(x, y, x + size_l0, y + size_l0))
        piece = shapely.transform(piece, lambda xy, x=x, y=y: (xy - [x, y]) * scale)
        assert filled(rings).symmetric_difference(piece).area < 4e-5 * (piece.length + 1)  # what float32 moves
    return boxes


@settings(max_examples=100, deadline=None)
@given(
    geometry=st.lists(objects().filter(lambda g: g.is_valid and g.area > 1), max_size=5),
    corners=st.lists(st.tuples(st.integers(-32, 200), st.integers(-32, 200)), max_size=8),
    size_l0=st.sampled_from([16.0, 32.0, 64.0, 57.3, 100.5]),
    patch_px=st.sampled_from([32, 224]),
)
def test_same_as_one_pair_at_a_time(geometry, corners, size_l0, patch_px):
    agrees(np.array(geometry, dtype=object), np.array(corners, dtype=np.int64).reshape(-1, 2), size_l0, patch_px)


def grid(step, side):
    return np.stack(np.meshgrid(np.arange(0, side, step), np.arange(0, side, step)), -1).reshape(-1, 2)


def test_filled_missed_and_heavily_cut_tiles():
    ring = shapely.Point(500, 500).buffer(480).difference(shapely.Point(500, 500).buffer(300))
    boxes = agrees(np.array([ring, shapely.box(3, 3, 30, 30)], dtype=object), grid(50, 1000), 50.0, 224)
    full = np.flatnonzero(boxes.visible == np.float32(2500 / ring.area))
    assert len(full) > 50
    for row in full:
        (only,) = rings_of(boxes.polygons, row)
        assert sorted(map(tuple, only)) == [(0, 0), (0, 224), (224, 0), (224, 224)]
    angle = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    radius = 300 + 40 * np.sin(60 * angle)
    star = shapely.Polygon(np.stack([400 + radius * np.cos(angle), 400 + radius * np.sin(angle)], 1))
    agrees(np.array([star.difference(shapely.box(330, 350, 400.5, 470))], dtype=object), grid(40, 800), 53.7, 224)


def test_an_object_far_from_the_origin_and_at_an_odd_resolution():
    """Level-0 pixels of six digits and a scale that is no power of two: the boxes agree still, to the bit."""
    rng = np.random.default_rng(5)
    centre = rng.uniform(123_000, 123_400, (300, 2))
    angle = np.sort(rng.uniform(0, 2 * np.pi, (300, 12)), axis=1)
    around = rng.uniform(4, 14, (300, 1, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)
    cells = shapely.polygons(centre[:, None] + around)
    agrees(cells[shapely.is_valid(cells)], 123_000 + grid(97, 400), 97.31, 224)


def test_an_l_and_a_ring_keep_their_shape():
    ell = shapely.Polygon([(2, 2), (18, 2), (18, 6), (6, 6), (6, 18), (2, 18)])
    hole = shapely.box(1, 1, 9, 9).difference(shapely.box(3, 3, 5, 5))
    boxes = clip_to_tiles(np.array([ell, hole], dtype=object), np.array([[0, 0], [8, 0]]), 10.0, 20, polygons=True)
    assert boxes.object.tolist() == [0, 1, 0, 1]
    assert boxes.xyxy.tolist() == [[4, 4, 20, 20], [2, 2, 18, 18], [0, 4, 20, 12], [0, 2, 2, 18]]
    areas = [filled(rings_of(boxes.polygons, row)).area for row in range(4)]
    assert areas == pytest.approx([4 * (8 * 8 - 4 * 4), 4 * (64 - 4), 4 * 40, 4 * 8])
    assert np.diff(boxes.polygons.offsets).tolist() == [1, 2, 1, 1]
    assert len(rings_of(boxes.polygons, 1)[0]) == 4  # open


def test_chunks_make_no_difference(monkeypatch):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 90, (200, 2))
    boxes = shapely.box(corner[:, 0], corner[:, 1], corner[:, 0] + 7, corner[:, 1] + 5)
    whole = clip_to_tiles(boxes, grid(10, 100), 10.0, 20, polygons=True).polygons
    monkeypatch.setattr(clip, "TILE_POLYGON_VERTICES", 13)
    parts = clip_to_tiles(boxes, grid(10, 100), 10.0, 20, polygons=True).polygons
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, parts.arrays()[name])


@pytest.mark.parametrize(("n", "tiles"), [(0, 3), (2, 0), (1, 1)])
def test_nothing_to_cut(n, tiles):
    geometry = np.array([shapely.box(90, 90, 91, 91)] * n, dtype=object)
    polygons = clip_to_tiles(geometry, np.zeros((tiles, 2), np.int64), 10.0, 224, polygons=True).polygons
    assert (polygons.xy.shape, polygons.xy.dtype) == ((0, 2), np.float32)
    assert polygons.ring_offsets.tolist() == polygons.offsets.tolist() == [0]
