"""Cells gathered into clusters, and regions into connected parts."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from annotations.geometry.clusters import (
    CLUSTER_LABEL,
    PART_LABEL,
    ClusterSettings,
    cluster_boxes,
    cluster_objects,
    tissue_parts,
)
from annotations.objects import Kind, ObjectTable

MPP = 0.5


def cells_at(centres: list[tuple[float, float]], side: float = 16.0) -> np.ndarray:
    """Squares of `side` level-0 pixels."""
    xy = np.array(centres, dtype=float)
    return shapely.box(xy[:, 0] - side / 2, xy[:, 1] - side / 2, xy[:, 0] + side / 2, xy[:, 1] + side / 2)


def table_of(geometry: list[shapely.Geometry] | np.ndarray, kind: int) -> ObjectTable:
    count = len(geometry)
    array = np.array(list(geometry), dtype=object)
    ids = np.array([str(i) for i in range(count)], dtype=object)
    return ObjectTable(array, ids, np.arange(count, dtype=np.int16) % 2, np.full(count, kind, np.uint8), ("a", "b"))


def slow_clusters(bounds: np.ndarray, gap: float) -> list[set[int]]:
    """Linked groups by looking at every pair."""
    groups = [{i} for i in range(len(bounds))]
    for i in range(len(bounds)):
        for j in range(i):
            dx = max(bounds[i, 0] - bounds[j, 2], bounds[j, 0] - bounds[i, 2])
            dy = max(bounds[i, 1] - bounds[j, 3], bounds[j, 1] - bounds[i, 3])
            if max(dx, dy) <= gap:
                a, b = (next(g for g in groups if k in g) for k in (i, j))
                if a is not b:
                    a |= b
                    groups.remove(b)
    return groups


def test_cells_close_together_are_one_cluster_whatever_their_class() -> None:
    near = [(100, 100), (122, 100), (144, 104), (122, 124)]
    clusters = cluster_objects(table_of(cells_at([*near, (500, 500), (516, 500)]), Kind.CELL), MPP)  # two cells are no cluster
    assert [clusters.labels[i] for i in clusters.label] == [CLUSTER_LABEL]
    assert clusters.kind.tolist() == [Kind.PROPOSAL]
    assert shapely.bounds(clusters.geometry).tolist() == [[92, 92, 152, 132]]


def test_clusters_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 400, (150, 2))
    bounds = np.concatenate([corner, corner + rng.uniform(5, 12, (150, 2))], axis=1)
    settings = ClusterSettings(gap_um=5, members=3, cluster_um=(0, 1e9))
    number = cluster_boxes(bounds, settings)
    groups = {frozenset(np.flatnonzero(number == i)) for i in range(number.max() + 1)}
    assert groups == {frozenset(group) for group in slow_clusters(bounds, 5) if len(group) >= 3}


def test_a_chain_too_long_falls_apart_at_its_wider_gaps() -> None:
    """Nine cells 1 um apart, 5 um, nine cells: linked at 6 um, too long, and two clusters at narrower gaps."""
    x = np.concatenate([np.arange(9) * 11.0, 9 * 11.0 + 4 + np.arange(9) * 11.0])
    bounds = np.stack([x, np.zeros(18), x + 10, np.full(18, 10.0)], axis=1)
    number = cluster_boxes(bounds, ClusterSettings(gap_um=6, cluster_um=(20, 120)))
    assert len(set(number[:9])) == len(set(number[9:])) == 1
    assert number[0] != number[9]


def test_a_sheet_without_gaps_is_cut_until_it_fits() -> None:
    x, y = (grid.ravel() * 10.0 for grid in np.mgrid[:50, :40])
    bounds = np.stack([x, y, x + 10, y + 10], axis=1)
    number = cluster_boxes(bounds, ClusterSettings(cluster_um=(20, 200)))
    assert (number >= 0).all()
    for i in range(number.max() + 1):
        box = bounds[number == i]
        side = (box[:, 2:].max(0) - box[:, :2].min(0)).max()
        assert 80 <= side <= 200


def test_regions_that_touch_are_one_part_and_a_region_in_pieces_is_several() -> None:
    left, right = shapely.box(0, 0, 100, 100), shapely.box(100, 0, 180, 50)
    pieces = shapely.MultiPolygon([shapely.box(500, 0, 550, 50), shapely.box(700, 0, 760, 60)])
    alone = shapely.box(1000, 1000, 1100, 1100)
    parts = tissue_parts(np.array([left, right, pieces, alone], dtype=object), touch_l0=1.0)
    assert sorted(shapely.bounds(parts).round(6).tolist()) == [[0, 0, 180, 100], [500, 0, 550, 50], [700, 0, 760, 60]]
    assert shapely.area(parts).max() == pytest.approx(shapely.union_all([left, right]).area)


def test_a_hole_in_a_part_stays_and_what_lies_in_it_is_a_part_of_its_own() -> None:
    ring = shapely.box(0, 0, 100, 100).difference(shapely.box(20, 20, 80, 80))
    parts = tissue_parts(np.array([shapely.MultiPolygon([ring, shapely.box(40, 40, 60, 60)])], dtype=object), 1.0)
    assert sorted(shapely.area(parts).round(6).tolist()) == [400, 6400]


def test_both_kinds_are_gathered_and_proposals_are_not() -> None:
    cells = cells_at([(10, 10), (30, 10), (50, 10)])
    regions = [shapely.box(0, 0, 60, 30), shapely.box(60, 0, 90, 30)]
    kind = np.array([Kind.CELL] * 3 + [Kind.TISSUE] * 2 + [Kind.PROPOSAL] * 3, np.uint8)
    geometry = np.array([*cells, *regions, *cells_at([(200, 10), (220, 10), (240, 10)])], dtype=object)
    table = ObjectTable(geometry, np.array(list("abcdefgh"), dtype=object), np.zeros(8, np.int16), kind, ("x",))
    clusters = cluster_objects(table, MPP)
    assert [clusters.labels[i] for i in clusters.label] == [CLUSTER_LABEL, PART_LABEL]
    assert len(set(clusters.id)) == 2
    assert len(cluster_objects(table_of([], Kind.CELL), MPP)) == 0
