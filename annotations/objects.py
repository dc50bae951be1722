"""The one table that every reader fills: polygons at level 0 with an id, a class and a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from annotations.errors import UserError

if TYPE_CHECKING:
    import geopandas

KindOption = Literal["auto", "tissue", "cell"]  # "auto": as the file states it, else as its reader takes it
UNCLASSIFIED = -1
MAX_LABELS = int(np.iinfo(np.int16).max)
SHOWN_REPAIRS = 200  # repairs that are listed
SHOWN_IDS = 20  # objects of a reason that are listed by their ids


class Kind(IntEnum):
    """Kinds of objects, numbered as in /objects/kind of a slide file."""

    TISSUE = 0
    CELL = 1
    PROPOSAL = 2

    @property
    def word(self) -> str:
        """The kind as options, tables and messages call it: tissue, cell, proposal."""
        return self.name.lower()


@dataclass(frozen=True)
class ReadLog:
    """Numbers by class name ("": unclassified), which stay true when tables are put together.

    repaired: class -> objects whose outline was invalid. skipped: (class, reason) -> objects left out, the reasons as in
    the counts of a table. repairs: "id: what was wrong", the first SHOWN_REPAIRS. notes: what else the user should know.
    ids: reason, or another of the counts of a table -> the objects behind it, the first SHOWN_IDS; of COCO and VOC alone.
    """

    repaired: dict[str, int] = field(default_factory=dict)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ids: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def with_class_names(self, rename: Callable[[str], str]) -> ReadLog:
        """Return the log under other class names; "" stays ""."""
        repaired: Counter[str] = Counter()
        skipped: Counter[tuple[str, str]] = Counter()
        for name, count in self.repaired.items():
            repaired[rename(name) if name else ""] += count
        for (name, reason), count in self.skipped.items():
            skipped[rename(name) if name else "", reason] += count
        return replace(self, repaired=dict(repaired), skipped=dict(skipped))


def join_logs(logs: Sequence[ReadLog]) -> ReadLog:
    """Add logs up; a note that comes twice is kept once."""
    repaired: Counter[str] = Counter()
    skipped: Counter[tuple[str, str]] = Counter()
    for log in logs:
        repaired.update(log.repaired)
        skipped.update(log.skipped)
    reasons = dict.fromkeys(reason for log in logs for reason in log.ids)
    ids = {reason: tuple(id for log in logs for id in log.ids.get(reason, ()))[:SHOWN_IDS] for reason in reasons}
    repairs = tuple(line for log in logs for line in log.repairs)[:SHOWN_REPAIRS]
    notes = tuple(dict.fromkeys(note for log in logs for note in log.notes))
    return ReadLog(dict(repaired), dict(skipped), repairs, notes, ids)


@dataclass(frozen=True)
class ObjectTable:
    """n objects in level-0 pixels.

    geometry: object (n,), valid shapely Polygon or MultiPolygon of positive area. id: object (n,) of str.
    label: int16 (n,), index into `labels`, -1 unclassified. kind: uint8 (n,), values of Kind.
    labels: class names, each once, in order of appearance; sorted where
    files were put together. counts: what reading did, for example features, repaired, points_skipped.
    source: object (n,) of str, the file each comes from. confidence: float32 (n,), what a detector says, NaN where it
        does not. measurements: name -> float64 (n,), NaN where an object has none; read on demand. Each is None where
        nothing is known. log: what reading did, by class.
    """

    geometry: np.ndarray
    id: np.ndarray
    label: np.ndarray
    kind: np.ndarray
    labels: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    source: np.ndarray | None = None
    confidence: np.ndarray | None = None
    measurements: dict[str, np.ndarray] | None = None
    log: ReadLog = field(default_factory=ReadLog)

    def __len__(self) -> int:
        return len(self.geometry)

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> ObjectTable:
        """Return the same objects, their positions (V, 2) moved."""
        import shapely

        if not len(self):
            return self
        return replace(self, geometry=np.asarray(shapely.transform(self.geometry, move), dtype=object).reshape(len(self)))

    def shifted(self, dx_l0: float, dy_l0: float) -> ObjectTable:
        """Return the same objects, moved by (dx, dy) level-0 pixels."""
        return self.moved(lambda xy: np.add(xy, [dx_l0, dy_l0]))

    def scaled(self, factor: float) -> ObjectTable:
        """Return the same objects with all coordinates multiplied."""
        return self if factor == 1 else self.moved(lambda xy: xy * factor)

    def take(self, rows: np.ndarray) -> ObjectTable:
        """Return the objects of rows (indices or bool)."""

        known = {name: column for name in (*_COLUMNS, *_OPTIONAL) if (column := getattr(self, name)) is not None}
        columns: dict[str, Any] = {name: column[rows] for name, column in known.items()}
        columns["measurements"] = self.measurements and {name: values[rows] for name, values in self.measurements.items()}
        return replace(self, **columns)

    def with_notes(self, *notes: str) -> ObjectTable:
        """Return the table with notes in its log."""
        return replace(self, log=replace(self.log, notes=(*self.log.notes, *notes)))

    def class_names(self) -> list[str | None]:
        """Return the class of each object, None where it has none."""
        names = (*self.labels, None)
        return [names[i] for i in self.label.tolist()]

    def to_geodataframe(self) -> geopandas.GeoDataFrame:
        """Return one row an object: id, label (None where unclassified), kind (tissue, cell, proposal), source, confidence,
        a column a measurement, geometry. Coordinates are level-0 pixels: no coordinate reference system (crs is None).
        """
        import geopandas

        nothing = np.full(len(self), None, dtype=object)
        columns: dict[str, Any] = {
            "id": self.id,
            "label": np.array([*self.class_names(), None], dtype=object)[:-1],
            "kind": np.array([Kind(kind).word for kind in self.kind.tolist()], dtype=object),
            "source": nothing if self.source is None else self.source,
            "confidence": np.full(len(self), np.nan, np.float32) if self.confidence is None else self.confidence,
        }
        for name, values in (self.measurements or {}).items():
            columns[name if name not in columns and name != "geometry" else f"{name} (measured)"] = values
        return geopandas.GeoDataFrame(columns, geometry=self.geometry, crs=None)


_COLUMNS = ("geometry", "id", "label", "kind")
_OPTIONAL = {"source": "", "confidence": np.float32("nan")}  # and what stands where it is not known


def empty_table(counts: dict[str, int] | None = None, labels: tuple[str, ...] = (), log: ReadLog | None = None) -> ObjectTable:
    """Return a table of no objects."""
    none, label, kind = np.zeros(0, dtype=object), np.zeros(0, np.int16), np.zeros(0, np.uint8)
    return ObjectTable(none, none, label, kind, labels, dict(counts or {}), log=log or ReadLog())


def concatenate(tables: Iterable[ObjectTable], *, sort_labels: bool = True) -> ObjectTable:
    """Put one table after the other; counts are added.

    Classes are merged by name, and sorted by it; sort_labels=False keeps the order in which they appear.
    """
    tables = list(tables)
    if not tables:
        return empty_table()
    if len(tables) == 1:
        return tables[0]
    labels = tuple(dict.fromkeys(name for table in tables for name in table.labels))
    labels = tuple(sorted(labels)) if sort_labels else labels
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
        measurements=_joined_measurements(tables),
        log=join_logs([table.log for table in tables]),
        **{name: _joined(tables, name) for name in _OPTIONAL},
    )


def _joined(tables: list[ObjectTable], name: str) -> np.ndarray | None:
    """Join an optional column of tables put one after the other; None where none of them has it."""
    columns = [getattr(table, name) for table in tables]
    known = [column for column in columns if column is not None]
    if not known:
        return None
    filled = [
        np.full(len(table), _OPTIONAL[name], dtype=known[0].dtype) if column is None else column
        for table, column in zip(tables, columns, strict=True)
    ]
    return np.concatenate(filled)


def _joined_measurements(tables: list[ObjectTable]) -> dict[str, np.ndarray] | None:
    """Join measurements of tables put one after the other, NaN where a table has none of the name; None where none has any."""
    if all(table.measurements is None for table in tables):
        return None
    columns: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for table in tables for name in table.measurements or {}):
        parts = [(table.measurements or {}).get(name, np.full(len(table), np.nan)) for table in tables]
        columns[name] = np.concatenate(parts)
    return columns
