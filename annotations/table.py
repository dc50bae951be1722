"""The one table that every reader fills: polygons at level 0 with an id, a class and a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import shapely

from annotations.errors import UserError

TISSUE, CELL, PROPOSAL = 0, 1, 2
UNCLASSIFIED = -1
MAX_LABELS = int(np.iinfo(np.int16).max)


@dataclass(frozen=True)
class ObjectTable:
    """n objects in level-0 pixels.

    geometry: object (n,), valid shapely Polygon or MultiPolygon of positive area. id: object (n,) of str.
    label: int16 (n,), index into `labels`, -1 unclassified. kind: uint8 (n,), TISSUE, CELL or PROPOSAL.
    labels: class names, sorted. counts: what reading did, for example features, repaired, points_skipped.
    """

    geometry: np.ndarray
    id: np.ndarray
    label: np.ndarray
    kind: np.ndarray
    labels: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.geometry)

    def shifted(self, dx_l0: float, dy_l0: float) -> ObjectTable:
        """The same objects, moved by (dx, dy) level-0 pixels."""
        if not len(self):
            return self
        moved = shapely.transform(self.geometry, lambda xy: np.add(xy, [dx_l0, dy_l0]))
        return replace(self, geometry=np.asarray(moved, dtype=object).reshape(len(self)))


def empty_table(counts: dict[str, int] | None = None, labels: tuple[str, ...] = ()) -> ObjectTable:
    """A table of no objects."""
    none = np.zeros(0, dtype=object)
    return ObjectTable(none, none, np.zeros(0, np.int16), np.zeros(0, np.uint8), labels, dict(counts or {}))


def concatenate(tables: Iterable[ObjectTable]) -> ObjectTable:
    """One table after the other; label lists are merged by name, counts are added."""
    tables = list(tables)
    if not tables:
        return empty_table()
    if len(tables) == 1:
        return tables[0]
    labels = tuple(sorted({name for table in tables for name in table.labels}))
    if len(labels) > MAX_LABELS:
        raise UserError(f"{len(labels)} classes: at most {MAX_LABELS} fit: are object names stored as classes?")
    index = {name: i for i, name in enumerate(labels)}
    # The last element serves label -1, which indexes it from behind.
    maps = [np.array([*(index[name] for name in table.labels), -1], np.int16) for table in tables]
    counts: Counter[str] = Counter()
    for table in tables:
        counts.update(table.counts)
    return ObjectTable(
        geometry=np.concatenate([table.geometry for table in tables]),
        id=np.concatenate([table.id for table in tables]),
        label=np.concatenate([to[table.label] for to, table in zip(maps, tables, strict=True)]),
        kind=np.concatenate([table.kind for table in tables]),
        labels=labels,
        counts=dict(counts),
    )
