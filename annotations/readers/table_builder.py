"""Build a table from the outlines, points, ids, classes and kinds that a reader hands over, and count every loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.rings import Ring, Rings, drop_reasons, is_usable, polygons_from_rings, repair, rings_from_lists
from annotations.objects import MAX_LABELS, UNCLASSIFIED, Kind, ObjectTable, ReadLog, empty_table
from annotations.readers.options import ReadOptions


class Points(NamedTuple):
    """Positions (K, 2) float64 in the file's units, and the row of the object of each, (K,) int64."""

    xy: np.ndarray
    owner: np.ndarray


NO_POINTS = Points(np.zeros((0, 2)), np.zeros(0, np.int64))


@dataclass
class Objects:
    """Objects of a file, one row each, before their geometry is built.

    id, name (None: unclassified), kind: of each. confidence: of each, NaN where unknown; None where none is known.
    lost: (row, reason) of objects left out so far. counts: what reading did, as in ObjectTable, "features" aside.
    """

    id: list[str] = field(default_factory=list)
    name: list[str | None] = field(default_factory=list)
    kind: Sequence[int] | np.ndarray = field(default_factory=list)
    confidence: Sequence[float] | np.ndarray | None = None
    lost: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.id)

    def lose(self, row: int, reason: str) -> None:
        """Leave an object out and count it."""
        self.lost.append((row, reason))
        self.counts[reason] += 1


@dataclass
class Shapes(Objects):
    """Objects that are added one at a time, polygons and points, in file order."""

    kind: list[Kind] = field(default_factory=list)
    polygons: list[list[Ring]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    point_owner: list[int] = field(default_factory=list)

    def add(self, id: str, name: str | None, kind: Kind) -> int:
        """Add an object; returns its row."""
        self.id.append(id)
        self.name.append(name or None)
        self.kind.append(kind)
        return len(self.id) - 1

    def add_ring(self, row: int, ring: Ring) -> None:
        """Add an outline of an object."""
        self.polygons.append([ring])
        self.owner.append(row)

    def add_points(self, row: int, points: Sequence[tuple[float, float]]) -> None:
        """Add positions that are an object."""
        self.points.extend(points)
        self.point_owner.extend([row] * len(points))

    def build(self, options: ReadOptions, source: str) -> tuple[ObjectTable, np.ndarray]:
        """Return the table, and int64 (n,), the row here of each of its objects."""
        owner = np.array(self.owner, dtype=np.int64)
        points = points_of(self.points, self.point_owner)
        return build_table(self, rings_from_lists(self.polygons), owner, points, options, source)


def points_of(xy: Sequence[tuple[float, float]], owner: Sequence[int]) -> Points:
    """Make points from lists."""
    return Points(np.array(xy, dtype=np.float64).reshape(-1, 2), np.array(owner, dtype=np.int64))


def build_table(
    objects: Objects,
    rings: Rings,
    owner: np.ndarray,
    points: Points,
    options: ReadOptions,
    source: str,
    *,
    group: np.ndarray | None = None,
) -> tuple[ObjectTable, np.ndarray]:
    """Build a table from rings and points; returns it and int64 (n,), the object of each of its rows.

    rings: P polygons, in the file's units; owner: (P,) int64 ascending, the row of the object of each; group: (P,) int64
    ascending, polygons of one number become one MultiPolygon; None: those of one object.
    """
    group = owner if group is None else group
    scale = options.scale or 1.0
    if scale != 1:
        with np.errstate(over="ignore"):  # what leaves the numbers is dropped and counted
            rings = rings._replace(xy=rings.xy * scale)
    outlines, kept = polygons_from_rings(rings, group, objects.counts)
    if len(dropped := np.setdiff1d(group, kept)):
        rows = owner[np.searchsorted(group, dropped)]
        objects.lost += zip(rows.tolist(), drop_reasons(rings, group, dropped), strict=True)
    return table_of_outlines(objects, outlines, owner[np.searchsorted(group, kept)], points, options, source)


def table_of_outlines(
    objects: Objects, outlines: np.ndarray, owner: np.ndarray, points: Points, options: ReadOptions, source: str
) -> tuple[ObjectTable, np.ndarray]:
    """Build a table as above from polygons (G,), level-0 pixels, unrepaired, and the row of the object of each, (G,)."""
    counts = objects.counts
    repaired = repair(outlines, counts)
    objects.lost += [(int(owner[outline]), reason) for outline, reason in repaired.lost]
    if options.point_size_l0 is None:
        for row in np.unique(points.owner).tolist():
            objects.lose(row, "points_skipped")
        points = NO_POINTS
    with np.errstate(over="ignore"):
        xy = points.xy * (options.scale or 1.0)
    usable = is_usable(xy)
    counts["vertices_dropped"] += int((~usable).sum())
    squares = _squares(xy[usable], options.point_size_l0 or 0.0)
    rows = np.concatenate([owner[repaired.kept], points.owner[usable]]).astype(np.int64)
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    geometry = np.concatenate([repaired.geometry, squares])[order]
    was_invalid = np.concatenate([repaired.was_invalid, np.zeros(len(squares), dtype=bool)])[order]
    skipped = dict(Counter((objects.name[row] or "", reason) for row, reason in objects.lost))
    labels, label = number_labels([objects.name[row] for row in rows.tolist()], source)
    ids = _row_ids(objects.id, rows, counts)
    bad = np.flatnonzero(was_invalid).tolist()
    names = (*labels, "")  # label -1 is the last
    by_class = dict(Counter(names[label[row]] for row in bad))
    repairs = tuple(f"{ids[row]}: {problem}" for row, problem in zip(bad, repaired.problems, strict=False))
    features = {"features": len(objects), **+counts}
    log = ReadLog(by_class, skipped, repairs)
    if not len(rows):
        return empty_table(features, log=log), rows
    with np.errstate(over="ignore"):
        confidence = None if objects.confidence is None else np.array(objects.confidence).astype(np.float32)[rows]
    kind = np.asarray(objects.kind, dtype=np.uint8)[rows]
    return ObjectTable(geometry, ids, label, kind, labels, features, confidence=confidence, log=log), rows


def _squares(xy: np.ndarray, side_l0: float) -> np.ndarray:
    """Return squares around points (K, 2)."""
    (x, y), half = xy.T, side_l0 / 2
    return np.asarray(shapely.box(x - half, y - half, x + half, y + half), dtype=object).reshape(-1)


def number_labels(names: Sequence[str | None], source: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return class names in order of appearance, and int16 (n,), the number of each object's, -1 where it has none."""
    index: dict[str, int] = {}
    label = np.array([UNCLASSIFIED if name is None else index.setdefault(name, len(index)) for name in names], dtype=np.int64)
    if len(index) > MAX_LABELS:
        raise UserError(f"{source}: {len(index)} class names, {MAX_LABELS} at most: put names of single objects in `name`")
    return tuple(index), label.astype(np.int16)


def _row_ids(ids: Sequence[str], rows: np.ndarray, counts: Counter[str]) -> np.ndarray:
    """Return the ids of rows; where one object has several, which lie together, /0, /1, ... is added ("exploded")."""
    row_ids = np.empty(len(rows), dtype=object)
    row_ids[:] = [ids[row] for row in rows.tolist()]
    first = np.concatenate([[True], rows[1:] != rows[:-1]])[: len(rows)]
    counts["exploded"] += int((~first).sum())
    if not first.all():
        rank = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
        for i in np.flatnonzero(~first | np.append(~first[1:], False)).tolist():
            row_ids[i] = f"{row_ids[i]}/{rank[i]}"
    return row_ids
