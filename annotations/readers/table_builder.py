"""Build a table from the outlines, points, ids, classes and kinds that a reader hands over, and count every loss."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.rings import polygons_from_rings, repaired, rings_from_lists, usable, why_dropped, why_lost
from annotations.objects import MAX_LABELS, SHOWN_REPAIRS, UNCLASSIFIED, Kind, ObjectTable, ReadLog, empty_table

Rings = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Objects:
    """Objects of a file, one row each, before their geometry is looked at.

    id, name (None: unclassified), kind: of each object. confidence: of each, NaN where unknown; empty where none is known.
    lost: (row, reason) of objects left out so far.
    """

    id: list[str] = field(default_factory=list)
    name: list[str | None] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    lost: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.id)


@dataclass
class Shapes(Objects):
    """Objects that are added one at a time, polygons and points, in file order."""

    polygons: list[list] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    point_owner: list[int] = field(default_factory=list)

    def add(self, id: str, name: str | None, kind: int) -> int:
        """A new object; returns its row."""
        self.id.append(id)
        self.name.append(name or None)
        self.kind.append(kind)
        return len(self.id) - 1

    def lose(self, row: int, reason: str, counts: dict[str, int]) -> None:
        """Leave an object out and count it."""
        self.lost.append((row, reason))
        add(counts, reason, 1)

    def add_ring(self, row: int, ring: Sequence[tuple[float, float]]) -> None:
        self.polygons.append([ring])
        self.owner.append(row)

    def add_points(self, row: int, points: Sequence[tuple[float, float]]) -> None:
        self.points.extend(points)
        self.point_owner.extend([row] * len(points))

    def build(
        self, counts: dict[str, int], *, point_size_l0: float | None, scale: float = 1.0, source: str = ""
    ) -> tuple[ObjectTable, np.ndarray]:
        """The table, and the row of each of its objects here."""
        rings = rings_from_lists(self.polygons)
        owner = np.array(self.owner, dtype=np.int64)
        points = np.array(self.points, dtype=np.float64).reshape(-1, 2), np.array(self.point_owner, dtype=np.int64)
        return build_table(self, rings, owner, points, counts, point_size_l0=point_size_l0, scale=scale, source=source)


def build_table(
    objects: Objects,
    rings: Rings,
    owner: np.ndarray,
    points: tuple[np.ndarray, np.ndarray],
    counts: dict[str, int],
    *,
    point_size_l0: float | None,
    scale: float = 1.0,
    source: str = "",
) -> tuple[ObjectTable, np.ndarray]:
    """Outlines and points -> table, and int64 (n,), the object of each of its rows.

    rings: as rings_from_lists gives them, P polygons; owner: (P,) int64 ascending, the object of each; points: (K, 2) and
    (K,) the object of each; scale: level-0 pixels a unit of those; point_size_l0: as in read_annotations.
    """
    xy, length, ring_count = rings
    with np.errstate(over="ignore"):  # what leaves the numbers is dropped and counted
        xy = xy * scale
    outlines, of_row = polygons_from_rings(xy, length, ring_count, owner, counts)
    gone = np.setdiff1d(owner, of_row)
    objects.lost += zip(gone.tolist(), why_dropped((xy, length, ring_count), owner, gone), strict=True)
    return table_of_outlines(objects, outlines, of_row, of_row, points, counts, point_size_l0, scale, source)


def table_of_outlines(
    objects: Objects,
    outlines: np.ndarray,
    of_row: np.ndarray,
    wanted: np.ndarray,
    points: tuple[np.ndarray, np.ndarray],
    counts: dict[str, int],
    point_size_l0: float | None,
    scale: float,
    source: str,
) -> tuple[ObjectTable, np.ndarray]:
    """The same from polygons (G,) of objects of_row (G,), level-0 pixels, unrepaired; `wanted`: objects that had any."""
    before = outlines
    outlines, kept, was_bad, reasons = mended(before, counts)
    after = of_row[kept]
    lost = [*objects.lost]
    lost += [(row, "invalid_dropped") for row in np.setdiff1d(wanted, of_row).tolist()]
    gone = np.flatnonzero(~np.isin(of_row, after))
    lost += dict(zip(of_row[gone].tolist(), why_lost(before[gone]), strict=True)).items()
    xy, point_owner = points
    if point_size_l0 is None:
        skipped = np.unique(point_owner).tolist()
        add(counts, "points_skipped", len(skipped))
        lost += [(row, "points_skipped") for row in skipped]
        xy, point_owner = xy[:0], point_owner[:0]
    boxes, which = squares(xy * scale, point_size_l0, counts)
    rows = np.concatenate([after, point_owner[which]]).astype(np.int64)
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    geometry = np.concatenate([outlines, boxes])[order]
    flags = np.concatenate([was_bad, np.zeros(len(boxes), dtype=bool)])[order]
    lost_by = Counter((objects.name[row] or "", reason) for row, reason in lost)
    if not len(rows):
        return empty_table(counts, log=ReadLog(skipped=dict(lost_by))), rows
    labels, label = numbered([objects.name[row] for row in rows.tolist()], source)
    ids = numbered_ids([objects.id[row] for row in rows.tolist()], rows, counts)
    with np.errstate(over="ignore"):
        confidence = np.array(objects.confidence).astype(np.float32)[rows] if objects.confidence else None
    log = read_log(ids, label, labels, flags, reasons, dict(lost_by))
    kind = np.array(objects.kind, dtype=np.uint8)[rows]
    return ObjectTable(geometry, ids, label, kind, labels, counts, confidence=confidence, log=log), rows


def read_log(
    ids: np.ndarray, label: np.ndarray, labels: tuple[str, ...], flags: np.ndarray, reasons: list[str], skipped: dict
) -> ReadLog:
    """ReadLog on n objects: flags (n,) says which were repaired, reasons why, of the first of them in order."""
    bad = np.flatnonzero(flags)
    names = (*labels, "")
    repaired = Counter(names[i] for i in label[bad].tolist())
    repairs = [f"{ids[i]}: {reason}" for i, reason in zip(bad.tolist(), reasons, strict=False)]
    return ReadLog(dict(repaired), skipped, tuple(repairs))


def mended(outlines: np.ndarray, counts: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """As rings.repaired, and bool (K,), which were repaired, and why each of the first was wrong, in order."""
    before = counts.get("repaired", 0)
    fixed, kept = repaired(outlines, counts)
    if counts.get("repaired", 0) == before:
        return fixed, kept, np.zeros(len(fixed), dtype=bool), []
    original = outlines[kept]
    was_bad = np.fromiter(map(operator.is_not, fixed, original), dtype=bool, count=len(fixed))
    return fixed, kept, was_bad, [str(why) for why in shapely.is_valid_reason(original[was_bad][:SHOWN_REPAIRS])]


def squares(xy: np.ndarray, side_l0: float | None, counts: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Squares around points (K, 2), and which point each belongs to; positions that are not usable are counted."""
    good = usable(xy)
    add(counts, "vertices_dropped", int((~good).sum()))
    half = (side_l0 or 0.0) / 2
    x, y = xy[good].T
    return np.asarray(shapely.box(x - half, y - half, x + half, y + half), dtype=object).reshape(-1), np.flatnonzero(good)


def numbered(names: Sequence[str | None], source: str = "") -> tuple[tuple[str, ...], np.ndarray]:
    """Class names in order of appearance, and int16 (n,), the number of each, -1 where there is none."""
    index: dict[str, int] = {}
    label = np.array([UNCLASSIFIED if name is None else index.setdefault(name, len(index)) for name in names], dtype=np.int64)
    if len(index) > MAX_LABELS:
        raise UserError(f"{source}: {len(index)} class names, {MAX_LABELS} at most: put names of single objects in `name`")
    return tuple(index), label.astype(np.int16)


def numbered_ids(ids: Sequence[str], rows: np.ndarray, counts: dict[str, int]) -> np.ndarray:
    """Ids as an array (n,); where one object has several rows, which lie together, /0, /1, ... is added ("exploded")."""
    found = np.empty(len(rows), dtype=object)
    found[:] = list(ids)
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    extra = int((~first).sum())
    if extra:
        add(counts, "exploded", extra)
        rank = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
        for i in np.flatnonzero(~first | np.append(~first[1:], False)).tolist():
            found[i] = f"{found[i]}/{rank[i]}"
    return found


def kind_of(kind: str, default: Kind) -> Kind:
    """Return the kind that the option decides for all objects; for "auto" the default, what the reader takes this one for."""
    return default if kind == "auto" else Kind[kind.upper()]


def add(counts: dict[str, int], name: str, n: int) -> None:
    if n:
        counts[name] = counts.get(name, 0) + n
