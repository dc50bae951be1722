"""Gather objects into larger ones: clusters of cells, connected parts of tissue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from annotations.objects import Kind, ObjectTable


@dataclass(frozen=True)
class ClusterSettings:
    """Limits of clusters, lengths in micrometres.

    gap_um: cells whose boxes are this close belong together. members: least cells of a cluster.
    cluster_um: longer side of a cluster; one that is larger is cut where its gaps are widest, a gapless one in halves.
    touch_um: regions this close are one.
    """

    gap_um: float = 6.0
    members: int = 3
    cluster_um: tuple[float, float] = (20.0, 200.0)
    touch_um: float = 2.0


CLUSTER_LABEL, PART_LABEL = "cell cluster", "tissue part"


def cluster_objects(table: ObjectTable, mpp_level0: float, settings: ClusterSettings | None = None) -> ObjectTable:
    """Cluster the annotated cells and join the annotated tissue that touches, whatever the classes.

    table: n objects in level-0 pixels. Returned are new objects only, proposals by kind and with a label of their own; a
    region that is one piece already is left out.
    """
    settings = settings or ClusterSettings()
    cells, tissue = (table.geometry[table.kind == kind] for kind in (Kind.CELL, Kind.TISSUE))
    clusters, parts = cell_clusters(cells, mpp_level0, settings), tissue_parts(tissue, settings.touch_um / mpp_level0)
    counts = [len(clusters), len(parts)]
    names = (CLUSTER_LABEL, PART_LABEL)
    ids = [f"{name.replace(' ', '-')}-{i}" for name, count in zip(names, counts, strict=True) for i in range(count)]
    return ObjectTable(
        geometry=np.concatenate([clusters, parts]),
        id=np.array(ids, dtype=object),
        label=np.repeat(np.arange(2, dtype=np.int16), counts),
        kind=np.full(sum(counts), Kind.PROPOSAL, np.uint8),
        labels=names,
    )


def cell_clusters(geometry: np.ndarray, mpp_level0: float, settings: ClusterSettings) -> np.ndarray:
    """Return convex hulls, object (k,), of cells (n,) that lie close together; level-0 pixels."""
    import shapely

    if len(geometry) < settings.members:
        return np.zeros(0, dtype=object)
    bounds = shapely.bounds(geometry)
    cluster = cluster_boxes(bounds * mpp_level0, settings)
    order = np.argsort(cluster, kind="stable")
    order = order[cluster[order] >= 0]
    hulls = shapely.convex_hull(shapely.geometrycollections(shapely.envelope(geometry[order]), indices=cluster[order]))
    return np.asarray(hulls, dtype=object).reshape(-1)


def cluster_boxes(bounds_um: np.ndarray, settings: ClusterSettings) -> np.ndarray:
    """Number the cluster of each box (n, 4) in micrometres, int64 (n,), from 0; -1 for none.

    Boxes are linked where the gap between them, along the wider of the two axes, is at most `gap_um`. Linked groups
    larger than `cluster_um` are looked at again with narrower gaps, and cut in halves at last.
    """
    first, second, gap = _neighbours(bounds_um, settings.gap_um)
    number = np.full(len(bounds_um), -1, np.int64)
    active, count = np.ones(len(bounds_um), dtype=bool), 0
    low, high = settings.cluster_um
    for limit in (settings.gap_um, settings.gap_um / 2, settings.gap_um / 4, 0.0):
        link = (gap <= limit) & active[first] & active[second]
        group, side, size = _components(bounds_um, first[link], second[link])
        good = (size >= settings.members) & (side >= low) & (side <= high)
        good_cells = active & good[group]
        names, index = np.unique(group[good_cells], return_inverse=True)
        number[good_cells] = index + count
        count += len(names)
        active &= (side > high)[group]
    if active.any():
        link = (gap <= 0) & active[first] & active[second]
        group, _, _ = _components(bounds_um, first[link], second[link])
        for rows in _split_by(group, np.flatnonzero(active)):
            for part in _halved(bounds_um, rows, high):
                if len(part) >= settings.members:
                    number[part], count = count, count + 1
    return number


def tissue_parts(geometry: np.ndarray, touch_l0: float) -> np.ndarray:
    """Return connected parts, Polygons object (k,), of regions (n,) that touch or are in pieces; level-0 pixels.

    Regions closer than touch_l0 count as touching. A part that is one whole region is left out: its box is there.
    """
    import shapely

    if not len(geometry):
        return np.zeros(0, dtype=object)
    half = max(touch_l0, 1e-3) / 2
    grown = shapely.buffer(geometry, half, join_style="mitre")
    parts = shapely.get_parts(shapely.union_all(grown))
    # Of every part of every region: the connected part it lies in.
    pieces, owner = shapely.get_parts(geometry, return_index=True)
    piece, part = shapely.STRtree(parts).query(shapely.point_on_surface(pieces), predicate="intersects")
    regions = np.zeros(len(parts), np.int64)
    np.add.at(regions, np.unique(np.stack([part, owner[piece]]), axis=1)[0], 1)
    whole = np.zeros(len(parts), dtype=bool)
    whole[part[np.isin(owner[piece], np.flatnonzero(_spread(owner[piece], part, len(geometry)) == 1))]] = True
    parts = shapely.buffer(parts[~((regions == 1) & whole)], -half, join_style="mitre")
    parts = shapely.get_parts(parts)
    return np.asarray(parts[shapely.area(parts) > 0])


def _spread(owner: np.ndarray, part: np.ndarray, count: int) -> np.ndarray:
    """Count the connected parts over which each of `count` regions spreads, int64 (count,)."""
    return np.bincount(np.unique(np.stack([owner, part]), axis=1)[0], minlength=count)


def _neighbours(bounds_um: np.ndarray, reach_um: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pairs first < second of boxes at most reach_um apart, and their gaps (0 where they overlap)."""
    import shapely

    half = reach_um / 2
    boxes = shapely.box(bounds_um[:, 0] - half, bounds_um[:, 1] - half, bounds_um[:, 2] + half, bounds_um[:, 3] + half)
    first, second = shapely.STRtree(boxes).query(boxes)
    is_pair = first < second
    first, second = first[is_pair], second[is_pair]
    apart = np.maximum(bounds_um[first, :2] - bounds_um[second, 2:], bounds_um[second, :2] - bounds_um[first, 2:])
    return first, second, np.maximum(apart.max(axis=1), 0)


def _components(bounds_um: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the linked group of each box, and of each group its longer side in micrometres and the number of its boxes."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(bounds_um)
    links = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(count, count))
    groups, group = connected_components(links, directed=False)
    low, high = np.full((groups, 2), np.inf), np.full((groups, 2), -np.inf)
    np.minimum.at(low, group, bounds_um[:, :2])
    np.maximum.at(high, group, bounds_um[:, 2:])
    return group, (high - low).max(axis=1), np.bincount(group, minlength=groups)


def _split_by(group: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Group rows, one array a group."""
    order = rows[np.argsort(group[rows], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _halved(bounds_um: np.ndarray, rows: np.ndarray, longest_um: float) -> list[np.ndarray]:
    """Return the boxes `rows` in groups whose longer side is at most longest_um, by halving across the longer side."""
    done, stack = [], [rows]
    while stack:
        part = stack.pop()
        extent = bounds_um[part, 2:].max(axis=0) - bounds_um[part, :2].min(axis=0)
        if extent.max() <= longest_um:
            done.append(part)
        elif len(part) > 1:
            axis = int(extent.argmax())
            order = part[np.argsort(bounds_um[part, axis] + bounds_um[part, axis + 2], kind="stable")]
            stack += [order[: len(order) // 2], order[len(order) // 2 :]]
    return done
