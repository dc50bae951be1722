"""Boxes per tile against shapely, one pair at a time."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import annotation_groups, clip_to_tiles
from annotations.geometry.rings import polygon_parts
from annotations.objects import Kind, ObjectTable


def one_at_a_time(geometry, coords, size_l0, patch_px):
    rows, degenerate = [], 0
    for tile, (x, y) in enumerate(np.asarray(coords, dtype=float)):
        box = shapely.box(x, y, x + size_l0, y + size_l0)
        for obj, whole in enumerate(geometry):
            piece = polygon_parts(np.array([whole.intersection(box)], dtype=object))[0]
            if piece.is_empty:
                continue
            scaled = (np.array(piece.bounds) - [x, y, x, y]) * (patch_px / size_l0)
            xyxy = np.clip(scaled, 0, patch_px).astype(np.float32)
            if xyxy[2] > xyxy[0] and xyxy[3] > xyxy[1]:
                rows.append((tile, obj, xyxy, piece.area / whole.area))
            else:
                degenerate += 1
    return rows, degenerate


def agrees(geometry, coords, size_l0, patch_px):
    boxes = clip_to_tiles(geometry, coords, size_l0, patch_px)
    rows, _ = one_at_a_time(geometry, coords, size_l0, patch_px)
    tile = np.repeat(np.arange(len(coords)), np.diff(boxes.offsets))
    assert list(zip(tile, boxes.object, strict=True)) == [(t, o) for t, o, _, _ in rows]
    assert boxes.counts["outside"] == len(set(range(len(geometry))) - {o for _, o, _, _ in rows})
    if rows:
        np.testing.assert_allclose(boxes.xyxy, [xyxy for _, _, xyxy, _ in rows], rtol=0, atol=patch_px * 1e-6)
        np.testing.assert_allclose(boxes.visible, [v for *_, v in rows], rtol=1e-5, atol=1e-7)
        assert (boxes.xyxy >= 0).all()
        assert (boxes.xyxy <= patch_px).all()
        assert (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all()
    return boxes


@st.composite
def objects(draw):
    """A star round a point: plain, with a hole, or with a second island."""
    x, y = draw(st.floats(-20, 220)), draw(st.floats(-20, 220))
    n = draw(st.integers(3, 9))
    radius = np.array(draw(st.lists(st.floats(2, 120), min_size=n, max_size=n)))
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False) + draw(st.floats(0, 1))
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    star = shapely.make_valid(shapely.Polygon(np.round(around + np.array([x, y]), 2)))
    form = draw(st.sampled_from(["plain", "hole", "islands", "box"]))
    if form == "hole":
        star = star.difference(shapely.Point(x, y).buffer(radius.min() / 2, quad_segs=2))
    elif form == "islands":
        star = star.union(shapely.box(x + 130, y + 5, x + 150, y + 9))
    elif form == "box":  # corners on whole pixels: edges that coincide with a tile's
        star = shapely.box(round(x / 16) * 16, round(y / 16) * 16, round(x / 16) * 16 + 32, round(y / 16) * 16 + 48)
    return polygon_parts(np.array([star], dtype=object))[0]


@settings(max_examples=150, deadline=None)
@given(
    geometry=st.lists(objects().filter(lambda g: g.is_valid and g.area > 1), max_size=5),
    corners=st.lists(st.tuples(st.integers(-32, 200), st.integers(-32, 200)), max_size=8),
    size_l0=st.sampled_from([16.0, 32.0, 64.0, 57.3, 100.5]),
    patch_px=st.sampled_from([32, 224]),
)
def test_same_as_one_pair_at_a_time(geometry, corners, size_l0, patch_px):
    agrees(np.array(geometry, dtype=object), np.array(corners, dtype=np.int64).reshape(-1, 2), size_l0, patch_px)


def test_large_object_over_a_grid_fills_and_misses_tiles():
    ring = shapely.Point(500, 500).buffer(480).difference(shapely.Point(500, 500).buffer(300))
    coords = np.stack(np.meshgrid(np.arange(0, 1000, 50), np.arange(0, 1000, 50)), -1).reshape(-1, 2)
    boxes = agrees(np.array([ring, shapely.box(3, 3, 30, 30)], dtype=object), coords, 50.0, 224)
    assert (boxes.xyxy[boxes.visible == np.float32(2500 / ring.area)] == [0, 0, 224, 224]).all()
    assert boxes.visible[boxes.object == 0].sum() == pytest.approx(1, rel=1e-5)


def test_edges_through_the_corners_of_a_tile():
    rng = np.random.default_rng(3)
    angle = np.sort(rng.uniform(0, 2 * np.pi, (600, 9)), axis=1)
    around = rng.uniform(1, 9, (600, 9))[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    rings = np.round(around + rng.integers(-2, 12, (600, 1, 2)))
    stars = shapely.polygons(rings)
    through = shapely.Polygon([(8, 2), (11, 6), (2, 1), (1, -6), (10, 0)])
    agrees(np.array([through, *stars[shapely.is_valid(stars)]], dtype=object), np.array([[0, 0]]), 10.0, 10)


def test_many_vertices_over_many_tiles():
    angle = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    radius = 300 + 40 * np.sin(60 * angle)
    star = shapely.Polygon(np.stack([400 + radius * np.cos(angle), 400 + radius * np.sin(angle)], 1))
    star = star.difference(shapely.box(330, 350, 400.5, 470))
    coords = np.stack(np.meshgrid(np.arange(0, 800, 40), np.arange(0, 800, 40)), -1).reshape(-1, 2)
    agrees(np.array([star], dtype=object), coords, 53.7, 224)


def test_box_is_of_the_clipped_polygon():
    triangle = shapely.Polygon([(0, 0), (20, 0), (0, 20)])
    boxes = clip_to_tiles(np.array([triangle], dtype=object), np.array([[5, 5]]), 10.0, 10)
    assert boxes.xyxy.tolist() == [[0, 0, 10, 10]]
    boxes = clip_to_tiles(np.array([triangle], dtype=object), np.array([[12, 2]]), 10.0, 10)
    assert boxes.xyxy.tolist() == [[0, 0, 6, 6]]  # cutting the box of the triangle would say 8 by 10
    assert boxes.visible.tolist() == [pytest.approx(18 / 200)]


def test_touching_slivers_and_strangers():
    touching = shapely.box(10, 0, 20, 10)
    corner_only = shapely.Polygon([(10, 5), (20, -5), (20, 15)])
    sliver = shapely.box(10 - 1e-9, 0, 20, 10)
    far = shapely.box(900, 900, 910, 910)
    boxes = clip_to_tiles(np.array([touching, corner_only, sliver, far], dtype=object), np.array([[0, 0]]), 10.0, 224)
    assert len(boxes.object) == 0
    assert boxes.counts == {"degenerate": 1, "outside": 4}
    assert boxes.offsets.tolist() == [0, 0]


@pytest.mark.parametrize(("n", "tiles"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_cut(n, tiles):
    geometry = np.array([shapely.box(0, 0, 1, 1)] * n, dtype=object)
    boxes = clip_to_tiles(geometry, np.zeros((tiles, 2), np.int64), 10.0, 224)
    assert boxes.xyxy.shape == (0, 4)
    assert boxes.offsets.tolist() == [0] * (tiles + 1)
    assert boxes.counts["outside"] == n


def test_columns_have_their_types_and_groups_their_arrays():
    geometry = np.array([shapely.box(0, 0, 4, 4), shapely.box(50, 50, 60, 60)], dtype=object)
    kind = np.full(2, Kind.CELL, np.uint8)
    table = ObjectTable(geometry, np.array(["a", "b"], object), np.array([0, -1], np.int16), kind, ("x",))
    groups = annotation_groups(table, clip_to_tiles(geometry, np.array([[0, 0], [2, 0]]), 8.0, 16), 0.5)
    kinds = {name: value.dtype for name, value in groups["boxes"].items()}
    assert kinds == {"xyxy": np.float32, "offsets": np.int64, "object": np.int32, "visible": np.float32}
    assert groups["boxes"]["visible"].tolist() == [1, 0.5]
    assert groups["objects"]["area_um2"].tolist() == [4, 25]
    assert groups["objects"]["area_um2"].dtype == np.float32
    assert groups["objects"]["id"] == ["a", "b"]
    assert groups["objects"]["attrs"] == {"labels": ["x"]}
    with pytest.raises(ValueError, match="boxes name object 0"):
        annotation_groups(
            ObjectTable(*(c[:0] for c in (table.geometry, table.id, table.label, table.kind))),
            clip_to_tiles(geometry, np.array([[0, 0]]), 8.0, 16),
            0.5,
        )
